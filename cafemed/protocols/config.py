"""The settings of a cohort."""

import dataclasses
from typing import Annotated, Literal

from cafemed.config import Range
from cafemed.errors import ConfigError

Kind = Literal["diagnosis", "procedure", "medication"]

#: Settings that the protocol "published" does not fix.
_FREE = ("protocol", "max_laboratory")
#: A request may give so many laboratory values of a visit (serve/schema.py); a model that knew more
#: items could not be asked about all of them.
MAX_LABORATORY = 128


@dataclasses.dataclass(frozen=True)
class CohortConfig:
    """How records become a cohort (docs/data.md).

    Attributes:
        protocol: "clean", or "published": the literature's order, filters and split; it fixes
            all the other settings but max_laboratory, which must then keep their defaults.
        inputs: what is known when recommending. "current": the visit's own diagnoses and
            procedures; "history": only those of earlier visits.
        target_window_h: recommend the medications started within so many hours of admission, and
            see no laboratory values from after them; null: all of the stay.
        require: kinds of which a usable visit has at least one code.
        min_visits: usable visits that a patient needs.
        max_diagnoses, max_procedures, max_medications: keep the codes in most visits of the
            training patients; null: all of theirs.
        max_laboratory: keep the laboratory items in most visits of the training patients, at most
            as many as a request may give of a visit; 0: the laboratory table is not read. Free in
            either protocol.
        split: "patient": drawn with the seed; "time": patients in order of their last admission.
        split_parts: training, validation and test patients in these proportions.
        seed: of the split by patient.
    """

    protocol: Literal["clean", "published"] = "clean"
    inputs: Literal["current", "history"] = "current"
    target_window_h: Annotated[float | None, Range(0, open_low=True)] = None
    require: tuple[Kind, ...] = ("diagnosis", "medication")
    min_visits: Annotated[int, Range(1)] = 2
    max_diagnoses: Annotated[int | None, Range(1)] = 2000
    max_procedures: Annotated[int | None, Range(1)] = None
    max_medications: Annotated[int | None, Range(1)] = 300
    max_laboratory: Annotated[int, Range(0, MAX_LABORATORY)] = 0
    split: Literal["patient", "time"] = "patient"
    split_parts: tuple[Annotated[int, Range(1)], ...] = (4, 1, 1)
    seed: Annotated[int, Range(0)] = 0

    def __post_init__(self) -> None:
        """Checks what needs two settings at once."""
        if len(self.split_parts) != 3:
            raise ConfigError(
                "split_parts: expected three numbers (training, validation, test), "
                f"got {len(self.split_parts)}"
            )
        if "medication" not in self.require:
            raise ConfigError("require: expected medication among the kinds, got none of it")
        if self.protocol == "published":
            changed = [
                field.name
                for field in dataclasses.fields(self)
                if field.name not in _FREE and getattr(self, field.name) != field.default
            ]
            if changed:
                raise ConfigError(
                    f"{', '.join(changed)}: protocol=published fixes these, leave them out or use "
                    "protocol=clean"
                )
