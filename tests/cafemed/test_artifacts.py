import json
import os
import subprocess
import sys

import numpy as np
import pytest

from cafemed import artifacts
from cafemed.errors import ArtifactError


def write(folder, text="content", stage="graph", private=False, **config):
    with artifacts.new_folder(folder, stage, {"in": "abc"}, config, private=private) as (
        new,
        report,
    ):
        (new / "a.txt").write_text(text)
        (new / "deep").mkdir()
        (new / "deep" / "b.txt").write_text("b")
        report["rows"] = np.int64(3)
    return folder


def modes(folder):
    return {p.stat().st_mode & 0o777 for p in folder.rglob("*") if p.is_file()}, {
        p.stat().st_mode & 0o777 for p in [folder, *folder.rglob("*")] if p.is_dir()
    }


def test_the_manifest_says_what_the_folder_holds(tmp_path):
    manifest = artifacts.verify(write(tmp_path / "graph", alpha=1), "graph")
    assert manifest.inputs == {"in": "abc"}
    assert manifest.config == {"alpha": 1}
    assert manifest.report == {"rows": 3}
    assert sorted(manifest.files) == ["a.txt", "deep/b.txt"]
    assert manifest.files["a.txt"] == {
        "bytes": 7,
        # echo -n content | sha256sum
        "sha256": "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73",
    }


def test_fingerprints_depend_on_stage_inputs_and_config_alone():
    base = artifacts.fingerprint("graph", {"a": "1", "b": "2"}, {"x": 1, "y": (2, 3)})
    assert base == artifacts.fingerprint("graph", {"b": "2", "a": "1"}, {"y": [2, 3], "x": 1})
    others = [
        artifacts.fingerprint("cohort", {"a": "1", "b": "2"}, {"x": 1, "y": (2, 3)}),
        artifacts.fingerprint("graph", {"a": "1", "b": "3"}, {"x": 1, "y": (2, 3)}),
        artifacts.fingerprint("graph", {"a": "1", "b": "2"}, {"x": 2, "y": (2, 3)}),
    ]
    assert len({base, *others}) == 4


def test_private_folders_are_for_their_owner(tmp_path):
    previous = os.umask(0o022)
    try:
        assert modes(write(tmp_path / "secret", private=True)) == ({0o600}, {0o700})
        assert modes(write(tmp_path / "open")) == ({0o644}, {0o755})
    finally:
        os.umask(previous)


def test_an_interrupted_write_leaves_the_old_folder(tmp_path):
    folder = write(tmp_path / "graph")

    def interrupted():
        with artifacts.new_folder(folder, "graph", {}, {}) as (new, _):
            (new / "a.txt").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (folder / "a.txt").read_text() == "content"
    artifacts.verify(folder, "graph")
    assert [p.name for p in tmp_path.iterdir()] == ["graph"]


def test_a_dead_writers_leftovers_are_removed_by_the_next(tmp_path):
    folder = write(tmp_path / "graph")
    program = (
        "import os, sys, pathlib\n"
        "from cafemed import artifacts\n"
        "with artifacts.new_folder(pathlib.Path(sys.argv[1]), 'graph', {}, {}) as (new, _):\n"
        "    (new / 'a.txt').write_text('half')\n"
        "    os._exit(1)\n"
    )
    subprocess.run([sys.executable, "-c", program, folder], check=False, timeout=60)
    assert len(list(tmp_path.iterdir())) == 2
    assert (folder / "a.txt").read_text() == "content"
    write(folder, text="new")
    assert [p.name for p in tmp_path.iterdir()] == ["graph"]
    assert (folder / "a.txt").read_text() == "new"


def test_a_living_writers_folder_is_left_alone(tmp_path):
    with artifacts.new_folder(tmp_path / "graph", "graph", {}, {}) as (first, _):
        write(tmp_path / "graph", text="second")
        assert first.is_dir()
        (first / "a.txt").write_text("first")
    assert (tmp_path / "graph" / "a.txt").read_text() == "first"


def test_a_stage_is_current_only_if_whole_and_the_same(tmp_path):
    folder = tmp_path / "graph"
    wanted = artifacts.fingerprint("graph", {"in": "abc"}, {"alpha": 1})
    assert not artifacts.is_current(folder, "graph", wanted)
    write(folder, alpha=1)
    assert artifacts.is_current(folder, "graph", wanted)
    assert not artifacts.is_current(folder, "cohort", wanted)
    assert not artifacts.is_current(folder, "graph", "other")
    (folder / "a.txt").write_text("edited!")
    assert not artifacts.is_current(folder, "graph", wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"format_version": 99},
            "format_version 99, this program reads 1; a newer program .* jobs/discover.py",
        ),
        ({"stage": "bundle"}, "expected stage 'graph', got 'bundle'"),
        ({"surprise": 1}, "not a manifest"),
    ],
)
def test_another_manifest_is_refused(tmp_path, change, message):
    path = write(tmp_path / "graph") / artifacts.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ArtifactError, match=message):
        artifacts.read_manifest(path.parent, "graph")


@pytest.mark.parametrize("content", ["", "[]", "{", "7"])
def test_a_broken_manifest_is_refused(tmp_path, content):
    path = write(tmp_path / "graph") / artifacts.MANIFEST
    path.write_text(content)
    with pytest.raises(ArtifactError, match="not a manifest"):
        artifacts.read_manifest(path.parent, "graph")


def test_a_folder_without_manifest_is_refused(tmp_path):
    with pytest.raises(
        ArtifactError, match="expected the manifest of a graph, found no file; run jobs/discover"
    ):
        artifacts.verify(tmp_path, "graph")


def test_a_mismatch_prints_both_fingerprints():
    artifacts.require_match("graph", "a" * 64, "a" * 64)
    with pytest.raises(ArtifactError, match=r"graph: made from .* bbbbbbbbbbbb…, .* aaaaaaaaaaaa…"):
        artifacts.require_match("graph", "a" * 64, "b" * 64)


def test_text_is_replaced_whole(tmp_path):
    path = tmp_path / "alias.json"
    artifacts.write_text(path, "one")
    artifacts.write_text(path, "two")
    assert path.read_text() == "two"
    assert list(tmp_path.iterdir()) == [path]


def test_a_report_that_is_no_json_leaves_nothing(tmp_path):
    with (
        pytest.raises(TypeError, match="object is not JSON"),
        artifacts.new_folder(tmp_path / "graph", "graph", {}, {}) as (_, report),
    ):
        report["x"] = object()
    assert list(tmp_path.iterdir()) == []
