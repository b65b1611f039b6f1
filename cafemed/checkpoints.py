"""Checkpoints of training: everything that an interrupted fit needs to go on as if it had not been.

A folder holds `checkpoint.json` (epoch, history, plain random states) and the safetensors file
that it names (weights, those of the best epoch if that was another, optimiser, torch's random
states). The JSON is replaced last and in one step, so a process that dies while saving leaves the
checkpoint before it. Nothing is ever unpickled.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from cafemed import artifacts
from cafemed.errors import ArtifactError
from cafemed.randomness import RandomStates

FILE = "checkpoint.json"
#: Version 1 has the best weights always, even where they are the weights.
FORMAT_VERSION = 2
#: What safetensors calls them.
_DTYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

#: state of an optimiser: parameter's index → name ("exp_avg", "step", …) → tensor
OptimizerState = dict[int, dict[str, Tensor]]


class OtherRunError(ArtifactError):
    """A checkpoint is of another run: other data, model or configuration, or another program."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The state of a fit after an epoch.

    Attributes:
        identity: of the run (configuration, model, data); a checkpoint of another run is refused.
        epoch: epochs done.
        best_epoch: the epoch that `best_weights` are of; 0 if there is none yet.
        weights: the model's state dict after `epoch`.
        best_weights: the same after `best_epoch`.
        optimizer: see OptimizerState.
        random: states of the generators after `epoch`, of the first process.
        history: one JSON object an epoch.
        random_of_others: the same of the processes that trained with it, by rank.
    """

    identity: str
    epoch: int
    best_epoch: int
    weights: dict[str, Tensor]
    best_weights: dict[str, Tensor]
    optimizer: OptimizerState
    random: RandomStates
    history: list[dict[str, Any]]
    random_of_others: tuple[RandomStates, ...] = ()


def identity(plain: Mapping[str, Any], contents: Iterable[ArrayLike]) -> str:
    """SHA-256 (hex) of what decides a fit's result: JSON values, and arrays or plain numbers."""
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for content in contents:
        array = np.ascontiguousarray(content)
        digest.update(repr((array.shape, array.dtype.str)).encode())
        digest.update(array.data)
    return digest.hexdigest()


def save(folder: Path, checkpoint: Checkpoint, flush: bool = True) -> None:
    """Writes a checkpoint and removes the one before it.

    Args:
        folder: made if it is missing.
        checkpoint: see Checkpoint.
        flush: waits until it is on the disk, so that it outlives the machine's power too; else
            there may be a damaged one after that, which `load` refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"state-{checkpoint.epoch:06d}.safetensors"
    digest = _write(path, _serialised(_flatten(checkpoint)), flush)
    content = {
        "format_version": FORMAT_VERSION,
        "identity": checkpoint.identity,
        "epoch": checkpoint.epoch,
        "best_epoch": checkpoint.best_epoch,
        "tensors": path.name,
        "sha256": digest,
        "random": checkpoint.random.plain,
        "random_of_others": [states.plain for states in checkpoint.random_of_others],
        "history": checkpoint.history,
    }
    artifacts.write_text(folder / FILE, json.dumps(content))
    for other in folder.glob("state-*"):
        if other != path:
            other.unlink(missing_ok=True)


def load(folder: Path, identity: str | None) -> Checkpoint | None:
    """Reads the checkpoint of a folder, None if there is none yet.

    Args:
        folder: where `save` wrote.
        identity: of the run that goes on; None reads the checkpoint of any run.

    Raises:
        OtherRunError: if it is of another run.
        ArtifactError: if it is truncated, edited or of another format version.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    advice = f"remove {folder} to train from the start"
    try:
        content = json.loads(path.read_text())
        if content["format_version"] not in range(1, FORMAT_VERSION + 1):
            raise ArtifactError(
                f"{path}: format_version {content['format_version']}, this program reads 1 to "
                f"{FORMAT_VERSION}; {advice}"
            )
        if identity is not None and content["identity"] != identity:
            raise OtherRunError(
                f"{path}: of another run ({content['identity'][:12]}…, this one is "
                f"{identity[:12]}…: other data, model, configuration or program); {advice}"
            )
        tensors = folder / content["tensors"]
        if artifacts.sha256_of(tensors) != content["sha256"]:
            raise ArtifactError(f"{tensors}: was truncated or edited; {advice}")
        return _unflatten(content, _load_tensors(tensors))
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as err:
        raise ArtifactError(f"{path}: not a checkpoint ({type(err).__name__}); {advice}") from err


