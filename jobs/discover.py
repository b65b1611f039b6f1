#!/usr/bin/env python3
"""Learns a causal graph over codes, and effects on medications, from a cohort's training patients.

    python jobs/discover.py
    python jobs/discover.py causal.workers=2 causal.effects.estimator=raw
    python jobs/discover.py causal.cluster=ray
    python jobs/discover.py causal.cluster=tcp://HOST:8786
    python jobs/discover.py causal.truth=ROOT/experiments/NAME/tables/truth
    ray job submit --working-dir . -- python jobs/discover.py causal.cluster=ray

Reads ROOT/experiments/NAME/cohort, writes ROOT/experiments/NAME/graph. Skipped when neither the
cohort nor the configuration has changed; with causal.truth it is compared with the truth all the
same.
"""

import os
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from cafemed import config, console, invocation, paths


@hydra.main(version_base="1.3", config_path=str(paths.CONF_DIR), config_name="discover")
def main(cfg: DictConfig) -> None:
    """Runs the stage."""
    # Dask's worker processes import this file too; what is slow to import stays in here.
    from cafemed import artifacts, cohort
    from causal import cluster, discovery, effects, evaluation, report, sinks
    from causal.discovery import CausalConfig

    values: Any = OmegaConf.to_container(cfg, resolve=True)
    with invocation.job(values, ("causal",)) as told:
        # Compiled kernels are kept under the root; workers inherit where that is.
        os.environ["CAFEMED_HOME"] = str(told.root)
        causal = config.from_mapping(CausalConfig, values["causal"], "causal")
        truth = None if causal.truth is None else evaluation.read_truth(causal.truth)
        people = cohort.load(told.experiment / "cohort")
        inputs = {"cohort": people.fingerprint}
        content = causal.content()
        target = told.experiment / "graph"
        wanted = artifacts.fingerprint("graph", inputs, content)
        if not console.is_done(target, "graph", wanted, told.force):
            with cluster.connect(causal.cluster, causal.workers) as client:
                found = discovery.discover(people, causal, client)
                if causal.sinks:
                    found = sinks.add_to(found, people, causal, client)
            table = effects.estimate(people, found.graph, causal.effects)
            with artifacts.new_folder(target, "graph", inputs, content) as (folder, written):
                report.write(folder, found, table)
                written |= found.report
            for line in report.lines(found, table):
                console.say("graph", line)
            console.say("done", str(target))
        if truth is not None:
            with console.waiting("comparing with the truth"):
                compared = evaluation.lines(*report.read(target), truth)
            for line in compared:
                console.say("graph", line)


if __name__ == "__main__":
    main()
