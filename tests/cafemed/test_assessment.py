"""An evaluation, from a model's predictions to its files: numbers, card and page."""

import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cafemed import (
    artifacts,
    assessment,
    batches,
    bundle,
    card,
    card_text,
    evaluation_page,
    fits,
    metrics,
    protocols,
    registry,
)
from cafemed.calibration import Decision, Predictions
from cafemed.codes import CodeLists
from cafemed.cohort import Cohort
from cafemed.errors import ArtifactError, DataError
from cafemed.graphs import CausalGraph, EffectTable
from cafemed.reference import Reference, SelfCheck, score_histogram

DECISION = Decision(1.7, 0.42)
SIZES = {"diagnosis": 12, "procedure": 7, "medication": 9}


def make_cohort(tests: int = 60, known: bool = True) -> Cohort:
    rng = np.random.default_rng(4)
    patients = 60 + tests
    offsets = np.concatenate([[0], np.cumsum(rng.integers(1, 5, patients))])
    total = int(offsets[-1])
    diagnoses = [sorted(rng.choice(12, rng.integers(1, 5), replace=False)) for _ in range(total)]
    medications = CodeLists.of([sorted({d % 9 for d in codes}) for codes in diagnoses])
    ddi = np.triu(rng.random((9, 9)) < 0.3, 1)
    return Cohort(
        patient_offsets=offsets,
        patient_ids=tuple(f"SECRETPATIENT{i}" for i in range(patients)),
        visit_ids=tuple(f"SECRETVISIT{i}" for i in range(total)),
        admitted=np.full(total, "NaT", "datetime64[s]"),
        diagnoses=CodeLists.of(diagnoses),
        procedures=CodeLists.of([[] for _ in range(total)]),
        medications=medications,
        targets=medications,
        vocabularies={k: tuple(f"x:{k[0].upper()}{i}" for i in range(n)) for k, n in SIZES.items()},
        ddi=ddi | ddi.T,
        split=np.repeat(np.array([0, 1, 2], np.int8), [40, 20, tests]),
        sex=rng.integers(1, 3, patients).astype(np.int8) * known,
        age=np.where(known, rng.choice([30.0, 50.0, 70.0], total), np.nan).astype(np.float32),
        fingerprint="c0ffee",
    )


def empty_graph() -> CausalGraph:
    none = np.zeros(0, np.int32)
    floats = none.astype(np.float32)
    return CausalGraph((), none, none, none > 0, floats, none.astype(np.int64), floats)


@dataclasses.dataclass
class Evaluated:
    cohort: Cohort
    arrays: batches.VisitArrays
    model: torch.nn.Module
    report: dict[str, Any]
    card: dict[str, Any]


def evaluate(build: Any, cohort: Cohort) -> Evaluated:
    arrays = batches.cohort_arrays(cohort, empty_graph())
    effects = np.zeros((19, 9), np.float32)
    rows = tuple(f"{k}/{c}" for k in ("diagnosis", "procedure") for c in cohort.vocabularies[k])
    columns = tuple(f"medication/{c}" for c in cohort.vocabularies["medication"])
    table = EffectTable.known(rows, columns, effects, effects, "raw")
    inputs = batches.model_inputs(cohort.vocabularies, table, cohort.ddi)
    model = build("bag", inputs, {}, 1)
    report = assessment.measure(model, arrays, cohort, DECISION, seed=3)
    check = SelfCheck((), np.zeros((0, 9), np.float32))
    served = bundle.Bundle(
        model_name="bag",
        model_options={"dropout": 0.3},
        weights={},
        vocabularies=cohort.vocabularies,
        graph=empty_graph(),
        effects=table,
        ddi=cohort.ddi,
        preprocessing=bundle.Preprocessing(temperature=1.7, threshold=0.42),
        reference=Reference(score_histogram(np.zeros(1)), check),
        metrics={},
        sources={"cohort": "c0ffee", "graph": "9a9a"},
        fingerprint="b0b0",
    )
    manifest = artifacts.Manifest(
        "cohort",
        "c0ffee",
        {},
        {"source": "mimic3", "protocol": "clean", "inputs": "current", "target_window_h": 24.0},
        {},
        {"summary": protocols.summary(cohort)},
    )
    record = {
        "published": "2026-01-02",
        "produced_by": {"job": "tune", "trial": 5, "train": {"epochs": 7}},
    }
    version = registry.Version(3, Path("nowhere"), record)
    made = card.make("some<experiment>", version, served, manifest, report)
    return Evaluated(cohort, arrays, model, report, made)


