#!/usr/bin/env python3
"""Searches the options of a model: many trials on Ray, the best one bundled and published.

    python jobs/tune.py search=smoke train.epochs=5
    python jobs/tune.py search=paper search.num_samples=32
    python jobs/tune.py search=wide search.num_samples=128 search.gpus=0.25
    ray job submit --working-dir . -- python jobs/tune.py name=mimic3 search=wide

Reads ROOT/experiments/NAME/cohort and /graph (of prepare.py and discover.py) and writes
ROOT/experiments/NAME/sweep: `sweep.parquet` with every trial, `best.json`, and the best trial's
bundle, which becomes a version in ROOT/registry/NAME. With RAY_ADDRESS, and in a submitted job, the
trials run on that cluster, and ROOT has to be a folder that all its nodes see; otherwise on a Ray
that is started for the sweep and ends with it.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, OmegaConf

from cafemed import artifacts, config, console, invocation, paths

if TYPE_CHECKING:
    from cafemed.calibration import CalibrationConfig
    from cafemed.sweep import SweepResult
    from cafemed.sweep_plan import SweepPlan


@hydra.main(version_base="1.3", config_path=str(paths.CONF_DIR), config_name="tune")
def main(cfg: DictConfig) -> None:
    """Checks the configuration, runs the sweep if it is not there already, publishes."""
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    with invocation.job(values, ("model", "train", "calibration", "search", "promote")) as told:
        import models  # torch takes seconds to import: not for --help
        from cafemed import experiment, sweep, sweep_plan
        from cafemed.calibration import CalibrationConfig

        promote = config.checked(bool, values["promote"], "promote")
        calibrated = config.from_mapping(CalibrationConfig, values["calibration"], "calibration")
        plan = sweep_plan.read(
            values["model"], values["train"], values["search"], models.options_class
        )
        folder = told.experiment
        sources = experiment.read_sources(folder)
        settings = {**plan.settings(), "calibration": dataclasses.asdict(calibrated)}
        wanted = artifacts.fingerprint(sweep.STAGE, sources, settings)
        if not console.is_done(folder / "sweep", sweep.STAGE, wanted, told.force):
            run(folder, plan, calibrated, settings)
        publish(folder / "sweep", told.registry, promote)


def run(
    folder: Path, plan: "SweepPlan", calibrated: "CalibrationConfig", settings: dict[str, Any]
) -> None:
    """Loads, searches, and writes the sweep's folder with the best trial's bundle."""
    import models
    from cafemed import cluster, experiment, promotion, sweep, trials, tuning
    from cafemed.bundle import Preprocessing

    given = experiment.load_inputs(folder)
    cohort = artifacts.read_manifest(folder / "cohort", "cohort").config
    data = trials.TrialData(
        build=models.build,
        model_name=plan.model_name,
        model_options=plan.model_options,
        inputs=given.inputs,
        arrays=given.arrays,
        train_patients=given.cohort.patients_of("train"),
        validation_patients=given.cohort.patients_of("validation"),
        config=plan.fit,
    )
    total = plan.search.num_samples
    console.say("tune", f"{total} trials over {', '.join(plan.space.entries)}")
    storage = folder / "trials"
    try:
        with (
            cluster.ray_cluster(plan.search.total_cpus, plan.search.gpus) as where,
            console.counter("trials", total) as count,
        ):
            console.say("ray", where)

            def ended(trial: sweep.TrialRecord) -> None:
                console.say("trial", trial.describe())
                count()

            result = tuning.run(plan, data, storage, ended)
        preprocessing = Preprocessing(
            inputs=given.cohort.inputs,
            target_window_h=cohort["target_window_h"],
        )
        made = promotion.make_bundle(result.best, data, given, preprocessing, calibrated)
        with artifacts.new_folder(folder / "sweep", sweep.STAGE, given.sources, settings) as (
            partial,
            report,
        ):
            fingerprint = promotion.write_bundle(partial / "bundle", made)
            sweep.write(result, partial, fingerprint)
            report |= sweep.summary(result)
    finally:
        shutil.rmtree(storage, ignore_errors=True)
    summarise(result)


def summarise(result: "SweepResult") -> None:
    """Prints how many trials there were, and the best one."""
    counts = ", ".join(
        f"{result.count(s)} {s}" for s in ("finished", "stopped", "failed") if result.count(s)
    )
    console.say("tune", f"{len(result.trials)} trials: {counts}")
    console.say("best", result.best.describe())


def publish(folder: Path, home: Path, promote: bool) -> None:
    """Puts the best trial's bundle into the registry, unless it is there."""
    from cafemed import promotion, search_space, sweep

    best = sweep.read_best(folder)
    made = artifacts.read_manifest(folder, sweep.STAGE)
    varied = search_space.split(best["parameters"]).get("train", {})
    train = {**made.config["train"], **varied, "seed": best["seed"]}
    settings = {"train": train, "calibration": made.config["calibration"]}
    produced_by = {"job": "tune", "sweep": made.fingerprint, **best, **settings}
    version, changed = promotion.publish(home, folder / "bundle", produced_by, promote)
    if changed:
        aliases = "candidate and production" if promote else "candidate"
        console.say("registry", f"version {version:04d} is {aliases}: {home}")
    console.say("done", str(folder))


if __name__ == "__main__":
    main()
