import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import ConfigError
from anabranch.routing import (
    UNUSED,
    Routing,
    capacity_of,
    combine,
    dispatch,
    limit_capacity,
    pad_rows,
    plan_dispatch,
    unpad_rows,
)
from strategies import random_routing, routings

# -- the plan


def test_plan_by_hand():
    index_NK = torch.tensor([[1, 0], [UNUSED, 1], [0, 2]])
    plan = plan_dispatch(Routing(index_NK, torch.ones(3, 2), torch.ones(3, 4)))
    # destination 0: choices 1 and 4; 1: choices 0 and 3; 2: choice 5; 3: none; unused: choice 2
    assert plan.choice_R.tolist() == [1, 4, 0, 3, 5, 2]
    assert plan.offset_E.tolist() == [2, 4, 5, 5]
    assert plan.load_E.tolist() == [2, 2, 1, 0]
    assert plan.item_R.tolist() == [0, 2, 0, 1, 2, 1]
    assert plan.used_R.tolist() == [True] * 5 + [False]
    assert (plan.choice_R.dtype, plan.offset_E.dtype) == (torch.int64, torch.int32)


@given(routings())
def test_rows_are_sorted_by_destination_and_stand_in_item_order_within_one(routing):
    plan = plan_dispatch(routing)
    assert sorted(plan.choice_R.tolist()) == list(range(routing.index_NK.numel()))
    flat = routing.index_NK.flatten().tolist()
    key = [(math.inf if flat[choice] == UNUSED else flat[choice], choice) for choice in plan.choice_R.tolist()]
    assert key == sorted(key)
    assert plan.load_E.tolist() == routing.load_E().tolist()


def test_many_destinations_need_a_wider_sort_key():
    index_N1 = torch.tensor([[40000], [5], [32767], [UNUSED]])
    plan = plan_dispatch(Routing(index_N1, torch.ones(4, 1), torch.ones(4, 40001)))
    assert plan.choice_R.tolist() == [1, 2, 0, 3]


# -- dispatch and combine


@given(routings(), st.integers(0, 2**16))
def test_dispatch_then_combine_is_identity_times_used_choices(routing, seed):
    x_ND = torch.randn(routing.num_items, 3, generator=torch.Generator().manual_seed(seed))
    plan = plan_dispatch(routing)
    y_ND = combine(dispatch(x_ND, plan), plan)
    torch.testing.assert_close(y_ND, x_ND * routing.used_NK.sum(-1, keepdim=True))


@given(st.integers(0, 20), st.integers(1, 5), st.integers(0, 2**16))
def test_with_one_choice_per_item_combine_undoes_dispatch_to_the_bit(num_items, num_destinations, seed):
    routing = random_routing(num_items, num_destinations, 1, seed=seed)
    x_ND = torch.randn(num_items, 4, generator=torch.Generator().manual_seed(seed))
    plan = plan_dispatch(routing)
    assert torch.equal(combine(dispatch(x_ND, plan), plan), x_ND)


@given(routings())
def test_combine_is_the_weighted_sum_of_a_naive_loop(routing):
    rows_RD = torch.randn(routing.index_NK.numel(), 3, dtype=torch.float64)
    plan = plan_dispatch(routing)
    expected_ND = torch.zeros(routing.num_items, 3, dtype=torch.float64)
    for row, choice in enumerate(plan.choice_R.tolist()[: int(plan.offset_E[-1])]):
        n, k = divmod(choice, routing.num_choices)
        expected_ND[n] += routing.weight_NK[n, k].double() * rows_RD[row]
    torch.testing.assert_close(combine(rows_RD, plan, routing.weight_NK), expected_ND, rtol=1e-12, atol=1e-12)


@given(routings(min_items=1), st.integers(0, 2**16))
def test_permuting_items_permutes_the_result(routing, seed):
    generator = torch.Generator().manual_seed(seed)
    order_N = torch.randperm(routing.num_items, generator=generator)
    x_ND = torch.randn(routing.num_items, 3, generator=generator)
    permuted = Routing(routing.index_NK[order_N], routing.weight_NK[order_N], routing.score_NE[order_N])

    def through(x_ND, routing):
        plan = plan_dispatch(routing)
        return combine(dispatch(x_ND, plan) * 2, plan, routing.weight_NK)

    torch.testing.assert_close(through(x_ND[order_N], permuted), through(x_ND, routing)[order_N])


