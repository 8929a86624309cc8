"""The one-pass simulator equals a cache simulated with a dictionary, one capacity at a time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import ConfigError, DataError
from anabranch.routing.cache_policy import hit_rates, simulate

POLICIES = ["lru", "lfu", "belady", "segment", "plec"]
LOOKING = ("segment", "plec")


def naive(tokens, num_destinations, policy, capacity, window=None, cold="free"):
    """(hits, accesses) of one cache: a dictionary from resident to nothing, priorities by definition.

    A token is a list of destinations, or a list of such lists, one of each layer that it meets.
    """
    layered = [xs if xs and isinstance(xs[0], list) else [xs] for xs in tokens]
    tokens = [[x for block in blocks for x in block] for blocks in layered]
    resident, seen, hits, accesses, serial = {}, set(), 0, 0, 0
    last, count = {}, dict.fromkeys(range(num_destinations), 0)
    order = [x for xs in tokens for x in xs]
    ahead = {x: sum(xs.count(x) for xs in tokens[: window or 0]) for x in range(num_destinations)}

    def next_access(x, now):
        later = [at for at, other in enumerate(order) if other == x and at > now]
        return later[0] if later else len(order) + x

    def worth(y, token, now):
        if policy == "plec":
            known = sum(map(len, tokens[: token + window]))
            later = next_access(y, now)
            return (1, -later) if later < known else (0, last[y])
        return (ahead[y], last[y]) if policy == "segment" else priority[y]

    priority = {}
    for token, blocks in enumerate(layered):
        before, touched, named = set(resident), len(seen), set()
        for block in blocks:
            here = set(resident)
            for x in block:
                accesses += 1
                hits += x in (here if x in named else before)
                if x not in seen:
                    hits += cold == "free" and touched < capacity
                    touched += 1
                    seen.add(x)
            for x in block:
                if x not in resident and len(resident) == capacity:
                    victim = min(resident, key=lambda y: worth(y, token, serial))
                    del resident[victim]
                resident[x] = None
                ahead[x] -= 1
                count[x] += 1
                last[x] = serial
                priority[x] = {
                    "lru": (serial,),
                    "lfu": (count[x], serial),
                    "belady": (-next_access(x, serial),),
                    "segment": (),
                    "plec": (),
                }[policy]
                serial += 1
            named.update(block)
        if window is not None and token + window < len(tokens):
            for x in tokens[token + window]:
                ahead[x] += 1
    return hits, accesses


def padded(sequences, top_k):
    length = max(map(len, sequences))
    index_STK = np.full((len(sequences), length, top_k), -1)
    for row, tokens in enumerate(sequences):
        for token, xs in enumerate(tokens):
            index_STK[row, token, : len(xs)] = xs
    return index_STK


@st.composite
def traces(draw, ragged=True):
    """(E, sequences): each token names up to K distinct destinations."""
    num_destinations = draw(st.integers(1, 7))
    top_k = draw(st.integers(1, min(3, num_destinations)))
    token = st.lists(st.integers(0, num_destinations - 1), min_size=0 if ragged else top_k, max_size=top_k, unique=True)
    sequences = draw(st.lists(st.lists(token, min_size=1, max_size=14), min_size=1, max_size=3))
    return num_destinations, top_k, sequences


@given(traces(), st.sampled_from(POLICIES), st.sampled_from(["free", "miss"]), st.integers(1, 6))
def test_one_pass_equals_every_capacity_by_itself(trace, policy, cold, window):
    num_destinations, top_k, sequences = trace
    window = window if policy in LOOKING else None
    found = simulate(padded(sequences, top_k), num_destinations, policy, window=window, cold=cold)
    for row, tokens in enumerate(sequences):
        for capacity in range(1, num_destinations + 1):
            hits, accesses = naive(tokens, num_destinations, policy, capacity, window, cold)
            assert found.hits_SC[row, capacity - 1] == hits
            assert found.accesses_S[row] == accesses


@st.composite
def layered_traces(draw):
    """(E, K of each layer, sequences): each layer of a token names up to K distinct destinations of one pool."""
    num_destinations = draw(st.integers(1, 6))
    sizes = draw(st.lists(st.integers(1, min(3, num_destinations)), min_size=2, max_size=4))
    layers = [st.lists(st.integers(0, num_destinations - 1), max_size=size, unique=True) for size in sizes]
    token = st.tuples(*layers).map(list)
    return num_destinations, sizes, draw(st.lists(st.lists(token, min_size=1, max_size=10), min_size=1, max_size=3))


@given(layered_traces(), st.sampled_from(POLICIES), st.sampled_from(["free", "miss"]), st.integers(1, 6))
def test_layers_may_name_what_earlier_ones_of_a_token_named(trace, policy, cold, window):
    num_destinations, sizes, sequences = trace
    window = window if policy in LOOKING else None
    of_layers = [[[token[layer] for token in tokens] for tokens in sequences] for layer in range(len(sizes))]
    index_STK = np.concatenate([padded(of, size) for of, size in zip(of_layers, sizes, strict=True)], -1)
    found = simulate(index_STK, num_destinations, policy, window=window, cold=cold, blocks=sizes)
    for row, tokens in enumerate(sequences):
        for capacity in range(1, num_destinations + 1):
            expected = naive(tokens, num_destinations, policy, capacity, window, cold)
            assert (found.hits_SC[row, capacity - 1], found.accesses_S[row]) == expected


def test_a_layer_may_not_name_one_twice_and_layers_have_all_choices():
    index_STK = np.array([[[0, 1, 1]]])
    assert simulate(index_STK, 2, "lru", blocks=[2, 1], cold="miss").hits_SC.tolist() == [[1, 1]]
    with pytest.raises(DataError, match="token 0 of sequence 0 names destination 1 twice"):
        simulate(index_STK, 2, "lru", blocks=[1, 2])
    with pytest.raises(ConfigError, match="blocks have 2 choices, the routes 3"):
        simulate(index_STK, 2, "lru", blocks=[1, 1])


@given(traces(ragged=False), st.integers(1, 6))
def test_rates_grow_with_capacity_up_to_all(trace, window):
    num_destinations, top_k, sequences = trace
    for policy in POLICIES:
        found = simulate(
            padded(sequences, top_k), num_destinations, policy, window=window if policy in LOOKING else None
        )
        assert (np.diff(found.hits_SC, axis=1) >= 0).all()
        assert (found.hits_SC[:, -1] == found.accesses_S).all()  # everything fits: cold accesses are free


@given(st.integers(1, 7), st.integers(0, 2**16), st.integers(1, 6))
def test_nothing_beats_belady_where_a_token_makes_one_access(num_destinations, seed, window):
    index_STK = np.random.default_rng(seed).integers(num_destinations, size=(3, 40, 1))
    best = simulate(index_STK, num_destinations, "belady").hits_SC
    for policy in ("lru", "lfu", "segment"):
        found = simulate(index_STK, num_destinations, policy, window=window if policy in LOOKING else None)
        assert (best >= found.hits_SC).all()


def test_with_several_accesses_a_token_belady_is_not_quite_the_best():
    """A token looks up all before any enters, so what it hits anyway may leave: with room for 2, SCH keeps 0, and Belady 5."""
    index_STK = np.array([[5, 0], [1, 5], [0, 2]])[None]
    assert simulate(index_STK, 6, "belady", cold="miss").hits_SC[0, 1] == 1
    assert simulate(index_STK, 6, "segment", window=2, cold="miss").hits_SC[0, 1] == 2


def test_a_case_worked_by_hand():
    # LRU, room for 2: 0 miss, 1 miss, 0 hit, 2 miss (1 leaves), 1 miss (0 leaves), 2 hit. Room for 3: all but the first three.
    index_STK = np.array([0, 1, 0, 2, 1, 2]).reshape(1, 6, 1)
    assert simulate(index_STK, 3, "lru", cold="miss").hits_SC.tolist() == [[0, 2, 3]]
    assert simulate(index_STK, 3, "lru", cold="free").hits_SC.tolist() == [[1, 4, 6]]
    # The next two tokens of 2, before 1 enters last, are 1 and 2: with a window of 3 the cache of 2 lets 0 go.
    assert simulate(index_STK, 3, "segment", window=3, cold="miss").hits_SC.tolist() == [[0, 3, 3]]
    assert simulate(index_STK, 3, "belady", cold="miss").hits_SC.tolist() == [[0, 3, 3]]
    assert simulate(index_STK, 3, "fixed").hits_SC.tolist() == [[2, 4, 6]]


def test_many_sequences_are_simulated_in_batches(monkeypatch):
    generator = np.random.default_rng(0)
    index_STK = np.argsort(generator.random((9, 20, 6)), -1)[..., :2]
    whole = simulate(index_STK, 6, "segment", window=4)
    monkeypatch.setattr("anabranch.routing.cache_policy.CELLS", 12)
    parts = simulate(index_STK, 6, "segment", window=4)
    assert np.array_equal(whole.hits_SC, parts.hits_SC)
    assert hit_rates(index_STK, 6)["lru"] == pytest.approx(simulate(index_STK, 6, "lru").rate_C)


@pytest.mark.slow
def test_long_sequences_take_wide_keys():
    """Priorities beyond 31 bits: 33,007 tokens of LFU need 16 bits of count and 16 of time. What is used most stays."""
    index_STK = np.array([0] * 33_000 + [1, 2] * 3 + [0]).reshape(1, -1, 1)
    # Room for 2: 1 and 2 take turns in what 0 leaves. Room for 3: each misses once.
    assert simulate(index_STK, 3, "lfu", cold="miss").hits_SC[0, 1:].tolist() == [33_000, 33_004]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: simulate(np.zeros((1, 3, 1), int), 2, "fifo"), ConfigError, "no cache policy 'fifo'; known: lru, lfu"),
        (
            lambda: simulate(np.zeros((1, 3, 1), int), 2, "segment"),
            ConfigError,
            "window is None; 'segment' and 'plec' need one",
        ),
        (lambda: simulate(np.zeros((1, 3, 1), int), 2, "lru", window=4), ConfigError, "no other policy has one"),
        (lambda: simulate(np.zeros((3, 1), int), 2, "lru"), DataError, r"\[sequences, tokens, choices\]"),
        (lambda: simulate(np.full((1, 3, 1), 2), 2, "lru"), DataError, "destinations 2 to 2; with 2 they are 0 to 1"),
        (lambda: simulate(np.array([[[0], [2]]]), 2, "lru"), DataError, "destinations 0 to 2; with 2 they are 0 to 1"),
        (
            lambda: simulate(np.array([[[0], [-2]]]), 2, "lru"),
            DataError,
            "destinations -2 to 0; with 2 they are 0 to 1",
        ),
        (
            lambda: simulate(np.array([[[0, 1], [1, 1]]]), 2, "lru"),
            DataError,
            "token 1 of sequence 0 names destination 1 twice",
        ),
    ],
)
def test_messages(make, error, message):
    with pytest.raises(error, match=message):
        make()


@given(traces(), st.sampled_from(["free", "miss"]))
def test_who_sees_all_to_come_does_as_belady(trace, cold):
    num_destinations, top_k, sequences = trace
    index_STK = padded(sequences, top_k)
    found = simulate(index_STK, num_destinations, "plec", window=index_STK.shape[1], cold=cold)
    assert np.array_equal(found.hits_SC, simulate(index_STK, num_destinations, "belady", cold=cold).hits_SC)


def test_what_is_foreseen_is_kept_and_what_is_not_goes_by_its_last_use():
    index_STK = np.array([[[0], [1], [2], [0], [1]]])
    # Of two slots: token 2 must drop 0 or 1. Seeing token 3 it keeps 0, without it keeps the later, 1.
    rates = [simulate(index_STK, 3, "plec", window=window, cold="miss").hits_SC[0].tolist() for window in (1, 2)]
    assert rates == [[0, 0, 2], [0, 1, 2]]
    assert hit_rates(index_STK, 3, ["plec", "lru"], "miss", window=2)["plec"].tolist() == [0, 0.2, 0.4]
