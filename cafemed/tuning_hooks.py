"""What Ray Tune asks while it runs a sweep, passed on to the conductor.

Ray Tune pickles these with its own state, which nobody reads: a sweep goes on from its ledger.
"""

import os
from collections.abc import Callable
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from cafemed import ledger, placement, sweep
from cafemed.conductor import Conductor

#: The folder of a trial's checkpoint, beside those that Ray Tune would put there.
KEPT = "checkpoint_kept"


def trial_name(number: int) -> str:
    """What Ray Tune calls a trial, and its folder."""
    return f"trial-{number:05d}"


class _Hook:
    """Has a conductor, which is left behind when it is pickled: it may hold a terminal."""

    conductor: Conductor

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Search(_Hook, Searcher):
    """Proposes the next trial."""

    def __init__(self, conductor: Conductor, storage_key: str, run: str) -> None:
        super().__init__()
        self.conductor, self._storage_key, self._run = conductor, storage_key, run
        self._live: set[str] = set()

    def suggest(self, trial_id: str) -> Any:
        """Ray Tune calls this when a trial may be added; None: not now."""
        if not self._has_room():
            return None
        start = self.conductor.next()
        if start is None:
            return Searcher.FINISHED
        self._live.add(trial_id)
        ledger = self.conductor.ledger.folder
        place = None if ledger is None else ledger / self._run / trial_name(start.number) / KEPT
        return {
            "trial": start.number,
            "seed": start.seed,
            "checkpoint": start.checkpoint,
            "folder": None if place is None else str(place),
            "ledger": self._ledger_file(),
            "storage_key": self._storage_key,
            "workers": self.conductor.plan.search.workers,
            "parameters": dict(start.parameters),
        }

    def _has_room(self) -> bool:
        """Whether the workers of one more trial have a place; Ray Tune counts those of one alone.

        A cluster may grow: one trial more than it has room for waits there, so that it learns what
        is wanted. It reserves nothing while it waits, so the others are not kept from ending.
        """
        workers = self.conductor.plan.search.workers
        if workers.num == 1:
            return True
        waiting = 1 if os.environ.get("RAY_ADDRESS") else 0
        return len(self._live) < max(placement.room(workers) + waiting, 1)

    def _ledger_file(self) -> str | None:
        folder = self.conductor.ledger.folder
        return None if folder is None else str(folder / ledger.FILE)

    def on_trial_complete(self, trial_id: str, *_: Any, **__: Any) -> None:
        """The conductor is told by Events, which know why a trial ended."""
        self._live.discard(trial_id)

    def save_to_dir(self, *_: Any, **__: Any) -> None:
        """Nothing: the ledger has it."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger has it."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: a sweep is not restored from Ray Tune's files."""


class Schedule(_Hook, FIFOScheduler):
    """Runs trials in order, and stops those that the conductor stops."""

    def __init__(self, conductor: Conductor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.conductor = conductor

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:  # noqa: ARG002
        """Ray Tune calls this after every report of a trial."""
        history = list(result.get(sweep.HISTORY, ()))
        stops = bool(history) and self.conductor.stops(
            trial.config["trial"], history, **sweep.whereabouts(result)
        )
        return str(TrialScheduler.STOP if stops else TrialScheduler.CONTINUE)


class Stop(_Hook, tune.Stopper):
    """Ends the sweep when the conductor says so."""

    def __init__(self, conductor: Conductor) -> None:
        self.conductor = conductor

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:  # noqa: ARG002
        """No trial alone."""
        return False

    def stop_all(self) -> bool:
        """Ray Tune asks this all the time."""
        return self.conductor.over()


class Events(_Hook, tune.Callback):
    """Tells the conductor when trials start and end."""

    def __init__(
        self, conductor: Conductor, ended: Callable[[Conductor, Trial, bool], None]
    ) -> None:
        self.conductor, self._ended = conductor, ended

    def on_trial_start(self, *_: Any, **info: Any) -> None:
        """Ray Tune calls this, by keyword, when a trial starts, and when it starts again."""
        self._release(info["trial"])
        self.conductor.started(info["trial"].config["trial"])

    def on_trial_complete(self, *_: Any, **info: Any) -> None:
        """Ray Tune calls this, by keyword, when a trial is done or was stopped."""
        self._release(info["trial"])
        self._ended(self.conductor, info["trial"], False)

    def on_trial_error(self, *_: Any, **info: Any) -> None:
        """Ray Tune calls this, by keyword, when a trial failed too often."""
        self._release(info["trial"])
        self._ended(self.conductor, info["trial"], True)

    def _release(self, trial: Trial) -> None:
        """Ends the workers that a trial, or an earlier attempt at it, may have left."""
        workers = self.conductor.plan.search.workers
        if workers.num > 1:
            placement.release(workers, trial.config["trial"])