@pytest.fixture(scope="module")
def cohort() -> Cohort:
    return make_cohort()


@pytest.fixture
def found(build_bag: Any, cohort: Cohort) -> Evaluated:
    return evaluate(build_bag, cohort)


@pytest.mark.parametrize(
    ("source", "protocol", "folder", "expected"),
    [
        ("synthetic", "clean", "truth", True),
        ("synthetic", "published", "truth", False),  # visits are not in time order
        ("mimic3", "clean", "truth", False),
        ("synthetic", "clean", "elsewhere", False),
    ],
)
def test_a_ceiling_needs_a_known_truth_and_visits_in_order(
    source: str, protocol: str, folder: str, expected: bool, tmp_path: Path
):
    (tmp_path / "truth").mkdir()
    made_from = {"source": source, "protocol": protocol}
    assert assessment.has_ceiling(made_from, tmp_path / folder) is expected


def test_everything_is_measured_as_it_is_served(found: Evaluated):
    report, cohort = found.report, found.cohort
    splits = {split: cohort.patients_of(split) for split in ("validation", "test")}
    predictions = fits.predict(found.model, found.arrays, splits)
    assert report["model"] == fits.measure(predictions, cohort.ddi, DECISION, 3)
    assert (report["model"]["temperature"], report["model"]["threshold"]) == (1.7, 0.42)
    everybody = report["subgroups"]["all"]
    for name, value in report["model"]["test"]["metrics"].items():
        assert everybody[name][0] == pytest.approx(value)
        assert everybody[name][1:] == pytest.approx(report["model"]["test"]["intervals"][name])
    error = report["model"]["test"]["calibration"]["after"]["ece"]
    assert everybody["ece"][0] == pytest.approx(error)
    for name, temperature in (("before", 1.0), ("after", 1.7)):
        expected = assessment.reliability(predictions["test"], temperature)
        assert report["reliability"][name] == expected
    # The previous visit of a later visit is the visit above it.
    test = predictions["test"]
    rows = np.setdiff1d(np.arange(test.num_visits), test.patient_offsets[:-1])
    before, now = test.targets[rows - 1], test.targets[rows]
    changes = report["subgroups"]["changes"]
    assert changes["started"]["per_visit"][0] == pytest.approx((now & ~before).sum(axis=1).mean())
    assert changes["stopped"]["per_visit"][0] == pytest.approx((before & ~now).sum(axis=1).mean())


def test_baselines_have_intervals(found: Evaluated):
    assert set(found.report["baselines"]) == {"most frequent", "last visit"}
    for baseline in found.report["baselines"].values():
        for name, value in baseline["metrics"].items():
            low, high = baseline["intervals"][name]
            assert low <= value <= high
    text = assessment.describe(found.report)
    assert "last visit" in text
    assert "temperature 1.700: calibration error" in text


def test_bins_of_few_patients_are_kept_back(found: Evaluated):
    logits = np.full((40, 5), -3.0, np.float32)
    logits[:, 4] = 3.0
    logits[:4, 0] = 0.1  # four of forty patients
    predictions = Predictions(logits, logits > 0, np.arange(41))
    rows = assessment.reliability(predictions, 1.0)
    # One more is kept back; of two bins that all patients are in, the first.
    assert [bool(row.get("hidden")) for row in rows] == [True, True, False]
    assert set(rows[1]) == {"low", "high", "hidden"}
    assert rows[2]["pairs"] == 40
    shown = [row for row in found.report["reliability"]["after"] if not row.get("hidden")]
    assert len(shown) >= 3


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_an_empty_split_is_one_line(found: Evaluated, split: str):
    place = ("train", "validation", "test").index(split)
    empty = np.where(found.cohort.split == place, (place + 1) % 3, found.cohort.split)
    without = dataclasses.replace(found.cohort, split=empty.astype(np.int8))
    with pytest.raises(DataError, match=f"the {split} split has no patients; expected at least"):
        assessment.measure(found.model, found.arrays, without, DECISION, seed=3)


