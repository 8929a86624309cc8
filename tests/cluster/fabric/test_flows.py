import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.cluster.fabric import ALGORITHMS, Flows, collective_flows, dispatch_matrix, moe_dispatch
from anabranch.cluster.fabric.flows import tree_parents
from anabranch.errors import CapacityError, InputError

EVERY = [(kind, algo) for kind, algorithms in ALGORITHMS.items() for algo in algorithms]


def test_a_ring_by_hand():
    # 3 ranks, 10 bytes: blocks of 4; two steps to reduce, two to gather.
    assert collective_flows("all-reduce", 3, 10, "ring").steps() == [[(0, 1, 4), (1, 2, 4), (2, 0, 4)]] * 4
    assert collective_flows("all-gather", 3, 10).num_steps == 2


def test_halving_and_doubling_by_hand():
    # 4 ranks, 8 bytes: half of it with the rank two away, a quarter with the neighbour; and back.
    far = [(0, 2, 4), (1, 3, 4), (2, 0, 4), (3, 1, 4)]
    near = [(0, 1, 2), (1, 0, 2), (2, 3, 2), (3, 2, 2)]
    assert collective_flows("all-reduce", 4, 8, "halving-doubling").steps() == [far, near, near, far]
    assert collective_flows("reduce-scatter", 4, 8, "halving").steps() == [far, near]
    assert collective_flows("all-gather", 4, 8, "doubling").steps() == [near, far]


def test_direct_by_hand():
    assert collective_flows("all-to-all", 3, 9).steps() == [
        [(0, 1, 3), (0, 2, 3), (1, 2, 3), (1, 0, 3), (2, 0, 3), (2, 1, 3)]
    ]


def test_a_tree_by_hand():
    # 8 ranks: 1 and 3 under 2, 5 and 7 under 6, 2 and 6 under 4, 4 under the root.
    assert tree_parents(8).tolist() == [-1, 2, 4, 2, 0, 6, 4, 6]
    # 7 above, 5 hangs where its parent is missing.
    assert tree_parents(6).tolist() == [-1, 2, 4, 2, 0, 4]


@pytest.mark.parametrize("ranks", [2, 4, 6, 12, 16])
def test_who_has_children_in_one_tree_has_none_in_the_other(ranks):
    steps = collective_flows("all-reduce", ranks, 1000, "double-binary-tree").steps()
    sent, taken = np.zeros(ranks, int), np.zeros(ranks, int)
    for flow in (flow for step in steps for flow in step):
        sent[flow[0]] += flow[2]
        taken[flow[1]] += flow[2]
    # Up once and down to at most two children in one tree, up once in the other: 4 x 500 at most.
    assert max(sent.max(), taken.max()) <= 2000
    assert sent.sum() == 2 * 1000 * (ranks - 1)


def reduced(flows, ranks):
    """What each rank has after an all-reduce where a message carries all that its sender has: the naive reading of steps."""
    held = [{rank} for rank in range(ranks)]
    for step in flows.steps():
        before = [set(one) for one in held]
        for src, dst, _ in step:
            held[dst] |= before[src]
    return held


@pytest.mark.parametrize("algo", ALGORITHMS["all-reduce"])
@pytest.mark.parametrize("ranks", [2, 8, 16])
def test_everybody_hears_of_everybody(algo, ranks):
    assert reduced(collective_flows("all-reduce", ranks, 999, algo), ranks) == [set(range(ranks))] * ranks


@pytest.mark.parametrize(("kind", "algo"), EVERY)
def test_every_algorithm_sends_what_it_must(kind, algo):
    ranks, size = 8, 8000
    flows = collective_flows(kind, ranks, size, algo, seed=3)
    sent_R = np.bincount(flows.src_F, flows.size_F, ranks)
    # Bandwidth-optimal ones send (R - 1) / R of the buffer for a half of an all-reduce, twice that for all of it.
    wanted = {"all-reduce": 14_000, "all-gather": 7000, "reduce-scatter": 7000, "all-to-all": 7000, "permutation": 8000}
    if algo != "double-binary-tree":
        assert (sent_R == wanted[kind]).all()
    assert (flows.src_F != flows.dst_F).all()
    assert np.bincount(flows.dst_F, flows.size_F, ranks).sum() == sent_R.sum()


def test_a_permutation_is_one_and_is_drawn_by_its_seed():
    first, again, other = (collective_flows("permutation", 50, 10, seed=seed) for seed in (0, 0, 1))
    assert sorted(first.dst_F.tolist()) == sorted(first.src_F.tolist()) == list(range(50))
    assert first.steps() == again.steps() != other.steps()


