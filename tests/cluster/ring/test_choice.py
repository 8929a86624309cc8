"""Which scheme is quickest where."""

import itertools

import pytest
import torch

from anabranch.cluster.ring import SCHEMES, Layout, RingOptions, Topology, measure_topology, plan_attention
from anabranch.cluster.ring.schedule import RINGS
from anabranch.errors import ConfigError, InputError

# Links alone, and no latency: time is bytes over bandwidth.
LINKS = Topology(bandwidth=1e9, latency_s=0.0, gather_bytes=0)


def times(plan) -> dict[str, float]:
    return {cost.scheme: cost.time_s for cost in plan.costs}


def plan(group=1, *, topology=LINKS, dtype=torch.float32, **options):
    told = {
        "length": 4096,
        "world": 4,
        "heads": 8,
        "kv_heads": 8 // group,
        "head_dim": 64,
        "causal": False,
        "layout": "contiguous",
        "schemes": RINGS,
    }
    return plan_attention(**{**told, **options}, dtype=dtype, topology=topology)


def test_times_by_hand():
    """3 hops of 2 n G D b bytes over 1 GB/s; the counter-rotating ring half of that; TokenRing 3 times a result, the larger of the two."""
    found = times(plan())
    rows = 1024
    assert found["ring"] == pytest.approx(3 * 2 * rows * 8 * 64 * 4 / 1e9)
    assert found["ring2"] == pytest.approx(found["ring"] / 2)
    # Queries travel hop by hop, each result over a link of its own: the last one leaves when the last query is there.
    query, result = rows * 8 * 64 * 4 / 1e9, rows * 8 * (64 + 1) * 4 / 1e9
    assert found["token_ring"] == pytest.approx(3 * query + result)


def test_the_last_result_has_nothing_to_hide_behind():
    """So TokenRing takes 0.67 of the ring's time on 4 ranks, 0.57 on 8 and 0.53 on 16, by links alone (and a lse of 1 number in 65)."""
    for world, share in ((4, 4 / 6), (8, 8 / 14), (16, 16 / 30)):
        found = times(plan(world=world))
        assert found["token_ring"] / found["ring"] == pytest.approx(share, rel=5e-3)


def test_what_a_scheme_wins_goes_with_the_groups():
    """TokenRing is ahead of the ring where H < 2 G, and behind with groups of 4 and 8 (float32, so that results weigh as queries do)."""
    ahead = {group: times(plan(group))["token_ring"] < times(plan(group))["ring"] for group in (1, 2, 4, 8)}
    assert ahead == {1: True, 2: False, 4: False, 8: False}


def test_results_of_float32_weigh_twice_as_much_as_queries_of_bfloat16():
    fine, coarse = plan(dtype=torch.bfloat16), plan(dtype=torch.bfloat16, out_dtype=torch.bfloat16)
    cost = {made: next(cost for cost in made.costs if cost.scheme == "token_ring") for made in (fine, coarse)}
    assert cost[fine].size_bytes > 1.4 * cost[coarse].size_bytes


def test_memory_decides_about_all_gather():
    assert plan().choice != "all_gather"
    roomy = plan(topology=Topology(bandwidth=1e9, latency_s=0.0, gather_bytes=1 << 40))
    assert roomy.choice == "all_gather"
    assert "too much memory" in plan().explain()
    assert "too much memory" not in roomy.explain()


def test_cut_heads_send_each_number_to_one_rank():
    """Queries, keys, values there and results back: a quarter of each from each rank to each of the three others, all at once."""
    found = next(cost for cost in plan(schemes=None).costs if cost.scheme == "ulysses")
    there, back = 1024 * 2 * 3 * 64 * 4, 1024 * 2 * (64 + 1) * 4
    assert found.size_bytes == 12 * (there + back)
    assert found.time_s == pytest.approx((there + back) / 1e9)
    assert "ulysses" not in times(plan(world=3, schemes=None))


def test_few_queries_over_many_keys_go_to_the_keys():
    found = plan_attention(
        512, 4, 8, 8, 64, torch.float32, causal=True, layout="contiguous", kv_cached=32768, topology=LINKS
    )
    costs = {cost.scheme: cost for cost in found.costs}
    assert found.choice == "token_ring"
    assert costs["token_ring"].size_bytes <= 0.05 * costs["ring"].size_bytes
    assert costs["token_ring"].time_s <= 0.3 * costs["ring"].time_s


