"""How a sweep begins: anew, from its interrupted history, or from a finished sweep's trials."""

import contextlib
import dataclasses
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cafemed import artifacts, config, console, knowledge, paths, reproduction, sweep
from cafemed.artifacts import Manifest
from cafemed.errors import ArtifactError, ConfigError
from cafemed.lease import TakenOverError
from cafemed.ledger import Entry, Header, Ledger
from cafemed.sweep_plan import FREE, SearchConfig, SweepPlan, completed, kept, require_storage

_S_PER_HOUR = 3600.0
#: What a sweep is told besides its settings, which changes nothing that it finds.
_OF_THE_JOB = ("promote", "retrain", "measure", "tracking")
#: Settings that a message lists at most.
_MAX_LISTED = 3
#: Folders and URLs that Hydra reads as they are.
_PLAIN = re.compile(r"(/|[a-z]\w*://)[\w./-]*", re.ASCII)


def fingerprint(inputs: Mapping[str, str], settings: Mapping[str, Any]) -> str:
    """What a sweep keeps when it goes on, whatever number of trials it has."""
    return artifacts.fingerprint(sweep.STAGE, inputs, kept(settings))


def is_done(folder: Path, ledger: Ledger, plan: SweepPlan, inputs: Mapping[str, str]) -> bool:
    """Says whether the sweep's folder has all that is asked for, and prints so if it has.

    Args:
        folder: of the finished sweep.
        ledger: of the unfinished one; what a finished sweep left of its own is removed.
        plan: see SweepPlan.
        inputs: name → fingerprint.
    """
    found = finished(folder, plan, inputs)
    if found is None or not _is_enough(found, plan.search):
        return False
    header = _readable(ledger)
    if header is not None and not _is_of(header, plan, folder.parent):
        header = None
    if header is not None and _wanted(header) == fingerprint(inputs, plan.settings()):
        if header.job["forced"]:
            return False  # it was being redone
        if header.settings["search"]["num_samples"] <= found.report["trials"]:
            ledger.remove()
    console.say("sweep", f"unchanged, skipped (force=true redoes it): {folder}")
    return True


def prepare(
    folder: Path,
    ledger: Ledger,
    plan: SweepPlan,
    inputs: Mapping[str, str],
    job: Mapping[str, Any],
    force: bool,
) -> bool:
    """Makes the ledger ready for a conductor.

    Args:
        folder: of the finished sweep, if there is one.
        ledger: of the sweep.
        plan: see SweepPlan.
        inputs: name → fingerprint.
        job: see Header.
        force: drop what is there; but a sweep that was itself begun by force goes on.

    Returns:
        Whether the sweep goes on from trials that it has.

    Raises:
        ConfigError: if the ledger is of an unfinished sweep with other settings, or of another
            experiment's.
        ArtifactError: if it is damaged, unless `force` drops it.
    """
    wanted = fingerprint(inputs, plan.settings())
    header = Header(wanted, inputs, plan.settings(), {**job, "forced": force})
    found = _readable(ledger) if force or not ledger.exists() else ledger.header()
    if found is not None and not _is_of(found, plan, folder.parent):
        raise ConfigError(
            f"{ledger.storage}: holds the unfinished sweep of {_experiment(found.job)}, and this "
            f"is {folder.parent}; choose another search.storage or name"
        )
    if found is not None and _wanted(found) == wanted and found.job["forced"] >= force:
        ledger.open(dataclasses.replace(header, job={**job, "forced": found.job["forced"]}))
        return True
    if found is not None and not force:
        raise ConfigError(
            f"{ledger.storage}: holds an unfinished sweep with other settings "
            f"({_difference(found, header)}); go on with that one by "
            f"{_resume_command(ledger)}, or drop it with force=true"
        )
    ledger.remove()
    done = None if force else finished(folder, plan, inputs)
    if done is not None:
        for record in knowledge.own_trials(folder, plan.space):
            clock = float(done.report["seconds"])
            ledger.write(
                Entry(
                    record.number,
                    record.parameters,
                    record.seed,
                    record.status,
                    record.attempts,
                    record,
                    clock,
                )
            )
    ledger.open(header)  # last: before it there is no sweep to go on from
    return done is not None


def _wanted(found: Header) -> str:
    """The fingerprint of an unfinished sweep as this program makes it, also of an older one's."""
    return fingerprint(found.inputs, found.settings)


def _readable(ledger: Ledger) -> Header | None:
    """The header of an unfinished sweep; None if there is none, or none that can be read."""
    try:
        return ledger.header() if ledger.exists() else None
    except ArtifactError:
        return None


def finished(folder: Path, plan: SweepPlan, inputs: Mapping[str, str]) -> Manifest | None:
    """The manifest of a whole finished sweep that this plan would go on from."""
    try:
        found = artifacts.verify(folder, sweep.STAGE)
    except ArtifactError:
        return None
    same = fingerprint(found.inputs, found.config) == fingerprint(inputs, plan.settings())
    return found if same else None


