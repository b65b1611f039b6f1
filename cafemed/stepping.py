"""One pass of training: batches made ready on the host, steps on the device.

What has a shape that depends on the data (which codes exist, which edges) is worked out on the
host by the model's `prepare`, where it has one, so that a step on a GPU never waits for the
device: while it computes, the host makes the next batch ready in pinned memory and queues its
copy. The losses are looked at every `STEPS_BETWEEN_CHECKS` steps there, and at every step on a CPU.

Several processes (`cafemed/process_group.py`) divide every batch among them, patient by patient,
and make the step that one process would make with all of it: the loss is a mean over visits, and
they do not have the same number of visits. DistributedDataParallel takes the plain mean of the
processes' gradients, so each weights its own mean loss by its visits, times the number of
processes over the visits of the batch. One that has no patient left, in a batch smaller than the
group, goes through the motions with another's and the weight 0.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cafemed import losses
from cafemed.batches import Batch, VisitArrays, collate
from cafemed.errors import TrainingError
from cafemed.process_group import Group

if TYPE_CHECKING:
    from cafemed.training import FitConfig

TERMS = ("loss", "bce", "margin", "ddi")
#: Steps between two looks at the losses where a look waits for a GPU, or for other processes.
STEPS_BETWEEN_CHECKS = 50

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Ready:
    """A batch as a step takes it.

    Attributes:
        batch: on the model's device.
        prepared: what the model's `prepare` made of it, on that device; None if it has none.
    """

    batch: Batch
    prepared: Any


def make_ready(model: nn.Module, batch: Batch, device: torch.device) -> Ready:
    """Lets the model prepare a batch that is on the host, and moves both to the device."""
    prepare = getattr(model, "prepare", None)
    with torch.no_grad():
        prepared = None if prepare is None else prepare(batch)
    return moved(Ready(batch, prepared), device)


def moved(value: T, device: torch.device) -> T:
    """The same value with every tensor in it on a device; the host does not wait for copies.

    Args:
        value: a tensor, or dataclasses, tuples, lists and plain values that hold some.
        device: to a GPU the copies go through pinned memory.
    """
    if device.type == "cpu":
        return value
    return _moved(value, device)  # type: ignore[no-any-return]


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        if device.type == "cuda" and value.device.type == "cpu":
            value = value.pin_memory()
        return value.to(device, non_blocking=True)
    if isinstance(value, tuple | list):
        return type(value)(_moved(item, device) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        changed = {name: _moved(item, device) for name, item in fields.items()}
        return dataclasses.replace(value, **changed)
    return value


def run_model(model: nn.Module, ready: Ready, precision: str = "float32") -> Tensor:
    """Logits of the visits that exist, float32 (V, N_m).

    Args:
        model: on the device of `ready`.
        ready: of `make_ready`.
        precision: "float32", or "bfloat16": the model runs under autocast, its weights stay
            float32.
    """
    arguments = () if ready.prepared is None else (ready.prepared,)
    context: Any = contextlib.nullcontext()
    if precision != "float32":
        context = torch.autocast(ready.batch.counts.device.type, dtype=getattr(torch, precision))
    with context:
        logits = model(ready.batch, *arguments)
    return ready.batch.flatten(logits).float()


class Stepper:
    """Steps a model through its training patients.

    Args:
        model: on `device`.
        ddi: bool (N_m, N_m), the interacting pairs.
        config: see FitConfig.
        device: where the steps are.
        group: the processes that step together, each on its part of every batch.
    """

    def __init__(
        self,
        model: nn.Module,
        ddi: NDArray[np.bool_],
        config: "FitConfig",
        device: torch.device,
        group: Group = Group(),  # noqa: B008  frozen
    ) -> None:
        self.model, self.config, self.device, self.group = model, config, device, group
        self._parallel = group.parallel(model)
        self.ddi = torch.from_numpy(ddi.astype(np.float32)).to(device)
        self.optimizer = torch.optim.Adam(
            model.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=device.type in ("cpu", "cuda"),
        )

    def epoch(
        self, arrays: VisitArrays, patients: NDArray[np.int64], number: int
    ) -> dict[str, float]:
        """One pass over the patients, in an order drawn from the seed and the epoch's number.

        Args:
            arrays: of the whole cohort.
            patients: indices, of the whole group.
            number: of the epoch, from 1.

        Returns:
            Means of TERMS over the visits, in training mode.

        Raises:
            TrainingError: if a term is not finite; names epoch, batch and term. The weights are
                then those of the last look at the losses or later, to be thrown away.
        """
        shuffle = np.random.default_rng((self.config.seed, number))
        order, size = shuffle.permutation(patients), self.config.batch_size
        chunks = [order[i : i + size] for i in range(0, len(order), size)]
        counts = np.diff(arrays.patient_offsets)
        visits = torch.tensor([[float(counts[chunk].sum())] for chunk in chunks])
        terms = torch.zeros(len(chunks), len(TERMS), device=self.device)
        waits = self.device.type == "cuda" or self.group.size > 1
        interval = STEPS_BETWEEN_CHECKS if waits else 1
        self.model.train()
        for step, (ready, own) in enumerate(self._ready(arrays, chunks)):
            share = own / float(visits[step])
            found = self._losses(ready, own > 0)
            means = torch.stack([getattr(found, name) for name in TERMS]).mean(1)
            terms[step] = means.detach() * share
            if (step + 1) % interval == 0 or step + 1 == len(chunks):
                first = step - step % interval
                seen = self.group.sum(terms[first : step + 1])
                self._require_finite(seen.cpu(), number, first, len(chunks))
            self.optimizer.zero_grad()
            (means[0] * (share * self.group.size)).backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
        means = (terms.cpu() * visits).sum(dim=0) / visits.sum()
        return dict(zip(TERMS, means.tolist(), strict=True))

    def _ready(
        self, arrays: VisitArrays, chunks: list[NDArray[np.int64]]
    ) -> Iterator[tuple[Ready, int]]:
        """This process's part of every batch, and how many of its visits count."""
        for chunk in chunks:
            part = self.group.part(chunk)
            batch = collate(arrays, part if len(part) else chunk[:1])
            own = batch.num_visits if len(part) else 0
            yield make_ready(self.model, batch, self.device), own

    def _losses(self, ready: Ready, counts: bool) -> losses.VisitLosses:
        """The losses of the visits; if they do not count, the batch's rate is without them."""
        config = self.config
        return losses.visit_losses(
            run_model(self._parallel, ready, config.precision),
            ready.batch.targets,
            self.ddi,
            ddi_target=config.ddi_target,
            ddi_coefficient=config.ddi_coefficient,
            ddi_weight=config.ddi_weight,
            margin_weight=config.margin_weight,
            threshold=config.threshold,
            objective=config.objective,
            total=lambda values: self.group.sum(values * float(counts)),
        )

    def _require_finite(self, terms: Tensor, epoch: int, first: int, num_steps: int) -> None:
        """Refuses losses (steps, terms) that are not finite, naming the first batch and term."""
        bad = torch.nonzero(~torch.isfinite(terms))
        if len(bad) == 0:
            return
        step = int(bad[0, 0])
        values = dict(zip(TERMS, terms[step].tolist(), strict=True))
        found = {name: x for name, x in values.items() if not math.isfinite(x)}
        if len(found) > 1:
            del found["loss"]  # their sum: name the cause
        raise TrainingError(
            f"training stopped in epoch {epoch}, batch {first + step + 1} of {num_steps}: "
            f"expected finite loss terms, got {', '.join(f'{n} {x}' for n, x in found.items())}; "
            f"try a train.learning_rate below {self.config.learning_rate:g}"
        )
