"""What the operator refuses; what it computes is in test_grouped."""

import pytest
import torch

from anabranch.errors import InputError
from anabranch.nn.grouped import expert_mlp
from anabranch.routing.dispatch import DispatchPlan


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("ends", [[3, 1, 4], [5, 4, 4], [-1, 2, 4], [1, 2, 9], [0, 0, -1]])
def test_plans_whose_offsets_fall_or_leave_the_rows_are_refused(ends, backend):
    plan = DispatchPlan(torch.arange(4), torch.tensor(ends, dtype=torch.int32), 4, 1)
    x_ND, weight_NK = torch.randn(4, 32, requires_grad=True), torch.ones(4, 1)
    with pytest.raises(InputError, match=r"must not fall, and lie between 0 and 4|index out of range"):
        expert_mlp(x_ND, plan, weight_NK, torch.randn(3, 64, 32), torch.randn(3, 32, 32), backend=backend)


class _Unwanted(torch.autograd.Function):
    """Gives what it got, and no gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, _):
        return None


def test_a_gradient_that_nobody_has_is_none():
    x_ND, weight_NK = torch.randn(4, 32, requires_grad=True), torch.ones(4, 1)
    plan = DispatchPlan(torch.arange(4), torch.tensor([2, 4], dtype=torch.int32), 4, 1)
    y_ND = expert_mlp(x_ND, plan, weight_NK, torch.randn(2, 64, 32), torch.randn(2, 32, 32))
    (_Unwanted.apply(y_ND).sum() + x_ND.sum()).backward()
    assert torch.equal(x_ND.grad, torch.ones(4, 32))
