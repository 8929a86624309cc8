"""What a server has loaded is left out of garbage collections; what a reload leaves behind is not."""

import gc
import weakref

import pytest

from anabranch.web import heap


class Node:
    """One that holds itself."""

    def __init__(self):
        self.me = self


@pytest.fixture(autouse=True)
def _frozen_as_before():
    yield
    gc.freeze()


def test_what_is_there_is_looked_through_no_more():
    kept = Node()
    heap.set_aside()
    assert gc.get_freeze_count() > 1000
    assert not any(one is kept for one in gc.get_objects())


def test_what_a_reload_leaves_behind_is_collected():
    left = Node()
    gone = weakref.ref(left)
    heap.set_aside()
    del left
    gc.collect()
    assert gone() is not None
    heap.set_aside()
    assert gone() is None
