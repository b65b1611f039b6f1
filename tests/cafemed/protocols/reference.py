"""Both protocols once more, row by row or in pandas as the public scripts do, without our code."""

import collections

import numpy as np
import pandas as pd


def frame(rows):
    """A table as the scripts read it: every cell text, empty cells missing."""
    table = pd.DataFrame(rows).astype(str)
    return table.mask(table == "")


def published(hospital, ndc_to_atc, *, smiles=None, max_diagnoses=2000, max_medications=300):
    """Visits by (subject, admission) with three lists of codes each, and the three vocabularies."""
    columns = ["subject_id", "hadm_id", "icustay_id", "startdate", "ndc"]
    med = frame(hospital.prescriptions)[columns]
    med = med[med["ndc"] != "0"].ffill().dropna().drop_duplicates()
    for name in ("subject_id", "hadm_id", "icustay_id"):
        med[name] = med[name].astype(float).astype(int)
    med = med.sort_values(columns[:4], kind="stable")
    admissions = med.groupby("subject_id")["hadm_id"].nunique()
    med = med[med["subject_id"].isin(admissions[admissions > 1].index)]
    med["atc"] = med["ndc"].map(ndc_to_atc)
    med = med.dropna()
    if smiles is not None:
        med = med[med["atc"].isin(smiles)]
    med = med.drop(columns="ndc").drop_duplicates()
    med = med[med["atc"].isin(_top(med["atc"], max_medications))]

    key = ["subject_id", "hadm_id"]
    diag = frame(hospital.diagnoses)[[*key, "seq_num", "icd9_code"]].dropna()
    diag = diag.drop(columns="seq_num").drop_duplicates()
    diag = diag[diag["icd9_code"].isin(_top(diag["icd9_code"], max_diagnoses))]
    proc = frame(hospital.procedures)[[*key, "seq_num", "icd9_code"]].dropna()
    proc["seq_num"] = proc["seq_num"].astype(int)
    for table in (diag, proc):
        table[key] = table[key].astype(int)
    diag = diag.sort_values(key, kind="stable")
    proc = proc.sort_values([*key, "seq_num"], kind="stable")

    data = diag.groupby(key)["icd9_code"].unique().rename("diagnosis").reset_index()
    data = data.merge(med.groupby(key)["atc"].unique().rename("medication").reset_index(), on=key)
    data = data.merge(
        proc.groupby(key)["icd9_code"].unique().rename("procedure").reset_index(), on=key
    )
    data = data.sort_values(key)
    kinds = ("diagnosis", "procedure", "medication")
    visits = {
        (row.subject_id, row.hadm_id): {kind: list(getattr(row, kind)) for kind in kinds}
        for row in data.itertuples()
    }
    vocabularies = {
        kind: list(dict.fromkeys(code for visit in visits.values() for code in visit[kind]))
        for kind in kinds
    }
    return visits, vocabularies


def published_split(num_patients):
    """Numbers of training, test and validation patients, as the training scripts cut the list."""
    data = list(range(num_patients))
    cut = int(len(data) * 2 / 3)
    length = int(len(data[cut:]) / 2)
    return len(data[:cut]), len(data[cut : cut + length]), len(data[cut + length :])


def _top(codes, limit):
    counts = sorted(collections.Counter(codes).items(), key=lambda item: (-item[1], item[0]))
    return {code for code, _ in counts[:limit]}


def clean(hospital, ndc_to_atc, *, require, min_visits, window_h):
    """Patients in order of SUBJECT_ID → usable visits in time order, lists in their order."""
    patients = collections.defaultdict(list)
    for admission in hospital.admissions:
        if admission["admittime"]:
            visit = _clean_visit(hospital, ndc_to_atc, admission, window_h)
            if all(visit[kind] for kind in require):
                patients[admission["subject_id"]].append(visit)
    for visits in patients.values():
        visits.sort(key=lambda visit: (visit["admitted"], visit["hadm"]))
    return {
        subject: patients[subject]
        for subject in sorted(patients)
        if len(patients[subject]) >= min_visits
    }


def _clean_visit(hospital, ndc_to_atc, admission, window_h):
    hadm = admission["hadm_id"]
    admitted = np.datetime64(admission["admittime"].replace(" ", "T"))
    drugs = []
    for row in hospital.prescriptions:
        if row["hadm_id"] == hadm and row["ndc"] in ndc_to_atc:
            start = row["startdate"].replace(" ", "T")
            start = np.datetime64(start) if start else np.datetime64("9999-01-01")
            drugs.append((start, ndc_to_atc[row["ndc"]]))
    drugs.sort()
    window = np.timedelta64(int((window_h or 0) * 3600), "s")
    in_window = [
        (start, atc)
        for start, atc in drugs
        if window_h is None or (start < admitted + window and start.astype(object).year < 9999)
    ]
    return {
        "hadm": hadm,
        "admitted": admitted,
        "diagnosis": _in_sequence(hospital.diagnoses, hadm),
        "procedure": _in_sequence(hospital.procedures, hadm),
        "medication": list(dict.fromkeys(atc for _, atc in drugs)),
        "targets": list(dict.fromkeys(atc for _, atc in in_window)),
    }


def _in_sequence(rows, hadm):
    mine = [row for row in rows if row["hadm_id"] == hadm and row["icd9_code"]]
    return list(dict.fromkeys(row["icd9_code"] for row in sorted(mine, key=lambda r: r["seq_num"])))


def vocabulary(visits, kind, limit):
    """Codes in most of these visits, ties to the smaller, in order of the code."""
    return sorted(_top((code for visit in visits for code in visit[kind]), limit or 10**9))
