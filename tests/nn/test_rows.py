"""The compiled passes over rows against the same in double precision, in every layout, with any number of threads."""

import pytest
import torch

from anabranch.nn import RMSNorm, kernels
from anabranch.nn.kernels import rows
from anabranch.nn.rotary import Rotary, rotate
from anabranch.nn.weighted import weighted_sum

pytestmark = pytest.mark.skipif(kernels.load() is None, reason="no compiler")

ROUGH = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}
TYPES = pytest.mark.parametrize("dtype", list(ROUGH))


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(function, inputs, dy):
    """(y, gradients) in the inputs' type."""
    inputs = [part.detach().clone(memory_format=torch.preserve_format).requires_grad_() for part in inputs]
    y = function(*inputs)
    return y.detach(), torch.autograd.grad(y, inputs, dy.to(y.dtype))


def check(ours, twin, inputs, dy):
    """Equal to the twin in double precision within what the type can hold."""
    y, found = gradients(ours, inputs, dy)
    wanted_y, wanted = gradients(twin, [part.double() for part in inputs], dy)
    for part, wish in zip((y, *found), (wanted_y, *wanted), strict=True):
        scale = max(1.0, wish.abs().max().item())
        torch.testing.assert_close(part.double() / scale, wish / scale, **ROUGH[y.dtype])
    return y, found


def plain_norm(x, weight_D):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight_D


def norm_of(x, weight_D):
    norm = RMSNorm(len(weight_D))
    del norm.weight  # a tensor with its own gradient in the parameter's place
    norm.weight = weight_D
    return norm(x)


@TYPES
@pytest.mark.parametrize(
    "shape", [(1, 16), (3, 5, 48), (200, 64), (2100, 16)]
)  # 2100: above what one thread does alone
def test_norm_and_its_gradients(shape, dtype):
    x, weight_D = normal(*shape, dtype=dtype), normal(shape[-1], seed=1, dtype=dtype)
    assert rows.can_norm(x, weight_D)
    check(norm_of, plain_norm, (x, weight_D), normal(*shape, seed=2))


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x,
        lambda x: x.transpose(0, 1),  # dense, in another order
        lambda x: x[:, ::2],  # with gaps
        lambda x: x[:1].expand(4, -1, -1),  # rows in one place
        lambda x: x.transpose(1, 2),  # no row in one piece
    ],
)
def test_norm_in_any_layout(layout):
    x = layout(normal(6, 32, 32))
    dy = layout(normal(6, 32, 32, seed=3))
    weight_D = normal(32, seed=1)
    y, found = gradients(norm_of, (x, weight_D), dy)
    wanted_y, wanted = gradients(norm_of, (x.contiguous(), weight_D), dy.contiguous())
    assert torch.equal(y, wanted_y)
    assert torch.equal(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1])  # rows are added up as they lie


def plain_rotation(x, cos, sin):
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


@TYPES
@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("shape", [(3, 2, 1, 32), (3, 4, 40, 64)])
def test_rotation_and_its_gradient(shape, sequences, dtype):
    position_BL = torch.randint(0, 500, (sequences, shape[2]), generator=torch.Generator().manual_seed(0))
    cos, sin = Rotary.Config().build(shape[-1])(position_BL, dtype)
    x = normal(*shape, dtype=dtype)
    assert rows.can_rotate(x, cos, sin)
    y, _ = check(
        lambda x: rotate(x, (cos, sin)),
        lambda x: plain_rotation(x, cos.double(), sin.double()),
        (x,),
        normal(*shape, seed=1),
    )
    with torch.no_grad():
        assert torch.equal(rotate(x, (cos, sin)), y)


def test_rotation_of_heads_cut_from_one_product():
    qkv_BLX = normal(2, 7, 3 * 64)
    query = qkv_BLX[..., 64:128].unflatten(-1, (2, 32)).transpose(1, 2)
    angles = Rotary.Config().build(32)(torch.arange(7)[None], torch.float32)
    turned = rotate(query, angles)
    assert torch.equal(turned, rotate(query.contiguous(), angles))
    assert turned.stride() == torch.empty_like(query).stride()


def plain_sum(weight_NC, *parts):
    return sum(part * weight_NC[:, c : c + 1] for c, part in enumerate(parts))


@TYPES
@pytest.mark.parametrize(("shape", "count"), [((1, 16), 1), ((9, 48), 5), ((1100, 32), 3)])
def test_weighted_sum_and_its_gradients(shape, count, dtype):
    parts = [normal(*shape, seed=c, dtype=dtype) for c in range(count)]
    weight_NC = normal(shape[0], count, seed=9)
    check(lambda weight, *parts: weighted_sum(parts, weight), plain_sum, (weight_NC, *parts), normal(*shape, seed=10))


def test_weighted_sum_without_a_kernel_is_the_same():
    parts = [normal(5, 24, seed=c) for c in range(3)]  # 24 is no multiple of 16
    weight_NC = normal(5, 3, seed=9)
    assert not rows.can_sum(parts, weight_NC)
    check(lambda weight, *parts: weighted_sum(parts, weight), plain_sum, (weight_NC, *parts), normal(5, 24, seed=10))


def test_parts_that_are_no_neat_rows():
    parts = [normal(32, 7, seed=1).t(), normal(1, 32, seed=2).expand(7, -1)]
    weight_NC = normal(2, 7, seed=3).t()
    torch.testing.assert_close(weighted_sum(parts, weight_NC), plain_sum(weight_NC, *parts))


def test_threads_change_nothing():
    x, weight_D, dy = normal(3000, 48), normal(48, seed=1), normal(3000, 48, seed=2)
    parts, weight_NC = [x, dy], normal(3000, 2, seed=3)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            y, (dx, dweight_D) = gradients(norm_of, (x, weight_D), dy)
            z, made = gradients(lambda weight, *parts: weighted_sum(parts, weight), (weight_NC, *parts), dy)
            found.append((y, dx, dweight_D, z, *made))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, three) for one, three in zip(*found, strict=True))


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, 24),
        torch.zeros(0, 16),
        torch.zeros(2, 16, dtype=torch.float64),
        torch.zeros(2, 16, device="meta"),
    ],
)
def test_what_the_kernels_leave_to_torch(x):
    norm = RMSNorm(x.shape[-1]).to(x)
    assert not rows.can_norm(x, norm.weight)
    assert norm(x).shape == x.shape
