"""Which patients share a run; against the recommender asked for each alone."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cafemed.bundle import Bundle
from serve.batching import RUN_POSITIONS, positions_of, room_for
from serve.encoding import EncodedPatient
from serve.example import example_request
from serve.recommender import Recommender
from serve.runs import Runs
from serve.schema import RecommendRequest


@pytest.fixture(scope="module")
def recommender(served: Bundle) -> Recommender:
    return Recommender(served, 1)


@pytest.fixture(scope="module")
def patients(served: Bundle, recommender: Recommender) -> list[EncodedPatient]:
    """Twelve patients of one to four visits, repeated first visits making some of them long."""
    [patient] = example_request(served)["patients"]
    visits = patient["visits"]
    bodies = [
        {**patient, "visits": visits[:1] * (7 * (i % 3) + 1) + visits[: i % 4]} for i in range(12)
    ]
    return recommender.encode(RecommendRequest.model_validate({"patients": bodies}))


class Told:
    """A recommender that notes its runs."""

    def __init__(self, recommender: Recommender) -> None:
        self._recommender = recommender
        self.runs: list[tuple[int, int]] = []

    @property
    def traced(self) -> object:
        return self._recommender.traced

    def begun(
        self, patients: Sequence[EncodedPatient], positions: int
    ) -> Callable[[], NDArray[np.float32]]:
        self.runs.append((room_for(positions), len(patients)))
        assert sum(map(positions_of, patients)) <= room_for(positions)
        return self._recommender.begun(patients, positions)


def alone(recommender: Recommender, patients: Sequence[EncodedPatient]) -> list[bytes]:
    return [recommender.probabilities([patient])[0].tobytes() for patient in patients]


def test_asked_together_or_apart_the_rows_are_each_ones_own(
    recommender: Recommender, patients: list[EncodedPatient]
) -> None:
    told: list[int] = []
    runs = Runs(32, 0.0, told.append)

    async def ask() -> list[NDArray[np.float32]]:
        first = runs.probabilities(recommender, patients[:5])
        others = [runs.probabilities(recommender, [patient]) for patient in patients[5:]]
        asked = await asyncio.gather(first, *others)
        assert runs.waiting == 0
        return [row for rows, _ in asked for row in rows]

    rows = asyncio.run(ask())
    assert [row.tobytes() for row in rows] == alone(recommender, patients)
    assert sum(told) == len(patients)
    assert len({patient.num_visits for patient in patients}) > 5
    # As many together as there is room for, whatever their lengths.
    assert len(told) <= sum(map(positions_of, patients)) // RUN_POSITIONS + 1


def test_a_run_has_at_most_so_many(
    recommender: Recommender, patients: list[EncodedPatient]
) -> None:
    told: list[int] = []

    async def ask() -> tuple[list[NDArray[np.float32]], int]:
        return await Runs(2, 0.0, told.append).probabilities(recommender, patients)

    rows, first_run = asyncio.run(ask())
    assert [row.tobytes() for row in rows] == alone(recommender, patients)
    assert max(told) == 2
    assert first_run == 2


def many_positions(patient: EncodedPatient, number: int) -> EncodedPatient:
    """The patient with its first visit again and again, of so many positions or a few more."""
    repeated = -(-number // positions_of(patient))
    known = tuple(lists[:1] * (repeated * patient.num_visits) for lists in patient.known)
    count = repeated * patient.num_visits
    return patient._replace(known=known, laboratory=((),) * count)


def test_a_run_has_no_more_than_its_room(
    recommender: Recommender, patients: list[EncodedPatient]
) -> None:
    large = many_positions(patients[1], RUN_POSITIONS // 3)
    assert RUN_POSITIONS // 4 < positions_of(large) <= RUN_POSITIONS // 2
    mixed = [patients[0], large, patients[1], large, large, large, patients[2], large]
    noting = Told(recommender)

    async def ask() -> list[NDArray[np.float32]]:
        runs = Runs(32, 0.0)
        asked = [runs.probabilities(noting, [one]) for one in mixed]  # type: ignore[arg-type]
        return [rows[0] for rows, _ in await asyncio.gather(*asked)]

    rows = asyncio.run(ask())
    assert [row.tobytes() for row in rows] == alone(recommender, mixed)
    assert len(noting.runs) > 1


def test_the_fullest_line_goes_first_and_no_other_waits_for_ever(
    recommender: Recommender, patients: list[EncodedPatient]
) -> None:
    noting = Told(recommender)
    lone = many_positions(patients[0], 2 * RUN_POSITIONS + 1)  # half of a run's room of that size
    crowd = patients[1]

    async def ask() -> None:
        runs = Runs(4, 0.0)
        asked = [runs.probabilities(noting, [lone])]  # type: ignore[arg-type]
        asked += [runs.probabilities(noting, [crowd]) for _ in range(40)]  # type: ignore[arg-type]
        await asyncio.gather(*asked)

    asyncio.run(ask())
    few, many = room_for(positions_of(lone)), RUN_POSITIONS
    assert [room for room, _ in noting.runs][:3] == [many, few, many]
    assert sum(number for _, number in noting.runs) == 41


class Recounted(Runs):
    """Counts who waits anew whenever a line is asked how full it is."""

    compared = 0

    def _fullness(self, key: tuple[Recommender, int]) -> float:
        waiting = [
            place.positions for places in self._lines[key].places.values() for place in places
        ]
        plain = min(1.0, max(sum(waiting) / key[1], len(waiting) / self._max_patients))
        assert super()._fullness(key) == plain
        self.compared += len(self._lines) > 1
        return plain


def test_a_line_is_as_full_as_those_who_wait_in_it(
    recommender: Recommender, served: Bundle, patients: list[EncodedPatient]
) -> None:
    """Of two versions and three rooms, while some go away and others come."""
    rng = np.random.default_rng(4711)
    one = patients[0]
    kinds = [one, patients[5], *(many_positions(one, n * RUN_POSITIONS) for n in (1, 2))]
    assert len({room_for(positions_of(kind)) for kind in kinds}) == 3

    class Zeros(Told):
        def begun(
            self, patients: Sequence[EncodedPatient], _positions: int
        ) -> Callable[[], NDArray[np.float32]]:
            return lambda: np.zeros((len(patients), 1), np.float32)

    async def ask() -> None:
        runs = Recounted(8, 0.0)
        versions = [Zeros(recommender), Zeros(Recommender(served, 2))]
        tasks = []
        for _ in range(60):
            chosen = [kinds[i] for i in rng.choice(4, rng.integers(1, 40), p=(0.4, 0.4, 0.1, 0.1))]
            version: Any = versions[rng.integers(2)]
            tasks.append(asyncio.create_task(runs.probabilities(version, chosen)))
            await asyncio.sleep(0)
            if rng.random() < 0.2:
                tasks[rng.integers(len(tasks))].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        gone = [isinstance(result, asyncio.CancelledError) for result in results]
        assert 0 < sum(gone) < 30
        assert not [r for r in results if isinstance(r, Exception)]
        assert (runs.waiting, runs._lines) == (0, {})
        assert runs.compared > 50

    asyncio.run(ask())


@pytest.mark.parametrize("in_thread", [False, True])
def test_who_asks_about_one_does_not_wait_behind_many(
    recommender: Recommender,
    patients: list[EncodedPatient],
    monkeypatch: pytest.MonkeyPatch,
    in_thread: bool,
) -> None:
    if in_thread:
        monkeypatch.setattr("serve.runs._MAX_INLINE_POSITIONS", 0)
        monkeypatch.setattr("serve.runs._MAX_INLINE_UNTRACED", 0)
    told = Told(recommender)
    runs = Runs(4, 0.0)
    done: list[int] = []

    async def ask(patients: Sequence[EncodedPatient]) -> None:
        await runs.probabilities(told, patients)  # type: ignore[arg-type]
        done.append(len(told.runs))

    async def all_ask() -> None:
        await asyncio.gather(ask(patients[:1] * 21), ask(patients[:1]), ask(patients[:1]))

    asyncio.run(all_ask())
    assert [size for _, size in told.runs] == [4, 4, 4, 4, 4, 3]
    # Runs begun when each was answered: those with one patient first, and while the next one works.
    assert done == ([2, 2, 6] if in_thread else [1, 1, 6])


def test_who_has_gone_is_left_out(recommender: Recommender, patients: list[EncodedPatient]) -> None:
    noting = Told(recommender)

    async def ask() -> None:
        runs = Runs(32, 0.0)
        gone = asyncio.create_task(runs.probabilities(noting, [patients[0]] * 3))  # type: ignore[arg-type]
        stays = asyncio.create_task(runs.probabilities(noting, [patients[0]]))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        gone.cancel()
        await stays
        assert runs.waiting == 0

    asyncio.run(ask())
    assert [number for _, number in noting.runs] == [1]


def test_a_failed_run_fails_those_who_asked_and_no_other(
    recommender: Recommender, patients: list[EncodedPatient], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Told(recommender)
    monkeypatch.setattr(broken, "begun", lambda *_: 1 / 0)

    async def ask() -> None:
        runs = Runs(32, 0.0)
        fails = runs.probabilities(broken, patients[:4])  # type: ignore[arg-type]
        works = runs.probabilities(recommender, patients[:4])
        results = await asyncio.gather(fails, works, return_exceptions=True)
        assert isinstance(results[0], ZeroDivisionError)
        assert not isinstance(results[1], BaseException)
        # And the next is answered.
        await runs.probabilities(recommender, patients[:1])

    asyncio.run(ask())


@pytest.mark.parametrize("where", ["_on_run", "_next", "_take"])
def test_a_failure_beside_the_model_fails_all_who_wait_and_not_who_asks_next(
    recommender: Recommender,
    patients: list[EncodedPatient],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    async def ask() -> None:
        runs = Runs(2, 0.0)
        with monkeypatch.context() as patch:
            patch.setattr(runs, where, lambda *_: 1 / 0)
            # More than one run takes.
            asked = [runs.probabilities(recommender, patients[i : i + 3]) for i in (0, 3, 6)]
            both = asyncio.gather(*asked, return_exceptions=True)
            for result in await asyncio.wait_for(both, 10):
                assert isinstance(result, ZeroDivisionError)
        assert runs.waiting == 0
        rows, _ = await asyncio.wait_for(runs.probabilities(recommender, patients[:3]), 10)
        assert [row.tobytes() for row in rows] == alone(recommender, patients[:3])

    asyncio.run(ask())
