"""Predictions of a model for given patients."""

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cafemed.batches import Batch, VisitArrays, collate
from cafemed.stepping import make_ready, run_model

#: Patients a batch where there are no gradients; larger ones gained nothing on a CPU.
BATCH_SIZE = 128


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
    """Patients collated once, to be predicted as often as needed. V visits of P patients.

    Attributes:
        batches: patients of similar numbers of visits together, which saves padding; on the host.
        rows: int64 (V,); prediction i of the batches, one after another, is visit `rows[i]` here.
        targets: bool (V, N_m), patient by patient in the order given.
        patient_offsets: int64 (P + 1,) into these visits.
        device: where the model is.
    """

    batches: tuple[Batch, ...]
    rows: NDArray[np.int64]
    targets: NDArray[np.bool_]
    patient_offsets: NDArray[np.int64]
    device: torch.device

    @classmethod
    def of(
        cls,
        arrays: VisitArrays,
        patients: NDArray[np.int64],
        batch_size: int = BATCH_SIZE,
        device: torch.device | str = "cpu",
    ) -> "EvaluationSet":
        """Collates these patients (at least one) for a model on the device."""
        counts = np.diff(arrays.patient_offsets)[patients]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        order = np.argsort(counts, kind="stable")
        chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        return cls(
            batches=tuple(collate(arrays, patients[chunk]) for chunk in chunks),
            rows=_ranges(offsets[order], counts[order]),
            targets=arrays.targets[_ranges(arrays.patient_offsets[patients], counts)],
            patient_offsets=offsets,
            device=torch.device(device),
        )

    def predict(self, model: nn.Module) -> NDArray[np.float32]:
        """Probabilities of the logits as they are, float32 (V, N_m); see `logits`."""
        return sigmoid(self.logits(model))

    def logits(self, model: nn.Module) -> NDArray[np.float32]:
        """Logits in evaluation mode, float32 (V, N_m); the model's mode is put back."""
        was_training = model.training
        model.eval()
        try:
            with torch.inference_mode():
                ready = (make_ready(model, batch, self.device) for batch in self.batches)
                found = torch.cat([run_model(model, one) for one in ready]).cpu()
        finally:
            model.train(was_training)
        logits = np.empty(self.targets.shape, np.float32)
        logits[self.rows] = found.numpy()
        return logits


def sigmoid(logits: NDArray[np.float32], temperature: float = 1.0) -> NDArray[np.float32]:
    """Probabilities of logits divided by a temperature, float32, as the endpoint computes them."""
    found: NDArray[np.float32] = torch.sigmoid(torch.from_numpy(logits) / temperature).numpy()
    return found


def predict(
    model: nn.Module,
    arrays: VisitArrays,
    patients: NDArray[np.int64],
    batch_size: int = BATCH_SIZE,
    device: torch.device | str = "cpu",
) -> NDArray[np.float32]:
    """Probabilities for every visit of these patients, in evaluation mode.

    The other patients of a batch change nothing but the last float32 digits.

    Args:
        model: on `device`.
        arrays: of the whole cohort.
        patients: indices (P,).
        batch_size: patients at a time.
        device: where the model is.

    Returns:
        float32 (visits of these patients, N_m), patient by patient in the order given.
    """
    return EvaluationSet.of(arrays, patients, batch_size, device).predict(model)


def patient_offsets(arrays: VisitArrays, patients: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each patient's rows are in what `predict` gives, int64 (P + 1,)."""
    counts = np.diff(arrays.patient_offsets)[patients]
    return np.concatenate([[0], np.cumsum(counts)])


def targets(arrays: VisitArrays, patients: NDArray[np.int64]) -> NDArray[np.bool_]:
    """The target sets of these patients' visits, bool (visits, N_m), rows as `predict` gives."""
    counts = np.diff(arrays.patient_offsets)[patients]
    wanted: NDArray[np.bool_] = arrays.targets[_ranges(arrays.patient_offsets[patients], counts)]
    return wanted


def _ranges(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """start, start + 1, … (count of them) for each pair, one after another."""
    ends = np.cumsum(counts)
    within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
    rows: NDArray[np.int64] = np.repeat(starts, counts) + within
    return rows
