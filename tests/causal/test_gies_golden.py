"""pcalg's and the gies package's answers (a folder beside the project; see its README)."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from cafemed import paths
from causal import essential, fit_gies

FOLDER = Path(
    os.environ.get("CAFEMED_GOLDEN", paths.PROJECT_DIR.parent / "shared" / "golden" / "gies")
)
CASES = sorted(f.parent.name for f in FOLDER.glob("*/case.json"))
pytestmark = pytest.mark.skipif(
    not CASES, reason=f"no golden cases in {FOLDER}; CAFEMED_GOLDEN names the folder"
)
#: A column that says nothing, in these cases.
CONSTANT = {"deg_constant": "constant", "deg_zero": "constant"}


class Case:
    def __init__(self, name: str) -> None:
        self.folder = FOLDER / name
        described = json.loads((self.folder / "case.json").read_text())
        self.rows = self.table("X.csv")
        interventional = (self.folder / "env.csv").exists()
        self.environments = self.table("env.csv")[:, 0].astype(int) if interventional else None
        self.targets = described["targets"]

    def table(self, name: str) -> np.ndarray:
        return np.loadtxt(self.folder / name, delimiter=",", ndmin=2)

    def score(self) -> float:
        return json.loads((self.folder / "pcalg_score.json").read_text())["score"]

    def fit(self, **options):
        return fit_gies(self.rows, environments=self.environments, targets=self.targets, **options)

    def kinds(self):
        return essential.node_kinds(self.rows.shape[1], self.targets)


ORDINARY = [c for c in CASES if not c.startswith("deg_") or c in ("deg_tiny", "deg_offset")]


def test_there_are_35_cases():
    assert len(CASES) == 35


@pytest.mark.parametrize("name", ORDINARY)
def test_textbook_gives_pcalgs_graph_and_score(name):
    case = Case(name)
    found = case.fit(search="textbook")
    assert (found.adjacency == case.table("pcalg_adj.csv")).all()
    # pcalg works on uncentred moments: an offset of 1e6 costs it digits.
    tolerance = 0.5 if name == "deg_offset" else 1e-6
    assert found.score == pytest.approx(case.score(), abs=tolerance)


@pytest.mark.parametrize("name", ORDINARY)
def test_best_is_at_least_as_good_as_pcalg(name):
    case = Case(name)
    found = case.fit(search="best")
    tolerance = 0.5 if name == "deg_offset" else 1e-6
    assert found.score >= case.score() - tolerance
    assert essential.is_essential(found.adjacency, case.kinds())


@pytest.mark.parametrize("name", [c for c in CASES if c.startswith("int_")])
def test_means_per_environment_give_the_gies_packages_graph(name):
    case = Case(name)
    found = case.fit(search="textbook", intercept="per_environment")
    assert (found.adjacency == case.table("pcalg_envcentred_adj.csv")).all()
    recorded = json.loads((case.folder / "pcalg_envcentred_score.json").read_text())["score"]
    assert found.score == pytest.approx(recorded, abs=1e-5)


@pytest.mark.parametrize("search", ["textbook", "fast", "best"])
@pytest.mark.parametrize("name", [c for c in CASES if c.startswith("deg_")])
def test_degenerate_columns_end_in_a_valid_graph(name, search):
    case = Case(name)
    found = case.fit(search=search)
    assert essential.is_essential(found.adjacency)
    constant = np.flatnonzero(case.rows.std(axis=0) == 0)
    assert set(constant) <= set(found.dropped)
    for j in found.dropped:
        assert not found.adjacency[j].any()
        assert not found.adjacency[:, j].any()
    assert np.isfinite(found.score)
    if name in CONSTANT:
        assert CONSTANT[name] in found.dropped.values()