def _is_enough(found: Manifest, search: SearchConfig) -> bool:
    """Whether a finished sweep has the trials asked for, or has used up its time."""
    time_is_up = (
        search.max_hours is not None and found.report["seconds"] >= search.max_hours * _S_PER_HOUR
    )
    return bool(found.report["trials"] >= search.num_samples or time_is_up)


def _difference(found: Header, wanted: Header) -> str:
    """The first settings, or inputs, in which two sweeps differ."""
    before, now = _flat(kept(found.settings)), _flat(kept(wanted.settings))
    before |= {f"the {name}": value[:12] for name, value in found.inputs.items()}
    now |= {f"the {name}": value[:12] for name, value in wanted.inputs.items()}
    other = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    told = [f"{key} is {before.get(key)}, now {now.get(key)}" for key in other[:_MAX_LISTED]]
    more = f" and {len(other) - _MAX_LISTED} more" if len(other) > _MAX_LISTED else ""
    return ", ".join(told) + more


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(content, Mapping):
        return {prefix: content}
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def storage_of(plan: SweepPlan, experiment: Path) -> str:
    """Where an experiment's sweep has its ledger and checkpoints: a folder or URL of its own."""
    return _storage(plan.search.storage, experiment)


def _storage(chosen: str | None, experiment: Path) -> str:
    if chosen is None:
        return str(experiment / "trials")
    require_storage(chosen)
    base, mark, options = chosen.partition("?")  # what a URL says of its store stays behind it
    return f"{base.rstrip('/')}/{experiment.name}{mark}{options}"


def _experiment(job: Mapping[str, Any]) -> Path:
    """The folder of a job's experiment."""
    return paths.experiment_dir(Path(job["root"]), job["name"])


def _is_of(found: Header, plan: SweepPlan, experiment: Path) -> bool:
    """Whether an unfinished sweep is the experiment's; a storage may be shared by several."""
    if plan.search.storage is None:  # it lies in the experiment's folder, wherever that is by now
        return True
    return _experiment(found.job).resolve() == experiment.resolve()


@contextlib.contextmanager
def locked(ledger: Ledger, experiment: Path) -> Iterator[None]:
    """Makes sure that one process runs an experiment's sweep, and uses its storage.

    Args:
        ledger: of the sweep.
        experiment: its folder, which holds what becomes of the sweep.

    Raises:
        ArtifactError: if another process has one of the two.
    """
    own = Ledger(experiment / "trials")
    if own.is_at(ledger):
        with ledger.locked():
            yield
        return
    with own.locked(), ledger.locked(beside=own):
        yield


@contextlib.contextmanager
def resumable(ledger: Ledger) -> Iterator[None]:
    """Says how the sweep goes on, if the block ends before the sweep does."""
    try:
        yield
    except TakenOverError:
        raise  # it goes on elsewhere
    except BaseException:
        with contextlib.suppress(OSError):
            if ledger.exists():
                print(
                    f"the sweep goes on with: {_resume_command(ledger)}",
                    file=sys.stderr,
                    flush=True,
                )
        raise


def _resume_command(ledger: Ledger) -> str:
    """Quoted for a POSIX shell, and within that for Hydra."""
    place = ledger.storage
    value = place if _PLAIN.fullmatch(place) else reproduction.hydra_value(place)
    return f"python jobs/tune.py {shlex.quote(f'resume={value}')}"


def resumed(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration of a job that was told `resume=PATH`: that of the sweep in PATH.

    Args:
        values: the job's configuration as it was composed.
        overrides: what the command line says, "key=value".

    Raises:
        ConfigError: if the command line changes what a sweep keeps.
        ArtifactError: if there is no sweep to go on with in PATH, or it would go on elsewhere.
    """
    path = config.checked(str, values["resume"], "resume")
    paths.require_no_secrets(path, "resume")
    ledger = Ledger(path if "://" in path else Path(path).expanduser().absolute())
    header = ledger.header()
    settings = completed(header.settings)
    used = Ledger(_storage(settings["search"]["storage"], _experiment(header.job)))
    if not used.is_at(ledger):
        raise ArtifactError(
            f"{ledger.storage}: a sweep that was begun, and would go on, in {used.storage}; resume "
            "that one, or put this one there"
        )
    search = settings["search"]
    # A sweep of before these settings has none of them: as this program has them by default.
    job = {name: header.job.get(name, values[name]) for name in _OF_THE_JOB}
    free = [f"search.{name}" for name in FREE if name != "storage"]
    for key in (override.split("=", 1)[0].lstrip("+") for override in overrides):
        if (section := key.split(".")[0]) in _OF_THE_JOB:
            job[section] = values[section]
        elif key in free:
            name = key.removeprefix("search.")
            search[name] = values["search"][name]
        elif key != "resume":
            raise ConfigError(
                f"{key}: resume={path} goes on with the settings that the sweep has; leave it out "
                f"(what may change is {', '.join([*_OF_THE_JOB, *free])})"
            )
    model = settings["model"]
    return {
        "name": header.job["name"],
        "paths": {"root": header.job["root"], "registry": header.job.get("registry")},
        "force": False,
        **job,
        "model": {"name": model["name"], **model["options"]},
        "train": settings["train"],
        "calibration": settings["calibration"],
        "search": search,
    }
