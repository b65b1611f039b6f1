"""A sweep begins anew, from its history or from a finished one; another's is left alone."""

import dataclasses
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from cafemed import artifacts, sweep, sweep_start
from cafemed.conductor import Conductor
from cafemed.errors import ArtifactError, ConfigError
from cafemed.lease import TakenOverError
from cafemed.ledger import Ledger
from cafemed.sweep import SweepResult

INPUTS = {"cohort": "c" * 64, "graph": "g" * 64}


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)


class Place:
    """An experiment's folder, where sweeps are started and written as a job does it."""

    def __init__(self, root: Path, sweeps: Any, storage: Path | None = None) -> None:
        experiment = root / "experiments" / "x"
        self.folder, self.sweeps = experiment / "sweep", sweeps
        self.job = {"root": str(root), "name": "x", "promote": True}
        self.ledger = Ledger(storage or experiment / "trials")

    def prepare(self, plan: Any, force: bool = False, inputs: Any = INPUTS) -> bool:
        return sweep_start.prepare(self.folder, self.ledger, plan, inputs, self.job, force)

    def is_done(self, plan: Any) -> bool:
        return sweep_start.is_done(self.folder, self.ledger, plan, INPUTS)

    def run(self, plan: Any) -> SweepResult:
        conductor = Conductor(plan, self.ledger)
        self.sweeps.play(conductor)
        found = conductor.result()
        with artifacts.new_folder(self.folder, sweep.STAGE, INPUTS, plan.settings()) as (
            partial,
            report,
        ):
            sweep.write(found, partial, None)
            report |= sweep.summary(found, conductor.seconds)
        self.ledger.remove()
        return found


@pytest.fixture
def place(tmp_path: Path, sweeps: Any) -> Place:
    return Place(tmp_path, sweeps)


def test_a_finished_sweep_is_left_and_extended_on_demand(
    place: Place, sweeps: Any, capsys: pytest.CaptureFixture[str]
):
    short, whole = sweeps.plan_of(num_samples=4), sweeps.plan_of(num_samples=9)
    assert not place.is_done(short)
    assert not place.prepare(short)
    first = place.run(short)
    assert place.is_done(short)
    assert place.is_done(sweeps.plan_of(num_samples=2, cpus=2.0))
    assert "unchanged, skipped" in capsys.readouterr().out
    assert not place.is_done(whole)
    assert place.prepare(whole)
    longer = place.run(whole)
    assert [t.number for t in longer.trials] == list(range(9))
    assert [dict(t.parameters) for t in longer.trials[:4]] == [
        dict(t.parameters) for t in first.trials
    ]
    # What a table holds of history is enough for the sampler and the scheduler.
    fresh = Place(place.folder.parent / "fresh", sweeps)
    fresh.prepare(whole)
    expected = fresh.run(whole)
    assert [dict(t.parameters) for t in longer.trials] == [
        dict(t.parameters) for t in expected.trials
    ]
    assert [t.status for t in longer.trials] == [t.status for t in expected.trials]
    assert longer.chosen is not None
    assert longer.chosen.number == expected.chosen.number  # type: ignore[union-attr]


def test_an_unfinished_sweep_goes_on_unless_it_is_another(place: Place, sweeps: Any):
    plan = sweeps.plan_of(num_samples=4)
    place.prepare(plan)
    with pytest.raises(sweeps.SweepCutError):
        sweeps.play(Conductor(plan, place.ledger), cut(sweeps, 12))
    assert not place.is_done(plan)
    assert place.prepare(sweeps.plan_of(num_samples=6, max_concurrent=2))
    assert place.ledger.header().settings["search"]["num_samples"] == 6
    other = sweeps.plan_of(num_samples=4, seed=1, sampler="random")
    with pytest.raises(ConfigError) as caught:
        place.prepare(other)
    message = str(caught.value)
    assert "search.seed is 0, now 1" in message
    assert "search.sampler is tpe_multivariate, now random" in message
    assert f"python jobs/tune.py resume={place.ledger.storage}" in message
    assert "\n" not in message
    with pytest.raises(ConfigError, match="the cohort is cccccccccccc, now dddddddddddd"):
        place.prepare(plan, inputs=INPUTS | {"cohort": "d" * 64})
    assert place.ledger.entries()  # refused, not touched
    assert not place.prepare(other, force=True)
    assert place.ledger.entries() == []


