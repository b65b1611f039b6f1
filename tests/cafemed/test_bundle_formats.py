"""Bundles of earlier formats: written by the programs of that time, they still work."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import models
from cafemed import artifacts, bundle, bundle_files, registry
from cafemed.errors import ArtifactError

OLD = Path(__file__).parent / "old_bundles"
NAMES = ("without-direct-path", "without-laboratory", "without-pace")


def edit(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes a JSON file, and the manifest so that it is still a whole bundle."""
    path, manifest = folder / name, folder / artifacts.MANIFEST
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    if name != artifacts.MANIFEST:
        entry = {"sha256": artifacts.sha256_of(path), "bytes": path.stat().st_size}
        edit(folder, manifest.name, lambda m: m["files"].update({name: entry}))


@pytest.mark.parametrize("name", NAMES)
def test_what_an_earlier_program_wrote_passes_its_own_self_check(name: str):
    before = {path.name: path.read_bytes() for path in (OLD / name).iterdir()}
    loaded = bundle.load(OLD / name)
    assert bundle.self_check(loaded, bundle.restore_model(loaded, models.build)) < 1e-4
    assert loaded.preprocessing.threshold == 0.4
    assert loaded.fingerprint == json.loads(before["manifest.json"])["fingerprint"]
    assert {path.name: path.read_bytes() for path in (OLD / name).iterdir()} == before


def test_what_was_not_written_then_is_what_it_meant():
    oldest = bundle.load(OLD / "without-direct-path")
    assert oldest.model_options["direct"] == "none"
    assert oldest.vocabularies["laboratory"] == ()
    assert oldest.molecules == {}
    assert oldest.preprocessing.scaling.ages(np.array([63.0])) == 10.0  # as it is, but cut
    np.testing.assert_array_equal(oldest.effects.minimum, oldest.effects.effect)
    assert oldest.effects.supported.all()
    assert np.isnan(oldest.graph.strength).all()
    later = bundle.load(OLD / "without-pace")
    assert (later.model_options["direct"], later.model_options["direct_pace"]) == ("noisy_or", 5.0)


def test_written_again_it_is_of_todays_format(tmp_path: Path):
    loaded = bundle.load(OLD / NAMES[0])
    bundle.write(tmp_path / "again", loaded)
    content = json.loads((tmp_path / "again" / "manifest.json").read_text())
    assert content["format_version"] == 2
    again = bundle.load(tmp_path / "again")
    assert again.model_options == loaded.model_options
    assert bundle.self_check(again, bundle.restore_model(again, models.build)) < 1e-4


def test_it_is_published_as_it_is(tmp_path: Path):
    home = tmp_path / "registry"
    registry.publish(home, OLD / NAMES[0], {})
    published = registry.resolve(home, 1)
    assert bundle_files.verify(published).format_version == 1
    assert bundle.load(published).model_name == "cafemed"


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (3, "format_version 3, this program reads 1 to 2; a newer program wrote it"),
        (0, "format_version 0, this program reads 1 to 2; promote another"),
        (True, "format_version True"),
        ("2", "format_version 2, this program reads"),
        (None, "format_version None"),
    ],
)
def test_another_format_is_refused_in_one_line(tmp_path: Path, found: object, message: str):
    folder = tmp_path / "bundle"
    shutil.copytree(OLD / NAMES[0], folder)
    # A newer program's manifest may also have keys that this one does not know.
    edit(folder, "manifest.json", lambda m: m.update(format_version=found, signed_by="somebody"))
    for read in (bundle.load, bundle_files.verify):
        with pytest.raises(ArtifactError, match=message) as caught:
            read(folder)
        assert "\n" not in str(caught.value)


def test_an_old_bundle_that_lacks_more_than_then_is_refused(tmp_path: Path):
    folder = tmp_path / "bundle"
    shutil.copytree(OLD / NAMES[0], folder)
    (folder / "effects.npz").unlink()
    edit(folder, "manifest.json", lambda m: m["files"].pop("effects.npz"))
    with pytest.raises(ArtifactError, match="expected the files"):
        bundle.load(folder)


def test_todays_bundle_without_molecules_is_refused(tmp_path: Path):
    bundle.write(tmp_path / "bundle", bundle.load(OLD / NAMES[0]))
    (tmp_path / "bundle" / "molecules.json").unlink()
    edit(tmp_path / "bundle", "manifest.json", lambda m: m["files"].pop("molecules.json"))
    with pytest.raises(ArtifactError, match="expected the files"):
        bundle.load(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", lambda c: c.update(options=[1]), "config.json: not of format 1"),
        ("reference.json", lambda c: c.update(self_check=7), "reference.json: not of format 1"),
        ("reference.json", lambda c: c.pop("self_check"), "reference.json: not of format 1"),
        ("preprocessing.json", lambda c: c.update(threshold=7), "preprocessing.json: threshold"),
        ("vocabulary.json", lambda c: c.update(medication=[]), "vocabulary.json: medication"),
    ],
)
def test_old_content_of_another_form_is_refused_by_file(tmp_path: Path, name, change, message):
    folder = tmp_path / "bundle"
    shutil.copytree(OLD / NAMES[0], folder)
    edit(folder, name, change)
    with pytest.raises(ArtifactError, match=message) as caught:
        bundle.load(folder)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


def test_old_effects_that_are_damaged_are_refused_by_name(tmp_path: Path):
    folder = tmp_path / "bundle"
    shutil.copytree(OLD / NAMES[0], folder)
    path = folder / "effects.npz"
    path.write_bytes(path.read_bytes()[:-50])
    entry = {"sha256": artifacts.sha256_of(path), "bytes": path.stat().st_size}
    edit(folder, "manifest.json", lambda m: m["files"].update({"effects.npz": entry}))
    with pytest.raises(ArtifactError, match=r"effects\.npz: not of format 1") as caught:
        bundle.load(folder)
    assert "\n" not in str(caught.value)
