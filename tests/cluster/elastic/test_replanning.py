"""The coordinator's plans: from what ranks say of the model, and what they measure."""

import pytest

from anabranch.cluster.elastic import Grid, Layout, Memory, Policy
from anabranch.cluster.elastic.replanning import Replanner

SIGNATURE = {"sizes": [10, 10, 10, 10], "global_batch": 8, "micro_batches": 0, "block": 1}


def replanner(stages=2, policy=None, memory=None, costs=None, told=None, **signature):
    made = Replanner(stages, policy, memory, costs)
    made.signature = {**SIGNATURE, **signature, "policy": told}
    return made


def test_micro_batches_are_twice_the_stages_where_nobody_says():
    assert replanner(3).micro_batches == 6
    assert replanner(3, micro_batches=5).micro_batches == 5


def test_costs_are_those_given_or_measured_or_else_by_parameters():
    assert replanner(costs=[1, 2, 3, 4]).layer_costs == [1, 2, 3, 4]
    made = replanner(sizes=[9, 0, 19, 9])
    assert made.layer_costs == [pytest.approx(one) for one in (10e-9, 1e-9, 20e-9, 10e-9)]
    made.measured({"0": 0.5, "1": 0.25})
    made.measured({"2": 0.125})
    # Not before all are there.
    assert made.layer_costs[0] == pytest.approx(10e-9)
    made.measured({"3": 1.0, "0": 2.0})
    assert made.layer_costs == [2.0, 0.25, 0.125, 1.0]


@pytest.mark.parametrize("wrong", [{"9": 1.0}, {"-1": 1.0}, {"0": float("nan")}, {"0": -1.0}, {"0": float("inf")}])
def test_measures_that_make_no_sense_are_refused_and_spoil_nothing(wrong):
    """Of a layer that is not there: the number of measures never was that of layers, so costs were never those measured."""
    made = replanner()
    with pytest.raises(ValueError, match=r"takes"):
        made.measured({"1": 5.0, **wrong})
    made.measured({str(layer): 1.0 + layer for layer in range(4)})
    assert made.layer_costs == [1.0, 2.0, 3.0, 4.0]


def test_layers_stay_where_they_are_unless_they_may_move():
    made = replanner(costs=[1.0] * 4)
    grid = Grid.full(replicas=2, stages=2).without([2])
    assert made.planned(grid, (2,), moves_layers=False).bounds == (2,)
    # The stage that lost a rank has half the speed.
    assert made.planned(grid, (2,), moves_layers=True).bounds == (3,)
    # From another number of stages there is nothing to keep.
    assert made.planned(Grid.full(replicas=1, stages=3), (2,), moves_layers=False).layout.grid.stages == (
        (0,),
        (1,),
        (2,),
    )


def test_a_newcomer_and_layers_that_move_are_another_layout_and_else_there_is_none():
    made = replanner(costs=[1.0] * 4)
    layout = Layout(Grid.full(replicas=2, stages=2).without([2]), (2,), 4)
    grown = made.grown(layout, [7])
    assert grown.grid.stages == ((0, 1), (3, 7))
    assert grown.bounds == (2,)
    assert made.grown(layout, []).bounds == (3,)
    assert made.grown(Layout(Grid.full(replicas=2, stages=2), (2,), 4), []) is None


def test_a_policy_says_whether_layers_move():
    layout = Layout(Grid.full(replicas=2, stages=2).without([2]), (2,), 4)
    for given, told in (
        (Policy(moves_layers=False), None),
        (None, {"moves_layers": False}),
        (Policy(threshold=0.9), {"threshold": 0.9}),
    ):
        assert replanner(policy=given, costs=[1.0] * 4, told=told).grown(layout, []) is None


def test_where_nothing_fits_layers_stay_and_it_is_said():
    memory = Memory((10.0,) * 4, (10.0,) * 4, cap=1.0)
    made = replanner(costs=[1.0] * 4, memory=memory).planned(
        Grid.full(replicas=2, stages=2).without([2]), (2,), moves_layers=True
    )
    assert made.bounds == (2,)
    assert "layers stay where they are" in made.warnings[0]