def without(settings: Any) -> dict[str, Any]:
    """Settings as they were written before there were some of them."""
    later = {"search": ("num_workers", "max_hours"), "train": ("precision",)}
    return {
        section: {k: v for k, v in values.items() if k not in later.get(section, ())}
        for section, values in settings.items()
    }


def test_a_sweep_from_before_a_setting_goes_on_with_its_default(place: Place, sweeps: Any):
    plan, more = sweeps.plan_of(num_samples=4), sweeps.plan_of(num_samples=6)
    place.prepare(plan)
    with pytest.raises(sweeps.SweepCutError):
        sweeps.play(Conductor(plan, place.ledger), cut(sweeps, 12))
    header, before = place.ledger.header(), place.ledger.entries()
    old = without(header.settings)
    made_then = artifacts.fingerprint(sweep.STAGE, INPUTS, old)
    place.ledger.open(dataclasses.replace(header, settings=old, fingerprint=made_then))
    assert resumed(place)["search"]["num_workers"] == 1
    with pytest.raises(ConfigError, match=r"\(search\.num_workers is 1, now 2\)"):
        place.prepare(sweeps.plan_of(num_samples=4, num_workers=2))
    assert place.prepare(plan)
    assert place.ledger.entries() == before
    place.run(plan)

    manifest = place.folder / "manifest.json"  # and a finished one is extended
    content = json.loads(manifest.read_text())
    content["config"] = without(content["config"])
    content["fingerprint"] = artifacts.fingerprint(sweep.STAGE, INPUTS, content["config"])
    manifest.write_text(json.dumps(content))
    assert place.is_done(plan)
    assert place.prepare(more)
    assert len(place.ledger.entries()) == 4


def cut(sweeps: Any, events: int) -> Any:
    left = iter(range(events))

    def tick() -> None:
        if next(left, None) is None:
            raise sweeps.SweepCutError

    return tick


def test_a_sweep_that_is_redone_by_force_goes_on_when_it_was_interrupted(place: Place, sweeps: Any):
    plan = sweeps.plan_of(num_samples=3)
    place.prepare(plan)
    place.run(plan)
    for _ in range(2):  # the same command twice
        place.prepare(plan, force=True)
        with pytest.raises(sweeps.SweepCutError):
            sweeps.play(Conductor(plan, place.ledger), cut(sweeps, 15))
    assert len(place.ledger.entries()) > 1
    assert not place.is_done(plan)
    assert place.prepare(plan)
    place.run(plan)
    assert place.is_done(plan)


def test_what_a_finished_sweep_left_is_cleared_but_not_an_extension(place: Place, sweeps: Any):
    plan, more = sweeps.plan_of(num_samples=3), sweeps.plan_of(num_samples=5)
    place.prepare(plan)
    place.run(plan)
    place.prepare(plan)  # as if the job had died before it removed the ledger
    assert place.is_done(plan)
    assert not place.ledger.exists()
    place.prepare(more)
    assert place.is_done(plan)
    assert place.ledger.exists()


@pytest.mark.parametrize("text", ["{", '{"format_version": 0}'])
def test_a_history_that_cannot_be_read_is_dropped_by_force_alone(
    place: Place, sweeps: Any, text: str
):
    plan, more = sweeps.plan_of(num_samples=3), sweeps.plan_of(num_samples=5)
    place.prepare(plan)
    place.run(plan)
    place.prepare(more)
    header = Path(place.ledger.storage) / "sweep.json"
    header.write_text(text)
    assert place.is_done(plan)  # the finished sweep is whole all the same
    with pytest.raises(ArtifactError, match="start anew with force=true"):
        place.prepare(more)
    assert header.read_text() == text
    assert not place.prepare(more, force=True)
    assert place.ledger.entries() == []
    assert place.ledger.header().settings["search"]["num_samples"] == 5


def test_a_job_that_died_while_it_extended_begins_the_extension_again(place: Place, sweeps: Any):
    plan, more = sweeps.plan_of(num_samples=3), sweeps.plan_of(num_samples=5)
    place.prepare(plan)
    place.run(plan)
    place.prepare(more)
    (Path(place.ledger.storage) / "sweep.json").unlink()  # written last
    (Path(place.ledger.storage) / "00001.json").unlink()
    assert place.prepare(more)
    assert [entry.number for entry in place.ledger.entries()] == [0, 1, 2]


