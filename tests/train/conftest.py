import random
from pathlib import Path

import pytest

from anabranch.data import DataConfig, Files
from anabranch.experts.rexmoe import ProgressiveScaling, ReXMoE
from anabranch.lm import Decoder
from anabranch.nn import SelfAttention, SwiGLU
from anabranch.routing import BiasBalancer, Router, SwitchLoss, ZLoss
from anabranch.train import RunConfig, TrainConfig


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    draw = random.Random(0)
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(draw.choice(["ab", "cde", "fg "]) for _ in range(8000)))
    return file


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def make_run(text_file):
    """A function from fields of `TrainConfig` (and ``model``) to a tiny run with every part whose state must survive."""

    def make(model: Decoder.Config | None = None, **train) -> RunConfig:
        settings = {
            "steps": 6,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "log_every": 1,
            "eval_tokens": 256,
            "device": "cpu",
        }
        return RunConfig(
            model=model or rexmoe_model(),
            data=DataConfig(corpus=Files.Config(paths=(str(text_file),)), sequence_length=16),
            train=TrainConfig(**{**settings, "eval_every": 3, "checkpoint_every": 3, **train}),
        )

    return make


def rexmoe_model(*balance, scope="step") -> Decoder.Config:
    """Two groups of two layers; a mask that grows, a bias that learns."""
    layer = ReXMoE.Config(
        num_experts=4,
        hidden_dim=8,
        reuse=2,
        router=Router.Config(balance=balance or (SwitchLoss.Config(), ZLoss.Config(), BiasBalancer.Config())),
        psr=ProgressiveScaling.Config(start=0.2, end=0.8, scope=scope),
    )
    return Decoder.Config(dim=16, num_layers=4, attention=SelfAttention.Config(num_heads=2), feed_forward=layer)


@pytest.fixture
def dense_model() -> Decoder.Config:
    return Decoder.Config(
        dim=16, num_layers=2, attention=SelfAttention.Config(num_heads=2), feed_forward=SwiGLU.Config(hidden_dim=24)
    )


@pytest.fixture
def routed_model() -> Decoder.Config:
    return rexmoe_model()


@pytest.fixture
def token_mask_model() -> Decoder.Config:
    """One mask per token: drawn from torch's generator in every step."""
    return rexmoe_model(scope="token")


@pytest.fixture
def exact_model() -> Decoder.Config:
    """A routed model whose loss is a plain mean over tokens, however they are split into micro-batches."""
    return rexmoe_model(ZLoss.Config())


@pytest.fixture
def balanced_model():
    """The routed model with other balancers."""
    return rexmoe_model
