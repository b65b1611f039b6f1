import pytest

from cafemed import reference

VOCABULARIES = {"diagnosis": ("icd10:I10",), "procedure": ("icd10:0DB64ZX",), "medication": ("a",)}


@pytest.mark.parametrize(("kind", "key"), [("diagnosis", "diagnoses"), ("procedure", "procedures")])
def test_a_cohort_may_have_no_code_of_a_kind(kind: str, key: str):
    patients = reference.invent_patients(VOCABULARIES | {kind: ()})
    assert all(visit[key] == [] for patient in patients for visit in patient["visits"])
