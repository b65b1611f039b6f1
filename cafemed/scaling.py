"""Ages and laboratory values as numbers of about size one: z = (x - mean) / sd, cut to ±LIMIT.

Means and standard deviations are those of training patients alone. They travel with the model
(`preprocessing.json` of a bundle), so that a request is scaled as the training visits were.
"""

import dataclasses
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from cafemed import suppression
from cafemed.cohort import Cohort
from cafemed.config import Range
from cafemed.errors import ConfigError

#: Scaled values are cut to [-LIMIT, LIMIT]: a typing error must not outweigh everything else.
LIMIT = 10.0

#: Laboratory values beyond these percentiles are cut to them before mean and standard deviation
#: are taken: hospitals' tables hold 999999 and the like.
_PERCENTILES = (1.0, 99.0)

Sd = Annotated[float, Range(0, open_low=True)]


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Mean and standard deviation of ages and of each laboratory item.

    Attributes:
        age_mean, age_sd: in years; (0, 1) where too few ages are known (`fit`).
        laboratory_mean, laboratory_sd: one an item, in the item's unit; sd 1 where it is unknown or
            all values are equal.
    """

    age_mean: float = 0.0
    age_sd: Sd = 1.0
    laboratory_mean: tuple[float, ...] = ()
    laboratory_sd: tuple[Sd, ...] = ()

    def __post_init__(self) -> None:
        """Checks what needs two fields at once."""
        if len(self.laboratory_mean) != len(self.laboratory_sd):
            raise ConfigError(
                f"laboratory_sd: expected {len(self.laboratory_mean)} numbers, one an item, got "
                f"{len(self.laboratory_sd)}"
            )
        numbers = (self.age_mean, self.age_sd, *self.laboratory_mean, *self.laboratory_sd)
        if not np.isfinite(numbers).all():
            raise ConfigError("expected finite numbers, got NaN or infinity")

    @property
    def num_items(self) -> int:
        """Laboratory items."""
        return len(self.laboratory_mean)

    def ages(self, years: NDArray[np.floating]) -> NDArray[np.float32]:
        """Scales ages; NaN, which is unknown, stays. float32, the shape of `years`."""
        return _cut((np.asarray(years, np.float64) - self.age_mean) / self.age_sd)

    def values(
        self, items: NDArray[np.integer], values: NDArray[np.floating]
    ) -> NDArray[np.float32]:
        """Scales laboratory values.

        Args:
            items: int (n,), index of each value's item.
            values: float (n,), in the items' units.

        Returns:
            float32 (n,).
        """
        mean, sd = np.array(self.laboratory_mean), np.array(self.laboratory_sd)
        return _cut((np.asarray(values, np.float64) - mean[items]) / sd[items])


def fit(cohort: Cohort) -> Scaling:
    """Takes means and standard deviations over the visits of the training patients.

    Ages of fewer than `suppression.FEWEST` patients are left unscaled, mean 0 and sd 1: their mean,
    which leaves the hospital with the model, would tell of these few. (Laboratory items of so few
    are not in a cohort at all.)
    """
    in_training = np.zeros(cohort.num_visits, np.bool_)
    in_training[cohort.visits_of(cohort.patients_of("train"))] = True
    has_age = in_training & np.isfinite(cohort.age)
    enough = len(np.unique(cohort.patient_of_visit()[has_age])) >= suppression.FEWEST
    age_mean, age_sd = _moments(cohort.age[has_age & enough])
    measured = np.repeat(in_training, cohort.laboratory.items.counts)
    items, values = cohort.laboratory.items.ids[measured], cohort.laboratory.values[measured]
    order = np.argsort(items, kind="stable")
    num_items = len(cohort.vocabularies["laboratory"])
    ends = np.searchsorted(items[order], np.arange(1, num_items + 1))
    of_items = [_moments(_trimmed(x)) for x in np.split(values[order], ends)[:num_items]]
    return Scaling(
        age_mean, age_sd, tuple(mean for mean, _ in of_items), tuple(sd for _, sd in of_items)
    )


def _cut(scaled: NDArray[np.float64]) -> NDArray[np.float32]:
    # What np.clip does, which takes twice the time for the few values of a run.
    return np.minimum(np.maximum(scaled, -LIMIT), LIMIT).astype(np.float32)


def _trimmed(values: NDArray[np.float32]) -> NDArray[np.float64]:
    exact = values.astype(np.float64)
    return np.clip(exact, *np.percentile(exact, _PERCENTILES)) if len(exact) else exact


def _moments(values: NDArray[np.floating]) -> tuple[float, float]:
    """Mean and standard deviation; (0, 1) of nothing, and (mean, 1) where all are equal."""
    if not len(values):
        return 0.0, 1.0
    exact = values.astype(np.float64)
    sd = float(exact.std()) if exact.min() < exact.max() else 1.0
    return float(exact.mean()), sd
