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
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from cafemed import config, drugs, metrics, paths, protocols, synthetic
from cafemed.cohort import Cohort, Split
from cafemed.protocols import CohortConfig
from cafemed.sources import mimic3
from cafemed.synthetic import SyntheticConfig, ceiling

Floats = NDArray[np.float32]

CASES = ("synthetic_demo", "synthetic", "synthetic_mimic3")
_EPOCHS, _BATCH, _LEARNING_RATE = 30, 256, 0.05


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


class Data:
    """Inputs (diagnoses, procedures, previous medications) and targets of each split's visits."""

    def __init__(self, cohort: Cohort) -> None:
        known, sizes = cohort.known_inputs(), cohort.sizes
        hot = [lists.multi_hot(n) for lists, n in zip(known, sizes, strict=True)]
        self.inputs = np.hstack(hot).astype(np.float32)
        self.targets = cohort.targets.multi_hot(sizes[2])
        self.num_codes = sizes[0] + sizes[1]
        self.cohort = cohort

    def of(self, split: Split) -> tuple[Floats, NDArray[np.bool_]]:
        """Inputs (v, N) and targets (v, N_m)."""
        visits = self.cohort.visits_of(self.cohort.patients_of(split))
        return self.inputs[visits], self.targets[visits]


def logistic_regression(data: Data, num_inputs: int) -> Floats:
    """Probabilities (test visits, N_m) of one L1 regression a medication on the first inputs."""
    (train, targets), (test, _) = data.of("train"), data.of("test")
    found = np.zeros((len(test), targets.shape[1]), np.float32)
    for j, outcome in enumerate(targets.T):
        if outcome.any() and not outcome.all():
            model = LogisticRegression(C=1.0, l1_ratio=1.0, solver="liblinear", random_state=0)
            model.fit(train[:, :num_inputs], outcome)
            found[:, j] = model.predict_proba(test[:, :num_inputs])[:, 1]
        else:
            found[:, j] = outcome.mean()
    return found


def noisy_or(data: Data, seed: int) -> Floats:
    """Probabilities (test visits, N_m) of a noisy-or, the epoch with the best validation loss."""
    torch.manual_seed(seed)
    inputs, outcomes = (torch.from_numpy(a).float() for a in data.of("train"))
    validation, validation_targets = data.of("validation")
    strength = torch.full((inputs.shape[1], outcomes.shape[1]), -5.0, requires_grad=True)
    leak = torch.full((outcomes.shape[1],), -4.0, requires_grad=True)
    optimizer = torch.optim.Adam([strength, leak], lr=_LEARNING_RATE)

    def log_miss(rows: torch.Tensor) -> torch.Tensor:
        positive = torch.nn.functional.softplus
        return -(rows @ positive(strength) + positive(leak))

    best, found = np.inf, np.zeros(0, np.float32)
    for _ in range(_EPOCHS):
        order = torch.randperm(len(inputs))
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            miss, outcome = log_miss(inputs[rows]), outcomes[rows]
            loss = -(outcome * torch.log(1e-6 - torch.expm1(miss)) + (1 - outcome) * miss).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            checked = -torch.expm1(log_miss(torch.from_numpy(validation))).numpy()
            if (value := ceiling.log_loss(checked, validation_targets)) < best:
                best = value
                found = -torch.expm1(log_miss(torch.from_numpy(data.of("test")[0]))).numpy()
    return found


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
        ("l1_codes", logistic_regression(data, data.num_codes)),
        ("l1", logistic_regression(data, data.inputs.shape[1])),
        ("noisy_or", noisy_or(data, seed)),
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
