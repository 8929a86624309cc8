"""Plans whose memory binds a little: of ranks with one chunk and with several."""

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest

from anabranch.cluster import LayerCost, plan, plans
from anabranch.cluster.rooms import Rooms
from anabranch.errors import InputError


def llama(blocks, words):
    """Llama-2-7B with so many blocks and words, for one sequence of 4096 tokens in bfloat16."""
    dim, inner, tokens = 4096, 11008, 4096
    parameters, width = 4 * dim * dim + 3 * dim * inner, tokens * dim * 2
    block = {
        "flops": 2 * parameters * tokens + 2 * tokens * tokens * dim,
        "parameters": parameters,
        "output_bytes": width,
        "saved_bytes": 1.5 * (4 * dim + 3 * inner) * tokens * 2,
    }
    first = LayerCost(name="embedding", flops=0.0, parameters=words * dim, output_bytes=width, saved_bytes=tokens * 8)
    head = LayerCost(
        name="head",
        flops=2 * tokens * dim * words,
        parameters=words * dim + dim,
        output_bytes=tokens * words * 2,
        saved_bytes=2 * width + tokens * words * 4,
    )
    return [first, *(LayerCost(name=f"block {n}", **block) for n in range(blocks)), head]


# Ranks, visits, micro-batches, blocks, words, memory in GB, and the seconds of a step that moving one layer of the unbounded plan gives,
# or another search found.
LITTLE_ROOM = [
    (8, 2, 32, 32, 32_000, 42.8, 7.469),
    (8, 2, 32, 32, 32_000, 40.4, 7.543),
    (4, 2, 16, 32, 32_000, 52.6, 6.661),
    (4, 2, 16, 32, 32_000, 49.7, 6.844),
    (4, 4, 16, 32, 32_000, 50.8, 6.469),
    (8, 2, 16, 40, 128_256, 57.1, 4.876),
    (8, 2, 16, 40, 128_256, 53.9, 4.876),
    (4, 2, 16, 32, 128_256, 51.7, 7.483),
    # With more memory no slower.
    (4, 2, 16, 32, 128_256, 56.4, 7.207),
    (4, 2, 16, 32, 128_256, None, 6.797),
]


@pytest.mark.parametrize(("ranks", "visits", "micro_batches", "blocks", "words", "cap_gb", "longest_s"), LITTLE_ROOM)
def test_a_little_less_memory_makes_no_uneven_stages(ranks, visits, micro_batches, blocks, words, cap_gb, longest_s):
    made = plan(
        llama(blocks, words),
        ranks=ranks,
        schedule_name="interleaved",
        visits=visits,
        micro_batches=micro_batches,
        checkpoint="never",
        flops_s=1.2e14,
        bytes_s=5e10,
        cap_bytes=None if cap_gb is None else cap_gb * 1e9,
    )
    assert made.timeline.step_s <= longest_s
    assert cap_gb is None or max(taken(made)) <= cap_gb * 1e9


@pytest.mark.parametrize("most", [1, 100_000])
def test_one_rank_has_all_layers(most, monkeypatch):
    """There is no boundary to move."""
    monkeypatch.setattr(plans, "_MOST_SIMULATED", most)
    layers, told = drawn(0)
    told |= {"ranks": 1, "schedule_name": "gpipe", "visits": None}
    made = plan(layers, **told)
    assert plan(layers, cap_bytes=taken(made)[0], **told) == made
    with pytest.raises(InputError, match=r"no stages were found|do not hold them"):
        plan(layers, cap_bytes=taken(made)[0] - 1, **told)


def taken(made):
    """Bytes of each rank."""
    return [state + kept for state, kept in zip(made.state_bytes_K, made.activation_bytes_K, strict=True)]


def drawn(seed, most_layers=10):
    """Layers and what `plan` is told of them."""
    draw = random.Random(seed)
    name, visits = draw.choice([("gpipe", 1), ("1f1b", 1), ("zero-bubble", 1), ("interleaved", 2), ("interleaved", 2)])
    ranks = draw.choice([2, 3, 4]) if visits == 1 else 2
    layers = [
        LayerCost(
            name=str(n),
            flops=draw.choice([0.0, 50.0, 100.0, 100.0, 300.0]),
            parameters=draw.choice([10, 100, 100, 400]),
            output_bytes=draw.choice([0.0, 20.0, 50.0]),
            saved_bytes=draw.choice([0.0, 50.0, 100.0, 300.0]),
        )
        for n in range(draw.randint(ranks * visits + 1, most_layers))
    ]
    if seed % 2:
        # An embedding that is the head, and is looked up once more in between.
        layers[-2:] = [replace(layer, tied_to=0) for layer in layers[-2:]]
    told = {"ranks": ranks, "schedule_name": name, "visits": visits, "micro_batches": 2 * ranks, "flops_s": 1e3}
    told |= {"checkpoint": draw.choice(["always", "except_last", "never"]), "bytes_per_parameter": 1.0}
    return layers, told | {"bytes_s": draw.choice([None, 1e3])}


