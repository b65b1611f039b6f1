"""What is asked of the endpoint; limits are checked here, before any work.

A request holds patients, a patient holds visits in time order, a visit holds codes and perhaps
laboratory values. The last visit is the current one: medications are recommended for it from its
diagnoses, procedures and laboratory values and from the earlier visits. Nothing in a request
identifies a person, and unknown fields are refused, so that an identifier cannot slip in.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from cafemed.codes import LABORATORY_SYSTEM, normalise

MAX_PATIENTS = 256
MAX_VISITS = 256
MAX_CODES = 128
#: Visits of all patients of one request: bounds the work of a request, whatever its shape.
MAX_VISITS_OF_REQUEST = 4096
#: Codes and laboratory values of all of them: 256 patients with four visits of 32 each.
MAX_CODES_OF_REQUEST = 32_768
#: Objects of one body, which are counted before any is made; no valid body has more.
MAX_OBJECTS = MAX_CODES_OF_REQUEST + MAX_VISITS_OF_REQUEST + MAX_PATIENTS + 2
#: Patients of a request that asks for explanations, each of which takes the model once a code.
MAX_EXPLAINED_PATIENTS = 8
MAX_SYSTEM_LENGTH = 32
MAX_CODE_LENGTH = 64
MAX_AGE = 130.0
MAX_ALLERGIES = 64
#: Characters of an ATC code, with dots and blanks; the longest has seven of its own.
MAX_ALLERGY_LENGTH = 16
#: Largest size of a laboratory value, in whatever unit; single precision holds it.
MAX_VALUE = 1e12
#: Bytes of a request's body; 256 patients of the usual size need about one.
MAX_BODY_BYTES = 4 * 1024 * 1024
#: A request that is wrong throughout gets this many messages.
MAX_MESSAGES = 20
#: Codes of one answer to a search.
MAX_CODES_FOUND = 100
MAX_QUERY_LENGTH = 100


#: An ATC code or how one begins: J, J01, J01C, J01CA, J01CA04, and what lies between.
_ATC_PREFIX = re.compile(r"[A-Z]([0-9]([0-9]([A-Z]([A-Z]([0-9][0-9]?)?)?)?)?)?")


class _Asked(BaseModel):
    # strict: "71" is not an age. Unknown fields are refused.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _not_blank(value: str) -> str:
    if not value.strip(". \t\r\n"):
        raise ValueError("holds only blanks and dots")
    return value


class Code(_Asked):
    """A code of a code system; dots and case do not matter."""

    system: Annotated[
        str,
        Field(
            min_length=1,
            max_length=MAX_SYSTEM_LENGTH,
            description="icd9, icd10, atc, or the name that the data source gave its own codes",
            examples=["icd9"],
        ),
    ]
    code: Annotated[str, Field(min_length=1, max_length=MAX_CODE_LENGTH, examples=["428.0"])]

    @field_validator("system", "code")
    @classmethod
    def _says_something(cls, value: str) -> str:
        return _not_blank(value)

    def normalised(self) -> str:
        """The code as vocabularies write it, "icd9:4280"."""
        return normalise(self.system, self.code)


# fail_fast: of a list, the first wrong one is told of. All of a hostile body would take a replica
# many seconds and gigabytes.
Codes = Annotated[list[Code], Field(max_length=MAX_CODES, fail_fast=True)]


def atc_prefix(value: str) -> str:
    """An ATC prefix without dots, in capitals; ValueError if it is none."""
    prefix = value.strip().replace(".", "").upper()
    if not _ATC_PREFIX.fullmatch(prefix):
        raise ValueError("expected an ATC code or its beginning, such as J01C or J01CA04")
    return prefix


ATCPrefix = Annotated[str, Field(max_length=MAX_ALLERGY_LENGTH), AfterValidator(atc_prefix)]


class LaboratoryValue(_Asked):
    """What was measured; dots and case of the item do not matter."""

    item: Annotated[
        str,
        Field(
            min_length=1,
            max_length=MAX_CODE_LENGTH,
            description="as the data source names it",
            examples=["50912"],
        ),
    ]
    value: Annotated[float, Field(ge=-MAX_VALUE, le=MAX_VALUE, examples=[1.2])] = Field(
        description="in the unit that the data source has"
    )

    @field_validator("item")
    @classmethod
    def _names_something(cls, value: str) -> str:
        return _not_blank(value)

    def normalised(self) -> str:
        """The item as vocabularies write it, "lab:50912"."""
        return normalise(LABORATORY_SYSTEM, self.item)


class Visit(_Asked):
    """One hospital stay."""

    diagnoses: Codes = Field(default=[], description="by priority, the first the principal one")
    procedures: Codes = Field(default=[], description="by priority")
    medications: Codes = Field(
        default=[],
        description="ATC codes by first start; of the current visit: what the patient already "
        "takes, used only to find interactions",
    )
    laboratory: Annotated[list[LaboratoryValue], Field(max_length=MAX_CODES, fail_fast=True)] = (
        Field(
            default=[],
            description="the first value of each item since admission; of an item listed again the "
            "first counts",
        )
    )

    @property
    def num_codes(self) -> int:
        """Codes and laboratory values."""
        lists = (self.diagnoses, self.procedures, self.medications, self.laboratory)
        return sum(len(one) for one in lists)


class Patient(_Asked):
    """A patient's visits, the earliest first and the current one last."""

    visits: Annotated[list[Visit], Field(min_length=1, max_length=MAX_VISITS, fail_fast=True)]
    sex: Literal["female", "male", "unknown"] = "unknown"
    age: Annotated[float, Field(ge=0, le=MAX_AGE)] | None = Field(
        default=None, description="years at the current visit"
    )
    allergies: Annotated[list[ATCPrefix], Field(max_length=MAX_ALLERGIES, fail_fast=True)] = Field(
        default=[],
        description="ATC codes or their beginnings, which must not be recommended; one that is "
        "finer than the model's classes leaves out the whole class that holds it",
        examples=[["J01C"]],
    )


