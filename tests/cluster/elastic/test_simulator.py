"""A step after losses, ours and by two other ways."""

import math

import pytest

from anabranch.cluster.elastic import Grid, Policy, compare
from anabranch.cluster.elastic.simulator import MORE_ARMS, recycle_step_s, staggered_step_s, torchft_step_s
from anabranch.errors import InputError

CASE = {"replicas": 4, "stages": 4, "layer_costs": [1e-3] * 16, "micro_batches": 8, "micro_batch": 4}


def test_without_losses_all_are_alike():
    found = compare(**CASE, lost=[])
    for taken in found.step_s.values():
        assert taken == pytest.approx(found.whole_s)


def test_dropping_a_pipeline_by_hand():
    # Four pipelines of two stages, one lost: the others do 8 * 4 / 3 micro-batches, rounded up, of a second each.
    grid = Grid.full(replicas=4, stages=2)
    assert torchft_step_s(grid, grid.without([5]), [1.0, 1.0], 8, ("1f1b",)) == pytest.approx(11 + 1)
    assert torchft_step_s(grid, grid.without([0, 1, 6, 7]), [1.0, 1.0], 8) == math.inf


def test_whole_micro_batches_by_hand():
    # One stage: 8 micro-batches of the lost one, in turns to three others.
    grid = Grid.full(replicas=4, stages=1)
    assert recycle_step_s(grid.without([1]), [1.0], 8) == pytest.approx(8 + 3)
    assert recycle_step_s(grid.without([1, 2]), [1.0], 8) == pytest.approx(8 + 8)
    assert recycle_step_s(grid, [1.0], 8) == pytest.approx(8)
    assert recycle_step_s(Grid(((), (4,)), 1), [1.0, 1.0], 2) == math.inf


def test_a_backward_in_two_parts_by_hand():
    """Forward, backward and gradients of weights take 1 s each.

    One pipeline of two stages, two micro-batches: the first stage does F0 F1, waits for B0 until 3, fills the wait for B1 with W0, does B1
    at 5 and W1 at 6; the second is done as late. With a whole backward it is (2 + 1) * 3.
    """
    grid = Grid.full(replicas=1, stages=2)
    assert recycle_step_s(grid, [3.0, 3.0], 2, ("1f1b",)) == pytest.approx(9)
    assert recycle_step_s(grid, [3.0, 3.0], 2, ("decoupled",)) == pytest.approx(7)
    # The second stage begins a second later than the first in each step: what it puts off then changes nothing.
    assert staggered_step_s(grid, [3.0, 3.0], 2) == pytest.approx(7)
    # Until its ranks have the next weights nothing of a stage begins; here the first stage is what the next step waits for.
    assert staggered_step_s(grid, [3.0, 3.0], 2, optimizer_s=0.5) == pytest.approx(7.5)
    assert staggered_step_s(Grid(((), (4,)), 1), [1.0, 1.0], 2) == math.inf


@pytest.mark.parametrize(("stages", "micro_batches", "lost"), [(3, 4, []), (4, 4, [5]), (2, 6, [0, 3])])
def test_work_that_is_put_off_never_makes_a_step_longer_nor_shorter_than_its_work(stages, micro_batches, lost):
    grid = Grid.full(replicas=4, stages=stages).without(lost)
    stage_s = [3.0] * stages
    whole = recycle_step_s(grid, stage_s, micro_batches)
    apart = recycle_step_s(grid, stage_s, micro_batches, ("1f1b", "eager", "decoupled"))
    staggered = staggered_step_s(grid, stage_s, micro_batches)
    # The least that the ranks of the stage with most losses can do it in.
    least = max(3.0 * micro_batches * 4 / len(ranks) for ranks in grid.stages)
    assert least <= staggered * (1 + 1e-9)
    assert staggered <= apart * (1 + 1e-9)
    assert apart <= whole


def test_arms_that_are_asked_for_are_compared_too():
    found = compare(**CASE, lost=[5], also=MORE_ARMS)
    assert list(found.step_s) == ["elaswave", "recycle", "torchft", *MORE_ARMS]
    taken = found.step_s
    assert taken["recycle-staggered"] < taken["recycle-decoupled"] < taken["recycle"]
    assert taken["elaswave-decoupled"] < taken["elaswave"]
    assert found.to_dict()["throughput_over"].keys() == {"recycle", "torchft", *MORE_ARMS}
    with pytest.raises(InputError, match="also has 'recycled'"):
        compare(**CASE, lost=[5], also=["recycled"])


@pytest.mark.parametrize("lost", [[0], [5], [15], [4, 5], [1, 14], [0, 5, 10]])
def test_ours_is_not_behind(lost):
    found = compare(**CASE, lost=lost)
    assert found.ratio("recycle") >= 1
    assert found.ratio("torchft") >= 1
    assert found.plan.layout.grid.ranks == tuple(rank for rank in range(16) if rank not in lost)


@pytest.mark.slow
@pytest.mark.parametrize(("replicas", "stages"), [(8, 12), (12, 8)])
@pytest.mark.parametrize("micro_batches", [16, 32])
def test_ours_is_not_behind_at_96_ranks(replicas, stages, micro_batches):
    for count in (1, 2, 3, 4):
        lost = [(7 * n + 3) * replicas // 2 % 96 for n in range(count)]
        found = compare(
            replicas=replicas,
            stages=stages,
            layer_costs=[1e-3] * 64,
            micro_batches=micro_batches,
            micro_batch=8,
            lost=lost,
        )
        assert found.ratio("recycle") >= 1
        assert found.ratio("torchft") >= 1


def test_what_is_told():
    told = compare(**CASE, lost=[0, 1, 2, 7], policy=Policy(bytes_s=1e9), size_L=[1000] * 16).to_dict()
    assert told["lost"] == [0, 1, 2, 7]
    assert told["step_s"]["torchft"] is None
    assert told["throughput_over"]["torchft"] is None
    assert told["throughput_over"]["recycle"] > 1
    assert told["plan"]["reduce_s"] > 0
    assert told["plan"]["moves"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lost": [0, 0]}, "lost once"),
        ({"lost": [99]}, "rank 99 is in no stage"),
        ({"lost": list(range(16))}, "no rank is left"),
        ({"lost": [0], "micro_batch": 0}, "micro_batch is 0"),
        ({"lost": [0], "micro_batches": 100_000}, "too many to simulate"),
        ({"lost": [0], "stages": 17}, "16 layers cannot be"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, said):
    with pytest.raises(InputError, match=said):
        compare(**{**CASE, **change})
