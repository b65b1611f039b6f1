"""The page in headless Chromium, in front of the real routes and a real model."""

import contextlib
import dataclasses
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from cafemed.bundle import Bundle
from serve import keys
from serve.access import Access
from serve.api import create_api
from serve.recommender import Recommender
from serve.replying import Service

pytestmark = pytest.mark.slow

TAB, ENTER, DOWN, ESCAPE, SPACE = "\ue004", "\ue007", "\ue015", "\ue00c", " "
HOSTILE = "<img src=x onerror=window.executed=1>"
TYPED = "return document.activeElement.getAttribute('aria-expanded')"
ANSWERED = "return document.querySelectorAll('.medications > li').length > 0"


class Site:
    """The application at an address, and what it was asked."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.app: Any = create_api(service)
        self.asked: list[tuple[str, dict[str, str], bytes]] = []
        self.address = ""

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
        send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = b""

        async def listen() -> MutableMapping[str, Any]:
            nonlocal body
            message = await receive()
            body += message.get("body", b"")
            return message

        await self.app(scope, listen, send)
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.asked.append((scope["path"], headers, body))

    def bodies(self) -> list[Any]:
        return [json.loads(body) for path, _, body in self.asked if path == "/v1/recommend"]


@contextlib.contextmanager
def running(site: Site) -> Iterator[Site]:
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    site.address = f"http://127.0.0.1:{listening.getsockname()[1]}/"
    server = uvicorn.Server(uvicorn.Config(site, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield site
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


@pytest.fixture(scope="module")
def hostile(served: Bundle) -> Bundle:
    """Names that would run as HTML, and medications that are all recommended."""
    names = {
        kind: {code: f"{HOSTILE} {i}" for i, code in enumerate(served.vocabularies[kind])}
        for kind in ("diagnosis", "medication")
    }
    likely = dataclasses.replace(served.preprocessing, threshold=0.01)
    return dataclasses.replace(served, names=names, preprocessing=likely)


@pytest.fixture
def site(hostile: Bundle, direct: Callable[[Recommender], Service]) -> Iterator[Site]:
    with running(Site(direct(Recommender(hostile, 3)))) as site:
        yield site


@pytest.fixture
def page(browser: Any, site: Site) -> Any:
    """A browser that shows the page."""
    browser.post("url", url=site.address)
    assert browser.comes_to(
        "return document.getElementById('model').textContent", "cafemed, version 3"
    )
    return browser


def tab_to(page: Any, what: str) -> None:
    """Presses Tab until the element with the focus is what a JavaScript condition says."""
    for _ in range(60):
        if page.run(f"const e = document.activeElement; return {what}"):
            return
        page.press(TAB)
    raise AssertionError(f"no Tab leads to {what}")


def search(page: Any, text: str) -> None:
    page.press(text)
    assert page.comes_to(TYPED, "true")


def fill(page: Any) -> None:
    """A patient of two visits, by keyboard."""
    tab_to(page, "e.getAttribute('role') === 'combobox'")
    for code in ("4011", "4015", "991"):
        search(page, code)
        page.press(ENTER)
    tab_to(page, "e.id === 'add-visit'")
    page.press(ENTER)
    for code in ("4012", "A01B", "C02B", "N03B"):
        search(page, code)
        page.press(ENTER)


def ask(page: Any) -> None:
    tab_to(page, "e.id === 'ask'")
    page.press(ENTER)
    assert page.comes_to(ANSWERED, True)


def text(page: Any, selector: str) -> list[str]:
    found = page.run(
        f"return [...document.querySelectorAll({selector!r})].map((one) => one.textContent)"
    )
    return [str(one) for one in found]


def test_from_search_to_explanation_with_the_keyboard_alone(page: Any, site: Site) -> None:
    tab_to(page, "e.getAttribute('role') === 'combobox'")
    search(page, "401")
    options = "return document.querySelectorAll('[role=option]').length"
    assert page.comes_to(options, 10)
    active = (
        "const e = document.activeElement; const o = document.getElementById("
        "e.getAttribute('aria-activedescendant')); return o.getAttribute('aria-selected') + ' ' + "
        "o.querySelector('.code').textContent"
    )
    assert page.run(active) == "true icd9:4010"
    page.press(DOWN)
    assert page.run(active) == "true icd9:4011"
    page.press(ESCAPE)
    assert page.run(TYPED) == "false"
    assert text(page, ".codes .code") == []
    page.run("document.activeElement.value = ''")
    fill(page)
    assert text(page, ".visit legend") == ["Current visit", "1 visit before"]
    ask(page)
    assert page.run("return document.activeElement.id") == "answer"
    [body] = site.bodies()
    code = [{"system": "icd9", "code": c} for c in ("4011", "4015", "4012", "991")]
    taken = [{"system": "atc", "code": c} for c in ("A01B", "C02B", "N03B")]
    before, current = body["patients"][0]["visits"]
    assert before == {
        "diagnoses": code[2:3], "procedures": [], "medications": taken, "laboratory": [],
    }  # fmt: skip
    assert current == {
        "diagnoses": code[:2], "procedures": code[3:], "medications": [], "laboratory": [],
    }  # fmt: skip
    answer = httpx.post(f"{site.address}v1/recommend", json=body).json()["recommendations"][0]
    codes = [f"{one['system']}:{one['code']}" for one in answer["medications"]]
    assert text(page, ".medications > li .head .code") == codes
    assert text(page, ".medications .probability")[0] == (
        f"{100 * answer['medications'][0]['probability']:.1f} %"
    )
    tab_to(page, "e.tagName === 'SUMMARY' && e.closest('.medications') !== null")
    page.press(ENTER)
    assert page.run("return document.activeElement.parentElement.open") is True
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    reasons = answer["medications"][0]["explanation"]
    shown = [one for way in ("raised", "lowered") for one in reasons[way]]
    shown = [one for one in shown if abs(one["change"]) >= 0.001]
    assert shown
    told = text(page, ".medications details[open] .change")
    assert told == [
        f"{100 * one['score_without']:.1f} % without it, "
        f"{'+' if one['change'] > 0 else '−'}{abs(100 * one['change']):.1f} points with it"
        for one in shown
    ]
    assert page.messages() == []


def test_the_graph_shows_every_interacting_pair(page: Any, site: Site) -> None:
    tab_to(page, "e.id === 'allergies'")
    page.press("A01B, C02B")  # taken all the same
    fill(page)
    ask(page)
    [body] = site.bodies()
    answer = httpx.post(f"{site.address}v1/recommend", json=body).json()["recommendations"][0]
    pairs = {frozenset((one["first"], one["second"])) for one in answer["interactions"]}
    pairs |= {
        frozenset((one["recommended"], one["taken"])) for one in answer["interactions_with_taken"]
    }
    assert len(answer["interactions"]) > 5
    assert answer["interactions_with_taken"]
    drawn = page.run(
        "return [...document.querySelectorAll('.pair')]"
        ".map((e) => [e.dataset.first, e.dataset.second])"
    )
    assert {frozenset(pair) for pair in drawn} == pairs
    assert len(drawn) == len(pairs)
    assert len(text(page, ".pairs li")) == len(pairs)  # the same in words
    # No label lies on another or leaves the drawing.
    boxes = page.run(
        "const svg = document.querySelector('.graph svg').getBoundingClientRect();"
        "return [...document.querySelectorAll('.graph text')].map((e) => {"
        "const b = e.getBoundingClientRect();"
        "return [b.left - svg.left, b.top - svg.top, b.right - svg.left, b.bottom - svg.top,"
        " svg.width]})"
    )
    for i, (left, top, right, bottom, width) in enumerate(boxes):
        assert left >= 0
        assert right <= width
        for other in boxes[:i]:
            apart = left >= other[2] or other[0] >= right or top >= other[3] or other[1] >= bottom
            assert apart


def test_codes_and_names_are_shown_as_text_and_never_run(page: Any) -> None:
    tab_to(page, "e.getAttribute('role') === 'combobox'")
    search(page, f"icd9:{HOSTILE}")
    assert page.comes_to("return document.querySelectorAll('[role=option]').length > 0", True)
    page.press(ENTER)
    fill(page)
    ask(page)
    unknown = HOSTILE.upper().replace(".", "")
    assert any(unknown in one for one in text(page, "#found li"))
    assert any(HOSTILE in one for one in text(page, ".medications .name"))
    assert page.run("return document.querySelectorAll('main img').length") == 0
    assert page.run("return window.executed === undefined")
    assert page.messages() == []
    # Were it HTML after all, the policy would still keep it from running and from sending.
    page.run(f"document.body.insertAdjacentHTML('beforeend', {HOSTILE!r})")
    time.sleep(0.3)
    assert page.run("return window.executed === undefined")


def test_nothing_leaves_for_another_host(page: Any, site: Site) -> None:
    fill(page)
    ask(page)
    loaded = page.run("return performance.getEntriesByType('resource').map((e) => e.name)")
    assert len(loaded) > 6
    assert all(url.startswith(site.address) for url in loaded)
    with socket.socket() as elsewhere:
        elsewhere.bind(("127.0.0.1", 0))
        elsewhere.listen()
        elsewhere.settimeout(0.5)
        address = f"http://127.0.0.1:{elsewhere.getsockname()[1]}/"
        refused = f"return fetch({address!r}, {{mode: 'no-cors'}}).then(() => '', (e) => e.name)"
        assert page.run(refused) == "TypeError"
        with pytest.raises(TimeoutError):
            elsewhere.accept()


def test_a_phone_needs_no_scrolling_sideways(page: Any) -> None:
    page.cdp(
        "Emulation.setDeviceMetricsOverride",
        width=375,
        height=740,
        deviceScaleFactor=2,
        mobile=True,
    )
    too_wide = "return document.documentElement.scrollWidth > 375 || innerWidth !== 375"
    assert not page.run(too_wide)
    tab_to(page, "e.getAttribute('role') === 'combobox'")
    search(page, "40")
    assert page.comes_to("return document.querySelectorAll('[role=option]').length > 5", True)
    assert not page.run(too_wide)
    page.press(ESCAPE)
    page.run("document.activeElement.value = ''")
    fill(page)
    ask(page)
    page.run("for (const e of document.querySelectorAll('details')) e.open = true")
    assert page.comes_to("return document.querySelector('.graph svg') !== null", True)
    assert not page.run(too_wide)
    small = page.run(
        "return [...document.querySelectorAll('button, select, input:not([type=checkbox])')]"
        ".filter((e) => e.offsetParent && e.getBoundingClientRect().height < 44)"
        ".map((e) => e.outerHTML)"
    )
    assert small == []  # for fingers


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_that_is_shown_stands_out(page: Any, scheme: str) -> None:
    features = [
        {"name": "prefers-color-scheme", "value": scheme},
        {"name": "prefers-reduced-motion", "value": "reduce"},
    ]
    page.cdp("Emulation.setEmulatedMedia", features=features)
    fill(page)
    ask(page)
    page.run("for (const e of document.querySelectorAll('details')) e.open = true")
    found = page.run(
        """
        const channels = (colour) => colour.match(/[0-9.]+/g).map(Number);
        const luminance = ([r, g, b]) => [r, g, b].map((c) => c / 255)
          .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
          .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
        const behind = (e) => {
          for (; e; e = e.parentElement) {
            const colour = channels(getComputedStyle(e).backgroundColor);
            if (colour.length === 3 || colour[3] > 0) return colour;
          }
          return [255, 255, 255];
        };
        const found = [];
        const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
        while (walk.nextNode()) {
          const e = walk.currentNode.parentElement;
          if (!walk.currentNode.textContent.trim() || !e.checkVisibility()) continue;
          const style = getComputedStyle(e);
          const colour = channels(e.namespaceURI.endsWith("svg") ? style.fill : style.color);
          const [a, b] = [luminance(colour), luminance(behind(e))].sort((x, y) => y - x);
          found.push([(a + 0.05) / (b + 0.05), walk.currentNode.textContent.trim()]);
        }
        return [getComputedStyle(document.body).backgroundColor, found];
        """
    )
    assert found[0] == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]
    assert len(found[1]) > 100
    assert [one for one in found[1] if one[0] < 4.5] == []


def test_a_refused_request_names_the_fields(page: Any, site: Site) -> None:
    tab_to(page, "e.id === 'age'")
    page.press("171")
    tab_to(page, "e.id === 'allergies'")
    page.press("J01C, nuts")
    tab_to(page, "e.id === 'ask'")
    page.press(ENTER)
    assert page.comes_to("return document.getElementById('problem').hidden", False)
    assert page.run("return document.activeElement.id") == "problem"
    told = text(page, "#problem li")
    assert len(told) == 2
    assert any(one.startswith("age: ") and "130" in one for one in told)
    assert any(one.startswith("allergies") and "ATC" in one for one in told)
    assert site.bodies()[0]["patients"][0]["allergies"] == ["J01C", "nuts"]


def test_a_patient_who_is_mostly_unknown_is_refused_in_words(page: Any) -> None:
    tab_to(page, "e.getAttribute('role') === 'combobox'")
    search(page, "icd9:V99.9")
    assert page.comes_to("return document.querySelectorAll('[role=option]').length", 2)
    page.press(ENTER)
    tab_to(page, "e.id === 'ask'")
    page.press(ENTER)
    assert page.comes_to("return document.getElementById('problem').hidden", False)
    [told] = text(page, "#problem li")
    assert told.startswith("this patient: ")
    assert "known" in told
    assert page.run("return document.getElementById('answer').children.length") == 3  # as before


def test_options_and_what_is_left_out(page: Any, site: Site) -> None:
    fill(page)
    for field, value in (("max-ddi", "10"), ("top-k", "5")):
        tab_to(page, f"e.id === '{field}'")
        page.press(value)
    tab_to(page, "e.id === 'explain'")
    page.press(SPACE)
    ask(page)
    [body] = site.bodies()
    assert body["options"] == {"max_ddi_rate": 0.1, "top_k": 5, "explain": False}
    answer = httpx.post(f"{site.address}v1/recommend", json=body).json()["recommendations"][0]
    assert len(text(page, ".medications > li")) == len(answer["medications"]) <= 5
    shown = text(page, "#found li")
    for one in answer["left_out"]:
        code = f"{one['system']}:{one['code']}"
        assert any(code in told and f"{100 * one['probability']:.1f} %: " in told for told in shown)
    assert len(answer["left_out"]) >= 7


def test_an_answer_to_an_earlier_question_is_marked(page: Any) -> None:
    fill(page)
    ask(page)
    stale = "return document.getElementById('answer').classList.contains('stale')"
    assert not page.run(stale)
    page.run("document.querySelector('.codes button').click()")
    assert page.run(stale)
    assert page.run("return document.activeElement.getAttribute('role')") == "combobox"
    page.run("document.getElementById('answer').focus()")
    page.run("document.getElementById('ask').click()")
    assert page.comes_to(stale, False)


def test_the_key_is_sent_and_stored_nowhere(page: Any, site: Site) -> None:
    tab_to(page, "e.tagName === 'SUMMARY' && e.closest('#access') !== null")
    page.press(ENTER)
    tab_to(page, "e.id === 'key'")
    page.press("a-secret")
    assert page.run("return document.getElementById('key').type") == "password"
    tab_to(page, "e.id === 'ask'")
    page.press(ENTER)
    assert page.comes_to(ANSWERED, True)
    sent = {path: headers.get("authorization") for path, headers, _ in site.asked}
    assert sent["/v1/recommend"] == sent["/v1/model"] == "Bearer a-secret"
    kept = "return [localStorage.length, sessionStorage.length, document.cookie, location.search]"
    assert page.run(kept) == [0, 0, "", ""]
    assert not any("a-secret" in path for path, _, _ in site.asked)


def test_a_server_with_keys_is_used_with_one(page: Any, site: Site, tmp_path: Path) -> None:
    key = keys.create(tmp_path / "keys.json", "browser", per_minute=600)
    access = Access(keys.Keys(tmp_path / "keys.json"))
    site.app = create_api(site.service, access=access)
    page.post("refresh")
    tab_to(page, "e.getAttribute('role') === 'combobox'")
    page.press("401")
    assert page.comes_to("return document.getElementById('problem').hidden", False)
    assert page.run("return document.activeElement.value") == "401"  # typing may go on
    assert page.run("return document.getElementById('access').open")
    tab_to(page, "e.id === 'ask'")
    page.press(ENTER)
    assert page.comes_to("return document.activeElement.id", "key")
    page.press(f"{key}{TAB}")
    assert page.comes_to(
        "return document.getElementById('model').textContent", "cafemed, version 3"
    )
    page.run("document.querySelector('[role=combobox]').focus()")
    page.run("document.activeElement.value = ''")
    fill(page)
    ask(page)
    assert page.run("return document.getElementById('problem').hidden")


def test_a_server_that_is_gone_is_said(page: Any, site: Site) -> None:
    async def gone(scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG001
        await send(
            {"type": "http.response.start", "status": 503, "headers": [(b"retry-after", b"7")]}
        )
        await send({"type": "http.response.body", "body": b"{}"})

    site.app = gone
    tab_to(page, "e.id === 'ask'")
    page.press(ENTER)
    assert page.comes_to("return document.getElementById('problem').hidden", False)
    assert "Ask again in 7 s" in text(page, "#problem")[0]
