"""The page: its data as they were, nothing loaded from elsewhere, and in a browser where one is."""

import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cafemed.graphs import CausalGraph, EffectTable
from causal import page

KINDS = ("diagnosis", "medication", "previous_medication", "procedure")


def random_graph(size: int, edges: int, seed: int = 0) -> CausalGraph:
    rng = np.random.default_rng(seed)
    per_kind = size // 4
    nodes = [f"{kind}/x:{kind[:3].upper()}{i:05}" for kind in KINDS for i in range(per_kind)]
    pairs: set[tuple[int, int]] = set()
    while len(pairs) < edges:
        a, b = rng.integers(0, len(nodes), 2).tolist()
        if a < b and not nodes[a].startswith("medication/"):
            pairs.add((a, b))
    source, target = np.array(sorted(pairs), np.int32).reshape(-1, 2).T
    to_sink = np.array([nodes[b].startswith("medication/") for b in target], np.bool_)
    return CausalGraph(
        nodes=tuple(nodes),
        source=source,
        target=target,
        directed=to_sink | (rng.random(edges) < 0.7),
        stability=np.where(rng.random(edges) < 0.5, np.nan, rng.random(edges)).astype(np.float32),
        support=rng.integers(5, 5000, edges),
        strength=rng.exponential(30, edges).astype(np.float32),
    )


def random_effects(graph: CausalGraph, seed: int = 1) -> EffectTable:
    rng = np.random.default_rng(seed)
    kinds = ("diagnosis", "procedure", "previous_medication")
    codes = tuple(n for kind in kinds for n in graph.nodes if n.startswith(f"{kind}/"))
    medications = tuple(n for n in graph.nodes if n.startswith("medication/"))
    shape = (len(codes), len(medications))
    effect = rng.normal(0, 0.2, shape).astype(np.float32)
    error = np.where(rng.random(shape) < 0.1, np.nan, rng.random(shape) * 0.1)
    return EffectTable(
        codes=codes,
        medications=medications,
        effect=effect,
        standard_error=error.astype(np.float32),
        estimator="doubly_robust",
        minimum=effect - np.float32(0.05),
        maximum=effect,
        support=rng.integers(0, 900, shape).astype(np.int32),
        supported=rng.random(shape) < 0.8,
        visits=np.full(len(codes), 50, np.float32),
    )


