"""The product adapter by adapter, against a loop written here, at any order of derivative; by the kernel and in torch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.adapters.segmented import can_segment, segmented
from anabranch.nn import kernels
from anabranch.routing import Routing, plan_dispatch


def made(num_items=5, num_choices=3, num_adapters=4, in_dim=6, out_dim=5, rank=2, seed=0):
    """(plan, [x, weight, a, b]); the last adapter is never chosen, and an item may name one twice."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(-1, max(num_adapters - 1, 1), (num_items, num_choices), generator=generator)
    shapes = [(num_items, in_dim), index.shape, (num_adapters, rank, in_dim), (num_adapters, out_dim, rank)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    tensors[1] = tensors[1] * (index >= 0)
    plan = plan_dispatch(Routing(index, tensors[1], torch.zeros(num_items, num_adapters)))
    return index, plan, tensors


def naive(index, x, weight, a, b):
    y = x.new_zeros(len(x), b.shape[1])
    for n, row in enumerate(index.tolist()):
        for k, e in enumerate(row):
            if e >= 0:
                y[n] += weight[n, k] * (b[e] @ (a[e] @ x[n]))
    return y


@given(
    num_items=st.integers(0, 7),
    num_choices=st.integers(1, 3),
    num_adapters=st.integers(1, 5),
    rank=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_any_shape(num_items, num_choices, num_adapters, rank, seed):
    index, plan, tensors = made(num_items, num_choices, num_adapters, rank=rank, seed=seed)
    x, weight, a, b = tensors
    torch.testing.assert_close(segmented(x, plan, weight, a, b), naive(index, x, weight, a, b))


def test_gradients_of_any_order():
    index, plan, tensors = made()
    leaves = [value.requires_grad_() for value in tensors]
    used = (index >= 0).double()

    def run(x, weight, a, b):
        return segmented(x, plan, weight * used, a, b)

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("number", range(4))
def test_only_what_is_asked_for_gets_a_gradient(number):
    index, plan, tensors = made()
    leaf = tensors[number].requires_grad_()
    segmented(tensors[0], plan, *tensors[1:]).square().sum().backward()
    expected = torch.autograd.grad(naive(index, *tensors).square().sum(), leaf)[0]
    torch.testing.assert_close(leaf.grad, expected)
    if number >= 2:
        assert not leaf.grad[-1].any()


@pytest.mark.parametrize("number", [None, 0, 1, 2, 3])
def test_the_kernel_is_what_torch_computes_in_values_and_gradients(number, monkeypatch):
    """All gradients, and each alone."""
    _, plan, tensors = made(num_items=9, in_dim=40, out_dim=70, rank=5)
    dy, found = torch.randn(9, 70, generator=torch.Generator().manual_seed(3)), []
    for is_compiled in (True, False):
        if not is_compiled:
            monkeypatch.setattr("anabranch.adapters.segmented.can_add", lambda *_: False)
        leaves = [value.float().requires_grad_(number in (None, place)) for place, value in enumerate(tensors)]
        x, weight, a, b = leaves
        y = segmented(x, plan, weight, a, b)
        found.append([y, *torch.autograd.grad(y, [leaf for leaf in leaves if leaf.requires_grad], dy)])
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(kernels.load() is None, reason="no compiler")
def test_bfloat16_where_nothing_learns():
    index, plan, tensors = made(num_items=9, in_dim=40, out_dim=70, rank=5)
    x, weight, a, b = (value.bfloat16() for value in tensors)
    assert can_segment(x, weight, a, b)
    y = segmented(x, plan, weight, a, b)
    assert y.dtype == torch.bfloat16
    # Sums are of float32: what is lost is the rounding of the result alone.
    wanted = naive(index, *(value.double() for value in (x, weight, a, b)))
    torch.testing.assert_close(y, wanted.to(torch.bfloat16), rtol=2**-7, atol=1e-3)
    assert not can_segment(x, weight, a.requires_grad_(), b)
    with torch.no_grad():
        assert can_segment(x, weight, a, b)


def test_what_it_computes():
    _, _, (x, weight, a, b) = made()
    assert can_segment(x, weight, a, b)
    assert not can_segment(x.half(), weight, a.half(), b.half())
    assert not can_segment(x.float(), weight, a, b)
    assert not can_segment(x.to("meta"), weight, a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_segment(x, weight, a, b)
    seen = []
    torch.func.vmap(lambda row: seen.append(can_segment(row, weight, a, b)) or row)(x.unsqueeze(0))
    assert seen == [False]
