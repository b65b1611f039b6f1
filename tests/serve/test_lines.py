"""Lines of requests that are written together."""

import asyncio
import io
import json
import logging
import logging.handlers
from pathlib import Path
from typing import Any

import pytest
from ray._common.formatters import JSONFormatter  # as in a replica
from ray.serve._private.logging_utils import ServeComponentFilter, ServeContextFilter
from ray.serve.context import _RequestContext, _serve_request_context

from serve.lines import GatheredLines


def logger_to(handler: logging.Handler, file: logging.Handler | None = None) -> logging.Logger:
    """A logger as Ray makes it for a replica."""
    (file or handler).setFormatter(JSONFormatter())
    handler.addFilter(ServeContextFilter())
    handler.addFilter(ServeComponentFilter("tiny_Endpoint", "ab12"))
    logger = logging.Logger("test")
    logger.addHandler(handler)
    return logger


def told(i: int) -> dict[str, Any]:
    return {"request_id": f"id-{i}", "route": "/v1/recommend", "status": 200 + i, "key": 'a "b'}


def test_lines_are_those_of_a_logger_but_for_their_place_in_the_program() -> None:
    """Written one by one by Ray's formatter, and together by ours."""
    apart, together = io.StringIO(), io.StringIO()
    one_by_one = logger_to(logging.StreamHandler(apart))
    gathered = GatheredLines(logger_to(logging.StreamHandler(together)), wait_s=0.01)

    async def log() -> None:
        _serve_request_context.set(_RequestContext(request_id="header", route="/", app_name="tiny"))
        for i in range(5):
            fields = told(i)
            one_by_one.info("%s %d", "POST", i, extra={**fields, "request_id": "header"})
            gathered.info("%s %d", "POST", i, extra=fields)
        assert together.getvalue() == ""
        await asyncio.sleep(0.1)

    asyncio.run(log())
    expected = [json.loads(line) for line in apart.getvalue().splitlines()]
    lines = [json.loads(line, object_pairs_hook=list) for line in together.getvalue().splitlines()]
    assert len(lines) == 5
    for i, (line, other) in enumerate(zip(lines, expected, strict=True)):
        assert len(dict(line)) == len(line), "a field is there twice"
        found = dict(line)
        assert found.pop("request_id") == f"id-{i}"
        assert found["route"] == "/v1/recommend"
        assert found["asctime"][:16] == other["asctime"][:16]
        assert found["timestamp_ns"] > 1e18
        for name in ("asctime", "timestamp_ns"):
            found.pop(name)
        for name in ("asctime", "filename", "lineno", "request_id", "timestamp_ns"):
            other.pop(name, None)
        # Ray's filter puts its own route over ours.
        assert found == {**other, "route": "/v1/recommend"}


def test_they_are_json_in_a_log_of_text_too() -> None:
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    logger = logger_to(handler)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    gathered = GatheredLines(logger, wait_s=0.01)

    async def log() -> None:
        gathered.info("%s", "POST", extra=told(1))
        logger.warning("no shadow yet")
        await asyncio.sleep(0.05)

    asyncio.run(log())
    other, line = written.getvalue().splitlines()
    assert other == "WARNING no shadow yet"
    found = json.loads(line)
    assert (found["message"], found["request_id"], found["levelname"]) == ("POST", "id-1", "INFO")


def test_other_records_are_written_as_before() -> None:
    written = io.StringIO()
    logger = logger_to(logging.StreamHandler(written))
    GatheredLines(logger)
    logger.warning("no shadow yet")
    line = json.loads(written.getvalue())
    assert (line["message"], line["filename"]) == ("no shadow yet", "test_lines.py")


@pytest.mark.parametrize("number", [1, 999, 1000, 2500])
def test_no_line_is_lost_or_written_twice(tmp_path: Path, number: int) -> None:
    """In files that are exchanged when they are long, behind a handler that passes records on."""
    file = logging.handlers.RotatingFileHandler(tmp_path / "log", maxBytes=10**5, backupCount=9)
    passing = logging.handlers.MemoryHandler(1, target=file)
    gathered = GatheredLines(logger_to(passing, file), wait_s=0.02)

    async def log() -> None:
        for i in range(number):
            gathered.info("%d", i, extra=told(i))
            if i % 400 == 399:
                await asyncio.sleep(0.001)
        await asyncio.sleep(0.1)

    asyncio.run(log())
    file.close()
    # Gathered lines stay together, so that a file may be longer by them.
    texts = [path.read_text() for path in tmp_path.iterdir()]
    seen = [json.loads(line)["message"] for text in texts for line in text.splitlines()]
    assert sorted(map(int, seen)) == list(range(number))
