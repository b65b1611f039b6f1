"""What is asked, as the encoder takes it, read from the bytes of a request.

A request that is well formed is read here in a fifth of the time that FastAPI takes: with the
limits of serve/schema.py, but by msgspec, and without Python code for each code. Whatever is not
read here, be it wrong or merely unusual, is left to the schema, which says what is wrong.
"""

import re
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import UNSET, Meta, UnsetType

from serve.schema import (
    MAX_AGE,
    MAX_ALLERGIES,
    MAX_ALLERGY_LENGTH,
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
    Code,
    Options,
    RecommendRequest,
    atc_prefix,
)

_Codes = Annotated[list["AskedCode"], Meta(max_length=MAX_CODES)]
_Values = Annotated[list["AskedValue"], Meta(max_length=MAX_CODES)]
_Age = Annotated[float, Meta(ge=0, le=MAX_AGE)]
_Allergies = Annotated[
    list[Annotated[str, Meta(max_length=MAX_ALLERGY_LENGTH)]], Meta(max_length=MAX_ALLERGIES)
]


class AskedCode(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    """See schema.Code."""

    system: Annotated[str, Meta(max_length=MAX_SYSTEM_LENGTH)]
    code: Annotated[str, Meta(max_length=MAX_CODE_LENGTH)]


class AskedValue(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    """See schema.LaboratoryValue."""

    item: Annotated[str, Meta(max_length=MAX_CODE_LENGTH)]
    value: Annotated[float, Meta(ge=-MAX_VALUE, le=MAX_VALUE)]


class AskedVisit(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    """See schema.Visit; a list that was not given is UNSET, which is false as an empty one is."""

    diagnoses: _Codes | UnsetType = UNSET
    procedures: _Codes | UnsetType = UNSET
    medications: _Codes | UnsetType = UNSET
    laboratory: _Values | UnsetType = UNSET


class AskedPatient(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    """See schema.Patient; what was not given is UNSET, and allergies are without dots."""

    visits: Annotated[list[AskedVisit], Meta(min_length=1, max_length=MAX_VISITS)]
    sex: Literal["female", "male", "unknown"] | UnsetType = UNSET
    age: _Age | UnsetType | None = UNSET
    allergies: _Allergies | UnsetType = UNSET


class Asked(NamedTuple):
    """A request.

    Attributes:
        patients: at least one.
        options: for all of them.
        num_codes: codes and laboratory values of all patients.
    """

    patients: list[AskedPatient]
    options: Options
    num_codes: int


def of_request(request: RecommendRequest) -> Asked:
    """What a request of the schema asks."""
    patients = [
        AskedPatient(
            [
                AskedVisit(
                    _of_codes(visit.diagnoses),
                    _of_codes(visit.procedures),
                    _of_codes(visit.medications),
                    [AskedValue(one.item, one.value) for one in visit.laboratory],
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
    return Asked(patients, request.options, num_codes)


def _of_codes(given: Sequence[Code]) -> list[AskedCode]:
    return [AskedCode(one.system, one.code) for one in given]


def read(body: bytes) -> Asked | None:
    """What a request asks, by its bytes; None where that is left to the schema.

    What this reads the schema reads too, and alike.
    """
    # Nothing is escaped, so that a string that says nothing shows.
    if body.count(b"{") > MAX_OBJECTS or b"\\" in body or _SAYS_NOTHING.search(body):
        return None
    try:
        content = _READER.decode(body)
        options, num_fields = _NO_OPTIONS, 1
        if content.options is not UNSET:
            options = Options.model_validate_json(bytes(content.options))
            num_fields += 1 + len(options.model_fields_set)
        for patient in content.patients:
            if patient.allergies:
                patient.allergies = list(map(atc_prefix, patient.allergies))
    except (ValueError, RecursionError):
        return None
    patients = content.patients
    num_visits = sum([len(patient.visits) for patient in patients])
    lists = [
        listed
        for patient in patients
        for visit in patient.visits
        for listed in (visit.diagnoses, visit.procedures, visit.medications, visit.laboratory)
        if listed is not UNSET
    ]
    num_codes = sum(map(len, lists))
    # Every field has a colon, those among them that are given twice, of which only one was kept.
    num_fields += len(lists) + 2 * num_codes
    for patient in patients:
        others = (patient.sex, patient.age, patient.allergies)
        num_fields += len(_PATIENT_FIELDS) - others.count(UNSET)
    if body.count(b":") != num_fields:
        return None
    if num_visits > MAX_VISITS_OF_REQUEST or num_codes > MAX_CODES_OF_REQUEST:
        return None
    if options.explain and len(patients) > MAX_EXPLAINED_PATIENTS:
        return None
    return Asked(patients, options, num_codes)


def packed(patients: Sequence[AskedPatient]) -> bytes:
    """Patients as bytes for another process, in 2 ms a megabyte or less.

    Python's pickle takes a hundred times as long for the schema's objects.
    """
    return _PACKER.encode(patients)


def unpacked(content: bytes) -> list[AskedPatient]:
    """The patients of `packed`."""
    return _UNPACKER.decode(content)


class _Request(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    patients: Annotated[list[AskedPatient], Meta(min_length=1, max_length=MAX_PATIENTS)]
    options: msgspec.Raw | UnsetType = UNSET


_READER = msgspec.json.Decoder(_Request)
_PACKER = msgspec.msgpack.Encoder()
_UNPACKER = msgspec.msgpack.Decoder(list[AskedPatient])
_PATIENT_FIELDS = AskedPatient.__struct_fields__
_NO_OPTIONS = Options()
#: A string that schema.py takes for blank, where none is escaped.
_SAYS_NOTHING = re.compile(rb'"[. \t\r\n]*+"')