def read_files(folder: Path) -> dict[str, bytes]:
    """The files of a folder's checkpoint as they are, to be written elsewhere; none if none is."""
    path = folder / FILE
    if not path.is_file():
        return {}
    content = path.read_bytes()  # once: it may be replaced by the next one meanwhile
    tensors = str(json.loads(content)["tensors"])
    return {tensors: (folder / tensors).read_bytes(), FILE: content}


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes what `read_files` gave, as safely as `save`, and removes the checkpoint before it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in sorted(files, key=lambda name: name == FILE):  # the JSON last
        _write(folder / name, [files[name]], flush=True)
    for other in folder.glob("state-*"):
        if files and other.name not in files:
            other.unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Removes the checkpoint of a folder, the JSON first, so that there is never half of one."""
    (folder / FILE).unlink(missing_ok=True)
    for path in folder.glob("state-*"):
        path.unlink(missing_ok=True)


def _flatten(checkpoint: Checkpoint) -> dict[str, Tensor]:
    named = {f"weights/{name}": t for name, t in checkpoint.weights.items()}
    if checkpoint.best_epoch != checkpoint.epoch:
        named |= {f"best/{name}": t for name, t in checkpoint.best_weights.items()}
    for rank, states in enumerate([checkpoint.random, *checkpoint.random_of_others]):
        named |= {f"{_random(rank)}/{name}": t for name, t in states.tensors.items()}
    for index, state in checkpoint.optimizer.items():
        named |= {f"optimizer/{index}/{name}": t for name, t in state.items()}
    return named


def _unflatten(content: dict[str, Any], tensors: dict[str, Tensor]) -> Checkpoint:
    groups: dict[str, dict[str, Tensor]] = {"weights": {}, "best": {}, "random": {}}
    others = content.get("random_of_others", [])
    groups |= {_random(rank): {} for rank in range(1, len(others) + 1)}
    optimizer: OptimizerState = {}
    for name, tensor in tensors.items():
        group, rest = name.split("/", 1)
        if group == "optimizer":
            index, key = rest.split("/", 1)
            optimizer.setdefault(int(index), {})[key] = tensor
        else:
            groups[group][rest] = tensor
    is_best = content["best_epoch"] == content["epoch"]
    return Checkpoint(
        identity=content["identity"],
        epoch=int(content["epoch"]),
        best_epoch=int(content["best_epoch"]),
        weights=groups["weights"],
        best_weights=groups["weights"] if is_best else groups["best"],
        optimizer=optimizer,
        random=RandomStates(content["random"], groups["random"]),
        history=list(content["history"]),
        random_of_others=tuple(
            RandomStates(plain, groups[_random(rank)]) for rank, plain in enumerate(others, 1)
        ),
    )


def _load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file.

    Raises:
        OSError: if it is gone; the next checkpoint may have been saved just now.
    """
    try:
        return safetensors.torch.load_file(path)
    except RuntimeError as err:  # torch's, which maps the file after the library has opened it
        raise OSError(str(err)) from err


def _random(rank: int) -> str:
    """Where the tensors of a process's random states are."""
    return f"random-{rank}" if rank else "random"


def _serialised(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The parts of a safetensors file, without a copy of what is on the CPU.

    `safetensors.torch.save_file`, with the copies that it wants of tensors that share memory, and
    reading all of it again for the digest take twice as long.
    """
    header: dict[str, Any] = {}
    end, parts = 0, list[memoryview]()
    # As the library has them: each begins at a multiple of its numbers' size.
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):
        part = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        begin, end = end, end + part.nbytes
        shape = list(tensor.shape)
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": shape,
            "data_offsets": [begin, end],
        }
        parts.append(part)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    yield from parts


def _write(path: Path, parts: Iterable[bytes | memoryview], flush: bool) -> str:
    """Replaces a file in one step; gives its SHA-256."""
    partial, digest = path.with_name(f"{path.name}.partial"), hashlib.sha256()
    with partial.open("wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
        if flush:
            file.flush()
            os.fsync(file.fileno())
    partial.replace(path)
    return digest.hexdigest()
