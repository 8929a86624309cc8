import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from anabranch.nn.some_heads import SomeHeads, attention_of_some, can_spare, join_some, project_some


def parts(batch=2, heads=4, groups=2, length=7, keys=7, width=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, length, width, generator=generator)
    key, value = (torch.randn(batch, groups, keys, width, generator=generator) for _ in range(2))
    return query, key, value


def wanted(batch, length, heads, share, seed):
    return torch.rand(batch, length, heads, generator=torch.Generator().manual_seed(seed)) < share


def whole(query, key, value, mask=None, is_causal=False):
    """By torch, all heads."""
    group = query.shape[1] // key.shape[1]
    length, keys = query.shape[2], key.shape[2]
    if is_causal:
        mask = torch.ones(length, keys, dtype=torch.bool).tril(keys - length)
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def by_token(some):
    """bool ``[B, L, H]``: what is computed."""
    return torch.from_numpy(np.repeat(some.wanted_BJH, some.block, axis=1)[:, : some.length])


def test_a_head_is_wanted_in_a_block_where_one_query_wants_it():
    wanted_BLH = torch.zeros(1, 5, 3, dtype=torch.bool)
    wanted_BLH[0, 1, 0] = wanted_BLH[0, 4, 2] = True
    some = SomeHeads.of(wanted_BLH, 2)
    assert some.wanted_BJH.tolist() == [[[True, False, False], [False] * 3, [False, False, True]]]
    # Of so few tokens a head that any wants is computed of all.
    assert some.share == some.share_of_products == pytest.approx(2 / 3)
    wanted_BLH = torch.zeros(1, 20, 3, dtype=torch.bool)
    wanted_BLH[0, 1, 0] = wanted_BLH[0, 18, 2] = True
    # 8 of 20 tokens for the first head, and the shorter last block for the third.
    assert SomeHeads.of(wanted_BLH, 8).share == pytest.approx(12 / 60)
    alike = SomeHeads.of(torch.ones(1, 5, 3, dtype=torch.bool), 2)
    assert alike.share == 1.0


@given(
    st.integers(1, 3),
    st.sampled_from([1, 3, 9, 16, 21]),
    st.integers(1, 5),
    st.sampled_from([(4, 4), (4, 2), (6, 2), (3, 1)]),
    st.floats(0, 1),
    st.booleans(),
    st.integers(0, 4),
    st.integers(0, 99),
)
def test_what_is_wanted_is_as_all_heads_compute_it_and_the_rest_is_nothing(
    batch, length, block, heads, share, is_causal, past, seed
):
    query, key, value = parts(batch, heads[0], heads[1], length, length + past, seed=seed)
    some = SomeHeads.of(wanted(batch, length, heads[0], share, seed), block)
    found = attention_of_some(query, key, value, some, is_causal=is_causal)
    kept_BHL1 = by_token(some).transpose(1, 2).unsqueeze(-1)
    expected = torch.where(kept_BHL1, whole(query, key, value, is_causal=is_causal), 0.0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 1, 7, 7), (1, 1, 7, 7), (2, 4, 7, 7), (2, 1, 1, 7), (1, 4, 7, 7)])
@pytest.mark.parametrize("is_added", [False, True])
def test_masks(shape, is_added):
    query, key, value = parts()
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.7
    mask[..., 0] = True
    if is_added:
        mask = torch.zeros(shape).masked_fill(~mask, -1e4)
    for seed in range(4):
        some = SomeHeads.of(wanted(2, 7, 4, 0.5, seed), 3)
        found = attention_of_some(query, key, value, some, mask=mask)
        kept_BHL1 = by_token(some).transpose(1, 2).unsqueeze(-1)
        torch.testing.assert_close(found, torch.where(kept_BHL1, whole(query, key, value, mask), 0.0))


def test_long_parts_go_through_the_kernels_as_well():
    query, key, value = parts(2, 4, 2, 80, 96)
    some = SomeHeads.of(wanted(2, 80, 4, 0.02, 5), 16)
    assert 0.1 < some.share < 0.9
    found = attention_of_some(query, key, value, some, is_causal=True)
    kept_BHL1 = by_token(some).transpose(1, 2).unsqueeze(-1)
    expected = torch.where(kept_BHL1, whole(query, key, value, is_causal=True), 0.0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_products_of_wanted_heads(has_bias, share):
    generator = torch.Generator().manual_seed(0)
    x_BLW = torch.randn(2, 7, 6, generator=generator)
    weight_RW, bias_R = torch.randn(12, 6, generator=generator), torch.randn(12, generator=generator)
    some = SomeHeads.of(wanted(2, 7, 4, 1.0, 3) & torch.tensor([share > 0, share > 0, share == 1, True]), 3)
    kept_BLH1 = by_token(some).unsqueeze(-1)
    assert some.share_of_products == {0.0: 0.25, 0.4: 0.75, 1.0: 1.0}[share]
    bias_R = bias_R if has_bias else None
    expected = torch.where(kept_BLH1, F.linear(x_BLW, weight_RW, bias_R).unflatten(-1, (4, 3)), 0.0)
    torch.testing.assert_close(project_some(x_BLW, weight_RW, bias_R, some), expected.flatten(2))
    y_BLHD = torch.randn(2, 7, 4, 3, generator=generator)
    weight_WR, bias_W = torch.randn(6, 12, generator=generator), torch.randn(6, generator=generator)
    bias_W = bias_W if has_bias else None
    expected = F.linear(torch.where(kept_BLH1, y_BLHD, 0.0).flatten(2), weight_WR, bias_W)
    torch.testing.assert_close(join_some(y_BLHD, weight_WR, bias_W, some), expected)


def test_rows_are_cut():
    some = SomeHeads.of(wanted(3, 5, 2, 0.5, 1), 2)
    assert np.array_equal(some.of_rows([2, 0]).wanted_BJH, some.wanted_BJH[[2, 0]])


def test_nothing_at_all():
    some = SomeHeads.of(torch.zeros(0, 5, 2, dtype=torch.bool), 2)
    assert (some.share, some.share_of_products) == (1.0, 1.0)
    assert not can_spare(torch.zeros(0, 5, 2), torch.zeros(2, 2), some)
    some = SomeHeads.of(torch.zeros(2, 0, 2, dtype=torch.bool), 2)
    assert some.share == 1.0
    assert attention_of_some(*parts(2, 2, 2, 0, 3), some).shape == (2, 2, 0, 16)
