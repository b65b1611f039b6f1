"""Training of one model: what every trial, single run and distributed run shares."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cafemed import checkpoints, evaluation, metrics, process_group, randomness
from cafemed.batches import ModelInputs, VisitArrays
from cafemed.checkpoints import Checkpoint, OtherRunError
from cafemed.config import Range
from cafemed.errors import ConfigError, DataError, TrainingError
from cafemed.evaluation import EvaluationSet
from cafemed.losses import Objective
from cafemed.metrics import Metrics
from cafemed.process_group import Group
from cafemed.randomness import RandomStates
from cafemed.stepping import Stepper

#: Builds a model from its name, inputs, options and seed; jobs pass `models.build`.
Builder = Callable[[str, ModelInputs, Mapping[str, Any], int], nn.Module]


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """How a model is trained (group `train`).

    Attributes:
        epochs: at most so many passes over the training patients.
        patience: stop after so many epochs without a better validation Jaccard.
        batch_size: patients a step.
        learning_rate: of Adam. (The published 5e-4 is for a step a visit, 75 times as many steps;
            at 32 patients a step it has hardly begun to learn when the epochs end.)
        weight_decay: L2 penalty added to Adam's gradient.
        seed: of the initial weights, the order of the patients and dropout.
        objective: accuracy and interactions mixed by the rate of interactions, or the interactions
            added to the accuracy terms (`losses.py`).
        ddi_target: DDI rate above which a visit is trained towards fewer interactions.
        ddi_coefficient: how fast the accuracy terms lose weight above it.
        ddi_weight: factor of the DDI term.
        margin_weight: share of the multilabel margin in the accuracy terms.
        threshold: a medication is predicted if its probability reaches this.
        num_threads: torch's threads; with 1, a seed gives the same weights to the bit.
        precision: of the model's products in training; with "bfloat16" it runs under torch's
            autocast, while weights, gradients of weights, losses and Adam stay float32. Meant for
            GPUs; validation and everything after training are in float32.
    """

    epochs: Annotated[int, Range(1)] = 100
    patience: Annotated[int, Range(1)] = 20
    batch_size: Annotated[int, Range(1)] = 32
    learning_rate: Annotated[float, Range(0, open_low=True)] = 5e-3
    weight_decay: Annotated[float, Range(0)] = 0.0
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    objective: Objective = "mixture"
    ddi_target: Annotated[float, Range(0, 1, open_low=True)] = 0.06
    ddi_coefficient: Annotated[float, Range(0)] = 2.5
    ddi_weight: Annotated[float, Range(0)] = 0.0005
    margin_weight: Annotated[float, Range(0, 1)] = 0.05
    threshold: Annotated[float, Range(0, 1, open_low=True, open_high=True)] = 0.5
    num_threads: Annotated[int, Range(1)] = 1
    precision: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True)
class EpochReport:
    """What an epoch came to.

    Attributes:
        epoch: from 1.
        losses: mean over training visits, in training mode: "loss" and its terms "bce", "margin"
            and "ddi".
        metrics: on the validation patients, at `FitConfig.threshold`.
        best: whether this is the best epoch so far.
        seconds: wall time of training and validation.
    """

    epoch: int
    losses: dict[str, float]
    metrics: Metrics
    best: bool
    seconds: float

    def __str__(self) -> str:
        m = self.metrics
        return (
            f"{self.epoch:>3}  loss {self.losses['loss']:.4f}  validation Jaccard {m.jaccard:.4f}  "
            f"F1 {m.f1:.4f}  PRAUC {m.prauc:.4f}  DDI {m.ddi_rate:.4f}  "
            f"drugs {m.num_medications:.2f}  {self.seconds:.1f} s{'  best' if self.best else ''}"
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "EpochReport":
        """What `as_dict` gave."""
        return cls(**{**content, "metrics": Metrics(**content["metrics"])})


@dataclasses.dataclass(frozen=True)
class FitResult:
    """A trained model.

    Attributes:
        best_epoch: epoch with the best validation Jaccard, the first of equal ones. (The published
            code never takes its first epoch and saves the last epoch's weights under the best
            one's name; here every epoch may be the best, and its weights are kept.)
        metrics: on the validation patients, of that epoch.
        weights: state dict of that epoch, a copy on the CPU.
        history: every epoch, those before an interruption too.
    """

    best_epoch: int
    metrics: Metrics
    weights: dict[str, Tensor]
    history: tuple[EpochReport, ...]


def choose_device(name: str) -> torch.device:
    """The device that `device: auto | cpu | cuda` in a configuration means.

    Raises:
        ConfigError: if it is another word, or CUDA is asked for where torch finds none.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device: expected one of auto, cpu, cuda, got {name!r}")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("device: expected a CUDA device for cuda, torch finds none; use cpu")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def fit(
    build: Builder,
    model_name: str,
    model_options: Mapping[str, Any],
    inputs: ModelInputs,
    arrays: VisitArrays,
    train_patients: NDArray[np.int64],
    validation_patients: NDArray[np.int64],
    config: FitConfig,
    on_epoch: Callable[[EpochReport], bool | None] | None = None,
    checkpoint_dir: Path | None = None,
    device: torch.device | str = "cpu",
    flush: bool = True,
) -> FitResult:
    """Trains a model and gives the weights of its best epoch on validation Jaccard.

    Adam, one step a batch of patients, whose order is drawn anew every epoch from the seed. The
    loss is that of `cafemed/losses.py`, mean over a batch's visits.

    In a process that has joined a group (`cafemed/process_group.py`), all processes of the group
    call this with the same arguments and train one model: each takes its part of every batch and of
    the validation patients. Without dropout the losses and metrics are those of one process, but
    for float32's last digits; with it, each process drops others. All give the same result.

    Args:
        build: see Builder.
        model_name: passed to `build`.
        model_options: passed to `build`.
        inputs: passed to `build`; its `ddi` enters the loss and the metrics.
        arrays: of the whole cohort.
        train_patients: indices.
        validation_patients: indices; for early stopping and the choice of the epoch.
        config: see FitConfig.
        on_epoch: called after every epoch, when its checkpoint is written. Training ends with
            the best epoch so far if it returns True; what it raises ends the fit. Of a group, the
            first process alone calls it, and alone needs a checkpoint_dir.
        checkpoint_dir: a checkpoint of every epoch goes here, and a fit goes on from the one it
            finds: interrupted at any time, it ends with the same weights (to the bit on one
            thread of the CPU). A folder belongs to one fit, by as many processes.
        device: where to train.
        flush: see `checkpoints.save`.

    Raises:
        DataError: if there are no training or no validation patients.
        TrainingError: if a loss or a prediction is not finite; names epoch, batch and term.
        OtherRunError: if the checkpoint is of another fit.
        ArtifactError: if it is damaged.
    """
    for name, patients in (("training", train_patients), ("validation", validation_patients)):
        if len(patients) == 0:
            raise DataError(f"the {name} split has no patients; expected at least one")
    place, group = torch.device(device), process_group.current()

    def identity() -> str:
        return checkpoints.identity(
            {
                "model": model_name,
                "options": dict(model_options),
                "config": dataclasses.asdict(config),
                "sizes": [*inputs.sizes, inputs.num_laboratory_items],
                "has_molecules": inputs.molecules is not None,
                **({"processes": group.size} if group.size > 1 else {}),
            },
            [
                *(inputs.effects, inputs.ddi, train_patients, validation_patients),
                [] if inputs.molecules is None else inputs.molecules,
                *(getattr(arrays, field.name) for field in dataclasses.fields(arrays)),
            ],
        )

    with randomness.reproducible(config.seed, config.num_threads, place):
        model = build(model_name, inputs, model_options, config.seed).to(place)
        randomness.diverge(config.seed, group.rank)
        validation = _Validation(arrays, validation_patients, inputs.ddi, config, place, group)
        run = _Run(model, inputs, arrays, train_patients, validation, config, place, group)
        run.resume(checkpoint_dir, identity)
        while not run.finished():
            report = run.epoch()
            if run.conclude(report, checkpoint_dir, on_epoch, flush):
                break
        return run.result()


