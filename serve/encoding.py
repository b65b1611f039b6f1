"""From a request's codes to the model's indices, and what was lost on the way."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from msgspec import UNSET
from pydantic import ValidationError

from cafemed.bundle import Preprocessing
from cafemed.codes import KINDS, LABORATORY, LABORATORY_SYSTEM, normalise
from cafemed.cohort import SEXES
from serve.answers import Kind, UnknownCode
from serve.asking import AskedCode, AskedPatient, AskedValue, AskedVisit, of_request
from serve.schema import Code, LaboratoryValue, RecommendRequest, field_path

#: Systems that may be asked for although a model was not trained on them; their codes are
#: then unknown. Any other system must be one of the model's.
_STANDARD_SYSTEMS = {
    "diagnosis": ("icd10", "icd9"),
    "procedure": ("icd10", "icd9"),
    "medication": ("atc",),
}

#: Characters of an ATC code at each of its levels.
_ATC_CHARACTERS = {"atc1": 1, "atc2": 3, "atc3": 4, "atc4": 5, "atc5": 7}

T = TypeVar("T")

_KINDS: tuple[Kind, ...] = ("diagnosis", "procedure", "medication")
_FIELDS = ("diagnoses", "procedures", "medications")
_NO_CODES: Mapping[str, int] = {}


class RefusedError(ValueError):
    """A request that is well formed but cannot be answered; names the field, never a code."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class UnknownSystemError(RefusedError):
    """A request names a code system that neither the model nor the standard list has."""


class UnknownCodesError(RefusedError):
    """Too much of what is known of a patient says nothing to the model."""

    def __init__(self, patient: int, share: float, max_share: float) -> None:
        super().__init__(
            field_path(("patients", patient)),
            f"{share:.0%} of the codes are unknown to the model, at most {max_share:.0%} may be",
        )


class AllergyError(RefusedError):
    """Allergies that the model's medications cannot be compared with."""


class EncodedPatient(NamedTuple):
    """What the model is given for one patient of T visits.

    Attributes:
        known: for diagnoses, procedures and previous medications: T tuples of indices, each index
            at most once a visit.
        taken: indices of the medications that the patient already takes.
        sex: index into cohort.SEXES.
        age: years at the current visit; NaN if unknown.
        laboratory: T tuples of (item, value): indices of items, each at most once a visit, and
            values in the items' units; what may be seen at the visit.
        unknown: the request's codes and items that the vocabularies do not have.
        allergies: ATC prefixes in capitals.
        unknown_share: of the distinct codes that are inputs of the model, the same at two visits
            being two; 0 without any. Laboratory items do not count: a model may use none.
    """

    known: tuple[tuple[tuple[int, ...], ...], ...]
    taken: tuple[int, ...]
    sex: int
    age: float
    laboratory: tuple[tuple[tuple[int, float], ...], ...]
    unknown: tuple[UnknownCode, ...]
    allergies: tuple[str, ...] = ()
    unknown_share: float = 0.0

    @property
    def num_visits(self) -> int:
        """T."""
        return len(self.known[0])


