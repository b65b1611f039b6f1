#!/usr/bin/env python3
"""Times the estimators of effects, and compares what they give with true effects.

    OMP_NUM_THREADS=1 python benchmarks/effects.py --quick
    OMP_NUM_THREADS=1 python benchmarks/effects.py --json benchmarks/results/effects.json

Times: CPU seconds of `causal.effects.estimate`, from the cohort in memory to the table, the fastest
of three, on 10,000 invented visits with 1,958 diagnoses, 1,430 procedures and 131 medications, and
a random graph with 1.5 parents a code: 443,828 pairs, and 17,161 of previous medications.

Truths: synthetic cohorts, whose effects under intervention are known, with the true graph given,
and with the graph that discovery finds by its defaults. "dependent" is a population of 6,000
patients whose codes cause each other more often and more strongly. Errors and coverages are of the
pairs that the doubly robust estimator has support for, so that all estimators are compared on the
same pairs; "class", the mean over the graph's Markov class, on those of them that it has support
for, with `coverage_of_range` from the smallest to the largest effect. `rmse_table` is of all pairs,
those without support as the table has them. Confounded pairs have a common cause among codes
(`cafemed.synthetic.confounding`); `..._any` also counts those that only medications striking each
other confound. Large effects are those above 0.1. Of previous
medications, `..._again` are pairs of the same medication a visit later, `..._others` all other
pairs; each estimator on those it has support for. --quick leaves out MIMIC-III's shape and the
dependent codes.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy
from numpy.typing import NDArray

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from cafemed import config, drugs, paths, protocols, synthetic  # noqa: E402
from cafemed.codes import CodeLists  # noqa: E402
from cafemed.cohort import Cohort  # noqa: E402
from cafemed.graphs import CausalGraph, EffectTable  # noqa: E402
from cafemed.protocols import CohortConfig  # noqa: E402
from cafemed.sources import mimic3  # noqa: E402
from cafemed.synthetic import SyntheticConfig, truth  # noqa: E402
from cafemed.synthetic.confounding import confounded  # noqa: E402
from cafemed.synthetic.effects import previous_effects  # noqa: E402
from causal import cluster, columns, discovery, effects, regression  # noqa: E402
from causal.discovery import CausalConfig  # noqa: E402
from causal.effects import EffectsConfig  # noqa: E402

#: Diagnoses, procedures, medications; codes of each in a visit.
SIZES, MEANS, VISITS = (1958, 1430, 131), (10.5, 3.8, 11.6), 10_000
PARENTS_PER_CODE = 1.5
ESTIMATORS: tuple[Literal["raw", "adjusted", "doubly_robust"], ...] = (
    "raw",
    "adjusted",
    "doubly_robust",
)
CASES = ("synthetic", "dependent", "synthetic_mimic3")


def population_config(case: str) -> SyntheticConfig:
    """The settings of a preset, as the job reads them, or those of dependent codes."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    preset = "synthetic" if case == "dependent" else case
    with initialize_config_dir(str(paths.CONF_DIR), version_base="1.3"):
        values: Any = OmegaConf.to_container(compose("prepare", [f"data={preset}"]).data.generator)
    found = config.from_mapping(SyntheticConfig, values, "data.generator")
    if case != "dependent":
        return found
    return dataclasses.replace(
        found,
        num_patients=6_000,
        num_visits=14_200,
        parents_per_code=2.0,
        code_strength_low=0.5,
        code_strength_high=0.95,
        specificity=0.5,
    )


