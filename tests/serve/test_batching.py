import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import sparse

from cafemed.batches import Batch, collate, input_adjacencies, visit_arrays
from cafemed.bundle import Bundle
from cafemed.codes import KINDS, CodeLists
from cafemed.errors import ArtifactError
from cafemed.graphs import CAUSE, EFFECT, MIDDLE, ORPHAN, node_classes
from cafemed.scaling import Scaling
from models.asked import Codes
from models.blocks import BLOCK
from models.packing import pack
from serve.batching import (
    RUN_POSITIONS,
    Edges,
    batch_of,
    codes_of,
    lay,
    positions_of,
    room_for,
    runs_of,
)
from serve.encoding import EncodedPatient

SIZES = (13, 6, 12)
_NONE = np.empty((0, 2), np.int64)


def patient(sizes: list[tuple[int, int, int]]) -> EncodedPatient:
    known = tuple(tuple(tuple(range(size[k])) for size in sizes) for k in range(3))
    return EncodedPatient(
        known=known, taken=(), sex=0, age=50.0, laboratory=((),) * len(sizes), unknown=()
    )


def drawn(seed: int) -> list[EncodedPatient]:
    """Patients of few and of many visits and codes, some with none."""
    rng = np.random.default_rng(seed)
    return [
        patient(
            [
                tuple(rng.integers(0, np.minimum(int(rng.choice([1, 4, 13])), SIZES) + 1).tolist())
                for _ in range(rng.integers(1, int(rng.choice([2, 4, 40]))))
            ]
        )
        for _ in range(rng.integers(1, 40))
    ]


def edges_of(bundle: Bundle) -> Edges:
    return Edges.of(input_adjacencies(bundle.graph, bundle.vocabularies))


def adjacency(size: int, pairs: NDArray[np.integer]) -> sparse.csr_array:
    """Of the edges pairs[:, 0] → pairs[:, 1]."""
    return sparse.csr_array((np.ones(len(pairs), np.float32), pairs.T), shape=(size, size))


def made(
    bundle: Bundle, patients: Sequence[EncodedPatient], room: int | None = None
) -> tuple[Batch, Codes]:
    visits = lay(patients, edges_of(bundle), Scaling())
    codes = codes_of(visits, SIZES, room)
    return batch_of(visits, codes, SIZES, 0), codes


def tensors_of(value: Any) -> list[torch.Tensor]:
    """All tensors of dataclasses within each other."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [one for field in vars(value).values() if field is not None for one in tensors_of(field)]


def extents(run: tuple[Batch, Codes]) -> tuple[int, ...]:
    """Rows of everything that is multiplied or that a function of each element is taken of."""
    found = run[1].packed(True, True)
    assert found.asked is not None
    numbers = (found.num_visits, found.num_positions, len(found.ids), len(found.asked.visits))
    return (*numbers, *found.steps.sizes)


def test_everything_comes_in_whole_blocks(served: Bundle) -> None:
    for seed in range(60):
        numbers = extents(made(served, drawn(seed)))
        assert all(number % BLOCK == 0 for number in numbers), numbers


def test_what_fills_up_is_less_than_two_blocks_and_comes_last(served: Bundle) -> None:
    for seed in range(20):
        patients = drawn(seed)
        batch, codes = made(served, patients)
        found = codes.packed(True, True)
        own = sum(one.num_visits for one in patients)
        positions = sum(map(positions_of, patients))
        assert 0 < found.num_visits - own <= BLOCK
        assert not batch.counts[own:].any()
        assert (batch.lengths[len(patients) :] == 1).all()
        assert found.lengths[:own].tolist() == batch.counts[:own].amax(1).clamp(min=1).tolist()
        assert found.num_positions - positions <= 2 * BLOCK
        assert 0 < len(found.ids) - len(codes.ids) <= BLOCK
        assert (found.visit[len(codes.ids) :] == found.num_visits - 1).all()
        assert (found.cell[len(codes.ids) :] >= 3 * positions).all()
        assert (found.cell < 3 * found.num_positions).all()


def test_what_is_asked_about_are_the_last_visits_with_their_codes(served: Bundle) -> None:
    patients = drawn(3)
    found = made(served, patients)[1].packed(True, True)
    assert found.asked is not None
    first = np.array([0, 13, 19])
    for kinds, rows in ((3, found.asked.codes), (2, found.asked.known)):
        ends = [*rows.starts[1:].tolist(), len(rows.index)]
        for p, one in enumerate(patients):
            last = [first[k] + i for k in range(kinds) for i in one.known[k][-1]]
            assert rows.index[rows.starts[p] : ends[p]].tolist() == last
    assert found.asked.visits[0] == patients[0].num_visits - 1
    assert (found.asked.visits[len(patients) :] == found.num_visits - 1).all()


@pytest.mark.parametrize("slot", [False, True])
@pytest.mark.parametrize("room", [None, 8192])
def test_a_recording_packs_any_other_codes_as_without(
    served: Bundle, room: int | None, slot: bool
) -> None:
    def pack_tensors(*given: torch.Tensor) -> list[torch.Tensor]:
        return tensors_of(Codes(*given).packed(slot, True))

    drawings = [tensors_of(made(served, drawn(seed), room)[1]) for seed in range(10)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it takes for constants: compared here
        recorded = torch.jit.trace(pack_tensors, tuple(drawings[0]), check_trace=False)
    for given in drawings:
        pairs = zip(recorded(*given), pack_tensors(*given), strict=True)
        assert all(torch.equal(mine, other) for mine, other in pairs)


def test_a_code_outside_its_vocabulary_is_refused(served: Bundle) -> None:
    """It would be another one's of the one table."""
    visits = lay([patient([(13, 6, 12)])], edges_of(served), Scaling())
    with pytest.raises(
        ArtifactError, match=r"^procedure codes of a batch: .* in 0 \.\. 4.* got 5$"
    ):
        codes_of(visits, (13, 5, 12))


