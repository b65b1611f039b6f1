#!/usr/bin/env python3
"""Measures plain baselines against the ceiling on synthetic cohorts: can models be told apart?

    OMP_NUM_THREADS=1 python benchmarks/synthetic_baselines.py --quick
    OMP_NUM_THREADS=1 python benchmarks/synthetic_baselines.py \\
        --json benchmarks/results/synthetic_baselines.json

Copying the last visit, L1 logistic regression (scikit-learn, one a medication, C = 1) on the
visit's codes and on these with the last visit's medications, and a noisy-or learner, which has one
strength for each input and medication and knows nothing of clusters, graph or striking. Scores are
of the test patients. --quick leaves out the cohort of MIMIC-III's shape.
"""

import argparse
import datetime
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from benchmarks.recommenders.learners import Data, logistic_regression, noisy_or  # noqa: E402
from cafemed import config, drugs, metrics, paths, protocols, synthetic  # noqa: E402
from cafemed.cohort import Cohort  # noqa: E402
from cafemed.protocols import CohortConfig  # noqa: E402
from cafemed.sources import mimic3  # noqa: E402
from cafemed.synthetic import SyntheticConfig, ceiling  # noqa: E402

CASES = ("synthetic_demo", "synthetic", "synthetic_mimic3")


def population_config(case: str) -> SyntheticConfig:
    """The settings of a preset, as the job reads them."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(paths.CONF_DIR), version_base="1.3"):
        values: Any = OmegaConf.to_container(compose("prepare", [f"data={case}"]).data.generator)
    return config.from_mapping(SyntheticConfig, values, "data.generator")


def make_cohort(case: str, seed: int, folder: Path) -> Cohort:
    """Draws the population, writes its tables into `folder`, and reads them back."""
    synthetic.write_tables(synthetic.generate(population_config(case), seed), folder)
    knowledge = drugs.read(drugs.locate(folder / "drugs"))
    return protocols.clean(mimic3.read(folder), knowledge, CohortConfig(seed=seed))[0]


def measure(case: str, seed: int) -> list[dict[str, Any]]:
    """Scores of ceiling and baselines on one cohort, one row a score."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cohort = make_cohort(case, seed, folder)
        test = cohort.patients_of("test")
        best, _ = ceiling.bayes_probabilities(folder / "truth", cohort, cohort.visits_of(test))
    data = Data(cohort)
    targets = data.of("test")[1]
    offsets = np.concatenate([[0], np.cumsum(np.diff(cohort.patient_offsets)[test])])
    truly = metrics.evaluate(targets.astype(np.float32), targets, offsets, cohort.ddi)
    last = data.of("test")[0][:, data.num_codes :]
    later = ~cohort.is_first_visit()[cohort.visits_of(test)]
    rows = [
        ("true_sets", "ddi_rate", truly.ddi_rate),
        ("true_sets", "num_medications", truly.num_medications),
        (
            "copy",
            "jaccard_later_visits",
            float(metrics.score_visits(last, targets, cohort.ddi).jaccard[later].mean()),
        ),
    ]
    for name, probabilities in (
        ("ceiling", best),
        ("copy", last),
        ("l1_codes", logistic_regression(data, data.num_codes).test),
        ("l1", logistic_regression(data, data.inputs.shape[1]).test),
        ("noisy_or", noisy_or(data, seed, lambda p, y: -ceiling.log_loss(p, y)).test),
    ):
        at_half = metrics.evaluate(probabilities, targets, offsets, cohort.ddi)
        rows += [
            (name, "jaccard", at_half.jaccard),
            (name, "jaccard_best", metrics.best_threshold(probabilities, targets, offsets)[1]),
            (name, "prauc", at_half.prauc),
            (name, "log_loss", ceiling.log_loss(probabilities, targets)),
        ]
    units = {"log_loss": "nats", "num_medications": "medications"}
    return [
        {"case": f"{case}/{name}", "metric": metric, "value": value, "unit": units.get(metric, "1")}
        for name, metric, value in rows
    ]


def main() -> None:
    """Measures every case and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="without MIMIC-III's shape")
    parser.add_argument("--json", type=Path, help="write the results here as well")
    parser.add_argument("--seed", type=int, default=0, help="of population, split and learners")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    versions = (
        f"Python {platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}, "
        f"scikit-learn {sklearn.__version__}"
    )
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; {versions}")
    print(f"threads: torch 1, OMP_NUM_THREADS={os.getenv('OMP_NUM_THREADS')}")
    results = []
    for case in CASES[:2] if arguments.quick else CASES:
        found = measure(case, arguments.seed)
        results += found
        for row in found:
            print(f"{row['case']:<28}{row['metric']:<22}{row['value']:>9.4f} {row['unit']}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        # When and with what, so that a figure in a document can be traced.
        stamp = {"date": datetime.date.today().isoformat(), "versions": versions}
        arguments.json.write_text(json.dumps([r | stamp for r in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