def test_gradients_of_dispatch_and_combine():
    routing = random_routing(5, 3, 2, dtype=torch.float64, unused=0.3)
    plan = plan_dispatch(routing)
    x_ND = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    weight_NK = routing.weight_NK.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: combine(dispatch(x, plan).sin(), plan, w), (x_ND, weight_NK))


def test_rows_of_unused_choices_are_never_read():
    routing = random_routing(6, 3, 2, unused=0.5)
    plan = plan_dispatch(routing)
    rows_RD = torch.randn(12, 4)
    poisoned_RD = rows_RD.masked_fill(~plan.used_R.unsqueeze(-1), torch.nan)
    for weight_NK in (None, routing.weight_NK):
        assert torch.equal(combine(poisoned_RD, plan, weight_NK), combine(rows_RD, plan, weight_NK))


def test_bf16_rows_are_summed_in_fp32():
    # 256 + 1 is 256 in bf16, where steps are 2 wide; in fp32 256 + 1 + 1 is 258, which bf16 holds
    routing = Routing(torch.tensor([[0, 1, 2]]), torch.ones(1, 3), torch.ones(1, 3))
    plan = plan_dispatch(routing)
    rows_RD = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    for weight_NK in (None, routing.weight_NK):
        y_ND = combine(rows_RD, plan, weight_NK)
        assert y_ND.dtype == torch.bfloat16
        assert y_ND.item() == 258.0


def test_combine_stays_in_fp32_under_autocast():
    routing = random_routing(8, 4, 3)
    plan = plan_dispatch(routing)
    rows_RD = torch.randn(24, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y_ND = combine(rows_RD, plan, routing.weight_NK)
    assert torch.equal(y_ND, combine(rows_RD, plan, routing.weight_NK))
    exact_ND = combine(rows_RD.double(), plan, routing.weight_NK.double())
    torch.testing.assert_close(y_ND.double(), exact_ND, rtol=1e-6, atol=1e-6)


def test_non_contiguous_items():
    routing = random_routing(6, 4, 2)
    x_ND = torch.randn(3, 6).T
    plan = plan_dispatch(routing)
    torch.testing.assert_close(combine(dispatch(x_ND, plan), plan), 2 * x_ND)


def test_dispatch_and_combine_compile_into_one_graph():
    def through(x_ND, index_NK, weight_NK):
        plan = plan_dispatch(Routing(index_NK, weight_NK, weight_NK.new_ones(x_ND.shape[0], 4)))
        return combine(dispatch(x_ND, plan).relu(), plan, weight_NK)

    routing = random_routing(7, 4, 2, unused=0.2)
    arguments = torch.randn(7, 3), routing.index_NK, routing.weight_NK
    compiled = torch.compile(through, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), through(*arguments))


# -- capacity


def test_capacity_is_rounded_up():
    assert capacity_of(10, 2, 4, 1.0) == 5
    assert capacity_of(10, 2, 3, 1.0) == 7
    assert capacity_of(10, 2, 4, 1.25) == 7  # ceil(6.25)
    assert capacity_of(0, 2, 4, 1.25) == 0


@pytest.mark.parametrize("factor", [0, -1.0])
def test_capacity_factor_must_be_positive(factor):
    with pytest.raises(ConfigError, match=rf"capacity_factor is {factor}; it must be greater than 0"):
        capacity_of(10, 2, 4, factor)


def naive_limit(routing, capacity, order):
    """Which choices stay, one by one."""
    choices = [divmod(choice, routing.num_choices) for choice in range(routing.index_NK.numel())]
    if order == "score":
        choices.sort(key=lambda choice: -routing.weight_NK[choice].item())  # sort is stable
    taken = [0] * routing.num_destinations
    index_NK = torch.full_like(routing.index_NK, UNUSED)
    for choice in choices:
        destination = int(routing.index_NK[choice])
        if destination != UNUSED and taken[destination] < capacity:
            taken[destination] += 1
            index_NK[choice] = destination
    return index_NK


