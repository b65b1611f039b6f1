import hashlib
import json
import pathlib

import numpy as np
import pytest
import safetensors.torch
import torch

from cafemed import checkpoints, randomness
from cafemed.checkpoints import Checkpoint
from cafemed.errors import ArtifactError

CPU = torch.device("cpu")


def _checkpoint(epoch=2, best_epoch=1):
    weight = torch.arange(6, dtype=torch.float32).reshape(2, 3) * epoch
    half = torch.arange(3, dtype=torch.bfloat16)
    weights = {"a": half, "layer.weight": weight, "tied": weight, "steps": torch.tensor(epoch)}
    return Checkpoint(
        identity="abc",
        epoch=epoch,
        best_epoch=best_epoch,
        weights=weights,
        best_weights=weights if best_epoch == epoch else {"layer.weight": weight + 1},
        optimizer={0: {"step": torch.tensor(3.0), "exp_avg": weight.T}, 2: {"exp_avg": weight}},
        random=randomness.capture(CPU),
        history=[{"epoch": 1, "losses": {"loss": 0.1 + 0.2}}],
    )


@pytest.mark.parametrize("flush", [True, False])
@pytest.mark.parametrize("best_epoch", [0, 1, 2])
def test_everything_comes_back_to_the_bit(tmp_path, best_epoch, flush):
    wanted = _checkpoint(2, best_epoch)
    checkpoints.save(tmp_path / "new" / "folder", wanted, flush)
    _require_same(checkpoints.load(tmp_path / "new" / "folder", "abc"), wanted)


def _require_same(got, wanted):
    found = got.epoch, got.best_epoch, got.history
    assert found == (wanted.epoch, wanted.best_epoch, wanted.history)
    for a, b in [(got.weights, wanted.weights), (got.best_weights, wanted.best_weights)]:
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)
    assert got.optimizer.keys() == {0, 2}
    assert torch.equal(got.optimizer[0]["exp_avg"], wanted.optimizer[0]["exp_avg"])
    assert got.optimizer[0]["step"] == 3


@pytest.mark.parametrize("best_epoch", [1, 2])
def test_checkpoints_of_the_first_format_are_read(tmp_path, best_epoch):
    """They had the best weights always."""
    wanted = _checkpoint(2, best_epoch)
    tensors = {f"weights/{name}": t for name, t in wanted.weights.items()}
    tensors |= {f"best/{name}": t for name, t in wanted.best_weights.items()}
    tensors |= {f"random/{name}": t for name, t in wanted.random.tensors.items()}
    for index, state in wanted.optimizer.items():
        tensors |= {f"optimizer/{index}/{name}": t for name, t in state.items()}
    path = tmp_path / "state-000002.safetensors"
    copies = {name: t.contiguous().clone() for name, t in tensors.items()}
    safetensors.torch.save_file(copies, path)
    content = {
        "format_version": 1,
        "identity": "abc",
        "epoch": 2,
        "best_epoch": best_epoch,
        "tensors": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "random": wanted.random.plain,
        "history": wanted.history,
    }
    (tmp_path / "checkpoint.json").write_text(json.dumps(content))
    _require_same(checkpoints.load(tmp_path, "abc"), wanted)


def test_the_weights_of_the_best_epoch_are_written_once(tmp_path):
    for best_epoch in (1, 2):
        checkpoints.save(tmp_path / str(best_epoch), _checkpoint(2, best_epoch))
        tensors = safetensors.torch.load_file(next((tmp_path / str(best_epoch)).glob("state-*")))
        assert ("best/layer.weight" in tensors) == (best_epoch == 1)
        assert "weights/layer.weight" in tensors


def test_random_states_come_back_through_the_file(tmp_path):
    with randomness.reproducible(5, 1, CPU):
        torch.rand(3)
        np.random.standard_normal()  # leaves a cached second number
        checkpoints.save(tmp_path, _checkpoint())
        expected = torch.rand(2).tolist(), np.random.standard_normal(3).tolist()
        torch.rand(1)
        randomness.restore(checkpoints.load(tmp_path, "abc").random, CPU)
        assert (torch.rand(2).tolist(), np.random.standard_normal(3).tolist()) == expected


