"""What a sweep does next and what it keeps: drawing, stopping, recording, going on from history.

No Ray here: `cafemed/tuning.py` runs the trials and tells the conductor what happens to them. So
all of it can be tried without processes, and what a sweep decides depends on what it was told only.
"""

import dataclasses
import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cafemed.errors import ArtifactError, TrainingError
from cafemed.lease import TakenOverError
from cafemed.ledger import Entry, Ledger
from cafemed.sampling import Proposer, trial_seed
from cafemed.stopping import make_rule
from cafemed.sweep import Status, SweepResult, TrialRecord, best_until
from cafemed.sweep_plan import SweepPlan
from cafemed.tracking import Progress, Tell
from cafemed.training import FitConfig

_S_PER_HOUR = 3600.0


@dataclasses.dataclass(frozen=True)
class Start:
    """A trial to run.

    Attributes:
        number, parameters, seed: see TrialRecord.
        checkpoint: where it goes on from; None: from the start.
    """

    number: int
    parameters: Mapping[str, Any]
    seed: int
    checkpoint: str | None


class Conductor:
    """A sweep while it runs.

    Made on a ledger with history, it tells sampler and scheduler all of it, in the order of the
    trials' numbers: those that ended, then those that were interrupted, up to their checkpoints.

    Attributes:
        histories: number → epochs so far, of the trials that have not ended and have one.
        broken: what no trial can help, such as a full disk; the sweep ends, to be resumed.
        failed: why the sweep gives up, in one line; None while it does not.

    Args:
        plan: see SweepPlan.
        ledger: holds the trials so far; is written to.
        prior: trials of other sweeps that the sampler is told first.
        on_trial: called with every trial that ends.
        clock: gives seconds, from any start.
        tell: called with every trial's progress: those that ended before, then at each start, each
            epoch and each end; see cafemed/tracking.py.
    """

    def __init__(
        self,
        plan: SweepPlan,
        ledger: Ledger,
        prior: Sequence[TrialRecord] = (),
        on_trial: Callable[[TrialRecord], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        tell: Tell | None = None,
    ) -> None:
        self.plan, self.ledger, self._on_trial, self._now = plan, ledger, on_trial, clock
        self._tell = tell
        self.histories: dict[int, Sequence[Mapping[str, Any]]] = {}
        self.broken: Exception | None = None
        self.failed: str | None = None
        self._proposer = Proposer(plan)
        self._rule = make_rule(plan.search, plan.fit.epochs)
        self._records: dict[int, TrialRecord] = {}
        self._running: dict[int, Entry] = {}
        self._trained_s: dict[int, float] = {}
        self._on: set[int] = set()
        self._waiting: list[Start] = []
        entries = ledger.entries()
        self._before = max((entry.clock for entry in entries), default=0.0)
        self._began = self._now()
        for record in prior:
            self._proposer.know(record)
        self._replay(entries)
        self._count_failed()

    @property
    def seconds(self) -> float:
        """How long the sweep has run, in all."""
        return self._before + self.seconds_of_run

    @property
    def seconds_of_run(self) -> float:
        """How long it has run since it was begun, or went on, the last time."""
        return self._now() - self._began

    def parameters_of(self, number: int) -> Mapping[str, Any] | None:
        """Those of a trial that is running; None if it is not."""
        entry = self._running.get(number)
        return None if entry is None else entry.parameters

    @property
    def running(self) -> list[int]:
        """The trials that were started in this run and have not ended, by number."""
        return sorted(self._on)

    @property
    def remaining(self) -> int:
        """How many trials are still to end."""
        return max(self.plan.search.num_samples - len(self._records), 0)

    @property
    def ended(self) -> list[TrialRecord]:
        """The trials that ended, by number."""
        return [self._records[number] for number in sorted(self._records)]

    @property
    def interrupted(self) -> list[int]:
        """The trials that wait to go on."""
        return [start.number for start in self._waiting]

    def describe_history(self) -> str:
        """One line that says how much of the sweep is there."""
        total, waiting = self.plan.search.num_samples, len(self._waiting)
        goes = "was interrupted and goes" if waiting == 1 else "were interrupted and go"
        more = f", {waiting} {goes} on" if waiting else ""
        return f"goes on: {len(self._records)} of {total} trials ended{more}"

    def over(self) -> bool:
        """Says whether no trial goes on.

        Time is up, too many failed, nothing can be written, or another process took the sweep over.
        """
        if self.broken is None:
            self.broken = self.ledger.lost
        return self._time_is_up() or self.failed is not None or self.broken is not None

    def next(self) -> Start | None:
        """The next trial to run: those interrupted, then new ones; None if there is none."""
        if self.over():
            return None
        if self._waiting:
            return self._waiting.pop(0)
        known = set(self._records) | set(self._running)
        free = (n for n in range(self.plan.search.num_samples) if n not in known)
        if (number := next(free, None)) is None:
            return None
        parameters = self._proposer.draw(number)
        seed = trial_seed(self.plan.search.seed, number)
        self._note(Entry(number, parameters, seed, "running", 0, None, self.seconds))
        return Start(number, parameters, seed, None)

    def started(self, number: int) -> None:
        """Takes note that a trial was started, for the first time or again."""
        entry = self._running[number]
        self._on.add(number)
        self._note(dataclasses.replace(entry, attempts=entry.attempts + 1, clock=self.seconds))
        self._tell_of(number)

    def stops(
        self,
        number: int,
        history: Sequence[Mapping[str, Any]],
        *,
        started: float | None = None,
        seconds: float | None = None,
        host: str = "",
    ) -> bool:
        """Takes note of a trial's epochs so far and says whether it stops.

        Args:
            number: of the trial.
            history: all its epochs.
            started, seconds, host: see `end`; kept for a trial that is cut off.
        """
        self.histories[number] = history
        if seconds is not None:
            self._trained_s[number] = seconds
        entry = self._running[number]
        if started is not None and (started, host) != (entry.started, entry.host):
            self._note(dataclasses.replace(entry, started=started, host=host, clock=self.seconds))
        self._tell_of(number)
        *_, best = best_until(history)
        return self._rule_stops(number, len(history), best)

    def end(
        self,
        number: int,
        history: Sequence[Mapping[str, Any]],
        *,
        error: str | None = None,
        started: float | None = None,
        seconds: float | None = None,
        host: str = "",
    ) -> None:
        """Takes note that a trial ended: it was trained, was stopped, or raised.

        Args:
            number: of the trial.
            history: all its epochs.
            error: what it raised, in one line.
            started: when its first line ran, in seconds since 1970.
            seconds: from there to its last epoch; None: as long as its epochs took.
            host: where it ran.
        """
        entry, workers = self._running[number], self.plan.search.workers
        when = None if started is None else datetime.datetime.fromtimestamp(started, datetime.UTC)
        if seconds is None:
            seconds = float(sum(epoch["seconds"] for epoch in history))
        if error is None and not history:
            error = "ended without an epoch"
        self._record(
            TrialRecord(
                number=number,
                parameters=entry.parameters,
                seed=entry.seed,
                status=_status(error, history, self.plan.fit),
                error=error,
                history=tuple(history),
                started=when,
                seconds=seconds,
                host=host,
                cpus=workers.cpus * workers.num,
                gpus=workers.gpus * workers.num,
                checkpoint=None,
                attempts=entry.attempts,
                memory_gb=None if workers.memory_gb is None else workers.memory_gb * workers.num,
                num_workers=workers.num,
            )
        )
        self._count_failed()

    def result(self) -> SweepResult:
        """The trials of a sweep that is over; those that the time limit cut off count as stopped.

        Raises:
            OSError: if the ledger, or a trial's checkpoint, cannot be written.
            ArtifactError: if an object store refuses it, or another process took the sweep over.
            ConfigError: if a node does not see the storage.
            TrainingError: if more trials failed than may, if time was up before any trial had an
                epoch, or if trials are left that nothing kept from running.
        """
        self._require_going()
        if self._time_is_up():
            for number, history in list(self.histories.items()):
                if number in self._running and history:
                    self._end_as_told(number, history)
            self._require_going()  # the disk may be full, and the trials wait
            if self.remaining and not any(record.history for record in self.ended):
                raise TrainingError(
                    f"search.max_hours={self.plan.search.max_hours:g} was up before any trial had "
                    "an epoch; allow more and run again"
                )
        elif self.remaining:  # such as by a signal that only Ray Tune listens to
            raise TrainingError(
                f"the search ended early, with {len(self._records)} of "
                f"{self.plan.search.num_samples} trials; run the same command to go on"
            )
        return self._result_so_far()

    def _rule_stops(self, number: int, epoch: int, best: Mapping[str, Any]) -> bool:
        """Whether a trial whose best epoch so far is `best` stops after an epoch."""
        limit, found = self.plan.search.max_ddi_rate, best["metrics"]
        keeps = limit is None or float(found["ddi_rate"]) <= limit
        return self._rule.stops(number, epoch, float(found["jaccard"]), keeps)

    def _result_so_far(self) -> SweepResult:
        search = self.plan.search
        return SweepResult(tuple(self.ended), search.objectives, search.max_ddi_rate)

    def _require_going(self) -> None:
        if isinstance(self.broken, OSError) and self.broken.errno is None:  # of an object store
            lines = str(self.broken).strip().splitlines() or [type(self.broken).__name__]
            raise ArtifactError(f"{self.ledger.storage}: {lines[0]}") from self.broken
        if self.broken is not None:
            raise self.broken
        if self.failed is not None:
            raise TrainingError(self.failed)

    def _time_is_up(self) -> bool:
        limit = self.plan.search.max_hours
        return limit is not None and self.seconds >= limit * _S_PER_HOUR

    def _count_failed(self) -> None:
        """Gives up if more trials failed than may, those before an interruption too."""
        limit = self.plan.search.max_failed_trials
        errors = [record.error for record in self.ended if record.status == "failed"]
        if limit is not None and len(errors) > limit:
            self.failed = (
                f"{len(errors)} trials failed, and search.max_failed_trials allows {limit}; the "
                f"last with {errors[-1]}"
            )

    def _replay(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._proposer.repeat(entry.number, entry.parameters)
            if entry.record is not None:
                for epoch, best in enumerate(best_until(entry.record.history), 1):
                    self._rule_stops(entry.number, epoch, best)
                self._proposer.tell(entry.record)
                self._records[entry.number] = entry.record
                self._tell_of_end(entry.record)
        self._unbeaten = self._result_so_far().unbeaten
        for entry in entries:
            if entry.record is None:
                self._running[entry.number] = entry
                self._go_on(entry)

    def _go_on(self, entry: Entry) -> None:
        """Ends an interrupted trial whose last epoch turns out to be its last, or queues it."""
        found = self.ledger.checkpoint(entry.number)
        history = [] if found is None else found[1].history
        stop = False
        for epochs in range(1, len(history) + 1):
            stop = self.stops(entry.number, history[:epochs])
        if history and (stop or _is_complete(history, self.plan.fit)):
            self._end_as_told(entry.number, history)
        else:
            checkpoint = None if found is None else found[0]
            self._waiting.append(Start(entry.number, entry.parameters, entry.seed, checkpoint))

    def _end_as_told(self, number: int, history: Sequence[Mapping[str, Any]]) -> None:
        """Ends a trial of which nothing more is heard than what it told with its epochs."""
        entry, seconds = self._running[number], self._trained_s.get(number)
        self.end(number, history, started=entry.started, seconds=seconds, host=entry.host)

    def _record(self, record: TrialRecord) -> None:
        number = record.number
        entry = Entry(
            number,
            record.parameters,
            record.seed,
            record.status,
            record.attempts,
            record,
            self.seconds,
        )
        if not self._note(entry):
            return
        del self._running[number]
        self.histories.pop(number, None)
        self._trained_s.pop(number, None)
        self._on.discard(number)
        self._records[number] = record
        self._proposer.tell(record)
        self._tell_of_end(record)
        self._keep_unbeaten(number)
        if self._on_trial is not None:
            self._on_trial(record)

    def _keep_unbeaten(self, ended: int) -> None:
        """Removes the checkpoints that nobody will ask for: of trials that ended and are beaten.

        First, that of the one that beats them has to outlive the machine's power.
        """
        unbeaten = self._result_so_far().unbeaten
        try:
            if ended in unbeaten:
                self.ledger.secure(ended)
            for number in (self._unbeaten | {ended}) - unbeaten:
                self.ledger.discard(number)
        except (OSError, TakenOverError) as err:
            self.broken = err
        self._unbeaten = unbeaten

    def _tell_of(self, number: int) -> None:
        """Tells how far a trial is that has not ended."""
        if self._tell is not None:
            entry = self._running[number]
            history = tuple(self.histories.get(number, ()))  # as it is now: it is read later
            self._tell(Progress(number, entry.parameters, entry.seed, history))

    def _tell_of_end(self, record: TrialRecord) -> None:
        if self._tell is not None:
            self._tell(Progress.of(record))

    def _note(self, entry: Entry) -> bool:
        """Writes an entry to the ledger; says whether that went well."""
        self._running[entry.number] = entry
        try:
            self.ledger.write(entry)
        except (OSError, TakenOverError) as err:
            self.broken = err
            return False
        return True


def _status(error: str | None, history: Sequence[Mapping[str, Any]], fit: FitConfig) -> Status:
    if error is not None:
        return "failed"
    return "finished" if _is_complete(history, fit) else "stopped"


def _is_complete(history: Sequence[Mapping[str, Any]], fit: FitConfig) -> bool:
    """Whether a trial's epochs or its patience are used up."""
    jaccard = [epoch["metrics"]["jaccard"] for epoch in history]
    since_best = len(jaccard) - 1 - jaccard.index(max(jaccard))
    return len(history) >= fit.epochs or since_best >= fit.patience
