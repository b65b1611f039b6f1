"""What benchmarks/accuracy.py compares: models with their options, plain learners, the ceiling."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import models
from cafemed import config
from cafemed.training import FitConfig

#: The one that p-values are against.
REFERENCE = "cafemed"
CEILING = "ceiling"

Changes = tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Learner:
    """One thing that can be trained: a name of `models.NAMES`, or of a learner in runs.py.

    Attributes:
        kind: which.
        changes: of options and training against their defaults: "model.dropout", "train.epochs"
            (also of noisy_or), "learner.strength" (of logistic_regression).
    """

    kind: str
    changes: Changes = ()

    def changed(self, changes: Changes) -> "Learner":
        """The same with other or further changes."""
        return Learner(self.kind, tuple(sorted((dict(self.changes) | dict(changes)).items())))

    def section(self, name: str) -> dict[str, Any]:
        """The changes of one section, without its name."""
        parts = ((key.split(".", 1), value) for key, value in self.changes)
        return {key: value for (section, key), value in parts if section == name}

    def settings(self) -> dict[str, Any]:
        """Every option that matters with its value: what a kept run is recognised by."""
        found: dict[str, Any] = {f"learner.{k}": v for k, v in self.section("learner").items()}
        if self.kind in models.NAMES:
            options: Any = config.from_mapping(
                models.options_class(self.kind), self.section("model"), "model"
            )
            found |= {f"model.{k}": v for k, v in dataclasses.asdict(options).items()}
            if found.get("model.direct") == "none":
                found = {k: v for k, v in found.items() if not k.startswith("model.direct_")}
        if self.kind in models.NAMES or self.kind == "noisy_or":
            fit = config.from_mapping(FitConfig, self.section("train"), "train")
            found |= {f"train.{k}": v for k, v in dataclasses.asdict(fit).items() if k != "seed"}
        return found


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        name: the case's.
        learner: what is trained.
        search: changes to choose among on validation, by the first seed's Jaccard; none: nothing
            to choose.
        seeded: whether seeds make a difference.
    """

    name: str
    learner: Learner
    search: tuple[Changes, ...] = ()
    seeded: bool = True

    def candidates(self) -> tuple[Learner, ...]:
        """What is chosen among; one where nothing is to choose."""
        return tuple(self.learner.changed(changes) for changes in self.search) or (self.learner,)


def _grid(**choices: tuple[Any, ...]) -> tuple[Changes, ...]:
    """All combinations; model__dropout stands for "model.dropout"."""
    found: list[Changes] = [()]
    for name, values in choices.items():
        key = name.replace("__", ".")
        found = [(*before, (key, value)) for before in found for value in values]
    return tuple(found)


#: Dropout that the published forms may choose among.
_SEARCH = _grid(model__dropout=(0.7, 0.3, 0.1))
_STRENGTHS = _grid(learner__strength=(0.2, 0.5, 1.0, 2.0, 3.0, 5.0))
_PUBLISHED: Changes = (("model.direct", "none"),)
#: Tried with the least of models, whose epochs take a third of the time.
_FURTHER: Changes = (
    ("train.objective", "sum"),
    ("model.direct", "additive"),
    ("train.ddi_weight", 0.005),
    ("train.ddi_weight", 0.02),
)
_ABLATIONS: tuple[tuple[str, Changes], ...] = (
    ("w/o CWG", (("model.use_cwg", False),)),
    ("w/o CHARM", (("model.use_charm", False),)),
    ("w/o both", (("model.use_cwg", False), ("model.use_charm", False))),
)


def _cafemed(name: str, changes: Changes, ablated: bool = True) -> Iterator[Variant]:
    """A form of CafeMed, its ablations and its patient-conditional CWG."""
    learner = Learner("cafemed").changed(changes)
    yield Variant(name, learner)
    for suffix, more in _ABLATIONS if ablated else ():
        yield Variant(f"{name} {suffix}", learner.changed(more))
    yield Variant(f"{name} cwg_context=visit", learner.changed((("model.cwg_context", "visit"),)))


def _graphdiffmed() -> Iterator[Variant]:
    """GraphDiffMed and its published form, with each of the modalities."""
    for name, direct in (("graphdiffmed", ()), ("graphdiffmed published", _PUBLISHED)):
        learner = Learner("graphdiffmed", direct)
        yield Variant(name, learner)
        for modalities in ("G", "GY"):
            changes = (("model.modalities", modalities),)
            yield Variant(f"{name} {modalities}", learner.changed(changes))
    yield Variant("graphdiffmed published, searched", learner, _SEARCH)


def variants() -> list[Variant]:
    """Every row, in the order of the table."""
    small: Changes = _ABLATIONS[-1][1]
    return [
        Variant(CEILING, Learner(CEILING), seeded=False),
        Variant("most frequent", Learner("most_frequent"), seeded=False),
        Variant("last visit", Learner("last_visit"), seeded=False),
        Variant("l1 logistic regression", Learner("logistic_regression"), _STRENGTHS, seeded=False),
        Variant("noisy-or", Learner("noisy_or")),
        *_cafemed(REFERENCE, ()),
        *_cafemed("cafemed published", _PUBLISHED),
        Variant(f"{REFERENCE} objective=sum", Learner("cafemed", (("train.objective", "sum"),))),
        Variant("cafemed published, searched", Learner("cafemed", _PUBLISHED), _SEARCH),
        *(
            Variant(f"{REFERENCE} w/o both {change[0].split('.')[1]}={change[1]}", learner)
            for change in _FURTHER
            for learner in (Learner("cafemed", small).changed((change,)),)
        ),
        Variant("causalmed", Learner("causalmed")),
        Variant("causalmed, searched", Learner("causalmed"), _SEARCH),
        *_graphdiffmed(),
    ]


def quick(found: list[Variant]) -> list[Variant]:
    """The same with short training and little to choose."""

    def shorten(learner: Learner) -> Learner:
        trained = learner.kind in models.NAMES or learner.kind == "noisy_or"
        return learner.changed((("train.epochs", 2),)) if trained else learner

    return [dataclasses.replace(v, learner=shorten(v.learner), search=v.search[:2]) for v in found]
