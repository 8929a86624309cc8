"""The heap that both simulators keep time by, who may start when, and which form of a loop is taken."""

import heapq

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.cluster.fabric import kernels
from anabranch.cluster.fabric.kernels import Chain, fitting, go_on, in_lists, pop, push, scratch


@given(st.lists(st.one_of(st.none(), st.integers(0, 5)), max_size=60))
def test_the_heap_gives_what_heapq_gives(steps):
    """None takes the first out; equal keys come in the order in which they were put in."""
    heap, count, naive = ([0] * 60, [0] * 60, [0] * 60), 0, []
    for order, key in enumerate(steps):
        if key is not None:
            count = push(heap, count, key, order, 100 + order)
            heapq.heappush(naive, (key, order, 100 + order))
        elif naive:
            assert (heap[0][0], heap[1][0], heap[2][0]) == heapq.heappop(naive)
            count = pop(heap, count)
        assert count == len(naive)


def made_chain(pending, begin, order_Q, last_O):
    ranks = len(pending)
    numbers = (np.array(column) for column in (pending, begin, order_Q, last_O))
    fresh = (np.full(ranks, -1), np.zeros(ranks, int), np.zeros(ranks, int))
    return Chain(None, *numbers, *fresh, np.zeros(len(order_Q), int))


def started(chain, rank):
    return chain.started[: go_on(chain, rank)].tolist()


def test_a_rank_enters_the_first_step_that_it_has_something_to_do_in():
    # Rank 0 sends pieces 0 and 1 in step 1, and receives one in step 0; rank 1 the other way round, and sends one in step 2.
    chain = made_chain([[1, 2, 0], [1, 2, 1]], [0, 0, 2, 2, 3, 3, 4], [0, 1, 2, 3], [False, True, True, True])
    assert started(chain, 0) == []
    assert started(chain, 1) == [2]
    assert chain.cur_R.tolist() == [0, 0]
    chain.pending[:, 0], chain.out_R[1] = 0, 0
    assert started(chain, 0) == [0, 1]
    # Again, and nothing starts twice.
    assert started(chain, 0) == []
    chain.pending[:, 1], chain.out_R[0] = 0, 0
    assert started(chain, 0) == []
    assert chain.cur_R[0] == 3
    assert started(chain, 1) == [3]
    assert started(chain, 0) == []


def test_a_window_waits_for_the_one_before():
    # Pieces 0, 1 and 2 of one step: two in the first window, one in the second.
    chain = made_chain([[3]], [0, 3], [0, 1, 2], [False, True, True])
    assert started(chain, 0) == [0, 1]
    chain.pending[0, 0], chain.out_R[0] = 2, 1
    assert started(chain, 0) == []
    chain.pending[0, 0], chain.out_R[0] = 1, 0
    assert started(chain, 0) == [2]
    chain.pending[0, 0], chain.out_R[0] = 0, 0
    assert started(chain, 0) == []


def test_little_work_is_not_compiled(monkeypatch):
    assert fitting(push, kernels.FEW) is push
    monkeypatch.setattr(kernels, "is_installed", lambda name: False)
    assert fitting(push, 1e18) is push


def test_much_work_is_compiled_where_numba_is(monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setattr(kernels, "_compiled", lambda loop: "compiled")
    assert fitting(push, kernels.FEW + 1) == "compiled"


def test_arrays_become_lists_and_keep_their_names():
    room = in_lists(scratch(2, 3))
    assert (room.used_L, room.member, room.heap[1]) == ([0.0, 0.0], [0, 0, 0], [0, 0, 0])
    square = np.zeros((2, 2))
    assert in_lists((square, 5, np.array([1]))) == (square, 5, [1])
