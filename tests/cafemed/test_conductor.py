"""Sweeps decide the same whatever interrupts them, and lose nothing; without Ray's processes."""

import dataclasses
import datetime
import errno
import itertools
from pathlib import Path
from typing import Any

import pytest

from cafemed import artifacts
from cafemed.conductor import Conductor
from cafemed.errors import ArtifactError, TrainingError
from cafemed.lease import TakenOverError
from cafemed.ledger import Header, Ledger
from cafemed.sweep import SweepResult, TrialRecord


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)


def begin(plan: Any, folder: Path, **more: Any) -> Conductor:
    ledger = Ledger(folder)
    if not ledger.exists():
        ledger.open(Header("f", {}, plan.settings(), {}))
    return Conductor(plan, ledger, **more)


def uninterrupted(sweeps: Any, plan: Any, folder: Path) -> list[Any]:
    conductor = begin(plan, folder)
    sweeps.play(conductor)
    return sweeps.outcome(conductor)


def cut_after(sweeps: Any, events: int) -> Any:
    left = itertools.count(events, -1)

    def tick() -> None:
        if next(left) <= 0:
            raise sweeps.SweepCutError

    return tick


CASES = [
    {"sampler": "tpe", "scheduler": "asha"},
    {"sampler": "tpe_multivariate", "scheduler": "asha", "num_samples": 14},
    {"sampler": "random", "scheduler": "median"},
    {"sampler": "nsga2", "scheduler": "none", "population_size": 3},
    {"sampler": "tpe", "scheduler": "none", "objectives": ["jaccard", "ddi_rate"]},
    {"sampler": "tpe", "scheduler": "asha", "max_ddi_rate": 0.055},
    {"sampler": "random", "scheduler": "median", "max_ddi_rate": 0.052},
]


