"""The contract of a pool of experts."""
# Shapes: N items, E experts, K choices per item, D width, F hidden

import copy

import torch
from torch import Tensor, nn

from anabranch.nn import ExpertPool
from anabranch.routing import (
    UNUSED,
    Routing,
    TopK,
)
from anabranch.testing.shared import (
    NUM_ITEMS,
    check_copies,
    expect,
    expect_close,
)


def check_pool(pool: ExpertPool, *, device: str = "cpu") -> None:
    """A pool equals its experts one by one, in values and gradients, and leaves idle experts alone."""
    pool = copy.deepcopy(pool).to(device).float()
    generator = torch.Generator().manual_seed(0)
    num_experts = pool.num_experts
    x_ND = torch.randn(NUM_ITEMS, pool.dim, generator=generator).to(device).requires_grad_()
    score_NE = torch.rand(NUM_ITEMS, num_experts, generator=generator).to(device)
    routing = TopK.Config(top_k=min(2, num_experts)).build(num_experts)(
        score_NE, open_NE=torch.arange(num_experts, device=device) < max(1, num_experts - 1)
    )
    y_ND = pool(x_ND, routing)
    expected_ND = _naive_experts(pool, x_ND, routing)
    expect_close(y_ND, expected_ND, "the output")
    direction_ND = torch.randn(y_ND.shape, generator=generator).to(device)
    inputs = (x_ND, *pool.stacks)
    ours = torch.autograd.grad((y_ND * direction_ND).sum(), inputs)
    naive = torch.autograd.grad((expected_ND * direction_ND).sum(), inputs)
    for name, gradient, wanted in zip(("x", "w13", "w2"), ours, naive, strict=True):
        expect_close(gradient, wanted, f"the gradient of {name}")
        if num_experts > 1 and name != "x":
            expect((gradient[-1] == 0).all(), f"an idle expert has a gradient in {name}")
    empty = Routing(routing.index_NK[:0], routing.weight_NK[:0], routing.score_NE[:0])
    expect(pool(x_ND[:0], empty).shape == (0, pool.dim), "no items do not give no outputs")
    check_copies(pool, lambda module: module(x_ND, routing))


def _naive_experts(pool: ExpertPool, x_ND: Tensor, routing: Routing) -> Tensor:
    rows, (w13_EFD, w2_EDF) = [], pool.stacks
    for n in range(routing.num_items):
        y_D = torch.zeros_like(x_ND[n])
        for e, weight in zip(routing.index_NK[n].tolist(), routing.weight_NK[n], strict=True):
            if e != UNUSED:
                gate_F, up_F = (w13_EFD[e] @ x_ND[n]).chunk(2)
                y_D = y_D + weight * (w2_EDF[e] @ (nn.functional.silu(gate_F) * up_F))
        rows.append(y_D)
    return torch.stack(rows)