class Page(HTMLParser):
    """Tags with their attributes, and the text of each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script" and self.scripts:
            self.scripts[-1] += data


def data_of(text: str) -> Any:
    return json.loads(Page(text).scripts[0])


def test_the_graph_can_be_read_back_from_the_page() -> None:
    graph = random_graph(80, 150)
    data = data_of(page.render(graph, random_effects(graph), {"visits": 1234}))
    assert data["nodes"] == list(graph.nodes)
    for name in ("source", "target", "support"):
        assert data["edges"][name] == getattr(graph, name).tolist()
    assert [bool(d) for d in data["edges"]["directed"]] == graph.directed.tolist()
    for name, digits in (("strength", 2), ("stability", 3)):
        shown = np.array(data["edges"][name], np.float64)  # null becomes NaN
        np.testing.assert_allclose(shown, getattr(graph, name), atol=0.51 * 10**-digits)
    assert data["summary"].startswith("1,234 training visits, 80 codes, ")


def test_the_largest_supported_effects_of_each_code_and_medication_are_shown() -> None:
    graph = random_graph(200, 10)
    effects = random_effects(graph)
    shown = data_of(page.render(graph, effects, {"visits": 1}))["effects"]
    found = {}
    for i, (code, medication) in enumerate(zip(shown["code"], shown["medication"], strict=True)):
        values = tuple(shown[k][i] for k in ("effect", "low", "high", "minimum", "maximum"))
        found[graph.nodes[code], graph.nodes[medication]] = (*values, shown["support"][i])
    expected: dict[tuple[str, str], tuple[int, ...]] = {}
    usable = effects.supported & np.isfinite(effects.standard_error)
    for along in (0, 1):
        for i in range(effects.effect.shape[along]):
            cells = [
                (i, j) if along == 0 else (j, i) for j in range(effects.effect.shape[1 - along])
            ]
            cells = [cell for cell in cells if usable[cell]]
            cells.sort(key=lambda cell: -abs(effects.effect[cell]))
            for cell in cells[:20]:
                value, half = float(effects.effect[cell]), 1.959964 * effects.standard_error[cell]
                numbers = (value, value - half, value + half, value - 0.05, value)
                expected[effects.codes[cell[0]], effects.medications[cell[1]]] = (
                    *(round(10_000 * float(x)) for x in numbers),
                    int(effects.support[cell]),
                )
    assert found.keys() == expected.keys()
    assert len(found) < usable.sum()  # some were too many
    assert any(code.startswith("previous_medication/") for code, _ in found)
    np.testing.assert_allclose([found[k] for k in found], [expected[k] for k in found], atol=1)
    assert shown["estimator"] == "doubly_robust"


def test_a_graph_without_sinks_or_edges_gives_a_page() -> None:
    graph = random_graph(40, 30)
    effects = random_effects(graph)
    data = data_of(page.render(graph.without_sinks(), effects, {"visits": 1}))
    assert set(data["nodes"]) == set(graph.nodes)  # medications that only effects name
    empty = random_graph(40, 0)
    assert data_of(page.render(empty, effects, {"visits": 1}))["edges"]["source"] == []


def test_no_text_of_a_code_can_leave_the_data_block() -> None:
    evil = "diagnosis/x:</script><script>alert(1)</script><!--&amp;\u2028__PROGRAM____DATA__"
    graph = CausalGraph(
        (evil,), *(np.zeros(0, t) for t in (np.int32, np.int32, np.bool_, np.float32, np.int64)),
        strength=np.zeros(0, np.float32),
    )  # fmt: skip
    none = random_effects(random_graph(0, 0))
    text = page.render(graph, none, {"visits": 1})
    parsed = Page(text)
    assert len(parsed.scripts) == 2
    assert data_of(text)["nodes"] == [evil]
    assert "alert(1)" not in parsed.scripts[1]


def test_the_page_needs_no_other_file_and_no_host() -> None:
    graph = random_graph(40, 30)
    text = page.render(graph, random_effects(graph), {"visits": 1})
    assert re.search(r"(?i)https?://|//[a-z]+\.|@import|url\((?!#)", text) is None
    for tag, attributes in Page(text).tags:
        for name in ("src", "href", "action", "data"):
            address = attributes.get(name) or "#"
            assert address.startswith(("#", "data:")), (tag, address)
    policy = next(a["content"] for t, a in Page(text).tags if a.get("http-equiv"))
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "__" not in re.sub(r'<script id="data".*?</script>', "", text, flags=re.S)


ENTER, DOWN, TAB = "\ue007", "\ue015", "\ue004"


@pytest.mark.slow
def test_a_code_is_found_and_left_by_the_keyboard_in_a_browser(
    tmp_path: Path, browser: Any
) -> None:
    graph = random_graph(3500, 20_000)
    effects = random_effects(graph)
    (tmp_path / "graph.html").write_text(page.render(graph, effects, {"visits": 10_000}))
    started = time.monotonic()
    browser.post("url", url=(tmp_path / "graph.html").as_uri())
    assert browser.run("return document.querySelectorAll('table tr').length") == 16
    assert time.monotonic() - started < 10

    code = next(
        int(i)
        for i in np.flatnonzero(np.char.startswith(np.array(graph.nodes), "procedure/"))
        if {*graph.source[graph.directed]} >= {i} and {*graph.target[graph.directed]} >= {i}
    )
    name = graph.nodes[code].split("/")[1]
    for _ in range(3):  # past the link of the title to the search
        if browser.run("return document.activeElement.id") != "query":
            browser.press(TAB)
    browser.press(name.split(":")[1].lower())
    assert browser.comes_to("return document.getElementById('found').textContent", "1 code")
    once = "const t = performance.now(); search(); return performance.now() - t"
    assert min(browser.run(once) for _ in range(5)) < 200  # a busy machine slows some of them
    browser.press(DOWN)
    assert browser.run("return document.activeElement.textContent").startswith(f"{name} procedure")
    browser.press(ENTER)
    assert browser.comes_to("return document.activeElement.textContent", f"{name} procedure")
    assert browser.run("return document.title") == f"{name} – Causal graph"

    def rows(title: str) -> list[list[str]]:
        script = (
            f"return [...document.querySelectorAll('table[aria-label=\"{title}\"] tbody tr')]"
            ".map(r => [...r.cells].map(c => c.innerText.split('\\n')[0]))"
        )
        found: list[list[str]] = browser.run(script)
        return found

    def expected(own: np.ndarray, other: np.ndarray) -> list[list[str]]:
        which = np.flatnonzero((own == code) & graph.directed)
        return [
            [
                graph.nodes[other[i]].split("/")[1],
                f"{graph.strength[i]:.1f}",
                "–" if np.isnan(graph.stability[i]) else f"{graph.stability[i]:.2f}",
                f"{graph.support[i]:,}",
            ]
            for i in which[np.argsort(-graph.strength[which])]
        ]

    for title, own, other in (
        ("Causes", graph.target, graph.source),
        ("Effects in the graph", graph.source, graph.target),
    ):
        shown, wanted = rows(title), expected(own, other)
        assert [(r[0], r[3]) for r in shown] == [(r[0], r[3]) for r in wanted]
        assert len(shown) >= 1
        for a, b in zip(shown, wanted, strict=True):
            assert float(a[1]) == pytest.approx(float(b[1]), abs=0.11)
            assert (a[2] == "–") == (b[2] == "–")
    row = effects.codes.index(graph.nodes[code])
    usable = effects.supported[row] & np.isfinite(effects.standard_error[row])
    best = np.flatnonzero(usable)[np.argsort(-np.abs(effects.effect[row][usable]))[:20]]
    assert [r[0] for r in rows("Effects on medications")] == [
        effects.medications[i].split("/")[1] for i in best
    ]
    assert browser.run("return document.querySelectorAll('svg[role=img] path.edge').length") > 1

    before = next(n for n in graph.nodes if n.startswith("previous_medication/"))
    browser.run(f"location.hash = '#{before}'")
    assert browser.comes_to("return document.title", f"{before.split('/')[1]} – Causal graph")
    row = effects.codes.index(before)
    usable = effects.supported[row] & np.isfinite(effects.standard_error[row])
    best = np.flatnonzero(usable)[np.argsort(-np.abs(effects.effect[row][usable]))[:20]]
    assert [r[0] for r in rows("Effects on medications")] == [
        effects.medications[i].split("/")[1] for i in best
    ]
    browser.post("back")
    assert browser.comes_to("return document.title", f"{name} – Causal graph")

    browser.post("back")
    assert browser.comes_to(
        "return document.querySelector('h3').textContent", "Codes with most edges"
    )
    for width in (360, 1200):
        browser.post("window/rect", width=width, height=800)
        assert browser.comes_to("return document.documentElement.scrollWidth <= innerWidth", True)
    assert browser.messages() == []
