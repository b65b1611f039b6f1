"""Bundles made to harm: each is refused in one line, in little time and memory, and runs nothing.

Each is loaded as a replica does, in a process whose time and memory are limited and looked at. Its
manifest agrees with its files, as somebody who makes one on purpose would have it.
"""

import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from cafemed import artifacts, bundle_files, paths
from cafemed import bundle as bundles
from cafemed.bundle import Bundle

pytestmark = pytest.mark.slow

MAX_SECONDS = 3.0
MAX_MIB = 400.0
#: Loads the bundles that it is told of, each in a child with at most 2 GiB more than it has.
LOADER = """
import json, os, resource, sys, time
import models
from cafemed.errors import UserError
from pathlib import Path
from serve.recommender import Recommender

def load(folder):
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * os.sysconf("SC_PAGE_SIZE") + (2 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    try:
        Recommender.load(Path(folder), 1)
        kind, message = "", ""
    except BaseException as err:
        kind, message = type(err).__name__, str(err)
    seconds = time.process_time() - started
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"kind": kind, "message": message, "seconds": seconds, "mib": grown / 1024}

print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if not child:
        print(json.dumps(load(line.strip())), flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print(json.dumps({"kind": "died", "message": "", "seconds": 0, "mib": 0}), flush=True)
"""

Hurt = Callable[[Path], object]


class Loader:
    """The process that loads."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", LOADER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=paths.PROJECT_DIR,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self._line()

    def load(self, folder: Path) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(folder, file=self._process.stdin, flush=True)
        told: dict[str, Any] = json.loads(self._line())
        return told

    def close(self) -> None:
        self._process.communicate(timeout=10)  # closes the pipes, which ends it

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


@pytest.fixture(scope="module")
def loader() -> Iterator[Loader]:
    started = Loader()
    yield started
    started.close()


@pytest.fixture(scope="module")
def whole(served: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "bundle"
    bundles.write(folder, served)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "bundle"))


def seal(folder: Path, **changes: Any) -> None:
    """Makes the manifest agree with the files, but does not read a file that is nearly all hole."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    for name in content["files"]:
        size = (folder / name).stat().st_size
        digest = "0" * 64 if size > 1 << 30 else artifacts.sha256_of(folder / name)
        content["files"][name] = {"sha256": digest, "bytes": size}
    content["inputs"]["weights"] = content["files"]["model.safetensors"]["sha256"]
    version = content["format_version"]
    content["fingerprint"] = artifacts.fingerprint(
        "bundle", content["inputs"], content["config"], version
    )
    path.write_text(json.dumps(content | changes))


def require_refused(told: dict[str, Any], folder: Path, said: str = "") -> None:
    assert told["kind"] == "ArtifactError", told
    assert told["message"].startswith(str(folder)), told
    assert "\n" not in told["message"]
    assert len(told["message"]) < 1000
    assert said in told["message"], told
    assert told["seconds"] < MAX_SECONDS, told
    assert told["mib"] < MAX_MIB, told


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("names.json", '{"medication": {"atc:A01B": "name\\ud800"}}'),
        ("names.json", '{"diagnosis": {"icd9:4010": "\\uDFFF"}}'),
        ("metrics.json", '{"jaccard": "\\ud83d"}'),
        ("config.json", None),
        ("vocabulary.json", None),
    ],
)
def test_text_that_could_never_be_sent_is_refused(
    loader: Loader, folder: Path, name: str, text: str | None
) -> None:
    path = folder / name
    path.write_text(path.read_text().replace("a", "\\ud800", 1) if text is None else text)
    seal(folder)
    require_refused(loader.load(folder), folder, f"{name}: has text that is not UTF-8")


def test_whole_surrogate_pairs_are_text(loader: Loader, folder: Path) -> None:
    (folder / "names.json").write_text('{"medication": {"atc:A01B": "\\ud83d\\ude00 \\\\ud800"}}')
    seal(folder)
    assert loader.load(folder)["kind"] == ""


def test_a_whole_bundle_is_loaded(loader: Loader, folder: Path) -> None:
    seal(folder)
    assert loader.load(folder)["kind"] == ""


