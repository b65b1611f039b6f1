"""Laboratory events of a synthetic population: items that its diagnoses move.

Drawn after everything else, from random numbers of their own: codes, medications and truth are the
same with them and without, and given its codes a visit's medications do not depend on them.
"""

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy import sparse

from cafemed.synthetic.generator import LABORATORY_STREAM, Population, stream
from cafemed.synthetic.stays import Stays

Floats = NDArray[np.float64]

_FIRST_ITEM = 50_801
_MEDIAN_LOW, _MEDIAN_HIGH = 1.0, 200.0
_SPREAD_LOW, _SPREAD_HIGH = 0.05, 0.3
#: Share of the visits at which an item is measured.
_MEASURED_LOW, _MEASURED_HIGH = 0.3, 0.95
#: Share of the diagnoses that move an item, and by how many spreads, up or down.
_MOVING_SHARE, _SHIFT_LOW, _SHIFT_HIGH = 0.5, 0.5, 2.0
#: What is left of a shift at each further measurement of a stay: patients are treated.
_RECOVERY = 0.7
#: Rows for the filters to drop.
_EMPTY_SHARE, _OUTPATIENT_SHARE, _EARLY_SHARE = 0.03, 0.04, 0.02


def events(population: Population, stays: Stays) -> pa.Table:
    """Draws LABEVENTS: the columns of MIMIC-III that the adapter reads, by patient and time.

    Each item has a median and a spread, each moving diagnosis one item and a shift. A value is
    median · exp(spread · (z + r^k · shifts of the visit's diagnoses)), z standard normal, r the
    recovery, k the number of earlier measurements in the stay; an item that is measured is measured
    1 + Poisson(1) times, at random minutes of the stay.
    """
    rng = stream(population.seed, LABORATORY_STREAM)
    num_items, num_visits = population.config.num_laboratory, population.num_visits
    medians = np.exp(rng.uniform(np.log(_MEDIAN_LOW), np.log(_MEDIAN_HIGH), num_items))
    spreads = rng.uniform(_SPREAD_LOW, _SPREAD_HIGH, num_items)
    often = rng.uniform(_MEASURED_LOW, _MEASURED_HIGH, num_items)
    shifts = _shifts_of_visits(population, rng)

    visit, item = np.nonzero(rng.random((num_visits, num_items)) < often)
    repeats = 1 + rng.poisson(1.0, len(visit))
    visit, item = np.repeat(visit, repeats), np.repeat(item, repeats)
    length = (stays.discharged - stays.admitted).astype(np.int64)[visit] // 60
    minute = (rng.random(len(visit)) * length).astype(np.int64)
    order = np.lexsort((minute, item, visit))  # visits and items are in order already
    minute = minute[order]
    earlier = np.arange(len(visit)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    moved = shifts[visit, item] * _RECOVERY**earlier
    value = medians[item] * np.exp(spreads[item] * (rng.normal(size=len(visit)) + moved))
    early = rng.random(len(visit)) < _EARLY_SHARE
    minute[early] = -1 - rng.integers(0, 120, int(early.sum()))
    return _table(stays, visit, item, minute, value, rng)


def _shifts_of_visits(population: Population, rng: np.random.Generator) -> Floats:
    """By how many spreads each item is moved at each visit, float64 (V, items)."""
    num_diagnoses, lists = len(population.model.diagnoses), population.diagnoses
    moves = rng.random(num_diagnoses) < _MOVING_SHARE
    item = rng.integers(0, population.config.num_laboratory, num_diagnoses)
    shift = rng.uniform(_SHIFT_LOW, _SHIFT_HIGH, num_diagnoses) * rng.choice(
        [-1.0, 1.0], num_diagnoses
    )
    of_diagnosis = np.zeros((num_diagnoses, population.config.num_laboratory))
    of_diagnosis[np.flatnonzero(moves), item[moves]] = shift[moves]
    present = sparse.csr_array(
        (np.ones(len(lists.ids)), lists.ids, lists.offsets), shape=(len(lists), num_diagnoses)
    )
    result: Floats = present @ of_diagnosis
    return result


def _table(
    stays: Stays,
    visit: NDArray[np.int64],
    item: NDArray[np.int64],
    minute: NDArray[np.int64],
    value: Floats,
    rng: np.random.Generator,
) -> pa.Table:
    outpatient = rng.random(len(visit)) < _OUTPATIENT_SHARE
    empty = rng.random(len(visit)) < _EMPTY_SHARE
    time = stays.admitted[visit] + (60 * minute).astype("timedelta64[s]")
    rows = np.lexsort((item, time, stays.patient[visit]))
    return pa.table(
        {
            "ROW_ID": np.arange(1, len(rows) + 1),
            "SUBJECT_ID": stays.subject_id[stays.patient[visit[rows]]],
            "HADM_ID": pa.array(stays.hadm_id[visit[rows]], mask=outpatient[rows]),
            "ITEMID": item[rows] + _FIRST_ITEM,
            "CHARTTIME": pa.array(time[rows]),
            "VALUENUM": pa.array(np.round(value[rows], 3), mask=empty[rows]),
        }
    )