class Options(_Asked):
    """How to answer, for every patient of the request."""

    max_ddi_rate: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None,
        description="at most this share of the pairs of recommended medications may interact",
    )
    top_k: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="recommend at most so many medications"
    )
    explain: bool = Field(default=False, description="say what raised and lowered each medication")


_EXAMPLE: dict[str, Any] = {
    "patients": [
        {
            "sex": "female",
            "age": 71,
            "visits": [
                {
                    "diagnoses": [{"system": "icd9", "code": "428.0"}],
                    "medications": [{"system": "atc", "code": "C03CA01"}],
                },
                {
                    "diagnoses": [
                        {"system": "icd9", "code": "428.0"},
                        {"system": "icd9", "code": "427.31"},
                    ],
                    "procedures": [{"system": "icd9", "code": "99.61"}],
                    "laboratory": [{"item": "50912", "value": 1.4}],
                },
            ],
        }
    ]
}


class RecommendRequest(_Asked):
    """One patient or a batch."""

    patients: Annotated[list[Patient], Field(min_length=1, max_length=MAX_PATIENTS, fail_fast=True)]
    options: Options = Field(default_factory=Options)

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})

    @field_validator("patients")
    @classmethod
    def _bounded(cls, patients: list[Patient]) -> list[Patient]:
        visits = sum(len(patient.visits) for patient in patients)
        if visits > MAX_VISITS_OF_REQUEST:
            raise ValueError(
                f"{visits} visits together, at most {MAX_VISITS_OF_REQUEST} in one request"
            )
        codes = sum(visit.num_codes for patient in patients for visit in patient.visits)
        if codes > MAX_CODES_OF_REQUEST:
            raise ValueError(
                f"{codes} codes and laboratory values together, at most {MAX_CODES_OF_REQUEST} in "
                "one request"
            )
        return patients

    @field_validator("options")
    @classmethod
    def _explains_few(cls, options: Options, info: ValidationInfo) -> Options:
        number = len(info.data.get("patients", ()))
        if options.explain and number > MAX_EXPLAINED_PATIENTS:
            raise ValueError(
                f"explain is for at most {MAX_EXPLAINED_PATIENTS} patients in one request, not "
                f"{number}"
            )
        return options


class FieldProblem(BaseModel):
    """What is wrong with one field of a request."""

    field: str = Field(examples=["patients[0].visits[1].diagnoses[0].code"])
    message: str


class Problem(BaseModel):
    """The answer to a request that could not be served."""

    message: str
    problems: list[FieldProblem] = []
    request_id: str


def field_path(location: tuple[str | int, ...]) -> str:
    """Writes a place in a request as a user would: `patients[0].visits[1].age`."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.removeprefix(".")
