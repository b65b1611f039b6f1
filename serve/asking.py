"""What is asked, as the encoder takes it, read from the bytes of a request.

A request that is well formed is read here in a third of the time that FastAPI takes: with the
limits of serve/schema.py, but into plain lists rather than objects, and without Python code for
each code. Whatever is not read here, be it wrong or merely unusual, is left to the schema, which
says what is wrong.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, SchemaValidator, core_schema

from serve.schema import (
    MAX_AGE,
    MAX_ALLERGIES,
    MAX_CODE_LENGTH,
    MAX_CODES,
    MAX_CODES_OF_REQUEST,
    MAX_EXPLAINED_PATIENTS,
    MAX_OBJECTS,
    MAX_PATIENTS,
    MAX_SYSTEM_LENGTH,
    MAX_VALUE,
    MAX_VISITS,
    MAX_VISITS_OF_REQUEST,
    ATCPrefix,
    Code,
    Options,
    RecommendRequest,
)

#: A laboratory item and its value.
Measured = tuple[str, float]

_FIELDS = ("diagnoses", "procedures", "medications")


class AskedCodes(NamedTuple):
    """A list of codes: the systems and, as many, the codes."""

    systems: list[str]
    codes: list[str]


class AskedVisit(NamedTuple):
    """One visit: the codes of the three kinds, and items with their values."""

    codes: tuple[AskedCodes, AskedCodes, AskedCodes]
    laboratory: list[Measured]


class AskedPatient(NamedTuple):
    """One patient; see schema.Patient."""

    visits: list[AskedVisit]
    sex: str
    age: float | None
    allergies: Sequence[str]


class Asked(NamedTuple):
    """A request.

    Attributes:
        patients: at least one.
        options: for all of them.
        num_codes: codes and laboratory values of all patients.
        request: gives the same as the schema has it.
    """

    patients: list[AskedPatient]
    options: Options
    num_codes: int
    request: Callable[[], RecommendRequest]


def of_request(request: RecommendRequest) -> Asked:
    """What a request of the schema asks."""
    patients = [
        AskedPatient(
            [
                AskedVisit(
                    (
                        _of_codes(visit.diagnoses),
                        _of_codes(visit.procedures),
                        _of_codes(visit.medications),
                    ),
                    [(one.item, one.value) for one in visit.laboratory],
                )
                for visit in patient.visits
            ],
            patient.sex,
            patient.age,
            patient.allergies,
        )
        for patient in request.patients
    ]
    num_codes = sum(visit.num_codes for patient in request.patients for visit in patient.visits)
    return Asked(patients, request.options, num_codes, lambda: request)


def read(body: bytes) -> Asked | None:
    """What a request asks, by its bytes; None where that is left to the schema.

    What this reads the schema reads too, and alike.
    """
    num_objects, num_colons = body.count(b"{"), body.count(b":")
    if num_objects > MAX_OBJECTS or num_colons > _MAX_FIELDS * num_objects:
        return None
    try:
        content = _READER.validate_json(body)
    except ValidationError:
        return None
    patients = content["patients"]
    options = content.get("options")
    visits = [visit for patient in patients for visit in patient["visits"]]
    num_codes = sum(len(listed) for visit in visits for listed in visit.values())
    # Every field has a colon, those among them that are given twice, of which only one was kept.
    num_fields = len(content) + (len(options.model_fields_set) if options else 0)
    num_fields += sum(map(len, patients)) + sum(map(len, visits)) + 2 * num_codes
    if num_colons != num_fields:
        return None
    if len(visits) > MAX_VISITS_OF_REQUEST or num_codes > MAX_CODES_OF_REQUEST:
        return None
    if options is None:
        options = _NO_OPTIONS
    elif options.explain and len(patients) > MAX_EXPLAINED_PATIENTS:
        return None
    request = functools.partial(RecommendRequest.model_validate_json, body)
    return Asked(list(map(_patient, patients)), options, num_codes, request)


def _patient(given: Mapping[str, Any]) -> AskedPatient:
    visits = [
        AskedVisit(
            (
                _codes(visit.get("diagnoses")),
                _codes(visit.get("procedures")),
                _codes(visit.get("medications")),
            ),
            list(map(_MEASURED, visit.get("laboratory", ()))),
        )
        for visit in given["visits"]
    ]
    get = given.get
    return AskedPatient(visits, get("sex", "unknown"), get("age"), get("allergies", []))


def _codes(given: Sequence[Mapping[str, str]] | None) -> AskedCodes:
    return AskedCodes(list(map(_SYSTEM, given)), list(map(_CODE, given))) if given else _NO_CODES


def _of_codes(given: Sequence[Code]) -> AskedCodes:
    return AskedCodes([one.system for one in given], [one.code for one in given])


_SYSTEM: Callable[[Mapping[str, str]], str] = itemgetter("system")
_CODE: Callable[[Mapping[str, str]], str] = itemgetter("code")
_MEASURED: Callable[[Mapping[str, Any]], Measured] = itemgetter("item", "value")
_NO_CODES = AskedCodes([], [])
_NO_OPTIONS = Options()
#: Of an object: as many has a patient, and a visit. Each one too many would get a message.
_MAX_FIELDS = 4
_SAYS_SOMETHING = r"[^. \t\r\n]"  # as schema's check that a text is not blank


def _object(required: Mapping[str, CoreSchema], **optional: CoreSchema) -> CoreSchema:
    """A JSON object as a dict, without fields of any other name."""
    fields = {name: core_schema.typed_dict_field(of) for name, of in required.items()}
    for name, of in optional.items():
        fields[name] = core_schema.typed_dict_field(of, required=False)
    return core_schema.typed_dict_schema(fields, extra_behavior="forbid", strict=True)


def _text(max_length: int) -> CoreSchema:
    return core_schema.str_schema(max_length=max_length, pattern=_SAYS_SOMETHING, strict=True)


def _list(of: CoreSchema, max_length: int, min_length: int = 0) -> CoreSchema:
    return core_schema.list_schema(
        of, min_length=min_length, max_length=max_length, fail_fast=True, strict=True
    )


def _number(low: float, high: float) -> CoreSchema:
    return core_schema.float_schema(ge=low, le=high, allow_inf_nan=False, strict=True)


def _reader() -> SchemaValidator:
    """Reads a RecommendRequest into dicts and lists."""
    codes = _list(
        _object({"system": _text(MAX_SYSTEM_LENGTH), "code": _text(MAX_CODE_LENGTH)}), MAX_CODES
    )
    value = _number(-MAX_VALUE, MAX_VALUE)
    measured = _list(_object({"item": _text(MAX_CODE_LENGTH), "value": value}), MAX_CODES)
    visit = _object({}, **dict.fromkeys(_FIELDS, codes), laboratory=measured)
    allergy = TypeAdapter[str](ATCPrefix, config=ConfigDict(strict=True)).core_schema
    patient = _object(
        {"visits": _list(visit, MAX_VISITS, min_length=1)},
        sex=core_schema.literal_schema(["female", "male", "unknown"]),
        age=core_schema.nullable_schema(_number(0, MAX_AGE)),
        allergies=_list(allergy, MAX_ALLERGIES),
    )
    request = _object(
        {"patients": _list(patient, MAX_PATIENTS, min_length=1)},
        options=Options.__pydantic_core_schema__,
    )
    return SchemaValidator(request)


_READER = _reader()
