"""PyTorch models of medication recommendation, and the one registry of them.

A model is built from its name, the fixed inputs and its options; `forward(batch)` gives logits,
float32 (B, T, N_m), one row for each visit given the visits before it; steps after a patient's
last visit hold 0.
"""

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from cafemed import config
from cafemed.batches import ModelInputs
from cafemed.errors import ArtifactError, ConfigError

# name → (module, model class, options class). Modules are imported when asked for, so that one
# model's dependencies do not become everyone's.
_REGISTRY = {
    "cafemed": ("models.cafemed", "CafeMed", "CafeMedOptions"),
    "causalmed": ("models.causalmed", "CausalMed", "CausalMedOptions"),
    "graphdiffmed": ("models.graphdiffmed", "GraphDiffMed", "GraphDiffMedOptions"),
}

#: The names that `build` knows.
NAMES = tuple(_REGISTRY)


def build(
    name: str, inputs: ModelInputs, options: Mapping[str, Any] | None = None, seed: int = 0
) -> nn.Module:
    """Builds a model with new weights; the same seed gives the same weights to the bit.

    The caller's random state is left as it was.

    Args:
        name: one of NAMES.
        inputs: sizes, effects and interacting pairs.
        options: fields of the model's options dataclass; those left out take their defaults.
        seed: of the weights.

    Raises:
        ConfigError: if the name or an option is unknown, or a value is out of range or does not
            go with another.
        ArtifactError: if effects, interactions or molecules are not of the vocabularies' sizes.
    """
    module, model_class, options_class = _entry(name)
    _require_shapes(inputs)
    checked = config.from_mapping(getattr(module, options_class), options or {}, "model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = getattr(module, model_class)(inputs, checked)
    return model


def _require_shapes(inputs: ModelInputs) -> None:
    diagnoses, procedures, medications = inputs.sizes
    expected = {"effects": (diagnoses + procedures, medications), "ddi": (medications, medications)}
    for what, shape in expected.items():
        if (got := getattr(inputs, what).shape) != shape:
            raise ArtifactError(
                f"{what}: expected shape {shape} for vocabularies of {inputs.sizes} diagnoses, "
                f"procedures and medications, got {got}"
            )
    if inputs.molecules is not None and len(inputs.molecules) != medications:
        raise ArtifactError(
            f"molecules: expected {medications} rows, one a medication, got {len(inputs.molecules)}"
        )


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Checks a model's name and options without building it.

    Raises:
        ConfigError: see `build`.
    """
    module, _, options_class = _entry(name)
    config.from_mapping(getattr(module, options_class), options, "model")


def options_class(name: str) -> type:
    """The dataclass of a model's options: their defaults and what they may be.

    Raises:
        ConfigError: if the name is unknown.
    """
    module, _, options = _entry(name)
    found: type = getattr(module, options)
    return found


def _entry(name: str) -> tuple[Any, str, str]:
    if name not in _REGISTRY:
        raise ConfigError(f"model.name: expected one of {', '.join(NAMES)}, got {name!r}")
    path, model_class, options_class = _REGISTRY[name]
    return importlib.import_module(path), model_class, options_class
