"""What a truth folder holds, read back."""

import dataclasses

import numpy as np
import pytest

from cafemed.errors import ArtifactError
from cafemed.synthetic import truth
from cafemed.synthetic.model import Model


def test_parameters_come_back(folder, population):
    read = truth.read(folder / "truth").model
    for field in dataclasses.fields(Model):
        np.testing.assert_array_equal(
            getattr(read, field.name), getattr(population.model, field.name)
        )


def test_graph_is_that_of_the_model(folder, population):
    model, graph = population.model, truth.read(folder / "truth").graph
    assert list(graph.nodes) == sorted(graph.nodes)
    assert graph.directed.all()
    edges = {
        (graph.nodes[a], graph.nodes[b]): support
        for a, b, support in zip(graph.source, graph.target, graph.support, strict=True)
    }
    codes = [f"diagnosis/{c}" for c in model.diagnoses] + [
        f"procedure/{c}" for c in model.procedures
    ]
    drugs = [f"medication/{m}" for m in model.medications]
    expected = {(codes[a], codes[b]) for a, b in zip(model.parent, model.child, strict=True)}
    expected |= {(codes[a], drugs[b]) for a, b in zip(model.cause, model.caused, strict=True)}
    expected |= {(f"previous_{m}", m) for m in drugs}
    for a, b in zip(*np.nonzero(model.ddi), strict=True):
        if model.priority[a] < model.priority[b]:
            expected.add((drugs[a], drugs[b]))
    assert set(edges) == expected
    diagnoses = population.diagnoses.multi_hot(len(model.diagnoses))
    medications = population.medications.multi_hot(len(model.medications))
    a, b = next(
        (a, b) for a, b in zip(model.cause, model.caused, strict=True) if a < len(model.diagnoses)
    )
    assert edges[codes[a], drugs[b]] == (diagnoses[:, a] & medications[:, b]).sum()
    repeated = sum(
        bool(medications[v - 1, b] & medications[v, b])
        for v in np.flatnonzero(~population.is_first_visit())
    )
    assert edges[f"previous_{drugs[b]}", drugs[b]] == repeated


def test_effects_are_of_direct_causes_and_causes_of_causes(folder, population):
    model, effects = population.model, truth.read(folder / "truth").effects
    assert effects.estimator == "true"
    assert effects.effect.shape == effects.standard_error.shape == (120, 40)
    direct = effects.effect[model.cause, model.caused]
    assert direct.mean() > 0.3
    others = np.ones(effects.effect.shape, np.bool_)
    others[model.cause, model.caused] = False
    assert abs(effects.effect[others].mean()) < 0.02


@pytest.mark.parametrize("name", [truth.PARAMETERS, truth.GRAPH, truth.EFFECTS])
@pytest.mark.parametrize("damage", ["missing", "truncated", "other"])
def test_damaged_files_are_refused(folder, tmp_path, name, damage):
    for file in (folder / "truth").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    if damage != "missing":
        (tmp_path / name).write_bytes(content[:100] if damage == "truncated" else b"x")
    with pytest.raises(ArtifactError, match=name):
        truth.read(tmp_path)
