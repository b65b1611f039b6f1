"""One fit by several workers (DDP) and the same fit by one process."""

import dataclasses
import statistics

import ray

from cafemed import distributed, training
from cafemed.placement import Workers
from cafemed.training import FitResult
from cafemed.trials import TrialData


@dataclasses.dataclass(frozen=True)
class Pair:
    """Median seconds of an epoch after the first, training and validation.

    Attributes:
        alone_s: of `training.fit` in this process, one thread.
        together_s: of the workers, one thread each, that share every batch.
    """

    alone_s: float
    together_s: float


def compare(data: TrialData, workers: int, rounds: int) -> Pair:
    """Trains the configured model alone and by workers in turn; Ray is up.

    Args:
        data: see TrialData; `data.config` says how many epochs, at least 2.
        workers: at least 2.
        rounds: of both.

    Raises:
        SystemExit: if the losses of the first epoch are not the same, dropout apart.
    """
    options = {**data.models[data.model_name], "dropout": 0.0}
    shared, alone, together = ray.put(data), list[FitResult](), list[FitResult]()
    for _ in range(rounds):
        alone.append(
            training.fit(
                data.build,
                data.model_name,
                options,
                data.inputs,
                data.arrays,
                data.train_patients,
                data.validation_patients,
                data.config,
            )
        )
        together.append(
            distributed.fit(
                shared, data.model_name, options, data.config, Workers(workers, 1.0, 0.0)
            )
        )
    first, second = (fits[0].history[0].losses["loss"] for fits in (alone, together))
    if abs(first - second) > 1e-5:
        raise SystemExit(f"{workers} workers trained another model: loss {second}, not {first}")
    return Pair(_epoch_s(alone), _epoch_s(together))


def _epoch_s(fits: list[FitResult]) -> float:
    return statistics.median(epoch.seconds for fit in fits for epoch in fit.history[1:])
