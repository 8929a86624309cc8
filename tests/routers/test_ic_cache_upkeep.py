"""Upkeep: the knapsack against brute force, decay to 1e-12, replay and its cap, room."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import InputError
from anabranch.routers.contract.query import Query
from anabranch.routers.embed.hashed import Hashed
from anabranch.routers.ic_cache.knapsack import knapsack
from anabranch.routers.ic_cache.pool import ExamplePool
from anabranch.routers.ic_cache.upkeep import HOUR_S, Manager, replay_gain
from anabranch.routers.retrieve import Exact

EMBEDDER = Hashed.Config(dim=32).build()


def make(rows=(), *, regenerate=None, rate=None, max_bytes=10_000, ttl_s=None, **fields):
    """A manager of a pool of (request, answer) rows."""
    config = ExamplePool.Config(domains=("",), trust={"large": 1}, max_bytes=max_bytes, ttl_s=ttl_s)
    pool = ExamplePool(config, Exact.Config().build(32), redact=str)
    manager = Manager(Manager.Config(**fields), pool, regenerate=regenerate, rate=rate)
    for number, (request, answer) in enumerate(rows):
        pool.admit(Query(text=request), answer, "large", now_s=float(number), embed=EMBEDDER.embed)
    return manager


# Knapsack


def brute_force(value, weight, capacity):
    best = 0.0
    for bits in itertools.product((False, True), repeat=len(value)):
        keep = np.array(bits, bool)
        if weight[keep].sum() <= capacity:
            best = max(best, value[keep].sum())
    return best


def test_knapsack_by_hand():
    packed = knapsack(np.array([60.0, 100.0, 120.0]), np.array([10.0, 20.0, 30.0]), 50)
    assert packed.keep_N.tolist() == [False, True, True]  # greedy takes 60 + 100
    assert (packed.value, packed.is_optimal) == (220, True)
    assert packed.bound == pytest.approx(240)


@settings(max_examples=150, deadline=None)
@given(
    items=st.lists(st.tuples(st.integers(0, 12) | st.floats(0, 20), st.integers(1, 15)), max_size=10),
    capacity=st.integers(0, 60),
)
def test_knapsack_equals_brute_force(items, capacity):
    value, weight = (np.array([item[at] for item in items], np.float64) for at in (0, 1))
    packed = knapsack(value, weight, capacity)
    assert packed.is_optimal
    assert weight[packed.keep_N].sum() <= capacity
    assert packed.value == pytest.approx(brute_force(value, weight, capacity), abs=1e-9)
    assert packed.value <= packed.bound + 1e-9


def test_knapsack_equals_brute_force_at_fifteen_items():
    for seed in range(4):
        random = np.random.default_rng(seed)
        value, weight = random.random(15), random.integers(1, 30, 15).astype(float)
        if seed % 2:
            value = weight + 0.01 * value  # value goes with weight: the hard kind
        capacity = float(weight.sum() * 0.4)
        assert knapsack(value, weight, capacity).value == pytest.approx(brute_force(value, weight, capacity), abs=1e-9)


def test_knapsack_of_many_is_after_few_nodes_near_its_bound_and_within_capacity():
    random = np.random.default_rng(0)
    value, weight = random.exponential(size=50_000), random.integers(50, 500, 50_000).astype(float)
    packed = knapsack(value, weight, 2_000_000, max_nodes=100)
    assert weight[packed.keep_N].sum() <= 2_000_000
    assert packed.value >= packed.bound * (1 - 1e-5)
    hard = knapsack(weight + 10, weight, 1_000_003, max_nodes=2000)  # stops, and says so
    assert weight[hard.keep_N].sum() <= 1_000_003
    assert hard.value <= hard.bound


@pytest.mark.parametrize(
    ("value", "weight", "capacity"),
    [([1.0], [0.0], 1), ([-1.0], [1.0], 1), ([np.nan], [1.0], 1), ([1.0, 2.0], [1.0], 1), ([1.0], [1.0], -1)],
)
def test_knapsack_refuses(value, weight, capacity):
    with pytest.raises(InputError):
        knapsack(np.array(value), np.array(weight), capacity)


# What examples earn


@given(st.lists(st.floats(0, 48), min_size=1, max_size=8), st.floats(0, 100))
def test_offloads_decay_by_nine_tenths_an_hour(gaps_h, wait_h):
    """Value = sum over successes of 0.9^(hours since), to 1e-12 of itself."""
    manager = make([("a", "b")])
    example, times, now = manager.pool.get(0), [], 0.0
    for gap in gaps_h:
        now += gap
        times.append(now)
        manager.used(example, 1.0, 0.5, is_cheap=True, now_s=now * HOUR_S)
    expected = sum(0.9 ** (now + wait_h - then) for then in times)
    assert manager.value(example, (now + wait_h) * HOUR_S) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_gain_by_hand():
    assert replay_gain(0.25, 0.4) == pytest.approx(0.3)
    manager = make([("a", "b")], gain_rate=0.5)
    example = manager.pool.get(0)
    manager.used(example, 0.5, 1.0, is_cheap=False, now_s=0.0)
    assert example.gain == pytest.approx(0.25)
    manager.used(example, 0.0, 0.5, is_cheap=True, now_s=0.0)
    assert example.gain == pytest.approx(0.375)
    assert (example.rated, example.helped, example.offloads) == (2, 0.5, 0)  # the dear arm, then a poor answer
    manager.used(example, 0.5, 0.5, is_cheap=True, now_s=0.0)
    assert example.offloads == 1


@pytest.mark.parametrize(("credit_all", "offloads"), [(False, [0, 0, 1]), (True, [1, 1, 1])])
def test_credit_of_an_offload(credit_all, offloads):
    manager = make([("a", "b"), ("c", "d"), ("e", "f")], credit_all=credit_all)
    manager.shown(list(manager.pool), 0.9, 0.2, is_cheap=True, now_s=0.0)
    assert [example.offloads for example in manager.pool] == offloads
    assert [example.rated for example in manager.pool] == [1, 1, 1]


# Replay


class Better:
    """Answers of the large model that get better each time, and a judge who sees it."""

    def __init__(self):
        self.calls = []

    def regenerate(self, example):
        self.calls.append(example.id)
        return [f"answer {len(self.calls)}", "worse", ""]

    def rate(self, example, answer):
        words = answer.split()
        return 0.1 + 0.01 * int(words[1]) if words[0] == "answer" else 0.05


def gained(manager, gains):
    for example, gain in zip(manager.pool, gains, strict=True):
        example.gain = gain


def test_replay_goes_by_gain_keeps_the_best_answer_and_stops_at_the_cap_of_five():
    better = Better()
    manager = make([("a", "old"), ("b", "old"), ("c", "old")], regenerate=better.regenerate, rate=better.rate)
    told = []
    manager.pool.on_removed.append(told.append)
    gained(manager, [0.2, 0.9, 0.01])
    assert manager.replay(0.0) == (2, 2)
    assert better.calls == [1, 0]  # largest gain first; the third is not worth it
    assert manager.pool.get(1).response == "answer 1"
    assert manager.pool.get(1).quality == pytest.approx(0.11)
    assert manager.pool.get(1).gain == pytest.approx(0.9 * (1 - 0.11))
    assert told == [{1}, {0}]  # prompts that hold the old answers are let go
    for _ in range(10):
        gained(manager, [0.9, 0.9, 0.01])
        manager.replay(0.0)
    assert [manager.pool.get(id).replays for id in (0, 1, 2)] == [5, 5, 0]
    assert manager.pool.size_bytes == sum(example.size_bytes for example in manager.pool)


def test_replay_never_makes_an_answer_worse_and_stops_where_it_buys_nothing():
    calls = []

    def regenerate(example):
        calls.append(example.id)
        return ["worse", "worse too"]

    manager = make(
        [(f"request {n}", "good") for n in range(10)],
        regenerate=regenerate,
        rate=lambda e, a: 0.9 if a == "good" else 0.1,
    )
    gained(manager, [0.5] * 10)
    assert manager.replay(0.0) == (3, 0)  # patience
    assert {example.response for example in manager.pool} == {"good"}


def test_replay_waits_for_low_load_and_needs_a_judge():
    better = Better()
    manager = make([("a", "old")], regenerate=better.regenerate, rate=better.rate, off_peak=0.5)
    gained(manager, [0.9])
    assert manager.replay(0.5) == (0, 0)
    assert make([("a", "old")], regenerate=better.regenerate).replay(0.0) == (0, 0)
    assert manager.replay(0.49) == (1, 1)
    silent = make([("a", "old")], regenerate=lambda example: [], rate=better.rate)
    gained(silent, [0.9])
    assert silent.replay(0.0) == (1, 0)


# Room


def test_retention_by_hand():
    rows = [("r" * 10, "a" * 10), ("s" * 10, "b" * 30), ("t" * 10, "c" * 10), ("u" * 10, "d" * 10)]
    manager = make(rows, newcomers=0.0)
    manager.pool.get(0).offloads, manager.pool.get(1).offloads = 2.0, 3.0
    assert manager.retain(60, now_s=0.0) == (2, True)
    assert {example.id for example in manager.pool} == {0, 1}  # 20 + 40
    assert manager.retain(39, now_s=0.0) == (1, True)
    assert {example.id for example in manager.pool} == {0}
    fresh = make([("r" * 10, "a" * 10), ("s" * 10, "b" * 10), ("t" * 10, "c" * 10)])
    fresh.retain(40, now_s=0.0)
    assert {example.id for example in fresh.pool} == {1, 2}  # nothing proved itself: the newest stay
    mixed = make(rows, newcomers=0.5)
    for example in mixed.pool:
        example.offloads = 3.0 - example.id
    mixed.retain(40, now_s=0.0)
    assert {example.id for example in mixed.pool} == {0, 3}  # half for the best, half for the newest


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), capacity=st.integers(0, 400))
def test_retention_never_passes_capacity(seed, capacity):
    random = np.random.default_rng(seed)
    manager = make([(f"r{n}" * random.integers(1, 6), "x" * random.integers(1, 40)) for n in range(15)])
    for example in manager.pool:
        example.offloads, example.offloads_s = float(random.integers(0, 4)), 0.0
    before = manager.pool.size_bytes
    manager.retain(capacity, now_s=3600.0)
    assert manager.pool.size_bytes <= min(capacity, before)
    assert len(manager.pool.index) == len(manager.pool)


def test_tick_expires_then_evicts_near_the_limit():
    manager = make([(f"request {n}", "x" * 10) for n in range(10)], ttl_s=100.0)
    assert manager.tick(now_s=102.5).expired == 3  # 0, 1 and 2
    assert manager.tick(now_s=102.5) == manager.tick(now_s=102.5)  # nothing left to do
    full = make([(f"request {n}", "x" * 11) for n in range(10)], max_bytes=200, near_limit=0.9, evict_to=0.5)
    done = full.tick(now_s=0.0)
    assert done.evicted == 5
    assert full.pool.size_bytes == 100


def test_admission_makes_room_by_the_same_rule():
    manager = make(max_bytes=100, evict_to=0.5)
    for number in range(40):
        admission = manager.pool.admit(
            Query(text=f"request {number:02}"),
            "x" * 10,
            "large",
            now_s=float(number),
            embed=EMBEDDER.embed,
            make_room=lambda missing, now=float(number): manager.make_room(missing, now),
        )
        assert admission.reason == "kept"
        assert manager.pool.size_bytes <= 100
        if number == 3:
            manager.pool.get(0).offloads = 100.0
    kept = {example.id for example in manager.pool}
    assert 0 in kept  # it proved itself
    assert 39 in kept