@pytest.mark.parametrize("seed", range(30))
def test_drawn_plans_against_all_that_there_are(seed, monkeypatch):
    """All are simulated, and then so few that boundaries are moved: near the shortest, and none that one move leads to is shorter."""
    layers, told = drawn(seed)
    chunks, simulated = told["ranks"] * told["visits"], []
    balances = [
        tuple(end - start for start, end in itertools.pairwise((0, *ends, len(layers))))
        for ends in itertools.combinations(range(1, len(layers)), chunks - 1)
    ]
    made = {balance: plan(layers, balance=balance, **told) for balance in balances}
    fullest = sorted(max(taken(one)) for one in made.values())
    simulate, slots = plans.simulate, len(next(iter(made.values())).schedule.slots)
    for cap in {fullest[0], fullest[len(fullest) // 8], fullest[len(fullest) // 2]}:
        steps = {balance: one.timeline.step_s for balance, one in made.items() if max(taken(one)) <= cap}
        monkeypatch.setattr(plans, "_MOST_SIMULATED", 100_000)
        found = plan(layers, cap_bytes=cap, **told)
        assert found.timeline.step_s == pytest.approx(min(steps.values()), rel=1e-9)
        most = min(30, len(balances) - 1)
        monkeypatch.setattr(plans, "_MOST_SIMULATED", 2 * slots * most)
        monkeypatch.setattr(plans, "simulate", lambda *given: simulated.append(given) or simulate(*given))
        simulated.clear()
        found = plan(layers, cap_bytes=cap, **told)
        assert steps[found.partition.balance] <= 1.15 * min(steps.values())
        # One more is the plan's own.
        if len(simulated) - 1 < most:
            moved = [list(found.partition.balance) for _ in range(chunks**2)]
            for balance, (source, target) in zip(moved, itertools.product(range(chunks), repeat=2), strict=True):
                balance[source] -= 1
                balance[target] += 1
            nearest = [steps[tuple(balance)] for balance in moved if tuple(balance) in steps]
            assert found.timeline.step_s <= min(nearest) * (1 + 1e-9)
        monkeypatch.setattr(plans, "simulate", simulate)


@pytest.mark.parametrize("seed", range(12))
def test_the_shortest_step_is_no_longer_than_that_of_a_rule(seed):
    """Of many partitions, with several visits and bounded memory: what rules find under a share of it is tried as well."""
    draw = random.Random(seed)
    ranks, visits = draw.choice([(4, 2), (4, 3), (3, 2), (8, 2)])
    layers, told = drawn(seed, ranks * visits + 16)
    layers = (layers * 8)[: ranks * visits + draw.randint(4, 16)]
    told |= {"ranks": ranks, "schedule_name": "interleaved", "visits": visits, "micro_batches": ranks}
    steps = {}
    cap = max(taken(plan(layers, **told))) * draw.choice([0.8, 0.9, 0.97])
    for objective in ("step", "minimax", "variance"):
        try:
            steps[objective] = plan(layers, cap_bytes=cap, objective=objective, **told).timeline.step_s
        except InputError:
            continue
    assert "step" in steps or not steps
    assert steps.get("step", 0.0) <= min(steps.values(), default=0.0) * (1 + 1e-9)


@pytest.mark.parametrize("ties", [{}, {-1: 0}, {2: 1, 3: 1, -1: 0}], ids=["as drawn", "head", "several"])
@pytest.mark.parametrize("seed", range(10))
def test_memory_of_many_partitions_is_that_of_each(seed, ties):
    layers, told = drawn(seed)
    for user, source in ties.items():
        layers[user] = replace(layers[user], tied_to=source)
    made = plan(layers, **told)
    rooms = Rooms(
        table=made.schedule,
        checkpoint=told["checkpoint"],
        state_L=tuple(float(layer.parameters) for layer in layers),
        saved_L=tuple(layer.saved_bytes for layer in layers),
        output_L=tuple(layer.output_bytes for layer in layers),
        tied_L=tuple(layer.tied_to for layer in layers),
    )
    many = list(itertools.combinations(range(1, len(layers)), told["ranks"] * told["visits"] - 1))
    found_NK = rooms.taken_NK(np.array([(0, *bounds, len(layers)) for bounds in many]))
    for bounds, found_K in zip(many, found_NK.tolist(), strict=True):
        balance = [end - start for start, end in itertools.pairwise((0, *bounds, len(layers)))]
        assert found_K == pytest.approx(taken(plan(layers, balance=balance, **told)), rel=1e-12)
