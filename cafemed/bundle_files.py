"""A bundle folder seen from outside: which files it has, and that none was changed.

This needs no torch, so that the registry can publish and look up versions at once.
"""

from pathlib import Path

from cafemed import artifacts
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
    "preprocessing.json",
    "reference.json",
    "metrics.json",
)


def verify(folder: Path) -> artifacts.Manifest:
    """Compares a bundle folder's files with its manifest, without reading their content.

    Raises:
        ArtifactError: for a missing or unknown file, a link, or a size or SHA-256 that differs.
    """
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: expected a bundle folder, found none")
    wanted = {*FILES, artifacts.MANIFEST}
    for path in sorted(folder.iterdir()):
        if path.name not in wanted or path.is_symlink() or not path.is_file():
            raise ArtifactError(f"{path}: not a file of a bundle; remove it or publish anew")
    manifest = artifacts.read_manifest(folder, STAGE)
    _require_manifest(folder / artifacts.MANIFEST, manifest)
    return artifacts.verify(folder, STAGE)


def _require_manifest(path: Path, manifest: artifacts.Manifest) -> None:
    # The names are compared with the ones above before any is used as a path.
    files = manifest.files
    if not isinstance(files, dict) or set(files) != set(FILES):
        raise ArtifactError(f"{path}: expected the files {', '.join(FILES)}")
    for name, entry in files.items():
        if not isinstance(entry, dict) or set(entry) != {"sha256", "bytes"}:
            raise ArtifactError(f"{path}: {name}: expected sha256 and bytes")
    if not isinstance(manifest.inputs, dict) or not isinstance(manifest.config, dict):
        raise ArtifactError(f"{path}: expected mappings under inputs and config")
    expected = artifacts.fingerprint(STAGE, manifest.inputs, manifest.config)
    if manifest.fingerprint != expected:
        raise ArtifactError(f"{path}: fingerprint does not follow from its content; it was edited")
    if manifest.inputs.get("weights") != files["model.safetensors"]["sha256"]:
        raise ArtifactError(f"{path}: inputs.weights is not the SHA-256 of model.safetensors")
