import random

import pytest

from anabranch.data import DataConfig, Files
from anabranch.depth.duo_llm import DuoFFN
from anabranch.lm import Decoder
from anabranch.nn import SelfAttention
from anabranch.train import RunConfig, TrainConfig


@pytest.fixture
def duo_run(tmp_path, monkeypatch):
    """A function from fields of `TrainConfig` to a tiny run of a duo model on a little text."""
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path / "cache"))
    draw = random.Random(0)
    text = tmp_path / "text.txt"
    text.write_text("".join(draw.choice(["ab", "cde", "fg "]) for _ in range(3000)))

    def make(model=None, **train):
        settings = {"steps": 4, "batch_size": 4, "learning_rate": 1e-2, "eval_tokens": 128, "device": "cpu"}
        layers = DuoFFN.Config(big=24, small=4)
        model = model or Decoder.Config(
            dim=16, num_layers=3, attention=SelfAttention.Config(num_heads=2), feed_forward=layers
        )
        return RunConfig(
            model=model,
            data=DataConfig(corpus=Files.Config(paths=(str(text),)), sequence_length=16),
            train=TrainConfig(**{**settings, "eval_every": None, "checkpoint_every": 2, "log_every": 1, **train}),
        )

    return make