def test_with_a_room_all_runs_are_of_one_size(served: Bundle) -> None:
    sizes = set()
    for seed in range(20):
        patients = [one for one in drawn(seed) if positions_of(one) <= 40][:10]
        if patients:
            sizes.add(extents(made(served, patients, 512))[:4])
    assert len(sizes) == 1
    # The most visits, the most codes, and the most of both that there is room for.
    without = Edges.of([adjacency(13, _NONE)] * 3)
    for patients in ([patient([(0, 0, 0)] * 512)], [patient([(13, 13, 13)] * 39)]):
        found = codes_of(lay(patients, without, Scaling()), (13,) * 3, 512).packed(True, True)
        assert found.asked is not None
        numbers = (found.num_visits, found.num_positions, len(found.ids), len(found.asked.visits))
        assert {numbers} == sizes


def test_positions_are_the_longest_list_of_each_visit_and_at_least_one() -> None:
    assert positions_of(patient([(0, 0, 0), (5, 2, 0), (1, 1, 7)])) == 13


def test_patients_share_runs_up_to_their_room_and_long_ones_have_another() -> None:
    assert room_for(1) == room_for(RUN_POSITIONS) == RUN_POSITIONS
    assert room_for(RUN_POSITIONS + 1) == 2 * RUN_POSITIONS
    assert room_for(128 * 256) == 128 * 256
    half = RUN_POSITIONS // 2
    positions = [half, 3 * RUN_POSITIONS, half, 10, half, 3 * RUN_POSITIONS, 4]
    assert runs_of(positions) == [[0, 2], [3, 4, 6], [1], [5]]
    rng = np.random.default_rng(0)
    positions = rng.integers(1, RUN_POSITIONS, 300).tolist()
    runs = runs_of(positions)
    assert sorted(i for run in runs for i in run) == list(range(300))
    assert all(sum(positions[i] for i in run) <= RUN_POSITIONS for run in runs)
    assert runs_of([10, 5000, 3, 4090], 4096) == [[0, 2], [3], [1]]


def measured(rows: list[tuple[tuple[int, float], ...]], age: float) -> EncodedPatient:
    plain = patient([(1, 1, 0)] * len(rows))
    return plain._replace(laboratory=tuple(rows), age=age)


def test_a_run_has_the_scaled_ages_and_laboratory_values_at_one_width(served: Bundle) -> None:
    scaling = Scaling(60.0, 10.0, (100.0, 7.0, 1.0, 0.0), (20.0, 0.5, 1.0, 1.0))
    patients = [
        measured([((1, 7.5), (0, 120.0)), ()], 70.0),
        measured([((2, -3.0),), ((0, 1e9), (1, 6.0), (2, 1.0))], math.nan),
    ]
    visits = lay(patients, edges_of(served), scaling)
    batch = batch_of(visits, codes_of(visits, SIZES), SIZES, 4)
    assert batch.laboratory_items.shape == (BLOCK, 4)
    expected = {0: {1: 1.0, 0: 1.0}, 1: {}, 2: {2: -4.0}, 3: {0: 10.0, 1: -2.0, 2: 0.0}}
    for row, values in expected.items():
        found = zip(batch.laboratory_items[row], batch.laboratory_values[row], strict=True)
        pairs = [(int(item), float(value)) for item, value in found][: len(values)]
        assert pairs == list(values.items())
        assert torch.isnan(batch.laboratory_values[row, len(values) :]).all()
    assert batch.laboratory_counts.tolist() == [2, 0, 1, 3] + [0] * (BLOCK - 4)
    assert batch.age[:2].tolist() == [1.0, 1.0]
    assert torch.isnan(batch.age[2:]).all()


