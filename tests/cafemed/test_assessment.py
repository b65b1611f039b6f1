import pytest

from cafemed import assessment


@pytest.mark.parametrize(
    ("source", "protocol", "folder", "expected"),
    [
        ("synthetic", "clean", "truth", True),
        ("synthetic", "published", "truth", False),  # visits are not in time order
        ("mimic3", "clean", "truth", False),
        ("synthetic", "clean", "elsewhere", False),
    ],
)
def test_a_ceiling_needs_a_known_truth_and_visits_in_order(
    source, protocol, folder, expected, tmp_path
):
    (tmp_path / "truth").mkdir()
    made_from = {"source": source, "protocol": protocol}
    assert assessment.has_ceiling(made_from, tmp_path / folder) is expected