def edited(name: str, change: Callable[[Any], Any]) -> Hurt:
    def hurt(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return hurt


def written(name: str, content: Callable[[], bytes]) -> Hurt:
    return lambda folder: (folder / name).write_bytes(content())


def hole(name: str, size: int) -> Hurt:
    """A file that says it is large and takes no room."""

    def hurt(folder: Path) -> None:
        with (folder / name).open("r+b") as file:
            file.truncate(size)

    return hurt


def tensors(**added: torch.Tensor) -> Hurt:
    def hurt(folder: Path) -> None:
        path = folder / "model.safetensors"
        held = safetensors.torch.load_file(path)
        replaced = {name: held[name] for name in list(held)} | added
        path.write_bytes(safetensors.torch.save(replaced))

    return hurt


def header(claimed: int, text: bytes) -> Callable[[], bytes]:
    return lambda: struct.pack("<Q", claimed) + text


def claims(**entry: Any) -> Callable[[], bytes]:
    text = json.dumps({"bias": entry}).encode()
    return header(len(text), text + b"\0" * 64)


def arrays(**replaced: Any) -> Hurt:
    """Replaces members of the archive: arrays, or bytes to be written as they are."""

    def hurt(folder: Path) -> None:
        with np.load(folder / "effects.npz") as held:
            kept = {name: held[name] for name in held.files if name not in replaced}
        with zipfile.ZipFile(folder / "effects.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, value in {**kept, **replaced}.items():
                content = io.BytesIO()
                if isinstance(value, bytes):
                    content.write(value)
                else:
                    np.lib.format.write_array(content, np.asarray(value))
                archive.writestr(f"{name}.npy", content.getvalue())

    return hurt


def npy(described: str, content: bytes = b"") -> bytes:
    """An array's file with any header."""
    text = described.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + content


def packed_zeros(size_mib: int) -> Hurt:
    """An honest archive of an array of zeros, packed a thousand times smaller."""

    def hurt(folder: Path) -> None:
        count = size_mib << 20
        start = npy(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({count},)}}")
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        first = packer.compress(start) + packer.flush(zlib.Z_FULL_FLUSH)
        block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
        content = first + block * size_mib + packer.flush(zlib.Z_FINISH)
        name = b"effect.npy"
        sizes = struct.pack("<III", 0, len(content), len(start) + count)
        local = struct.pack("<IHHHHH", 0x04034B50, 20, 0, 8, 0, 33) + sizes
        local += struct.pack("<HH", len(name), 0) + name
        central = struct.pack("<IHHHHHH", 0x02014B50, 20, 20, 0, 8, 0, 33) + sizes
        central += struct.pack("<HHHHHII", len(name), 0, 0, 0, 0, 0, 0) + name
        where = len(local) + len(content)
        end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 1, 1, len(central), where, 0)
        (folder / "effects.npz").write_bytes(local + content + central + end)

    return hurt


def table(name: str, columns: dict[str, Any], **options: Any) -> Hurt:
    def hurt(folder: Path) -> None:
        pq.write_table(pa.table(columns), folder / name, **options)

    return hurt


def repeated(text: str, rows: int) -> pa.Array:
    """A column of one text, which the file holds once."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([text]))


def nodes(text: str) -> Hurt:
    def hurt(folder: Path) -> None:
        held = pq.read_table(folder / "graph.parquet")
        pq.write_table(held.replace_schema_metadata({"nodes": text}), folder / "graph.parquet")

    return hurt


def visits(change: Callable[[list[dict[str, Any]]], object]) -> Hurt:
    return edited("reference.json", lambda c: change(c["self_check"]["patients"]))


class Payload:
    """What runs when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder.parent / "ran"),)


def object_array(folder: Path) -> None:
    with zipfile.ZipFile(folder / "effects.npz", "w") as archive:
        content = io.BytesIO()
        value = np.array([Payload(folder)], dtype=object)
        np.lib.format.write_array(content, value, allow_pickle=True)
        archive.writestr("effect.npy", content.getvalue())


