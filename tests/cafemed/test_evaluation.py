import numpy as np
import pytest
import torch

from cafemed import evaluation
from cafemed.batches import collate


@pytest.fixture
def model(build_bag, small_inputs):
    return build_bag("bag", small_inputs, {"dropout": 0.9}, 1)


PATIENTS = np.array([5, 0, 17, 3, 39, 8, 21])


def test_rows_follow_the_patients_as_given(model, small_arrays):
    expected = []
    model.eval()
    for patient in PATIENTS:
        with torch.no_grad():
            logits = model(collate(small_arrays, np.array([patient])))
        expected.append(torch.sigmoid(logits[0]).numpy())
    for batch_size in (1, 2, 3, 100):
        got = evaluation.predict(model, small_arrays, PATIENTS, batch_size)
        assert got.dtype == np.float32
        # Sums in another order: the last float32 digits.
        np.testing.assert_allclose(got, np.concatenate(expected), rtol=0, atol=1e-6)


def test_targets_and_offsets_are_of_the_same_rows(small_arrays):
    offsets = evaluation.patient_offsets(small_arrays, PATIENTS)
    targets = evaluation.targets(small_arrays, PATIENTS)
    for i, patient in enumerate(PATIENTS):
        start, end = small_arrays.patient_offsets[patient : patient + 2]
        assert (targets[offsets[i] : offsets[i + 1]] == small_arrays.targets[start:end]).all()
    assert offsets[-1] == len(targets)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_is_put_back(model, small_arrays, training):
    model.train(training)
    first = evaluation.predict(model, small_arrays, PATIENTS)
    assert (first == evaluation.predict(model, small_arrays, PATIENTS)).all()
    assert model.training is training
