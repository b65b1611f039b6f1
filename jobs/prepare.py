#!/usr/bin/env python3
"""Makes a cohort from hospital tables: the first stage of an experiment.

    python jobs/prepare.py
    python jobs/prepare.py data=mimic3 data.root=FOLDER data.drugs=FOLDER
    python jobs/prepare.py data=mimic3 data.root=FOLDER data.drugs=FOLDER \\
        name=papers data.cohort.protocol=published
    python jobs/prepare.py data=tables data.root=events.csv data.drugs=FOLDER

Without arguments it draws a synthetic population first. Written are ROOT/experiments/NAME/cohort
and, for the synthetic population, ROOT/experiments/NAME/tables. A stage whose inputs and
configuration are unchanged is skipped.
"""

from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from cafemed import config, console, invocation, paths, preparation
from cafemed.preparation import DataConfig


@hydra.main(version_base="1.3", config_path=str(paths.CONF_DIR), config_name="prepare")
def main(cfg: DictConfig) -> None:
    """Runs the stage."""
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    with invocation.job(values, ("data",)) as told:
        data = config.from_mapping(DataConfig, values["data"], "data")
        experiment = told.experiment
        if data.source == "synthetic":
            preparation.make_tables(data, experiment / "tables", told.force)
        inputs = preparation.locate(data, experiment / "tables")
        report = preparation.make_cohort(data, inputs, experiment / "cohort", told.force)
        print(preparation.describe(report))
        console.say("done", str(experiment / "cohort"))


if __name__ == "__main__":
    main()
