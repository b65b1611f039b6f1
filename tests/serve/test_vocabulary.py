import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.answers import KnownCode
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


NAMES = {"x:ab": "A ab", "y:ab": "B b a", "x:aba": "ba  ab b", "x:b": "", "z:a b": "ABA bab a"}
KNOWN = {"diagnosis": tuple(NAMES), "laboratory": ("x:ab",)}
NAMED = Vocabulary(KNOWN, {"diagnosis": NAMES})


def plainly_found(query: str) -> list[KnownCode]:
    """What is to be found, as it is defined: code by code and word by word."""
    start = "".join(query.replace(".", "").split()).casefold()
    ranked: list[tuple[int, KnownCode]] = []
    for kind, names in (("diagnosis", NAMES), ("laboratory", {"x:ab": None})):
        for full in sorted(names):
            system, _, code = full.partition(":")
            words = (names[full] or "").casefold().split()
            answer = KnownCode(kind, system, code, names[full])  # type: ignore[arg-type]
            if start in (code, full):
                ranked.append((0, answer))
            elif code.startswith(start) or full.startswith(start):
                ranked.append((1, answer))
            elif all(any(word.startswith(one) for word in words) for one in query.lower().split()):
                ranked.append((2, answer))
    return [answer for _, answer in sorted(ranked, key=lambda one: one[0])]


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(st.text("abAx:. \n", max_size=8))
def test_what_is_found_is_what_is_said_to_be(query: str) -> None:
    assert NAMED.search(query, None, 99) == plainly_found(query)


def test_many_words_take_no_longer_than_a_few() -> None:
    """Processor time, because the event loop answers nobody meanwhile."""
    phrase = "abnormal blood count disorder of every finding given high in joint"
    names = {f"icd9:{i:05d}": phrase for i in range(10_000)}
    vocabulary = Vocabulary({"diagnosis": tuple(names)}, {"diagnosis": names})

    def took_s(query: str) -> float:
        times = []
        for _ in range(5):
            started = time.thread_time()
            assert vocabulary.search(query, None, 20) == []
            times.append(time.thread_time() - started)
        return min(times)

    few = took_s("bloo zz")
    assert took_s("b " * 49 + "z") < 2 * few  # with each of the words looked for, 3 to 12 times
