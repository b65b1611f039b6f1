import pytest

from cafemed import reference
from cafemed.scaling import Scaling

VOCABULARIES = {"diagnosis": ("icd10:I10",), "procedure": ("icd10:0DB64ZX",), "medication": ("a",)}


@pytest.mark.parametrize(("kind", "key"), [("diagnosis", "diagnoses"), ("procedure", "procedures")])
def test_a_cohort_may_have_no_code_of_a_kind(kind: str, key: str):
    patients = reference.invent_patients(VOCABULARIES | {kind: ()}, Scaling())
    assert all(visit[key] == [] for patient in patients for visit in patient["visits"])


def test_invented_patients_have_laboratory_values_of_known_items_about_their_mean():
    items = tuple(f"lab:{i}" for i in range(9))
    scaling = Scaling(60.0, 10.0, tuple(100.0 * i for i in range(9)), (0.5,) * 9)
    patients = reference.invent_patients(VOCABULARIES | {"laboratory": items}, scaling)
    visits = [visit for patient in patients for visit in patient["visits"]]
    measured = [(item, x) for visit in visits for item, x in visit["laboratory"].items()]
    assert {len(visit["laboratory"]) for visit in visits} <= set(range(7))
    assert measured
    for item, value in measured:
        assert abs(value - 100 * items.index(item)) < 5 * 0.5


def test_laboratory_values_draw_nothing_where_there_are_no_items():
    assert reference.invent_patients(VOCABULARIES, Scaling()) == reference.invent_patients(
        VOCABULARIES | {"laboratory": ()}, Scaling()
    )
