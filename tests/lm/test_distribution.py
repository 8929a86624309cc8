"""Cuts against a sort in plain Python, with ties and vocabularies past the first look."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.lm.distribution import cut, invert, temper


def naive(probability, top_k, top_p, min_p):
    order = sorted(range(len(probability)), key=lambda token: (-probability[token], token))
    kept, before = set(), 0.0
    for rank, token in enumerate(order):
        if rank and ((top_k and rank >= top_k) or before >= top_p):
            break
        before += probability[token]
        if probability[token] >= torch.tensor(min_p) * torch.tensor(probability[order[0]]):
            kept.add(token)
    return kept


def cut_rows(probability_RV, top_k, top_p, min_p):
    return cut(probability_RV, top_k_R=torch.tensor(top_k), top_p_R=torch.tensor(top_p), min_p_R=torch.tensor(min_p))


rows = st.tuples(
    st.lists(st.integers(0, 4), min_size=6, max_size=6).filter(any),
    st.sampled_from([0, 1, 2, 5, 6, 9]),
    st.sampled_from([0.0, 0.3, 0.55, 0.9, 1.0]),
    st.sampled_from([0.0, 0.4, 0.8, 1.0]),
)


@given(st.lists(rows, min_size=1, max_size=4))
@settings(max_examples=200, deadline=None)
def test_rows_keep_what_a_sort_keeps(batch):
    # thirty-seconds are exact, so that a cumulative probability is on the same side of top_p in both
    probability_RV = torch.tensor([[weight / 32 for weight in weights] for weights, *_ in batch])
    result_RV = cut_rows(probability_RV, *map(list, zip(*(setting for _, *setting in batch), strict=True)))
    for row, (_, *setting) in enumerate(batch):
        kept = naive(probability_RV[row].tolist(), *setting)
        expected = [value if token in kept else 0.0 for token, value in enumerate(probability_RV[row].tolist())]
        assert result_RV[row].tolist() == expected


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.99), (1700, 1.0), (1600, 0.99), (3, 0.99), (0, 0.1), (0, 0.9999)])
def test_flat_rows_look_past_the_first_tokens(top_k, top_p):
    generator = torch.Generator().manual_seed(0)
    probability_RV = (0.01 * torch.randn(2, 3000, generator=generator)).softmax(-1)
    result_RV = cut_rows(probability_RV, [top_k, 0], [top_p, 1.0], [0.0, 0.0])
    kept = naive(probability_RV[0].double().tolist(), top_k, float(torch.tensor(top_p)), 0.0)
    assert set(result_RV[0].nonzero().squeeze(-1).tolist()) == kept
    assert torch.equal(result_RV[1], probability_RV[1])


def test_equal_tokens_stay_in_the_order_of_their_ids():
    result_RV = cut_rows(torch.full((1, 8), 0.125), [3], [1.0], [0.0])
    assert result_RV[0].nonzero().squeeze(-1).tolist() == [0, 1, 2]


def test_inversion_is_the_cumulative_distribution():
    probability_RV = torch.tensor([0.0, 0.25, 0.0, 0.25, 0.0]).repeat(5, 1)  # adds up to a half
    uniform_R = torch.tensor([0.0, 0.4999999, 0.5, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert invert(probability_RV, uniform_R).tolist() == [1, 1, 3, 3, 3]


def test_temperature_of_each_row():
    logits_RV = torch.tensor([[0.0, 1.0, -3.0]]).repeat(3, 1)
    expected_RV = torch.stack([(logits_RV[0] / t).softmax(-1) for t in (0.5, 1.0, 4.0)])
    torch.testing.assert_close(temper(logits_RV, torch.tensor([0.5, 1.0, 4.0])), expected_RV)
    assert temper(logits_RV[:1], torch.tensor([1e-40])).tolist() == [[0.0, 1.0, 0.0]]


def test_a_temperature_that_float32_rounds_to_zero_takes_the_most_likely_token():
    logits_RV = torch.tensor([[1.0, 3.0, 2.0], [-5.0, -9.0, -7.0]])
    probability_RV = temper(logits_RV, torch.tensor([1e-46, 1e-300], dtype=torch.float64))
    assert torch.equal(probability_RV, torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))
