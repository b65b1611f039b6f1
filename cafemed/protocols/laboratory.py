"""Laboratory values of a cohort: the items that its training patients have most often."""

import dataclasses

import numpy as np

from cafemed.codes import LABORATORY, CodeLists
from cafemed.cohort import Cohort
from cafemed.laboratory import Laboratory
from cafemed.protocols import visits as rows_of
from cafemed.records import Dropped
from cafemed.sources.laboratory import TABLE, Measured
from cafemed.suppression import FEWEST


def with_laboratory(
    cohort: Cohort, measured: Measured, max_items: int
) -> tuple[Cohort, list[Dropped]]:
    """Adds the values of the items that are in most visits of training patients.

    Ties go to the smaller item. Validation and test patients decide nothing. Items that fewer than
    `suppression.FEWEST` training patients have are dropped: their mean, which leaves the hospital
    with the model, would tell of these few.

    Args:
        cohort: without laboratory values.
        measured: values of its visits.
        max_items: how many items to keep, at least 1.

    Returns:
        The cohort, its items sorted, and what was dropped, the source's rows included.
    """
    in_training = np.zeros(cohort.num_visits, np.bool_)
    in_training[cohort.visits_of(cohort.patients_of("train"))] = True
    in_training = in_training[measured.visit]
    counts = np.bincount(measured.item[in_training], minlength=len(measured.names))
    patient = cohort.patient_of_visit()[measured.visit]
    pairs = np.unique(np.stack([patient, measured.item])[:, in_training], axis=1)
    common = np.bincount(pairs[1], minlength=len(counts)) >= FEWEST
    chosen = np.lexsort((np.arange(len(counts)), -counts, ~common))[:max_items]
    chosen = np.sort(chosen[common[chosen]])
    item = rows_of.position_of(chosen, len(counts))[measured.item]
    kept = item >= 0
    usual = common[measured.item]
    offsets = np.zeros(cohort.num_visits + 1, np.int64)
    np.cumsum(np.bincount(measured.visit[kept], minlength=cohort.num_visits), out=offsets[1:])
    dropped = [
        *measured.dropped,
        Dropped(TABLE, f"not among the {max_items} items kept", int((~kept & usual).sum())),
        Dropped(TABLE, f"item of under {FEWEST} training patients", int((~usual).sum())),
    ]
    added = dataclasses.replace(
        cohort,
        vocabularies={
            **cohort.vocabularies,
            LABORATORY: tuple(measured.names[i] for i in chosen.tolist()),
        },
        laboratory=Laboratory(
            CodeLists(item[kept].astype(np.int32), offsets), measured.value[kept]
        ),
    )
    return added, dropped
