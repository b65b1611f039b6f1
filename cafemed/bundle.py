"""The bundle: everything that a served model needs, in one folder, and no patient's record.

Files: `model.safetensors` (weights), `config.json` (model name and options), `vocabulary.json`,
`graph.parquet`, `effects.npz`, `ddi.parquet`, `molecules.json`, `names.json`,
`preprocessing.json`, `reference.json`, `metrics.json`, `manifest.json` (format version,
fingerprints, SHA-256 of every file). Plain formats only: nothing in it is ever unpickled.
"""

import dataclasses
import hashlib
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import nn

from cafemed import artifacts, bundle_files, bundle_formats, reference, untrusted
from cafemed.batches import ModelInputs, model_inputs
from cafemed.codes import KINDS, LABORATORY, node_name
from cafemed.cohort import read_ddi, read_molecules, read_vocabulary, write_ddi
from cafemed.config import Range, from_mapping
from cafemed.errors import ArtifactError, ConfigError
from cafemed.graphs import (
    CausalGraph,
    EffectTable,
    read_effects,
    read_graph,
    write_effects,
    write_graph,
)
from cafemed.names import Names, read_names, write_names
from cafemed.reference import Reference
from cafemed.scaling import Scaling

_MAX_HEADER_BYTES = 1 << 20  # a tensor's entry takes about 100 bytes
#: Codes of a kind. Interactions are a matrix over the medications.
_MAX_CODES = 200_000
_MAX_MEDICATIONS = 10_000
#: A whole number among a model's options that is never too large.
_MODEST = 1024
_MAX_REASON = 200
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What happens before and after the model; content of `preprocessing.json`.

    Attributes:
        inputs: "current": the visit's own diagnoses and procedures are given; "history": those of
            the visit before.
        medication_level: what a medication code stands for, for instance "atc3".
        target_window_h: medications started within so many hours are recommended; None: all of
            the stay.
        threshold: a medication is recommended if its probability reaches this.
        temperature: logits are divided by this before the sigmoid; 1 leaves them alone.
        scaling: of ages and laboratory values.
    """

    inputs: Literal["current", "history"] = "current"
    medication_level: str = "atc3"
    target_window_h: Annotated[float, Range(0, open_low=True)] | None = None
    threshold: Annotated[float, Range(0, 1, open_low=True, open_high=True)] = 0.5
    temperature: Annotated[float, Range(0, math.inf, open_low=True, open_high=True)] = 1.0
    scaling: Scaling = dataclasses.field(default_factory=Scaling)


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A model with all that it needs to answer requests.

    Attributes:
        model_name: name in the registry of models.
        model_options: the model's options; JSON values.
        weights: state dict on the CPU.
        vocabularies: kind → codes, index = position; "laboratory" → items, where there are any.
        graph: gives the node classes of visits.
        effects: of diagnoses and procedures on medications, in vocabulary order.
        ddi: bool (N_m, N_m), symmetric, zero diagonal.
        preprocessing: see Preprocessing.
        reference: see cafemed/reference.py.
        metrics: what was measured on which split; JSON values.
        sources: name of each input (cohort, graph) → its fingerprint.
        molecules: medication code → canonical SMILES; empty where nothing is known.
        names: kind → code → name, where the user gave any.
        fingerprint: of the manifest; "" for a bundle that was never saved.
    """

    model_name: str
    model_options: Mapping[str, Any]
    weights: Mapping[str, torch.Tensor]
    vocabularies: Mapping[str, tuple[str, ...]]
    graph: CausalGraph
    effects: EffectTable
    ddi: NDArray[np.bool_]
    preprocessing: Preprocessing
    reference: Reference
    metrics: Mapping[str, Any]
    sources: Mapping[str, str]
    molecules: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    names: Names = dataclasses.field(default_factory=dict)
    fingerprint: str = ""


