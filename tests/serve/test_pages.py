"""The page at `/` as it is sent; tests/serve/test_page_in_browser.py uses it."""

import asyncio
import re
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest

from cafemed.bundle import Bundle
from cafemed.card import INTENDED_USE
from serve import pages
from serve.api import create_api
from serve.recommender import Recommender

PAGE = Path(pages.__file__).parent / "page"


class Idle:
    """A service that is not asked to recommend."""

    def __init__(self, recommender: Recommender) -> None:
        self.recommender = recommender

    async def probabilities(self, *_: object) -> list[object]:
        raise AssertionError("not asked")


class Elements(HTMLParser):
    """Tags with their attributes, and what text stands directly in scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inline = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] in ("script", "style"):
            self.inline += data.strip()


@pytest.fixture(scope="module")
def answers(served: Bundle) -> dict[str, httpx.Response]:
    """Path → answer, of the page and all it loads."""
    api = create_api(Idle(Recommender(served, 1)))  # type: ignore[arg-type]

    async def call() -> dict[str, httpx.Response]:
        transport = httpx.ASGITransport(app=api)
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
            names = sorted(path.name for path in PAGE.iterdir() if path.name != "index.html")
            paths = ["/", *(f"/static/{name}" for name in names)]
            return {path: await client.get(path) for path in paths}

    return asyncio.run(call())


def test_the_page_and_its_files_are_sent_with_a_strict_policy(
    answers: dict[str, httpx.Response],
) -> None:
    types = {"/": "text/html", "js": "text/javascript", "css": "text/css"}
    for path, answer in answers.items():
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(types[path.rpartition(".")[2]])
        assert answer.headers["x-content-type-options"] == "nosniff"
    policy = dict(
        part.strip().split(" ", 1)
        for part in answers["/"].headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"


def test_the_page_and_the_readme_say_what_it_is_for(answers: dict[str, httpx.Response]) -> None:
    assert INTENDED_USE in answers["/"].text
    readme = Path(__file__).resolve().parents[2] / "README.md"
    assert f"**Intended use: {INTENDED_USE}**" in " ".join(readme.read_text().split())


def test_nothing_is_loaded_from_elsewhere(answers: dict[str, httpx.Response]) -> None:
    page = Elements(answers["/"].text)
    assert page.inline == ""  # the policy forbids it
    loaded = [of["src"] for tag, of in page.found if tag == "script"]
    loaded += [of["href"] for tag, of in page.found if tag == "link"]
    assert {f"/{path}" for path in loaded if path != "data:,"} <= set(answers)
    assert not any(name.startswith("on") or name == "style" for _, of in page.found for name in of)
    for path, answer in answers.items():
        hosts = set(re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]+[^\s\"']*", answer.text))
        assert hosts <= {"http://www.w3.org/2000/svg"}, path  # a name, never loaded
        for module in re.findall(r'from "\./([^"]+)"', answer.text):
            assert f"/static/{module}" in answers


def test_no_text_becomes_html(answers: dict[str, httpx.Response]) -> None:
    for path, answer in answers.items():
        for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert way not in answer.text, path


def test_every_field_has_a_name(answers: dict[str, httpx.Response]) -> None:
    text = answers["/"].text
    labelled = set(re.findall(r'<label for="([^"]+)"', text))
    wrapped = set(re.findall(r'<label[^>]*>[^<]*<(?:input|select) id="([^"]+)"', text))
    wrapped |= set(re.findall(r'<label[^>]*>[^<]*\s*<select id="([^"]+)"', text))
    fields = {of["id"] for tag, of in Elements(text).found if tag in ("input", "select")}
    assert fields == labelled | wrapped


def luminance(colour: str) -> float:
    """Of WCAG 2.2, for "#rrggbb"."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    lighter, darker = sorted((luminance(a), luminance(b)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_contrast_is_worked_out_as_wcag_does() -> None:
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)  # WebAIM's example


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_schemes(scheme: str) -> None:
    css = (PAGE / "page.css").read_text()
    light, dark = css.split("@media (prefers-color-scheme: dark)", 1)
    colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", light))
    if scheme == "dark":
        overridden = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", dark))
        assert set(overridden) == set(colours)
        colours = overridden
    texts = {"text", "faint", "link", "warn", "problem"}
    texts |= {"diagnosis", "procedure", "medication", "laboratory"}
    lines = {"field"}  # borders of what can be used
    assert set(colours) == texts | lines | {"back", "panel", "line", "on-link"}
    for back in ("back", "panel"):
        for name in texts:
            assert contrast(colours[name], colours[back]) >= 4.5, (name, back)
        for name in lines:
            assert contrast(colours[name], colours[back]) >= 3, (name, back)
    assert contrast(colours["on-link"], colours["link"]) >= 4.5
    # Whatever else has a colour has one of these.
    rest = re.sub(r":root \{.*?\}", "", css, flags=re.DOTALL)
    assert set(re.findall(r"#[0-9a-f]{3,8}\b", rest)) <= {"#0006"}  # a shadow
