import numpy as np
import pytest

from cafemed import codes
from cafemed.codes import CodeLists

LISTS = [[3, 1], [], [2], [0, 1, 2]]


def plain(lists):
    return [lists[i].tolist() for i in range(len(lists))]


@pytest.mark.parametrize("written", ["401.9", " 4019", "4019 "])
def test_a_code_is_written_one_way(written):
    assert codes.normalise("ICD9", written) == "icd9:4019"


def test_node_names_hold_the_kind():
    assert codes.node_name("diagnosis", "icd9:4019") == "diagnosis/icd9:4019"


def test_lists_come_back_as_given():
    lists = CodeLists.of(LISTS)
    assert plain(lists) == LISTS
    assert lists.ids.dtype == np.int32
    assert lists.counts.tolist() == [2, 0, 1, 3]
    assert plain(CodeLists.of([])) == []


@pytest.mark.parametrize("visits", [[3, 0, 3], [1], [], [0, 1, 2, 3]])
def test_take_picks_lists(visits):
    taken = CodeLists.of(LISTS).take(np.array(visits, np.int64))
    assert plain(taken) == [LISTS[v] for v in visits]


def test_multi_hot_marks_presence():
    dense = CodeLists.of(LISTS).multi_hot(5)
    assert dense.dtype == np.bool_
    assert [np.flatnonzero(row).tolist() for row in dense] == [sorted(codes) for codes in LISTS]
