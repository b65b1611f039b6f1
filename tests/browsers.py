"""A headless browser for pages that are meant for people."""

import contextlib
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest


class Browser:
    """A few commands of WebDriver (w3.org/TR/webdriver2) to chromedriver."""

    def __init__(self, address: str) -> None:
        self._client = httpx.Client(base_url=address, timeout=30)
        options = {
            "args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,900"]
        }
        wanted = {
            "alwaysMatch": {
                "goog:chromeOptions": options,
                "goog:loggingPrefs": {"browser": "ALL"},
            }
        }
        made = self._client.post("/session", json={"capabilities": wanted}).json()
        self._session = f"/session/{made['value']['sessionId']}"

    def post(self, path: str, **arguments: Any) -> Any:
        reply = self._client.post(f"{self._session}/{path}", json=arguments)
        assert reply.status_code == 200, reply.text[:500]
        return reply.json()["value"]

    def run(self, script: str) -> Any:
        return self.post("execute/sync", script=script, args=[])

    def press(self, keys: str) -> None:
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.post("actions", actions=[{"type": "key", "id": "keys", "actions": actions}])

    def comes_to(self, script: str, expected: str | bool) -> bool:
        """Whether a script gives what is expected within seconds: pages move on in their time."""
        deadline = time.monotonic() + 10
        while (found := self.run(script)) != expected and time.monotonic() < deadline:
            time.sleep(0.05)
        return bool(found == expected)

    def messages(self) -> list[str]:
        return [entry["message"] for entry in self.post("se/log", type="browser")]

    def cdp(self, command: str, **parameters: Any) -> Any:
        """A command of Chromium's own protocol."""
        return self.post("goog/cdp/execute", cmd=command, params=parameters)

    def close(self) -> None:
        self._client.delete(self._session)
        self._client.close()


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Browser]:
    """A browser that is closed with the block; skips the test where there is none."""
    program = shutil.which("chromedriver")
    if program is None or not (shutil.which("chromium") or shutil.which("google-chrome")):
        pytest.skip("needs Chromium and chromedriver")
    process = subprocess.Popen(
        [program, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        cwd=folder,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        port = None
        deadline = time.monotonic() + 30
        while port is None and time.monotonic() < deadline:
            started = re.search(r"successfully on port (\d+)", process.stdout.readline())
            port = started and started.group(1)
        browser = Browser(f"http://127.0.0.1:{port}")
        yield browser
        browser.close()
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()