def make_cohort(case: str, seed: int) -> tuple[Cohort, truth.Truth, EffectTable]:
    """Draws a population, writes its tables, and reads them back as the job does.

    The table is of previous medications.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        population = synthetic.generate(population_config(case), seed)
        synthetic.write_tables(population, folder)
        knowledge = drugs.read(drugs.locate(folder / "drugs"))
        cohort, _ = protocols.clean(mimic3.read(folder), knowledge, CohortConfig(seed=seed))
        return cohort, truth.read(folder / "truth"), previous_effects(population)


def invented(seed: int) -> tuple[Cohort, CausalGraph]:
    """Visits of Zipf-like codes, all for training, and a graph over diagnoses and procedures."""
    rng = np.random.default_rng(seed)
    lists = []
    for size, mean in zip(SIZES, MEANS, strict=True):
        often = rng.permutation(1 / np.arange(1, size + 1))
        share = np.minimum(often / often.sum() * mean, 0.45)
        present = rng.random((VISITS, size)) < share
        offsets = np.concatenate([[0], np.cumsum(present.sum(axis=1))])
        lists.append(CodeLists(np.nonzero(present)[1].astype(np.int32), offsets))
    patients = VISITS // 2
    kinds = ("diagnosis", "procedure", "medication")
    cohort = Cohort(
        patient_offsets=np.arange(0, VISITS + 1, 2),
        patient_ids=tuple(map(str, range(patients))),
        visit_ids=tuple(map(str, range(VISITS))),
        admitted=np.zeros(VISITS, "datetime64[s]"),
        diagnoses=lists[0],
        procedures=lists[1],
        medications=lists[2],
        targets=lists[2],
        vocabularies={
            kind: tuple(f"x:{i:04}" for i in range(size))
            for kind, size in zip(kinds, SIZES, strict=True)
        },
        ddi=np.zeros((SIZES[2], SIZES[2]), np.bool_),
        split=np.zeros(patients, np.int8),
        sex=np.zeros(patients, np.int8),
        age=np.full(VISITS, 50, np.float32),
        inputs="current",
    )
    nodes = columns.of_cohort(cohort).names
    ends = rng.integers(0, SIZES[0] + SIZES[1], (round(PARENTS_PER_CODE * sum(SIZES[:2])), 2))
    ends = np.unique(np.sort(ends[ends[:, 0] != ends[:, 1]], axis=1), axis=0).astype(np.int32)
    unknown = np.full(len(ends), np.nan, np.float32)
    directed, support = np.ones(len(ends), np.bool_), np.ones(len(ends), np.int64)
    source, target = ends.T
    return cohort, CausalGraph(nodes, source, target, directed, unknown, support, unknown)


def times(seed: int) -> list[tuple[str, str, float]]:
    """CPU seconds of each estimator, and how far raw effects are from counted proportions."""
    cohort, graph = invented(seed)
    rows = []
    for estimator in ESTIMATORS:
        taken, table = [], None
        for _ in range(3):
            begin = time.process_time()
            table = effects.estimate(cohort, graph, EffectsConfig(estimator))
            taken.append(time.process_time() - begin)
        assert table is not None
        case = f"{sum(SIZES[:2]) * SIZES[2]} pairs {estimator}"
        rows += [
            (case, "cpu_s", min(taken)),
            (case, "pairs", float(of_codes(table).supported.sum())),
        ]
    return [*rows, (f"{SIZES[0] * SIZES[2]} pairs raw", "furthest_off", furthest_off(cohort))]


def furthest_off(cohort: Cohort) -> float:
    """Largest |raw effect - difference of proportions| of the diagnoses, by counting rows."""
    table = columns.of_cohort(cohort)
    visits = columns.training_visits(cohort)
    targets = columns.presence(cohort.targets, visits, cohort.sizes[2])
    codes = np.array(
        [table.names.index(f"diagnosis/{c}") for c in cohort.vocabularies["diagnosis"]]
    )
    nothing = [np.zeros(0, np.int64)] * len(codes)
    found, _ = regression.regress(table, codes, nothing, targets)
    given, has = targets.toarray().astype(bool), table.present[:, codes].toarray().astype(bool)
    furthest = 0.0
    for row, present in zip(found, has.T, strict=True):
        if 0 < present.sum() < len(present):
            expected = given[present].mean(axis=0) - given[~present].mean(axis=0)
            furthest = max(furthest, float(np.abs(row - expected).max()))
    return furthest


def found_graph(cohort: Cohort) -> CausalGraph:
    """The graph that the job finds by its defaults."""
    settings = CausalConfig(compare_direct=False)
    with cluster.connect("local", 1) as client:
        return discovery.discover(cohort, settings, client).graph


def truths(case: str, seed: int) -> list[tuple[str, str, float]]:
    """Errors and coverages of each estimator with the true and with the found graph."""
    cohort, known, of_previous = make_cohort(case, seed)
    rows = []
    for name, graph in (("true graph", known.graph), ("found graph", found_graph(cohort))):
        tables: dict[str, EffectTable] = {
            e: effects.estimate(cohort, graph, EffectsConfig(e)) for e in ESTIMATORS
        }
        pairs = of_codes(tables["doubly_robust"]).supported
        if name == "found graph":
            over_class = effects.estimate(cohort, graph, EffectsConfig("doubly_robust", "class"))
            tables["doubly_robust class"] = over_class
        for estimator, table in tables.items():
            figures = compared_with_previous(table.of_kinds("previous_medication"), of_previous)
            rows += [(f"{case} {name} {estimator}", *figure) for figure in figures.items()]
        tables = {estimator: of_codes(table) for estimator, table in tables.items()}
        for estimator, table in tables.items():
            # Over a class fewer pairs have support: the set that leaves the fewest visits decides.
            chosen = pairs & table.supported if estimator.endswith("class") else pairs
            figures = compared(table, chosen, matching(known.effects, table), known.graph)
            rows += [(f"{case} {name} {estimator}", *figure) for figure in figures.items()]
    return rows


def of_codes(table: EffectTable) -> EffectTable:
    """The effects of diagnoses and procedures, whose truth is known."""
    return table.of_kinds("diagnosis", "procedure")


def matching(known: EffectTable, table: EffectTable) -> NDArray[np.float64]:
    """The true effects of a table's pairs."""
    row = {name: i for i, name in enumerate(known.codes)}
    column = {name: i for i, name in enumerate(known.medications)}
    chosen = np.ix_([row[c] for c in table.codes], [column[m] for m in table.medications])
    return known.effect[chosen].astype(np.float64)


