"""Which back end multiplies in bf16 where the CPU has matrix units; what they compute is in test_grouped."""

import pytest
import torch

from anabranch.errors import InputError
from anabranch.nn.grouped import expert_mlp
from anabranch.nn.operator import MANY_PRODUCTS, _fills_matrix_units
from anabranch.routing.dispatch import DispatchPlan


@pytest.mark.parametrize(
    ("rows", "experts", "dim", "hidden_dim", "fills"),
    [
        (16384, 64, 256, 128, False),  # 256 rows an expert of 32 K numbers
        (4096, 8, 512, 1024, False),
        (8192, 8, 512, 1024, True),
        (8192, 16, 1024, 1024, True),
        (15, 1, 1024, 1024, False),
        (16, 1, 256, 256, True),  # one expert has as many rows in every step
        (0, 8, 256, 256, False),
    ],
)
def test_matrices_that_pay_for_code_of_their_own(rows, experts, dim, hidden_dim, fills):
    assert _fills_matrix_units(rows, experts, dim, hidden_dim) is fills


def test_the_bound_is_on_rows_of_one_expert():
    assert _fills_matrix_units(2 * MANY_PRODUCTS, 2, 1, 1)
    assert not _fills_matrix_units(2 * MANY_PRODUCTS - 1, 2, 1, 1)


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("ends", [[3, 1, 4], [5, 4, 4], [-1, 2, 4], [1, 2, 9], [0, 0, -1]])
def test_plans_whose_offsets_fall_or_leave_the_rows_are_refused(ends, backend):
    plan = DispatchPlan(torch.arange(4), torch.tensor(ends, dtype=torch.int32), 4, 1)
    x_ND, weight_NK = torch.randn(4, 32, requires_grad=True), torch.ones(4, 1)
    with pytest.raises(InputError, match=r"must not fall, and lie between 0 and 4|index out of range"):
        expert_mlp(x_ND, plan, weight_NK, torch.randn(3, 64, 32), torch.randn(3, 32, 32), backend=backend)
