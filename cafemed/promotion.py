"""From a sweep's best trial to a published model: tested again, bundled, put into the registry."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cafemed import (
    artifacts,
    bundle,
    bundle_files,
    calibration,
    console,
    fits,
    metrics,
    reference,
    registry,
    scaling,
    search_space,
    sweep,
    trials,
)
from cafemed.bundle import Bundle, Preprocessing
from cafemed.calibration import CalibrationConfig, Predictions
from cafemed.errors import ArtifactError, TrainingError
from cafemed.experiment import Experiment
from cafemed.reference import Reference
from cafemed.sweep import TrialRecord
from cafemed.trials import TrialData

#: Largest difference between the Jaccard that a trial reported and that of its weights loaded
#: again. They are equal on one machine; a GPU's rounding may move single probabilities across the
#: threshold (an assumption, with a margin).
_TOLERANCE = 0.005

#: Of the bootstrap behind the bundle's intervals.
_SEED = 0


def make_bundle(
    trial: TrialRecord,
    data: TrialData,
    given: Experiment,
    preprocessing: Preprocessing,
    calibrated: CalibrationConfig,
) -> Bundle:
    """Rebuilds the model of a trial from its checkpoint, tests it again, calibrates and bundles it.

    The bundle's metrics are those of what is served: of probabilities after temperature, at the
    chosen threshold.

    Args:
        trial: has a checkpoint.
        data: what the sweep's trials shared.
        given: cohort, graph and effects that they were trained on.
        preprocessing: see bundle.Preprocessing; its scaling is replaced by the cohort's, its
            temperature and threshold by what is chosen on the validation patients.
        calibrated: how they are chosen.

    Raises:
        ArtifactError: if the weights do not reach the Jaccard that the trial reported.
    """
    assert trial.checkpoint is not None, "a trial that reported has a checkpoint"
    assert trial.best_epoch is not None
    options, config = data.varied(trial.parameters, trial.seed)
    weights = trials.best_weights(trial.checkpoint)
    name = data.model_of(trial.parameters)
    model = data.build(name, given.inputs, options, config.seed)
    model.load_state_dict(weights)
    model.eval()
    predictions = Predictions.of(model, given.arrays, data.validation_patients)
    found = metrics.evaluate(
        predictions.probabilities(),
        predictions.targets,
        predictions.patient_offsets,
        given.inputs.ddi,
        config.threshold,
    )
    reported = float(trial.best_epoch["metrics"]["jaccard"])
    if not abs(found.jaccard - reported) <= _TOLERANCE:
        raise ArtifactError(
            f"{trial.checkpoint}: trial {trial.number} reported a Jaccard of {reported:.4f}, but "
            f"its weights give {found.jaccard:.4f}; run the sweep again"
        )
    decision = calibration.choose(predictions, calibrated, config.threshold)
    measured = fits.measure({"validation": predictions}, given.inputs.ddi, decision, _SEED)
    vocabularies, scaled = given.cohort.vocabularies, scaling.fit(given.cohort)
    return Bundle(
        model_name=name,
        model_options=options,
        weights=weights,
        vocabularies=vocabularies,
        graph=given.graph,
        effects=given.effects,
        ddi=given.inputs.ddi,
        preprocessing=dataclasses.replace(
            preprocessing, scaling=scaled, **dataclasses.asdict(decision)
        ),
        reference=Reference(
            reference.score_histogram(predictions.probabilities(decision.temperature)),
            reference.make_self_check(model, given.graph, vocabularies, scaled),
        ),
        metrics=_metrics(measured),
        sources=given.sources,
        molecules=given.cohort.molecules,
        names=given.cohort.names,
    )


def _metrics(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Content of `metrics.json`."""
    found = measured["validation"]
    return {
        "validation": found["metrics"],
        "validation_intervals": found["intervals"],
        "validation_bootstrap_sd": found["bootstrap_sd"],
        "validation_patients": found["patients"],
        "validation_visits": found["visits"],
        "validation_calibration": found["calibration"],
    }