def a_pipe(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def a_link_out(folder: Path) -> None:
    (folder / "metrics.json").unlink()
    (folder / "metrics.json").symlink_to("/etc/hostname")


DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
TERA = 1 << 40

HOSTILE: dict[str, tuple[Hurt, str]] = {
    **{
        f"pickle as {name}": (lambda f, n=name: (f / n).write_bytes(pickle.dumps(Payload(f))), name)  # type: ignore[misc]
        for name in bundle_files.FILES
    },
    "pickle in an array": (object_array, "effects.npz: effect.npy: expected plain values"),
    **{
        f"deep {name}": (written(name, lambda: DEEP), name)
        for name in bundle_files.FILES
        if name.endswith(".json")
    },
    "deep nodes": (nodes(DEEP.decode()), "graph.parquet: not a causal graph"),
    "large weights": (hole("model.safetensors", TERA), "expected at most 2048 MiB"),
    "large JSON": (hole("metrics.json", TERA), "expected at most 64 MiB"),
    "large arrays": (hole("effects.npz", TERA), "expected at most 1024 MiB"),
    "large table": (hole("ddi.parquet", TERA), "expected at most 64 MiB"),
    "header of 2^63": (written("model.safetensors", header(1 << 63, b"{}")), "plausible size"),
    "header of 90 MB": (
        written("model.safetensors", lambda: header(90 << 20, b" " * (91 << 20))()),
        "plausible size",
    ),
    "tensor of 2^60": (
        written("model.safetensors", claims(dtype="F32", shape=[1 << 60], data_offsets=[0, 64])),
        "not a safetensors file",
    ),
    "tensor that wraps around": (
        written("model.safetensors", claims(dtype="F32", shape=[1 << 62, 16], data_offsets=[0, 0])),
        "not a safetensors file",
    ),
    "tensor outside": (
        written("model.safetensors", claims(dtype="F32", shape=[16], data_offsets=[1 << 40, 64])),
        "not a safetensors file",
    ),
    "NaN weights": (tensors(extra=torch.tensor([1.0, torch.nan])), "extra holds NaN"),
    "complex weights": (tensors(extra=torch.ones(2, dtype=torch.complex64)), "complex64"),
    "8-bit weights": (tensors(extra=torch.ones(2).to(torch.float8_e4m3fn)), "float8"),
    "array of terabytes": (
        arrays(effect=npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({TERA},)}}")),
        "effect.npy: expected an array of 0 bytes",
    ),
    "array that wraps around": (
        arrays(effect=npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1 << 62, 4)}")),
        "effects.npz",
    ),
    "array of negative size": (
        arrays(
            effect=npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -4)}", b"1" * 16)
        ),
        "effects.npz",
    ),
    "header that is a program": (
        arrays(effect=npy("{'descr': __import__('os').mkdir('ran'), 'shape': (1,)}")),
        "effects.npz",
    ),
    "2 GiB of zeros packed into 2 MB": (packed_zeros(2048), "expected at most 1024 MiB of arrays"),
    "archive in an archive": (arrays(effect=b"PK\3\4" * 10), "effects.npz"),
    "text a million rows long": (
        table("ddi.parquet", dict.fromkeys("ab", repeated("x" * (1 << 20), 1_000_000))),
        "ddi.parquet: expected at most",
    ),
    "text a thousand rows long": (
        table("ddi.parquet", dict.fromkeys("ab", repeated("x" * (8 << 20), 1000))),
        "is not in the medication vocabulary",
    ),
    "edges without end": (
        table(
            "graph.parquet",
            dict.fromkeys(("source", "target"), repeated("x", 20_000_000)),
        ),
        "graph.parquet: expected at most 10000000 rows",
    ),
    "edges of a large text": (
        table(
            "graph.parquet",
            dict.fromkeys(("source", "target"), repeated("x" * (1 << 20), 1_000_000)),
        ),
        "graph.parquet",
    ),
    "table that unpacks without end": (
        table("graph.parquet", {"source": repeated("x", 1000)}, compression="gzip"),
        "expected it packed with Snappy, got GZIP",
    ),
    "nested table": (table("ddi.parquet", {"a": [[1]], "b": [[2]]}), "not nested"),
    "table without texts": (table("ddi.parquet", {"a": [1], "b": [2]}), "not a table of pairs"),
    "table with gaps": (table("ddi.parquet", {"a": ["x", None], "b": ["x", "y"]}), "ddi.parquet"),
    "a hundred thousand medications": (
        edited("vocabulary.json", lambda c: c.update(medication=[f"m{i}" for i in range(100_000)])),
        "medication: expected at most 10000 codes",
    ),
    "a model of terabytes": (
        edited("config.json", lambda c: c["options"].update(dimension=10**9)),
        "options.dimension: expected at most 1024",
    ),
    "a model of NaN": (
        edited("config.json", lambda c: c["options"].update(dropout=float("nan"))),
        "options.dropout",
    ),
    "a self-check without end": (
        visits(lambda p: p[0].update(visits=p[0]["visits"] * 50_000)),
        "at most 100 visits",
    ),
    "a self-check of lists": (
        visits(lambda p: p[0]["visits"][0].update(laboratory=[1])),
        "reference.json",
    ),
    "a self-check of nobody": (visits(lambda p: p[0].update(sex=None)), "expected a sex"),
    "a self-check of no age": (visits(lambda p: p[0]["visits"][0].update(age="x")), "reference."),
    "a self-check of Methuselah": (
        visits(lambda p: p[0]["visits"][0].update(age=10**400)),
        "reference.json",
    ),
    "a pipe": (a_pipe, "not a file of a bundle"),
    "a link out": (a_link_out, "not a file of a bundle"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_bundle_is_refused(
    loader: Loader, folder: Path, name: str, tmp_path: Path
) -> None:
    hurt, said = HOSTILE[name]
    hurt(folder)
    if name not in ("a pipe", "a link out"):
        seal(folder)
    require_refused(loader.load(folder), folder, said)
    assert not (tmp_path / "ran").exists()
    assert not (paths.PROJECT_DIR / "ran").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"files": {"../stolen": {"sha256": "0" * 64, "bytes": 1}}}, "expected the files"),
        ({"files": ["/etc/hostname"]}, "expected the files"),
        ({"inputs": []}, "expected mappings"),
        ({"inputs": {"weights": [[]]}}, "manifest.json"),
        ({"format_version": 10**400}, "format_version"),
        ({"format_version": "2; rm"}, "format_version"),
        ({"stage": {}}, "expected stage"),
        ({"more": 1}, "not a manifest"),
    ],
)
def test_a_hostile_manifest_is_refused(
    loader: Loader, folder: Path, change: dict[str, Any], said: str
) -> None:
    seal(folder, **change)
    require_refused(loader.load(folder), folder, said)


