"""Plans: layers with costs on ranks."""

import itertools
import random
from dataclasses import replace

import pytest

from anabranch.cluster import LayerCost, plan, plans
from anabranch.errors import InputError

LAYERS = [LayerCost(name=f"layer {n}", flops=1e9, parameters=100, output_bytes=1e6, saved_bytes=8e6) for n in range(8)]


def test_by_hand():
    made = plan(LAYERS, ranks=4, micro_batches=8, flops_s=1e12, checkpoint="never")
    # Two layers of 1 ms forward and 2 ms backward each; (8 + 3) of them.
    assert made.timeline.step_s == pytest.approx(11 * 2 * 3e-3)
    assert made.one_rank_s == pytest.approx(8 * 8 * 3e-3)
    assert made.speedup == pytest.approx(8 * 4 / 11)
    assert made.partition.balance == (2, 2, 2, 2)
    # All eight micro-batches are held.
    assert made.activation_bytes_K == (128e6,) * 4
    assert made.to_dict()["ranks"][1]["layers"] == [[2, 3]]


def test_recomputation_and_1f1b_hold_less():
    always = plan(LAYERS, ranks=4, micro_batches=8, flops_s=1e12, checkpoint="always")
    # The first rank's input is data; the second holds 8 inputs, and one micro-batch's layers in place of one of them.
    assert always.activation_bytes_K[:2] == (16e6, 7e6 + 16e6)
    flushed = plan(LAYERS, ranks=4, micro_batches=8, flops_s=1e12, checkpoint="never", schedule_name="1f1b")
    assert flushed.activation_bytes_K == (64e6, 48e6, 32e6, 16e6)
    assert flushed.timeline.step_s == pytest.approx(11 * 2 * 3e-3)


def test_groups_links_and_memory_count():
    assert plan(LAYERS, ranks=2, flops_s=1e12, uncut=[range(7)]).partition.balance == (7, 1)
    assert plan(LAYERS, ranks=2, flops_s=1e12).schedule.num_micro_batches == 8
    even = {"ranks": 2, "micro_batches": 4, "flops_s": 1e12, "balance": [4, 4], "checkpoint": "never"}
    free = plan(LAYERS, **even)
    paid = plan(LAYERS, **even, bytes_s=1e9, latency_s=1e-3)
    assert paid.timeline.step_s == pytest.approx(free.timeline.step_s + 2 * 2e-3)
    with pytest.raises(InputError, match="do not hold them"):
        plan(LAYERS, ranks=2, flops_s=1e12, cap_bytes=3 * 1600)
    twice = plan(LAYERS, ranks=2, micro_batches=4, flops_s=1e12, schedule_name="interleaved", checkpoint="never")
    assert twice.chunks_of(1) == [range(2, 4), range(6, 8)]


def uneven(seed: int, count: int) -> list[LayerCost]:
    """A model whose embedding costs no operations, and whose head is another one than its blocks."""
    draw = random.Random(seed)
    blocks = [
        LayerCost(
            name=f"block {n}",
            flops=draw.choice([1e9, 1e9, 2e9, 3e9]),
            parameters=draw.choice([10, 20, 90]),
            output_bytes=1e6,
        )
        for n in range(count - 2)
    ]
    first = LayerCost(name="embedding", flops=0.0, parameters=200, output_bytes=1e6)
    return [first, *blocks, LayerCost(name="head", flops=draw.choice([1e8, 5e9]), parameters=200, output_bytes=1.0)]


