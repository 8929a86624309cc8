"""Streams equal a transcription of SplitMix64 with masks, look random, and do not depend on each other."""

import numba as nb
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.graph.random import below, low_unit, mix, next_bits, stream, to_unit

MASK = (1 << 64) - 1
GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
WORD = st.integers(0, MASK)


def plain_mix(value):
    value = ((value ^ (value >> 30)) * FIRST) & MASK
    value = ((value ^ (value >> 27)) * SECOND) & MASK
    return value ^ (value >> 31)


def plain_stream(seed, first=0, second=0):
    state = plain_mix((seed + GOLDEN) & MASK)
    state = plain_mix(state ^ ((first * GOLDEN + FIRST) & MASK))
    return plain_mix(state ^ ((second * GOLDEN + SECOND) & MASK))


def plain_bits(state, count):
    found = []
    for _ in range(count):
        state = (state + GOLDEN) & MASK
        found.append(plain_mix(state))
    return found


@nb.njit
def drawn(seed, first, second, count):
    state = stream(seed, first, second)
    found = np.empty(count, np.uint64)
    for place in range(count):
        state, found[place] = next_bits(state)
    return found


@nb.njit
def derived(bits_N, bound):
    found = np.empty((3, len(bits_N)))
    for place in range(len(bits_N)):
        found[0, place] = to_unit(bits_N[place])
        found[1, place] = low_unit(bits_N[place])
        found[2, place] = below(bits_N[place], bound)
    return found


def test_splitmix_of_the_published_code():
    # First outputs of splitmix64.c (Vigna) from the state 1234567.
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert plain_bits(1234567, 5) == published
    state, found = np.uint64(1234567), []
    for _ in range(5):
        state, bits = next_bits(np.uint64(state))
        found.append(int(bits))
    assert found == published


@given(WORD, WORD, WORD)
def test_streams_equal_the_transcription(seed, first, second):
    state = plain_stream(seed, first, second)
    assert int(stream(np.uint64(seed), np.uint64(first), np.uint64(second))) == state
    assert drawn(np.uint64(seed), np.uint64(first), np.uint64(second), 4).tolist() == plain_bits(state, 4)


@given(WORD)
def test_mix_equals_the_transcription(value):
    assert int(mix(np.uint64(value))) == plain_mix(value)


@pytest.mark.parametrize("key", [-1, -(2**63)])
def test_negative_keys_are_their_bits(key):
    assert drawn(np.int64(key), np.int64(key), np.int64(0), 2).tolist() == plain_bits(
        plain_stream(key & MASK, key & MASK), 2
    )


@given(st.lists(WORD, min_size=1, max_size=20), st.integers(1, 2**32 - 1))
def test_numbers_made_of_bits(words, bound):
    unit, low, whole = derived(np.array(words, np.uint64), bound)
    assert unit.tolist() == [(word >> 11) / 2**53 for word in words]
    assert low.tolist() == [(word & 0xFFFFFFFF) / 2**32 for word in words]
    assert whole.tolist() == [((word >> 32) * bound) >> 32 for word in words]
    assert (unit < 1).all()
    assert (low < 1).all()
    assert (whole < bound).all()


@pytest.mark.parametrize("part", ["upper", "lower", "below"])
def test_draws_are_uniform(part):
    bits = drawn(0, 1, 2, 200_000)
    unit, low, whole = derived(bits, 100)
    cells = {"upper": unit * 100, "lower": low * 100, "below": whole}[part].astype(int)
    count = np.bincount(cells, minlength=100)
    assert len(count) == 100
    # Chi-square of 99 degrees of freedom: 149 is exceeded once in a thousand seeds; the seed is fixed.
    assert ((count - 2000) ** 2 / 2000).sum() < 149


@pytest.mark.parametrize("vary", ["seed", "first", "second", "place"])
def test_streams_of_neighbouring_keys_are_independent(vary):
    count = 20_000
    keys = [{"seed": (k, 0, 0), "first": (0, k, 0), "second": (0, 0, k)}.get(vary, (0, 0, 0)) for k in (6, 7)]
    first = derived(drawn(*keys[0], count), 1)[0]
    second = derived(drawn(*keys[1], count), 1)[0] if vary != "place" else np.roll(first, 1)
    # The correlation of independent draws is normal with deviation 1 / sqrt(20,000) = 0.0071.
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 * 0.0071


def test_the_first_draw_of_many_streams_is_uniform_and_distinct():
    states = np.array([[plain_stream(0, node, walk) for walk in range(50)] for node in range(200)], np.uint64).ravel()
    assert len(np.unique(states)) == len(states)
    first = np.array([plain_bits(int(state), 1)[0] for state in states], np.uint64)
    count = np.bincount((derived(first, 1)[0] * 50).astype(int), minlength=50)
    assert ((count - 200) ** 2 / 200).sum() < 86  # 49 degrees of freedom, once in a thousand


def test_order_of_keys_matters():
    assert stream(0, 1, 2) != stream(0, 2, 1)
    assert stream(1, 0, 0) != stream(0, 1, 0)
