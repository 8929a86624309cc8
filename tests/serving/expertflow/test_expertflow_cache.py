"""The cache's decisions, in simulated time."""

import itertools
import random
from collections import Counter

import numpy as np
import pytest

from anabranch.errors import ConfigError, DataError
from anabranch.routing.cache_policy import simulate
from anabranch.serving.expertflow import Expert, Layout
from anabranch.serving.expertflow.cache import ExpertCache
from anabranch.serving.expertflow.plan import Reference, belady_plan
from anabranch.serving.expertflow.policy import POLICIES, make_policy
from anabranch.serving.expertflow.simulate import SimulatedMover, replay, run_layer
from expertflow_models import make_cache, random_batches

A12, A13, A14, B22, B23 = Expert(0, 2), Expert(0, 3), Expert(0, 4), Expert(1, 2), Expert(1, 3)


def test_the_papers_example_gives_three_slots_and_one_and_its_order() -> None:
    events: list[tuple[str, Expert, int]] = []
    cache = make_cache(
        "plec", 4, layers=2, experts=5, top_k=3, audit=lambda what, who, slot, _: events.append((what, who, slot))
    )
    need = [[A12, A13, A14], [B22, B23]]
    cache.begin_step(need)
    SimulatedMover(cache, 0.0).pump()
    assert [who for what, who, _ in events if what == "start"] == [A12, A13, A14, B22]
    assert Counter(who.pool for who in cache.slot_of) == {0: 3, 1: 1}
    events.clear()
    run_layer(cache, SimulatedMover(cache, 0.0), 0, need[0], 1.0)
    assert [(what, who) for what, who, _ in events][:3] == [("used", A12), ("evicted", A12), ("start", B23)]
    slots = {what: slot for what, who, slot in events if who in (A12, B23)}
    assert slots["evicted"] == slots["start"]  # e12's slot loads e23


def brute_force_misses(steps: list[list[Expert]], capacity: int) -> int:
    """Clairvoyant replacement, straight from its definition: a step's experts are wanted together."""
    resident: set[Expert] = set()
    misses = 0
    for at, step in enumerate(steps):
        for expert in step:
            if expert in resident:
                continue
            misses += 1
            if len(resident) == capacity:
                later = {
                    one: next((n for n in range(at + 1, len(steps)) if one in steps[n]), 10**9)
                    for one in resident
                    if one not in step
                }
                resident.remove(max(later, key=lambda one: later[one]))
            resident.add(expert)
    return misses


def fewest_misses(steps: list[list[Expert]], capacity: int) -> int:
    """The least number of loads of any way to replace, by trying them all."""
    states = {frozenset[Expert](): 0}
    for step in steps:
        after: dict[frozenset[Expert], int] = {}
        for state, misses in states.items():
            missing, others = set(step) - state, sorted(state - set(step))
            room = capacity - len(step)
            for keep in itertools.combinations(others, min(room, len(others))):
                new = frozenset(step) | frozenset(keep)
                after[new] = min(after.get(new, 10**9), misses + len(missing))
        states = after
    return min(states.values())


def test_clairvoyant_replacement_makes_the_fewest_loads() -> None:
    for seed in range(10):
        steps = [step for batch in random_batches(6, 2, 4, 2, seed) for step in batch]
        assert brute_force_misses(steps, 3) == fewest_misses(steps, 3)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("policy", ["belady", "plec"])
def test_with_the_true_string_no_more_is_loaded_than_by_clairvoyant_replacement(policy: str, seed: int) -> None:
    batches = random_batches(15, layers=3, experts=8, wanted=4, seed=seed)
    for slots in (5, 7, 12):
        cache = make_cache(policy, slots, 3, 8)
        total, _ = replay(cache, batches, batches, horizon=len(batches), tail=False)
        assert total.loads == brute_force_misses([step for batch in batches for step in batch], slots)


@pytest.mark.parametrize("seed", range(4))
def test_a_plan_is_beladys(seed: int) -> None:
    steps = [step for batch in random_batches(8, 2, 6, 3, seed) for step in batch]
    plan = belady_plan(Reference(steps), 0, [], 4)
    assert len(plan) == brute_force_misses(steps, 4)
    for load in plan:
        assert load.after <= load.at
        if load.victim is not None:  # do no harm: what leaves is not used between
            assert not any(load.victim in steps[at] for at in range(load.after + 1, load.at))


def one_place(seed: int, tokens: int = 60, experts: int = 8) -> np.ndarray:
    weight = 1.0 / np.arange(1, experts + 1)
    return np.random.default_rng(seed).choice(experts, (1, tokens, 1), p=weight / weight.sum())


