"""What the endpoint answers.

The parts of an answer are dataclasses: they are made from the recommender's own values, by the
thousand, and need no check. Annotations document them in the OpenAPI document.
"""

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

#: Medications named although their probability is below the threshold.
MAX_NEAR_MISSES = 5

Kind = Literal["diagnosis", "procedure", "medication", "laboratory"]

_Name = Annotated[str | None, Field(description="null where the model has no name for it")]


@dataclasses.dataclass(slots=True)
class GraphPath:
    """How the causal graph leads from a code to a medication."""

    nodes: Annotated[
        list[str],
        Field(
            description="of a shortest path; it may lead over codes that the patient does not have",
            examples=[["diagnosis/icd9:4280", "medication/atc:C03C"]],
        ),
    ]
    directed: Annotated[
        bool, Field(description="false: some edges have no direction that the data tell")
    ]
    stability: Annotated[
        float | None,
        Field(description="the least of its edges' stability; null where no bootstraps were run"),
    ]


@dataclasses.dataclass(slots=True)
class Influence:
    """What one code of the patient did to one medication."""

    visit: Annotated[int, Field(description="position in the patient's visits, from 0")]
    kind: Kind
    code: Annotated[str, Field(examples=["icd9:4280"])]
    name: _Name
    effect: Annotated[
        float | None,
        Field(
            description="how much more likely the medication is in a visit with the code, for an "
            "earlier medication in a visit after one at which it was given, by the effect table of "
            "the causal graph; null for codes that are not known at the current visit (of earlier "
            "medications, those of the visit just before it are), where visits were too few, and "
            "for all earlier medications by a model published before there were effects of them"
        ),
    ]
    standard_error: Annotated[
        float | None, Field(description="of the effect, from the visits it was estimated on")
    ]
    score_without: Annotated[
        float, Field(description="the medication's probability without this code at that visit")
    ]
    change: Annotated[
        float, Field(description="the model's probability with the code minus that without it")
    ]
    path: Annotated[
        GraphPath | None,
        Field(description="what links the two in the causal graph; null where nothing does"),
    ]


@dataclasses.dataclass(slots=True)
class Explanation:
    """What raised and lowered the probability of a medication, the largest change first."""

    raised: list[Influence]
    lowered: list[Influence]


@dataclasses.dataclass(slots=True)
class Explained:
    """How much of a patient an explanation covers."""

    explained: Annotated[
        int,
        Field(
            description="codes and laboratory items that were left out one at a time, those of "
            "the latest visits first"
        ),
    ]
    given: Annotated[int, Field(description="codes and items that the model was given")]
    effect_estimator: Annotated[
        str, Field(description="how effects were estimated", examples=["doubly_robust"])
    ]


@dataclasses.dataclass(slots=True)
class NearMiss:
    """A medication just below the threshold."""

    system: Annotated[str, Field(examples=["atc"])]
    code: Annotated[str, Field(examples=["C03C"])]
    name: _Name
    probability: Annotated[
        float, Field(description="that the medication is given at the current visit")
    ]


@dataclasses.dataclass(slots=True)
class Medication(NearMiss):
    """A recommended medication."""

    explanation: Annotated[Explanation | None, Field(description="null unless asked for")] = None


@dataclasses.dataclass(slots=True)
class Interaction:
    """Two medications that interact."""

    first: Annotated[str, Field(examples=["atc:B01A"])]
    second: Annotated[str, Field(examples=["atc:N02B"])]


@dataclasses.dataclass(slots=True)
class InteractionWithTaken:
    """A recommended medication that interacts with one the patient already takes."""

    recommended: Annotated[str, Field(examples=["atc:B01A"])]
    taken: Annotated[str, Field(examples=["atc:N02B"])]


@dataclasses.dataclass(slots=True)
class LeftOut(NearMiss):
    """A medication that reaches the threshold and yet is not recommended."""

    reason: Literal["allergy", "max_ddi_rate", "top_k"]
    pairs: Annotated[
        list[Interaction],
        Field(
            description="where the reason is max_ddi_rate: its interactions with what is "
            "recommended, without which it could be recommended too"
        ),
    ]
    allergy: Annotated[
        str | None, Field(description="the ATC prefix of the allergies that it falls under")
    ]


@dataclasses.dataclass(slots=True)
class UnknownCode:
    """A code or laboratory item that the model does not know; it did not influence the answer."""

    visit: Annotated[int, Field(description="position in the patient's visits, from 0")]
    kind: Kind
    code: Annotated[str, Field(description="as it was looked up", examples=["icd9:V9999"])]


class ModelName(BaseModel):
    """Which model answered."""

    name: str = Field(examples=["cafemed"])
    version: int = Field(description="of the registry", examples=[3])


@dataclasses.dataclass(slots=True)
class Recommendation:
    """The answer for one patient."""

    medications: Annotated[list[Medication], Field(description="the most probable first")]
    interactions: Annotated[
        list[Interaction], Field(description="among the recommended medications")
    ]
    interactions_with_taken: Annotated[
        list[InteractionWithTaken],
        Field(
            description="with the medications of the current visit or, where it gives none, of "
            "the visit before; those recommended again are under `interactions`"
        ),
    ]
    ddi_rate: Annotated[
        float,
        Field(
            description="interacting pairs / pairs of the recommended medications; 0 where there "
            "are fewer than two"
        ),
    ]
    left_out: Annotated[
        list[LeftOut],
        Field(
            description="probable enough, but left out because of an allergy or an option; the "
            "most probable first"
        ),
    ]
    optimal: Annotated[
        bool | None,
        Field(
            description="whether no other choice under max_ddi_rate is better; false: the search "
            "was cut short, and the choice keeps to the rate but may not be the best; null "
            "without max_ddi_rate"
        ),
    ]
    near_misses: Annotated[
        list[NearMiss],
        Field(
            description=f"at most {MAX_NEAR_MISSES} below the threshold and above half of it, the "
            "most probable first; none that falls under an allergy"
        ),
    ]
    unknown_codes: Annotated[
        list[UnknownCode],
        Field(description="ignored; interactions of an unknown medication cannot be known either"),
    ]
    explained_codes: Annotated[
        Explained | None, Field(description="what was explained; null unless asked for")
    ] = None


class RecommendResponse(BaseModel):
    """The answer to a request: one recommendation a patient, in the order of the request."""

    request_id: str
    model: ModelName
    recommendations: list[Recommendation]


@dataclasses.dataclass(slots=True)
class KnownCode:
    """A code of the model's vocabulary."""

    kind: Kind
    system: Annotated[str, Field(examples=["icd9"])]
    code: Annotated[str, Field(examples=["4280"])]
    name: _Name


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
    sources: dict[str, str] = Field(
        description="fingerprints of the data and the graph that the model was made from"
    )
    limits: list[str] = Field(description="what the model is known not to know or do")
    card: dict[str, Any] | None = Field(
        description="the model card, written when the version was evaluated: data and split, "
        "metrics on test patients with 95 % intervals ([value, low, high]), calibration, "
        "subgroups; null: never evaluated"
    )


class Health(BaseModel):
    """A replica answers."""

    status: Literal["ok"]


class Ready(Health):
    """A replica can recommend."""

    model: ModelName