def test_used_up_time_counts_as_done_until_there_is_more(place: Place, sweeps: Any):
    plan = sweeps.plan_of(num_samples=3)
    place.prepare(plan)
    place.run(plan)
    manifest = place.folder / "manifest.json"
    content = json.loads(manifest.read_text())
    content["report"]["seconds"] = 7200.0
    manifest.write_text(json.dumps(content))
    assert place.is_done(sweeps.plan_of(num_samples=9, max_hours=2.0))
    assert not place.is_done(sweeps.plan_of(num_samples=9, max_hours=2.5))
    assert not place.is_done(sweeps.plan_of(num_samples=9))


def resumed(place: Place, *overrides: str, **search: Any) -> dict[str, Any]:
    values = {"resume": place.ledger.storage, "promote": False, "search": search}
    values |= {"tracking": {"name": "mlflow"}, "retrain": False, "measure": False}
    return sweep_start.resumed(values, [f"resume={place.ledger.storage}", *overrides])


@pytest.mark.parametrize("name", ["plain-1.0", "two words", "it's 50%, ${x}", "a=b,c:d", "ä$HOME"])
def test_the_command_that_is_printed_names_the_folder(
    tmp_path: Path, sweeps: Any, capsys: pytest.CaptureFixture[str], name: str
):
    place = Place(tmp_path / name, sweeps)
    place.prepare(sweeps.plan_of())
    with pytest.raises(KeyboardInterrupt), sweep_start.resumable(place.ledger):
        raise KeyboardInterrupt
    words = shlex.split(capsys.readouterr().err.partition("goes on with: ")[2])
    assert words[:2] == ["python", "jobs/tune.py"]
    override = OverridesParser.create().parse_override(words[2])
    read = OmegaConf.create({"resume": None})
    OmegaConf.update(read, override.key_or_group, override.value())
    assert (override.key_or_group, read.resume) == ("resume", place.ledger.storage)


def test_resume_takes_the_sweeps_own_settings(place: Place, sweeps: Any):
    plan = sweeps.plan_of(seed=5)
    place.prepare(plan)
    values = resumed(place)
    assert (values["name"], values["paths"]["root"], values["promote"]) == (
        "x",
        place.job["root"],
        True,
    )
    assert values["search"]["seed"] == 5
    assert values["model"]["name"] == "cafemed"
    assert values["train"]["epochs"] == sweeps.EPOCHS
    changed = resumed(place, "search.num_samples=50", "promote=false", num_samples=50, seed=0)
    assert changed["search"] == values["search"] | {"num_samples": 50}
    assert changed["promote"] is False
    place.job["tracking"] = {"name": "none"}
    place.prepare(plan)
    assert resumed(place)["tracking"] == {"name": "none"}
    assert resumed(place, "tracking.uri=/x")["tracking"] == {"name": "mlflow"}
    with pytest.raises(ConfigError, match=r"search\.seed: resume=.* goes on with the settings"):
        resumed(place, "search.seed=1", seed=1)


def test_resume_refuses_secrets_and_does_not_tell_those_of_an_older_sweep(
    place: Place, sweeps: Any
):
    plan = sweeps.plan_of()
    search = dataclasses.replace(plan.search, storage="s3://KEY:HUSH@bucket/sweeps")
    place.prepare(dataclasses.replace(plan, search=search))
    with pytest.raises(ConfigError, match=r"^search\.storage: .* AWS_SECRET_ACCESS_KEY$"):
        resumed(place)
    with pytest.raises(ConfigError, match=r"^resume: .* AWS_SECRET_ACCESS_KEY$"):
        sweep_start.resumed({"resume": "s3://KEY:HUSH@bucket/sweeps"}, [])


def test_a_copied_history_is_not_taken_for_the_one_that_would_go_on(place: Place, sweeps: Any):
    place.prepare(sweeps.plan_of())
    there, before = Path(place.ledger.storage), Ledger(place.ledger.storage)
    link = there.parents[2] / "link"
    link.symlink_to(there.parents[1])
    place.ledger = Ledger(link / "x" / "trials")
    assert resumed(place)["name"] == "x"
    shutil.copytree(there, there.parents[2] / "copy")
    place.ledger = Ledger(there.parents[2] / "copy")
    with pytest.raises(ArtifactError) as caught:
        resumed(place)
    message = str(caught.value)
    assert message.startswith(f"{place.ledger.storage}: ")
    assert f"in {before.storage};" in message
    assert "\n" not in message