def write(target: Path, bundle: Bundle) -> str:
    """Writes a bundle folder, whole or not at all, and gives its fingerprint.

    Raises:
        ArtifactError: if the parts do not belong together, or weights are not finite.
    """
    _require_consistent(bundle)
    weights = safetensors.torch.save(
        {name: t.detach().cpu().contiguous().clone() for name, t in bundle.weights.items()}
    )
    sources = {**bundle.sources, "weights": hashlib.sha256(weights).hexdigest()}
    model = {"name": bundle.model_name, "options": dict(bundle.model_options)}
    preprocessing = dataclasses.asdict(bundle.preprocessing)
    config = {"model": model, "preprocessing": preprocessing}
    with artifacts.new_folder(target, bundle_files.STAGE, sources, config) as (folder, _):
        (folder / "model.safetensors").write_bytes(weights)
        bundle_files.write_json(folder / "config.json", model)
        bundle_files.write_json(folder / "vocabulary.json", {LABORATORY: (), **bundle.vocabularies})
        write_graph(bundle.graph, folder / "graph.parquet")
        write_effects(bundle.effects, folder / "effects.npz")
        write_ddi(bundle.ddi, bundle.vocabularies["medication"], folder / "ddi.parquet")
        bundle_files.write_json(folder / "molecules.json", dict(bundle.molecules))
        write_names(bundle.names, folder / "names.json")
        bundle_files.write_json(folder / "preprocessing.json", preprocessing)
        bundle_files.write_json(folder / "reference.json", reference.to_json(bundle.reference))
        bundle_files.write_json(folder / "metrics.json", dict(bundle.metrics))
    return artifacts.fingerprint(bundle_files.STAGE, sources, config)


def load(folder: Path) -> Bundle:
    """Reads a bundle folder and checks all that can be checked without building the model.

    One that an earlier version of the program wrote is converted on the way; the folder stays.

    Raises:
        ArtifactError: if a file is missing, unknown, truncated or edited, is not of its format, or
            the files do not belong together.
    """
    manifest = bundle_files.verify(folder)
    try:
        with bundle_formats.current(folder, manifest.format_version) as files:
            bundle = _read(files, manifest)
        _require_consistent(bundle)
    except ArtifactError as err:
        raise ArtifactError(_located(folder, str(err))) from err
    return bundle


def inputs(bundle: Bundle) -> ModelInputs:
    """What `models.build` takes besides name and options."""
    return model_inputs(bundle.vocabularies, bundle.effects, bundle.ddi, bundle.molecules)


def self_check(bundle: Bundle, model: nn.Module) -> float:
    """Gives the model the invented visits; the largest difference from the recorded logits.

    Raises:
        ArtifactError: if it is more than rounding.
    """
    return reference.run_self_check(
        bundle.reference.self_check,
        model,
        bundle.graph,
        bundle.vocabularies,
        bundle.preprocessing.scaling,
    )


def restore_model(bundle: Bundle, build: Callable[..., nn.Module]) -> nn.Module:
    """Builds the bundle's model, in evaluation mode, and runs its self-check.

    Args:
        bundle: as loaded.
        build: `models.build`.

    Raises:
        ArtifactError: if the weights do not fit the model, or the self-check fails.
        ConfigError: if the model's name or an option is unknown.
    """
    model = build(bundle.model_name, inputs(bundle), bundle.model_options)
    try:
        model.load_state_dict(dict(bundle.weights))
    except (
        RuntimeError
    ) as err:  # torch lists every tensor; the first line after the title is enough
        lines = [line.strip() for line in str(err).splitlines() if line.strip()]
        reason = lines[1] if len(lines) > 1 else lines[0]
        raise ArtifactError(
            f"model.safetensors: not the weights of {bundle.model_name} with these options and "
            f"vocabularies: {reason}"
        ) from err
    model.eval()
    self_check(bundle, model)
    return model


def _read(folder: Path, manifest: artifacts.Manifest) -> Bundle:
    """Reads the files of a bundle in today's format."""
    for path in sorted(folder.glob("*.json")):
        bundle_files.require_encodable(path)
    model = bundle_files.read_json(folder / "config.json")
    if not isinstance(model.get("name"), str) or not isinstance(model.get("options"), dict):
        raise ArtifactError("config.json: expected keys name and options")
    vocabularies = read_vocabulary(folder / "vocabulary.json")
    _require_vocabularies(vocabularies)
    checked = reference.from_json(bundle_files.read_json(folder / "reference.json"), vocabularies)
    weights = _read_weights(folder / "model.safetensors")
    _require_modest(model["options"], weights)
    return Bundle(
        model_name=model["name"],
        model_options=model["options"],
        weights=weights,
        vocabularies=vocabularies,
        graph=read_graph(folder / "graph.parquet"),
        effects=read_effects(folder / "effects.npz"),
        ddi=_read_ddi(folder / "ddi.parquet", vocabularies["medication"]),
        molecules=read_molecules(folder / "molecules.json", vocabularies["medication"]),
        names=read_names(folder / "names.json", vocabularies),
        preprocessing=_read_preprocessing(folder / "preprocessing.json"),
        reference=checked,
        metrics=bundle_files.read_json(folder / "metrics.json"),
        sources={name: value for name, value in manifest.inputs.items() if name != "weights"},
        fingerprint=manifest.fingerprint,
    )


