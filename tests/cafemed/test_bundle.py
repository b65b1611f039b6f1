"""Bundles: what was written comes back, and whatever was changed is refused in one line."""

import dataclasses
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from torch import nn

from cafemed import artifacts, bundle, reference
from cafemed.batches import Batch, ModelInputs
from cafemed.codes import KINDS, node_name
from cafemed.errors import ArtifactError
from cafemed.graphs import CausalGraph, EffectTable, write_effects, write_graph
from cafemed.scaling import Scaling

VOCABULARIES = {
    "diagnosis": tuple(f"icd9:{i}" for i in range(7)),
    "procedure": tuple(f"icd9:P{i}" for i in range(5)),
    "medication": tuple(f"atc:M{i}" for i in range(4)),
    "laboratory": (),
}


class Sums(nn.Module):
    """A tiny model: one vector per code and class, summed over the visit's codes."""

    def __init__(self, sizes: tuple[int, int, int], effects: torch.Tensor) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        table = torch.randn(3, max(sizes), 4, sizes[2], generator=generator)
        self.table = nn.Parameter(table)
        self.bias = nn.Parameter(effects.sum(dim=0))

    def forward(self, batch: Batch) -> torch.Tensor:
        k = torch.arange(3)[None, :, None]
        vectors = self.table[k, batch.codes, batch.classes]
        exists = torch.arange(batch.codes.shape[2]) < batch.counts[..., None]
        return batch.pad((vectors * exists[..., None]).sum(dim=(1, 2)) + self.bias)


def build(name: str, inputs: ModelInputs, options: Mapping[str, Any]) -> nn.Module:
    assert (name, dict(options)) == ("sums", {"depth": 1})
    return Sums(inputs.sizes, torch.tensor(inputs.effects))


def effects_of(
    vocabularies: Mapping[str, tuple[str, ...]], previous: Sequence[str] = ()
) -> EffectTable:
    kinds = ("diagnosis", "procedure")
    rows = tuple(node_name(kind, code) for kind in kinds for code in vocabularies[kind])
    rows += tuple(node_name("previous_medication", code) for code in previous)
    columns = tuple(node_name("medication", code) for code in vocabularies["medication"])
    effect = np.linspace(-1, 1, len(rows) * len(columns), dtype=np.float32)
    effect = effect.reshape(len(rows), len(columns))
    return EffectTable.known(rows, columns, effect, np.full_like(effect, np.nan), "raw")


def graph_of(*edges: tuple[str, str]) -> CausalGraph:
    nodes = tuple(sorted({node for edge in edges for node in edge}))
    return CausalGraph(
        nodes,
        np.array([nodes.index(a) for a, _ in edges], np.int32),
        np.array([nodes.index(b) for _, b in edges], np.int32),
        np.ones(len(edges), np.bool_),
        np.full(len(edges), np.nan, np.float32),
        np.full(len(edges), 9),
        np.full(len(edges), np.nan, np.float32),
    )


@pytest.fixture(scope="module")
def made() -> bundle.Bundle:
    return made_of(VOCABULARIES)


def made_of(
    vocabularies: Mapping[str, tuple[str, ...]], scaling: Scaling | None = None
) -> bundle.Bundle:
    scaling = scaling or Scaling(61.5, 17.0)
    graph = graph_of(
        ("diagnosis/icd9:0", "diagnosis/icd9:1"),
        ("diagnosis/icd9:1", "diagnosis/icd9:2"),
        ("previous_medication/atc:M0", "previous_medication/atc:M1"),
        ("diagnosis/icd9:1", "medication/atc:M1"),  # a sink
    )
    effects = effects_of(vocabularies)
    model = Sums(tuple(len(vocabularies[kind]) for kind in KINDS), torch.tensor(effects.effect))
    ddi = np.zeros((4, 4), np.bool_)
    ddi[0, 1] = ddi[1, 0] = True
    return bundle.Bundle(
        model_name="sums",
        model_options={"depth": 1},
        weights=model.state_dict(),
        vocabularies=vocabularies,
        graph=graph,
        effects=effects,
        ddi=ddi,
        preprocessing=bundle.Preprocessing(inputs="history", target_window_h=24.0, scaling=scaling),
        reference=reference.Reference(
            reference.score_histogram(np.array([0.0, 0.04, 0.5, 1.0])),
            reference.make_self_check(model, graph, vocabularies, scaling),
        ),
        metrics={"validation": {"jaccard": 0.5}},
        sources={"cohort": "c0", "graph": "a0"},
        molecules={"atc:M1": ("C", "CO")},
        names={"medication": {"atc:M1": "one"}},
    )


@pytest.fixture
def folder(made: bundle.Bundle, tmp_path: Path) -> Path:
    bundle.write(tmp_path / "bundle", made)
    return tmp_path / "bundle"