def test_a_folder_without_one_gives_none(tmp_path):
    assert checkpoints.load(tmp_path / "nothing", "abc") is None


def test_only_the_newest_is_kept(tmp_path):
    for epoch in (1, 2, 3):
        checkpoints.save(tmp_path, _checkpoint(epoch))
    assert checkpoints.load(tmp_path, "abc").epoch == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint.json",
        "state-000003.safetensors",
    ]


def test_files_that_are_read_while_the_next_one_is_saved_belong_together(tmp_path, monkeypatch):
    checkpoints.save(tmp_path / "there", _checkpoint(1))
    real = pathlib.Path.read_bytes

    def read_bytes(path):
        content = real(path)
        if path.suffix == ".safetensors":
            checkpoints.save(tmp_path / "there", _checkpoint(2))
        return content

    with monkeypatch.context() as patched:
        patched.setattr(pathlib.Path, "read_bytes", read_bytes)
        files = checkpoints.read_files(tmp_path / "there")
    checkpoints.write_files(tmp_path / "copy", files)
    assert checkpoints.load(tmp_path / "copy", "abc").epoch == 1


def test_one_that_goes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    """A killed job's worker may save its next one while the job that goes on looks."""
    checkpoints.save(tmp_path, _checkpoint(1))
    real = torch.UntypedStorage.from_file

    def from_file(path, *more, **named):
        checkpoints.save(tmp_path, _checkpoint(2))
        return real(path, *more, **named)

    with monkeypatch.context() as patched:
        patched.setattr(torch.UntypedStorage, "from_file", from_file)
        with pytest.raises(ArtifactError, match="not a checkpoint"):
            checkpoints.load(tmp_path, "abc")
    assert checkpoints.load(tmp_path, "abc").epoch == 2


@pytest.mark.parametrize("step", ["fsync", "replace", "write_text"])
def test_dying_while_saving_leaves_the_one_before(tmp_path, monkeypatch, step):
    checkpoints.save(tmp_path, _checkpoint(1))

    def die(*_):
        raise InterruptedError

    target = {
        "fsync": "os.fsync",
        "replace": "pathlib.Path.replace",
        "write_text": "cafemed.artifacts.write_text",
    }[step]
    with monkeypatch.context() as patched:
        patched.setattr(target, die)
        with pytest.raises(InterruptedError):
            checkpoints.save(tmp_path, _checkpoint(2))
    assert checkpoints.load(tmp_path, "abc").epoch == 1
    checkpoints.save(tmp_path, _checkpoint(2))
    assert checkpoints.load(tmp_path, "abc").epoch == 2
    assert len(list(tmp_path.iterdir())) == 2


def _truncate(folder):
    path = next(folder.glob("state-*"))
    path.write_bytes(path.read_bytes()[:-1])


def _edit(folder):
    path = next(folder.glob("state-*"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _cut_json(folder):
    path = folder / "checkpoint.json"
    path.write_text(path.read_text()[:100])


def _other_version(folder):
    path = folder / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 9}))


def _lose_tensors(folder):
    next(folder.glob("state-*")).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "truncated or edited"),
        (_edit, "truncated or edited"),
        (_cut_json, "not a checkpoint"),
        (_other_version, "format_version 9"),
        (_lose_tensors, "not a checkpoint"),
    ],
)
def test_a_damaged_checkpoint_is_refused(tmp_path, damage, message):
    checkpoints.save(tmp_path, _checkpoint())
    damage(tmp_path)
    with pytest.raises(ArtifactError, match=f"{message}.*remove"):
        checkpoints.load(tmp_path, "abc")


def test_identity_depends_on_every_value():
    arrays = [np.arange(4), np.zeros((2, 2))]
    base = checkpoints.identity({"a": 1}, arrays)
    assert base == checkpoints.identity({"a": 1}, [a.copy() for a in arrays])
    others = [
        checkpoints.identity({"a": 2}, arrays),
        checkpoints.identity({"a": 1}, [np.arange(4), np.eye(2)]),
        checkpoints.identity({"a": 1}, [np.arange(4).reshape(2, 2), np.zeros(4)]),
        checkpoints.identity({"a": 1}, [np.arange(4).astype(np.int32), np.zeros((2, 2))]),
    ]
    assert len({base, *others}) == 5
