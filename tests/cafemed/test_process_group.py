"""Two processes that train one model together, joined by gloo, against one process."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cafemed import checkpoints, process_group
from cafemed.process_group import Group

PLAIN = {"dimension": 8, "dropout": 0.0}
#: Batches of 13, 13, 13 and 1 of the 40 patients: of the last, one process has none. The rates of
#: the predicted sets are on both sides of the target.
TRAIN = {
    "epochs": 4,
    "batch_size": 13,
    "learning_rate": 0.005,
    "seed": 3,
    "ddi_target": 0.2,
    "threshold": 0.45,
}
CASES: dict[str, dict[str, Any]] = {
    "mixture": {"model": "cafemed", "options": PLAIN, "train": TRAIN},
    "sum": {
        "model": "causalmed",
        "options": PLAIN,
        "train": TRAIN | {"objective": "sum", "ddi_weight": 20.0, "weight_decay": 0.01},
    },
    "one validation patient": {
        "model": "graphdiffmed",
        "options": PLAIN | {"attention_dropout": 0.0},
        "train": TRAIN | {"epochs": 2, "batch_size": 8},
        "patients": 1,
    },
}
DROPPING = {
    "model": "cafemed",
    "options": PLAIN | {"dropout": 0.5},
    "train": TRAIN | {"epochs": 3},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, group: Any) -> dict[str, Any]:
    """Case → what each of two processes found; all cases in one pair of processes."""
    folder = tmp_path_factory.mktemp("pair")
    cut = DROPPING | {"checkpoint": str(folder / "cut")}
    cases = {
        **CASES,
        "whole": DROPPING,
        "cut": cut | {"stop": 2},
        "resumed": cut,
        "diverges": DROPPING | {"train": TRAIN | {"learning_rate": 1e30}},
    }
    by_rank = group.together(folder, list(cases.values()))
    results = {
        name: list(both) for name, both in zip(cases, zip(*by_rank, strict=True), strict=True)
    }
    results["folder"] = [folder / "cut"]
    return results


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(found: dict[str, Any], group: Any, name: str):
    expected = group.outcome(group.fit_case(CASES[name], group.experiment()))
    first, second = found[name]
    assert first["history"] == second["history"]
    assert first["weights"] == second["weights"]
    assert first["best"] == expected["best"]
    for got, wanted in zip(first["history"], expected["history"], strict=True):
        assert got[0] == pytest.approx(wanted[0], rel=1e-5, abs=1e-6)
        assert got[1] == pytest.approx(wanted[1], rel=1e-5, abs=1e-6)


def test_every_patient_is_in_one_process_once_an_epoch(found: dict[str, Any], given: Any):
    patients = sorted(given.cohort.patients_of("train").tolist())
    first, second = (result["batches"] for result in found["mixture"])
    assert len(first) == len(second) == 4 * 4
    for epoch in range(4):
        batches = range(4 * epoch, 4 * epoch + 4)
        # The second process borrows the last batch's only patient, and does not count it.
        assert second[batches[-1]] == first[batches[-1]]
        counted = [p for b in batches for p in first[b]]
        counted += [p for b in batches[:-1] for p in second[b]]
        assert sorted(counted) == patients
        assert [len(first[b]) + len(second[b]) for b in batches[:-1]] == [13] * 3


def test_an_interrupted_group_goes_on_to_the_same_weights(found: dict[str, Any]):
    assert found["cut"] == [{"error": "InterruptedError: "}] * 2
    for whole, resumed in zip(found["whole"], found["resumed"], strict=True):
        assert resumed["history"] == whole["history"]
        assert resumed["weights"] == whole["weights"]
        assert len(resumed["batches"]) == len(whole["batches"]) // 3  # one epoch of three


def test_each_process_drops_others(found: dict[str, Any]):
    saved = checkpoints.load(found["folder"][0], None)
    assert saved is not None
    assert len(saved.random_of_others) == 1
    other = saved.random_of_others[0]
    assert not other.tensors["cpu"].equal(saved.random.tensors["cpu"])
    assert other.plain["numpy"] != saved.random.plain["numpy"]


def test_what_one_process_refuses_all_of_them_refuse(found: dict[str, Any]):
    first, second = found["diverges"]
    assert first == second
    assert "try a train.learning_rate below 1e+30" in first["error"]


@pytest.mark.slow
def test_five_processes_train_as_one(tmp_path: Path, group: Any):
    # The last of the batches of 12 has 4 patients: one process borrows one of theirs.
    cases = [
        CASES[n] | {"train": CASES[n]["train"] | {"batch_size": 12}} for n in ("mixture", "sum")
    ]
    for case, *by_rank in zip(cases, *group.together(tmp_path, cases, size=5), strict=True):
        expected = group.outcome(group.fit_case(case, group.experiment()))
        for (losses, metrics), (wanted, wanted_metrics) in zip(
            by_rank[4]["history"], expected["history"], strict=True
        ):
            assert losses == pytest.approx(wanted, rel=1e-5, abs=1e-6)
            assert metrics == pytest.approx(wanted_metrics, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("count", "size"), [(7, 2), (1, 3), (0, 2), (12, 4)])
def test_parts_hold_every_patient_once(count: int, size: int):
    patients = np.random.default_rng(0).permutation(count)
    parts = [Group(rank, size).part(patients) for rank in range(size)]
    assert sorted(itertools.chain(*parts)) == sorted(patients)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_process_that_joined_nobody_is_a_group_of_one():
    assert process_group.current() == Group(0, 1)
