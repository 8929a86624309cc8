"""Partition, negatives and schedule of GraphVite: who trains what when."""

import itertools
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import InputError
from anabranch.graph import Graph
from anabranch.graph.graphvite.partition import negative_tables, zig_zag
from anabranch.graph.graphvite.schedule import blocks_in_order, orthogonal_steps, run_blocks
from anabranch.graph.graphvite.train import negative_stream
from negatives import drawn

degrees = st.lists(st.integers(0, 50), min_size=1, max_size=60)


# Partition


def test_zig_zag_by_hand():
    # by falling degree: nodes 2 (9), 0 (7), 4 (5), 1 (3), 3 (1); parts 0, 1, then 1, 0, then 0
    found = zig_zag(np.array([7, 3, 9, 1, 5]), 2)
    assert found.part_N.tolist() == [1, 0, 0, 0, 1]
    assert found.start_P.tolist() == [0, 3, 5]
    assert found.node_N.tolist() == [2, 1, 3, 0, 4]
    assert found.local_N.tolist() == [0, 1, 0, 2, 1]
    assert found.row_N.tolist() == [3, 1, 0, 2, 4]


@given(degrees, st.integers(1, 9))
def test_parts_are_balanced_and_hold_every_node_once(degree, num_parts):
    degree_N = np.array(degree)
    num_parts = min(num_parts, len(degree_N))
    found = zig_zag(degree_N, num_parts)
    sums = np.bincount(found.part_N, degree_N, num_parts)
    sizes = np.bincount(found.part_N, minlength=num_parts)
    assert sums.max() - sums.min() <= degree_N.max()
    assert sizes.max() - sizes.min() <= 1
    assert np.array_equal(np.sort(found.node_N), np.arange(len(degree_N)))
    assert np.array_equal(found.node_N[found.row_N], np.arange(len(degree_N)))
    assert np.array_equal(found.row_N, found.start_P[found.part_N] + found.local_N)
    assert found.largest == sizes.max()


@pytest.mark.parametrize("num_parts", [0, 4, -1])
def test_more_parts_than_nodes_or_none_are_refused(num_parts):
    with pytest.raises(InputError, match=f"partitions is {num_parts}; a graph of 3 nodes has 1 to 3"):
        zig_zag(np.ones(3), num_parts)


# Negatives


def test_negatives_come_from_the_tail_part_by_degree():
    degree_N = np.array([40, 1, 17, 6, 0, 9, 3, 28, 2, 2])
    partition = zig_zag(degree_N, 3)
    tables = negative_tables(degree_N, partition)
    for part in range(3):
        rows = slice(partition.start_P[part], partition.start_P[part + 1])
        found = drawn((tables.keep_M[rows], tables.other_M[rows]), negative_stream(5, 2, part), 20_000)
        weight = degree_N[partition.node_N[rows]] ** 0.75
        assert found.min() >= 0
        assert found.max() < len(weight)
        count = np.bincount(found, minlength=len(weight))
        assert (count[weight == 0] == 0).all()
        expected = 20_000 * weight[weight > 0] / weight.sum()
        statistic = ((count[weight > 0] - expected) ** 2 / expected).sum()
        assert statistic < 18.5  # chi-square of at most 3 degrees of freedom: p = 3e-4; the seed is fixed


def test_negatives_of_a_part_without_edges_are_even():
    partition = zig_zag(np.array([5, 0]), 2)
    tables = negative_tables(np.array([5, 0]), partition)
    assert tables.keep_M.tolist() == [1, 1]


# Schedule


def test_schedule_of_two_workers_by_hand():
    # P = 4, G = 2: x, y in (0, 2), offsets 0 and 1
    assert orthogonal_steps(4, 2) == [
        [(0, 0), (1, 1)],
        [(1, 0), (0, 1)],
        [(0, 2), (1, 3)],
        [(1, 2), (0, 3)],
        [(2, 0), (3, 1)],
        [(3, 0), (2, 1)],
        [(2, 2), (3, 3)],
        [(3, 2), (2, 3)],
    ]


@pytest.mark.parametrize(("num_parts", "group"), [(1, 1), (4, 1), (4, 2), (4, 4), (6, 3), (16, 16), (16, 4)])
def test_schedule_has_every_block_once_and_every_step_is_orthogonal(num_parts, group):
    steps = orthogonal_steps(num_parts, group)
    assert sorted(itertools.chain(*steps)) == list(itertools.product(range(num_parts), range(num_parts)))
    for step in steps:
        heads, tails = zip(*step, strict=True)
        assert len(set(heads)) == len(set(tails)) == len(step) == group
    tails_of_worker = [[tail for _, tail in step] for step in steps]
    for first in range(0, len(steps), group):  # the tail part stays with its worker through the offsets
        assert all(tails == tails_of_worker[first] for tails in tails_of_worker[first : first + group])


@pytest.mark.parametrize("group", [0, 3, 5, -1])
def test_group_must_divide(group):
    with pytest.raises(InputError, match=f"group is {group}; it must divide the number of parts, 4"):
        orthogonal_steps(4, group)


def test_blocks_know_who_comes_before():
    blocks = blocks_in_order(4, 4)
    for place, block in enumerate(blocks):
        before = [other for other in range(place) if blocks[other].head == block.head][-1:]
        before += [other for other in range(place) if blocks[other].tail == block.tail][-1:]
        assert block.after == tuple(sorted(set(before)))


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_blocks_that_run_at_once_share_nothing_and_keep_their_order(workers):
    blocks = blocks_in_order(4, 4)
    lock, running, order = threading.Lock(), set(), []

    def work(worker, place):
        block = blocks[place]
        with lock:
            assert worker == (block.tail % workers if workers > 1 else 0)
            assert all(blocks[other].head != block.head and blocks[other].tail != block.tail for other in running)
            running.add(place)
        threading.Event().wait(0.001)
        with lock:
            running.remove(place)
            order.append(place)

    run_blocks(blocks, workers, work)
    assert sorted(order) == list(range(16))
    when = {place: at for at, place in enumerate(order)}
    for place, block in enumerate(blocks):
        assert all(when[before] < when[place] for before in block.after)


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_of_a_worker_ends_all_and_is_raised(workers):
    def work(worker, place):
        if place == 5:
            raise RuntimeError("block 5")

    with pytest.raises(RuntimeError, match="block 5"):
        run_blocks(blocks_in_order(4, 4), workers, work)


def test_directed_parts_use_edges_of_both_ways():
    from anabranch.graph.graphvite import GraphVite

    graph = Graph.from_edges([0, 1, 2], [3, 3, 3], directed=True)
    model = GraphVite(dim=4, epochs=1, partitions=2).fit(graph)
    assert model.is_trained_N.all()
