#!/usr/bin/env python3
"""Measures a published model on the test patients of its cohort, and writes its model card.

    python jobs/evaluate.py
    python jobs/evaluate.py version=candidate
    python jobs/evaluate.py name=mimic3 version=3

Reads ROOT/experiments/NAME/cohort and a version of ROOT/registry/NAME, and writes
ROOT/experiments/NAME/evaluation: `report.json` and `report.html` with metrics and their intervals,
baselines, calibration, subgroups, and for a synthetic cohort the ceiling that no model can pass;
and the model card, which also goes to ROOT/registry/NAME/cards. If the model is the best of the
experiment's sweep, the metrics also go into the sweep's report. docs/evaluation.md says what the
numbers mean. Use it once, at the end: choosing by test results makes them worthless.
"""

import json
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from cafemed import artifacts, console, invocation, paths, registry


@hydra.main(version_base="1.3", config_path=str(paths.CONF_DIR), config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """Runs the stage."""
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    with invocation.job(values, ("version", "device", "evaluation")) as told:
        home = told.registry
        version = registry.resolve_version(home, values["version"])
        console.say("evaluate", f"version {version:04d} ({values['version']}) of {home}")
        run(told, version, values)


def run(told: invocation.Invocation, version: int, values: dict[str, Any]) -> None:
    """Loads the model and the cohort, measures, writes and reports."""
    import models  # torch takes seconds to import: not for --help
    from cafemed import (
        assessment,
        batches,
        bundle,
        bundle_files,
        card,
        cohort,
        config,
        retraining,
        training,
    )
    from cafemed.assessment import EvaluationConfig
    from cafemed.calibration import Decision

    settings = config.from_mapping(EvaluationConfig, values["evaluation"], "evaluation")
    device = training.choose_device(values["device"])
    folder, home = told.experiment, told.registry
    bundle_folder = registry.resolve(home, version)
    made_from = artifacts.read_manifest(folder / "cohort", "cohort")
    bundled = artifacts.verify(bundle_folder, bundle_files.STAGE)
    artifacts.require_match(
        str(bundle_folder), made_from.fingerprint, bundled.inputs.get("cohort", "none")
    )
    sources = {"cohort": made_from.fingerprint, "bundle": bundled.fingerprint}
    plain = {"evaluation": values["evaluation"], "version": version}
    target = folder / "evaluation"
    wanted = artifacts.fingerprint(assessment.STAGE, sources, plain)
    if console.is_done(target, assessment.STAGE, wanted, values["force"]):
        report = json.loads((target / "report.json").read_text())
        publish(target, home, version)
        print(assessment.describe(report))
        tell_sweep(told, bundled.fingerprint, report, values)
        return

    served = bundle.load(bundle_folder)
    patients = cohort.load(folder / "cohort")
    arrays = batches.cohort_arrays(patients, served.graph)
    model = bundle.restore_model(served, models.build).to(device)
    decision = Decision(served.preprocessing.temperature, served.preprocessing.threshold)
    report = assessment.measure(model, arrays, patients, decision, settings.seed, device)
    if retraining.KEY in served.metrics:
        report["model"] = retraining.measured(report["model"], served.metrics)
    truth = folder / "tables" / "truth"
    if assessment.has_ceiling(made_from.config, truth):
        console.say("ceiling", "the best that any model can do, from the population's truth")
        window = made_from.config["target_window_h"]
        report["ceiling"] = assessment.measure_ceiling(truth, patients, arrays, settings, window)
    made = card.make(told.name, registry.version(home, version), served, made_from, report)
    assessment.write(target, sources, plain, report, made)
    publish(target, home, version)
    print(assessment.describe(report))
    console.say("report", str(target / "report.html"))
    tell_sweep(told, bundled.fingerprint, report, values)
    console.say("done", str(target))


def tell_sweep(
    told: invocation.Invocation, fingerprint: str, report: dict[str, Any], values: dict[str, Any]
) -> None:
    """Puts the test metrics into the report of the sweep that the bundle is of, if it is there."""
    from cafemed import sweep_report, sweep_tracking

    reached, root = report["model"]["test"], values["paths"]["root"]
    page = sweep_report.note_tested(told.experiment / "sweep", fingerprint, reached, root)
    if page is not None:
        console.say("sweep", str(page))
    folder, made = told.experiment / "sweep", told.experiment / "evaluation"
    sweep_tracking.send_evaluation(folder, made, fingerprint)


def publish(folder: Path, home: registry.Location, version: int) -> None:
    """Puts an evaluation's model card into the registry, unless it is there."""
    found = json.loads((folder / "model_card.json").read_text())
    if registry.read_card(home, version) != found:
        text = (folder / "model_card.md").read_text()
        console.say("card", str(registry.write_card(home, version, found, text)))


if __name__ == "__main__":
    main()
