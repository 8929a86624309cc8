"""Phase 2 goes on from the last pass of phase 1: no text is read twice, and tokens and keys are those of reading it again."""

import pytest
import torch

from anabranch.adapters.rewiring import Rerouter, Rewiring, rerouter
from anabranch.adapters.rewiring.phase import fit
from anabranch.adapters.rewiring.prefill import Prefill
from anabranch.adapters.rewiring.vectors import Vectors, run
from anabranch.lm import Decoder, SamplingConfig
from anabranch.lm.generate import pad_left
from anabranch.nn import LatentAttention, MoE, Sandwich, SelfAttention, SwiGLU
from anabranch.routing import LinearScore, Router, TopK

ROUTER = Router.Config(score=LinearScore.Config(init_std=0.5), select=TopK.Config(top_k=2), balance=())
BODY = {"vocab_size": 61, "dim": 16, "num_layers": 3, "init_std": 0.4, "depth_scaled_init": False}
EXPERTS = MoE.Config(num_experts=4, hidden_dim=16, router=ROUTER)
MODELS = {
    "all blocks route": {},
    "dense blocks in front": {"dense_layers": (0, 1), "dense_feed_forward": SwiGLU.Config(hidden_dim=16)},
    "nothing before the first router is kept": {"block": Sandwich.Config()},
    "windows": {"attention": SelfAttention.Config(num_heads=4, window=6)},
    "latent keys": {
        "attention": LatentAttention.Config(num_heads=2, kv_rank=8, q_rank=12, head_dim=8, rotary_dim=4, value_dim=8)
    },
}
TEXTS = [list(range(3, 40)), [5, 9, 60, 1, 22, 8, 8, 13, 4, 2, 2, 50, 7, 7, 31, 30, 29, 28, 1, 5], [7] * 30]
QUICK = Rewiring(steps=2, eta=0.5, scale_step=False, interval=4)
GREEDY = SamplingConfig(max_tokens=10, temperature=0)


def model_of(**changes):
    return Decoder.Config(**{**BODY, **changes}, feed_forward=EXPERTS).build(seed=0).eval()


def fitted(model, config, texts):
    """(states, what decoding may begin with) of one phase 1."""
    turned, prefill = Rerouter(model, config), Prefill()
    states = [turned.new_state() for _ in texts]
    fit(model, turned.layers, config, texts, states, prefill=prefill)
    return turned, states, prefill


@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_it_is_what_reading_again_would_give(name, guard):
    """Logits behind the texts, and, with room made, behind tokens that follow."""
    model = model_of(**MODELS[name])
    turned, states, prefill = fitted(model, QUICK.replace(guard=guard), TEXTS)
    assert any(not state.is_zero for state in states)
    token_BL, mask_BL = pad_left(TEXTS, torch.device("cpu"))
    delta = [torch.stack(of_layer) for of_layer in zip(*(state.delta for state in states), strict=True)]
    cache, length = model.new_cache(token_BL.shape[1] + 9), token_BL.shape[1]
    with torch.no_grad():
        wanted = run(model, token_BL, mask_BL, Vectors(turned.layers, delta, length), cache=cache, last=1)
        torch.testing.assert_close(prefill.logits_BV, wanted[:, -1], rtol=1e-4, atol=1e-4)
        assert prefill.cache.length == prefill.cache.max_length == length
        prefill.cache.grow(length + 9)
        for step in range(9):
            following = torch.tensor([[step], [60 - step], [7]])
            vectors = Vectors(turned.layers, delta, 1)
            again, found = (run(model, following, None, vectors, cache=one) for one in (cache, prefill.cache))
            torch.testing.assert_close(found, again, rtol=1e-4, atol=1e-4)


def lengths_read(monkeypatch):
    """Of each pass of phase 2, how many positions it reads."""
    read, original = [], rerouter.run

    def noted(model, token_BL, *given, **more):
        read.append(token_BL.shape[1])
        return original(model, token_BL, *given, **more)

    monkeypatch.setattr(rerouter, "run", noted)
    return read


@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_no_text_is_read_twice_and_tokens_are_the_same(name, guard, monkeypatch):
    model, config = model_of(**MODELS[name]), QUICK.replace(guard=guard)
    read = lengths_read(monkeypatch)
    found = Rerouter(model, config).generate(TEXTS, GREEDY)
    assert set(read) == {1}
    assert len(read) <= 9
    monkeypatch.setattr(Prefill, "take", lambda *_: None)
    read.clear()
    assert Rerouter(model, config).generate(TEXTS, GREEDY) == found
    assert max(read) >= 37


def test_chains_that_are_fitted_once_go_on_from_one_pass(monkeypatch):
    model = model_of()
    sampling = SamplingConfig(max_tokens=6, temperature=2.0, seed=1)
    read = lengths_read(monkeypatch)
    chains = Rerouter(model, QUICK).generate([TEXTS[2], TEXTS[0], TEXTS[2]], sampling)
    assert set(read) == {1}
    assert chains[0] != chains[2]
    monkeypatch.setattr(Prefill, "take", lambda *_: None)
    assert Rerouter(model, QUICK).generate([TEXTS[2], TEXTS[0], TEXTS[2]], sampling) == chains


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({"window": 25}, TEXTS),  # the pass has not seen the beginning of one of them
        ({}, [*TEXTS, [4, 5]]),  # one is too short to be fitted
        ({"most_steps": 0}, TEXTS),  # nothing is fitted
    ],
    ids=["a window", "a short text", "no steps"],
)
def test_where_no_pass_has_read_all_they_are_read_again(changes, texts, monkeypatch):
    model, config = model_of(), QUICK.replace(interval=None, **changes)
    read = lengths_read(monkeypatch)
    found = Rerouter(model, config).generate(texts, GREEDY)
    assert read[0] == 37
    assert [len(tokens) for tokens in found] == [10] * len(texts)
    assert fitted(model, config, texts)[2].cache is None


def test_a_window_that_holds_all_is_none(monkeypatch):
    read = lengths_read(monkeypatch)
    Rerouter(model_of(), QUICK.replace(interval=None, window=37)).generate(TEXTS, GREEDY)
    assert set(read) == {1}


def test_what_is_kept_is_kept(monkeypatch):
    """Keys and values of the old vectors, which no pass of phase 1 computes."""
    read = lengths_read(monkeypatch)
    Rerouter(model_of(), QUICK.replace(cache="keep", interval=None)).generate(TEXTS, GREEDY)
    assert read[0] == 36


def test_what_a_design_keeps_in_a_cache_is_not_left_behind(monkeypatch):
    model, config = model_of(), QUICK.replace(interval=None)
    attention, original = model.blocks[0].attention, type(model.blocks[0].attention).forward

    def forward(self, x, context):
        if self is attention and context.cache is not None:
            context.cache.state.setdefault("mine", object())
        return original(self, x, context)

    monkeypatch.setattr(type(attention), "forward", forward)
    read = lengths_read(monkeypatch)
    Rerouter(model, config).generate(TEXTS, GREEDY)
    assert read[0] == 37
