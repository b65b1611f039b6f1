"""Data sets with a planted graph: what the discovery engines are compared on."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

ROWS = 10_000
DEGREE = 2.5
INTERVENTIONS = 10


class Planted(NamedTuple):
    """Rows and the graph that they were drawn from.

    Attributes:
        rows: (n, p), float64, or int8 where they are 0 or 1.
        dag: bool (p, p), [i, j] is i → j.
        environments: int64 (n,), the environment of each row.
        targets: bool (E, p), the columns on which each environment intervened.
    """

    rows: NDArray[Any]
    dag: NDArray[np.bool_]
    environments: NDArray[np.int64]
    targets: NDArray[np.bool_]

    def save(self, path: Path) -> None:
        """Writes an npz that `load` and the processes of other packages read."""
        np.savez(path, **self._asdict())

    @classmethod
    def load(cls, path: Path) -> "Planted":
        """Reads what `save` wrote."""
        with np.load(path) as stored:
            return cls(**{name: stored[name] for name in cls._fields})

    def target_lists(self) -> list[list[int]]:
        """One list of columns per environment."""
        return [np.flatnonzero(hit).tolist() for hit in self.targets]


def draw(kind: str, p: int, seed: int) -> Planted:
    """One data set of p columns.

    Args:
        kind: "gauss", linear Gaussian; "int", the same with one target in each of 10 environments;
            "binary", noisy-or; "independent", 0/1 columns of the same prevalences without a graph.
        p: number of columns.
        seed: with p decides every draw.
    """
    rng = np.random.default_rng([seed, p])
    if kind == "int":
        targets = np.zeros((INTERVENTIONS, p), np.bool_)
        targets[np.arange(INTERVENTIONS), rng.choice(p, INTERVENTIONS, replace=False)] = True
        return _gaussian(p, targets, rng)
    observed = np.zeros((1, p), np.bool_)
    if kind == "gauss":
        return _gaussian(p, observed, rng)
    if kind == "binary":
        rows, dag = _noisy_or(p, rng)
    else:
        rows = (rng.random((ROWS, p)) < _prevalence(p)).astype(np.int8)
        dag = np.zeros((p, p), np.bool_)
    return Planted(rows, dag, np.zeros(ROWS, np.int64), observed)


def _planted_dag(p: int, rng: np.random.Generator) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """A random DAG of mean degree 2.5, bool (p, p), and one of its orders."""
    order = rng.permutation(p)
    dag = np.zeros((p, p), np.bool_)
    dag[np.ix_(order, order)] = np.triu(rng.random((p, p)) < DEGREE / (p - 1), 1)
    return dag, order


def _gaussian(p: int, targets: NDArray[np.bool_], rng: np.random.Generator) -> Planted:
    """Linear Gaussian rows, N(2, 1) where a node is a target."""
    dag, order = _planted_dag(p, rng)
    weights = dag * rng.uniform(0.5, 1.5, (p, p)) * rng.choice([-1, 1], (p, p))
    environments = np.repeat(np.arange(len(targets)), ROWS // len(targets))
    rows = rng.normal(size=(ROWS, p)) * rng.uniform(0.5, 1.5, p)
    for j in order:
        rows[:, j] += rows[:, dag[:, j]] @ weights[dag[:, j], j]
        for e in np.flatnonzero(targets[:, j]):
            rows[environments == e, j] = rng.normal(2, 1, (environments == e).sum())
    return Planted(rows, dag, environments, targets)


def _noisy_or(p: int, rng: np.random.Generator) -> tuple[NDArray[np.int8], NDArray[np.bool_]]:
    """0/1 rows of a noisy-or DAG; the DAG."""
    dag, order = _planted_dag(p, rng)
    leak = rng.permutation(_prevalence(p))
    rows = np.zeros((ROWS, p), np.int8)
    for j in order:
        off = np.full(ROWS, 1 - leak[j])
        for i in np.flatnonzero(dag[:, j]):
            off *= 1 - rng.uniform(0.2, 0.6) * rows[:, i]
        rows[:, j] = rng.random(ROWS) > off
    return rows, dag


def _prevalence(p: int) -> NDArray[np.float64]:
    """Between 40 % and 0.2 %, falling as Zipf's law."""
    return np.maximum(0.4 / np.arange(1, p + 1), 0.002)