@pytest.mark.parametrize("content", [DEEP, b"[]", b"\xff", b"", b"null"])
def test_a_manifest_that_is_none_is_refused(loader: Loader, folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    require_refused(loader.load(folder), folder, "manifest.json: not a manifest")


def test_a_manifest_without_end_is_refused(loader: Loader, folder: Path) -> None:
    hole("manifest.json", TERA)(folder)
    require_refused(loader.load(folder), folder, "manifest.json: expected at most 64 MiB")


@pytest.mark.parametrize("name", [n for n in bundle_files.FILES if not n.endswith(".json")])
def test_damage_anywhere_is_refused_or_harmless(loader: Loader, folder: Path, name: str) -> None:
    """Bytes changed at random, the manifest agreeing: no other exception, no crash."""
    random = np.random.default_rng(7)
    before = (folder / name).read_bytes()
    for _ in range(12):
        content = bytearray(before)
        for place in random.integers(0, len(content), random.integers(1, 6)):
            content[place] = random.integers(0, 256)
        (folder / name).write_bytes(
            bytes(content[: random.integers(len(content) // 2, len(content) + 1)])
        )
        seal(folder)
        told = loader.load(folder)
        assert told["kind"] in ("", "ArtifactError"), told
        assert told["seconds"] < MAX_SECONDS
        assert told["mib"] < MAX_MIB
