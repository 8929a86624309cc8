"""Small models and batches that tests of ExpertFlow share."""

from typing import Any

import numpy as np

from anabranch.lm import Decoder
from anabranch.nn import MoE
from anabranch.routing import Router, TopK
from anabranch.serving.expertflow import Expert, Layout
from anabranch.serving.expertflow.cache import ExpertCache
from anabranch.serving.expertflow.policy import make_policy

VOCAB = 97


def moe_config(**changes: Any) -> MoE.Config:
    values = {"num_experts": 16, "hidden_dim": 32, "router": Router.Config(select=TopK.Config(top_k=2)), **changes}
    return MoE.Config(**values)


def make_model(feed_forward: Any = None, **changes: Any) -> Decoder:
    values = {"vocab_size": VOCAB, "dim": 32, "num_layers": 4, "feed_forward": feed_forward or moe_config(), **changes}
    model = Decoder.Config(**values).build().eval()
    for weight in model.parameters():  # so that routes and greedy tokens vary
        weight.data.mul_(3)
    return model


def prompts(number: int = 5, seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(VOCAB, size=generator.integers(1, 8)).tolist() for _ in range(number)]


def random_batches(
    number: int, layers: int, experts: int, wanted: int, seed: int, kind: str = "any"
) -> list[list[list[Expert]]]:
    """Batches whose layers want up to ``wanted`` experts each, some more liked than others."""
    generator = np.random.default_rng(seed)
    weight = 1.0 / np.arange(1, experts + 1)
    weight /= weight.sum()
    batches = []
    for _ in range(number):
        steps = []
        for layer in range(layers):
            size = wanted if kind == "full" else int(generator.integers(1, wanted + 1))
            chosen = generator.choice(experts, size, replace=False, p=weight)
            steps.append([Expert(layer, int(one)) for one in chosen])
        batches.append(steps)
    return batches


def make_cache(policy: Any, slots: int, layers: int, experts: int, top_k: int = 1, audit: Any = None) -> ExpertCache:
    return ExpertCache(Layout.plain([experts] * layers, top_k), slots, make_policy(policy), audit)
