"""Identifiers and times of synthetic patients and their stays."""

import numpy as np
from numpy.typing import NDArray

from cafemed.synthetic.generator import Population

Times = NDArray[np.datetime64]

#: Days of a stay: 1 + geometric with this chance of ending each day.
DAILY_DISCHARGE = 0.14
DAY = np.timedelta64(1, "D")
_MEAN_DAYS_BETWEEN_VISITS = 250
_ICU_SHARE = 0.7


class Stays:
    """Identifiers and times of patients and visits, drawn independently of all codes.

    Attributes:
        first: int64 (P,), each patient's first visit.
        patient: int64 (V,), each visit's patient.
        subject_id: int64 (P,). hadm_id: int64 (V,). icustay_id: int64 (V,), -1 without ICU stay.
        days: int64 (V,), length of the stay, at least 1.
        day: datetime64[D] (V,), of admission.
        admitted, discharged: datetime64[s] (V,).
    """

    def __init__(self, population: Population, rng: np.random.Generator) -> None:
        counts = np.diff(population.patient_offsets)
        num_patients, num_visits = len(counts), population.num_visits
        self.first = population.patient_offsets[:-1]
        self.patient = np.repeat(np.arange(num_patients), counts)
        self.subject_id = np.arange(num_patients) + 10_001
        # As in MIMIC, the identifiers of admissions say nothing about their order in time.
        self.hadm_id = rng.permutation(num_visits) + 100_001
        has_icu = rng.random(num_visits) < _ICU_SHARE
        self.icustay_id = np.where(has_icu, self.hadm_id + num_visits + 100_000, -1)
        self.days = rng.geometric(DAILY_DISCHARGE, num_visits)
        gaps = rng.geometric(1 / _MEAN_DAYS_BETWEEN_VISITS, num_visits) + self.days + 1
        gaps[self.first] = 0
        since = np.cumsum(gaps)
        since -= np.repeat(since[self.first], counts)
        start = np.datetime64("2100-01-01", "D") + rng.integers(0, 80 * 365, num_patients) * DAY
        self.day: Times = start[self.patient] + since * DAY
        minutes = rng.integers(0, 24 * 60, num_visits).astype("timedelta64[m]")
        self.admitted: Times = (self.day + minutes).astype("datetime64[s]")
        self.discharged: Times = (self.day + self.days * DAY).astype("datetime64[s]")
        self.discharged += np.timedelta64(24 * 3600 - 60, "s")
