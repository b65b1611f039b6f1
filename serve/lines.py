"""Log lines of requests, gathered and written together.

To make a log record of every request and pass it through the filters and the formatter that Ray
gives a replica takes as much processor time as a whole request to an endpoint that does nothing.
Only what a line says of its request differs between lines: the rest is made once for all those
that are written together.
"""

import asyncio
import contextlib
import functools
import json
import logging
import time
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import msgspec

#: How long a line waits for others. A process that is killed takes so much with it.
WAIT_S = 0.2
#: Lines that are written together at most.
_MOST = 1000
_LINES, _WRITTEN = "cafemed_lines", "cafemed_written"
#: What a log record tells of itself, or of the request that it was made in, and not of its process.
_OWN = {"asctime", "message", "timestamp_ns", "filename", "lineno"} | {
    *("request_id", "route", "log_to_stderr")
}


class Lines(Protocol):
    """Where the lines of requests go: a logging.Logger, or GatheredLines."""

    def info(self, message: str, /, *args: object, extra: Mapping[str, object]) -> None:
        """Takes a line."""


class _Line(NamedTuple):
    at_s: float
    message: str
    fields: Mapping[str, object]


class GatheredLines:
    """Takes lines as a logger does and writes them a moment later; used from one event loop."""

    def __init__(self, logger: logging.Logger, wait_s: float = WAIT_S) -> None:
        """Prepares the logger's handlers.

        Args:
            logger: writes to a file, as JSON.
            wait_s: how long a line waits for others.
        """
        self._logger = logger
        self._wait_s = wait_s
        self._lines: list[_Line] = []
        for handler in logger.handlers:
            # Ray's handler of a replica's file passes records on to another, which formats them.
            last: logging.Handler = getattr(handler, "target", None) or handler
            last.setFormatter(_Finished(last.formatter or logging.Formatter()))

    def info(self, message: str, /, *args: object, extra: Mapping[str, object]) -> None:
        """Takes a line."""
        self._lines.append(_Line(time.time(), message % args, extra))
        if len(self._lines) == 1:
            asyncio.get_running_loop().call_later(self._wait_s, self.write)
        elif len(self._lines) >= _MOST:
            self.write()

    def write(self) -> None:
        """Writes what has been gathered."""
        lines, self._lines = self._lines, []
        if lines:
            told = {_LINES: lines, "log_to_stderr": False}
            self._logger.info("%d requests", len(lines), extra=told)


class _Finished(logging.Formatter):
    """Formats gathered lines; any other record as the formatter that was there before."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        of_record = vars(record)
        if _WRITTEN in of_record:  # who rotates files asks twice
            return str(of_record[_WRITTEN])
        lines: list[_Line] | None = of_record.pop(_LINES, None)
        if lines is None:
            return self._inner.format(record)
        shared = {"levelname": record.levelname}
        with contextlib.suppress(ValueError):  # a logger of text has lines of JSON all the same
            shared |= json.loads(self._inner.format(record))
        end = json.dumps({name: value for name, value in shared.items() if name not in _OWN})
        of_record[_WRITTEN] = "\n".join(_written(line, end) for line in lines)
        return str(of_record[_WRITTEN])


def _written(line: _Line, end: str) -> str:
    """One line: when, what, and its own fields; then what the process's lines have in common."""
    second, part = divmod(line.at_s, 1.0)
    told = {
        "asctime": f"{_local(int(second))},{int(1000 * part):03d}",
        "message": line.message,
        **line.fields,
        "timestamp_ns": int(1e9 * line.at_s),
    }
    return f"{msgspec.json.encode(told).decode()[:-1]},{end[1:]}"


@functools.lru_cache(maxsize=4)
def _local(second: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))
