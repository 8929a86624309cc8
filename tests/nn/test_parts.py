"""Stacks of matrices whose rows are in several kinds: what their parts give alone, in torch, in kernels and in a pool."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from anabranch.nn import ExpertPool, kernels
from anabranch.nn.kernels import packed as native
from anabranch.nn.packed import Packed
from anabranch.nn.parts import Parts, can_be_parts, empty_of, form_of, parts_of
from anabranch.nn.quantize import QuantizedPool, dequantize
from anabranch.nn.weight_kinds import numbers_of_kinds
from anabranch.routing.decision import Routing
from packed_parts import DEPTH, FORMS, part_of

needs_kernels = pytest.mark.skipif(kernels.load() is None, reason="no compiler")


def stack_of(rows, form, num, seed=0):
    """So many matrices of one kind."""
    one = [part_of(rows, form, 10 * seed + number) for number in range(num)]
    return one[0].with_data(torch.cat([part.data for part in one]))


def made(rows, num):
    return [stack_of(16 * panels, form, num, number) for number, (panels, form) in enumerate(rows)]


ROWS = st.lists(st.tuples(st.integers(1, 3), st.sampled_from(FORMS)), min_size=2, max_size=4)


@given(ROWS, st.integers(1, 3), st.integers(0, 5))
def test_matrices_are_those_of_their_parts(rows, num, count):
    stacks = made(rows, num)
    parts = Parts.of(stacks)
    assert (parts.num_experts, parts.rows, parts.depth) == (num, sum(stack.rows for stack in stacks), DEPTH)
    assert parts.nbytes == sum(stack.nbytes for stack in stacks)
    for part, stack in zip(parts.parts, stacks, strict=True):
        assert torch.equal(part.data, stack.data)
    assert torch.equal(parts.unpack(), torch.cat([stack.unpack() for stack in stacks], dim=1))
    x = torch.randn(count, DEPTH, generator=torch.Generator().manual_seed(1))
    bias = torch.randn(parts.rows, generator=torch.Generator().manual_seed(2))
    for number in range(num):
        own = bias.split([stack.rows for stack in stacks])
        alone = [stack.expert(number).linear(x, one) for stack, one in zip(stacks, own, strict=True)]
        assert torch.equal(parts.expert(number).linear(x, bias), torch.cat(alone, dim=-1))
        assert torch.equal(parts.expert(number).weight_in(torch.float32), parts.unpack()[number])


@given(ROWS, st.integers(0, 3))
def test_a_form_says_all_but_the_numbers(rows, num):
    stacks = made(rows, 1)
    for matrices in (Parts.of(stacks), stacks[0]):
        empty = empty_of(num, matrices.depth, form_of(matrices))
        assert form_of(empty) == form_of(matrices)
        assert empty.data.shape == (num, *matrices.data.shape[1:])
        assert empty_of(num, matrices.depth, form_of(matrices), device="meta").data.is_meta
        assert [part.kind for part in parts_of(empty)] == [kind for _, kind, _ in form_of(matrices)]


def test_what_can_be_parts():
    assert can_be_parts([stack_of(16, "int8", 2), stack_of(32, "q4_k", 2)])
    assert not can_be_parts([stack_of(16, "int8", 2)])
    assert not can_be_parts([stack_of(16, "int8", 2), stack_of(16, "q4_k", 3)])
    assert not can_be_parts([stack_of(16, "int8", 1), Packed.pack(torch.zeros(16, DEPTH), "float32")])


@needs_kernels
@given(ROWS, st.integers(1, 3))
def test_kernels_find_each_part_of_each_matrix(rows, num):
    parts = Parts.of(made(rows, num))
    head, chain = native.matrix_of_parts(parts)
    assert head.rows == parts.rows
    for one, part in zip(chain, parts.parts, strict=True):
        assert one.expert_bytes == parts.data.shape[1]
        assert one.data == part.data.data_ptr()
        assert num == 1 or part.data.stride(0) == one.expert_bytes


def pool_of(gate="q4_k", up="q6_k", down="q5_k", num=3, has_bias=False):
    w13 = Parts.of([stack_of(DEPTH, gate, num), stack_of(DEPTH, up, num, 1)])
    biases = (torch.randn(num, 2 * DEPTH), torch.randn(num, DEPTH)) if has_bias else (None, None)
    return QuantizedPool(w13, stack_of(DEPTH, down, num, 2), *biases)


@pytest.mark.parametrize("weight_on", ["input", "output"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_pool_of_parts_is_its_dequantised_self(has_bias, weight_on):
    pool = pool_of(has_bias=has_bias)
    assert "q4_k and q6_k" in repr(pool)
    assert (pool.dim, pool.hidden_dim, pool.num_experts) == (DEPTH, DEPTH, 3)
    assert numbers_of_kinds(pool)["q4_k"] == numbers_of_kinds(pool)["q6_k"] == 3 * DEPTH * DEPTH
    index = torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2]])
    routing = Routing(index, torch.rand(4, 2), torch.zeros(4, 3))
    # With a gradient activations are not rounded.
    x = torch.randn(4, DEPTH, requires_grad=True)
    found = pool(x, routing, weight_on=weight_on)
    around = nn.ModuleDict({"experts": pool})
    dequantize(around)
    plain = around["experts"]
    assert isinstance(plain, ExpertPool)
    wanted = plain(x, routing, weight_on=weight_on)
    # Of hundreds, and sums are in another order.
    assert (found - wanted).norm() < 1e-5 * wanted.norm()
    for y in (found, wanted):
        y.sum().backward(retain_graph=True)
    with torch.no_grad():
        kept = pool(x, routing, weight_on=weight_on)
    assert (kept - wanted).norm() / wanted.norm() < 0.03