def compared_with_previous(table: EffectTable, known: EffectTable) -> dict[str, float]:
    """Figures of previous medications: on the same medication a visit later, and on others."""
    real, (low, high) = matching(known, table), table.interval()
    own = np.array([[c.endswith(f"_{m}") for m in table.medications] for c in table.codes])
    found = {}
    for suffix, chosen in (("_again", table.supported & own), ("_others", table.supported & ~own)):
        found[f"pairs{suffix}"] = float(chosen.sum())
        found[f"rmse{suffix}"] = float(np.sqrt(((table.effect - real)[chosen] ** 2).mean()))
        found[f"coverage{suffix}"] = float(((low <= real) & (real <= high))[chosen].mean())
    return found


def compared(
    table: EffectTable, supported: NDArray[np.bool_], real: NDArray[np.float64], graph: CausalGraph
) -> dict[str, float]:
    """Figures of one table against the truth."""
    low, high = table.interval()
    covered = (low <= real) & (real <= high)
    # Somewhere between the interval of the smallest and that of the largest effect of the class.
    margin = high - table.effect
    in_range = (table.minimum - margin <= real) & (real <= table.maximum + margin)
    square = (table.effect - real) ** 2
    by_codes = supported & confounded(graph, table.codes, table.medications)
    by_any = supported & confounded(graph, table.codes, table.medications, through_medications=True)
    large = supported & (np.abs(real) > 0.1)
    found = {"rmse_table": float(np.sqrt(square.mean()))}
    for suffix, chosen in (
        ("", supported),
        ("_confounded", by_codes),
        ("_confounded_any", by_any),
        ("_large", large),
    ):
        found[f"pairs{suffix}"] = float(chosen.sum())
        found[f"rmse{suffix}"] = float(np.sqrt(square[chosen].mean()))
        found[f"coverage{suffix}"] = float(covered[chosen].mean())
        if (table.minimum < table.maximum).any():
            found[f"coverage_of_range{suffix}"] = float(in_range[chosen].mean())
    return found


def main() -> None:
    """Measures, prints a table and writes the JSON rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the default population only")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--seed", type=int, default=0, help="of populations, split and visits")
    given = parser.parse_args()
    os.environ.setdefault("CAFEMED_HOME", str(paths.resolve_root(None)))
    versions = (
        f"Python {platform.python_version()}, numpy {np.__version__}, scipy {scipy.__version__}"
    )
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; {versions}")
    print(f"threads: OMP_NUM_THREADS={os.getenv('OMP_NUM_THREADS')}", flush=True)
    stamp = {"date": datetime.date.today().isoformat(), "versions": versions}
    rows: list[dict[str, Any]] = []
    for case in (None, *(CASES[:1] if given.quick else CASES)):
        for name, metric, value in times(given.seed) if case is None else truths(case, given.seed):
            unit = "s" if metric == "cpu_s" else "pairs" if metric.startswith("pairs") else "1"
            print(f"{name:<46}{metric:<26}{value:>12.5g} {unit}", flush=True)
            rows.append({"case": name, "metric": metric, "value": value, "unit": unit, **stamp})
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
