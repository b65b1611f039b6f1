"""Tables of patients are encoded as requests are, and what is wrong is told by column and row."""

import dataclasses
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cafemed.bundle import Bundle, Preprocessing
from cafemed.cohort import SEXES
from cafemed.errors import DataError
from serve.encoding import EncodedPatient, Encoder
from serve.patient_tables import TableReader
from serve.schema import MAX_CODES, MAX_CODES_OF_REQUEST, MAX_VISITS, Patient, RecommendRequest

CODE = pa.struct([("system", pa.string()), ("code", pa.string())])
MEASURED = pa.struct([("item", pa.string()), ("value", pa.float64())])
VISIT = pa.struct(
    [
        ("diagnoses", pa.list_(CODE)),
        ("procedures", pa.list_(CODE)),
        ("medications", pa.list_(CODE)),
        ("laboratory", pa.list_(MEASURED)),
    ]
)
SCHEMA = pa.schema(
    [
        ("patient", pa.string()),
        ("sex", pa.string()),
        ("age", pa.float64()),
        ("visits", pa.list_(VISIT)),
    ]
)


def table(*patients: dict[str, Any]) -> pa.Table:
    rows = [{"patient": f"p{i}", **patient} for i, patient in enumerate(patients)]
    return pa.Table.from_pylist(rows, SCHEMA)


def reader(bundle: Bundle, preprocessing: Preprocessing | None = None) -> TableReader:
    preprocessing = preprocessing or bundle.preprocessing
    encoder = Encoder(bundle.vocabularies, preprocessing)
    found = TableReader(encoder, preprocessing, "patients.parquet")
    found.require_schema(SCHEMA)
    return found


def assert_as_requested(bundle: Bundle, patients: list[dict[str, Any]], inputs: str) -> None:
    """Compares with the encoding of a request with the same patients."""
    preprocessing = dataclasses.replace(bundle.preprocessing, inputs=inputs)
    found = reader(bundle, preprocessing).read(table(*patients), 1)
    plain = [{k: v for k, v in patient.items() if v is not None} for patient in patients]
    for patient in plain:
        patient["visits"] = [
            {k: v for k, v in visit.items() if v is not None} for visit in patient["visits"]
        ]
    request = RecommendRequest.model_validate({"patients": plain})
    expected = Encoder(bundle.vocabularies, preprocessing).encode(request)
    assert found.unknown.tolist() == [len(patient.unknown) for patient in expected]
    assert found.unknown_share.tolist() == [patient.unknown_share for patient in expected]
    for p, one in enumerate(expected):
        got: EncodedPatient = found[p]
        assert got.known == one.known
        assert got.sex == one.sex
        np.testing.assert_equal(got.age, float(np.float32(one.age)))  # NaN is NaN
        assert [[i for i, _ in v] for v in got.laboratory] == [
            [i for i, _ in v] for v in one.laboratory
        ]
        for ours, theirs in zip(got.laboratory, one.laboratory, strict=True):
            assert [v for _, v in ours] == [float(np.float32(v)) for _, v in theirs]


CODES = st.builds(
    lambda system, code: {"system": system, "code": code},
    st.sampled_from(["icd9", "ICD9 ", "icd10"]),
    st.sampled_from(["401.0", "4011", " 4012", "40.15", "i10", "990", "99.1", "V99", "nothing"]),
)
DRUGS = st.builds(
    lambda code: {"system": "atc", "code": code},
    st.sampled_from(["A01B", "a01b", "A01BC05", "B02BX", "C03B", "N01B", "Z99Z"]),
)
VALUES = st.builds(
    lambda item, value: {"item": item, "value": value},
    st.sampled_from(["50801", "50803", " 50802", "99999"]),
    st.sampled_from([-1.5, 0.0, 7.4, 1e9]),
)
VISITS = st.fixed_dictionaries(
    {
        "diagnoses": st.none() | st.lists(CODES, max_size=5),
        "procedures": st.none() | st.lists(CODES, max_size=3),
        "medications": st.none() | st.lists(DRUGS, max_size=5),
        "laboratory": st.none() | st.lists(VALUES, max_size=4),
    }
)
PATIENTS = st.fixed_dictionaries(
    {
        "sex": st.sampled_from([None, "female", "male", "unknown"]),
        "age": st.sampled_from([None, 0.0, 71.3, 130.0]),
        "visits": st.lists(VISITS, min_size=1, max_size=4),
    }
)


