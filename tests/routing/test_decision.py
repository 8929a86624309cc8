import pytest
import torch
from hypothesis import given

from anabranch.routing import UNUSED, Router, Routing, count_destinations, plan_dispatch
from strategies import random_routing, routings


def test_load_by_hand():
    index_NK = torch.tensor([[0, 2], [2, UNUSED], [2, 1]])
    routing = Routing(index_NK, torch.ones(3, 2), torch.ones(3, 4))
    assert routing.load_E().tolist() == [1, 1, 3, 0]
    assert routing.load_E().dtype == torch.int64
    assert (routing.num_items, routing.num_choices, routing.num_destinations) == (3, 2, 4)
    assert routing.used_NK.tolist() == [[True, True], [True, False], [True, True]]


@given(routings())
def test_load_counts_every_used_choice_once(routing):
    flat = [e for e in routing.index_NK.flatten().tolist() if e != UNUSED]
    assert routing.load_E().tolist() == [flat.count(e) for e in range(routing.num_destinations)]
    if routing.used_NK.all():
        assert routing.load_E().sum() == routing.num_items * routing.num_choices


def test_drop_makes_choices_unused_and_keeps_the_rest():
    routing = random_routing(5, 4, 2)
    dropped_NK = torch.zeros(5, 2, dtype=torch.bool)
    dropped_NK[1, 0] = dropped_NK[3, 1] = True
    left = routing.drop(dropped_NK)
    assert left.index_NK[dropped_NK].tolist() == [UNUSED, UNUSED]
    assert left.weight_NK[dropped_NK].tolist() == [0.0, 0.0]
    assert torch.equal(left.index_NK[~dropped_NK], routing.index_NK[~dropped_NK])
    assert torch.equal(left.weight_NK[~dropped_NK], routing.weight_NK[~dropped_NK])
    assert left.score_NE is routing.score_NE
    assert routing.used_NK.all()  # the original is a value: it has not changed


def test_drop_broadcasts_over_choices():
    left = random_routing(3, 4, 2).drop(torch.tensor([[True], [False], [False]]))
    assert left.used_NK.tolist() == [[False, False], [True, True], [True, True]]


def test_no_gradient_flows_through_a_dropped_choice():
    weight_NK = torch.rand(3, 2, requires_grad=True)
    routing = Routing(torch.zeros(3, 2, dtype=torch.int64), weight_NK, torch.rand(3, 4))
    routing.drop(torch.tensor([[True, False]] * 3)).weight_NK.sum().backward()
    assert weight_NK.grad.tolist() == [[0.0, 1.0]] * 3


def test_count_takes_non_contiguous_and_empty_input():
    index_KN = torch.tensor([[0, 1, 1], [2, UNUSED, 2]])
    assert count_destinations(index_KN.T, 3).tolist() == [1, 2, 2]
    assert count_destinations(index_KN[:, :0], 3).tolist() == [0, 0, 0]


def test_unused_is_minus_one():
    """What files of traces hold, and other programs compare with."""
    assert UNUSED == -1


def test_names_of_before_are_read_with_a_warning():
    routing = Routing(torch.tensor([[1, 0]]), torch.ones(1, 2), torch.ones(1, 3))
    plan, router = plan_dispatch(routing), Router.Config().build(4, 3)
    for holder, old, value in (
        (routing, "num_places", 2),
        (plan, "num_places", 2),
        (router, "num_places", router.num_choices),
        (router.select, "num_places", router.num_choices),
    ):
        with pytest.warns(DeprecationWarning, match=f"{old} of {type(holder).__name__} is called num_choices"):
            assert getattr(holder, old) == value
    with pytest.warns(DeprecationWarning, match="place_R of DispatchPlan is called choice_R"):
        assert torch.equal(plan.place_R, plan.choice_R)
