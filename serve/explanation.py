"""Why a medication: what each code of a patient did to its probability, and what the graph knows.

Two kinds of numbers stand side by side and must not be mixed up. The counterfactual is the model's
own: its probability with a code and without it, everything else left as it is. Effect and path are
of the causal graph, estimated from visits of training patients, whatever the model made of them.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from cafemed.bundle import Bundle
from cafemed.codes import KINDS, LABORATORY, node_name
from cafemed.names import Names
from serve.answers import Explained, Explanation, GraphPath, Influence, Kind
from serve.batching import positions_of
from serve.encoding import EncodedPatient
from serve.links import Links

#: Codes of one patient that are left out one at a time, those of the latest visits first.
MAX_EXPLAINED_CODES = 256
#: Bounds the work for a patient with long visits: each code takes a patient's positions again
#: (`batching.positions_of`), and 1,000 of them about 5 ms of a core.
MAX_EXPLAINED_POSITIONS = 32_768
#: Influences of one medication that are told, of either direction.
MAX_INFLUENCES = 10

_KINDS: tuple[Kind, ...] = ("diagnosis", "procedure", "medication")


@dataclasses.dataclass(frozen=True)
class Given:
    """A code, or a laboratory item, that the model is given for a patient.

    Attributes:
        kind: see schema.Kind.
        index: into the vocabulary of its kind.
        at: visit at which the model is given it.
        visit: visit of the request that lists it; medications are given one visit later, and so is
            all else where the model sees earlier visits only.
    """

    kind: Kind
    index: int
    at: int
    visit: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What has to be computed to explain a patient.

    Attributes:
        patient: as asked.
        codes: that are explained.
        reduced: the patient without each of them.
        given: how many codes the model is given.
    """

    patient: EncodedPatient
    codes: tuple[Given, ...]
    reduced: tuple[EncodedPatient, ...]
    given: int


