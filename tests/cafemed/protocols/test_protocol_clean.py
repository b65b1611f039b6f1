import numpy as np
import pytest

from cafemed.codes import KINDS
from cafemed.cohort import SPLITS
from cafemed.errors import DataError
from cafemed.protocols import CohortConfig, clean

LISTS = {"diagnosis": "diagnoses", "procedure": "procedures", "medication": "medications"}


def dropped_rows(dropped, table, start_of_reason):
    return sum(
        d.num_rows
        for d in dropped
        if (d.table, d.reason[: len(start_of_reason)]) == (table, start_of_reason)
    )


def assert_equals_reference(cohort, patients, reference, config, decoded):
    visits = [visit for own in patients.values() for visit in own]
    assert [int(p) for p in cohort.patient_ids] == list(patients)
    assert np.diff(cohort.patient_offsets).tolist() == [len(own) for own in patients.values()]
    assert [int(v) for v in cohort.visit_ids] == [visit["hadm"] for visit in visits]
    assert cohort.admitted.tolist() == [visit["admitted"].astype(object) for visit in visits]

    training = [
        visit
        for own, part in zip(patients.values(), cohort.split, strict=True)
        for visit in own
        if SPLITS[part] == "train"
    ]
    for kind in KINDS:
        limit = getattr(config, f"max_{LISTS[kind]}")
        known = reference.vocabulary(training, kind, limit)
        codes = [code.split(":")[1] for code in cohort.vocabularies[kind]]
        assert codes == known
        names = [LISTS[kind], "targets"] if kind == "medication" else [LISTS[kind]]
        for name in names:
            key = "targets" if name == "targets" else kind
            wanted = [[code for code in visit[key] if code in known] for visit in visits]
            assert decoded(getattr(cohort, name), cohort.vocabularies[kind]) == wanted


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"require": KINDS, "min_visits": 1, "target_window_h": 24.0},
        {"max_diagnoses": 4, "max_procedures": 3, "max_medications": 2, "target_window_h": 60.0},
    ],
    ids=["default", "all kinds, first day", "limits, 60 hours"],
)
def test_equals_the_protocol_row_by_row(seed, settings, hospitals, reference, read, decoded):
    hospital = hospitals.draw(seed, num_patients=25)
    config = CohortConfig(seed=seed, **settings)
    cohort, _ = clean(*read(hospital), config)
    patients = reference.clean(
        hospital,
        hospitals.NDC_TO_ATC,
        require=config.require,
        min_visits=config.min_visits,
        window_h=config.target_window_h,
    )
    assert len(patients) >= 3
    assert_equals_reference(cohort, patients, reference, config, decoded)


def test_rows_dropped_are_counted(hospitals, read):
    hospital = hospitals.draw(5, num_patients=25)
    stranger = {"hadm_id": 1, "icd9_code": "4019"}  # no such admission
    hospital.diagnoses.append(hospital.diagnoses[0] | stranger)
    cohort, dropped = clean(*read(hospital), CohortConfig())
    ndcs = [row["ndc"] for row in hospital.prescriptions]
    assert dropped_rows(dropped, "prescriptions", "no drug code") == ndcs.count("")
    assert dropped_rows(dropped, "prescriptions", "drug code 0") == ndcs.count("0")
    unmapped = ndcs.count(hospitals.UNMAPPED_NDC)
    assert dropped_rows(dropped, "prescriptions", "no ATC code") == unmapped
    no_code = sum(row["icd9_code"] == "" for row in hospital.diagnoses)
    assert dropped_rows(dropped, "diagnoses", "no code") == no_code
    assert dropped_rows(dropped, "diagnoses", "visit not among") == 1
    no_time = sum(row["admittime"] == "" for row in hospital.admissions)
    assert dropped_rows(dropped, "visits", "no admission time") == no_time
    lost = dropped_rows(dropped, "visits", "")
    assert cohort.num_visits + lost == len(hospital.admissions)


def test_codes_unseen_in_training_map_to_nothing_and_are_counted(hospitals, read):
    hospital = hospitals.draw(6, num_patients=25)
    cohort, _ = clean(*read(hospital), CohortConfig())
    held_out = cohort.visit_ids[cohort.visits_of(cohort.patients_of("test"))[0]]
    hospital.diagnoses.append(
        {"row_id": 0, "subject_id": 0, "hadm_id": held_out, "seq_num": 99, "icd9_code": "E9999"}
    )
    again, dropped = clean(*read(hospital), CohortConfig())
    assert again.vocabularies == cohort.vocabularies
    assert again.diagnoses.ids.tolist() == cohort.diagnoses.ids.tolist()
    before = dropped_rows(
        clean(*read(hospitals.draw(6, num_patients=25)), CohortConfig())[1],
        "diagnoses",
        "code unseen",
    )
    assert dropped_rows(dropped, "diagnoses", "code unseen") == before + 1


