"""Choices by pool: what layers of one pool name is looked up in one cache, token by token."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.routing import TraceBuilder, TraceLayer, consistency
from anabranch.routing.pool_routes import pool_routes


def trace_of(layers, pools):
    """Of ``(index_NK, item_N, position_N)`` of each layer, over 5 destinations."""
    builder = TraceBuilder()
    for number, ((index_NK, item_N, position_N), pool) in enumerate(zip(layers, pools, strict=True)):
        layer = TraceLayer(layer=number, name=f"r{number}", num_destinations=5, top_k=index_NK.shape[1], pool=pool)
        builder.add(layer, index_NK, np.ones(index_NK.shape), item_N=item_N, position_N=position_N)
    return builder.trace()


def drawn(seed, top_k=1, sequences=2, tokens=6):
    draw = np.random.default_rng(seed)
    index_NK = draw.random((sequences * tokens, 5)).argsort(1)[:, :top_k]
    return index_NK, np.repeat(np.arange(sequences), tokens), np.tile(np.arange(tokens), sequences)


def naive_lru(layers, capacity):
    """Hits of one cache that a token meets layer by layer: looked up before the token, what an earlier layer has named before the layer."""
    hits = accesses = 0
    for item in np.unique(layers[0][1]):
        held = []
        for position in range(6):
            before, seen = held[:capacity], set()
            for index_NK, item_N, position_N in layers:
                for x in index_NK[(item_N == item) & (position_N == position), 0].tolist():
                    hits += x in (held[:capacity] if x in seen else before)
                    accesses += 1
                    held, seen = [x, *(y for y in held if y != x)], seen | {x}
    return hits / accesses


@given(seed=st.integers(0, 10**6), dropped=st.floats(0, 0.6))
def test_one_cache_of_a_pool_against_a_naive_one(seed, dropped):
    layers = [drawn(seed + number) for number in range(3)]
    kept_N = np.random.default_rng(seed).random(12) >= dropped
    kept_N[[0, 6]] = True
    # The second layer does not route every token.
    layers[1] = tuple(column[kept_N] for column in layers[1])
    trace = trace_of(layers, ["a", "a", "b"])
    found = consistency.hit_rates(pool_routes(trace), "lru", cold="miss")
    assert found.top_k == [2, 1]
    for capacity in range(2, 6):
        assert found.rates[0][capacity - 1] == pytest.approx(naive_lru(layers[:2], capacity))
        assert found.rates[1][capacity - 1] == pytest.approx(naive_lru(layers[2:], capacity))


def test_pools_of_one_layer_are_its_routes():
    trace = trace_of([drawn(0, 2), drawn(1, 2)], ["", ""])
    for alone, pooled in zip(consistency.routes(trace), pool_routes(trace), strict=True):
        assert pooled.blocks is None
        assert (pooled.layer, pooled.top_k, pooled.num_destinations) == (alone.layer, 2, 5)
        assert pooled.index_STK.tolist() == alone.index_STK.tolist()
        assert pooled.length_S.tolist() == alone.length_S.tolist()


def test_a_token_that_a_layer_routes_twice_is_two_tokens():
    index_NK, item_N, position_N = np.array([[0], [1], [2]]), np.zeros(3, int), np.array([0, 0, 1])
    trace = trace_of([(index_NK, item_N, position_N), (index_NK[1:], item_N[1:], position_N[1:])], ["a", "a"])
    (found,) = pool_routes(trace)
    assert found.index_STK.tolist() == [[[0, 1], [1, -1], [2, 2]]]
    assert next(pool_routes(trace, [1])).index_STK.tolist() == [[[1], [2]]]