class Encoder:
    """Looks up codes as the bundle's vocabularies write them."""

    def __init__(
        self, vocabularies: Mapping[str, Sequence[str]], preprocessing: Preprocessing
    ) -> None:
        self._index = [{code: i for i, code in enumerate(vocabularies[kind])} for kind in KINDS]
        # For each system the codes as they are mostly written, so that most need not be normalised.
        self._usual: list[dict[str, dict[str, int]]] = []
        for index in self._index:
            usual: dict[str, dict[str, int]] = defaultdict(dict)
            for name, i in index.items():
                system, _, code = name.partition(":")
                for written in (code, f"{code[:2]}.{code[2:]}", f"{code[:3]}.{code[3:]}"):
                    usual[system][written] = i
            self._usual.append(dict(usual))
        self.items: tuple[str, ...] = tuple(vocabularies.get(LABORATORY, ()))
        self._item = {name: i for i, name in enumerate(self.items)}
        self._uses_current = preprocessing.inputs == "current"
        self._atc_characters = _ATC_CHARACTERS.get(preprocessing.medication_level)
        self.systems: dict[str, list[str]] = {
            kind: sorted({code.partition(":")[0] for code in vocabularies[kind]}) for kind in KINDS
        }
        self._is_atc = self.systems["medication"] == ["atc"]
        self._accepted = [{*self.systems[kind], *_STANDARD_SYSTEMS[kind]} for kind in KINDS]

    def encode(self, request: RecommendRequest) -> list[EncodedPatient]:
        """Encodes every patient of a request.

        Raises:
            RefusedError: naming the field.
        """
        return self.encode_all(of_request(request).patients)

    def encode_all(self, patients: Sequence[AskedPatient]) -> list[EncodedPatient]:
        """Encodes the patients of a request.

        Raises:
            RefusedError: naming the field.
        """
        return [self._encode(patient, p) for p, patient in enumerate(patients)]

    def index(self, k: int, system: str, code: str) -> tuple[int, str]:
        """The index of a code of the k-th kind, -1 if the vocabulary does not have it; its name.

        Raises:
            RefusedError: if it is no code, or of an unknown system.
        """
        asked = _checked(lambda: Code(system=system, code=code))
        name = self._name(k, asked.system, asked.code, (_FIELDS[k],))
        return self._index[k].get(name, -1), name

    def item(self, name: str) -> int:
        """The index of a laboratory item; -1 if the vocabulary does not have it.

        Raises:
            RefusedError: if it is no item's name.
        """
        asked = _checked(lambda: LaboratoryValue(item=name, value=0.0))
        return self._item.get(asked.normalised(), -1)

    def _encode(self, patient: AskedPatient, p: int) -> EncodedPatient:
        unknown: list[UnknownCode] = []
        visits = [self._visit(visit, p, t, unknown) for t, visit in enumerate(patient.visits)]
        laboratory = tuple(
            self._laboratory(visit.laboratory, t, unknown) if visit.laboratory else ()
            for t, visit in enumerate(patient.visits)
        )
        if patient.allergies and not self._is_atc:
            raise AllergyError(
                field_path(("patients", p, "allergies")),
                "the model's medications are not in ATC, so allergies cannot be kept to",
            )
        diagnoses, procedures, medications = (tuple(lists) for lists in zip(*visits, strict=True))
        if not self._uses_current:
            diagnoses, procedures = _shifted(diagnoses), _shifted(procedures)
            laboratory = _shifted(laboratory)
        previous = _shifted(medications)
        unknown_share = 0.0
        if unknown:
            num_unknown = self._num_unknown_inputs(unknown, len(patient.visits) - 1)
            known = sum(sum(map(len, lists)) for lists in (diagnoses, procedures, previous))
            unknown_share = num_unknown / (known + num_unknown) if num_unknown else 0.0
        return EncodedPatient(
            known=(diagnoses, procedures, previous),
            taken=medications[-1] if patient.visits[-1].medications else previous[-1],
            sex=SEXES.index(patient.sex or "unknown"),
            age=math.nan if patient.age is None or patient.age is UNSET else patient.age,
            laboratory=laboratory,
            unknown=tuple(unknown),
            allergies=tuple(patient.allergies or ()),
            unknown_share=unknown_share,
        )

    def _num_unknown_inputs(self, unknown: Sequence[UnknownCode], current: int) -> int:
        """How many distinct codes would be inputs of the model, if it knew them."""
        return len(
            {
                (one.visit, one.kind, one.code)
                for one in unknown
                if one.kind != LABORATORY
                and (one.visit < current or (self._uses_current and one.kind != "medication"))
            }
        )

    def _visit(
        self, visit: AskedVisit, p: int, t: int, unknown: list[UnknownCode]
    ) -> tuple[tuple[int, ...], ...]:
        """Indices of the three kinds, in the request's order, repeated codes once."""
        encoded = []
        for k, asked in enumerate((visit.diagnoses, visit.procedures, visit.medications)):
            if not asked:
                encoded.append(())
                continue
            system = asked[0].system
            get = self._usual[k].get(system, _NO_CODES).get
            found: list[Any] = [get(one.code) if one.system == system else None for one in asked]
            if None in found:  # of several systems, or not written as usual
                found = self._looked_up(k, asked, p, t, unknown)
            encoded.append(tuple(dict.fromkeys(found)))
        return tuple(encoded)

    def _looked_up(
        self, k: int, asked: Sequence[AskedCode], p: int, t: int, unknown: list[UnknownCode]
    ) -> list[int]:
        """Indices of a list's codes that are not all of one system and written as usual."""
        found = []
        usual = self._usual[k]
        for i, one in enumerate(asked):
            index = usual.get(one.system, _NO_CODES).get(one.code)
            if index is None:
                location = ("patients", p, "visits", t, _FIELDS[k], i, "system")
                name = self._name(k, one.system, one.code, location)
                index = self._index[k].get(name)
                if index is None:
                    unknown.append(UnknownCode(t, _KINDS[k], name))
                    continue
            found.append(index)
        return found

    def _laboratory(
        self, measured: Sequence[AskedValue], t: int, unknown: list[UnknownCode]
    ) -> tuple[tuple[int, float], ...]:
        """Items and values of a visit, ordered by item; of an item asked twice the first value."""
        values: dict[int, float] = {}
        for asked in measured:
            name = normalise(LABORATORY_SYSTEM, asked.item)
            item = self._item.get(name)
            if item is None:
                unknown.append(UnknownCode(t, "laboratory", name))
            else:
                values.setdefault(item, asked.value)
        return tuple(sorted(values.items()))

    def _name(self, k: int, system: str, code: str, location: tuple[str | int, ...]) -> str:
        name = normalise(system, code)
        system, _, value = name.partition(":")
        if system not in self._accepted[k]:
            expected = ", ".join(sorted(self._accepted[k]))
            raise UnknownSystemError(
                field_path(location), f"unknown code system; expected one of {expected}"
            )
        if system == "atc" and _KINDS[k] == "medication":
            return f"{system}:{value[: self._atc_characters]}"
        return name


def _checked(make: Callable[[], T]) -> T:
    """Makes what a request would have; RefusedError names the field that is wrong."""
    try:
        return make()
    except ValidationError as err:
        problem = err.errors()[0]
        raise RefusedError(field_path(problem["loc"]), problem["msg"]) from err


def _shifted(lists: tuple[tuple[T, ...], ...]) -> tuple[tuple[T, ...], ...]:
    """Each visit gets the list of the visit before; the first gets none."""
    return ((), *lists[:-1])
