"""The registry of models: names, options, seeds."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml

import models
from cafemed.batches import collate
from cafemed.codes import KINDS
from cafemed.errors import ArtifactError, ConfigError
from cafemed.paths import CONF_DIR, PROJECT_DIR
from models.cafemed import CafeMedOptions


def test_same_seed_gives_the_same_weights_to_the_bit(world):
    a = models.build("cafemed", world.inputs, seed=5).state_dict()
    torch.manual_seed(99)
    b = models.build("cafemed", world.inputs, {}, seed=5).state_dict()
    c = models.build("cafemed", world.inputs, seed=6).state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["embedding"], c["embedding"])


def test_building_leaves_the_random_state_alone(world):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    models.build("cafemed", world.inputs, seed=5)
    assert torch.equal(torch.rand(3), expected)


def test_weights_start_as_stated(world):
    weights = models.build("cafemed", world.inputs, seed=0).state_dict()
    assert weights["embedding"].abs().max() <= 0.1
    assert weights["embedding"].std() == pytest.approx(0.1 / np.sqrt(3), rel=0.05)
    kernel = weights["charm.spatial_attention.first.weight"]
    bound = 1 / np.sqrt(49 * 192)
    assert 0.99 * bound < kernel.abs().max() <= bound
    assert torch.equal(weights["class_mask.mask"], torch.ones(3, 4, 64))
    assert torch.equal(weights["fusion"], torch.ones(3, 2))


def test_names_lists_what_can_be_built(world):
    assert "cafemed" in models.NAMES
    for name in models.NAMES:
        assert isinstance(models.build(name, world.inputs), torch.nn.Module)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.1}, "model.alpha: unknown key; known keys: dimension"),
        ({"dropout": 1.0}, "model.dropout: expected a value in [0, 1), got 1.0"),
        ({"dropout": "0.7"}, "model.dropout: expected float, got '0.7'"),
        ({"dimension": 0}, "model.dimension: expected a value in [1, inf], got 0"),
        ({"gate": "both"}, "model.gate: expected one of 'visit', 'position', 'none', got 'both'"),
        ({"cwg_hidden": 0}, "model.cwg_hidden: expected a value in [1, inf], got 0"),
        (
            {"reduction_ratio": 5},
            "model: reduction_ratio: expected a divisor of 3 * dimension = 192 "
            "(CHARM's channels), got 5",
        ),
        (
            {"dimension": 10, "layout": "width", "reduction_ratio": 2},
            "model: shuffle_groups: expected a divisor of dimension = 10 (CHARM's channels), "
            "got 4; the paper leaves the shuffle out then: shuffle_groups=1 does so",
        ),
    ],
)
def test_options_that_cannot_work_are_refused(options, message, world):
    with pytest.raises(ConfigError) as caught:
        models.build("cafemed", world.inputs, options)
    assert str(caught.value).startswith(message)
    with pytest.raises(ConfigError):
        models.check_options("cafemed", options)


def test_all_wrong_options_are_named_together(world):
    with pytest.raises(ConfigError) as caught:
        models.build("cafemed", world.inputs, {"dropout": -1, "gate": 3, "depth": 2})
    assert all(key in str(caught.value) for key in ("model.dropout", "model.gate", "model.depth"))


def test_charm_options_are_free_where_charm_is_off(world):
    model = models.build("cafemed", world.inputs, {"use_charm": False, "reduction_ratio": 7})
    assert not any("charm" in name for name, _ in model.named_parameters())


def test_unknown_name_is_refused(world):
    with pytest.raises(ConfigError, match=r"model\.name: expected one of cafemed.*got 'gpt'"):
        models.build("gpt", world.inputs)


def test_the_configuration_file_spells_out_the_defaults():
    written = yaml.safe_load((CONF_DIR / "model" / "cafemed.yaml").read_text())
    assert written.pop("name") == "cafemed"
    assert written == dataclasses.asdict(CafeMedOptions())


def test_importing_models_imports_no_model():
    code = "import sys, models; sys.exit(any(m.startswith('models.') for m in sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=PROJECT_DIR, check=False).returncode == 0
    )


@pytest.mark.parametrize("name", models.NAMES)
@pytest.mark.parametrize(
    ("kind", "size"), [("diagnosis", 23), ("procedure", 17), ("medication", 11)]
)
def test_a_code_beyond_its_vocabulary_is_refused(name, kind, size, world):
    """The models' one table would have another vocabulary's code there."""
    model = models.build(name, world.inputs, {"dimension": 8})
    batch = collate(world.arrays, np.array([1]))
    modality = KINDS.index(kind)
    visit = int(batch.counts[:, modality].argmax())
    codes = batch.codes.clone()
    codes[visit, modality, 0] = size
    with pytest.raises(ArtifactError) as caught:
        model(dataclasses.replace(batch, codes=codes))
    assert str(caught.value) == (
        f"{kind} codes of a batch: expected indices in 0 .. {size - 1}, the vocabulary's, "
        f"got {size}"
    )


@pytest.mark.parametrize("name", models.NAMES)
def test_steps_after_a_patients_last_visit_hold_0(name, world):
    model = models.build(name, world.inputs, {"dimension": 8}).eval()
    batch = collate(world.arrays, np.arange(5))
    after = torch.arange(batch.num_steps) >= batch.lengths[:, None]
    assert after.any()
    with torch.inference_mode():
        logits = model(batch)
    assert not logits[after].any()
    assert logits[~after].any()


@pytest.mark.parametrize("name", models.NAMES)
def test_a_batch_of_other_vocabularies_is_refused(name, world):
    model = models.build(name, world.inputs, {"dimension": 8})
    batch = collate(dataclasses.replace(world.arrays, sizes=(24, 16, 11)), np.array([0]))
    with pytest.raises(ArtifactError, match=r"built for .*\(23, 17, 11\).* have \(24, 16, 11\)"):
        model(batch)


@pytest.mark.parametrize("name", models.NAMES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"effects": np.zeros((39, 11), np.float32)}, r"effects: expected shape \(40, 11\)"),
        ({"effects": np.zeros((40, 12), np.float32)}, r"effects: .* got \(40, 12\)"),
        ({"ddi": np.zeros((11, 10), np.bool_)}, r"ddi: expected shape \(11, 11\)"),
        ({"molecules": np.zeros((12, 3), np.bool_)}, "molecules: expected 11 rows"),
    ],
)
def test_inputs_of_other_vocabularies_are_refused(name, change, message, world):
    with pytest.raises(ArtifactError, match=message):
        models.build(name, dataclasses.replace(world.inputs, **change))