def test_ranks_are_placed_on_hosts():
    flows = collective_flows("all-to-all", 3, 9).placed([5, 0, 7])
    assert flows.steps()[0][:2] == [(5, 0, 3), (5, 7, 3)]
    for wrong in ([5, 0], [5, 0, 5]):
        with pytest.raises(InputError, match="3 ranks need as many hosts"):
            collective_flows("all-to-all", 3, 9).placed(wrong)


def test_a_dispatch_by_hand():
    # 4 items on 2 ranks (0, 0, 1, 1), 4 experts (0, 1 | 2, 3).
    index_NK = np.array([[0, 2], [3, 2], [1, -1], [2, 3]])
    assert dispatch_matrix(index_NK, 4, 2).tolist() == [[1, 3], [1, 2]]
    # The second item and the last have both of their experts on rank 1.
    assert dispatch_matrix(index_NK, 4, 2, once=True).tolist() == [[1, 2], [1, 1]]
    flows = moe_dispatch(np.array([[1, 3], [1, 2]]), 100, combine=True)
    assert flows.steps() == [[(0, 1, 300), (1, 0, 100)], [(1, 0, 300), (0, 1, 100)]]


@given(st.integers(0, 30), st.integers(1, 4), st.integers(1, 12), st.data())
def test_a_dispatch_counts_every_choice_once(items, choices, experts, data):
    ranks = data.draw(st.integers(1, experts))
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    index_NK = random.integers(-1, experts, (items, choices))
    found = dispatch_matrix(index_NK, experts, ranks)
    naive = np.zeros((ranks, ranks), int)
    for item, row in enumerate(index_NK.tolist()):
        for expert in row:
            if expert >= 0:
                naive[item * ranks // items, expert * ranks // experts] += 1
    assert found.tolist() == naive.tolist()
    assert (dispatch_matrix(index_NK, experts, ranks, once=True) <= found).all()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: collective_flows("all-reduse", 4, 1), "no collective 'all-reduse'"),
        (lambda: collective_flows("all-reduce", 4, 1, "direct"), "no 'direct' of all-reduce; known: ring"),
        (
            lambda: collective_flows("all-reduce", 6, 1, "halving-doubling"),
            "of 6 ranks; it needs a power of two, such as 4",
        ),
        (lambda: collective_flows("all-to-all", 1, 1), "ranks is 1"),
        (lambda: collective_flows("all-to-all", 4, 0), "bytes is 0"),
        (lambda: collective_flows("permutation", 4, 8, seed=-1), "seed is -1"),
        (lambda: collective_flows("all-to-all", 4, 1e9), "bytes is 1000000000.0"),
        (lambda: Flows.of([(0, 1, 0)]), "flow 0 is 0 bytes from host 0 to 1 in step 0; it must have 1 byte or more"),
        (
            lambda: Flows.of([(0, 1, 5), (2, 2, 5)]),
            "flow 1 is 5 bytes from host 2 to 2 in step 0; a host sends itself nothing",
        ),
        (lambda: Flows.of([(0, -1, 5)]), "hosts are counted from 0"),
        (lambda: Flows.of([(0, 1, 5, -1)]), "steps are counted from 0"),
        (lambda: Flows.of([(0, 1)]), "a flow is (source, destination, bytes)"),
        (lambda: Flows.of([(0, 1, 2.5)]), "size_F must be one row of whole numbers, not float64"),
        (lambda: Flows.of([(0, 2**40, 5)]), "dst_F has a number beyond"),
        (lambda: Flows.of([(0, 1, 2**50), (0, 2, 2**50)]), "at most 2^50 are planned"),
        (lambda: dispatch_matrix(np.array([[9]]), 4, 2), "has expert 9; there are experts 0 to 3"),
        (lambda: dispatch_matrix(np.array([[0]]), 4, 5), "ranks is 5; it must be a whole number from 1 to 4"),
        (lambda: dispatch_matrix(np.array([0.5]), 4, 2), "index_NK must be whole numbers [N, K]"),
        (lambda: moe_dispatch(np.zeros((2, 2), int), 4), "nothing to plan"),
        (lambda: moe_dispatch(np.zeros((2, 3), int), 4), "rows_RR must be whole numbers [R, R]"),
        (lambda: moe_dispatch(np.full((2, 2), 2**40), 2**40), "at most 2^50 bytes"),
    ],
)
def test_what_is_no_flow_is_told(make, said):
    with pytest.raises(InputError) as caught:
        make()
    assert said in str(caught.value)


def test_too_many_flows_are_refused_before_they_are_made():
    with pytest.raises(CapacityError, match="flows; at most 50,000,000 are planned"):
        collective_flows("all-to-all", 60_000, 2**30)


def test_no_flows():
    empty = Flows.of([])
    assert (len(empty), empty.num_steps, empty.num_ranks, empty.steps()) == (0, 0, 0, [])
