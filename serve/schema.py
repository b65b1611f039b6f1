"""What is asked of the endpoint and what it answers; limits are checked here, before any work.

A request holds patients, a patient holds visits in time order, a visit holds codes and perhaps
laboratory values. The last visit is the current one: medications are recommended for it from its
diagnoses, procedures and laboratory values and from the earlier visits. Nothing in a request
identifies a person, and unknown fields are refused, so that an identifier cannot slip in.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from cafemed.codes import LABORATORY_SYSTEM, normalise

MAX_PATIENTS = 256
MAX_VISITS = 256
MAX_CODES = 128
#: Visits of all patients of one request: bounds the work of a request, whatever its shape.
MAX_VISITS_OF_REQUEST = 4096
#: Patients of a request that asks for explanations, each of which takes the model once a code.
MAX_EXPLAINED_PATIENTS = 8
MAX_SYSTEM_LENGTH = 32
MAX_CODE_LENGTH = 64
MAX_AGE = 130.0
MAX_ALLERGIES = 64
#: Characters of the longest ATC code, that of a substance.
MAX_ALLERGY_LENGTH = 16
#: Largest size of a laboratory value, in whatever unit; single precision holds it.
MAX_VALUE = 1e12
#: Bytes of a request's body; 256 patients of the usual size need about one.
MAX_BODY_BYTES = 4 * 1024 * 1024
#: A request that is wrong throughout gets this many messages.
MAX_MESSAGES = 20
#: Medications named although their probability is below the threshold.
MAX_NEAR_MISSES = 5
#: Codes of one answer to a search.
MAX_CODES_FOUND = 100

Kind = Literal["diagnosis", "procedure", "medication", "laboratory"]


#: An ATC code or how one begins: J, J01, J01C, J01CA, J01CA04, and what lies between.
_ATC_PREFIX = re.compile(r"[A-Z](\d(\d([A-Z]([A-Z](\d\d?)?)?)?)?)?")


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


Codes = Annotated[list[Code], Field(max_length=MAX_CODES)]


def _atc_prefix(value: str) -> str:
    """An ATC prefix without dots, in capitals."""
    prefix = value.strip().replace(".", "").upper()
    if not _ATC_PREFIX.fullmatch(prefix):
        raise ValueError("expected an ATC code or its beginning, such as J01C or J01CA04")
    return prefix


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
    laboratory: Annotated[list[LaboratoryValue], Field(max_length=MAX_CODES)] = Field(
        default=[],
        description="the first value of each item since admission; of an item listed again the "
        "first counts",
    )


class Patient(_Asked):
    """A patient's visits, the earliest first and the current one last."""

    visits: Annotated[list[Visit], Field(min_length=1, max_length=MAX_VISITS)]
    sex: Literal["female", "male", "unknown"] = "unknown"
    age: Annotated[float, Field(ge=0, le=MAX_AGE)] | None = Field(
        default=None, description="years at the current visit"
    )
    allergies: Annotated[
        list[Annotated[str, Field(max_length=MAX_ALLERGY_LENGTH)]], Field(max_length=MAX_ALLERGIES)
    ] = Field(
        default=[],
        description="ATC codes or their beginnings, which must not be recommended; one that is "
        "finer than the model's classes leaves out the whole class that holds it",
        examples=[["J01C"]],
    )

    @field_validator("allergies")
    @classmethod
    def _are_prefixes(cls, allergies: list[str]) -> list[str]:
        return [_atc_prefix(value) for value in allergies]


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

    patients: Annotated[list[Patient], Field(min_length=1, max_length=MAX_PATIENTS)]
    options: Options = Options()

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})

    @field_validator("patients")
    @classmethod
    def _bounded(cls, patients: list[Patient]) -> list[Patient]:
        visits = sum(len(patient.visits) for patient in patients)
        if visits > MAX_VISITS_OF_REQUEST:
            raise ValueError(
                f"{visits} visits together, at most {MAX_VISITS_OF_REQUEST} in one request"
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


class GraphPath(BaseModel):
    """How the causal graph leads from a code to a medication."""

    nodes: list[str] = Field(examples=[["diagnosis/icd9:4280", "medication/atc:C03C"]])
    directed: bool = Field(description="false: some edges have no direction that the data tell")
    stability: float | None = Field(
        description="the least of its edges' stability; null where no bootstraps were run"
    )


class Influence(BaseModel):
    """What one code of the patient did to one medication."""

    visit: int = Field(description="position in the patient's visits, from 0")
    kind: Kind
    code: str = Field(examples=["icd9:4280"])
    name: str | None = Field(description="null where the model has no name for it")
    effect: float | None = Field(description="causal effect on the medication, of the causal graph")
    standard_error: float | None = Field(description="of the effect")
    score_without: float = Field(description="the medication's probability without this code")
    change: float = Field(description="probability with the code minus probability without it")
    path: GraphPath | None = Field(description="what links the two in the causal graph")


class Explanation(BaseModel):
    """What raised and lowered the probability of a medication."""

    raised: list[Influence]
    lowered: list[Influence]


class Explained(BaseModel):
    """How much of a patient an explanation covers."""

    explained: int = Field(description="codes that were left out one at a time")
    given: int = Field(description="codes that the model was given")
    effect_estimator: str = Field(description="how the causal effects were estimated")


class Scored(BaseModel):
    """A medication with its calibrated probability."""

    system: str = Field(examples=["atc"])
    code: str = Field(examples=["C03C"])
    name: str | None = Field(description="null where the model has no name for it")
    probability: float = Field(description="that the medication is given at the current visit")


class Medication(Scored):
    """A recommended medication."""

    explanation: Explanation | None = Field(default=None, description="null unless asked for")


class NearMiss(Scored):
    """A medication just below the threshold."""


class Interaction(BaseModel):
    """Two recommended medications that interact."""

    first: str = Field(examples=["atc:B01A"])
    second: str = Field(examples=["atc:N02B"])


class InteractionWithTaken(BaseModel):
    """A recommended medication that interacts with one the patient already takes."""

    recommended: str = Field(examples=["atc:B01A"])
    taken: str = Field(examples=["atc:N02B"])


class LeftOut(Scored):
    """A medication that reaches the threshold and yet is not recommended."""

    reason: Literal["allergy", "max_ddi_rate", "top_k"]
    pairs: list[Interaction] = Field(
        description="where the reason is max_ddi_rate: its interactions with what is recommended"
    )
    allergy: str | None = Field(description="the ATC prefix of the allergies that it falls under")


class UnknownCode(BaseModel):
    """A code or laboratory item that the model does not know; it did not influence the answer."""

    visit: int = Field(description="position in the patient's visits, from 0")
    kind: Kind
    code: str = Field(description="as it was looked up", examples=["icd9:V9999"])


class ModelName(BaseModel):
    """Which model answered."""

    name: str = Field(examples=["cafemed"])
    version: int = Field(description="of the registry", examples=[3])


class Recommendation(BaseModel):
    """The answer for one patient."""

    medications: list[Medication] = Field(description="the most probable first")
    interactions: list[Interaction] = Field(description="among the recommended medications")
    interactions_with_taken: list[InteractionWithTaken] = Field(
        description="with the medications of the current visit or, where it gives none, of the "
        "visit before; those recommended again are under `interactions`"
    )
    ddi_rate: float = Field(
        description="interacting pairs / pairs of the recommended medications; 0 where there are "
        "fewer than two"
    )
    left_out: list[LeftOut] = Field(
        description="probable enough, but left out because of an allergy or an option; the most "
        "probable first"
    )
    optimal: bool | None = Field(
        description="whether no other choice under max_ddi_rate is better; false: the search was "
        "cut short, and the choice keeps to the rate but may not be the best; null without "
        "max_ddi_rate"
    )
    near_misses: list[NearMiss] = Field(
        description=f"at most {MAX_NEAR_MISSES} below the threshold, the most probable first; "
        "none that falls under an allergy"
    )
    explained_codes: Explained | None = Field(default=None, description="null unless asked for")
    unknown_codes: list[UnknownCode] = Field(
        description="ignored; interactions of an unknown medication cannot be known either"
    )


class RecommendResponse(BaseModel):
    """The answer to a request: one recommendation a patient, in the order of the request."""

    request_id: str
    model: ModelName
    recommendations: list[Recommendation]


class KnownCode(BaseModel):
    """A code of the model's vocabulary."""

    kind: Kind
    system: str = Field(examples=["icd9"])
    code: str = Field(examples=["4280"])
    name: str | None = Field(description="null where the model has no name for it")


class CodesFound(BaseModel):
    """What a search of the vocabulary found."""

    codes: list[KnownCode]


class ModelCard(BaseModel):
    """What is served: enough to judge an answer by, nothing about any patient."""

    name: str
    version: int
    intended_use: str
    options: dict[str, Any]
    threshold: float = Field(description="medications with at least this probability are returned")
    inputs: Literal["current", "history"] = Field(
        description="current: the current visit's diagnoses and procedures are used; "
        "history: only those of earlier visits"
    )
    num_diagnoses: int
    num_procedures: int
    num_medications: int
    code_systems: dict[str, list[str]] = Field(description="kind → systems the model knows")
    laboratory_items: list[str] = Field(
        description="items whose values are used", examples=[["lab:50912"]]
    )
    metrics: dict[str, Any] = Field(description="as measured when the model was made")
    fingerprint: str = Field(description="of the bundle's inputs and configuration")


class Health(BaseModel):
    """A replica answers."""

    status: Literal["ok"]


class Ready(Health):
    """A replica can recommend."""

    model: ModelName


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
