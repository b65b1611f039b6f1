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

from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from cafemed import config, console, invocation, paths, registry


@hydra.main(version_base="1.3", config_path=str(paths.CONF_DIR), config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """Runs the stage."""
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    with invocation.job(values, ("version", "device", "evaluation")) as told:
        version = registry.resolve_version(told.registry, values["version"])
        console.say("evaluate", f"version {version:04d} ({values['version']}) of {told.registry}")
        import models  # torch takes seconds to import: not for --help
        from cafemed import final_test
        from cafemed.assessment import EvaluationConfig

        settings = config.from_mapping(EvaluationConfig, values["evaluation"], "evaluation")
        root, device = values["paths"]["root"], values["device"]
        final_test.run(told, version, settings, models.build, device, root)
        console.say("done", str(told.experiment / "evaluation"))


if __name__ == "__main__":
    main()