@pytest.mark.parametrize("policy", ["lru", "lfu", "belady"])
def test_hits_are_those_of_the_simulator_of_all_capacities(policy: str) -> None:
    index_STK = one_place(3)
    hits_C = simulate(index_STK, 8, policy, cold="miss").hits_SC[0]
    batches = [[[Expert(0, int(place))]] for place in index_STK[0, :, 0]]
    for slots in range(1, 9):
        known = batches if policy == "belady" else None
        total, _ = replay(make_cache(policy, slots, 1, 8), batches, known, horizon=len(batches), tail=False)
        assert total.hits == hits_C[slots - 1], slots


def test_textbook_string() -> None:
    """Silberschatz's reference string with three frames: LRU faults 12 times, the optimum 9 times."""
    string = [7, 0, 1, 2, 0, 3, 0, 4, 2, 3, 0, 3, 2, 1, 2, 0, 1, 7, 0, 1]
    batches = [[[Expert(0, page)]] for page in string]
    assert replay(make_cache("lru", 3, 1, 8), batches)[0].misses == 12
    assert replay(make_cache("belady", 3, 1, 8), batches, batches, horizon=20, tail=False)[0].misses == 9


@pytest.mark.parametrize("policy", ["lru", "belady"])
def test_more_slots_never_hit_less(policy: str) -> None:
    batches = random_batches(20, 3, 8, 1, seed=1)  # one expert a layer: order within a layer plays no part
    hits = [
        replay(make_cache(policy, slots, 3, 8), batches, batches, horizon=20, tail=False)[0].hits
        for slots in range(1, 25)
    ]
    assert hits == sorted(hits)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_thousand_random_plans_keep_the_budget_and_end(policy: str) -> None:
    chance = random.Random(5)
    for round_number in range(1000 // len(POLICIES) + 1):
        layers, experts, top_k = chance.randint(1, 3), chance.randint(2, 6), 1 + chance.randint(0, 1)
        layout = Layout.plain([experts] * layers, top_k, 10)
        least = layout.least_bytes(POLICIES[policy].per_layer)
        budget = chance.randint(least, layout.total_bytes)
        started: Counter[str] = Counter()
        slots: dict[int, Expert] = {}

        def audit(what, expert, slot, resident, *, budget=budget, started=started, slots=slots) -> None:
            started[what] += 1
            assert resident <= budget
            if what == "start":
                assert slot not in slots  # no slot has two tenants
                slots[slot] = expert
            elif what in ("evicted", "cancelled", "failed"):
                assert slots.pop(slot) == expert

        cache = ExpertCache(layout, budget, make_policy(policy), audit)
        batches = random_batches(6, layers, experts, experts, seed=round_number)
        wrong = random_batches(6, layers, experts, experts, seed=round_number + 9999)
        replay(cache, batches, wrong, seconds_per_byte=chance.choice([0.0, 0.01, 0.2]), horizon=chance.choice([1, 2]))
        assert started["start"] == started["loaded"] + started["cancelled"] + started["failed"] + len(cache.loading)
        assert started["loaded"] - started["evicted"] == len(cache.resident)
        assert cache.resident_bytes == 10 * len(cache.slot_of)
        total = cache.total()
        assert total.accesses == sum(len(step) for batch in batches for step in batch)
        assert total.bytes_moved == 10 * started["loaded"]


def test_an_oracle_with_room_for_a_step_never_stalls_after_the_first() -> None:
    batches = random_batches(12, 4, 8, 3, seed=2, kind="full")
    cache = make_cache("plec", 12, 4, 8, top_k=3)  # 4 layers of 3
    mover = SimulatedMover(cache, 0.2)
    for number, batch in enumerate(batches):
        stall = cache.total().stall_s
        cache.begin_step([step for known in batches[number : number + 2] for step in known])
        mover.pump()
        for layer, wanted in enumerate(batch):
            run_layer(cache, mover, layer, wanted, 3.0)
        if number:
            assert cache.total().stall_s == stall


def test_correction_runs_what_is_there_first_and_replaces_what_was_predicted_in_vain() -> None:
    events: list[tuple[str, Expert]] = []
    cache = make_cache("plec", 4, 2, 6, audit=lambda what, who, *_: events.append((what, who)))
    wanted, vain, missing = Expert(0, 0), Expert(0, 1), Expert(0, 5)
    ahead = [Expert(1, 0), Expert(1, 1)]
    cache.begin_step([[wanted, vain], ahead])
    mover = SimulatedMover(cache, 0.0)
    mover.pump()
    events.clear()
    mover.seconds_per_byte = 1.0
    run_layer(cache, mover, 0, [missing, wanted], 0.1)
    assert events[:2] == [("evicted", vain), ("start", missing)]
    assert [who for what, who in events if what == "used"] == [wanted, missing]
    assert all(expert in cache.slot_of for expert in ahead)
    assert cache.counters[0].prefetched_unused == 1


def test_a_load_under_way_that_nobody_wants_is_cancelled() -> None:
    cache = make_cache("plec", 3, 1, 6)
    cache.begin_step([[Expert(0, 1), Expert(0, 2)]])
    load = cache.next_load()
    assert load is not None
    cache.begin_layer(0, [Expert(0, 4)])
    assert load.cancelled
    cache.begin_layer(0, [Expert(0, 1)])  # wanted again: it goes on
    assert not load.cancelled
    assert load.urgent
    assert cache.counters[0].late == 1
    load.cancelled = True
    cache.cancelled(load)
    assert cache.resident_bytes == 0


def test_a_failed_load_is_told_to_who_wants_it_and_a_failed_guess_to_nobody() -> None:
    cache = make_cache("plec", 4, 2, 6)
    bad = Expert(0, 3)
    mover = SimulatedMover(cache, 0.0, fails=lambda load: load.expert == bad)
    cache.begin_step([[bad], [Expert(1, 0)]])
    mover.pump()  # a guess
    assert cache.total().failed == 1
    assert Expert(1, 0) in cache.slot_of
    with pytest.raises(DataError, match="expert 3 of routed layer 0 could not be loaded: simulated"):
        run_layer(cache, mover, 0, [bad, Expert(0, 1)], 0.1)
    cache.begin_step()  # a pass that was given up leaves nothing wanted
    run_layer(cache, mover, 0, [Expert(0, 1)], 0.1)
    assert not cache.wanted


def test_cache_moe_divides_slots_by_layer() -> None:
    cache = make_cache("cache_moe", 20, 3, 8, top_k=2)
    assert [cache.policy.quota(layer) for layer in range(3)] == [6, 5, 5]
    assert cache.policy.spares == 4
    replay(cache, random_batches(10, 3, 8, 8, seed=0))
    assert all(len(cache.members[layer]) <= cache.policy.quota(layer) for layer in range(3))


def test_se_moe_loads_the_next_layers_whole() -> None:
    cache = make_cache("se_moe", 8, 4, 4)
    mover = SimulatedMover(cache, 0.0)
    cache.begin_step()
    mover.pump()
    assert {expert.pool for expert in cache.slot_of} == {0, 1}
    for layer, ahead in ((0, {1, 2}), (1, {2, 3}), (2, {3, 0})):  # a ring
        run_layer(cache, mover, layer, [Expert(layer, 0)], 1.0)
        mover.pump()
        assert {expert.pool for expert in cache.slot_of} == ahead


@pytest.mark.parametrize(("policy", "least"), [("lru", 30), ("plec", 30), ("cache_moe", 90)])
def test_a_budget_that_is_too_small_names_the_least_that_suffices(policy: str, least: int) -> None:
    layout = Layout.plain([8, 8, 8], 3, 10)
    with pytest.raises(ConfigError, match=f"29 bytes.*give at least {least}"):
        ExpertCache(layout, 29, make_policy(policy))
    ExpertCache(layout, least, make_policy(policy))


def test_a_budget_of_several_kinds_is_kept_and_used() -> None:
    layout = Layout((0, 1, 2), (2, 2, 1), (8, 4, 6), (0, 1, 0), (100, 1000))
    for budget in (2200, 3333, 4000, 5400):
        slots = layout.slots(budget)
        assert slots[0] >= 2
        assert slots[1] >= 2
        assert slots[0] * 100 + slots[1] * 1000 <= budget
    assert layout.slots(5400) == [14, 4]


def test_unknown_policies_and_experts_are_refused() -> None:
    with pytest.raises(ConfigError, match="no cache policy 'mru'"):
        make_policy("mru")
    with pytest.raises(ConfigError, match="does not have"):
        make_cache("lru", 4, 2, 4).begin_layer(1, [Expert(0, 1)])


def test_random_is_the_same_for_a_seed() -> None:
    batches = random_batches(20, 2, 8, 4, seed=3)
    rates = {replay(make_cache("random", 6, 2, 8), batches)[0].hits for _ in range(2)}
    assert len(rates) == 1


def test_predictions_with_prefetch_beat_lru_and_belady_on_demand() -> None:
    batches = random_batches(40, 4, 16, 4, seed=4, kind="full")
    rate = {
        policy: replay(make_cache(policy, 20, 4, 16), batches, batches, seconds_per_byte=0.2)[0].hit_rate
        for policy in ("lru", "belady", "plec")
    }
    assert rate["plec"] > rate["belady"] > rate["lru"]


def test_reference_counts_uses() -> None:
    a, b = Expert(0, 0), Expert(0, 1)
    reference = Reference([[a, b], [b], [a]])
    positions = list(itertools.accumulate([1 << 16] * 3, initial=0))
    assert reference.next_use(a, -1) == 0
    assert reference.next_use(a, 0) == positions[2]
    reference.remove(0, a)
    assert reference.next_use(a, -1) == positions[2]
    reference.set(1, [a])
    assert reference.next_use(a, -1) == positions[1]
    assert reference.next_use(b, 1) > positions[3]
