"""Bundles of earlier formats, converted to today's on reading.

Format 1: without a number of its own for each, what it holds grew four times. It came to give each
effect a range over the Markov class and the visits that tell of it; then a vocabulary of laboratory
items, scaling, and `molecules.json`; the models' direct path and its pace became options, whose
absence in `config.json` means that there was none, or that its pace was 5; and codes got names.
(A graph without the edges' strength is read as it is: `graphs.read_graph`.)

Format 2: all of that, always.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cafemed import artifacts, bundle_files, untrusted
from cafemed.codes import LABORATORY
from cafemed.errors import ArtifactError

#: Of the direct path, while it was a constant.
_OLD_PACE = 5.0


@contextlib.contextmanager
def current(folder: Path, version: int) -> Iterator[Path]:
    """A folder with a bundle's files in today's format, while the block runs.

    Args:
        folder: a bundle whose files were verified.
        version: its format; the folder itself is given if it is today's.

    Raises:
        ArtifactError: naming the file, if the content is not of this format.
    """
    newest = artifacts.format_version(bundle_files.STAGE)
    if version == newest:
        yield folder
        return
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for path in folder.iterdir():
            (copy / path.name).symlink_to(path.resolve())
        for step in range(version, newest):
            for file, convert in _STEPS[step].items():
                try:
                    convert(copy / file)
                except untrusted.STRANGE as err:
                    raise ArtifactError(
                        f"{file}: not of format {step} ({type(err).__name__})"
                    ) from err
        try:
            yield copy
        except ArtifactError as err:  # the user's folder, not the copy, is what a message names
            raise ArtifactError(str(err).replace(str(copy), str(folder))) from err


def _with_direct_path(path: Path) -> None:
    def convert(model: dict[str, Any]) -> None:
        options = model["options"]
        if model["name"] == "cafemed" and "direct" not in options:
            options["direct"] = "none"
        if options.get("direct", "none") != "none":
            options.setdefault("direct_pace", _OLD_PACE)

    _edit(path, convert)


def _with_ranges(path: Path) -> None:
    """As `EffectTable.known`: every effect is supported, and its range is itself."""
    with untrusted.open_arrays(path) as content:
        arrays = dict(content)
    effect = arrays["effect"]
    absent = {
        "minimum": effect,
        "maximum": effect,
        "support": np.zeros(effect.shape, np.int32),
        "supported": np.ones(effect.shape, np.bool_),
        "visits": np.full(len(effect), np.nan, np.float32),
    }
    if absent.keys() <= arrays.keys():
        return
    path.unlink()
    np.savez(path, **{**absent, **arrays})


def _with_laboratory(path: Path) -> None:
    _edit(path, lambda vocabularies: vocabularies.setdefault(LABORATORY, []))


def _with_scaling(path: Path) -> None:
    # The models of that time saw no age; the default leaves ages as they are.
    _edit(path, lambda preprocessing: preprocessing.setdefault("scaling", {}))


def _with_none(path: Path) -> None:
    if not path.exists():
        bundle_files.write_json(path, {})


def _with_no_measurements(path: Path) -> None:
    def convert(reference: dict[str, Any]) -> None:
        for patient in reference["self_check"]["patients"]:
            for visit in patient["visits"]:
                visit.setdefault("laboratory", {})

    _edit(path, convert)


def _edit(path: Path, convert: Callable[[dict[str, Any]], object]) -> None:
    """Replaces a link to a JSON file by the converted content."""
    content = bundle_files.read_json(path)
    convert(content)
    path.unlink()
    bundle_files.write_json(path, content)


#: Format → file → what makes it one of the next format.
_STEPS: dict[int, dict[str, Callable[[Path], None]]] = {
    1: {
        "config.json": _with_direct_path,
        "effects.npz": _with_ranges,
        "vocabulary.json": _with_laboratory,
        "preprocessing.json": _with_scaling,
        "molecules.json": _with_none,
        "names.json": _with_none,
        "reference.json": _with_no_measurements,
    }
}