@settings(deadline=None, max_examples=60)
@given(
    patients=st.lists(PATIENTS, min_size=1, max_size=4),
    inputs=st.sampled_from(["current", "history"]),
)
def test_rows_are_encoded_as_a_request_is(
    served_reading_all: Bundle, patients: list[dict[str, Any]], inputs: str
):
    assert_as_requested(served_reading_all, patients, inputs)


def test_columns_and_fields_may_be_left_out_and_of_other_types(served: Bundle):
    code = pa.struct(
        [("code", pa.large_string()), ("system", pa.dictionary(pa.int32(), pa.string()))]
    )
    visit = pa.struct([("diagnoses", pa.large_list(code))])
    rows = [
        {"patient": 7, "visits": [{"diagnoses": [{"system": "icd9", "code": "401.3"}]}]},
        {"patient": 9, "visits": [{"diagnoses": []}, {"diagnoses": None}]},
    ]
    schema = pa.schema([("patient", pa.int32()), ("visits", pa.large_list(visit))])
    found = reader(served)
    found.require_schema(schema)
    patients = found.read(pa.Table.from_pylist(rows, schema), 1)
    assert patients[0].known == (((3,),), ((),), ((),))
    assert patients[1].known == (((), ()), ((), ()), ((), ()))
    assert (patients[0].sex, math.isnan(patients[0].age)) == (SEXES.index("unknown"), True)


def test_slices_of_a_table_are_encoded_as_the_rows_they_are(served: Bundle):
    code = {"system": "icd9", "code": "4010"}
    rows = [{"age": float(i), "visits": [{"diagnoses": [code] * (i % 3)}] * i} for i in range(1, 9)]
    whole = reader(served).read(table(*rows), 1)
    for start in (0, 3, 7):
        part = reader(served).read(table(*rows).slice(start, 2), start + 1)
        for p in range(len(part)):
            assert part[p].known == whole[start + p].known
            assert part[p].age == whole[start + p].age


GOOD = {"visits": [{"diagnoses": [{"system": "icd9", "code": "4010"}]}]}


def test_a_patient_has_at_most_the_codes_of_a_request(served: Bundle) -> None:
    """Of one patient: others in the table do not count, as they are asked about apart."""
    full = {"diagnoses": [{"system": "icd9", "code": "4010"}] * 64}
    full |= {"laboratory": [{"item": "50801", "value": 1.0}] * 64}
    most = MAX_CODES_OF_REQUEST // 128
    rows = [{"visits": [full] * most}, {"visits": [full] * most}]
    assert len(reader(served).read(table(*rows), 1)) == 2
    rows[1]["visits"] = [*rows[1]["visits"][1:], {**full, "procedures": full["diagnoses"][:1]}]
    patient = Patient.model_validate(rows[1])
    with pytest.raises(ValidationError, match="codes and laboratory values"):
        RecommendRequest(patients=[patient])
    message = f"row 8: column visits: more than {MAX_CODES_OF_REQUEST} codes and laboratory values"
    with pytest.raises(DataError, match=message):
        reader(served).read(table(*rows), 7)


