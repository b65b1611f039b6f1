"""What a cohort looks like in numbers; nothing at patient level."""

from typing import Any

import numpy as np
from scipy import sparse

from cafemed.codes import KINDS, LABORATORY, CodeLists
from cafemed.cohort import SPLITS, Cohort


def ddi_rate(lists: CodeLists, ddi: np.ndarray[Any, np.dtype[np.bool_]]) -> float:
    """Interacting pairs among all pairs of a visit's medications, pooled over visits.

    Args:
        lists: sets of medications, one a visit.
        ddi: bool (M, M), symmetric, zero diagonal.

    Returns:
        A share; 0 where no visit has two medications.
    """
    present = sparse.csr_array(
        (np.ones(len(lists.ids), np.float32), lists.ids, lists.offsets),
        shape=(len(lists), len(ddi)),
    )
    together = (present.T @ present).toarray()
    num_pairs = int((lists.counts * (lists.counts - 1)).sum())
    return float((together * ddi).sum(dtype=np.float64) / num_pairs) if num_pairs else 0.0


def summary(cohort: Cohort) -> dict[str, Any]:
    """Sizes, means and rates of a cohort, as JSON values.

    Returns:
        patients, visits, codes (kind → vocabulary size), codes_per_visit (kind → mean), most_codes
        (kind → largest number in a visit), split (name → patients), ddi_pairs, ddi_rate (of the
        target sets), empty_targets (visits without one), age_known and sex_known (shares). Where
        there are any: laboratory (items, values_per_visit, visits_without), molecules
        (molecules, medications that have one) and names (kind → codes that have one).
    """
    lists = {
        "diagnosis": cohort.diagnoses,
        "procedure": cohort.procedures,
        "medication": cohort.medications,
        "target": cohort.targets,
    }
    return {
        "patients": cohort.num_patients,
        "visits": cohort.num_visits,
        "codes": {kind: len(cohort.vocabularies[kind]) for kind in KINDS},
        "codes_per_visit": {k: round(float(v.counts.mean()), 2) for k, v in lists.items()},
        "most_codes": {kind: int(v.counts.max()) for kind, v in lists.items()},
        "split": {name: len(cohort.patients_of(name)) for name in SPLITS},
        "ddi_pairs": int(cohort.ddi.sum()) // 2,
        "ddi_rate": round(ddi_rate(cohort.targets, cohort.ddi), 4),
        "empty_targets": int((cohort.targets.counts == 0).sum()),
        "age_known": round(float(np.isfinite(cohort.age).mean()), 4),
        "sex_known": round(float((cohort.sex > 0).mean()), 4),
        **_laboratory(cohort),
        **_molecules(cohort),
        **_names(cohort),
    }


def _laboratory(cohort: Cohort) -> dict[str, Any]:
    items = cohort.vocabularies[LABORATORY]
    if not items:
        return {}
    counts = cohort.laboratory.items.counts
    return {
        "laboratory": {
            "items": len(items),
            "values_per_visit": round(float(counts.mean()), 2),
            "visits_without": int((counts == 0).sum()),
        }
    }


def _molecules(cohort: Cohort) -> dict[str, Any]:
    if not cohort.molecules:
        return {}
    distinct = {smiles for of_one in cohort.molecules.values() for smiles in of_one}
    return {"molecules": {"molecules": len(distinct), "medications": len(cohort.molecules)}}


def _names(cohort: Cohort) -> dict[str, Any]:
    counts = {kind: len(of) for kind, of in cohort.names.items()}
    return {"names": counts} if counts else {}