@pytest.mark.parametrize("checkpoint", ["always", "except_last", "never"])
@pytest.mark.parametrize("bytes_s", [None, 1e10, 1e9, 1e8], ids=["free", "fast", "slow", "bound by links"])
@pytest.mark.parametrize(("name", "visits"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zero-bubble", 1)])
def test_no_contiguous_stages_take_a_shorter_step(name, visits, bytes_s, checkpoint):
    """Against every balance that there is."""
    layers, ranks = uneven(len(name), 7), 4 // visits
    told = {"ranks": ranks, "schedule_name": name, "micro_batches": 6, "flops_s": 1e12, "bytes_s": bytes_s}
    told |= {"checkpoint": checkpoint, "latency_s": 1e-5}
    made = plan(layers, **told)
    balances = [found for found in itertools.product(range(1, 5), repeat=4) if sum(found) == 7]
    steps = {found: plan(layers, balance=found, **told).timeline.step_s for found in balances}
    assert made.timeline.step_s == pytest.approx(min(steps.values()), rel=1e-9)
    assert steps[made.partition.balance] == made.timeline.step_s
    # The rules of `partition` are still to be had, and are no better.
    for objective in ("minimax", "variance"):
        assert plan(layers, objective=objective, **told).timeline.step_s >= made.timeline.step_s * (1 - 1e-9)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved"])
def test_of_many_partitions_none_is_worse_than_those_of_a_rule(name):
    layers = uneven(3, 40)
    told = {"ranks": 8, "schedule_name": name, "micro_batches": 16, "flops_s": 1e12, "bytes_s": 1e9}
    made = plan(layers, **told)
    assert sum(made.partition.balance) == 40
    for objective in ("minimax", "variance"):
        assert made.timeline.step_s <= plan(layers, objective=objective, **told).timeline.step_s * (1 + 1e-9)


@pytest.mark.parametrize("cap", [640, 800, 1100, 2000])
@pytest.mark.parametrize(("name", "visits"), [("gpipe", 1), ("interleaved", 2)])
def test_memory_bounds_what_all_chunks_of_a_rank_take(name, visits, cap):
    """A plan is found exactly where a balance keeps to the memory, and then it is the quickest of these."""
    layers = [
        replace(layer, parameters=parameters, saved_bytes=5.0)
        for layer, parameters in zip(LAYERS, (30, 10, 10, 30, 5, 5, 5, 5), strict=True)
    ]
    told = {"ranks": 4 // visits, "schedule_name": name, "micro_batches": 4, "flops_s": 1e12, "checkpoint": "never"}
    balances = [found for found in itertools.product(range(1, 6), repeat=4) if sum(found) == 8]
    made = [plan(layers, balance=found, **told) for found in balances]
    held = [
        [state + kept for state, kept in zip(one.state_bytes_K, one.activation_bytes_K, strict=True)] for one in made
    ]
    assert {sum(one.state_bytes_K) for one in made} == {1600}
    steps = [one.timeline.step_s for one, taken in zip(made, held, strict=True) if max(taken) <= cap]
    if not steps:
        with pytest.raises(InputError, match=r"no stages were found that fit|do not hold them|layer 0 takes"):
            plan(layers, cap_bytes=cap, **told)
        return
    found = plan(layers, cap_bytes=cap, **told)
    assert found.timeline.step_s == pytest.approx(min(steps), rel=1e-9)
    assert max(map(sum, zip(found.state_bytes_K, found.activation_bytes_K, strict=True))) <= cap


def taken(made):
    """Bytes of each rank."""
    return [state + kept for state, kept in zip(made.state_bytes_K, made.activation_bytes_K, strict=True)]


@pytest.mark.parametrize("checkpoint", ["always", "except_last", "never"])
@pytest.mark.parametrize(("name", "visits"), [("gpipe", 1), ("1f1b", 1), ("zero-bubble", 1), ("interleaved", 2)])
def test_stages_are_refused_only_where_no_balance_has_room(name, visits, checkpoint, monkeypatch):
    """At the least memory that any balance has room in, and just below it; also where partitions are too many to simulate them all."""
    for seed in range(3):
        draw = random.Random(f"{name} {seed}")
        layers = [
            replace(
                layer, parameters=draw.randint(1, 9), saved_bytes=draw.randint(1, 60), output_bytes=draw.randint(1, 9)
            )
            for layer in uneven(seed, 9)
        ]
        if seed:
            # The last rank has a copy of what the first one has.
            layers[-1] = replace(layers[-1], tied_to=0)
        if seed == 2:
            layers[6] = replace(layers[6], tied_to=3)
        told = {"ranks": 4 // visits, "schedule_name": name, "micro_batches": 6, "flops_s": 1e12, "bytes_s": 1e6}
        told["checkpoint"] = checkpoint
        balances = [found for found in itertools.product(range(1, 7), repeat=4) if sum(found) == 9]
        least = min(max(taken(plan(layers, balance=found, **told))) for found in balances)
        for most in (100_000, 1):
            monkeypatch.setattr(plans, "_MOST_SIMULATED", most)
            for objective in ("step", "minimax", "variance"):
                assert max(taken(plan(layers, cap_bytes=least, objective=objective, **told))) <= least
                with pytest.raises(InputError, match=r"no stages were found that fit|do not hold them|takes"):
                    plan(layers, cap_bytes=least - 1, objective=objective, **told)


@pytest.mark.parametrize(("name", "visits"), [("1f1b", 1), ("interleaved", 2)])
def test_a_rank_has_what_its_layers_are_tied_to(name, visits):
    """Once, whether the layer that it belongs to is there or not."""
    counts, ties = (7, 11, 13, 17, 19, 23, 29), {3: 1, 4: 0, 5: 1, 6: 0}
    layers = [
        LayerCost(name=str(n), flops=1e9, parameters=count, saved_bytes=4.0, tied_to=ties.get(n))
        for n, count in enumerate(counts)
    ]
    ranks = 4 // visits
    told = {"ranks": ranks, "schedule_name": name, "micro_batches": 4, "flops_s": 1e12}
    for balance in itertools.product(range(1, 5), repeat=4):
        if sum(balance) != 7:
            continue
        made = plan(layers, balance=balance, **told)
        chunk_of = [chunk for chunk, count in enumerate(balance) for _ in range(count)]
        for rank in range(ranks):
            own = {layer for layer, chunk in enumerate(chunk_of) if chunk % ranks == rank}
            has = own | {ties[layer] for layer in own & ties.keys()}
            wanted = sum(counts[layer] for layer in has)
            assert made.state_bytes_K[rank] == 16 * wanted
            assert made.parameters_of(rank) == made.to_dict()["ranks"][rank]["parameters"] == wanted


def test_the_copy_of_an_embedding_that_is_the_head_is_room_that_others_lack():
    layers = [LayerCost(name=str(n), flops=1e9, parameters=10) for n in range(7)]
    layers = [LayerCost(name="embedding", flops=0.0, parameters=40), *layers]
    layers.append(LayerCost(name="head", flops=0.0, tied_to=0))
    told = {"ranks": 3, "flops_s": 1e12, "micro_batches": 4, "cap_bytes": 60 * 16}
    # Of 150 parameters in all, 40 of them twice; without the copy the last rank would have five blocks.
    assert plan(layers, **told).parameters_of(2) <= 60
    with pytest.raises(InputError, match="no stages were found that fit"):
        plan(layers, balance=[2, 2, 5], **told)
    layers[-1] = replace(layers[-1], tied_to=None)
    assert plan(layers, balance=[2, 2, 5], **told).parameters_of(2) == 40


@pytest.mark.parametrize("objective", ["step", "minimax", "variance"])
def test_more_micro_batches_on_early_ranks_leave_them_fewer_layers(objective):
    """34 equal layers: no even stages have room, and those that have are far from the even ones."""
    layers = [
        LayerCost(name=str(n), flops=1e12, parameters=200_000_000, output_bytes=1e8, saved_bytes=2.4e9)
        for n in range(34)
    ]
    told = {"ranks": 8, "schedule_name": "1f1b", "micro_batches": 32, "checkpoint": "never", "flops_s": 4e14}
    fullest = max(taken(plan(layers, balance=[2, 2, 3, 3, 4, 5, 6, 9], **told)))
    made = plan(layers, objective=objective, cap_bytes=fullest, **told)
    assert max(taken(made)) <= fullest
    with pytest.raises(InputError, match="no stages were found that fit"):
        plan(layers, objective=objective, cap_bytes=fullest * 0.999, **told)


def test_two_chunks_of_a_rank_share_its_memory():
    """Chunks of 30, 10, 10 and 30: a rank has 40 of them, though a chunk has more than half of that."""
    layers = [LayerCost(name=str(n), flops=1e9, parameters=count) for n, count in enumerate((30, 10, 10, 30))]
    told = {"ranks": 2, "schedule_name": "interleaved", "visits": 2, "flops_s": 1e12}
    assert plan(layers, cap_bytes=640, **told).state_bytes_K == (640, 640)
    assert plan(layers, cap_bytes=640, objective="minimax", **told).partition.balance == (1, 1, 1, 1)
    for objective in ("step", "minimax"):
        with pytest.raises(InputError, match="do not hold them"):
            plan(layers, cap_bytes=639, objective=objective, **told)
    # The most even chunks give a rank 60 of these and the other one 10; with less than half of a rank's memory each they fit.
    flops, counts = (1e9, 1e9, 3e9, 3e9, 3e9), (20, 10, 10, 20, 10)
    odd = [
        LayerCost(name=str(n), flops=of, parameters=count)
        for n, (of, count) in enumerate(zip(flops, counts, strict=True))
    ]
    assert max(plan(odd, objective="minimax", **told).state_bytes_K) > 640
    assert max(plan(odd, objective="minimax", cap_bytes=640, **told).state_bytes_K) <= 640
    # A layer of rank 0 is twice as large: all would fit in the middle, and no rank's do.
    layers = [LayerCost(name=str(n), flops=1e9, parameters=count) for n, count in enumerate((60, 10, 20, 10))]
    with pytest.raises(InputError, match=r"no stages were found that fit: .* rank 0 takes 1.28 kB"):
        plan(layers, cap_bytes=1000, **told)
    with pytest.raises(InputError, match="no stages were found that fit"):
        plan(layers, cap_bytes=1000, balance=[1, 1, 1, 1], **told)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": 2, "objective": "best"}, "objective is 'best'; use step, minimax or variance"),
        ({"ranks": 9}, "8 layers cannot be 9 chunks"),
        ({"ranks": 8, "schedule_name": "interleaved"}, "16 chunks"),
        ({"ranks": 2, "flops_s": 0.0}, "flops_s is 0.0"),
        ({"ranks": 2, "bytes_s": -1.0}, "bytes_s is -1.0"),
        ({"ranks": 2, "checkpoint": "x"}, "checkpoint is 'x'"),
        ({"ranks": 2, "balance": [3, 3]}, "sums to 6"),
        ({"ranks": 3, "balance": [4, 4]}, "balance has 2 entries"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        plan(LAYERS, **{"flops_s": 1e12, **options})


@pytest.mark.parametrize("source", [-1, 2, 3, 8])
def test_layers_are_tied_to_earlier_ones(source):
    layers = [*LAYERS[:2], replace(LAYERS[2], tied_to=source), *LAYERS[3:]]
    with pytest.raises(InputError, match=f"tied_to of layer 2 is {source}; name one of the 2 layers before it"):
        plan(layers, ranks=2, flops_s=1e12)
