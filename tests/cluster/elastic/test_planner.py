"""The plan after a loss, against everything that could have been chosen."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.cluster.elastic import Grid, Layout, Memory, Policy, plan
from anabranch.cluster.elastic.planner import cut_samples, frequencies
from anabranch.cluster.elastic.stages import minimax, shortest
from anabranch.cluster.elastic.timing import simulate_ranks
from anabranch.errors import InputError

COSTS = st.lists(st.integers(0, 9), min_size=3, max_size=7)


def stage_sums(costs, scales, at, edges=None):
    cut = (0, *at, len(costs))
    edges = [0] * len(costs) if edges is None else [*edges[:-1], 0]
    return [scale * (sum(costs[a:b]) + edges[b - 1]) for scale, (a, b) in zip(scales, pairwise(cut), strict=True)]


def all_bounds(layers, stages):
    return list(combinations(range(1, layers), stages - 1))


@given(COSTS, st.data())
def test_minimax_is_what_exhaustion_finds(costs, data):
    stages = data.draw(st.integers(1, 3))
    scales = data.draw(st.lists(st.integers(1, 4), min_size=stages, max_size=stages))
    edges = data.draw(st.lists(st.integers(0, 5), min_size=len(costs), max_size=len(costs)))
    options = all_bounds(len(costs), stages)
    kept = data.draw(st.sampled_from(options))
    sizes = data.draw(st.lists(st.integers(0, 9), min_size=len(costs), max_size=len(costs)))

    def moved(at):
        return sum(size for n, size in enumerate(sizes) if sum(b <= n for b in at) != sum(b <= n for b in kept))

    found = minimax(costs, scales, boundary_L=edges, kept=kept, size_L=sizes)
    assert found == min(options, key=lambda at: (max(stage_sums(costs, scales, at, edges)), moved(at), at))


@given(COSTS, st.data())
def test_the_shortest_is_what_exhaustion_finds(costs, data):
    stages, micro_batches = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    scales = data.draw(st.lists(st.integers(1, 4), min_size=stages, max_size=stages))

    def bound(at):
        taken = stage_sums(costs, scales, at)
        return max(sum(taken[:p]) + micro_batches * taken[p] for p in range(stages))

    found = shortest(costs, scales, micro_batches)
    assert bound(found) == min(map(bound, all_bounds(len(costs), stages)))
    assert found == min(at for at in all_bounds(len(costs), stages) if bound(at) == bound(found))


@given(COSTS, st.data())
def test_memory_of_shared_state_is_kept(costs, data):
    stages = data.draw(st.integers(1, 3))
    ranks = data.draw(st.lists(st.integers(1, 3), min_size=stages, max_size=stages))
    whole = tuple(data.draw(st.lists(st.integers(0, 5), min_size=len(costs), max_size=len(costs))))
    memory = Memory(whole, tuple(6.0 for _ in costs), data.draw(st.integers(6, 40)))

    def fits(at):
        cut = (0, *at, len(costs))
        return all(
            sum(whole[n] + 6.0 / count for n in range(a, b)) <= memory.cap
            for count, (a, b) in zip(ranks, pairwise(cut), strict=True)
        )

    fitting = [at for at in all_bounds(len(costs), stages) if fits(at)]
    for found in (
        minimax(costs, [1] * stages, memory=memory, ranks_P=ranks),
        shortest(costs, [1] * stages, 4, memory=memory, ranks_P=ranks),
    ):
        assert (found is None) == (not fitting)
        assert found is None or found in fitting
    best = minimax(costs, [1] * stages, memory=memory, ranks_P=ranks)
    if best is not None:
        assert max(stage_sums(costs, [1] * stages, best)) == min(
            max(stage_sums(costs, [1] * stages, at)) for at in fitting
        )


@given(st.data())
def test_no_sample_is_lost_or_doubled(data):
    replicas, stages = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    batch, columns, block = data.draw(st.integers(1, 80)), data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    grid = Grid.full(replicas=replicas, stages=stages)
    lost = data.draw(st.permutations(grid.ranks))[: data.draw(st.integers(0, len(grid.ranks) - 1))]
    left = grid.without(lost).healed()
    edges, cuts_P = cut_samples(left, batch, columns, block)
    assert [n for first, end in edges for n in range(first, end)] == list(range(batch))
    for ranks, cuts in zip(left.stages, cuts_P, strict=True):
        assert [n for cut in cuts for a, b in pairwise(cut) for n in range(a, b)] == list(range(batch))
        for (first, end), cut in zip(edges, cuts, strict=True):
            assert (cut[0], cut[-1], len(cut)) == (first, end, len(ranks) + 1)
            # Between blocks, and as even as blocks allow.
            assert all(at % block == 0 or at == batch for at in cut)
            blocks = [-(-b // block) - a // block for a, b in pairwise(cut) if a < b] + [
                0 for a, b in pairwise(cut) if a == b
            ]
            assert max(blocks) - min(blocks) <= 1


def test_a_plan_is_that_of_the_whole_batch():
    grid = Grid.full(replicas=4, stages=2)
    before = plan(grid, [1e-3] * 8, global_batch=64, micro_batches=4)
    after = plan(grid.without([1]), [1e-3] * 8, global_batch=64, micro_batches=4, previous=before.layout)
    for made in (before, after):
        for stage in made.layout.grid.stages:
            ids = [n for rank in stage for part in made.samples_of(rank) for n in part]
            assert sorted(ids) == list(range(64))
    assert after.step_s > before.step_s
    assert [sum(map(len, after.samples_of(rank))) for rank in (0, 2, 3)] == [22, 21, 21]


def test_layers_move_only_where_it_is_worth_it():
    grid = Grid.full(replicas=4, stages=2)
    before = Layout(grid, (8,), 16)
    common = {"global_batch": 64, "micro_batches": 4, "previous": before, "size_L": [100] * 16}
    left = grid.without([0, 1])
    holders = {0: (2,), 1: (3,)}
    moved = plan(left, [1e-3] * 16, holders=holders, **common)
    assert moved.moves_layers
    assert moved.bounds[0] < 8
    kept = plan(left, [1e-3] * 16, holders=holders, policy=Policy(threshold=0.9), **common)
    assert kept.bounds == (8,)
    assert moved.step_s < 0.9 * kept.step_s
    # A link so slow that the move takes longer than all steps that gain from it.
    slow = plan(left, [1e-3] * 16, holders=holders, policy=Policy(bytes_s=1.0, expected_steps=1), **common)
    assert slow.bounds == (8,)
    assert plan(left, [1e-3] * 16, holders=holders, policy=Policy(moves_layers=False), **common).bounds == (8,)


def test_where_nothing_fits_layers_stay_and_it_is_said():
    grid = Grid.full(replicas=2, stages=2)
    memory = Memory((10.0,) * 4, (10.0,) * 4, 25.0)
    made = plan(
        grid.without([0]), [1e-3] * 4, global_batch=8, micro_batches=2, memory=memory, previous=Layout(grid, (2,), 4)
    )
    assert made.bounds == (2,)
    assert not made.moves_layers
    assert "no cut into 2 stages" in made.warnings[0]


def test_the_clock_of_the_slowest_stage_is_raised_to_the_second():
    policy = Policy(max_frequency=1.3)
    assert frequencies([1.0, 1.2, 1.1], policy) == pytest.approx([1.0, 1.2 / 1.1, 1.0])
    assert frequencies([1.0, 2.0], policy) == [1.0, 1.3]
    assert frequencies([1.0], policy) == [1.0]
    saving = frequencies([0.55, 1.2, 1.1], Policy(max_frequency=1.3, power_save=True, min_frequency=0.6))
    assert saving == pytest.approx([0.6, 1.2 / 1.1, 1.0])
    grid = Grid.full(replicas=4, stages=2)
    usual = plan(grid.without([0]), [1.0] * 2, global_batch=12, micro_batches=1)
    fast = plan(grid.without([0]), [1.0] * 2, global_batch=12, micro_batches=1, policy=Policy(max_frequency=2.0))
    assert fast.frequency_P == pytest.approx((4 / 3, 1.0))
    assert fast.step_s < usual.step_s


def test_even_stages_take_the_law_of_the_pipeline():
    # M + P - 1 columns of b samples with one rank a stage, for 1F1B.
    grid = Grid.full(replicas=2, stages=3)
    made = plan(grid, [1.0] * 3, global_batch=24, micro_batches=4, policy=Policy(schedule_names=("1f1b",)))
    assert made.step_s == pytest.approx((4 + 3 - 1) * 3)
    assert made.timed.idle == pytest.approx(2 / 6)
    assert made.timed.in_flight(0) == 3


@settings(max_examples=20)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from(["1f1b", "gpipe", "zero-bubble", "eager", "decoupled"]),
)
def test_every_order_does_all_its_work_once(replicas, stages, columns, name):
    grid = Grid.full(replicas=replicas, stages=stages)
    _, cuts_P = cut_samples(grid, replicas * columns, columns)
    layout = Layout(grid, tuple(range(1, stages)), stages)
    found = simulate_ranks(layout, cuts_P, [1.0] * stages, name, send_L=[0.1] * stages, frequency_P=[1.0] * stages)
    kinds = ("forward", "backward", "weight") if name in ("zero-bubble", "decoupled") else ("forward", "backward")
    for rank in grid.ranks:
        assert sorted(found.orders[rank]) == sorted((kind, m) for kind in kinds for m in range(columns))
        assert found.busy[rank] == pytest.approx(columns)
    assert found.step_s >= columns


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"global_batch": 0}, "global_batch is 0"),
        ({"micro_batches": 0}, "micro_batches 0"),
        ({"layer_costs": [1.0]}, "1 layers cannot be 2 stages"),
        ({"layer_costs": [1.0, float("nan")]}, "layer_costs"),
        ({"size_L": [1]}, "as many sizes"),
    ],
)
def test_what_cannot_be_planned_is_refused(change, said):
    options = {"layer_costs": [1.0] * 4, "global_batch": 4, "micro_batches": 2, **change}
    costs = options.pop("layer_costs")
    with pytest.raises(InputError, match=said):
        plan(Grid.full(replicas=2, stages=2), costs, **options)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"threshold": 1.0}, "threshold is 1.0"),
        ({"expected_steps": 0}, "expected_steps is 0"),
        ({"bytes_s": 0.0}, "bytes_s is 0.0"),
        # Its stages have several parts of the model each.
        ({"schedule_names": ("interleaved",)}, "schedule_names are"),
        ({"max_frequency": 0.5}, "frequencies are"),
        ({"min_frequency": float("nan")}, "frequencies are"),
    ],
)
def test_what_is_no_policy_is_refused(fields, said):
    with pytest.raises(InputError, match=said):
        Policy(**fields)


def test_what_is_held_is_held_until_the_last_of_its_backward():
    """One stage of zero-bubble does gradients of weights at once; a later one has as many in flight as there are stages."""
    grid = Grid.full(replicas=1, stages=3)
    for name, held in (("1f1b", [3, 2, 1]), ("zero-bubble", [3, 3, 3])):
        policy = Policy(schedule_names=(name,))
        made = plan(grid, [1.0] * 3, global_batch=8, micro_batches=8, policy=policy)
        assert [made.timed.in_flight(rank) for rank in range(3)] == held


def test_costs_may_be_an_array():
    grid = Grid.full(replicas=1, stages=2)
    assert plan(grid, np.ones(4), global_batch=2, micro_batches=1).bounds == (2,)
