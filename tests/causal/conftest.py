"""Small random cohorts for the tests of discovery and effects."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from distributed import Client, LocalCluster

from cafemed.codes import CodeLists
from cafemed.cohort import Cohort


def random_cohort(
    num_patients: int = 120,
    sizes: tuple[int, int, int] = (9, 6, 5),
    seed: int = 0,
    inputs: str = "current",
) -> Cohort:
    """Visits whose codes depend on each other: d0 → d1 → p0, d2 → p1, and drugs on codes."""
    rng = np.random.default_rng(seed)
    visits_of = rng.integers(1, 5, num_patients)
    offsets = np.concatenate([[0], np.cumsum(visits_of)]).astype(np.int64)
    num_visits = int(offsets[-1])
    first = np.zeros(num_visits, bool)
    first[offsets[:-1]] = True
    d, p, m = (rng.random((num_visits, size)) < 0.15 for size in sizes)
    d[:, 0] = rng.random(num_visits) < 0.4
    d[:, 1] |= d[:, 0] & (rng.random(num_visits) < 0.7)
    p[:, 0] |= d[:, 1] & (rng.random(num_visits) < 0.7)
    p[:, 1] |= d[:, 2] & (rng.random(num_visits) < 0.7)
    m[:, 0] |= d[:, 0] & (rng.random(num_visits) < 0.6)
    m[:, 1] |= p[:, 0] & (rng.random(num_visits) < 0.6)
    for t in range(1, num_visits):
        if not first[t]:
            d[t, 2] |= m[t - 1, 2] and rng.random() < 0.6
            m[t, 3] |= m[t - 1, 3] and rng.random() < 0.8
    lists = [CodeLists.of([np.flatnonzero(row).tolist() for row in x]) for x in (d, p, m)]
    targets = CodeLists.of([np.flatnonzero(row)[:3].tolist() for row in m])
    return Cohort(
        patient_offsets=offsets,
        patient_ids=tuple(f"p{i}" for i in range(num_patients)),
        visit_ids=tuple(f"v{i}" for i in range(num_visits)),
        admitted=np.zeros(num_visits, "datetime64[s]"),
        diagnoses=lists[0],
        procedures=lists[1],
        medications=lists[2],
        targets=targets,
        vocabularies={
            "diagnosis": tuple(f"icd9:{900 - i}" for i in range(sizes[0])),
            "procedure": tuple(f"icd9:P{i}" for i in range(sizes[1])),
            "medication": tuple(f"atc:M{i}" for i in range(sizes[2])),
        },
        ddi=np.zeros((sizes[2], sizes[2]), np.bool_),
        split=rng.choice([0, 0, 0, 1, 2], num_patients).astype(np.int8),
        sex=np.zeros(num_patients, np.int8),
        age=np.full(num_visits, 50, np.float32),
        inputs="history" if inputs == "history" else "current",
    )


@pytest.fixture(scope="module")
def in_process() -> Iterator[Client]:
    """Dask without processes: the same code path, started at once."""
    with (
        LocalCluster(
            n_workers=1, processes=False, dashboard_address=":0", worker_dashboard_address=None
        ) as local,
        Client(local) as client,
    ):
        yield client


@pytest.fixture
def make_cohort() -> Callable[..., Cohort]:
    return random_cohort
