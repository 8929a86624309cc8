"""Names of one group of changes: each is looked up among those that changes before it bring."""

import numpy as np
import pytest

from anabranch.errors import InputError
from anabranch.graph.live.changes import Change
from anabranch.graph.live.group import Waiting
from anabranch.graph.live.naming import Naming, names_for
from anabranch.graph.names import GrowingNames, Names

ROWS = np.zeros((9, 2), np.float32)


def named(*names, deletes=False):
    return Waiting(Change(np.zeros(len(names), np.int64), None if deletes else ROWS[: len(names)], names), list(names))


def numbered(*ids, deletes=False):
    return Waiting(Change(np.array(ids), None if deletes else ROWS[: len(ids)]))


def said(naming, one):
    """Ids, names that it brings and the id of the first; it is made."""
    change = naming.resolved(one)
    naming.take(change)
    return change.ids.tolist(), change.names, change.first_named


def test_names_of_a_group_follow_each_other():
    naming = Naming(GrowingNames(Names(["x", "y"])), is_empty=False)
    assert said(naming, named("y", "new")) == ([1, 2], ("new",), 2)
    assert said(naming, named("new", "z")) == ([2, 3], ("z",), 3)
    assert said(naming, named("nobody", "z", deletes=True)) == ([3], (), 0)
    assert said(naming, numbered(3)) == ([3], (), 0)
    with pytest.raises(InputError, match=r"ids\[1\] is 4; elements of this index have names"):
        naming.resolved(numbered(3, 4))
    assert said(naming, numbered(4, deletes=True)) == ([4], (), 0)
    # Nothing of it is done.
    assert naming.names.array.tolist() == ["x", "y"]


def test_the_first_change_of_an_empty_index_says_for_those_behind_it():
    naming = Naming(None, is_empty=True)
    assert said(naming, named("nobody", deletes=True)) == ([], (), 0)
    assert naming.names is None
    assert said(naming, named(5, 6)) == ([0, 1], (5, 6), 0)
    assert said(naming, named(6, 7)) == ([1, 2], (7,), 2)
    assert naming.names.are_numbers
    with pytest.raises(InputError, match="elements are called by whole numbers here"):
        naming.resolved(named("text"))
    with pytest.raises(InputError, match=r"ids\[0\] is 3; elements of this index have names"):
        naming.resolved(numbered(3))
    other = Naming(None, is_empty=True)
    assert said(other, numbered(8)) == ([8], (), 0)
    with pytest.raises(InputError, match="have no names; give ids"):
        other.resolved(named("text"))


def test_a_change_that_is_not_taken_decides_nothing():
    naming = Naming(None, is_empty=True)
    naming.resolved(named("text"))
    assert said(naming, named(1)) == ([0], (1,), 0)


@pytest.mark.parametrize(
    ("first", "kind"),
    [
        (["a", 1], None),
        ([1], np.int64),
        ([-1], np.int64),
        ([2**63], np.uint64),
        ([1, 2**63], np.uint64),
        ([True], None),
        ([], None),
    ],
)
def test_the_first_names_say_of_which_kind_all_are(first, kind):
    names = GrowingNames.beginning(first)
    assert (names.array.dtype.type if names.are_numbers else None) == kind
    assert not names.is_open
    assert len(names) == 0


def test_names_that_are_open_take_the_kind_of_the_first():
    assert GrowingNames(Names([])).is_open
    assert not GrowingNames(Names(["a"])).is_open
    assert not GrowingNames(Names(np.empty(0, np.int64))).is_open
    assert names_for(GrowingNames(Names([])), [3], is_empty=True).are_numbers
    with pytest.raises(InputError, match="called by text"):
        names_for(GrowingNames(Names([])), [True], is_empty=True)
    held = GrowingNames(Names(["a"]))
    assert names_for(held, ["b"], is_empty=True) is held
