"""Sums whose bits do not depend on who adds."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.cluster.elastic.tree import TreeSum
from anabranch.errors import InputError


@given(st.integers(1, 40), st.integers(1, 5), st.randoms(use_true_random=False))
def test_the_sum_is_the_same_whoever_has_what(leaves, ranks, chance):
    values = [chance.uniform(-1e9, 1e9) * 10 ** chance.randint(-12, 6) for _ in range(leaves)]
    whole = TreeSum(leaves)
    for leaf, value in enumerate(values):
        whole.add(leaf, value)
    owner = [chance.randrange(ranks) for _ in range(leaves)]
    parts = [TreeSum(leaves) for _ in range(ranks)]
    order = list(range(leaves))
    chance.shuffle(order)
    for leaf in order:
        parts[owner[leaf]].add(leaf, values[leaf])
    total = TreeSum(leaves)
    for part in parts:
        for node, value in part.nodes():
            total.add_node(node, value)
    assert total.root() == whole.root()


def test_a_run_of_blocks_is_few_nodes():
    tree = TreeSum(64)
    for leaf in range(5, 60):
        tree.add(leaf, 1)
    assert len(list(tree.nodes())) <= 2 * 6
    assert sum(value for _, value in tree.nodes()) == 55


def test_the_tree_by_hand():
    added = []
    tree = TreeSum(5, lambda left, right: added.append((left, right)) or left + right)
    for leaf in random.Random(0).sample(range(5), 5):
        tree.add(leaf, "abcde"[leaf])
    assert tree.root() == "abcde"
    assert sorted(added) == [("a", "b"), ("ab", "cd"), ("abcd", "e"), ("c", "d")]


def test_what_is_missing_or_twice_is_told():
    tree = TreeSum(3)
    tree.add(0, 1.0)
    with pytest.raises(InputError, match="not whole"):
        tree.root()
    with pytest.raises(InputError, match="added before"):
        tree.add(0, 1.0)
    with pytest.raises(InputError, match="no node"):
        tree.add(3, 1.0)
    with pytest.raises(InputError, match="leaves is 0"):
        TreeSum(0)
