"""Attention to shared entries in front: that of each sequence with its own copy of them."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.nn.shared_prefix import attend_few, copied, with_prefix


def case(fronts, copies, groups, heads, queries, shared, own, dtype=torch.float64, seed=0):
    """(query, key, value, front) of random numbers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    batch = fronts * copies
    return (
        draw(batch, groups * heads, queries, 4),
        draw(batch, groups, own, 4),
        draw(batch, groups, own, 4),
        (draw(fronts, groups, shared, 4), draw(fronts, groups, shared, 4)),
    )


@settings(max_examples=60, deadline=None)
@given(*[st.integers(1, 3)] * 5, st.integers(0, 5), st.integers(0, 4), st.booleans(), st.integers(0, 99))
def test_it_is_attention_to_both_parts(fronts, copies, groups, heads, queries, shared, past, masked, seed):
    own = past + queries
    query, key, value, front = case(fronts, copies, groups, heads, queries, shared, own, seed=seed)
    mask = None
    if masked:
        generator = torch.Generator().manual_seed(seed)
        mask = torch.rand(fronts * copies, 1, queries, own, generator=generator) < 0.5
        mask[..., range(queries), range(past, own)] = True  # as padding, each sees itself
    whole = None if mask is None else F.pad(mask, (shared, 0), value=True)
    both = (with_prefix(part, shared_part) for part, shared_part in zip((key, value), front, strict=True))
    wanted = F.scaled_dot_product_attention(query, *both, attn_mask=whole, enable_gqa=True)
    found = attend_few(query, key, value, front, mask)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_each_sequence_has_the_front_of_its_part_of_the_batch():
    front = torch.arange(2.0).view(2, 1, 1, 1)
    assert copied(front, 6).flatten().tolist() == [0, 0, 0, 1, 1, 1]
    assert with_prefix(torch.full((4, 1, 1, 1), 7.0), front).flatten(1).tolist() == [[0, 7], [0, 7], [1, 7], [1, 7]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_multiplied_in_float32(dtype):
    query, key, value, front = case(2, 3, 2, 2, 1, 5, 50, dtype)
    found = attend_few(query, key, value, front)
    assert found.dtype == dtype
    exact = attend_few(*(part.double() for part in (query, key, value)), tuple(part.double() for part in front))
    assert torch.equal(found, exact.to(dtype))


def test_gradients_reach_all_that_goes_in():
    query, key, value, front = case(2, 2, 1, 2, 2, 3, 4)
    given = [part.requires_grad_() for part in (query, key, value, *front)]
    assert torch.autograd.gradcheck(lambda q, k, v, *front: attend_few(q, k, v, front), given)


@pytest.mark.parametrize("masked", [False, True])
def test_no_sequence_has_no_attention(masked):
    query, key, value, front = case(2, 0, 1, 2, 1, 3, 4)
    mask = torch.ones(0, 1, 1, 4, dtype=torch.bool) if masked else None
    assert attend_few(query, key, value, front, mask).shape == (0, 2, 1, 4)
