"""Attention to shared entries in front: that of each sequence with its own copy of them."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.nn.shared_prefix import attend_few, copied, gated_sum, side_by_side, with_prefix


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


def naive(query, key, value, front, gate, mask=None):
    """Query by query: what is in front is multiplied by its gate, keys and values."""
    batch, heads, length, width = query.shape
    copies, shared = heads // key.shape[1], batch // len(front[0])
    y = torch.zeros_like(query)
    for b in range(batch):
        for h in range(heads):
            own_key, own_value = (part[b, h // copies] for part in (key, value))
            front_key, front_value = (part[b // shared, h // copies] for part in front)
            for n in range(length):
                keys = torch.cat((gate[b, n] * front_key, own_key))
                values = torch.cat((gate[b, n] * front_value, own_value))
                score = keys @ query[b, h, n] / width**0.5
                if mask is not None:
                    seen = torch.cat((torch.ones(len(front_key), dtype=torch.bool), mask[b % len(mask), 0, n]))
                    score = score.masked_fill(~seen, -torch.inf)
                y[b, h, n] = score.softmax(0) @ values
    return y


@settings(max_examples=25, deadline=None)
@given(*[st.integers(1, 2)] * 4, st.integers(1, 4), st.integers(0, 3), st.booleans(), st.integers(0, 99))
def test_queries_have_gates_for_what_is_in_front(fronts, copies, groups, heads, queries, past, masked, seed):
    """Met apart and in one softmax, and as heads twice as wide."""
    own = past + queries
    query, key, value, front = case(fronts, copies, groups, heads, queries, 3, own, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    gate = torch.rand(len(query), queries, generator=generator, dtype=torch.float64)
    mask = torch.ones(1, 1, queries, own, dtype=torch.bool).tril(past) if masked else None
    wanted = naive(query, key, value, front, gate, mask)
    torch.testing.assert_close(attend_few(query, key, value, front, mask, gate), wanted)
    whole = None if mask is None else F.pad(mask, (3, 0), value=True)
    wide = side_by_side(query, key, value, front, gate)
    assert wide[0].shape[-1] == 2 * query.shape[-1]
    made = gated_sum(F.scaled_dot_product_attention(*wide, attn_mask=whole, enable_gqa=True), gate)
    torch.testing.assert_close(made, wanted)
    # Open gates are none.
    open_gate = torch.ones_like(gate)
    torch.testing.assert_close(
        attend_few(query, key, value, front, mask, open_gate), attend_few(query, key, value, front, mask)
    )


def test_gradients_reach_gates_and_what_is_behind_them():
    query, key, value, front = case(1, 2, 1, 2, 2, 3, 4)
    gate = torch.rand(2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    given = [part.requires_grad_() for part in (query, key, value, *front, gate)]

    def few(query, key, value, front_key, front_value, gate):
        return attend_few(query, key, value, (front_key, front_value), None, gate)

    def wide(query, key, value, front_key, front_value, gate):
        parts = side_by_side(query, key, value, (front_key, front_value), gate)
        weight = (
            parts[0].unflatten(1, (1, -1)) @ parts[1][:, :, None].transpose(3, 4) / parts[0].shape[-1] ** 0.5
        ).softmax(-1)
        return gated_sum((weight @ parts[2][:, :, None]).flatten(1, 2), gate)

    assert torch.autograd.gradcheck(few, given)
    assert torch.autograd.gradcheck(wide, given)
    torch.testing.assert_close(few(*given), wide(*given))


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
