"""A running sweep for people: one live table in a terminal, nothing where there is none."""

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from cafemed.conductor import Conductor

_REFRESH_HZ = 2
#: Jaccard, DDI rate and time left before the first epoch.
_UNKNOWN = ("–", "–", "–")
_S_PER_MINUTE, _S_PER_HOUR = 60, 3600


@contextlib.contextmanager
def following(conductor: Conductor) -> Iterator[None]:
    """Shows the trials that run, on standard error, while the block does; gone when it ends."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    before = len(conductor.ended)
    with Live(
        get_renderable=lambda: table(conductor, before),
        console=console,
        refresh_per_second=_REFRESH_HZ,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # a file that is written to gets the job's lines
    ):
        yield


def table(conductor: Conductor, before: int = 0) -> Table:
    """The trials that run: parameters, epoch, best Jaccard with its DDI rate, time left.

    One in its first epoch has dashes for what is not known yet.

    Args:
        conductor: of the sweep; may go on meanwhile.
        before: trials that had ended when this run of the sweep began.
    """
    shown = Table(title=headline(conductor, before), title_justify="left", expand=True)
    for name in ("trial", "parameters", "epoch", "Jaccard", "DDI", "left"):
        shown.add_column(name, ratio=1 if name == "parameters" else None, no_wrap=True)
    for number in conductor.running:
        parameters = conductor.parameters_of(number)
        if parameters is not None:
            history = conductor.histories.get(number, ())
            shown.add_row(str(number), *_cells(parameters, history, conductor.plan.fit.epochs))
    return shown


def headline(conductor: Conductor, before: int) -> str:
    """How many trials ended, the best of them, and about how long the rest takes."""
    ended, total = conductor.ended, conductor.plan.search.num_samples
    told = [f"{len(ended)} of {total} trials ended"]
    done = [trial for trial in ended if trial.history and trial.status != "failed"]
    if done:
        best = max(done, key=lambda trial: trial.best_so_far[-1])
        told.append(f"best Jaccard {best.best_so_far[-1]:.4f} (trial {best.number})")
    if len(ended) > before:
        each = conductor.seconds_of_run / (len(ended) - before)
        told.append(f"about {duration(each * conductor.remaining)} left")
    return ", ".join(told)


def duration(seconds: float) -> str:
    """Seconds as people say them: "40 s", "12 min", "3.5 h"."""
    if seconds < _S_PER_MINUTE:
        return f"{seconds:.0f} s"
    if seconds < _S_PER_HOUR:
        return f"{seconds / _S_PER_MINUTE:.0f} min"
    return f"{seconds / _S_PER_HOUR:.1f} h"


def _cells(
    parameters: Mapping[str, Any], history: Sequence[Mapping[str, Any]], epochs: int
) -> list[str]:
    values = (
        f"{name.rsplit('.', 1)[-1]}={value:.3g}"
        if isinstance(value, float)
        else f"{name.rsplit('.', 1)[-1]}={value}"
        for name, value in parameters.items()
    )
    shown = [", ".join(values), f"{len(history)}/{epochs}"]
    if not history:
        return [*shown, *_UNKNOWN]
    best = max(history, key=lambda epoch: float(epoch["metrics"]["jaccard"]))["metrics"]
    each = sum(epoch["seconds"] for epoch in history) / len(history)
    return [
        *shown,
        f"{best['jaccard']:.4f}",
        f"{best['ddi_rate']:.4f}",
        duration(each * (epochs - len(history))),
    ]
