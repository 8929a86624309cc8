"""Windows, sinks and scales of attention against the formula, written out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.nn.scored import PLAIN, Scoring, scored_attention


def naive(query, key, value, scoring, mask=None):
    """Query by query."""
    batch, heads, length, width = query.shape
    past, shared = key.shape[2] - length, heads // key.shape[1]
    value = value if scoring.value_width is None else key[..., : scoring.value_width]
    scale = width**-0.5 if scoring.scale is None else scoring.scale
    y = torch.zeros(batch, heads, length, value.shape[-1], dtype=query.dtype)
    for b in range(batch):
        for h in range(heads):
            for q in range(length):
                here = past + q
                seen = range(0 if scoring.window is None else max(0, here - scoring.window + 1), here + 1)
                if mask is not None:
                    seen = [s for s in seen if mask[b % len(mask), 0, q, s]]
                weight = [(scale * query[b, h, q] @ key[b, h // shared, s]).exp() for s in seen]
                total = sum(weight) + (0 if scoring.sink_H is None else scoring.sink_H[h].exp())
                for s, one in zip(seen, weight, strict=True):
                    y[b, h, q] += one / total * value[b, h // shared, s]
    return y


def drawn(length, past, seed=0, heads=4, groups=2, width=6):
    generator = torch.Generator().manual_seed(seed)
    make = lambda number, count: torch.randn(2, number, count, width, generator=generator, dtype=torch.float64)  # noqa: E731
    return make(heads, length), make(groups, past + length), make(groups, past + length)


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 9),
    past=st.integers(0, 6),
    window=st.none() | st.integers(1, 8),
    sinks=st.booleans(),
    scale=st.none() | st.just(0.7),
    value_width=st.none() | st.just(4),
    masked=st.booleans(),
    part=st.integers(1, 4),
)
def test_it_is_the_formula(length, past, window, sinks, scale, value_width, masked, part):
    query, key, value = drawn(length, past)
    sink_H = torch.randn(4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) if sinks else None
    scoring = Scoring(scale, window, sink_H, value_width)
    mask = None
    if masked:
        mask = torch.rand(2, 1, length, past + length, generator=torch.Generator().manual_seed(2)) < 0.7
        here = torch.arange(length)
        mask[:, 0, here, past + here] = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anabranch.nn.scored.PART", part)
        y = scored_attention(query, key, value, scoring, mask)
    torch.testing.assert_close(y, naive(query, key, value, scoring, mask))


@settings(max_examples=25, deadline=None)
@given(
    gaps=st.lists(st.integers(1, 4), min_size=1, max_size=12),
    length=st.integers(1, 12),
    window=st.integers(1, 9),
    sinks=st.booleans(),
    part=st.integers(1, 4),
)
def test_a_window_is_counted_in_positions(gaps, length, window, sinks, part):
    """Of tokens between which others were left out; of none it is the window by places."""
    position_S = torch.tensor(gaps).cumsum(0)
    length = min(length, len(gaps))
    past = len(gaps) - length
    query, key, value = drawn(length, past)
    sink_H = torch.randn(4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) if sinks else None
    near = position_S[past:, None] - position_S[None] < window
    mask = near[None, None].expand(2, 1, -1, -1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anabranch.nn.scored.PART", part)
        y = scored_attention(query, key, value, Scoring(None, window, sink_H), position_S=position_S)
        places = scored_attention(query, key, value, Scoring(None, window), position_S=torch.arange(len(gaps)) + 7)
    torch.testing.assert_close(y, naive(query, key, value, Scoring(None, None, sink_H), mask))
    torch.testing.assert_close(places, naive(query, key, value, Scoring(None, window)))


def test_gradients_reach_sinks():
    query, key, value = (part.requires_grad_() for part in drawn(3, 2))
    sink_H = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def run(query, key, value, sink_H):
        return scored_attention(query, key, value, Scoring(window=3, sink_H=sink_H))

    assert torch.autograd.gradcheck(run, (query, key, value, sink_H))


def test_half_types_come_back_as_they_went_in():
    query, key, value = (part.bfloat16() for part in drawn(5, 0))
    y = scored_attention(query, key, value, Scoring(sink_H=torch.zeros(4, dtype=torch.bfloat16)))
    assert y.dtype == torch.bfloat16
    wanted = naive(
        *(part.double() for part in (query, key, value)), Scoring(sink_H=torch.zeros(4, dtype=torch.float64))
    )
    torch.testing.assert_close(y.double(), wanted, rtol=0, atol=2e-2)


def test_what_is_plain():
    assert PLAIN.is_plain
    assert not any(
        scoring.is_plain
        for scoring in (Scoring(0.5), Scoring(window=3), Scoring(sink_H=torch.zeros(2)), Scoring(value_width=2))
    )