def test_without_demographics_there_is_a_group_unknown_and_the_card_says_so(build_bag: Any):
    unknown = evaluate(build_bag, make_cohort(known=False))
    for table in ("sex", "age"):
        (cell,) = unknown.report["subgroups"]["tables"][table]
        assert (cell["group"], cell["patients"]) == ("unknown", 60)
    assert (
        "Nobody's sex was known: whether it serves all alike cannot be said."
        in (unknown.card["limits"])
    )
    assert "unknown" in card_text.markdown(unknown.card)


def test_of_nine_test_patients_no_group_is_told(build_bag: Any, tmp_path: Path):
    few = evaluate(build_bag, make_cohort(tests=9))
    assert "Only 9 test patients: their metrics say next to nothing" in " ".join(few.card["limits"])
    assessment.write(tmp_path / "evaluation", {}, {}, few.report, few.card)
    tables = few.report["subgroups"]["tables"].values()
    assert all(cell.get("hidden") for table in tables for cell in table)
    assert all(row.get("hidden") for row in few.report["reliability"]["after"])


def test_the_card_says_what_a_reader_has_to_know(found: Evaluated):
    made = found.card
    assert made["model"] == {
        "name": "bag",
        "experiment": "some<experiment>",
        "version": 3,
        "published": "2026-01-02",
        "options": {"dropout": 0.3},
    }
    assert made["intended_use"].startswith("Decision support for research. Not a medical device")
    assert made["training"]["train"] == {"epochs": 7}
    assert made["data"]["fingerprints"] == {"cohort": "c0ffee", "graph": "9a9a", "bundle": "b0b0"}
    assert made["data"]["split"] == {"train": 40, "validation": 20, "test": 60}
    measured = found.report["model"]["test"]
    jaccard = [measured["metrics"]["jaccard"], *measured["intervals"]["jaccard"]]
    assert made["metrics"]["test"]["values"]["jaccard"] == jaccard
    assert made["calibration"]["test"] == measured["calibration"]
    assert made["decision"]["temperature"] == 1.7
    limits = " ".join(made["limits"])
    assert "Hospitals code them at discharge" in limits
    assert "Only 60 test patients: the intervals are wide" in limits
    assert "invented" not in limits
    assert "drug levels" not in limits
    text = card_text.markdown(made)
    low, high = measured["intervals"]["f1"]
    assert f"{measured['metrics']['f1']:.3f} [{low:.3f}, {high:.3f}]" in text
    for heading in ("Known limits", "For whom", "By age", "Probabilities", "started and stopped"):
        assert heading in text
    assert "of the first 24 h" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| female")}
    assert widths == {len(card_text.SUBGROUP_HEAD) + 2}


def test_the_files_hold_nothing_of_a_patient_and_are_the_same_again(
    found: Evaluated, tmp_path: Path
):
    folder = tmp_path / "evaluation"
    assessment.write(folder, {"cohort": "c0ffee"}, {"version": 3}, found.report, found.card)
    manifest = artifacts.verify(folder, assessment.STAGE)
    assert set(manifest.files) == {
        "report.json",
        "report.html",
        "model_card.json",
        "model_card.md",
    }
    for path in folder.iterdir():
        assert "SECRET" not in path.read_text()
    assert json.loads((folder / "report.json").read_text()) == found.report
    assert json.loads((folder / "model_card.json").read_text()) == found.card
    again = tmp_path / "again"
    assessment.write(again, {"cohort": "c0ffee"}, {"version": 3}, found.report, found.card)
    assert artifacts.verify(again, assessment.STAGE).files == manifest.files


