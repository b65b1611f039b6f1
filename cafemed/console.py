"""What a job says: its root first, a line a stage, progress bars, and errors as one line."""

import contextlib
import errno
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from cafemed import artifacts
from cafemed.errors import UserError

T = TypeVar("T")

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

#: What a machine refuses that is its owner's to mend: full or read-only disk, no permission, a file
#: where a folder is needed.
_OWNERS_TO_MEND = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
)


def say(stage: str, text: str) -> None:
    """Prints one line of progress: `stage   text`."""
    print(f"{stage:<9} {text}", flush=True)


@contextlib.contextmanager
def job(root: Path) -> Iterator[None]:
    """Prints the root, and turns a user's error or Ctrl-C into one line and an exit status.

    SIGTERM, which stops a submitted job, counts as Ctrl-C, so that what was started is ended.

    Raises:
        SystemExit: 2 after a UserError, a full disk or a folder that may not be written, 130 after
            Ctrl-C, 141 when nobody reads the output any more (`| head`).
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        say("root", str(root))
        yield
    except UserError as err:
        refuse(err)
    except BrokenPipeError:
        # The interpreter flushes standard output once more as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(EXIT_BROKEN_PIPE) from None
    except OSError as err:
        if err.errno not in _OWNERS_TO_MEND:
            raise
        print(f"error: {err.filename or root}: {err.strerror}", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_USER_ERROR) from None
    except KeyboardInterrupt:
        print("interrupted; nothing half-written was left", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_INTERRUPTED) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def refuse(err: UserError) -> NoReturn:
    """Prints a user's error as one line and ends the program with its status."""
    print(f"error: {err}", file=sys.stderr, flush=True)
    raise SystemExit(EXIT_USER_ERROR) from None


@contextlib.contextmanager
def silenced(*loggers: str) -> Iterator[None]:
    """Keeps the log lines of libraries out of a job's output while the block runs."""
    chosen = [logging.getLogger(name) for name in loggers]
    before = [logger.level for logger in chosen]
    for logger in chosen:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(chosen, before, strict=True):
            logger.setLevel(level)


def is_done(folder: Path, stage: str, fingerprint: str, force: bool) -> bool:
    """Says whether a stage can be skipped, and prints so if it can."""
    if force or not artifacts.is_current(folder, stage, fingerprint):
        return False
    say(stage, f"unchanged, skipped (force=true redoes it): {folder}")
    return True


def progress(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Iterates with a progress bar on standard error; silent where that is no terminal."""
    with _bar() as bar:
        yield from bar.track(items, description=what, total=total)


@contextlib.contextmanager
def counter(what: str, total: int) -> Iterator[Callable[[], None]]:
    """Shows a progress bar while the block runs; call what it yields whenever one more is done."""
    with _bar() as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Shows what the block does and for how long already, where its end cannot be foreseen."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    # Transient: what came of it is said in a line of its own.
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as shown:
        shown.add_task(what, total=None)
        yield


def _bar() -> Progress:
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)
