"""A sweep from its ledger to its folder: loads, searches, bundles the chosen trial, writes."""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cafemed import (
    artifacts,
    bundle_files,
    cluster,
    console,
    experiment,
    knowledge,
    sweep,
    sweep_display,
    sweep_start,
)
from cafemed.conductor import Conductor
from cafemed.errors import ArtifactError, TrainingError
from cafemed.ledger import Ledger
from cafemed.search_space import MODEL
from cafemed.sweep import SweepResult, TrialRecord
from cafemed.sweep_plan import SweepPlan
from cafemed.tracking import Tell

if TYPE_CHECKING:
    from cafemed.experiment import Experiment
    from cafemed.sweep_tracking import SweepTracking
    from cafemed.training import Builder
    from cafemed.trials import TrialData


def run(
    folder: Path,
    plan: SweepPlan,
    ledger: Ledger,
    inputs: Mapping[str, str],
    build: "Builder",
    tracked: "SweepTracking",
) -> None:
    """Goes on with the sweep in the ledger until it is over, and writes the sweep's folder.

    The ledger is removed at the end. Whatever ends this before leaves it, to go on from.

    Args:
        folder: of the experiment.
        plan: see SweepPlan.
        ledger: made ready by `sweep_start.prepare`, and locked.
        inputs: name → fingerprint.
        build: see `training.fit`.
        tracked: what the sweep is followed with; the caller's block is one of its `ending`.

    Raises:
        ConfigError: if a local Ray has less than one trial reserves.
        TrainingError: if all trials failed, or more than `search.max_failed_trials`.
        ArtifactError: if the chosen trial has no checkpoint that can be read, or another process
            took the sweep over.
    """
    from cafemed.trials import TrialData  # loads Ray

    given = experiment.load_inputs(folder)
    data = TrialData.of(plan, given, build)
    _announce(plan)
    with tracked.following(plan, ledger, inputs) as tell:
        result, seconds = _search(plan, ledger, data, tell)
    if not result.usable:
        ledger.remove()  # nothing in it is worth going on from
        raise TrainingError(result.unchosen())
    chosen = result.chosen
    with artifacts.new_folder(folder / "sweep", sweep.STAGE, inputs, plan.settings()) as (
        partial,
        report,
    ):
        if chosen is None:
            fingerprint = None
        else:
            fingerprint = _write_bundle(
                chosen, plan, ledger, inputs, data, given, folder, partial / "bundle"
            )
        sweep.write(result, partial, fingerprint)
        tracked.keep(ledger, partial)
        report |= sweep.summary(result, seconds)
        ledger.require_ours()
    ledger.remove()
    _summarise(result, chosen)


def _announce(plan: SweepPlan) -> None:
    """Prints what is searched, and which starting points are left out."""
    trials, left = plan.search.num_samples, plan.untried
    console.say("tune", f"{trials} trials over {', '.join(plan.space.entries)}")
    if left:
        models = ", ".join(dict.fromkeys(str(start[MODEL]) for start in left if MODEL in start))
        which = f"the last {len(left)} of {len(plan.starts)} starting points"
        of = f" ({models})" if models else ""
        console.say("tune", f"not tried, as search.num_samples is {trials}: {which}{of}")


def _search(
    plan: SweepPlan, ledger: Ledger, data: "TrialData", tell: Tell
) -> tuple[SweepResult, float]:
    """Runs the trials that are still to run; gives all of them and the seconds they took."""
    from cafemed import tuning

    prior, left = knowledge.prior_trials(plan)
    if plan.search.prior:
        console.say("prior", f"{len(prior)} trials of other sweeps, {left} do not fit the space")

    def ended(trial: TrialRecord) -> None:
        console.say("trial", trial.describe())

    conductor = Conductor(plan, ledger, prior, ended, tell=tell)
    if conductor.ended or conductor.interrupted:
        console.say("tune", conductor.describe_history())
    if conductor.remaining and not conductor.over():
        with cluster.ray_cluster(plan.search.total_cpus, plan.search.gpus) as where:
            console.say("ray", where)
            with sweep_display.following(conductor):
                tuning.run(conductor, data)
    return conductor.result(), conductor.seconds


def _write_bundle(
    chosen: TrialRecord,
    plan: SweepPlan,
    ledger: Ledger,
    inputs: Mapping[str, str],
    data: "TrialData",
    given: "Experiment",
    folder: Path,
    target: Path,
) -> str:
    """Bundles a trial from its checkpoint; one of a sweep that goes on has its bundle already."""
    from cafemed import promotion
    from cafemed.bundle import Preprocessing

    found = ledger.checkpoint(chosen.number)
    if found is None:
        before = folder / "sweep"
        if (
            sweep_start.finished(before, plan, inputs) is None
            or sweep.read_best(before)["trial"] != chosen.number
        ):
            raise ArtifactError(
                f"{ledger.storage}: trial {chosen.number}, the best one, has no checkpoint that "
                "can be read; start anew with force=true"
            )
        shutil.copytree(before / "bundle", target)
        return artifacts.verify(target, bundle_files.STAGE).fingerprint
    cohort = artifacts.read_manifest(folder / "cohort", "cohort").config
    preprocessing = Preprocessing(
        inputs=given.cohort.inputs,
        target_window_h=cohort["target_window_h"],
    )
    with ledger.local(found[0]) as place:
        trial = dataclasses.replace(chosen, checkpoint=place)
        made = promotion.make_bundle(trial, data, given, preprocessing, plan.calibrated)
    return promotion.write_bundle(target, made)


def _summarise(result: SweepResult, chosen: TrialRecord | None) -> None:
    """Prints how many trials there were, and the best one."""
    counts = ", ".join(
        f"{result.count(s)} {s}" for s in ("finished", "stopped", "failed") if result.count(s)
    )
    console.say("tune", f"{len(result.trials)} trials: {counts}")
    if chosen is not None:
        console.say("best", chosen.describe())