class Page(HTMLParser):
    """Tags with their attributes, balanced."""

    VOID = frozenset({"meta", "link", "line", "circle", "rect", "polyline"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_loads_nothing_and_shows_every_number(found: Evaluated):
    text = evaluation_page.render(found.card, found.report["reliability"])
    page = Page(text)
    assert not re.search(r"https?://|url\(|@import|__[A-Z_]+__", text)
    assert all(tag != "script" for tag, _ in page.tags)
    assert [a["href"] for _, a in page.tags if "href" in a] == ["data:,"]
    assert not any("src" in a or any(name.startswith("on") for name in a) for _, a in page.tags)
    assert "bag, version 3 of some<experiment>" in page.words  # escaped where it stands
    assert found.card["intended_use"] in " ".join(page.words)
    words = set(page.words)
    for rows in card_text.subgroup_rows(found.card["subgroups"]).values():
        for row in rows:
            for cell in row:
                value, bracket, ends = cell.partition(" [")
                assert not value or value in words
                assert not bracket or f"[{ends}" in words


def test_the_diagram_has_a_dot_where_each_bin_is(found: Evaluated):
    table = found.report["reliability"]
    page = Page(evaluation_page.diagram(table))
    for name, mark in (("before", "ring"), ("after", "dot")):
        shown = [row for row in table[name] if not row.get("hidden")]
        dots = [a for tag, a in page.tags if tag == "circle" and a["class"] == mark]
        assert len(dots) == len(shown) > 0
        for row, dot in zip(shown, dots, strict=True):
            # 300 units wide and high, beginning 46 from the left and ending 310 from the top
            assert float(dot["cx"]) == pytest.approx(46 + 300 * row["probability"], abs=0.06)
            assert float(dot["cy"]) == pytest.approx(310 - 300 * row["share"], abs=0.06)


def test_a_page_of_hidden_groups_is_still_a_page(build_bag: Any):
    few = evaluate(build_bag, make_cohort(tests=3))
    page = Page(evaluation_page.render(few.card, few.report["reliability"]))
    assert not [a for tag, a in page.tags if tag == "line" and a["class"] == "whisker"]
    assert page.words.count("–") > 20


def test_values_are_shown_with_their_intervals():
    assert card_text.cell("jaccard", [0.5, 0.25, 0.75]) == "0.500 [0.250, 0.750]"
    assert card_text.cell("num_medications", [12.345]) == "12.35"
    assert card_text.interval([None, None, None], 3) == "–"
    assert math.isclose(float(card_text.cell("ece", [0.01234])), 0.0123)


def test_metrics_have_a_label():
    names = [field.name for field in dataclasses.fields(metrics.Metrics)]
    assert list(card_text.LABELS) == [*names, "ece"]


def test_a_card_lies_beside_its_version_and_is_replaced_whole(
    found: Evaluated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    home = tmp_path / "registry"
    (home / "versions" / "0003" / "bundle").mkdir(parents=True)
    (home / "versions" / "0003" / "record.json").write_text('{"produced_by": {}}')
    assert registry.read_card(home, 3) is None
    path = Path(registry.write_card(home, 3, found.card, "# three"))
    assert path == home / "cards" / "0003.json"
    assert registry.read_card(home, 3) == found.card
    assert path.with_suffix(".md").read_text() == "# three"
    assert path.stat().st_mode & 0o777 == 0o644
    assert [v.number for v in registry.versions(home)] == [3]
    assert sorted(p.name for p in (home / "versions" / "0003").iterdir()) == [
        "bundle",
        "record.json",
    ]
    registry.write_card(home, 3, found.card | {"limits": []}, "# again")
    assert registry.read_card(home, 3)["limits"] == []  # type: ignore[index]

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        registry.write_card(home, 3, found.card, "# half")
    monkeypatch.undo()
    assert registry.read_card(home, 3)["limits"] == []  # type: ignore[index]
    assert sorted(p.name for p in (home / "cards").iterdir()) == ["0003.json", "0003.md"]
    for call in (
        lambda: registry.write_card(home, 4, found.card, ""),
        lambda: registry.read_card(home, 4),
    ):
        with pytest.raises(ArtifactError, match="no version 0004; there is 0003"):
            call()
    path.write_text("[1")
    with pytest.raises(ArtifactError, match=r"0003\.json: not a record of the registry"):
        registry.read_card(home, 3)


def test_the_card_says_that_laboratory_values_may_follow_from_medications(
    build_bag: Any, cohort: Cohort
):
    measured = cohort.vocabularies | {"laboratory": ("lab:1",)}
    found = evaluate(build_bag, dataclasses.replace(cohort, vocabularies=measured))
    assert (
        "Laboratory values are the first of the stay and may follow from the medications (drug "
        "levels)."
    ) in found.card["limits"]
