"""Inside `steady` a row's result is the same to the bit in whatever company, place and memory layout it stands."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from anabranch.serving.engine.steady import TILE, steady

WIDTH = 12  # no whole number of vectors
LAYOUTS = {
    "rows": lambda x_ND: x_ND,
    "left half": lambda x_ND: torch.cat([x_ND, torch.randn_like(x_ND)], -1).chunk(2, -1)[0],
    "right half": lambda x_ND: torch.cat([torch.randn_like(x_ND), x_ND], -1).chunk(2, -1)[1],
    "columns": lambda x_ND: x_ND.T.contiguous().T,
    "every other row": lambda x_ND: torch.stack([x_ND, torch.randn_like(x_ND)], 1)[:, 0],
}
WEIGHT = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(0))
FUNCTIONS = {
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "softplus": F.softplus,
    "exp": torch.exp,
    "linear": lambda x_ND: F.linear(x_ND, WEIGHT),
    "matmul": lambda x_ND: x_ND @ WEIGHT.T,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_row_is_the_same_in_any_company(name, layout):
    generator = torch.Generator().manual_seed(0)
    x_D = torch.randn(WIDTH, generator=generator)
    with steady(nn.Module()):
        expected_D = FUNCTIONS[name](x_D[None])[0]
        for num in (1, TILE - 1, TILE, TILE + 1, 2 * TILE, 2 * TILE + 5):
            for place in {0, num // 2, num - 1}:
                x_ND = torch.randn(num, WIDTH, generator=generator)
                x_ND[place] = x_D
                made_D = FUNCTIONS[name](LAYOUTS[layout](x_ND))[place]
                assert torch.equal(made_D, expected_D), f"row {place} of {num}"