def test_nothing_of_held_out_patients_reaches_the_vocabularies(hospitals, read):
    """Replaces every held-out patient's codes: the training part of the cohort is the same."""
    hospital = hospitals.draw(8, num_patients=25)
    cohort, _ = clean(*read(hospital), CohortConfig())
    held_out = {
        int(cohort.patient_ids[p])
        for split in ("validation", "test")
        for p in cohort.patients_of(split)
    }
    for row in hospital.diagnoses:
        if row["subject_id"] in held_out and row["icd9_code"]:
            row["icd9_code"] = hospitals.DIAGNOSES[0]
    again, _ = clean(*read(hospital), CohortConfig())
    assert again.vocabularies == cohort.vocabularies
    visits = cohort.visits_of(cohort.patients_of("train"))
    assert again.diagnoses.take(visits).ids.tolist() == cohort.diagnoses.take(visits).ids.tolist()


@pytest.mark.parametrize("parts", [(4, 1, 1), (1, 1, 1), (8, 1, 1)])
def test_split_is_by_patient_and_by_seed(parts, hospitals, read):
    records = read(hospitals.draw(2, num_patients=40))
    splits = [
        clean(*records, CohortConfig(seed=seed, split_parts=parts))[0].split for seed in (0, 0, 1)
    ]
    assert splits[0].tolist() == splits[1].tolist() != splits[2].tolist()
    sizes = np.bincount(splits[0], minlength=3)
    expected = len(splits[0]) * np.array(parts) / sum(parts)
    assert sizes.sum() == len(splits[0])
    assert (np.abs(sizes - expected) <= 1).all()


def test_order_of_rows_in_the_files_does_not_matter(hospitals, read):
    hospital = hospitals.draw(4, num_patients=25)
    cohort, _ = clean(*read(hospital), CohortConfig())
    for rows in hospital.mimic3_tables().values():
        rows.reverse()
    again, _ = clean(*read(hospital), CohortConfig())
    assert again.patient_ids == cohort.patient_ids
    assert again.split.tolist() == cohort.split.tolist()
    assert again.medications.ids.tolist() == cohort.medications.ids.tolist()


def test_split_by_time_keeps_the_latest_patients_for_the_test(hospitals, read):
    cohort, _ = clean(*read(hospitals.draw(2, num_patients=40)), CohortConfig(split="time"))
    last = cohort.admitted[cohort.patient_offsets[1:] - 1]
    train, validation, test = (last[cohort.split == part] for part in range(3))
    assert train.max() <= validation.min() <= validation.max() <= test.min()


def test_history_hides_the_visits_own_codes(hospitals, read):
    cohort, _ = clean(*read(hospitals.draw(2, num_patients=40)), CohortConfig(inputs="history"))
    assert cohort.inputs == "history"
    diagnoses, _, _ = cohort.known_inputs()
    assert (diagnoses.counts[cohort.is_first_visit()] == 0).all()


def test_interacting_pairs_are_those_of_the_vocabulary(hospitals, read):
    cohort, _ = clean(*read(hospitals.draw(2, num_patients=40)), CohortConfig())
    names = [code.split(":")[1] for code in cohort.vocabularies["medication"]]
    pairs = {(names[a], names[b]) for a, b in zip(*np.nonzero(cohort.ddi), strict=True)}
    expected = {pair for pair in hospitals.DDI if set(pair) <= set(names)}
    assert pairs == expected | {(b, a) for a, b in expected}


def test_too_few_patients_are_refused(hospitals, read):
    with pytest.raises(DataError, match=r"at least 3 patients with 2 or more usable visits"):
        clean(*read(hospitals.draw(0, num_patients=2)), CohortConfig())


@pytest.mark.parametrize(
    ("table", "column", "value"),
    [
        ("prescriptions", "ndc", "0"),
        ("prescriptions", "ndc", "99999999999"),
        ("prescriptions", "hadm_id", 1),
        ("diagnoses", "icd9_code", ""),
        ("diagnoses", "hadm_id", 1),
    ],
)
def test_no_patient_left_is_refused(table, column, value, hospitals, read):
    hospital = hospitals.draw(2)
    for row in getattr(hospital, table):
        row[column] = value
    with pytest.raises(DataError, match=r"0 are left; dropped were [1-9]\d* \w+ \("):
        clean(*read(hospital), CohortConfig())


@pytest.mark.parametrize("window_h", [None, 24.0])
def test_the_real_demo_equals_the_protocol_row_by_row(demo, window_h, reference, decoded):
    rows, records, drugs, atc_of_ndc, _ = demo
    config = CohortConfig(target_window_h=window_h)
    cohort, _ = clean(records, drugs, config)
    patients = reference.clean(
        rows, atc_of_ndc, require=config.require, min_visits=2, window_h=window_h
    )
    assert_equals_reference(cohort, patients, reference, config, decoded)
    assert (cohort.num_patients, cohort.num_visits) == (13, 41)