def _require_vocabularies(vocabularies: Mapping[str, tuple[str, ...]]) -> None:
    for kind, codes in vocabularies.items():
        if not all(isinstance(c, str) for c in codes) or len(set(codes)) < len(codes):
            raise ArtifactError(f"vocabulary.json: {kind}: expected distinct codes")
        most = _MAX_MEDICATIONS if kind == "medication" else _MAX_CODES
        if len(codes) > most:
            raise ArtifactError(f"vocabulary.json: {kind}: expected at most {most} codes")
    if not vocabularies["medication"]:  # there may be cohorts without procedures
        raise ArtifactError("vocabulary.json: medication: expected at least one code")


def _require_consistent(bundle: Bundle) -> None:
    _require_vocabularies(bundle.vocabularies)
    num_items = len(bundle.vocabularies.get(LABORATORY, ()))
    if bundle.preprocessing.scaling.num_items != num_items:
        raise ArtifactError(
            f"preprocessing.json: scaling: expected {num_items} laboratory items, the "
            f"vocabulary's, got {bundle.preprocessing.scaling.num_items}"
        )
    try:
        inputs(bundle)
    except ArtifactError as err:
        raise ArtifactError(f"effects.npz: {err}") from err
    if bundle.effects.standard_error.shape != bundle.effects.effect.shape:
        raise ArtifactError("effects.npz: expected standard_error in the shape of effect")
    if (bundle.ddi != bundle.ddi.T).any() or bundle.ddi.diagonal().any():
        raise ArtifactError("ddi.parquet: expected a symmetric matrix with zero diagonal")
    known = {node_name(kind, code) for kind in KINDS for code in bundle.vocabularies[kind]}
    known |= {node_name("previous_medication", c) for c in bundle.vocabularies["medication"]}
    strange = next((node for node in bundle.graph.nodes if node not in known), None)
    if strange is not None:
        raise ArtifactError(f"graph.parquet: node {strange} is not in vocabulary.json")
    for name, tensor in bundle.weights.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(f"model.safetensors: {name} holds NaN or infinity")


def _read_preprocessing(path: Path) -> Preprocessing:
    try:
        return from_mapping(Preprocessing, bundle_files.read_json(path), "")
    except ConfigError as err:
        raise ArtifactError(f"{path.name}: {err}") from err


def _read_ddi(path: Path, medications: tuple[str, ...]) -> NDArray[np.bool_]:
    try:
        return read_ddi(path, medications)
    except untrusted.STRANGE as err:
        raise ArtifactError(f"{path.name}: not a table of pairs ({type(err).__name__})") from err


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Reads safetensors after bounding the header, which the library would read up to 100 MB."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
    header = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= header <= min(_MAX_HEADER_BYTES, size - 8):
        raise ArtifactError(f"{path.name}: not a safetensors file (no header of a plausible size)")
    try:
        weights: dict[str, torch.Tensor] = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, *untrusted.STRANGE) as err:
        reason = str(err).splitlines()[0][:_MAX_REASON] if str(err) else type(err).__name__
        raise ArtifactError(f"{path.name}: not a safetensors file ({reason})") from err
    strange = next(
        (w for w in weights.values() if w.dtype not in (*_FLOATS, torch.int64, torch.bool)), None
    )
    if strange is not None:
        raise ArtifactError(f"{path.name}: expected floating-point weights, got {strange.dtype}")
    return weights


def _require_modest(options: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> None:
    """Refuses options that ask for a model much larger than its weights, before it is built.

    A layer of width d has d² weights or more.
    """
    most = max(_MODEST, math.isqrt(sum(tensor.numel() for tensor in weights.values())))
    for name, value in options.items():
        if isinstance(value, (int, float)) and not abs(value) <= most:
            raise ArtifactError(
                f"config.json: options.{name[:_MAX_REASON]}: expected at most {most}"
            )


def _located(folder: Path, message: str) -> str:
    """Puts the folder before a message that names a file of it."""
    return message if message.startswith(str(folder)) else f"{folder}/{message}"