def seal_again(folder: Path) -> None:
    """Makes the manifest agree with the files, as somebody who edits on purpose would."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    for name in content["files"]:
        content["files"][name] = {
            "sha256": artifacts.sha256_of(folder / name),
            "bytes": (folder / name).stat().st_size,
        }
    content["inputs"]["weights"] = content["files"]["model.safetensors"]["sha256"]
    content["fingerprint"] = artifacts.fingerprint("bundle", content["inputs"], content["config"])
    path.write_text(json.dumps(content))


def refused(folder: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        bundle.load(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(folder))
    return message


def edit_json(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(change(content)))

    return edit


def edit_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        change(weights)
        safetensors.torch.save_file(weights, folder / "model.safetensors")

    return edit


def test_what_was_written_comes_back(made: bundle.Bundle, folder: Path):
    loaded = bundle.load(folder)
    assert loaded.fingerprint == artifacts.read_manifest(folder, "bundle").fingerprint
    names = ("model_name", "model_options", "vocabularies", "preprocessing", "metrics")
    for name in (*names, "molecules", "names"):
        assert getattr(loaded, name) == getattr(made, name)
    assert loaded.sources == made.sources
    assert loaded.graph.nodes == made.graph.nodes
    np.testing.assert_array_equal(loaded.effects.effect, made.effects.effect)
    np.testing.assert_array_equal(loaded.ddi, made.ddi)
    np.testing.assert_array_equal(loaded.reference.scores.shares, made.reference.scores.shares)
    for name, tensor in made.weights.items():
        assert torch.equal(loaded.weights[name], tensor)
    assert bundle.self_check(loaded, bundle.restore_model(loaded, build)) < 1e-6


def test_effects_of_previous_medications_travel_with_the_bundle(
    made: bundle.Bundle, tmp_path: Path
) -> None:
    table = effects_of(VOCABULARIES, VOCABULARIES["medication"])
    table.effect[:12] = made.effects.effect
    longer = dataclasses.replace(made, effects=table)
    bundle.write(tmp_path / "longer", longer)
    loaded = bundle.load(tmp_path / "longer")
    assert loaded.effects.codes == table.codes
    np.testing.assert_array_equal(loaded.effects.effect, table.effect)
    # Models take what they took without them.
    assert bundle.inputs(loaded).effects.tobytes() == bundle.inputs(made).effects.tobytes()
    assert bundle.self_check(loaded, bundle.restore_model(loaded, build)) < 1e-6


def test_a_cohort_may_have_no_procedures_but_needs_medications(tmp_path: Path):
    bundle.write(tmp_path / "bundle", made_of(VOCABULARIES | {"procedure": ()}))
    loaded = bundle.load(tmp_path / "bundle")
    assert loaded.vocabularies["procedure"] == ()
    bundle.restore_model(loaded, build)
    with pytest.raises(ArtifactError, match=r"medication: expected at least one code"):
        bundle.write(tmp_path / "none", made_of(VOCABULARIES | {"medication": ()}))


class WithLaboratory(Sums):
    """Adds what a visit's scaled age and laboratory values say, each item in its own way."""

    def forward(self, batch: Batch) -> torch.Tensor:
        exists = torch.arange(batch.laboratory_items.shape[1]) < batch.laboratory_counts[:, None]
        values = torch.where(exists, batch.laboratory_values, 0) * (1 + batch.laboratory_items)
        measured = values.sum(dim=1) + torch.nan_to_num(batch.age)
        return super().forward(batch) + batch.pad(measured[:, None])


def test_laboratory_scaling_travels_with_the_bundle_and_the_self_check_uses_it(tmp_path: Path):
    vocabularies = {**VOCABULARIES, "laboratory": ("lab:1", "lab:2", "lab:3")}
    scaling = Scaling(61.5, 17.25, (140.1, 0.1, 3.0), (3.3, 0.07, 1.0))
    made = made_of(vocabularies, scaling)
    model = WithLaboratory((7, 5, 4), torch.tensor(made.effects.effect))
    check = reference.make_self_check(model, made.graph, vocabularies, scaling)
    made = dataclasses.replace(
        made, reference=dataclasses.replace(made.reference, self_check=check)
    )
    bundle.write(tmp_path / "bundle", made)
    loaded = bundle.load(tmp_path / "bundle")
    assert loaded.preprocessing.scaling == scaling
    assert bundle.inputs(loaded).num_laboratory_items == 3
    assert bundle.self_check(loaded, model) == 0
    other = dataclasses.replace(
        loaded,
        preprocessing=dataclasses.replace(
            loaded.preprocessing, scaling=dataclasses.replace(scaling, laboratory_sd=(3.3, 0.14, 1))
        ),
    )
    with pytest.raises(ArtifactError, match="self_check"):
        bundle.self_check(other, model)


