"""A request about nobody, from the invented patients in a bundle's self-check."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # it imports torch, which a reader of deploy.json need not wait for
    from cafemed.bundle import Bundle

_MAX_SHOWN = 6


def example_request(bundle: "Bundle") -> dict[str, Any]:
    """The body of a request: the self-check's patient with the longest history."""
    patient = max(bundle.reference.self_check.patients, key=lambda p: len(p["visits"]))
    visits = patient["visits"]
    # The self-check lists what the model is given: a visit's medications are those of the visit
    # before. A request lists them at the visit they belong to.
    medications = [visit["previous_medications"] for visit in visits[1:]] + [[]]
    return {
        "patients": [
            {
                "sex": patient["sex"],
                "age": visits[-1]["age"],
                "visits": [
                    _visit(visit, taken) for visit, taken in zip(visits, medications, strict=True)
                ],
            }
        ]
    }


def _visit(visit: Mapping[str, Any], medications: list[str]) -> dict[str, Any]:
    lists = {
        "diagnoses": visit["diagnoses"],
        "procedures": visit["procedures"],
        "medications": medications,
    }
    codes = {field: [_code(name) for name in names] for field, names in lists.items()}
    if not visit["laboratory"]:
        return codes
    measured = visit["laboratory"].items()
    return codes | {
        "laboratory": [
            {"item": name.partition(":")[2], "value": round(value, 3)} for name, value in measured
        ]
    }


def _code(name: str) -> dict[str, str]:
    system, _, code = name.partition(":")
    return {"system": system, "code": code}


def describe(request: Mapping[str, Any], answer: Mapping[str, Any]) -> list[str]:
    """Says request and answer in a few lines for a terminal."""
    visits = request["patients"][0]["visits"]
    recommendation = answer["recommendations"][0]
    medications = [
        f"{m['system']}:{m['code']} {m['probability']:.2f}" for m in recommendation["medications"]
    ]
    shown = ", ".join(medications[:_MAX_SHOWN]) + (", …" if len(medications) > _MAX_SHOWN else "")
    fields = ("diagnoses", "procedures", "medications")
    num_codes = sum(len(visit[field]) for visit in visits for field in fields)
    return [
        f"an invented patient with {len(visits)} visits and {num_codes} codes",
        f"{len(medications)} medications recommended: {shown or 'none'}",
        f"{len(recommendation['interactions'])} interacting pairs among them, "
        f"{len(recommendation['interactions_with_taken'])} with what is taken already",
    ]
