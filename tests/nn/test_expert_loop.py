"""The loop over experts: its backward pass by hand against autograd over the naive one, and what it leaves undone."""

import pytest
import torch

from anabranch.errors import InputError
from anabranch.nn.activation import ACTIVATIONS
from anabranch.nn.expert_call import ExpertCall, Needed
from anabranch.nn.expert_loop import backward, forward, plain_experts
from anabranch.routing.decision import Routing
from anabranch.routing.dispatch import plan_dispatch

ITEMS, EXPERTS, CHOICES, DIM, HIDDEN = 7, 4, 2, 6, 5
ALL = Needed(x=True, weight=True, w13=True, w2=True)


def make(activation="swiglu", on_input=False):
    """Some choices are unused, and nobody goes to the last expert."""
    g = torch.Generator().manual_seed(0)
    score = torch.rand(ITEMS, EXPERTS, generator=g)
    score[:, -1] = -1.0
    weight = torch.rand(ITEMS, CHOICES, generator=g, dtype=torch.float64)
    routing = Routing(score.topk(CHOICES, dim=-1).indices, weight, score)
    routing = routing.drop(torch.rand(ITEMS, CHOICES, generator=g) < 0.3)
    plan = plan_dispatch(routing)
    rows = len(ACTIVATIONS[activation].parts) * HIDDEN
    shapes = ((ITEMS, DIM), (EXPERTS, rows, DIM), (EXPERTS, DIM, HIDDEN))
    x, w13, w2 = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes)
    call = ExpertCall(
        x, plan.choice_R, plan.offset_E, routing.weight_NK, w13, w2, on_input, x.dtype, "torch", activation
    )
    return call, torch.randn(ITEMS, DIM, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("on_input", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_autograd_over_the_naive_loop(activation, on_input, keep):
    call, dy = make(activation, on_input)
    y, z = forward(call, keep)
    leaves = [part.clone().requires_grad_() for part in (call.x_ND, call.weight_NK, call.w13_EFD, call.w2_EDF)]
    x, weight, w13, w2 = leaves
    expected = plain_experts(call._replace(x_ND=x, weight_NK=weight, w13_EFD=w13, w2_EDF=w2))
    torch.testing.assert_close(y, expected.detach())
    assert bool(z.numel()) is keep
    for found, wanted in zip(backward(call, z, dy, ALL), torch.autograd.grad(expected, leaves, dy), strict=True):
        torch.testing.assert_close(found, wanted)


def test_gradients_are_added_to_sums_and_left_out_where_nobody_needs_them():
    call, dy = make()
    z = forward(call, True)[1]
    once = backward(call, z, dy, ALL)
    sums = torch.ones_like(call.w13_EFD), torch.ones_like(call.w2_EDF)
    added = backward(call, z, dy, ALL, sums)
    assert (added.w13_EFD is sums[0], added.w2_EDF is sums[1]) == (True, True)
    torch.testing.assert_close(sums, (1 + once.w13_EFD, 1 + once.w2_EDF))
    none = backward(call, z, dy, Needed(x=False, weight=True, w13=False, w2=False))
    assert [part.numel() for part in (none.x_ND, none.w13_EFD, none.w2_EDF)] == [0, 0, 0]
    assert torch.equal(none.weight_NK, once.weight_NK)


def test_idle_experts_have_gradients_of_zero(monkeypatch):
    """Buffers are made without being filled: here they hold NaN until somebody writes."""
    fresh = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda like, **options: fresh(like, **options).fill_(torch.nan))
    call, dy = make()
    made = backward(call, forward(call, False)[1], dy, ALL)
    for gradient in (made.w13_EFD, made.w2_EDF):
        assert gradient.isfinite().all()
        assert not gradient[-1].any()


@pytest.mark.parametrize("ends", [[3, 2, 5, 5], [-1, 2, 5, 5], [2, 5, 9, 99]])
def test_ends_that_fall_or_leave_the_plan_are_refused(ends):
    call, dy = make()
    wrong = call._replace(offset_E=torch.tensor(ends, dtype=torch.int32))
    for run in (lambda: forward(wrong, False), lambda: plain_experts(wrong), lambda: backward(wrong, dy[:0], dy, ALL)):
        with pytest.raises(InputError, match=r"offset_E is .*; it must not fall, and lie between 0 and 14, the rows"):
            run()
