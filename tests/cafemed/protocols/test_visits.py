import numpy as np
import pyarrow as pa
import pytest

from cafemed.codes import CodeLists
from cafemed.protocols import visits


def test_identifiers_are_ranked_as_numbers_where_they_all_are():
    assert visits.rank_ids(pa.array(["10", "9", "100"])).tolist() == [1, 0, 2]
    assert visits.rank_ids(pa.array(["10", "9", "a"])).tolist() == [0, 1, 2]


def test_ages_are_years_at_admission():
    births = np.array(["2050-06-01", "2050-06-01", "1810-01-01", "NaT", "2101-01-01"], "M8[s]")
    admitted = np.array(["2100-06-01", "NaT", "2110-01-01", "2100-01-01", "2100-01-01"], "M8[s]")
    ages = visits.ages(births, admitted)
    # Unknown dates, and a birth after the admission, give no age; over 89 is written as 300.
    np.testing.assert_allclose(ages, [50, np.nan, 90, np.nan, np.nan], atol=0.01)


@pytest.mark.parametrize("seed", range(20))
def test_code_lists_equal_a_loop(seed):
    rng = np.random.default_rng(seed)
    size = int(rng.integers(0, 60))
    rows = visits.CodeRows(
        rng.integers(-1, 6, size),
        rng.integers(-1, 5, size),
        (rng.integers(0, 4, size), np.arange(size)),
        tuple("abcde"),
    )
    position = np.array([2, -1, 0, 1, -1, 3])
    expected = [[] for _ in range(4)]
    for i in sorted(range(size), key=lambda i: (rows.keys[0][i], i)):
        place = position[rows.visit[i]] if rows.visit[i] >= 0 else -1
        if place >= 0 and rows.code[i] >= 0 and rows.code[i] not in expected[place]:
            expected[place].append(int(rows.code[i]))
    lists = visits.code_lists(rows, position, 4)
    assert [lists[v].tolist() for v in range(4)] == expected


def test_remap_renames_and_removes():
    lists = CodeLists.of([[0, 1, 2], [], [1]])
    mapped = visits.remap(lists, np.array([5, -1, 3]))
    assert [mapped[v].tolist() for v in range(3)] == [[5, 3], [], []]