def objection(folder: Path, max_ddi_rate: float | None) -> str | None:
    """Why a bundle is not to serve, in one line; None if it may.

    A trial is chosen by what it reported, at `train.threshold`. What is served has a temperature
    and perhaps a threshold of its own, and may recommend more that interact.

    Args:
        folder: the bundle.
        max_ddi_rate: that the sweep asked for.
    """
    if max_ddi_rate is None:
        return None
    measured = json.loads((folder / "metrics.json").read_text())["validation"]["ddi_rate"]
    if measured <= max_ddi_rate:
        return None
    return (
        f"not made production: as served, its DDI rate is {measured:.4f} on the validation "
        f"patients, and search.max_ddi_rate allows {max_ddi_rate:g}; it is the candidate"
    )


def publish(
    home: registry.Location, folder: Path, produced_by: Mapping[str, Any], promote: bool
) -> tuple[int, bool]:
    """Makes a bundle a version of the registry, `candidate` and, if asked, `production`, but once.

    Asked again it does what an interruption left undone, and no more: an alias that was moved on
    or rolled back since stays where it is.

    Args:
        home: the registry.
        folder: the bundle.
        produced_by: see `registry.publish`.
        promote: make it the production model.

    Returns:
        Its version, and whether anything was done.

    Raises:
        ArtifactError: see `registry.publish`.
    """
    fingerprint = artifacts.read_manifest(folder, bundle_files.STAGE).fingerprint
    published = [
        number
        for number, record in registry.records(home).items()
        if record["produced_by"].get("bundle") == fingerprint
    ]
    if published:
        number = published[0]
    else:
        number = registry.publish(home, folder, {**produced_by, "bundle": fingerprint})
    changed = not published
    for alias in ("candidate", "production") if promote else ("candidate",):
        if all(move.version != number for move in registry.history(home, alias)):
            registry.promote(home, number, alias)
            changed = True
    return number, changed


def publish_best(
    folder: Path, home: registry.Location, promote: bool, retrained: Path | None = None
) -> int:
    """Puts the best trial's bundle into the registry, unless it is there.

    It is made production if that is asked for and it keeps `search.max_ddi_rate` as it is served.
    Where a version becomes that without a model card, that is said.

    Args:
        folder: of the finished sweep, with its bundle.
        home: the registry.
        promote: make it the production model.
        retrained: the artifact of `cafemed/retraining.py`, whose bundle takes the trial's place.

    Returns:
        Its version.

    Raises:
        TrainingError: if the sweep has chosen none.
    """
    best = sweep.read_best(folder)
    if best["trial"] is None:
        raise TrainingError(best["reason"])
    made = artifacts.read_manifest(folder, sweep.STAGE)
    varied = search_space.split(best["parameters"]).get("train", {})
    train = {**made.config["train"], **varied, "seed": best["seed"]}
    settings = {"train": train, "calibration": made.config["calibration"]}
    produced_by = {"job": "tune", "sweep": made.fingerprint, **best, **settings}
    chosen = folder / "bundle"
    if retrained is not None:
        produced_by["retrained"] = artifacts.read_manifest(retrained, "retrained").report
        chosen = retrained / "bundle"
    against = objection(chosen, made.config["search"]["max_ddi_rate"])
    if promote and against is not None:
        console.say("promote", against)
        promote = False
    version, changed = publish(home, chosen, produced_by, promote)
    if changed:
        aliases = "candidate and production" if promote else "candidate"
        console.say("registry", f"version {version:04d} is {aliases}: {home}")
        if promote and registry.read_card(home, version) is None:
            console.say("card", f"none before jobs/evaluate.py measures version {version:04d}")
    return version


def write_bundle(folder: Path, made: Bundle) -> str:
    """Writes a bundle and loads it again, so that what is published is known to load."""
    fingerprint = bundle.write(folder, made)
    bundle.load(folder)
    return fingerprint
