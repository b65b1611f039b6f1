"""Which waiting patients share the next run of the model.

While one run works, others gather. Nearly all patients may share one, whatever their lengths; the
few with more positions than an ordinary run has room for wait in lines of their own
(`batching.room_for`). The next run is of the line that fills it most, or of one that has been
passed over too often. Those who ask take turns in it, so that a lone patient does not wait behind
somebody's hundreds. A run has a cost of its own besides its patients', so a lone patient is
answered at once, and the busier a replica is the less a patient costs.
"""

import asyncio
import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from serve.batching import RUN_POSITIONS, positions_of, room_for
from serve.encoding import EncodedPatient
from serve.recommender import Recommender

_Row = NDArray[np.float32]

#: Runs that a line may be passed over for fuller ones.
_MAX_PASSED = 1
#: Positions of a run that is made in the event loop itself, a millisecond: handing it to a thread
#: takes a tenth of that.
_MAX_INLINE_POSITIONS = 128
#: The same of a model that needs the interpreter at each of its hundreds of small steps, for which
#: a thread would wrestle with the loop: some milliseconds. Longer runs get the thread all the same,
#: so that the loop goes on answering.
_MAX_INLINE_UNTRACED = RUN_POSITIONS


@dataclasses.dataclass(eq=False)
class _Ask:
    """Patients that are asked about together.

    Attributes:
        rows: their probabilities, as far as they are known.
        missing: how many are not.
        done: set when none is.
        first_run: patients in the run that the first was in.
    """

    rows: list[_Row | None]
    missing: int
    done: asyncio.Future[None]
    first_run: int = 0


class _Place(NamedTuple):
    """A patient who waits: the i-th of an ask."""

    patient: EncodedPatient
    positions: int
    ask: _Ask
    i: int


@dataclasses.dataclass
class _Line:
    """Who waits for the same runs.

    Attributes:
        places: of each ask, in the order of their turns.
        positions: of all places together.
        patients: how many places there are.
    """

    places: dict[_Ask, deque[_Place]] = dataclasses.field(default_factory=dict)
    positions: int = 0
    patients: int = 0

    def add(self, place: _Place) -> None:
        """Adds a place behind the others of its ask."""
        self.places.setdefault(place.ask, deque()).append(place)
        self.positions += place.positions
        self.patients += 1

    def pop(self, ask: _Ask) -> _Place:
        """Takes the first place of an ask, whose turn comes again after all others."""
        places = self.places.pop(ask)
        place = places.popleft()
        if places:
            self.places[ask] = places
        self.positions -= place.positions
        self.patients -= 1
        return place


