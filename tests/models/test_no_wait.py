"""A training step never asks the device for a value: the host could not run ahead of a GPU.

Steps run on torch's `meta` device, which has shapes and no content. Whatever waits for a value on a
GPU (`.item()`, `if tensor`, `.cpu()`, `nonzero`, a mask as an index, `unique`, `repeat_interleave`
without a size) has no answer there and raises, and so does a tensor that stayed on the host. Two
things that raise nowhere are looked for by name.
"""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import models
from cafemed import losses
from cafemed.batches import collate
from cafemed.stepping import Ready, make_ready, moved, run_model
from models.dropout import FastDropout

META = torch.device("meta")


class NoValues(TorchFunctionMode):
    """Refuses tensors made of host values, whose copy to a GPU is waited for."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.tensor, torch.as_tensor, torch.from_numpy, torch.asarray):
            raise AssertionError(f"{function.__name__} in a step")
        return function(*args, **(kwargs or {}))


class NoCopies(TorchDispatchMode):
    """Refuses copies between host and device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket._qualified_op_name
        if name in ("aten::_to_copy", "aten::copy_"):
            tensors = [x for x in args if isinstance(x, torch.Tensor)]
            places = {x.device.type for x in tensors} | {
                torch.device(kwargs.get("device") or tensors[0].device).type
            }
            if len(places) > 1:
                raise AssertionError(f"{name} between {sorted(places)} in a step")
        return function(*args, **kwargs)


def _step(model, ready, ddi, precision="float32"):
    """Forward, loss and backward, as in stepping.Stepper."""
    with NoValues(), NoCopies():
        logits = run_model(model, ready, precision)
        found = losses.visit_losses(logits, ready.batch.targets, ddi)
        means = torch.stack([found.loss, found.bce, found.margin, found.ddi]).mean(1)
        means[0].backward()


def _on_meta(name, world, options=None):
    batch = collate(world.arrays, np.arange(5))
    model = models.build(name, world.inputs, {"dimension": 8, **(options or {})}).train()
    ready = make_ready(model, batch, META)
    return model.to(META), ready, torch.zeros(world.inputs.ddi.shape, device=META)


@pytest.mark.parametrize("name", models.NAMES)
def test_a_step_never_waits_for_the_device(name, world):
    model, ready, ddi = _on_meta(name, world)
    _step(model, ready, ddi)
    assert all(p.grad is not None and p.grad.device == META for p in model.parameters())


CAFEMED = [
    {"layout": "width"},
    {"gate": "position"},
    {"cwg_shared": False},
    {"kernel_storage": "full", "norm_affine": True},
    {"use_charm": False, "dropout_shared": False, "first_visit_slot": False},
]


@pytest.mark.parametrize("options", CAFEMED, ids=lambda o: "-".join(o))
def test_nor_does_one_with_other_options(options, world):
    _step(*_on_meta("cafemed", world, options))


class Curious(nn.Module):
    """A model that looks at what it should not; one way for each test."""

    def __init__(self, look):
        super().__init__()
        self.look, self.weight = look, nn.Parameter(torch.zeros(11))

    def forward(self, batch):
        rows = batch.targets * self.weight
        return batch.pad(rows + self.look(rows) * 0)


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x.sum().item(),
        lambda x: x.detach().cpu().sum().item(),
        lambda x: 1 if x.sum() > 0 else 0,
        lambda x: len(x.nonzero()),
        lambda x: len(x[x > 0]),
        lambda x: len(torch.unique(x)),
        lambda x: len(torch.arange(3, device=x.device).repeat_interleave(x[:3, 0].long())),
        lambda x: torch.tensor([1.0, 2.0], device=x.device).sum(),
        lambda x: torch.ones(11).to(x.device),
    ],
)
def test_a_step_that_waits_is_found(look, world):
    batch = collate(world.arrays, np.arange(5))
    model = Curious(look)
    ready = make_ready(model, batch, META)
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
        _step(model.to(META), ready, torch.zeros(11, 11, device=META))


def test_moving_reaches_every_tensor(world):
    model = models.build("causalmed", world.inputs, {"dimension": 8}).train()
    ready = make_ready(model, collate(world.arrays, np.arange(5)), torch.device("cpu"))
    places = set()

    def look(value):
        if isinstance(value, torch.Tensor):
            places.add(value.device.type)
        elif isinstance(value, tuple | list):
            for item in value:
                look(item)
        elif hasattr(value, "__dataclass_fields__"):
            for name in value.__dataclass_fields__:
                look(getattr(value, name))

    look(moved(ready, META))
    assert places == {"meta"}
    assert moved(ready, torch.device("cpu")) is ready


@pytest.mark.parametrize("name", models.NAMES)
def test_a_prepared_batch_gives_the_same_logits(name, world):
    model = models.build(name, world.inputs, {"dimension": 8}).eval()
    batch = collate(world.arrays, np.arange(5))
    ready = make_ready(model, batch, torch.device("cpu"))
    assert torch.equal(batch.flatten(model(batch)), run_model(model, ready))
    assert isinstance(ready, Ready)


@pytest.mark.parametrize("name", models.NAMES)
def test_bfloat16_is_close_and_its_gradients_are_float32(name, world):
    plain = models.build(name, world.inputs, {"dimension": 16}).train()
    for module in plain.modules():
        if isinstance(module, FastDropout):
            module.dropped_levels = 0
    found = []
    for precision in ("float32", "bfloat16"):
        model = copy.deepcopy(plain)
        ready = make_ready(model, collate(world.arrays, np.arange(5)), torch.device("cpu"))
        logits = run_model(model, ready, precision)
        assert logits.dtype == torch.float32
        logits.pow(2).mean().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)
        found.append((logits.detach(), torch.cat([g.flatten() for g in gradients])))
    for one, other, tolerance in zip(*found, (0.02, 0.05), strict=True):
        assert not torch.equal(one, other)
        assert (one - other).norm() < tolerance * one.norm()
