"""Plain learners of medications, and the rows of a cohort that they learn from."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from sklearn.linear_model import LogisticRegression

from cafemed.cohort import Cohort, Split

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

_BATCH, _LEARNING_RATE = 256, 0.05


class Data:
    """Inputs (diagnoses, procedures, previous medications) and targets of each split's visits."""

    def __init__(self, cohort: Cohort) -> None:
        known, sizes = cohort.known_inputs(), cohort.sizes
        hot = [lists.multi_hot(n) for lists, n in zip(known, sizes, strict=True)]
        self.inputs = np.hstack(hot).astype(np.float32)
        self.targets = cohort.targets.multi_hot(sizes[2])
        self.num_codes = sizes[0] + sizes[1]
        self.cohort = cohort

    def of(self, split: Split) -> tuple[Floats, Bools]:
        """Inputs (v, N) and targets (v, N_m)."""
        visits = self.cohort.visits_of(self.cohort.patients_of(split))
        return self.inputs[visits], self.targets[visits]


class Learned(NamedTuple):
    """Probabilities (visits, N_m) on two splits, the epoch that they are of and the epochs run."""

    validation: Floats
    test: Floats
    best_epoch: int = 0
    epochs: int = 0


def logistic_regression(data: Data, num_inputs: int, strength: float = 1.0) -> Learned:
    """One L1 regression a medication on the first inputs.

    Args:
        data: of the cohort.
        num_inputs: how many of the inputs to use.
        strength: C of scikit-learn: weight of the likelihood against the penalty.
    """
    inputs, targets = data.of("train")
    rows = sparse.csr_array(inputs[:, :num_inputs].astype(np.float64))
    asked = [sparse.csr_array(data.of(split)[0][:, :num_inputs]) for split in _ASKED]
    found = [np.zeros((part.shape[0], targets.shape[1]), np.float32) for part in asked]
    for j, outcome in enumerate(targets.T):
        if outcome.any() and not outcome.all():
            model = LogisticRegression(
                C=strength, l1_ratio=1.0, solver="liblinear", random_state=0, max_iter=1000
            )
            model.fit(rows, outcome)
            for part, probabilities in zip(asked, found, strict=True):
                probabilities[:, j] = model.predict_proba(part)[:, 1]
        else:
            for probabilities in found:
                probabilities[:, j] = outcome.mean()
    return Learned(found[0], found[1])


def noisy_or(
    data: Data,
    seed: int,
    score: Callable[[Floats, Bools], float],
    epochs: int = 30,
    patience: int = 30,
) -> Learned:
    """A noisy-or: one strength for each input and medication, and a leak for each medication.

    Args:
        data: of the cohort.
        seed: of the order of the visits.
        score: of validation probabilities and targets; the epoch with the highest is kept.
        epochs: at most so many.
        patience: stop after so many epochs without a better score.
    """
    torch.manual_seed(seed)
    inputs, outcomes = (torch.from_numpy(a).float() for a in data.of("train"))
    asked = [torch.from_numpy(data.of(split)[0]) for split in _ASKED]
    wanted = data.of("validation")[1]
    strength = torch.full((inputs.shape[1], outcomes.shape[1]), -5.0, requires_grad=True)
    leak = torch.full((outcomes.shape[1],), -4.0, requires_grad=True)
    optimizer = torch.optim.Adam([strength, leak], lr=_LEARNING_RATE)

    def log_miss(rows: torch.Tensor) -> torch.Tensor:
        positive = torch.nn.functional.softplus
        return -(rows @ positive(strength) + positive(leak))

    best, found, epoch = -np.inf, Learned(np.zeros(0, np.float32), np.zeros(0, np.float32)), 0
    while epoch < min(epochs, found.best_epoch + patience):
        epoch += 1
        order = torch.randperm(len(inputs))
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            miss, outcome = log_miss(inputs[rows]), outcomes[rows]
            loss = -(outcome * torch.log(1e-6 - torch.expm1(miss)) + (1 - outcome) * miss).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            validation = -torch.expm1(log_miss(asked[0])).numpy()
            if (value := score(validation, wanted)) > best:
                best = value
                test = -torch.expm1(log_miss(asked[1])).numpy()
                found = Learned(validation, test, epoch)
    return found._replace(epochs=epoch)


_ASKED: tuple[Split, Split] = ("validation", "test")