@pytest.mark.parametrize(
    ("sizes", "density", "most"),
    [
        ((60, 40, 50), 0.05, 25),  # edges among the codes of most lists
        ((900, 0, 30), 0.01, 9),  # few, and a kind without a vocabulary
        ((5, 4, 3), 1.0, 5),  # every edge, from each code to itself too
        ((5, 4, 3), 0.0, 5),
        ((40_000, 3, 2), 0.0002, 300),  # codes that share a mark
    ],
)
def test_classes_are_those_of_the_graph_of_a_lists_codes_alone(
    sizes: tuple[int, int, int], density: float, most: int
) -> None:
    """Against the sparse products that training uses."""
    rng = np.random.default_rng(5)
    adjacencies = [
        adjacency(size, rng.integers(0, size, (round(density * size**2), 2)) if size else _NONE)
        for size in sizes
    ]
    if density == 1:
        adjacencies = [sparse.csr_array(np.ones((size, size), np.float32)) for size in sizes]
    lists = [
        [rng.permutation(size)[: rng.integers(0, most)].tolist() for size in sizes]
        for _ in range(40)
    ]
    counts = np.array([[len(ids) for ids in visit] for visit in lists])
    ids = np.array([i for visit in lists for ids in visit for i in ids], np.int64)
    mine = Edges.of(adjacencies).classes(counts, ids)
    of_kinds = [
        iter(node_classes(CodeLists.of([visit[k] for visit in lists]), adjacencies[k]).tolist())
        for k in range(3)
    ]
    expected = [
        next(of_kinds[k]) for visit in lists for k, codes in enumerate(visit) for _ in codes
    ]
    assert mine.dtype == np.int64
    assert mine.tolist() == expected
    if 0 < density < 1:
        assert set(expected) == {CAUSE, ORPHAN, MIDDLE, EFFECT}


def test_visits_without_codes_have_no_classes() -> None:
    edges = Edges.of([adjacency(4, np.array([[0, 1], [1, 1]]))] * 3)
    assert edges.classes(np.zeros((2, 3), np.int64), np.empty(0, np.int64)).shape == (0,)


@pytest.mark.parametrize("room", [None, 512])
def test_a_run_is_what_training_would_be_given(served: Bundle, room: int | None) -> None:
    """What fills it up apart, all is as cafemed.batches makes it of the same visits."""
    vocabularies = served.vocabularies
    rng = np.random.default_rng(2)
    patients = []
    for i in range(5):
        known = tuple(
            tuple(
                tuple(rng.permutation(len(vocabularies[kind]))[: rng.integers(0, 5)].tolist())
                for _ in range(i + 1)
            )
            for kind in KINDS
        )
        laboratory = ((),) * (i + 1)
        patients.append(EncodedPatient(known, (), i % 3, 60.0 + i, laboratory, unknown=()))
    visits = lay(patients, edges_of(served), served.preprocessing.scaling)
    codes = codes_of(visits, SIZES, room)
    batch = batch_of(visits, codes, SIZES, 0)
    diagnoses, procedures, medications = (
        CodeLists.of([ids for one in patients for ids in one.known[k]]) for k in range(3)
    )
    lengths = [one.num_visits for one in patients]
    arrays = visit_arrays(
        (diagnoses, procedures, medications),
        None,
        np.concatenate([[0], np.cumsum(lengths)]),
        served.graph,
        vocabularies,
        np.array([one.sex for one in patients], np.int8),
        np.repeat(np.array([one.age for one in patients], np.float32), lengths),
        served.preprocessing.scaling,
    )
    training = collate(arrays, np.arange(5))
    number = training.num_visits
    for name in ("counts", "age", "slots"):
        assert torch.equal(getattr(batch, name)[:number], getattr(training, name))
    for name in ("lengths", "sex"):
        assert torch.equal(getattr(batch, name)[:5], getattr(training, name))
    expected = pack(training, SIZES, window=True)
    mine = codes.packed(True, True)
    known_codes, positions = len(expected.ids), expected.num_positions
    for name in ("ids", "modality", "classes", "visit", "group", "cell"):
        assert torch.equal(getattr(mine, name)[:known_codes], getattr(expected, name))
    assert torch.equal(mine.position_visit[:positions], expected.position_visit)
    slots = len(expected.slot_cell)
    assert torch.equal(mine.slot_cell[:slots], expected.slot_cell)
    assert torch.equal(mine.slot_starts[: 3 * number], expected.slot_starts)
    assert mine.window is not None
    assert expected.window is not None
    neighbours = torch.where(
        expected.window.neighbour == positions, mine.num_positions, expected.window.neighbour
    )
    assert torch.equal(mine.window.neighbour[:positions], neighbours)
    # The recurrence meets the same visits before each visit.
    for t in range(1, 5):
        begin, before = sum(mine.steps.sizes[:t]), sum(mine.steps.sizes[: t - 1])
        alive = sum(length > t for length in lengths)
        rows = mine.steps.order[begin : begin + alive]
        assert torch.equal(mine.steps.order[before : before + alive], rows - 1)
        assert torch.equal(mine.steps.place[rows], torch.arange(begin, begin + alive))