def test_the_files_are_those_of_the_layout_and_no_others(folder: Path):
    names = sorted(path.name for path in folder.iterdir())
    wanted = {"model.safetensors", "config.json", "vocabulary.json", "graph.parquet"}
    wanted |= {
        "effects.npz",
        "ddi.parquet",
        "molecules.json",
        "names.json",
        "preprocessing.json",
        "reference.json",
    }
    assert names == sorted(wanted | {"metrics.json", "manifest.json"})


def test_score_histogram_counts_shares(made: bundle.Bundle):
    shares = made.reference.scores.shares
    expected = np.zeros(20)
    expected[[0, 10, 19]] = 0.5, 0.25, 0.25
    np.testing.assert_allclose(shares, expected)


def test_fingerprint_follows_the_weights(made: bundle.Bundle, tmp_path: Path):
    moved = {name: tensor + 1 for name, tensor in made.weights.items()}
    other = dataclasses.replace(made, weights=moved)
    prints = [bundle.write(tmp_path / str(i), b) for i, b in enumerate((made, made, other))]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("name", [*bundle.bundle_files.FILES, "manifest.json"])
@pytest.mark.parametrize("how", ["missing", "truncated", "edited", "link"])
def test_a_file_that_changed_is_named(folder: Path, name: str, how: str):
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "edited":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif how == "link":
        (folder.parent / name).write_bytes(content)
        path.symlink_to(folder.parent / name)
    # A manifest whose text still reads may blame the file whose entry was edited.
    assert name in refused(folder) or (name, how) == ("manifest.json", "edited")


def test_an_unknown_file_or_folder_is_refused(folder: Path):
    (folder / "extra.py").write_text("")
    assert "extra.py: not a file of a bundle" in refused(folder)
    (folder / "extra.py").unlink()
    (folder / "more").mkdir()
    assert "more: not a file of a bundle" in refused(folder)


@pytest.mark.parametrize("name", ["../stolen", "/etc/hostname", "sub/file"])
def test_names_in_the_manifest_are_not_used_as_paths(folder: Path, name: str):
    def add(content: dict[str, Any]) -> dict[str, Any]:
        content["files"][name] = {"sha256": "0" * 64, "bytes": 1}
        return content

    edit_json("manifest.json", add)(folder)
    assert "expected the files model.safetensors" in refused(folder)


OTHER = {**VOCABULARIES, "medication": ("atc:X0", "atc:X1", "atc:X2", "atc:X3")}
FEWER = {**VOCABULARIES, "diagnosis": VOCABULARIES["diagnosis"][:-1]}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda f: write_effects(effects_of(OTHER), f / "effects.npz"), "effects.npz"),
        (lambda f: write_effects(effects_of(FEWER), f / "effects.npz"), "expected 12 rows, got 11"),
        (
            lambda f: write_effects(effects_of(VOCABULARIES, ["atc:M0"]), f / "effects.npz"),
            "expected 16 rows, got 13",
        ),
        (
            lambda f: write_effects(
                effects_of(VOCABULARIES, [f"atc:M{i}" for i in (0, 2, 1, 3)]), f / "effects.npz"
            ),
            "rows[13]: expected previous_medication/atc:M1, got previous_medication/atc:M2",
        ),
        (
            lambda f: write_graph(
                graph_of(("diagnosis/icd9:0", "diagnosis/icd9:99")), f / "graph.parquet"
            ),
            "graph.parquet: node diagnosis/icd9:99 is not in vocabulary.json",
        ),
        (
            lambda f: pq.write_table(
                pa.table({"a": ["atc:M0"], "b": ["atc:?"]}), f / "ddi.parquet"
            ),
            "ddi.parquet: atc:? is not in the medication vocabulary",
        ),
        (lambda f: pq.write_table(pa.table({"a": [1]}), f / "ddi.parquet"), "ddi.parquet: not a"),
        (edit_weights(lambda w: w["bias"].fill_(torch.nan)), "bias holds NaN or infinity"),
        (edit_weights(lambda w: w["bias"].fill_(torch.inf)), "bias holds NaN or infinity"),
        (
            lambda f: (f / "model.safetensors").write_bytes(pickle.dumps({"bias": [1.0]})),
            "model.safetensors: not a safetensors file",
        ),
        (
            lambda f: torch.save({"bias": torch.ones(4)}, f / "model.safetensors"),
            "model.safetensors: not a safetensors file",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes(
                struct.pack("<Q", (1 << 20) + 1) + b"{" + b" " * (2 << 20)
            ),
            "no header of a plausible size",
        ),
        (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json: not JSON"),
        (lambda f: (f / "metrics.json").write_text("[]"), "metrics.json: expected a mapping"),
        (edit_json("config.json", lambda _: {"name": 3}), "config.json: expected keys name"),
        (
            edit_json("vocabulary.json", lambda c: c | {"medication": ["atc:M0"] * 4}),
            "vocabulary.json",
        ),
        (edit_json("vocabulary.json", lambda _: {"diagnosis": []}), "vocabulary.json"),
        (
            edit_json("preprocessing.json", lambda c: c | {"threshold": 2, "scale": 1}),
            "preprocessing.json: scale: unknown key",
        ),
        (
            edit_json(
                "preprocessing.json",
                lambda c: c | {"scaling": c["scaling"] | {"age_sd": 0}},
            ),
            "preprocessing.json: scaling.age_sd: expected a value in",
        ),
        (
            edit_json("vocabulary.json", lambda c: c | {"laboratory": ["lab:1"]}),
            "preprocessing.json: scaling: expected 1 laboratory items, the vocabulary's, got 0",
        ),
        (
            edit_json("molecules.json", lambda _: {"atc:?": ["C"]}),
            "molecules.json: atc:? is not in the medication vocabulary",
        ),
        (
            edit_json("names.json", lambda _: {"medication": {"atc:?": "one"}}),
            "names.json: atc:? is not in the medication vocabulary",
        ),
        (
            edit_json("preprocessing.json", lambda c: c | {"temperature": float("nan")}),
            "preprocessing.json: temperature: expected a value in",
        ),
        (
            edit_json("reference.json", lambda c: c | {"score_histogram": {"edges": [0]}}),
            "reference.json",
        ),
        (
            edit_json(
                "reference.json",
                lambda c: c | {"self_check": c["self_check"] | {"logits": [[0.0] * 3]}},
            ),
            "self_check.logits: expected shape (7, 4), got (1, 3)",
        ),
        (
            edit_json(
                "reference.json",
                lambda c: c | {"self_check": c["self_check"] | {"tolerance": 1e9}},
            ),
            "tolerance in (0,",
        ),
    ],
)
def test_files_that_do_not_belong_together_are_refused(
    folder: Path, edit: Callable[[Path], None], message: str
):
    edit(folder)
    seal_again(folder)
    assert message in refused(folder)


