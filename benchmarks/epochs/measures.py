"""What a case of benchmarks/training.py measures, in a process of its own."""

import dataclasses
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

import models
from benchmarks.epochs import data
from cafemed import evaluation, losses, randomness
from cafemed.batches import VisitArrays, collate
from cafemed.stepping import Stepper
from cafemed.training import FitConfig

Options = tuple[tuple[str, Any], ...]

#: Rows and columns of the products whose rate is the machine's.
PRODUCT = 1024
_CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Case:
    """One model on one shape.

    Attributes:
        model: name.
        shape: name.
        batch: patients a step; 0: one visit a step, with the visits before it.
        threads: torch's.
        options: of the model.
        precision: of the steps.
    """

    model: str
    shape: str
    batch: int
    threads: int = 1
    options: Options = ()
    precision: str = "float32"

    @property
    def name(self) -> str:
        """As in the table and the JSON rows."""
        form = f"batch={self.batch}" if self.batch else "one-visit"
        extra = "".join(f" {key}={value}" for key, value in self.options)
        extra += "" if self.precision == "float32" else f" {self.precision}"
        return f"{self.model}{extra} {self.shape} {form} threads={self.threads}"


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long a case may measure.

    Attributes:
        passes: training passes, of which the fastest counts.
        limit_s: CPU seconds of a pass; if a whole epoch would take longer, a drawn share of the
            training patients is taken and scaled up by visits.
        one_visits: steps of the one-visit form.
        predictions: passes over the test split, of which the fastest counts.
    """

    passes: int = 3
    limit_s: float = 40.0
    one_visits: int = 200
    predictions: int = 5


def measure(case: Case, folder: Path, seed: int, effort: Effort) -> dict[str, float]:
    """Runs a case on the arrays in a folder; gives its metrics."""
    shape, arrays = data.SHAPES[case.shape], data.load(folder)
    config = FitConfig(
        batch_size=max(case.batch, 1),
        num_threads=case.threads,
        seed=seed,
        precision=case.precision,  # type: ignore[arg-type]
    )
    inputs = data.inputs(shape, seed)
    with randomness.reproducible(seed, case.threads, _CPU):
        model = models.build(case.model, inputs, dict(case.options), seed)
        stepper = Stepper(model, inputs.ddi, config, _CPU)
        if case.batch == 0:
            found = _one_visit(stepper, arrays, shape, effort)
        else:
            found = _epochs(stepper, arrays, shape.train, effort)
            found |= _inference(model, arrays, shape.test, effort)
        found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if case.batch:
            found["gflop"] = gigaflops(case, stepper, arrays, shape.train)
            found["gflop_s_1024"] = product_rate()
            found["matmul_share"] = found["gflop"] / found["epoch_cpu_s"] / found["gflop_s_1024"]
    return found


def _epochs(
    stepper: Stepper, arrays: VisitArrays, patients: NDArray[np.int64], effort: Effort
) -> dict[str, float]:
    """Training passes as `training.fit` makes them, without validation."""
    rng = np.random.default_rng(stepper.config.seed)
    first = rng.permutation(patients)[: 12 * stepper.config.batch_size]
    visits = num_visits(arrays, patients)
    _, cpu_s = timed(lambda: stepper.epoch(arrays, first, 1))  # the first steps are slower
    _, cpu_s = timed(lambda: stepper.epoch(arrays, first, 2))
    whole_s = cpu_s * visits / num_visits(arrays, first)
    share = min(1.0, effort.limit_s / whole_s)
    times = []
    for number in range(3, 3 + effort.passes):
        taken = rng.permutation(patients)[: max(int(share * len(patients)), 1)]
        scale = visits / num_visits(arrays, taken)
        found = timed(lambda n=number, who=taken: stepper.epoch(arrays, who, n))  # type: ignore[misc]
        times.append([scale * seconds for seconds in found])
    wall_s, cpu_s = (min(column) for column in zip(*times, strict=True))
    return {
        "epoch_s": wall_s,
        "epoch_cpu_s": cpu_s,
        "epoch_cpu_s_slowest": max(cpu for _, cpu in times),
        "ms_a_visit": 1e3 * cpu_s / visits,
        "share_of_epoch": share,
    }


def _one_visit(
    stepper: Stepper, arrays: VisitArrays, shape: data.Shape, effort: Effort
) -> dict[str, float]:
    """A step a visit with the visits before it, as the published loop does, and its prediction."""
    (_, last), (_, test_visits), _ = shape.splits  # training patients come first
    rng = np.random.default_rng(stepper.config.seed)
    number = min(effort.one_visits, last)
    chosen = data.prefixes(arrays, np.sort(rng.choice(last, number, replace=False)))
    model = stepper.model

    def train(first: int, end: int) -> None:
        model.train()
        for patient in range(first, end):
            batch = collate(chosen, np.array([patient]))
            logits = batch.flatten(model(batch))[-1:]
            loss = losses.visit_losses(logits, batch.targets[-1:], stepper.ddi).loss.mean()
            stepper.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            stepper.optimizer.step()

    def predict() -> None:
        model.eval()
        with torch.inference_mode():
            for patient in range(number):
                model(collate(chosen, np.array([patient])))

    train(0, min(10, number))
    wall_s, cpu_s = timed(lambda: train(0, number))
    inference_s, inference_cpu_s = timed(predict)
    test_share = number / test_visits
    return {
        "epoch_s": wall_s * last / number,
        "epoch_cpu_s": cpu_s * last / number,
        "inference_s": inference_s / test_share,
        "inference_cpu_s": inference_cpu_s / test_share,
        "ms_a_visit": 1e3 * cpu_s / number,
        "share_of_epoch": number / last,
    }


def _inference(
    model: torch.nn.Module, arrays: VisitArrays, patients: NDArray[np.int64], effort: Effort
) -> dict[str, float]:
    """Probabilities of all visits of the test split, from the arrays on."""
    found = [
        timed(lambda: evaluation.predict(model, arrays, patients))
        for _ in range(effort.predictions)
    ]
    wall_s, cpu_s = (min(column) for column in zip(*found, strict=True))
    return {"inference_s": wall_s, "inference_cpu_s": cpu_s}


def gigaflops(
    case: Case, stepper: Stepper, arrays: VisitArrays, patients: NDArray[np.int64]
) -> float:
    """Operations of the matrix products of an epoch, forward and backward, in 1e9.

    CafeMed's from its shapes, over positions and visits that exist. Other models' as torch counts
    them in a few batches, with what the model pads.
    """
    visits = np.concatenate([np.arange(*arrays.patient_offsets[p : p + 2]) for p in patients])
    if (case.model == "cafemed" and not case.options) or case.options == (("direct", "none"),):
        positions = int(np.maximum(arrays.counts[visits].max(1), 1).sum())
        codes = distinct_codes(arrays, patients, case.batch)
        return cafemed_flop(len(visits), positions, codes, arrays.sizes[2]) / 1e9
    some = patients[: 8 * stepper.config.batch_size]
    with FlopCounterMode(display=False) as counter:
        stepper.epoch(arrays, some, 0)
    total: int = counter.get_total_flops()
    return total * len(visits) / num_visits(arrays, some) / 1e9


def cafemed_flop(visits: int, positions: int, codes: int, medications: int, d: int = 64) -> float:
    """The products of CafeMed with its default sizes, forward and backward.

    Args:
        visits: V.
        positions: of CHARM's maps, sum of max(1, n_0, n_1, n_2).
        codes: of `distinct_codes`, for the causal weight generator.
        medications: N_m.
        d: dimension.
    """
    c, hidden = 3 * d, d // 2
    attention = 2 * c * (c // 4)
    convolutions = 2 * 7 * c * (c // 4)
    generator = hidden + hidden * d
    grus = 3 * 2 * (d * 3 * d)
    head = 6 * d * medications
    gate = c
    interactions = 2 * medications**2  # two products with the matrix of pairs, one of them twice
    forward = positions * (attention + convolutions) + codes * generator
    forward += visits * (grus + head + gate)
    return 2 * (3 * forward + visits * (interactions + medications**2))


def distinct_codes(arrays: VisitArrays, patients: NDArray[np.int64], batch: int) -> int:
    """Codes of each batch, each counted once, added up over batches of patients as they stand."""
    found = 0
    first = np.cumsum([0, *arrays.sizes[:2]])[:, None]
    for i in range(0, len(patients), batch):
        last = patients[min(i + batch, len(patients)) - 1]
        visits = slice(*arrays.patient_offsets[[patients[i], last + 1]])
        exists = np.arange(arrays.codes.shape[2]) < arrays.counts[visits][:, :, None]
        found += len(np.unique((arrays.codes[visits] + first)[exists]))
    return found


def product_rate() -> float:
    """Torch's rate in float32 products on one thread, 1e9 operations a CPU second, the median."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    a, b = torch.randn(2, PRODUCT, PRODUCT)
    torch.mm(a, b)
    seconds = [timed(lambda: torch.mm(a, b))[1] for _ in range(15)]
    torch.set_num_threads(threads)
    return 2 * PRODUCT**3 / statistics.median(seconds) / 1e9


def num_visits(arrays: VisitArrays, patients: NDArray[np.int64]) -> int:
    """Visits of these patients."""
    return int(np.diff(arrays.patient_offsets)[patients].sum())


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of a call, all threads of the process."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def shown(values: Mapping[str, float]) -> str:
    """A line of the table."""
    cells = [f"{values.get(key, float('nan')):{width}}" for key, width in COLUMNS.items()]
    return " ".join(cells).replace("nan", "  -")


#: Metric → width and digits in the table.
COLUMNS = {
    "epoch_s": "9.2f",
    "epoch_cpu_s": "11.2f",
    "ms_a_visit": "10.3f",
    "peak_mb": "8.0f",
    "inference_s": "11.3f",
    "inference_cpu_s": "15.3f",
    "matmul_share": "12.3f",
}
