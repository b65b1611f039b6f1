import numpy as np

from serve.batching import fillers_of, shape_of
from serve.encoding import EncodedPatient


def patient(sizes: list[tuple[int, int, int]]) -> EncodedPatient:
    known = tuple(tuple(tuple(range(size[k])) for size in sizes) for k in range(3))
    return EncodedPatient(known=known, taken=(), sex=0, age=50.0, unknown=())


RANDOM = np.random.default_rng(0)
PATIENTS = [
    [(0, 0, 0)],
    [(128, 128, 128)],
    [(1, 0, 0)],
    [(128, 0, 0)] * 256,
    [(128, 128, 128)] * 256,
    [(0, 0, 0)] * 256,
    *[
        [tuple(RANDOM.integers(0, most, 3).tolist()) for _ in range(RANDOM.integers(1, 40))]
        for most in RANDOM.integers(1, 129, 300)
    ],
]


def test_fillers_complete_visits_codes_and_positions_of_the_shape() -> None:
    for sizes in PATIENTS:
        shape = shape_of(patient(sizes))
        fillers = fillers_of(patient(sizes), shape)
        whole = np.concatenate([np.array(sizes), fillers])
        assert len(whole) == shape.steps
        assert whole.sum() == 2 * shape.positions
        assert whole.max(1).clip(min=1).sum() == shape.positions
        assert fillers.min() >= 0
        assert fillers.max() <= shape.width


def test_usual_patients_share_few_shapes_without_much_filling() -> None:
    usual = [patient([(12, 4, 0)] + [(12, 4, 15)] * visits) for visits in (0, 1, 2, 5)]
    shapes = [shape_of(each) for each in usual]
    assert [(shape.visits, shape.positions) for shape in shapes] == [
        (2, 32),
        (2, 64),
        (4, 64),
        (8, 128),
    ]


def test_a_run_holds_fewer_patients_the_longer_they_are() -> None:
    assert shape_of(patient([(1, 1, 0)])).patients == 16
    assert shape_of(patient([(128, 128, 128)] * 256)).patients == 1