def having(**visit: Any) -> dict[str, Any]:
    return {"visits": [{}, visit]}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"visits": []}, "visits: expected at least one visit"),
        ({"visits": None}, "visits: expected at least one visit"),
        ({"visits": [None]}, "visits: expected a visit, got none"),
        ({"visits": [{}] * (MAX_VISITS + 1)}, "visits: more than 256 visits"),
        ({**GOOD, "patient": None}, "patient: expected a value"),
        ({**GOOD, "sex": "SECRET"}, "sex: expected one of"),
        ({**GOOD, "age": -1.0}, "age: expected years from 0 to 130"),
        ({**GOOD, "age": 131.0}, "age: expected years from 0 to 130"),
        ({**GOOD, "age": math.inf}, "age: expected years from 0 to 130"),
        (having(diagnoses=[None]), "visits.diagnoses: expected an entry"),
        (
            having(diagnoses=[{"system": "SECRET", "code": "1"}]),
            "visits.diagnoses: unknown code system; expected one of icd10, icd9",
        ),
        (having(procedures=[{"system": None, "code": "1"}]), "visits.procedures: expected a text"),
        (
            having(procedures=[{"system": "icd9", "code": None}]),
            "visits.procedures: expected a text",
        ),
        (
            having(procedures=[{"system": "icd9", "code": " . "}]),
            "visits.procedures: .*blanks",
        ),
        (
            having(medications=[{"system": "atc", "code": "S" * 65}]),
            "visits.medications: .*at most 64",
        ),
        (
            having(diagnoses=[{"system": "icd9", "code": "1"}] * (MAX_CODES + 1)),
            "visits.diagnoses: more than 128 in one visit",
        ),
        (having(laboratory=[{"item": "1", "value": None}]), "visits.laboratory.value: expected"),
        (
            having(laboratory=[{"item": "1", "value": math.nan}]),
            "visits.laboratory.value: expected",
        ),
        (having(laboratory=[{"item": "1", "value": 1e13}]), "visits.laboratory.value: expected"),
        (having(laboratory=[{"item": "", "value": 1.0}]), "visits.laboratory: .*at least 1"),
    ],
)
def test_a_bad_row_is_named_and_its_content_is_not(
    served: Bundle, bad: dict[str, Any], message: str
):
    with pytest.raises(DataError, match=f"^patients.parquet: row 102: column {message}") as told:
        reader(served).read(table(GOOD, bad, GOOD), 101)
    assert "\n" not in str(told.value)
    assert "SECRET" not in str(told.value)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (SCHEMA.remove(0), "column patient: the table has no such column"),
        (SCHEMA.remove(3), "column visits: the table has no such column"),
        (SCHEMA.append(pa.field("allergies", pa.list_(pa.string()))), "column allergies: unknown"),
        (SCHEMA.set(0, pa.field("patient", pa.float64())), "column patient: expected strings or"),
        (SCHEMA.set(1, pa.field("sex", pa.int8())), "column sex: expected strings, got int8"),
        (SCHEMA.set(2, pa.field("age", pa.string())), "column age: expected numbers, got string"),
        (
            SCHEMA.set(3, pa.field("visits", pa.string())),
            "column visits: expected lists of",
        ),
        (SCHEMA.set(3, pa.field("visits", pa.list_(CODE))), "column visits.system: unknown field"),
        (
            SCHEMA.set(
                3, pa.field("visits", pa.list_(pa.struct([("diagnoses", pa.list_(pa.string()))])))
            ),
            "column visits.diagnoses: expected lists of structs of system and code",
        ),
        (
            SCHEMA.set(
                3,
                pa.field(
                    "visits",
                    pa.list_(
                        pa.struct(
                            [
                                (
                                    "laboratory",
                                    pa.list_(
                                        pa.struct([("item", pa.string()), ("value", pa.string())])
                                    ),
                                )
                            ]
                        )
                    ),
                ),
            ),
            "column visits.laboratory.value: expected numbers, got string",
        ),
    ],
)
def test_another_schema_is_refused_by_column(served: Bundle, schema: pa.Schema, message: str):
    with pytest.raises(DataError, match=f"^patients.parquet: {message}") as told:
        reader(served).require_schema(schema)
    assert "\n" not in str(told.value)
