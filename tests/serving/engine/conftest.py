"""Small random models whose greedy tokens vary."""

import pytest

from anabranch.experts.parscale import ParScale
from anabranch.lm import Decoder
from anabranch.nn import MoE, SelfAttention
from anabranch.routing import Router, TopK

VOCAB_SIZE = 31


@pytest.fixture(scope="session")
def tiny_model():
    """Makes a mixture of experts of ``streams`` streams."""

    def make(streams=1, **changes):
        config = Decoder.Config(
            vocab_size=VOCAB_SIZE,
            dim=16,
            num_layers=2,
            attention=SelfAttention.Config(num_heads=4, num_kv_heads=2),
            feed_forward=MoE.Config(num_experts=4, hidden_dim=8, router=Router.Config(select=TopK.Config(top_k=2))),
            streams=ParScale.Config(num_streams=streams, prefix_len=3) if streams > 1 else None,
            init_std=0.3,
            max_positions=128,
        )
        return config.replace(**changes).build(seed=0).eval()

    return make