class Runs:
    """Gathers patients and runs the model; used from one event loop.

    Attributes:
        waiting: patients that no run has taken yet.
    """

    def __init__(
        self, max_patients: int, wait_s: float, on_run: Callable[[int], None] = lambda _: None
    ) -> None:
        """Starts with nobody waiting.

        Args:
            max_patients: of one run, at most; it may have room for fewer.
            wait_s: how long a first patient waits for others before a run is made.
            on_run: told the patients of each run.
        """
        self.waiting = 0
        self._max_patients = max_patients
        self._wait_s = wait_s
        self._on_run = on_run
        # Two recommenders are in use around a change of version; a run is of one of them.
        self._lines: dict[tuple[Recommender, int], _Line] = {}
        # Whoever waits for an answer, with or without a place in a line.
        self._asked: set[_Ask] = set()
        self._passed = 0
        self._working: asyncio.Task[None] | None = None
        # One of its own, so that what runs need of memory is set aside once.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="runs")

    async def probabilities(
        self, recommender: Recommender, patients: Sequence[EncodedPatient]
    ) -> tuple[list[_Row], int]:
        """Probabilities of each patient, float32 (N_m,), and the patients of the first's run."""
        loop = asyncio.get_running_loop()
        ask = _Ask([None] * len(patients), len(patients), loop.create_future())
        for i, patient in enumerate(patients):
            positions = positions_of(patient)
            key = recommender, room_for(positions)
            line = self._lines.get(key)
            if line is None:
                line = self._lines[key] = _Line()
            line.add(_Place(patient, positions, ask, i))
        self.waiting += len(patients)
        self._asked.add(ask)
        if self._working is None:
            self._working = loop.create_task(self._work())
        try:
            await ask.done
        finally:
            self._asked.discard(ask)
        return [row for row in ask.rows if row is not None], ask.first_run

    async def _work(self) -> None:
        """Makes runs until nobody waits."""
        try:
            # At least one turn of the loop: requests that have come together are in one run.
            await asyncio.sleep(self._wait_s)
            while self._lines:
                key = self._next()
                members = self._take(key)
                if members:
                    await self._run(*key, members)
        except Exception as err:  # noqa: BLE001 - nobody else would tell those who wait
            self._lines.clear()
            self.waiting = 0
            _fail(self._asked, err)
        finally:
            self._working = None

    def _next(self) -> tuple[Recommender, int]:
        """Recommender and room of the next run; the longest waiting one is first in line."""
        oldest = next(iter(self._lines))
        chosen = oldest if self._passed >= _MAX_PASSED else max(self._lines, key=self._fullness)
        self._passed = 0 if chosen == oldest else self._passed + 1
        return chosen

    def _fullness(self, key: tuple[Recommender, int]) -> float:
        line = self._lines[key]
        return min(1.0, max(line.positions / key[1], line.patients / self._max_patients))

    def _take(self, key: tuple[Recommender, int]) -> list[_Place]:
        """The next members of a run; who does not fit goes to the end of the line."""
        line = self._lines.pop(key)
        members: list[_Place] = []
        left = key[1]
        while line.places and len(members) < self._max_patients:
            ask, places = next(iter(line.places.items()))
            gone = ask.done.done()  # its client has gone, or another run failed
            if not gone and places[0].positions > left:
                break
            place = line.pop(ask)
            self.waiting -= 1
            if not gone:
                members.append(place)
                left -= place.positions
        if line.places:
            self._lines[key] = line
        return members

    async def _in_thread(self, compute: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, compute)

    async def _run(self, recommender: Recommender, room: int, members: list[_Place]) -> None:
        patients = [place.patient for place in members]
        most = _MAX_INLINE_POSITIONS if recommender.traced else _MAX_INLINE_UNTRACED
        is_short = sum(place.positions for place in members) <= most
        try:
            if room > RUN_POSITIONS:  # so long that even to begin it takes a while
                rows = await self._in_thread(lambda: recommender.begun(patients, room)())
            else:
                end = recommender.begun(patients, room)
                rows = end() if is_short else await self._in_thread(end)
        except Exception as err:  # noqa: BLE001 - whoever asked gets it
            _fail((place.ask for place in members), err)
            return
        if is_short:
            self._hand_out(members, rows)
            await asyncio.sleep(0)
        else:
            # In the loop's next turn: before the answers are written the next run begins, and
            # works meanwhile.
            asyncio.get_running_loop().call_soon(self._hand_out, members, rows)

    def _hand_out(self, members: Sequence[_Place], rows: NDArray[np.float32]) -> None:
        """Gives the members of a run their rows."""
        try:
            self._on_run(len(members))
        except Exception as err:  # noqa: BLE001 - nobody else would tell those who wait
            _fail((place.ask for place in members), err)
            return
        for place, row in zip(members, rows, strict=True):
            ask = place.ask
            ask.rows[place.i] = row
            ask.missing -= 1
            if place.i == 0:
                ask.first_run = len(members)
            if ask.missing == 0 and not ask.done.done():
                ask.done.set_result(None)


def _fail(asks: Iterable[_Ask], err: Exception) -> None:
    for ask in asks:
        if not ask.done.done():
            ask.done.set_exception(err)
