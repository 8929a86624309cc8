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


def by_keywords():
    """(what computes, by keywords, from x of rows), of each way that a module may call what rows are told by."""
    torch.manual_seed(0)
    weight, square, bias = torch.randn(24, 16), torch.randn(16, 16), torch.randn(24)
    cell = torch.nn.GRUCell(16, 16)
    parts = (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
    return {
        "linear": lambda x: F.linear(input=x, weight=weight, bias=bias),
        "linear, input first": lambda x: F.linear(x, bias=bias, weight=weight),
        "silu": lambda x: F.silu(input=x),
        "gelu": lambda x: F.gelu(approximate="tanh", input=x),
        "sigmoid": lambda x: torch.sigmoid(input=x),
        "matmul": lambda x: torch.matmul(input=x, other=square),
        "matmul, input first": lambda x: torch.matmul(x, other=square),
        "method": lambda x: x.matmul(other=square),
        "mm": lambda x: torch.mm(input=x, mat2=square),
        "cell": lambda x: torch.gru_cell(
            input=x, hx=x.tanh(), w_ih=parts[0], w_hh=parts[1], b_ih=parts[2], b_hh=parts[3]
        ),
    }


@pytest.mark.parametrize("name", by_keywords())
def test_what_is_given_by_name_is_computed_as_by_its_place(name):
    """peft's HRA and MiSS call the product so."""
    compute, x_ND = by_keywords()[name], torch.randn(37, 16)
    with torch.no_grad(), steady(torch.nn.Module()):
        whole = compute(x_ND)
        assert all(torch.equal(compute(x_ND[row : row + 1])[0], whole[row]) for row in range(len(x_ND)))
    torch.testing.assert_close(whole, compute(x_ND))
