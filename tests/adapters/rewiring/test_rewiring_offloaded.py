"""Routers are turned while experts come when they are wanted, and come again for the backward pass."""

import copy

import pytest
import torch

from anabranch.adapters.rewiring import Rerouter, Rewiring
from anabranch.lm import Decoder, SamplingConfig
from anabranch.nn import MoE
from anabranch.routing import Router, TopK
from anabranch.serving.expertflow import offload

EXPERTS = MoE.Config(num_experts=6, hidden_dim=16, router=Router.Config(select=TopK.Config(normalize="sum")))
CONFIG = Decoder.Config(
    vocab_size=61, dim=16, num_layers=3, init_std=0.4, depth_scaled_init=False, feed_forward=EXPERTS
)
BYTES = 3 * 16 * 16 * 4
TEXTS = [torch.randint(61, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in (40, 27)]


@pytest.mark.parametrize("predictor", ["router_lookahead", None])
@pytest.mark.parametrize("guard", [True, False])
def test_what_is_fitted_and_generated_is_what_would_be_with_all_in_memory(guard, predictor):
    config = Rewiring(steps=3, eta=0.5, scale_step=False, interval=5, guard=guard)
    model = CONFIG.build(seed=0).eval()
    found = []
    for budget in (None, 4 * BYTES):
        own = copy.deepcopy(model)
        engine = None if budget is None else offload(own, budget, predictor=predictor)
        try:
            turned = Rerouter(own, config)
            states = [turned.new_state() for _ in TEXTS]
            tokens = turned.generate(TEXTS, SamplingConfig(max_tokens=12, temperature=0), states=states)
            found.append((tokens, [delta_E for state in states for delta_E in state.delta]))
            if engine is not None:
                assert engine.stats().counters["expert_misses"] > 0
        finally:
            if engine is not None:
                engine.close()
    (wanted, deltas), (tokens, own_deltas) = found
    assert tokens == wanted
    assert any(bool(delta_E.any()) for delta_E in deltas)
    for delta_E, own_E in zip(deltas, own_deltas, strict=True):
        torch.testing.assert_close(own_E, delta_E, rtol=1e-3, atol=1e-3)


def test_experts_that_are_stored_in_few_bits_and_run_in_floats_are_turned():
    model = Decoder.Config(
        vocab_size=61, dim=64, num_layers=1, init_std=0.4, feed_forward=MoE.Config(num_experts=4, hidden_dim=64)
    ).build(seed=0)
    engine = offload(model, None, tier="int8")
    turned = Rerouter(model, Rewiring(steps=2, eta=0.5, guard=False))
    state = turned.new_state()
    turned.adapt(TEXTS[:1], [state])
    engine.close()
    assert state.phases[0].steps == 2
    assert not state.is_zero
