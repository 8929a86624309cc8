"""Tables hold the weights they were made of, and draws follow them."""

import numba as nb
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import InputError
from anabranch.graph import Graph
from anabranch.graph.alias import build_alias, pick
from anabranch.graph.random import next_bits, stream


def shares(table, start, count):
    """What a table draws: each slot evenly, then itself or its other."""
    found = np.zeros(count)
    for slot in range(count):
        keep = float(table.keep_M[start + slot])
        found[slot] += keep / count
        found[table.other_M[start + slot]] += (1 - keep) / count
    return found


@nb.njit
def draws(seed, start, count, keep_M, other_M, total):
    state, found = stream(seed), np.zeros(count, np.int64)
    for _ in range(total):
        state, bits = next_bits(state)
        found[pick(bits, start, count, keep_M, other_M) - start] += 1
    return found


def test_by_hand():
    # Weights 1, 3: scaled by 2 / 4 they are 0.5, 1.5. Slot 0 keeps itself half the time and else gives 1; slot 1 keeps itself.
    table = build_alias(np.array([0, 2]), np.array([1, 3], np.float32))
    assert table.keep_M.tolist() == [0.5, 1.0]
    assert table.other_M.tolist() == [1, 1]
    assert table.nbytes == 16


WEIGHT = st.one_of(st.floats(2**-10, 2**10, width=32), st.sampled_from([1.0, 1e-20, 1e20, 3e38]))


@given(st.lists(st.lists(WEIGHT, max_size=12), min_size=1, max_size=6))
def test_tables_reproduce_weights(rows):
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    weight_M = np.array([weight for row in rows for weight in row], np.float32)
    table = build_alias(indptr, weight_M)
    assert table.keep_M.dtype == np.float32
    assert table.other_M.dtype == np.int32
    for row in range(len(rows)):
        part = weight_M[indptr[row] : indptr[row + 1]].astype(np.float64)
        if len(part):
            assert np.abs(shares(table, indptr[row], len(part)) - part / part.sum()).max() < 1e-6


def test_a_long_row_of_very_unequal_weights():
    weight = (np.arange(1, 20_001) ** 2.0).astype(np.float32)
    found = shares(build_alias(np.array([0, 20_000]), weight), 0, 20_000)
    assert np.abs(found / (weight.astype(float) / weight.sum(dtype=float)) - 1).max() < 1e-4
    assert np.abs(found - weight.astype(float) / weight.sum(dtype=float)).max() < 1e-6


@pytest.mark.parametrize("weights", [[1, 2, 3, 4], [1], [5, 5, 5], [1, 1000], [0, 1, 3]])
def test_draws_follow_the_weights(weights):
    table = build_alias(np.array([0, 3, 3 + len(weights)]), np.array([1, 1, 1, *weights], np.float32))
    found = draws(7, 3, len(weights), table.keep_M, table.other_M, 100_000)
    expected = 100_000 * np.array(weights) / sum(weights)
    assert found[expected == 0].sum() == 0
    kept = expected > 0
    # Chi-square: 16.3 is exceeded once in a thousand seeds with 3 degrees of freedom.
    assert ((found - expected)[kept] ** 2 / expected[kept]).sum() < 16.3


def test_table_of_a_graph_is_aligned_with_its_edges_and_made_once():
    graph = Graph.from_edges([0, 0, 1], [1, 2, 2], [1, 3, 2])
    table = graph.alias
    assert table is graph.alias
    # Node 0 has the neighbours 1 and 2 with weights 1 and 3.
    assert shares(table, graph.indptr[0], 2).tolist() == [0.25, 0.75]
    assert Graph.from_edges([0], [1]).alias is None


def test_rows_without_edges_and_no_rows():
    assert len(build_alias(np.array([0, 0, 0]), np.empty(0, np.float32)).keep_M) == 0
    assert len(build_alias(np.array([0]), np.empty(0, np.float32)).keep_M) == 0


@pytest.mark.parametrize("bad", [[-1, 2], [np.nan, 1], [0, 0], [np.inf, 1]])
def test_weights_that_cannot_be_drawn_by(bad):
    with pytest.raises(InputError, match="row 1 cannot be drawn from"):
        build_alias(np.array([0, 1, 3]), np.array([1, *bad], np.float32))


def test_graphs_with_negative_weights_have_no_table():
    graph = Graph.from_edges([0], [1], [-1.0], allow_negative=True)
    with pytest.raises(InputError, match="not negative"):
        _ = graph.alias