def test_on_a_ring_results_take_many_hops():
    """There TokenRing is rarely chosen."""
    ring = Topology("ring", bandwidth=1e9, latency_s=0.0, gather_bytes=0)
    assert times(plan(topology=ring, world=8))["token_ring"] > times(plan(topology=LINKS, world=8))["token_ring"]
    assert plan(topology=ring, world=8).choice in ("ring", "ring2")


def test_through_a_switch_both_flows_leave_by_one_port():
    switch = Topology("switch", bandwidth=1e9, latency_s=0.0, gather_bytes=0)
    found = times(plan(topology=switch))
    assert found["token_ring"] >= found["ring"]


def test_compute_hides_links_and_latency_counts():
    slow = Topology(bandwidth=1e15, latency_s=0.0, flops=1e9, gather_bytes=0)
    found = plan(topology=slow)
    for cost in found.costs:
        # 4 D operations a pair and head.
        assert cost.compute_s == pytest.approx(4096 * 1024 * 8 * 64 * 4 / 1e9)
        assert cost.time_s == pytest.approx(cost.compute_s, rel=1e-3)
    late = plan(topology=Topology(bandwidth=1e15, latency_s=1.0, gather_bytes=0))
    assert times(late)["ring"] == pytest.approx(3.0)
    # The last result goes home after the last query came.
    assert times(late)["token_ring"] == pytest.approx(4.0)


def test_a_slow_link_of_a_matrix_is_waited_for():
    even = tuple(tuple(1e9 for _ in range(4)) for _ in range(4))
    odd = tuple(tuple(1e8 if (row, column) == (0, 1) else 1e9 for column in range(4)) for row in range(4))
    found = [times(plan(topology=Topology(matrix=matrix, latency_s=0.0, gather_bytes=0))) for matrix in (even, odd)]
    assert found[0]["ring"] == times(plan())["ring"]
    assert found[1]["ring"] > 5 * found[0]["ring"]


@pytest.mark.parametrize("world", [1, 2, 5])
@pytest.mark.parametrize("backward", [False, True])
def test_the_choice_is_the_quickest_that_is_allowed(world, backward):
    for group in (1, 2, 4, 8):
        for kind in ("mesh", "ring", "switch"):
            found = plan(
                group, schemes=None, world=world, length=40 * world, backward=backward, topology=Topology(kind)
            )
            allowed = [place for place, cost in enumerate(found.costs) if cost.is_allowed]
            assert found.costs[min(allowed, key=lambda place: found.auto_s[place])].scheme == found.choice


def test_what_is_compared_is_all_that_runs():
    """A forward pass where no gradient is asked for, else both passes; the costs stay those of the pass that was asked of."""
    ahead, back = (plan(4, schemes=None, backward=backward) for backward in (False, True))
    assert ahead.auto_s == tuple(cost.time_s for cost in ahead.costs)
    both = [one.time_s + other.time_s for one, other in zip(ahead.costs, back.costs, strict=True)]
    assert list(back.auto_s) == both
    assert "both (ms)" in back.explain()
    assert "by the time of forward and backward together" in back.explain()
    assert "both (ms)" not in ahead.explain()
    assert "by the time of a forward pass" in ahead.explain()
    # Room for the blocks of others is asked for once, since both passes say the same.
    room = next(cost.memory_bytes for cost in ahead.costs if cost.scheme == "all_gather")
    for size, is_allowed in ((room, True), (room - 1, False)):
        topology = Topology(bandwidth=1e9, gather_bytes=size)
        for backward in (False, True):
            found = plan(4, schemes=None, backward=backward, topology=topology)
            assert {cost.scheme: cost.is_allowed for cost in found.costs}["all_gather"] == is_allowed
            assert (found.choice == "all_gather") <= is_allowed


