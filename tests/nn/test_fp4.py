"""Numbers in FP4: by hand, packed and back, and the products of kernels and of torch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.nn import kernels
from anabranch.nn.fp4 import TWICE, half_powers
from anabranch.nn.kernels import packed as native
from anabranch.nn.packed import Packed

needs_kernels = pytest.mark.skipif(kernels.load() is None, reason="no compiler")


def made(rows, depth, seed=0, low=118, high=128):
    """(what is packed, its float32 weights [N, K], worked out here)."""
    g = torch.Generator().manual_seed(seed)
    code_NK = torch.randint(0, 16, (rows, depth), generator=g, dtype=torch.uint8)
    exponent_NG = torch.randint(low, high, (rows, depth // 32), generator=g, dtype=torch.uint8)
    values = [code % 8 and [0, 0.5, 1, 1.5, 2, 3, 4, 6][code % 8] * (-1 if code > 7 else 1) for code in range(16)]
    weight_NK = torch.tensor(values)[code_NK.long()].double() * 2.0 ** (exponent_NG.double() - 127).repeat_interleave(
        32, 1
    )
    return Packed.of_integers(code_NK, half_powers(exponent_NG), None, "fp4"), weight_NK.float()


def test_half_powers_are_exact_at_every_exponent():
    found = half_powers(torch.arange(255, dtype=torch.uint8))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.double(), 2.0 ** (torch.arange(255).double() - 128))


def test_by_hand():
    """One row: 0.5 x 2, then -6 x 2 in the last column; the rest zeros."""
    code = torch.zeros(1, 32, dtype=torch.uint8)
    code[0, 0], code[0, 31] = 1, 15
    packed = Packed.of_integers(code, half_powers(torch.tensor([[128]], dtype=torch.uint8)), None, "fp4")
    row = packed.unpack()[0, 0]
    assert (row[0], row[31], int(row[1:31].count_nonzero())) == (1.0, -12.0, 0)
    assert packed.nbytes == 16 * (16 + 4)
    assert TWICE[15] == -12


@pytest.mark.parametrize("rows", [1, 16, 33])
def test_packing_and_unpacking_are_inverses(rows):
    packed, weight = made(rows, 96)
    assert torch.equal(packed.unpack()[0], weight)
    assert torch.equal(packed.rows_at(torch.tensor([rows - 1, 0])), weight[[rows - 1, 0]])
    again = Packed.of_integers(*packed.integers()[:2], None, "fp4")
    assert torch.equal(again.data, packed.data)


@needs_kernels
@given(rows=st.integers(1, 50), groups=st.integers(1, 6), count=st.integers(1, 30), seed=st.integers(0, 99))
def test_products_are_those_of_the_numbers_and_rounded_activations(rows, groups, count, seed):
    packed, weight = made(rows, 32 * groups, seed)
    x = torch.randn(count, 32 * groups, generator=torch.Generator().manual_seed(seed + 1))
    # Whole numbers of at most 127 are not rounded where the largest is 127.
    whole = (x * 20).round().clamp(-127, 127).unflatten(1, (-1, 32))
    whole[:, :, 0] = 127
    whole = whole.flatten(1)
    found = native.linear(packed, whole)
    wanted = (whole.double() @ weight.double().t()).float()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-3)


@needs_kernels
def test_a_row_has_the_same_bits_in_any_company():
    packed, _ = made(70, 128)
    x = torch.randn(29, 128)
    assert torch.equal(native.linear(packed, x), torch.cat([native.linear(packed, row[None]) for row in x]))


def test_exponents_at_both_ends():
    packed, weight = made(16, 64, low=0, high=255)
    assert torch.equal(packed.unpack()[0], weight)
