"""The winner of a sweep trained anew on training and validation patients, where that is asked for.

The validation patients chose the trial, its epoch, temperature and threshold. Once chosen they are
worth more as patients to learn from (Goodfellow et al., Deep Learning, 2016, section 7.8: the
second pass of early stopping, algorithm 7.2). So the chosen parameters are trained again, with the
trial's seed, on both, for as many epochs as the trial's best one has: passes over the patients, not
steps, so that each patient is seen as often as it was. The weights are those after the last
epoch; there is nobody left to choose by.

Nothing else is learned anew: graph, effects and scaling are of the training patients, and
temperature and threshold the trial's, as no patient is left that the model has not seen. For the
same reason the bundle's validation metrics, and the histogram of its scores, stay the trial's. What
the retrained model reaches is known of the test patients alone.

The artifact: stage "retrained", `bundle/` and `history.json`.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cafemed import (
    artifacts,
    bundle,
    checkpoints,
    cluster,
    console,
    distributed,
    experiment,
    findings,
    promotion,
    reference,
    sweep,
    training,
    tuning,
)
from cafemed.bundle import Bundle
from cafemed.reference import Reference
from cafemed.sweep_plan import SearchConfig, SweepPlan
from cafemed.training import Builder, FitConfig

if TYPE_CHECKING:
    from cafemed.experiment import Experiment

STAGE = "retrained"

#: In a bundle's `metrics.json`, in the registry's record of it and in the model card: how.
KEY = "retrained"


def run(folder: Path, plan: SweepPlan, build: Builder, force: bool) -> Path | None:
    """Trains the chosen trial of a finished sweep anew, unless that is done.

    It goes on from its last epoch if it was interrupted.

    Args:
        folder: of the experiment, with "sweep", "cohort" and "graph" in it.
        plan: of the sweep.
        build: see `training.fit`.
        force: do it again.

    Returns:
        The artifact's folder; None if the sweep has chosen no trial.

    Raises:
        ArtifactError: if the sweep's bundle, cohort or graph is missing or damaged.
        TrainingError: if a loss is not finite.
    """
    best = sweep.read_best(folder / "sweep")
    if best["trial"] is None:
        return None
    target = folder / STAGE
    inputs = {**experiment.read_sources(folder), "bundle": best["bundle"]}
    settings = {key: best[key] for key in ("trial", "parameters", "seed", "epoch")}
    wanted = artifacts.fingerprint(STAGE, inputs, settings)
    if console.is_done(target, STAGE, wanted, force):
        return target
    checkpoint = folder / "checkpoints" / f"{STAGE}-{wanted[:16]}"
    if force:
        shutil.rmtree(checkpoint, ignore_errors=True)
    served, given = bundle.load(folder / "sweep" / "bundle"), experiment.load_inputs(folder)
    patients = _patients(given)
    epochs = int(best["epoch"])
    console.say(
        "retrain",
        f"trial {best['trial']} for {epochs} epochs on the {len(patients)} training and validation "
        "patients",
    )
    config = fit_config(plan.fit, best)
    weights, history = _train(served, given, config, checkpoint, plan, build)
    facts = {"trial": best["trial"], "epochs": epochs, "patients": len(patients)}
    with artifacts.new_folder(target, STAGE, inputs, settings) as (partial, report):
        made = remade(served, weights, given, facts, build)
        report |= {**facts, "bundle": promotion.write_bundle(partial / "bundle", made)}
        (partial / "history.json").write_text(json.dumps(history, indent=1) + "\n")
    shutil.rmtree(checkpoint, ignore_errors=True)
    return target


def fit_config(configured: FitConfig, best: Mapping[str, Any]) -> FitConfig:
    """How the trial is trained again: as it was, up to its best epoch, without stopping.

    Args:
        configured: of the sweep.
        best: of `best.json`.
    """
    from cafemed import search_space

    varied = search_space.split(best["parameters"]).get("train", {})
    epochs = int(best["epoch"])
    return dataclasses.replace(
        configured, **varied, seed=best["seed"], epochs=epochs, patience=epochs
    )


def remade(
    served: Bundle,
    weights: Mapping[str, Tensor],
    given: "Experiment",
    facts: Mapping[str, Any],
    build: Builder,
) -> Bundle:
    """The trial's bundle with the weights of the model that was trained again.

    Args:
        served: the trial's.
        weights: state dict after the last epoch.
        given: cohort, graph and effects of both.
        facts: "trial", "epochs" and "patients".
        build: see `training.fit`.
    """
    model = build(served.model_name, given.inputs, served.model_options, 0)
    model.load_state_dict(dict(weights))
    model.eval()
    check = reference.make_self_check(
        model, served.graph, served.vocabularies, served.preprocessing.scaling
    )
    return dataclasses.replace(
        served,
        weights=dict(weights),
        reference=Reference(served.reference.scores, check),
        metrics={**served.metrics, KEY: dict(facts)},
        fingerprint="",
    )


def note(folder: Path, retrained: Path | None) -> bool:
    """Notes in a sweep's folder whether its trial was retrained; says whether that is news.

    What either of the two models reached on the test patients is not said of the other.

    Args:
        folder: of the sweep.
        retrained: the artifact; None: the trial itself is what is published.
    """
    path = folder / findings.RETRAINED
    if retrained is None:
        if not path.exists():
            return False
        path.unlink()
        (folder / findings.TESTED).unlink(missing_ok=True)
        return True
    text = json.dumps(artifacts.read_manifest(retrained, STAGE).report, indent=1) + "\n"
    if path.exists() and path.read_text() == text:
        return False
    (folder / findings.TESTED).unlink(missing_ok=True)
    artifacts.write_text(path, text)
    path.chmod(0o644)
    return True


def measured(found: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """`fits.measure`'s result without what a retrained model cannot be measured on.

    It has learned from the validation patients: what is told of them is what the trial reached,
    and the threshold that would have been best on them is left at the one that is served.

    Args:
        found: of the retrained model.
        metrics: of its bundle.
    """
    of_trial = {
        "patients": metrics["validation_patients"],
        "visits": metrics["validation_visits"],
        "metrics": metrics["validation"],
        "intervals": metrics["validation_intervals"],
        "bootstrap_sd": metrics["validation_bootstrap_sd"],
        "metrics_at_best_threshold": metrics["validation"],
        "calibration": metrics["validation_calibration"],
    }
    test = {**found["test"], "metrics_at_best_threshold": found["test"]["metrics"]}
    honest = {"best_threshold": found["threshold"], "validation": of_trial, "test": test}
    return {**found, **honest, KEY: dict(metrics[KEY])}


def _patients(given: "Experiment") -> Any:
    """Indices of the training and validation patients."""
    both = [given.cohort.patients_of(split) for split in ("train", "validation")]
    return np.sort(np.concatenate(both))


def _train(
    served: Bundle,
    given: "Experiment",
    config: FitConfig,
    checkpoint: Path,
    plan: SweepPlan,
    build: Builder,
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Weights after the last epoch, and all epochs; the checkpoint holds both."""
    # Some validation patients have to be given; nothing is chosen on them.
    data = distributed.FitData(
        build,
        given.inputs,
        given.arrays,
        _patients(given),
        given.cohort.patients_of("validation"),
    )
    what = (served.model_name, served.model_options)
    if plan.search.num_workers > 1 or os.environ.get("RAY_ADDRESS"):
        _train_on_ray(data, what, config, checkpoint, plan.search)
    else:
        cuda = plan.search.gpus > 0 and torch.cuda.is_available()
        training.fit(
            build,
            *what,
            data.inputs,
            data.arrays,
            data.train_patients,
            data.validation_patients,
            config,
            checkpoint_dir=checkpoint,
            device="cuda" if cuda else "cpu",
        )
    found = checkpoints.load(checkpoint, None)
    assert found is not None
    assert found.epoch == config.epochs
    return found.weights, found.history


def _train_on_ray(
    data: distributed.FitData,
    what: tuple[str, Mapping[str, Any]],
    config: FitConfig,
    checkpoint: Path,
    search: SearchConfig,
) -> None:
    """Trains with what a trial reserves, where the sweep's trials were."""
    import ray

    with cluster.ray_cluster(search.num_workers * search.cpus, search.gpus) as where:
        console.say("ray", where)
        tuning.require_resources(search)
        with console.silenced("ray", "ray.train"):
            distributed.fit(
                ray.put(data),
                *what,
                config,
                search.workers,
                checkpoint_dir=checkpoint,
                max_failures=search.max_failures,
            )
