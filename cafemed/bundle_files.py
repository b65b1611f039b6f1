"""A bundle folder seen from outside: which files it has, and that none was changed.

This needs no torch, so that the registry can publish and look up versions at once.
"""

import json
from pathlib import Path
from typing import Any

from cafemed import artifacts, untrusted
from cafemed.errors import ArtifactError

STAGE = "bundle"
FILES = (
    "model.safetensors",
    "config.json",
    "vocabulary.json",
    "graph.parquet",
    "effects.npz",
    "ddi.parquet",
    "molecules.json",
    "names.json",
    "preprocessing.json",
    "reference.json",
    "metrics.json",
)
#: Files that bundles of format 1 may lack.
_LATER_THAN_1 = {"molecules.json", "names.json"}

_MAX_JSON_BYTES = 64 << 20
#: Largest size by the ending of a file's name: anything may lie in a registry, and is hashed.
_MAX_BYTES = {
    ".safetensors": 2 << 30,
    ".json": _MAX_JSON_BYTES,
    ".parquet": untrusted.MAX_TABLE_BYTES,
    ".npz": untrusted.MAX_ARRAY_BYTES,
}


def verify(folder: Path) -> artifacts.Manifest:
    """Compares a bundle folder's files with its manifest, without reading their content.

    Raises:
        ArtifactError: for a missing or unknown file, a link, a size over the limit, or a size or
            SHA-256 that differs.
    """
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: expected a bundle folder, found none")
    wanted = {*FILES, artifacts.MANIFEST}
    for path in sorted(folder.iterdir()):
        if path.name not in wanted or path.is_symlink() or not path.is_file():
            raise ArtifactError(f"{path}: not a file of a bundle; remove it or publish anew")
        untrusted.require_size(path, _MAX_BYTES[path.suffix])
    manifest = artifacts.read_manifest(folder, STAGE)
    _require_manifest(folder / artifacts.MANIFEST, manifest)
    return artifacts.verify(folder, STAGE)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a bundle's JSON file.

    Raises:
        ArtifactError: if it is too large, or no JSON mapping.
    """
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ArtifactError(f"{path.name}: larger than {_MAX_JSON_BYTES >> 20} MiB")
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as err:
        raise ArtifactError(f"{path.name}: not JSON ({type(err).__name__})") from err
    if not isinstance(content, dict):
        raise ArtifactError(f"{path.name}: expected a mapping, got {type(content).__name__}")
    return content


def require_encodable(path: Path) -> None:
    """Refuses a bundle's JSON file that has text which is not UTF-8.

    Raises:
        ArtifactError: if it has any, or is too large.
    """
    untrusted.require_size(path, _MAX_JSON_BYTES)
    try:
        text = path.read_text()
    except ValueError as err:
        raise ArtifactError(f"{path.name}: not JSON ({type(err).__name__})") from err
    untrusted.require_encodable(path.name, text)


def write_json(path: Path, content: Any) -> None:
    """Writes a bundle's JSON file; NaN and infinity are refused."""
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def _require_manifest(path: Path, manifest: artifacts.Manifest) -> None:
    # The names are compared with the ones above before any is used as a path.
    files = manifest.files
    lacking = _LATER_THAN_1 if manifest.format_version == 1 else set()
    if not isinstance(files, dict) or not set(FILES) - lacking <= set(files) <= set(FILES):
        raise ArtifactError(f"{path}: expected the files {', '.join(FILES)}")
    for name, entry in files.items():
        if not isinstance(entry, dict) or set(entry) != {"sha256", "bytes"}:
            raise ArtifactError(f"{path}: {name}: expected sha256 and bytes")
    if not isinstance(manifest.inputs, dict) or not isinstance(manifest.config, dict):
        raise ArtifactError(f"{path}: expected mappings under inputs and config")
    version = manifest.format_version
    expected = artifacts.fingerprint(STAGE, manifest.inputs, manifest.config, version)
    if manifest.fingerprint != expected:
        raise ArtifactError(f"{path}: fingerprint does not follow from its content; it was edited")
    if manifest.inputs.get("weights") != files["model.safetensors"]["sha256"]:
        raise ArtifactError(f"{path}: inputs.weights is not the SHA-256 of model.safetensors")