class Explainer:
    """Explains the answers of one bundle."""

    def __init__(self, bundle: Bundle, names: Names) -> None:
        """Takes what the bundle holds.

        Args:
            bundle: whose model is asked.
            names: of some codes or none.
        """
        self._bundle = bundle
        self._names = names
        self._delay = 0 if bundle.preprocessing.inputs == "current" else 1
        self._row = {name: i for i, name in enumerate(bundle.effects.codes)}
        self._links = Links(bundle.graph)

    def plan(self, patient: EncodedPatient) -> Plan:
        """Chooses the codes to explain and leaves them out, one at a time.

        At most MAX_EXPLAINED_CODES, less where visits are long; those of the latest visits first.
        """
        most = min(MAX_EXPLAINED_CODES, MAX_EXPLAINED_POSITIONS // positions_of(patient))
        codes = tuple(itertools.islice(self._given(patient), most))
        lists = itertools.chain(*patient.known, patient.laboratory)
        given = sum(len(one) for one in lists)
        return Plan(patient, codes, tuple(_without(patient, code) for code in codes), given)

    def explanations(
        self, plans: Sequence[Plan], rows: Sequence[NDArray[np.float32]]
    ) -> "list[PatientExplanation]":
        """Puts together what was computed.

        Args:
            plans: of n patients.
            rows: float32 (N_m,) each: the n patients' probabilities, then those of all `reduced`,
                plan by plan.
        """
        explanations = []
        place = len(plans)
        for plan, probabilities in zip(plans, rows[: len(plans)], strict=True):
            without = rows[place : place + len(plan.reduced)]
            place += len(plan.reduced)
            explanations.append(PatientExplanation(self, plan, probabilities, tuple(without)))
        return explanations

    def covered(self, plan: Plan) -> Explained:
        """Says how much of a patient is explained."""
        return Explained(
            explained=len(plan.codes),
            given=plan.given,
            effect_estimator=self._bundle.effects.estimator,
        )

    def _given(self, patient: EncodedPatient) -> Iterator[Given]:
        """All that the model is given, the latest first, laboratory items after a visit's codes."""
        for at in range(patient.num_visits - 1, -1, -1):
            for k, kind in enumerate(_KINDS):
                visit = at - (1 if kind == "medication" else self._delay)
                for index in patient.known[k][at]:
                    yield Given(kind, index, at, visit)
            for item, _ in patient.laboratory[at]:
                yield Given("laboratory", item, at, at - self._delay)

    def influence(
        self, given: Given, medication: int, score: float, score_without: float, is_current: bool
    ) -> Influence:
        """Says what a code did to a medication, and what is known of the two.

        Args:
            given: the code.
            medication: index.
            score: the medication's probability.
            score_without: the same without the code.
            is_current: the model is given the code at the current visit.
        """
        code = self._bundle.vocabularies[given.kind][given.index]
        effect: float | None = None
        error: float | None = None
        path: GraphPath | None = None
        # Effects and graph are about what is known at a visit and its own medications. What was
        # known at an earlier visit only is something else, of which they say nothing.
        if is_current:
            # Medications that are given are those of the visit before.
            node = node_name(
                "previous_medication" if given.kind == "medication" else given.kind, code
            )
            effect, error = self._effect(node, medication)
            path = self._path(node, medication)
        return Influence(
            visit=given.visit,
            kind=given.kind,
            code=code,
            name=self._names.get(given.kind, {}).get(code),
            effect=effect,
            standard_error=error,
            score_without=score_without,
            change=score - score_without,
            path=path,
        )

    def _effect(self, node: str, medication: int) -> tuple[float | None, float | None]:
        """Effect and standard error; None where the visits do not suffice to tell."""
        effects = self._bundle.effects
        row = self._row.get(node)
        if row is None or not effects.supported[row, medication]:
            return None, None
        return float(effects.effect[row, medication]), _known(
            effects.standard_error[row, medication]
        )

    def _path(self, node: str, medication: int) -> GraphPath | None:
        end = node_name("medication", self._bundle.vocabularies["medication"][medication])
        link = self._links.between(node, end)
        if link is None:
            return None
        return GraphPath(
            nodes=list(link.nodes), directed=link.directed, stability=_known(link.stability)
        )


@dataclasses.dataclass(frozen=True)
class PatientExplanation:
    """The explanation of one patient's answer (`answering.Explains`).

    Attributes:
        explainer: of the model.
        plan: see Plan.
        probabilities: of the patient, float32 (N_m,).
        without: of `plan.reduced`, float32 (N_m,) each.
    """

    explainer: Explainer
    plan: Plan
    probabilities: NDArray[np.float32]
    without: tuple[NDArray[np.float32], ...]

    @property
    def explained(self) -> Explained:
        """How much of the patient it covers."""
        return self.explainer.covered(self.plan)

    def of(self, medication: int) -> Explanation:
        """The codes without which a medication's probability is another.

        Those that change it most come first, equal changes in the order of the plan.
        """
        score = float(self.probabilities[medication])
        scores = [
            (given, float(row[medication]))
            for given, row in zip(self.plan.codes, self.without, strict=True)
        ]
        changed = [one for one in scores if one[1] != score]
        changed.sort(key=lambda one: -abs(score - one[1]))
        last = self.plan.patient.num_visits - 1

        def told(among: list[tuple[Given, float]]) -> list[Influence]:
            return [
                self.explainer.influence(given, medication, score, other, given.at == last)
                for given, other in among[:MAX_INFLUENCES]
            ]

        return Explanation(
            raised=told([one for one in changed if one[1] < score]),
            lowered=told([one for one in changed if one[1] > score]),
        )


def _known(number: float) -> float | None:
    return None if math.isnan(number) else float(number)


def _without(patient: EncodedPatient, given: Given) -> EncodedPatient:
    """The patient as encoded had the request not listed that code at that visit."""
    if given.kind == LABORATORY:
        measured = list(patient.laboratory)
        measured[given.at] = tuple(m for m in measured[given.at] if m[0] != given.index)
        return patient._replace(laboratory=tuple(measured))
    known = list(patient.known)
    lists = list(known[KINDS.index(given.kind)])
    lists[given.at] = tuple(index for index in lists[given.at] if index != given.index)
    known[KINDS.index(given.kind)] = tuple(lists)
    return patient._replace(known=tuple(known))