@given(routings(), st.integers(0, 6), st.sampled_from(["token", "score"]))
def test_who_stays_is_what_a_naive_loop_says(routing, capacity, order):
    limited = limit_capacity(routing, capacity, order=order)
    assert torch.equal(limited.index_NK, naive_limit(routing, capacity, order))
    assert limited.load_E().max() <= capacity
    assert (limited.weight_NK[~limited.used_NK] == 0).all()
    assert torch.equal(limited.weight_NK[limited.used_NK], routing.weight_NK[limited.used_NK])


def test_equal_scores_stay_in_token_order():
    routing = Routing(torch.zeros(4, 1, dtype=torch.int64), torch.full((4, 1), 0.5), torch.ones(4, 2))
    assert limit_capacity(routing, 2, order="score").used_NK.flatten().tolist() == [True, True, False, False]


def test_the_drop_ratio_is_what_is_missing_of_the_load():
    # all 6 of 6 items to destination 0, capacity ceil(1.0 * 6 / 3) = 2: 4 of 6 dropped
    routing = Routing(torch.zeros(6, 1, dtype=torch.int64), torch.ones(6, 1), torch.ones(6, 3))
    limited = limit_capacity(routing, capacity_of(6, 1, 3, 1.0))
    assert 1 - limited.load_E().sum() / routing.load_E().sum() == pytest.approx(4 / 6)


@given(routings(), st.integers(0, 6))
def test_renormalized_weights_sum_to_what_they_summed_to(routing, capacity):
    limited = limit_capacity(routing, capacity, renormalize=True)
    assert torch.isfinite(limited.weight_NK).all()
    kept_N = (limited.weight_NK > 0).any(-1)
    torch.testing.assert_close(limited.weight_NK.sum(-1)[kept_N], routing.weight_NK.sum(-1)[kept_N])
    assert (limited.weight_NK[~kept_N] == 0).all()


def test_renormalizing_keeps_gradients_finite_where_an_item_lost_everything():
    weight_NK = torch.tensor([[0.3, 0.2], [0.6, 0.1]], requires_grad=True)
    routing = Routing(torch.tensor([[0, 1], [0, 1]]), weight_NK, torch.rand(2, 2))
    limit_capacity(routing, 1, renormalize=True).weight_NK.square().sum().backward()
    # item 0 keeps both: sum of w^2, gradient 2 w; item 1 loses both
    torch.testing.assert_close(weight_NK.grad, torch.tensor([[0.6, 0.4], [0.0, 0.0]]))


@given(routings())
def test_unpad_undoes_pad(routing):
    plan = plan_dispatch(routing)
    rows_RD = torch.randn(routing.index_NK.numel(), 3)
    capacity = int(routing.load_E().max())
    rows_ECD = pad_rows(rows_RD, plan, capacity)
    assert rows_ECD.shape == (routing.num_destinations, capacity, 3)
    torch.testing.assert_close(unpad_rows(rows_ECD, plan), rows_RD * plan.used_R.unsqueeze(-1))


def test_padded_rows_by_hand():
    plan = plan_dispatch(Routing(torch.tensor([[1], [0], [1]]), torch.ones(3, 1), torch.ones(3, 3)))
    rows_ECD = pad_rows(torch.tensor([[10.0], [20.0], [30.0]]), plan, 2)
    assert rows_ECD.squeeze(-1).tolist() == [[10.0, 0.0], [20.0, 30.0], [0.0, 0.0]]


def test_rows_beyond_the_capacity_are_an_error_not_a_neighbours_rows():
    plan = plan_dispatch(Routing(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1), torch.ones(3, 2)))
    with pytest.raises(ConfigError, match=r"capacity is 2, but a destination has 3 rows; limit_capacity"):
        pad_rows(torch.ones(3, 1), plan, 2)