@pytest.mark.parametrize("search", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_interrupted_anywhere_it_ends_as_if_it_had_not_been(
    sweeps: Any, tmp_path: Path, search: dict[str, Any]
):
    plan = sweeps.plan_of(**search)
    expected = uninterrupted(sweeps, plan, tmp_path / "whole")
    assert [number for number, *_ in expected] == list(range(plan.search.num_samples))
    stopped = [status for *_, status, _ in expected if status == "stopped"]
    assert bool(stopped) == (plan.search.scheduler != "none")
    # At a sample of events, and soon after again: drawn, saved, decided, ended, between them.
    for first in range(1, 140, 29):
        folder = tmp_path / str(first)
        for events in (first, 5, 11):
            with pytest.raises(sweeps.SweepCutError):
                sweeps.play(begin(plan, folder), cut_after(sweeps, events))
        conductor = begin(plan, folder)
        sweeps.play(conductor)
        assert sweeps.outcome(conductor) == expected, first


@pytest.mark.parametrize("slots", [2, 3])
def test_with_several_slots_every_trial_is_there_once(sweeps: Any, tmp_path: Path, slots: int):
    plan = sweeps.plan_of()
    ended: list[TrialRecord] = []
    for events in (20, 30, 25):
        conductor = begin(plan, tmp_path, on_trial=ended.append)
        with pytest.raises(sweeps.SweepCutError):
            sweeps.play(conductor, cut_after(sweeps, events), slots)
    conductor = begin(plan, tmp_path, on_trial=ended.append)
    sweeps.play(conductor, slots=slots)
    assert [trial.number for trial in conductor.result().trials] == list(range(12))
    assert sorted(trial.number for trial in ended) == list(range(12))  # none was run twice
    assert sum(trial.attempts for trial in conductor.result().trials) > 12


def test_a_full_disk_ends_the_sweep_and_freed_it_goes_on(
    sweeps: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plan, write = sweeps.plan_of(), artifacts.write_text
    expected = uninterrupted(sweeps, plan, tmp_path / "whole")
    for free in range(1, 36, 7):
        folder = tmp_path / str(free)
        left = itertools.count(free, -1)

        def full(path: Path, text: str, left: Any = left) -> None:
            if path.parent.name.startswith("checkpoint_"):
                write(path, text)  # of the trials, which have another disk
                return
            if next(left) <= 0:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            write(path, text)

        conductor = begin(plan, folder)
        with monkeypatch.context() as patch:
            patch.setattr(artifacts, "write_text", full)
            sweeps.play(conductor)
        with pytest.raises(OSError, match="No space left on device"):
            conductor.result()
        conductor = begin(plan, folder)
        sweeps.play(conductor)
        assert sweeps.outcome(conductor) == expected, free


def test_an_object_store_that_does_not_answer_ends_the_sweep_in_one_line(
    sweeps: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its errors have no number, as those of a disk have."""
    conductor = begin(sweeps.plan_of(), tmp_path)

    def away(*_: Any) -> None:
        raise OSError("When writing: AWS Error NETWORK_CONNECTION\nand more")

    monkeypatch.setattr(conductor.ledger, "write", away)
    sweeps.play(conductor)
    message = f"^{tmp_path}: When writing: AWS Error NETWORK_CONNECTION$"
    with pytest.raises(ArtifactError, match=message):
        conductor.result()


def test_a_damaged_checkpoint_is_passed_over(sweeps: Any, tmp_path: Path):
    plan = sweeps.plan_of(scheduler="none", num_samples=1)
    with pytest.raises(sweeps.SweepCutError):
        sweeps.play(begin(plan, tmp_path), cut_after(sweeps, 13))
    ledger = Ledger(tmp_path)
    path, found = ledger.checkpoint(0)  # type: ignore[misc]
    assert found.epoch == 6
    next(Path(path).glob("*.safetensors")).write_bytes(b"half")
    path, found = ledger.checkpoint(0)  # type: ignore[misc]
    assert found.epoch == 5
    conductor = begin(plan, tmp_path)
    assert conductor.interrupted == [0]
    sweeps.play(conductor)
    assert len(conductor.result().trials[0].history) == sweeps.EPOCHS


def test_a_finished_sweep_extended_is_the_longer_sweep(sweeps: Any, tmp_path: Path):
    expected = uninterrupted(sweeps, sweeps.plan_of(num_samples=12), tmp_path / "whole")
    short = sweeps.plan_of(num_samples=5)
    sweeps.play(begin(short, tmp_path / "short"))
    longer = begin(sweeps.plan_of(num_samples=12), tmp_path / "short")
    assert longer.remaining == 7
    sweeps.play(longer)
    assert sweeps.outcome(longer) == expected


@pytest.mark.parametrize("search", CASES[3:], ids=lambda case: "-".join(map(str, case.values())))
def test_only_trials_that_are_unbeaten_or_have_not_ended_keep_checkpoints(
    sweeps: Any, tmp_path: Path, search: dict[str, Any]
):
    plan, looks = sweeps.plan_of(**search), 0

    def look(conductor: Conductor) -> None:
        nonlocal looks
        ended = conductor.ended
        points = {
            trial.number: (best["metrics"]["jaccard"], best["metrics"]["ddi_rate"])
            for trial in ended
            if (best := trial.best_epoch) is not None
        }
        wanted = {
            number
            for number, (jaccard, rate) in points.items()
            if not any(
                other[0] >= jaccard and other[1] <= rate and other != (jaccard, rate)
                for other in points.values()
            )
        }
        limit = plan.search.max_ddi_rate
        keeping = [n for n, point in points.items() if limit is None or point[1] <= limit]
        wanted |= {max(keeping, key=lambda n: points[n][0])} if keeping else set()
        kept = {n for n in points if conductor.ledger.checkpoint(n) is not None}
        assert kept == wanted
        looks += len(points) > len(wanted)
        running = set(conductor.histories) - set(points)
        assert all(conductor.ledger.checkpoint(n) for n in running)

    conductor = begin(plan, tmp_path)
    conductor._on_trial = lambda _: look(conductor)
    with pytest.raises(sweeps.SweepCutError):
        sweeps.play(conductor, cut_after(sweeps, 100), slots=2)
    conductor = begin(plan, tmp_path)
    conductor._on_trial = lambda _: look(conductor)
    sweeps.play(conductor, slots=2)
    assert looks > 3


def test_what_beats_others_is_on_the_disk_before_theirs_are_removed(
    sweeps: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Without power only what was waited for is left, and the ledger has the trial's end."""
    on_disk = set[Path]()

    def fsync(handle: int) -> None:
        on_disk.add(Path(f"/proc/self/fd/{handle}").readlink())

    monkeypatch.setattr("os.fsync", fsync)
    conductor = begin(sweeps.plan_of(), tmp_path)
    discard, removed = conductor.ledger.discard, []

    def look(number: int | None = None) -> None:
        for kept in conductor._result_so_far().unbeaten:
            place = Path(conductor.ledger.checkpoint(kept)[0])  # type: ignore[index]
            assert set(place.iterdir()) <= on_disk
        if number is not None:
            removed.append(number)
            discard(number)

    monkeypatch.setattr(conductor.ledger, "discard", look)
    conductor._on_trial = lambda _: look()
    sweeps.play(conductor)
    assert len(removed) > 3


@pytest.mark.parametrize("step", ["secure", "discard"])
def test_what_cannot_be_kept_ends_the_sweep_in_one_line(
    sweeps: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
):
    conductor = begin(sweeps.plan_of(), tmp_path)

    def lost(_: int) -> None:
        raise TakenOverError("another process took this sweep over")

    monkeypatch.setattr(conductor.ledger, step, lost)
    sweeps.play(conductor)
    with pytest.raises(TakenOverError):
        conductor.result()


def test_the_chosen_trial_is_unbeaten_where_another_ties_with_a_lower_rate(sweeps: Any):
    def trial(number: int, jaccard: float, ddi_rate: float) -> TrialRecord:
        record = sweeps.record_of(number, {"train.learning_rate": 1e-2}, epochs=1)
        metrics = {**record.history[0]["metrics"], "jaccard": jaccard, "ddi_rate": ddi_rate}
        return dataclasses.replace(record, history=({**record.history[0], "metrics": metrics},))

    result = SweepResult((trial(0, 0.4, 0.07), trial(1, 0.5, 0.08), trial(2, 0.5, 0.06)))
    assert result.chosen is result.trials[1]
    assert result.pareto() == [False, False, True]
    assert result.unbeaten == {1, 2}
    assert SweepResult(()).unbeaten == set()


def test_failed_trials_are_recorded_and_too_many_end_the_sweep(sweeps: Any, tmp_path: Path):
    conductor = begin(sweeps.plan_of(max_failed_trials=1), tmp_path)
    for _ in range(2):
        start = conductor.next()
        assert start is not None
        assert not conductor.over()
        conductor.started(start.number)
        conductor.started(start.number)
        conductor.end(start.number, [], error="RuntimeError: no")
    assert conductor.over()
    assert conductor.next() is None
    assert [(t.status, t.error, t.attempts) for t in conductor.ended] == [
        ("failed", "RuntimeError: no", 2)
    ] * 2
    with pytest.raises(TrainingError, match=r"2 trials failed, and search\.max_failed_trials"):
        conductor.result()
    # The same command gives up again, as a job that is started again by itself has to.
    again = begin(sweeps.plan_of(max_failed_trials=1), tmp_path)
    assert again.next() is None
    with pytest.raises(TrainingError, match=r"2 trials failed, .*; the last with RuntimeError: no"):
        again.result()
    # Allowed more, it goes on.
    conductor = begin(sweeps.plan_of(max_failed_trials=5), tmp_path)
    sweeps.play(conductor)
    assert len(conductor.result().trials) == 12


def test_when_the_time_is_up_trials_that_run_count_as_stopped(sweeps: Any, tmp_path: Path):
    now = [0.0]

    def tick() -> None:
        now[0] += 60.0

    plan = sweeps.plan_of(max_hours=0.5, scheduler="none")
    conductor = begin(plan, tmp_path, clock=lambda: now[0])
    sweeps.play(conductor, tick, slots=2)
    trials = conductor.result().trials
    assert 1 < len(trials) < 12
    assert 0 < sum(trial.status == "stopped" for trial in trials) <= 2
    assert conductor.seconds >= 1800
    # Going on counts from there: no time is left.
    again = begin(plan, tmp_path, clock=lambda: now[0])
    assert again.over()
    assert again.next() is None
    assert len(again.result().trials) == len(trials)
    more = begin(sweeps.plan_of(scheduler="none"), tmp_path)
    sweeps.play(more)
    assert len(more.result().trials) == 12


def test_a_trial_that_is_cut_off_has_the_place_and_time_it_told_last(sweeps: Any, tmp_path: Path):
    now = [0.0]
    plan = sweeps.plan_of(max_hours=0.5, scheduler="none")
    conductor = begin(plan, tmp_path, clock=lambda: now[0])
    for number, hosts in enumerate((["node-1"], ["node-1", "node-2"])):
        start = conductor.next()
        assert start is not None
        history = sweeps.history_of(start.parameters, 2)
        for attempt, host in enumerate(hosts):
            conductor.started(number)
            told = {"started": 1e9 + attempt, "seconds": 7.0 + attempt, "host": host}
            conductor.stops(number, history[: attempt + 1], **told)
    now[0] = 1800.0
    found = [(t.status, t.host, t.started, t.seconds) for t in conductor.result().trials]
    begun = datetime.datetime.fromtimestamp(1e9, datetime.UTC)
    assert found == [
        ("stopped", "node-1", begun, 7.0),
        ("stopped", "node-2", begun + datetime.timedelta(seconds=1), 8.0),
    ]


def test_a_trial_whose_end_was_not_noted_has_its_place_and_time(sweeps: Any, tmp_path: Path):
    plan = sweeps.plan_of(scheduler="none")
    conductor = begin(plan, tmp_path)
    start = conductor.next()
    assert start is not None
    conductor.started(start.number)
    history = sweeps.history_of(start.parameters)
    sweeps._save(conductor, start.number, history)
    for epochs in range(1, len(history) + 1):
        conductor.stops(start.number, history[:epochs], started=1e9, seconds=7.0, host="node-1")
    (trial,) = begin(plan, tmp_path).ended
    assert (trial.status, trial.host) == ("finished", "node-1")
    assert trial.started == datetime.datetime.fromtimestamp(1e9, datetime.UTC)
    assert trial.seconds == 0.25 * sweeps.EPOCHS  # what its checkpoint says


def test_where_a_trial_runs_is_written_once_an_attempt(
    sweeps: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    conductor = begin(sweeps.plan_of(scheduler="none"), tmp_path)
    start = conductor.next()
    assert start is not None
    conductor.started(start.number)
    written: list[str] = []
    monkeypatch.setattr(conductor.ledger, "write", lambda entry: written.append(entry.host))
    history = sweeps.history_of(start.parameters)
    for epochs in range(1, 5):
        host = "node-1" if epochs < 3 else "node-2"
        conductor.stops(start.number, history[:epochs], started=1e9, seconds=1.0, host=host)
    assert written == ["node-1", "node-2"]


def test_time_up_on_a_full_disk_loses_no_trial(
    sweeps: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    now = [0.0]
    plan = sweeps.plan_of(max_hours=0.5, num_samples=2, max_concurrent=1)
    conductor = begin(plan, tmp_path, clock=lambda: now[0])
    start = conductor.next()
    assert start is not None
    conductor.started(start.number)
    conductor.stops(start.number, sweeps.history_of(start.parameters, 1))
    now[0] = 1800.0

    def full(path: Path, _: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "write_text", full)
        with pytest.raises(OSError, match="No space left on device"):
            conductor.result()
    assert [entry.state for entry in Ledger(tmp_path).entries()] == ["running"]


def test_time_up_before_any_epoch_is_said_and_may_be_raised(sweeps: Any, tmp_path: Path):
    now = [0.0]
    conductor = begin(sweeps.plan_of(max_hours=0.5), tmp_path, clock=lambda: now[0])
    for error in ("RuntimeError: no", None):
        start = conductor.next()
        assert start is not None
        conductor.started(start.number)
        if error is not None:
            conductor.end(start.number, [], error=error)
    now[0] = 1800.0
    with pytest.raises(TrainingError, match=r"^search\.max_hours=0\.5 was up before any trial had"):
        conductor.result()
    more = begin(sweeps.plan_of(max_hours=2.0), tmp_path, clock=lambda: now[0])
    assert more.interrupted == [1]
    sweeps.play(more)
    assert len(more.result().trials) == 12


def test_a_search_that_was_ended_early_is_not_taken_for_complete(sweeps: Any, tmp_path: Path):
    plan = sweeps.plan_of(num_samples=3)
    conductor = begin(plan, tmp_path)
    start = conductor.next()
    assert start is not None
    conductor.started(start.number)
    conductor.end(start.number, sweeps.history_of(start.parameters))
    with pytest.raises(TrainingError, match=r"^the search ended early, with 1 of 3 trials; run"):
        conductor.result()
    conductor = begin(plan, tmp_path)
    sweeps.play(conductor)
    assert len(conductor.result().trials) == 3


@pytest.mark.parametrize("interrupted", [True, False])
@pytest.mark.parametrize("limit", [None, 0.06])
def test_a_trial_over_the_limit_stops_none_that_keeps_it(
    sweeps: Any, tmp_path: Path, limit: float | None, interrupted: bool
):
    plan = sweeps.plan_of(scheduler="asha", max_ddi_rate=limit)
    conductor = begin(plan, tmp_path)

    def stops(*measured: tuple[float, float]) -> bool:
        """The answer to a new trial's second epoch."""
        nonlocal conductor
        history = sweeps.history_of({"train.learning_rate": 1e-2}, 2)
        for epoch, (jaccard, rate) in zip(history, measured, strict=True):
            epoch["metrics"] |= {"jaccard": jaccard, "ddi_rate": rate}
        conductor = begin(plan, tmp_path) if interrupted else conductor
        start = conductor.next()
        assert start is not None
        conductor.started(start.number)
        found: bool = conductor.stops(start.number, history)
        conductor.end(start.number, history)
        return found

    # The rate is that of the best epoch, as of the trial that is chosen.
    assert not stops((0.5, 0.09), (0.4, 0.05))
    assert stops((0.4, 0.05), (0.3, 0.09)) == (limit is None)
    assert stops((0.3, 0.05), (0.2, 0.05))
    assert stops((0.3, 0.09), (0.2, 0.09))
    assert not stops((0.6, 0.09), (0.2, 0.09))
    assert stops((0.41, 0.05), (0.2, 0.05)) == (limit is None)


def test_the_chosen_trial_keeps_the_ddi_rate(sweeps: Any, tmp_path: Path):
    limited = begin(sweeps.plan_of(max_ddi_rate=0.0502, sampler="random"), tmp_path)
    sweeps.play(limited)
    result = limited.result()
    keeping = [
        t for t in result.trials if t.best_epoch and t.best_epoch["metrics"]["ddi_rate"] <= 0.0502
    ]
    assert 0 < len(keeping) < 12
    assert result.chosen in keeping
    assert result.chosen.best_so_far[-1] == max(t.best_so_far[-1] for t in keeping)
    free = dataclasses.replace(result, max_ddi_rate=None)
    assert free.chosen not in keeping
    none = dataclasses.replace(result, max_ddi_rate=0.05)
    assert none.chosen is None
    with pytest.raises(TrainingError, match=r"no trial keeps a DDI rate of at most 0\.05, so none"):
        _ = none.best
    table = result.table()
    assert table["chosen"].to_pylist() == [t is result.chosen for t in result.trials]
    points = [(t.best_so_far[-1], t.best_epoch["metrics"]["ddi_rate"]) for t in result.trials]  # type: ignore[index]
    front = [not any(a >= x and b <= y and (a, b) != (x, y) for a, b in points) for x, y in points]
    assert table["pareto"].to_pylist() == front
    assert 1 < sum(front) < 12