@pytest.mark.parametrize("backward", [False, True], ids=["inference", "training"])
def test_auto_runs_what_the_plan_names(backward, monkeypatch):
    """Over a grid: what `auto` takes is `plan_attention`'s choice, and no other scheme is quicker in what is run."""
    from anabranch.cluster.ring import attention, simulated_attention

    ran = []
    monkeypatch.setattr(
        attention,
        "choose",
        lambda *given, choose=attention.choose, **told: ran.append(choose(*given, **told)) or ran[-1],
    )
    differs = 0
    for world, groups, kind, speed in itertools.product((2, 4), (1, 2, 4, 8), ("mesh", "ring", "switch"), (1e8, 5e10)):
        topology = Topology(kind, bandwidth=speed, gather_bytes=0)
        told = {"causal": True, "layout": "zigzag", "topology": topology}
        query, key = torch.zeros(1, 16, 8, 4, requires_grad=backward), torch.zeros(1, 16, groups, 4)
        simulated_attention(query, key, key, world, **told)
        asked = (16, world, 8, groups, 4, torch.float32)
        found = {passes: plan_attention(*asked, **told, backward=passes) for passes in (False, True)}
        assert ran[-1] == found[backward].choice
        seconds = dict(zip((cost.scheme for cost in found[backward].costs), found[backward].auto_s, strict=True))
        allowed = [cost.scheme for cost in found[backward].costs if cost.is_allowed]
        assert seconds[ran[-1]] == min(seconds[name] for name in allowed)
        differs += found[False].choice != found[True].choice
    # Else the grid would not tell the two apart.
    assert differs


def test_without_gradients_auto_runs_the_choice_of_a_forward_pass():
    """Of weights that ask for gradients, where none are recorded."""
    from anabranch.cluster.ring import attention

    queries = Layout("zigzag", 8, 32768).placement
    topology = Topology("ring", bandwidth=5e10, gather_bytes=0)
    parts = [torch.zeros(1, heads, 4096, 64, dtype=torch.bfloat16, requires_grad=True) for heads in (8, 4, 4)]
    options = RingOptions(causal=True, topology=topology)
    asked = (32768, 8, 8, 4, 64, torch.bfloat16)
    names = [
        plan_attention(*asked, layout="zigzag", topology=topology, backward=backward).choice
        for backward in (False, True)
    ]
    assert names[0] != names[1]
    assert attention._settings(parts, queries, queries, options).schedule.scheme == names[1]
    with torch.no_grad():
        assert attention._settings(parts, queries, queries, options).schedule.scheme == names[0]


def test_a_plan_is_plain_values_and_a_table():
    found = plan(4, schemes=None)
    assert found.to_dict()["sizes"]["kv_heads"] == 2
    assert [cost["scheme"] for cost in found.to_dict()["costs"]] == [
        "ring",
        "ring2",
        "token_ring",
        "all_gather",
        "ulysses",
    ]
    lines = found.explain().splitlines()
    assert len(lines) == 3 + len(SCHEMES)
    assert sum(line.startswith("*") for line in lines) == 1
    assert "8 query heads over 2 key heads (groups of 4)" in lines[-1]


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: Topology("star"), ConfigError, "kind is 'star'; use mesh, ring, switch or nodes"),
        (lambda: Topology(bandwidth=0), ConfigError, "bandwidth is 0"),
        (lambda: Topology(flops=-1.0), ConfigError, "flops -1.0"),
        (lambda: Topology("ring", matrix=((1.0,),)), ConfigError, "only a mesh has one"),
        (
            lambda: Topology(matrix=((1.0, 0.0), (1.0, 1.0))),
            ConfigError,
            "matrix must be square, with positive numbers",
        ),
        (
            lambda: plan(topology=Topology(matrix=((1.0, 1.0), (1.0, 1.0)))),
            ConfigError,
            "matrix is of 2 ranks, and there are 4",
        ),
        (measure_topology, InputError, "there is one rank; links are between several"),
        (lambda: plan(kv_heads=3), InputError, "heads is 8, kv_heads 3"),
        (lambda: plan(schemes=["star"]), InputError, "schemes has 'star'; use token_ring"),
        (lambda: plan(world=3, schemes=["ulysses"]), InputError, "none of the schemes ulysses can be used here"),
        (lambda: plan(head_dim=0), InputError, "head_dim 0"),
    ],
)
def test_what_cannot_be_is_said(make, error, said):
    with pytest.raises(error, match=said):
        make()
