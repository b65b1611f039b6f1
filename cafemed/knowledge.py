"""What earlier sweeps found, for a sweep that goes on from it or is told of it beforehand."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cafemed import artifacts, search_space, sweep
from cafemed.errors import ArtifactError
from cafemed.search_entries import Categorical, Entry, Float
from cafemed.search_space import MODEL, SearchSpace
from cafemed.sweep import TrialRecord
from cafemed.sweep_plan import SweepPlan, prior_file


def own_trials(folder: Path, space: SearchSpace) -> list[TrialRecord]:
    """The trials of a finished sweep over this very space.

    Args:
        folder: of the sweep.
        space: that it was over.

    Raises:
        ArtifactError: if a trial does not lie in the space.
    """
    path, found = folder / "sweep.parquet", []
    for record in sweep.read_trials(path):
        parameters = _typed(space, record.parameters)
        if parameters is None:
            raise ArtifactError(
                f"{path}: trial {record.number} does not lie in the space; start anew with "
                "force=true"
            )
        found.append(dataclasses.replace(record, parameters=parameters))
    return found


def prior_inputs(plan: SweepPlan) -> dict[str, str]:
    """The files of `search.prior` as inputs of a sweep: "prior 0" → SHA-256.

    Raises:
        ConfigError: if there is no such file.
    """
    inputs = {}
    for i, name in enumerate(plan.search.prior):
        inputs[f"prior {i}"] = artifacts.sha256_of(prior_file(i, name))
    return inputs


def prior_trials(plan: SweepPlan) -> tuple[list[TrialRecord], int]:
    """The trials of `search.prior` that can be told to the sampler, and how many cannot.

    A trial can if every parameter of this sweep has a value in it that lies in the space: one that
    it varied, or one that its sweep had configured. What it varied and this sweep does not has to
    have the value that is configured here. Failed trials tell nothing.

    Raises:
        ArtifactError: if a file is no table of a sweep.
    """
    found, left = [], 0
    for name in plan.search.prior:
        path = Path(name).expanduser()
        configured = _configured(path.parent)
        for record in sweep.read_trials(path):
            parameters = None
            if record.status != "failed":
                parameters = _in_terms_of(plan, record.parameters, configured)
            if parameters is None:
                left += 1
            else:
                found.append(dataclasses.replace(record, parameters=parameters))
    return found, left


def _configured(folder: Path) -> dict[str, Any]:
    """The settings of the sweep in a folder; empty where its manifest is not beside the table."""
    try:
        return artifacts.read_manifest(folder, sweep.STAGE).config
    except ArtifactError:
        return {}


def _in_terms_of(
    plan: SweepPlan, parameters: Mapping[str, Any], configured: Mapping[str, Any]
) -> dict[str, Any] | None:
    """A trial's options as parameters of this sweep; None if they are none."""
    sections = search_space.split(parameters)
    own = dict(sections.get("model", {}))
    there = configured.get("model", {"name": plan.model_name, "options": {}})
    model = own.pop("name", there["name"])
    if model not in plan.space.models:
        return None
    # Without a manifest, only what the trial varied is known of it.
    others = configured.get("models", {})
    base = there["options"] if model == there["name"] else others.get(model, {})
    options = {"model": {**base, **own, "name": model}}
    options["train"] = {**configured.get("train", {}), **sections.get("train", {})}
    active = plan.space.active(model)
    wanted = {name: _option(name) for name in active}
    if not all(option in options[section] for section, option in wanted.values()):
        return None
    here = {"model": plan.models[model], "train": dataclasses.asdict(plan.fit)}
    for section, option in map(_option, parameters):
        varied = (section, option) in wanted.values() or option == "name"
        if not varied and options[section][option] != here[section].get(option):
            return None
    return _typed(plan.space, {n: options[section][o] for n, (section, o) in wanted.items()})


def _option(name: str) -> tuple[str, str]:
    section, *_, option = name.split(".")
    return section, option


def _typed(space: SearchSpace, parameters: Mapping[str, Any]) -> dict[str, Any] | None:
    """Parameters as the space has them, where a table holds text or leaves None out."""
    active = space.active(parameters.get(MODEL, space.model))
    typed = {name: _value(entry, parameters.get(name)) for name, entry in active.items()}
    return typed if set(parameters) <= set(active) and space.holds(typed) else None


def _value(entry: Entry, value: Any) -> Any:
    if isinstance(entry, Categorical) and not entry.holds(value):
        same = (choice for choice in entry.choices if str(choice) == value)
        return next(same, value)
    if isinstance(entry, Float) and type(value) is int:
        return float(value)
    return value
