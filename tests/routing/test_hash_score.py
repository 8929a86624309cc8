"""Hash layers: the token decides, evenly, the same everywhere."""

import pytest
import torch

from anabranch.errors import ConfigError
from anabranch.lm import Decoder
from anabranch.nn import MoE
from anabranch.routing import HashScore, Router, RoutingContext, TopK, record_routing


def logits(token_N, num_destinations=8, **fields):
    score = HashScore.Config(**fields).build(4, num_destinations)
    return score.project(torch.zeros(len(token_N), 4), RoutingContext(state={"token_N": token_N}))


def test_tokens_are_spread_evenly_over_first_and_second_choices():
    best_NK = logits(torch.arange(50_000)).topk(2).indices
    for place in range(2):
        share_E = best_NK[:, place].bincount(minlength=8) / len(best_NK)
        assert (share_E - 1 / 8).abs().max() < 0.005
    pair = (best_NK[:, 0] * 8 + best_NK[:, 1]).bincount(minlength=64).view(8, 8) / len(best_NK)
    assert (pair[~torch.eye(8, dtype=torch.bool)] - 1 / 56).abs().max() < 0.003


def test_the_hash_is_fixed_and_its_seed_another_one():
    token_N = torch.arange(1000)
    first = logits(token_N)
    assert torch.equal(first, logits(token_N))
    assert (first >= 0).all()
    assert (first < 0.01).all()
    agreement = (first.argmax(1) == logits(token_N, seed=7).argmax(1)).float().mean()
    assert agreement < 0.25
    assert first[:4].argmax(1).tolist() == [2, 5, 4, 6]  # saved models rest on it


def test_in_a_model_the_token_alone_decides():
    router = Router.Config(score=HashScore.Config(), select=TopK.Config(top_k=2, normalize="sum"))
    layer = MoE.Config(num_experts=8, hidden_dim=16, router=router)
    model = Decoder.Config(vocab_size=64, dim=32, num_layers=2, feed_forward=layer).build(seed=0).eval()
    token_BL = torch.randint(64, (4, 32), generator=torch.Generator().manual_seed(0))
    with record_routing(model) as recorder, torch.no_grad():
        model(token_BL)
    expected_NE = logits(torch.arange(64)).topk(2).indices
    for layer in range(2):
        decisions = recorder.trace().decisions(layer)
        chosen = torch.from_numpy(decisions.index_NK).long().sort(1).values
        assert torch.equal(chosen, expected_NE[torch.from_numpy(decisions.token_N).long()].sort(1).values)
        assert abs(decisions.weight_NK - 0.5).max() < 0.005


def test_items_whose_token_nobody_says_are_refused():
    score = HashScore.Config().build(4, 8)
    with pytest.raises(ConfigError, match="of 3 items the forward pass names none"):
        score.project(torch.zeros(3, 4), RoutingContext())
    with pytest.raises(ConfigError, match="of 3 items the forward pass names 2"):
        score.project(torch.zeros(3, 4), RoutingContext(state={"token_N": torch.arange(2)}))
