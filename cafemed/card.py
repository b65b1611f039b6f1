"""The model card: what a published model is, how good it is for whom, and what it is not for.

After Mitchell et al., Model Cards for Model Reporting (FAT* 2019). It is written when a version is
evaluated, lies beside the version in the registry (`registry.write_card`), and holds nothing at
patient level.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cafemed import calibration, suppression
from cafemed.artifacts import Manifest
from cafemed.bundle import Bundle
from cafemed.codes import LABORATORY
from cafemed.registry import Version

FORMAT_VERSION = 1

INTENDED_USE = (
    "Decision support for research. Not a medical device: not for diagnosing or treating anyone."
)

#: Test patients below which a card says that they are few (an assumption).
_FEW = 100

#: Of every model.
LIMITS = (
    "It learned what was prescribed, which is not what would have been right, with the habits and "
    "errors of the records it comes from.",
    "It was measured on patients of the source that it was trained on. Elsewhere, and later, it "
    "may be worse.",
    "It knows codes of diagnoses, procedures and medications, and perhaps sex, age and laboratory "
    "values; no doses, allergies, contraindications, pregnancy, or what only notes tell.",
    "Interactions are the pairs of the table that it was given, ungraded. A pair that is not in it "
    "may still interact.",
    "Codes outside its vocabularies have no influence, and medications outside them are never "
    "recommended.",
)


def make(
    experiment: str,
    version: Version,
    served: Bundle,
    cohort: Manifest,
    report: Mapping[str, Any],
) -> dict[str, Any]:
    """Makes the card of a version from what its evaluation found; JSON values.

    Args:
        experiment: name of the experiment and of the registry.
        version: as published.
        served: its bundle.
        cohort: manifest of the cohort that it was trained and measured on.
        report: of `assessment.measure`, with "ceiling" where one is known.
    """
    made_by, summary = version.record["produced_by"], cohort.report["summary"]
    model = report["model"]
    return {
        "format_version": FORMAT_VERSION,
        "model": {
            "name": served.model_name,
            "experiment": experiment,
            "version": version.number,
            "published": version.record.get("published"),
            "options": dict(served.model_options),
        },
        "intended_use": INTENDED_USE,
        "training": {
            name: made_by.get(name)
            for name in ("job", "trial", "epoch", "seed", "train", "calibration", "retrained")
        },
        "data": {
            **{name: cohort.config.get(name) for name in ("source", "protocol", "inputs")},
            "target_window_h": cohort.config.get("target_window_h"),
            "medication_level": served.preprocessing.medication_level,
            **{name: summary[name] for name in ("patients", "visits", "split")},
            "fingerprints": {**served.sources, "bundle": served.fingerprint},
        },
        "decision": {name: model[name] for name in ("temperature", "threshold", "best_threshold")},
        "metrics": {split: _measured(model[split]) for split in ("test", "validation")},
        "baselines": {
            name: _values(found["metrics"], found["intervals"])
            for name, found in report["baselines"].items()
        },
        "ceiling": report.get("ceiling"),
        "calibration": {split: model[split]["calibration"] for split in ("test", "validation")},
        "subgroups": report["subgroups"],
        "limits": list(_limits(served, cohort, report)),
    }


def _measured(found: Mapping[str, Any]) -> dict[str, Any]:
    counts = {name: found[name] for name in ("patients", "visits")}
    return {**counts, "values": _values(found["metrics"], found["intervals"])}


def _values(
    found: Mapping[str, float], intervals: Mapping[str, Sequence[float]]
) -> dict[str, list[float]]:
    return {name: [value, *intervals[name]] for name, value in found.items()}


def _limits(served: Bundle, cohort: Manifest, report: Mapping[str, Any]) -> Iterator[str]:
    config, summary, test = cohort.config, cohort.report["summary"], report["model"]["test"]
    if config.get("source") == "synthetic":
        yield (
            "Its patients are invented: no number here says anything about real patients or "
            "medications."
        )
    yield from LIMITS
    if "retrained" in served.metrics:
        yield (
            "It was trained anew on the validation patients, too: what it reaches is known of the "
            "test patients alone. What is told of validation patients, and its temperature and "
            "threshold, are of the trial that had not seen them."
        )
    if config.get("inputs") == "current":
        yield (
            "It is given the visit's own diagnoses and procedures. Hospitals code them at "
            "discharge, after the medications that it is asked for."
        )
        if served.vocabularies.get(LABORATORY):
            yield (
                "Laboratory values are the first of the stay and may follow from the medications "
                "(drug levels)."
            )
    if config.get("protocol") == "published":
        yield (
            "The published protocol leaks: visits may be out of order, and vocabularies were taken "
            "from all patients (docs/data.md)."
        )
    for name in ("sex", "age"):
        if summary.get(f"{name}_known") == 0:
            yield f"Nobody's {name} was known: whether it serves all alike cannot be said."
    if test["patients"] < suppression.FEWEST:
        yield (
            f"Only {test['patients']} test patients: their metrics say next to nothing, and of so "
            "few this card should not be passed on."
        )
    elif test["patients"] < _FEW:
        yield f"Only {test['patients']} test patients: the intervals are wide."
    for table, cells in report["subgroups"]["tables"].items():
        hidden = [one["group"] for one in cells if one.get("hidden")]
        if hidden:
            yield f"By {table}, too few patients to tell of: {', '.join(hidden)}."
    if served.preprocessing.temperature in calibration.ENDS:
        yield "Its temperature is at the end of its range: its probabilities mean little."
