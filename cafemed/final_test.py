"""A published model measured on the test patients: written, its card published, its sweep told.

What `jobs/evaluate.py` does, and `jobs/tune.py` with `measure=true`. Once for a version: the same
again is skipped.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from cafemed import (
    artifacts,
    assessment,
    batches,
    bundle,
    bundle_files,
    card,
    cohort,
    console,
    registry,
    retraining,
    sweep_report,
    sweep_tracking,
    training,
)
from cafemed.artifacts import Manifest
from cafemed.assessment import EvaluationConfig
from cafemed.calibration import Decision
from cafemed.invocation import Invocation
from cafemed.training import Builder


def run(
    told: Invocation,
    version: int,
    settings: EvaluationConfig,
    build: Builder,
    device: str = "auto",
    root: str | None = None,
) -> None:
    """Measures a version of an experiment's registry, unless that is done, and prints what it is.

    If the model is the best of the experiment's sweep, that one's report, and its run in MLflow,
    get the metrics, too.

    Args:
        told: says which experiment, and whether what is done is done again.
        version: of its registry.
        settings: see EvaluationConfig.
        build: see `training.fit`.
        device: see `training.choose_device`.
        root: `paths.root` as the user gave it; see `sweep_report.write`.

    Raises:
        ArtifactError: if the version was made from another cohort, or is damaged.
        DataError: if a split has no patients.
    """
    folder, home = told.experiment, told.registry
    made_from = artifacts.read_manifest(folder / "cohort", "cohort")
    place = registry.resolve(home, version)
    bundled = artifacts.verify(place, bundle_files.STAGE)
    artifacts.require_match(str(place), made_from.fingerprint, bundled.inputs.get("cohort", "none"))
    sources = {"cohort": made_from.fingerprint, "bundle": bundled.fingerprint}
    plain = {"evaluation": dataclasses.asdict(settings), "version": version}
    target = folder / "evaluation"
    wanted = artifacts.fingerprint(assessment.STAGE, sources, plain)
    if console.is_done(target, assessment.STAGE, wanted, told.force):
        report = json.loads((target / "report.json").read_text())
    else:
        _say_earlier(home, version)
        report = _measure(told, place, made_from, settings, build, device)
        served = bundle.load(place)
        made = card.make(told.name, registry.version(home, version), served, made_from, report)
        assessment.write(target, sources, plain, report, made)
    _publish(target, home, version)
    print(assessment.describe(report))
    console.say("report", str(target / "report.html"))
    _tell_sweep(folder, target, bundled.fingerprint, report, root)


def _measure(
    told: Invocation,
    place: Path,
    made_from: Manifest,
    settings: EvaluationConfig,
    build: Builder,
    device: str,
) -> dict[str, Any]:
    """Measures the bundle in a folder, as it is served; see `assessment.measure`."""
    folder, served, where = told.experiment, bundle.load(place), training.choose_device(device)
    patients = cohort.load(folder / "cohort")
    arrays = batches.cohort_arrays(patients, served.graph)
    model = bundle.restore_model(served, build).to(where)
    decision = Decision(served.preprocessing.temperature, served.preprocessing.threshold)
    report = assessment.measure(model, arrays, patients, decision, settings.seed, where)
    if retraining.KEY in served.metrics:
        report["model"] = retraining.measured(report["model"], served.metrics)
    truth = folder / "tables" / "truth"
    if assessment.has_ceiling(made_from.config, truth):
        console.say("ceiling", "the best that any model can do, from the population's truth")
        window = made_from.config["target_window_h"]
        report["ceiling"] = assessment.measure_ceiling(truth, patients, arrays, settings, window)
    return report


def _say_earlier(home: registry.Location, version: int) -> None:
    """Says so if test patients have judged other versions: choosing by that makes it worthless."""
    cards = {number for number in registry.records(home) if registry.read_card(home, number)}
    if others := sorted(cards - {version}):
        told = ", ".join(f"{number:04d}" for number in others)
        console.say(
            "evaluate",
            f"measured on the test patients before: version {told}; numbers that versions are "
            "chosen by tell too much",
        )


def _publish(folder: Path, home: registry.Location, version: int) -> None:
    """Puts an evaluation's model card into the registry, unless it is there."""
    found = json.loads((folder / "model_card.json").read_text())
    if registry.read_card(home, version) != found:
        text = (folder / "model_card.md").read_text()
        console.say("card", str(registry.write_card(home, version, found, text)))


def _tell_sweep(
    experiment: Path, made: Path, fingerprint: str, report: dict[str, Any], root: str | None
) -> None:
    """Puts the test metrics into the report of the sweep that the bundle is of, if it is there."""
    page = sweep_report.note_tested(
        experiment / "sweep", fingerprint, report["model"]["test"], root
    )
    if page is not None:
        console.say("sweep", str(page))
    sweep_tracking.send_evaluation(experiment / "sweep", made, fingerprint)