class _Validation:
    """The validation patients, of which each process of a group predicts its part."""

    def __init__(
        self,
        arrays: VisitArrays,
        patients: NDArray[np.int64],
        ddi: NDArray[np.bool_],
        config: FitConfig,
        device: torch.device,
        group: Group,
    ) -> None:
        self._ddi, self._config, self._group = ddi, config, group
        parts = [dataclasses.replace(group, rank=rank).part(patients) for rank in range(group.size)]
        own, everybody = parts[group.rank], np.concatenate(parts)
        self._set = EvaluationSet.of(arrays, own, device=device) if len(own) else None
        self._targets = evaluation.targets(arrays, everybody)
        self._offsets = evaluation.patient_offsets(arrays, everybody)

    def predict(self, model: nn.Module) -> NDArray[np.float32]:
        """Probabilities for every visit of all the patients; of a group, in the first process."""
        none = np.zeros((0, self._targets.shape[1]), np.float32)
        own = none if self._set is None else self._set.predict(model)
        return np.concatenate([*self._group.gather(own), none])

    def measure(self, probabilities: NDArray[np.float32], number: int) -> Metrics:
        """Metrics of what `predict` gave after an epoch.

        Raises:
            TrainingError: if a probability is not finite.
        """
        if not np.isfinite(probabilities).all():
            raise TrainingError(
                f"training stopped after epoch {number}: expected finite probabilities on the "
                f"validation patients; try a train.learning_rate below "
                f"{self._config.learning_rate:g}"
            )
        return metrics.evaluate(
            probabilities, self._targets, self._offsets, self._ddi, self._config.threshold
        )


