"""What benchmarks/training.py measures with: invented visits, counted products, cases."""

import dataclasses
import importlib.util

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import models
from benchmarks.epochs import data, measures
from benchmarks.epochs.measures import Case, Effort
from cafemed import paths
from cafemed.batches import collate

TINY = data.SHAPES["tiny"]
EFFORT = Effort(passes=1, limit_s=0.2, one_visits=12, predictions=1)


@pytest.fixture(scope="module")
def program():
    path = paths.PROJECT_DIR / "benchmarks" / "training.py"
    spec = importlib.util.spec_from_file_location("benchmarks_training", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["mimic3 light", "mimic3 heavy"])
def test_visits_have_the_shape_they_say(name):
    shape = data.SHAPES[name]
    arrays = data.arrays(shape, 3)
    visits = np.diff(arrays.patient_offsets)
    assert len(visits) == 6_350
    assert visits.sum() == 15_032
    assert visits[shape.train].sum() == 10_006
    assert visits[shape.test].sum() == 2_552
    assert visits.min() == 2
    assert 20 <= visits.max() <= data.MAX_VISITS
    first = np.zeros(arrays.num_visits, bool)
    first[arrays.patient_offsets[:-1]] = True
    assert not arrays.counts[first, 2].any()
    means = [*arrays.counts[:, :2].mean(0), arrays.targets.sum(1).mean()]
    assert means == pytest.approx(shape.codes, rel=0.03)
    # The medications of a visit are the targets of the one before it.
    for visit in np.flatnonzero(~first)[:50]:
        own = arrays.codes[visit, 2, : arrays.counts[visit, 2]]
        assert sorted(own) == np.flatnonzero(arrays.targets[visit - 1]).tolist()


def test_codes_of_a_visit_differ_and_lie_in_the_vocabulary():
    arrays = data.arrays(TINY, 1)
    for codes, counts in zip(arrays.codes, arrays.counts, strict=True):
        for k, size in enumerate(TINY.sizes):
            own = codes[k, : counts[k]]
            assert len(set(own.tolist())) == counts[k]
            assert own.max(initial=0) < size


def test_arrays_survive_their_folder(tmp_path):
    arrays = data.arrays(TINY, 1)
    data.save(arrays, tmp_path / "x")
    again = data.load(tmp_path / "x")
    for field in dataclasses.fields(arrays):
        assert np.array_equal(getattr(arrays, field.name), getattr(again, field.name))


def test_a_prefix_holds_the_visits_up_to_its_own():
    arrays = data.arrays(TINY, 1)
    visit = int(np.argmax(np.diff(arrays.patient_offsets)))  # a patient with many
    start = int(arrays.patient_offsets[visit])
    found = data.prefixes(arrays, np.array([start, start + 2]))
    assert found.patient_offsets.tolist() == [0, 1, 4]
    rows = [start, start, start + 1, start + 2]
    assert np.array_equal(found.codes, arrays.codes[rows])
    assert np.array_equal(found.targets, arrays.targets[rows])


def test_products_counted_from_shapes_are_those_that_torch_counts():
    shape = TINY
    arrays, inputs = data.arrays(shape, 2), data.inputs(shape, 2)
    model = models.build("cafemed", inputs)
    with FlopCounterMode(display=False) as counter:
        for patient in shape.train[:24]:  # one at a time: nothing is padded
            batch = collate(arrays, np.array([patient]))
            model(batch).sum().backward()
    end = arrays.patient_offsets[24]
    positions = np.maximum(arrays.counts[:end].max(1), 1).sum()
    codes = measures.distinct_codes(arrays, shape.train[:24], 1)
    expected = measures.cafemed_flop(int(end), int(positions), codes, shape.sizes[2])
    # Less of torch's: the loss's products, and gradients of inputs that have none.
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)


def test_an_epoch_of_mimic3_light_is_about_119_gflop():
    shape = data.SHAPES["mimic3 light"]
    arrays = data.arrays(shape, 0)
    end = arrays.patient_offsets[len(shape.train)]
    positions = np.maximum(arrays.counts[:end].max(1), 1).sum()
    codes = measures.distinct_codes(arrays, shape.train, 32)
    flop = measures.cafemed_flop(int(end), int(positions), codes, 131)
    assert flop == pytest.approx(119e9, rel=0.08)


@pytest.mark.parametrize("batch", [8, 0])
@pytest.mark.parametrize("model", models.NAMES)
def test_a_case_gives_its_metrics(model: str, batch: int, tmp_path):
    data.save(data.arrays(TINY, 1), tmp_path / "x")
    before = torch.get_num_threads()
    found = measures.measure(Case(model, "tiny", batch), tmp_path / "x", 1, EFFORT)
    assert torch.get_num_threads() == before
    wanted = {"epoch_s", "epoch_cpu_s", "inference_s", "ms_a_visit", "peak_mb"}
    assert wanted <= found.keys()
    assert ("matmul_share" in found) == (batch > 0)
    assert all(np.isfinite(value) and value > 0 for value in found.values())
    assert found["ms_a_visit"] == pytest.approx(1e3 * found["epoch_cpu_s"] / 150)


@pytest.mark.parametrize("quick", [True, False])
def test_cases_have_names_of_their_own(program, quick):
    found = program.cases(quick)
    names = [case.name for case in found]
    assert len(set(names)) == len(names)
    for model in models.NAMES:
        assert f"{model} mimic3 light batch=32 threads=1" in names
        assert f"{model} mimic3 light one-visit threads=1" in names
    assert {case.shape for case in found} <= set(data.SHAPES)