def test_a_pickle_is_never_loaded(folder: Path):
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(folder.parent / "ran"),)

    for name in bundle.bundle_files.FILES:
        target = folder.parent / "copy"
        shutil.copytree(folder, target)
        (target / name).write_bytes(pickle.dumps(Payload()))
        seal_again(target)
        assert name in refused(target)
        shutil.rmtree(target)
    np.savez(folder / "effects.npz", codes=np.array([Payload()], dtype=object))
    seal_again(folder)
    assert "effects.npz" in refused(folder)
    assert not (folder.parent / "ran").exists()


def test_weights_moved_a_little_fail_the_self_check(folder: Path):
    edit_weights(lambda w: w["bias"].add_(0.01))(folder)
    seal_again(folder)
    with pytest.raises(ArtifactError, match=r"self_check: .* got a difference of 0\.01"):
        bundle.restore_model(bundle.load(folder), build)


@pytest.mark.parametrize(
    "change", [lambda w: w.pop("bias"), lambda w: w.update(bias=torch.zeros(5))]
)
def test_weights_of_another_model_are_refused(folder: Path, change: Callable[..., Any]):
    edit_weights(change)(folder)
    seal_again(folder)
    with pytest.raises(ArtifactError, match=r"model\.safetensors: not the weights.*bias") as caught:
        bundle.restore_model(bundle.load(folder), build)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_served_is_not_written(made: bundle.Bundle, tmp_path: Path):
    broken = {**made.weights, "bias": torch.full((4,), torch.nan)}
    with pytest.raises(ArtifactError, match="bias holds NaN"):
        bundle.write(tmp_path / "bundle", dataclasses.replace(made, weights=broken))
    assert list(tmp_path.iterdir()) == []


def test_no_bundle_there_is_one_line(tmp_path: Path):
    with pytest.raises(ArtifactError, match="expected a bundle folder"):
        bundle.load(tmp_path / "none")


def test_invented_patients_have_no_history_at_first_and_known_codes():
    patients = reference.invent_patients(VOCABULARIES, Scaling())
    assert [len(p["visits"]) for p in patients] == [1, 2, 4]
    assert all(p["visits"][0]["previous_medications"] == [] for p in patients)
    for visit in (v for p in patients for v in p["visits"]):
        assert 1 <= len(visit["diagnoses"]) <= 6
        assert set(visit["diagnoses"]) <= set(VOCABULARIES["diagnosis"])
        assert set(visit["previous_medications"]) <= set(VOCABULARIES["medication"])