class _Run:
    """The moving parts of one fit."""

    def __init__(
        self,
        model: nn.Module,
        inputs: ModelInputs,
        arrays: VisitArrays,
        patients: NDArray[np.int64],
        validation: _Validation,
        config: FitConfig,
        device: torch.device,
        group: Group,
    ) -> None:
        self.model, self.arrays, self.patients = model, arrays, patients
        self.validation, self.config, self.device = validation, config, device
        self.group, self.identity = group, ""
        self.stepper = Stepper(model, inputs.ddi, config, device, group)
        self.optimizer = self.stepper.optimizer
        self.history: list[EpochReport] = []
        self.best_weights: dict[str, Tensor] = {}

    def best(self) -> EpochReport | None:
        """The report of the best epoch so far."""
        return max(self.history, key=lambda r: r.metrics.jaccard, default=None)

    def finished(self) -> bool:
        """Whether the epochs or the patience are used up."""
        done, best = len(self.history), self.best()
        out_of_patience = best is not None and done - best.epoch >= self.config.patience
        return done >= self.config.epochs or out_of_patience

    def epoch(self) -> EpochReport:
        """One pass over the training patients, then validation."""
        started, number, best = time.perf_counter(), len(self.history) + 1, self.best()
        mean_losses = self.stepper.epoch(self.arrays, self.patients, number)
        probabilities = self.validation.predict(self.model)

        def conclude() -> EpochReport:
            found = self.validation.measure(probabilities, number)
            improved = best is None or found.jaccard > best.metrics.jaccard
            seconds = time.perf_counter() - started
            return EpochReport(number, mean_losses, found, improved, seconds)

        # One process judges, so that all of them stop, or go on, after the same epoch.
        report = self.group.from_first(conclude)
        if report.best:
            self.best_weights = _copy(self.model)
        self.history.append(report)
        return report

    def conclude(
        self,
        report: EpochReport,
        checkpoint_dir: Path | None,
        on_epoch: Callable[[EpochReport], bool | None] | None,
        flush: bool,
    ) -> bool:
        """Saves a checkpoint, tells of the epoch, and says whether training ends with it."""
        states = self.group.gather(randomness.capture(self.device))

        def tell() -> bool:
            if checkpoint_dir is not None:
                checkpoints.save(checkpoint_dir, self._checkpoint(states), flush)
            return on_epoch is not None and bool(on_epoch(report))

        return self.group.from_first(tell)

    def _checkpoint(self, states: list[RandomStates]) -> Checkpoint:
        """Everything that `resume` needs."""
        best = self.best()
        return Checkpoint(
            identity=self.identity,
            epoch=len(self.history),
            best_epoch=0 if best is None else best.epoch,
            weights=self.model.state_dict(),
            best_weights=self.best_weights,
            optimizer=self.optimizer.state_dict()["state"],
            random=states[0],
            history=[report.as_dict() for report in self.history],
            random_of_others=tuple(states[1:]),
        )

    def resume(self, checkpoint_dir: Path | None, identity: Callable[[], str]) -> None:
        """Takes over the state of the folder's checkpoint, if there is one.

        Args:
            checkpoint_dir: of the first process of the group.
            identity: of the fit; takes a while where there is much data.
        """

        def load() -> Checkpoint | None:
            if checkpoint_dir is None:
                return None
            self.identity = identity()
            return checkpoints.load(checkpoint_dir, self.identity)

        checkpoint = self.group.from_first(load)
        if checkpoint is None:
            return
        try:
            self.model.load_state_dict(checkpoint.weights)
        except RuntimeError as err:
            raise OtherRunError(
                "the checkpoint's weights are of another version of the model; remove it to train "
                "from the start"
            ) from err
        fresh = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**fresh, "state": checkpoint.optimizer})
        self.best_weights = checkpoint.best_weights
        self.history = [EpochReport.from_dict(report) for report in checkpoint.history]
        states = [checkpoint.random, *checkpoint.random_of_others]
        randomness.restore(states[self.group.rank], self.device)

    def result(self) -> FitResult:
        """The best epoch so far; there has been at least one."""
        best = self.best()
        assert best is not None
        return FitResult(best.epoch, best.metrics, self.best_weights, tuple(self.history))


def _copy(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights as they are now, on the CPU, sharing no memory with it."""
    return {name: t.detach().to("cpu", copy=True) for name, t in model.state_dict().items()}
