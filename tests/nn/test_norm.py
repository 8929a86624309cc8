import pytest
import torch

from anabranch.nn import RMSNorm


def test_by_hand():
    norm = RMSNorm(2, eps=0.0)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0]))
    # mean square of (3, 4) is 12.5
    torch.testing.assert_close(norm(torch.tensor([3.0, 4.0])), torch.tensor([3.0, 8.0]) / 12.5**0.5)


def test_values_and_gradients_are_the_formula_in_fp64():
    norm = RMSNorm(5, eps=1e-5).double()
    with torch.no_grad():
        norm.weight.normal_()
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    ours = norm(x)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    inputs = (x, norm.weight)
    for gradient, wanted in zip(
        torch.autograd.grad(ours.sin().sum(), inputs), torch.autograd.grad(expected.sin().sum(), inputs), strict=True
    ):
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_and_without_gradients_it_is_the_same_to_the_bit(dtype):
    norm, x = RMSNorm(48), torch.randn(7, 48).to(dtype)
    with torch.no_grad():
        norm.weight.normal_()
        plain = norm(x)
    assert torch.equal(norm(x), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32_and_returned_as_it_came(dtype):
    x = torch.randn(4, 64).to(dtype) * 300  # the square of 300 has no place in fp16
    norm = RMSNorm(64)
    assert norm(x).dtype == dtype
    assert torch.equal(norm(x), norm(x.float()).to(dtype))
    assert torch.isfinite(norm(x)).all()


def test_a_norm_in_bf16_keeps_its_arithmetic():
    norm = RMSNorm(64).bfloat16()
    x = torch.randn(4, 64).bfloat16()
    torch.testing.assert_close(norm(x), RMSNorm(64)(x.float()).bfloat16())


def test_the_scale_of_the_input_does_not_matter_and_zeros_stay():
    x = torch.randn(4, 16)
    norm = RMSNorm(16, eps=1e-12)
    torch.testing.assert_close(norm(x), norm(x * 1000), rtol=1e-5, atol=1e-6)
    assert (norm(torch.zeros(2, 16)) == 0).all()
    assert norm(torch.zeros(0, 16)).shape == (0, 16)


@pytest.mark.parametrize("shape", [(16,), (1, 16), (2, 3, 16), (2, 1, 3, 16)])
def test_any_number_of_leading_sizes_is_rows(shape):
    norm = RMSNorm(16)
    with torch.no_grad():
        norm.weight.normal_()
    x = torch.randn(shape, requires_grad=True)
    rows = x.detach().reshape(-1, 16).requires_grad_()
    assert torch.equal(norm(x), norm(rows).view(shape))
    for ours, wanted in zip(
        torch.autograd.grad(norm(x).sin().sum(), (x, norm.weight)),
        torch.autograd.grad(norm(rows).sin().sum(), (rows, norm.weight)),
        strict=True,
    ):
        assert torch.equal(ours, wanted.view(ours.shape))


@pytest.mark.parametrize("learns", [False, True])
def test_an_offset_is_added_to_the_weight_in_float32(learns):
    norm = RMSNorm(8, eps=1e-6, offset=1.0)
    assert not norm.weight.any()
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    plain = RMSNorm(8, eps=1e-6)
    with torch.set_grad_enabled(learns):
        torch.testing.assert_close(norm(x), plain(x))
        norm.weight.data = torch.full((8,), 2.0**-10).bfloat16()
        plain.weight.data = torch.full((8,), 1 + 2.0**-10)
        # 1 + 2^-10 is 1 in bfloat16.
        torch.testing.assert_close(norm(x), plain(x), rtol=1e-6, atol=0)
