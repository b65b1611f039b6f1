#!/usr/bin/env python3
"""Searches the options of a model: many trials on Ray, the best one bundled and published.

    python jobs/tune.py search=smoke train.epochs=5
    python jobs/tune.py search=paper search.num_samples=32
    python jobs/tune.py search=wide search.num_samples=128 search.gpus=0.25
    python jobs/tune.py search=paper tracking=mlflow tracking.uri=http://tracking.example:5000
    python jobs/tune.py search=paper retrain=true
    python jobs/tune.py search=paper measure=true
    python jobs/tune.py resume=ROOT/experiments/NAME/trials
    ray job submit --working-dir . -- python jobs/tune.py name=mimic3 search=wide

Reads ROOT/experiments/NAME/cohort and /graph (of prepare.py and discover.py) and writes
ROOT/experiments/NAME/sweep: `sweep.parquet` with every trial, `best.json`, and the best trial's
bundle, which becomes a version in ROOT/registry/NAME. With RAY_ADDRESS, and in a submitted job, the
trials run on that cluster, and ROOT has to be a folder that all its nodes see; otherwise on a Ray
that is started for the sweep and ends with it. A sweep that was interrupted goes on from its
history, in ROOT/experiments/NAME/trials, when the same command runs again. With `measure=true` the
version is measured on the test patients in the end, as jobs/evaluate.py does it.
"""

import dataclasses
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from cafemed import config, console, invocation, paths
from cafemed.errors import UserError

SWITCHES = ("promote", "retrain", "measure")
SECTIONS = ("model", "train", "calibration", "search", "tracking", "resume", *SWITCHES)


@hydra.main(version_base="1.3", config_path=str(paths.CONF_DIR), config_name="tune")
def main(cfg: DictConfig) -> None:
    """Checks the configuration, runs the sweep if it is not there already, publishes."""
    values = as_told(OmegaConf.to_container(cfg, resolve=True))
    with invocation.job(values, SECTIONS) as told:
        import models  # torch takes seconds to import: not for --help
        from cafemed import (
            experiment,
            final_test,
            knowledge,
            promotion,
            registry,
            retraining,
            sweep,
            sweep_plan,
            sweep_report,
            sweep_run,
            sweep_start,
            sweep_tracking,
        )
        from cafemed.assessment import EvaluationConfig
        from cafemed.ledger import Ledger

        promote, retrain, measure = (config.checked(bool, values[key], key) for key in SWITCHES)
        plan = sweep_plan.read(values, models.options_class, models.NAMES)
        folder, target = told.experiment, told.experiment / "sweep"
        tracked = sweep_tracking.SweepTracking(values["tracking"], told)
        inputs = experiment.read_sources(folder) | knowledge.prior_inputs(plan)
        ledger = Ledger(sweep_start.storage_of(plan, folder))
        with tracked.ending():
            with sweep_start.locked(ledger, folder), sweep_start.resumable(ledger):
                if told.force or not sweep_start.is_done(target, ledger, plan, inputs):
                    job = {"root": str(told.root), "name": told.name, "promote": promote}
                    job |= {"retrain": retrain, "measure": measure}
                    job |= {"tracking": values["tracking"]}
                    job["registry"] = told.registries
                    tracked.require_ready(ledger)
                    registry.require_ready(told.registry)
                    sweep_start.prepare(target, ledger, plan, inputs, job, told.force)
                    sweep_run.run(folder, plan, ledger, inputs, models.build, tracked)
                again = retraining.run(folder, plan, models.build, told.force) if retrain else None
            if retraining.note(target, again) or not (target / sweep_report.REPORT).exists():
                console.say("report", str(sweep_report.write(target, values["paths"]["root"])))
            if sweep.read_best(target)["trial"] is None:
                tracked.finish(target, None)  # it is over, though there is nothing to publish
            version = promotion.publish_best(target, told.registry, promote, again)
            tracked.finish(target, version)
        if measure:
            once = dataclasses.replace(told, force=False)  # the same model again is the same
            root = values["paths"]["root"]
            final_test.run(once, version, EvaluationConfig(), models.build, root=root)
        console.say("done", str(target))


def as_told(values: Any) -> dict[str, Any]:
    """The job's configuration, or with `resume=PATH` that of the sweep there."""
    if values["resume"] is None:
        return dict(values)
    from cafemed import sweep_start

    try:
        return sweep_start.resumed(values, HydraConfig.get().overrides.task)
    except UserError as err:
        console.refuse(err)


if __name__ == "__main__":
    main()