def test_two_experiments_do_not_take_each_others_history(tmp_path: Path, sweeps: Any):
    storage = tmp_path / "shared" / "x"
    plan = sweeps.plan_of(num_samples=3, storage=str(storage.parent))
    one, two = (Place(tmp_path / name, sweeps, storage) for name in "ab")
    two.prepare(plan)
    two.run(plan)
    one.prepare(plan)
    for force in (False, True):
        with pytest.raises(ConfigError, match=r"a/experiments/x, and this is .*b/experiments/x; "):
            two.prepare(sweeps.plan_of(num_samples=5, storage=str(storage.parent)), force)
    assert two.is_done(plan)
    assert one.ledger.exists()  # not taken for what the finished one left
    assert one.prepare(plan)


def test_an_experiment_that_was_moved_goes_on(tmp_path: Path, sweeps: Any):
    plan = sweeps.plan_of(num_samples=3)
    Place(tmp_path / "a", sweeps).prepare(plan)
    (tmp_path / "a").rename(tmp_path / "b")
    assert Place(tmp_path / "b", sweeps).prepare(plan)


@pytest.mark.parametrize("storage", [None, "folder"])
def test_one_process_runs_an_experiments_sweep(tmp_path: Path, storage: str | None):
    experiment = tmp_path / "experiments" / "x"
    ledger = Ledger(tmp_path / "elsewhere" if storage else experiment / "trials")
    taken = pytest.raises(ArtifactError, match="another process runs this sweep")
    with sweep_start.locked(ledger, experiment), taken, sweep_start.locked(ledger, experiment):
        pass
    with sweep_start.locked(ledger, experiment):
        pass
    with sweep_start.locked(Ledger(tmp_path / "elsewhere"), experiment):  # of another experiment
        other = tmp_path / "experiments" / "y"
        with taken, sweep_start.locked(Ledger(tmp_path / "elsewhere"), other):
            pass


def test_what_both_places_say_decides_whether_a_sweep_goes_on(tmp_path: Path, sweeps: Any):
    """The experiment's folder may be taken over, too, by a sweep with its storage elsewhere."""
    experiment = tmp_path / "experiments" / "x"
    plan = sweeps.plan_of(num_samples=4)
    place = Place(tmp_path, sweeps, tmp_path / "elsewhere")
    with sweep_start.locked(place.ledger, experiment):
        place.prepare(plan)
        conductor = Conductor(plan, place.ledger)
        assert conductor.next() is not None
        (claim,) = (experiment / "trials").glob("lease-*.json")
        claim.rename(claim.with_name("lease-000002-00aa.json"))  # somebody else's, a later one
        next(held for held in place.ledger._leases if held._storage.folder == claim.parent).renew()
        assert conductor.over()
        with pytest.raises(TakenOverError, match="another process took this sweep over"):
            conductor.result()
        before = [entry.number for entry in place.ledger.entries()]
        for harm in (
            place.ledger.remove,
            lambda: place.ledger.discard(0),
            lambda: place.ledger.keep_tracking({}),
        ):
            with pytest.raises(TakenOverError):
                harm()
        assert conductor.next() is None
    assert [entry.number for entry in place.ledger.entries()] == before == [0]


def test_storage_has_a_folder_for_each_experiment(sweeps: Any, tmp_path: Path):
    def where(storage: str | None) -> str:
        return sweep_start.storage_of(sweeps.plan_of(storage=storage), tmp_path / "mimic3")

    assert where(None) == str(tmp_path / "mimic3" / "trials")
    assert where("/nfs/sweeps/") == "/nfs/sweeps/mimic3"
    assert where("s3://bucket/sweeps") == "s3://bucket/sweeps/mimic3"
    assert where("s3://bucket/x?region=eu") == "s3://bucket/x/mimic3?region=eu"
    with pytest.raises(ConfigError, match=r"search\.storage: expected an absolute folder or a URL"):
        where("here")
    with pytest.raises(ConfigError, match=r"search\.storage: .* AWS_SECRET_ACCESS_KEY$") as caught:
        where("s3://KEY:HUSH@bucket/sweeps")
    assert "HUSH" not in str(caught.value)
