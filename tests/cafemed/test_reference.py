import pytest

from cafemed import reference

VOCABULARIES = {
    "diagnosis": tuple(f"icd10:A{i:02}" for i in range(9)),
    "procedure": ("icd10:0DB64ZX",),
    "medication": ("atc:A02B", "atc:B01A"),
}


def test_invented_patients_have_known_codes_and_no_medication_before_the_first_visit():
    patients = reference.invent_patients(VOCABULARIES)
    assert max(len(patient["visits"]) for patient in patients) > 1
    for patient in patients:
        assert patient["visits"][0]["previous_medications"] == []
        for visit in patient["visits"]:
            assert set(visit["diagnoses"]) <= set(VOCABULARIES["diagnosis"])
            assert 1 <= len(set(visit["diagnoses"])) == len(visit["diagnoses"]) <= 6
            assert visit["procedures"] == list(VOCABULARIES["procedure"])


@pytest.mark.parametrize("kind", ["diagnosis", "procedure"])
def test_a_cohort_may_have_no_code_of_a_kind(kind):
    patients = reference.invent_patients(VOCABULARIES | {kind: ()})
    key = {"diagnosis": "diagnoses", "procedure": "procedures"}[kind]
    assert all(visit[key] == [] for patient in patients for visit in patient["visits"])
