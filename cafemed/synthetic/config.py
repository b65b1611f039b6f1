"""The settings of the synthetic population."""

import dataclasses
from typing import Annotated

from cafemed.config import Range
from cafemed.errors import ConfigError

Share = Annotated[float, Range(0, 1)]
Probability = Annotated[float, Range(0, 1, open_high=True)]


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
    """Sizes, marginals and strengths of the generative model (docs/synthetic.md).

    Attributes:
        num_patients: patients; each has at least two visits.
        num_visits: visits of all patients together.
        num_diagnoses, num_procedures, num_medications: distinct codes.
        diagnoses_per_visit, procedures_per_visit, medications_per_visit: means over visits.
        zipf_exponent: the i-th most frequent code has a prevalence proportional to
            i ** -zipf_exponent.
        top_prevalence: no diagnosis or procedure is in a larger share of visits.
        codes_per_cluster: diagnoses and procedures that share a set of medications.
        medications_per_cluster: size of that set; larger where medications outnumber the places.
        parents_per_code: mean number of causes of a code among the others.
        code_strength_low, code_strength_high: noisy-or strengths between codes.
        specificity: a code's chance of causing a medication of its cluster is proportional to its
            prevalence ** -specificity.
        strength_low, strength_high: noisy-or strengths from codes to medications.
        persistence_low, persistence_high: strengths from a medication to itself a visit later.
        leak_share: share of a medication's prescriptions without any cause.
        diagnosis_persistence: strength from a diagnosis to itself a visit later. Above 0, the
            diagnoses of the visit before are common causes of today's and of the medications of
            that visit.
        ddi_density: share of the pairs of medications that interact; at least one pair does.
        ddi_rate: share of the prescribed pairs that interact, which the choice of the interacting
            pairs aims at.
        avoidance: probability that a prescriber strikes one of two interacting drafted
            medications.
        effect_draws: simulated visits behind each true effect.
        num_laboratory: laboratory items, which diagnoses move; 0: no LABEVENTS are written.
    """

    num_patients: Annotated[int, Range(10, 1_000_000)] = 2_000
    num_visits: Annotated[int, Range(20, 20_000_000)] = 4_740
    num_diagnoses: Annotated[int, Range(2, 8_000)] = 500
    num_procedures: Annotated[int, Range(2, 3_000)] = 250
    num_medications: Annotated[int, Range(2, 1_000)] = 100
    diagnoses_per_visit: Annotated[float, Range(1, open_low=True)] = 10.5
    procedures_per_visit: Annotated[float, Range(1, open_low=True)] = 3.8
    medications_per_visit: Annotated[float, Range(1, open_low=True)] = 11.6
    zipf_exponent: Annotated[float, Range(0, 3)] = 1.0
    top_prevalence: Annotated[float, Range(0, 1, open_low=True, open_high=True)] = 0.45
    codes_per_cluster: Annotated[int, Range(1)] = 22
    medications_per_cluster: Annotated[int, Range(1)] = 4
    parents_per_code: Annotated[float, Range(0, 10)] = 1.0
    code_strength_low: Probability = 0.3
    code_strength_high: Probability = 0.8
    specificity: Annotated[float, Range(0, 3)] = 1.0
    strength_low: Probability = 0.7
    strength_high: Probability = 0.98
    persistence_low: Probability = 0.6
    persistence_high: Probability = 0.95
    leak_share: Annotated[float, Range(0, 1, open_low=True, open_high=True)] = 0.1
    diagnosis_persistence: Probability = 0.0
    ddi_density: Annotated[float, Range(0, 1, open_low=True)] = 0.08
    ddi_rate: Share = 0.08
    avoidance: Probability = 0.3
    effect_draws: Annotated[int, Range(2)] = 2_000
    num_laboratory: Annotated[int, Range(0, 100)] = 12

    def __post_init__(self) -> None:
        """Checks what needs two settings at once."""
        problems = []
        if self.num_visits < 2 * self.num_patients:
            problems.append(
                f"num_visits: expected at least 2 x num_patients = {2 * self.num_patients}, "
                f"got {self.num_visits}"
            )
        for name in ("code_strength", "strength", "persistence"):
            low, high = getattr(self, f"{name}_low"), getattr(self, f"{name}_high")
            if low > high:
                problems.append(f"{name}_low: expected at most {name}_high = {high}, got {low}")
        for kind in ("diagnoses", "procedures"):
            most = self.top_prevalence * getattr(self, f"num_{kind}")
            mean = getattr(self, f"{kind}_per_visit")
            if mean >= most:
                problems.append(
                    f"{kind}_per_visit: expected less than top_prevalence x num_{kind} = "
                    f"{most:g}, got {mean}"
                )
        if self.medications_per_visit >= self.num_medications:
            problems.append(
                "medications_per_visit: expected less than num_medications = "
                f"{self.num_medications}, got {self.medications_per_visit}"
            )
        if problems:
            raise ConfigError("; ".join(problems))
