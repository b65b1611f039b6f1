"""Which search finds more in the same time: TPE with ASHA, or random search."""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import models
from benchmarks.sweeps import measured
from cafemed import tuning
from cafemed.conductor import Conductor
from cafemed.experiment import Experiment
from cafemed.ledger import Header, Ledger
from cafemed.trials import TrialData

#: search → its settings.
SEARCHES = {
    "tpe_asha": ("search.sampler=tpe_multivariate", "search.scheduler=asha"),
    "random": ("search.sampler=random", "search.scheduler=none"),
}
#: CafeMed's space without what makes a trial slow; ASHA's rungs are after 1, 3 and 9 epochs, and a
#: trial that is not stopped has 9.
_SPACE = (
    "search=cafemed",
    "search.space.model.dimension.choices=[16,32,64]",
    "search.space.train.batch_size.low=16",
    "search.grace_period=1",
    "search.reduction_factor=3",
    "train.epochs=9",
)
#: More than there is time for.
_TRIALS = 10_000


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        jaccard: the best validation Jaccard of any epoch of any trial.
        trials: begun and with at least an epoch.
    """

    jaccard: float
    trials: int


def search(name: str, given: Experiment, seconds: float, slots: int, seed: int) -> Found:
    """Searches for so long, from the start of the sweep; Ray is up before.

    Neither search begins with the configured values, which are good ones.

    Args:
        name: of SEARCHES.
        given: cohort and graph.
        seconds: after which no trial goes on; the trials cut off then count with what they have.
        slots: trials at the same time.
        seed: of the search; the first trials that TPE draws, at random, are those of random search.
    """
    limits: tuple[Any, ...] = (
        f"search.num_samples={_TRIALS}",
        f"search.max_hours={seconds / 3600}",
        f"search.max_concurrent={slots}",
        f"search.seed={seed}",
    )
    plan = dataclasses.replace(measured.plan_of(*_SPACE, *SEARCHES[name], *limits), starts=())
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "trials")
        ledger.open(Header("", {}, plan.settings(), {}))
        conductor = Conductor(plan, ledger)
        tuning.run(conductor, TrialData.of(plan, given, models.build))
        usable = conductor.result().usable
    return Found(max(trial.best_so_far[-1] for trial in usable), len(usable))
