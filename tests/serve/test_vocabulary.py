import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.vocabulary import Vocabulary

VOCABULARY = Vocabulary(
    {
        "diagnosis": ("icd9:4280", "icd9:42830", "icd10:I50", "icd9:042"),
        "procedure": ("icd9:4281", "icd9:3893"),
        "medication": ("atc:C03C", "atc:C03D"),
        "laboratory": ("lab:50912",),
    },
    {
        "diagnosis": {"icd9:4280": "Congestive heart failure", "icd10:I50": "Heart failure"},
        "medication": {"atc:C03C": "High-ceiling diuretics", "atc:C03D": "I50 of a name"},
    },
)


def found(query: str, kind: str | None = None, limit: int = 100) -> list[str]:
    codes = VOCABULARY.search(query, kind, limit)  # type: ignore[arg-type]
    return [f"{one.system}:{one.code}" for one in codes]


@pytest.mark.parametrize(
    ("query", "codes"),
    [
        ("428.0", ["icd9:4280"]),
        ("428", ["icd9:4280", "icd9:42830", "icd9:4281"]),
        ("icd9:428.", ["icd9:4280", "icd9:42830", "icd9:4281"]),
        ("ICD9: 38.93", ["icd9:3893"]),
        ("c03", ["atc:C03C", "atc:C03D"]),
        ("c03c", ["atc:C03C"]),
        ("failure heart", ["icd10:I50", "icd9:4280"]),
        ("HEART", ["icd10:I50", "icd9:4280"]),
        ("cong hea", ["icd9:4280"]),
        ("eart", []),
        ("509", ["lab:50912"]),
        ("i50", ["icd10:I50", "atc:C03D"]),  # codes before names
        ("nothing", []),
    ],
)
def test_codes_are_found_by_how_they_begin_or_by_words(query: str, codes: list[str]) -> None:
    assert found(query) == codes


def test_what_is_asked_for_exactly_comes_first() -> None:
    codes = Vocabulary({"diagnosis": ("icd9:4", "icd9:42", "icd10:42")}, {}).search("42", None, 9)
    assert [one.system for one in codes] == ["icd10", "icd9"]
    codes = Vocabulary({"diagnosis": ("a:421", "b:42")}, {}).search("42", None, 9)
    assert [one.code for one in codes] == ["42", "421"]


def test_kind_and_limit() -> None:
    assert found("428", "procedure") == ["icd9:4281"]
    assert found("428", limit=2) == ["icd9:4280", "icd9:42830"]
    assert len(found("")) == 9
    assert found("", "medication") == ["atc:C03C", "atc:C03D"]
    [one] = VOCABULARY.search("i50", "diagnosis", 5)
    assert (one.kind, one.system, one.code, one.name) == (
        "diagnosis",
        "icd10",
        "I50",
        "Heart failure",
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(max_size=20))
def test_any_query_gets_an_answer(query: str) -> None:
    assert len(found(query, limit=3)) <= 3
