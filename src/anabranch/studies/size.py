"""`RunSize`: what all arms of a study of small language models share, and the run it makes of a feed-forward."""

from typing import Any

from anabranch.config import Config, Field, configclass, to_dict
from anabranch.nn import FeedForward
from anabranch.presets import language_model
from anabranch.train import RunConfig


@configclass
class RunSize(Config):
    """Base of a study's sizes: model, batch and schedule. A study adds what its arms have besides."""

    num_layers: int = Field(default=4, ge=1)
    dim: int = 128
    sequence_length: int = 256
    batch_size: int = 8  # sequences a step
    steps: int = Field(default=800, ge=1)
    learning_rate: float = 2e-3  # chosen in the ReXMoE study, for the plain model
    warmup: float = 0.15

    @property
    def step_tokens(self) -> int:
        """Tokens of one step."""
        return self.batch_size * self.sequence_length

    def settings(self, full: bool) -> dict[str, Any]:
        """What the result file says about the size."""
        size = "full" if full else "smoke"
        return {"size": size, **to_dict(self), "tokens_per_run": self.steps * self.step_tokens}

    def run_of(self, feed_forward: FeedForward.Config) -> RunConfig:
        """The run of a decoder of this feed-forward."""
        return language_model(
            feed_forward,
            dim=self.dim,
            num_layers=self.num_layers,
            sequence_length=self.sequence_length,
            batch_size=self.batch_size,
            steps=self.steps,
            learning_rate=self.learning_rate,
            warmup=self.warmup,
        )
