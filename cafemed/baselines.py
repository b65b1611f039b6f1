"""Recommendations without a model, which every model has to beat.

Both give scores that are read like probabilities at threshold 0.5: at least 0.5 for what is
recommended, and within what is recommended, and within the rest, by how often it is given.
"""

import numpy as np
from numpy.typing import NDArray

from cafemed import evaluation
from cafemed.batches import VisitArrays, collate


def most_frequent(
    arrays: VisitArrays, train_patients: NDArray[np.int64], patients: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Recommends the same at every visit: the medications most often given to training patients.

    As many as a training visit has on average.

    Args:
        arrays: of the whole cohort.
        train_patients: indices, at least one.
        patients: indices.

    Returns:
        Scores, float32 (visits of these patients, N_m), rows as `evaluation.predict` gives them.
    """
    num_visits = int(evaluation.patient_offsets(arrays, patients)[-1])
    share, frequent = _frequent(arrays, train_patients)
    return _scores(share, np.tile(frequent, (num_visits, 1)))


def last_visit(
    arrays: VisitArrays, train_patients: NDArray[np.int64], patients: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Recommends the medications of the patient's last visit; at a first visit the most frequent.

    Args and Returns: as `most_frequent`.
    """
    share, frequent = _frequent(arrays, train_patients)
    batch = collate(arrays, patients)
    codes, counts = batch.codes[:, 2].numpy(), batch.counts[:, 2].numpy()
    visit, place = np.nonzero(np.arange(codes.shape[1]) < counts[:, None])
    recommended = np.zeros((len(codes), len(share)), np.bool_)
    recommended[visit, codes[visit, place]] = True
    recommended[batch.is_first.numpy()] = frequent
    return _scores(share, recommended)


def _frequent(
    arrays: VisitArrays, train_patients: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Share of the training visits with each medication, and which are the most frequent."""
    given = evaluation.targets(arrays, train_patients)
    share = given.mean(axis=0)
    usual = round(float(given.sum(axis=1).mean()))
    frequent = np.zeros(len(share), np.bool_)
    frequent[np.argsort(-share, kind="stable")[:usual]] = True
    return share, frequent


def _scores(share: NDArray[np.float64], recommended: NDArray[np.bool_]) -> NDArray[np.float32]:
    # 0.49: what is given at every visit and yet not recommended stays below 0.5.
    return (0.49 * share + 0.5 * recommended).astype(np.float32)
