"""`Imitation`: learn what was written in episodes that somebody else played, before any is played (a warm start).

The loss is over what the player wrote; what the world wrote, and prompts, are read and not learned. Router-R1's traces ask models that are
drawn at random, so that they teach the language and nothing of routing.
"""
# Shapes: N traces, B of a batch, L tokens of the longest

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.bounds import Size
from anabranch.config import Field, configclass
from anabranch.errors import CapacityError, ConfigError
from anabranch.machine import room_bytes
from anabranch.rl.tokens.trajectory import Samples, Trajectory, padded
from anabranch.rl.tokens.world import TokenWorld
from anabranch.train import DecoderTask, Losses, TaskContext
from anabranch.train.examples import Examples

__all__ = ["Imitation"]

# Beside the run's seed: traces to learn from, and others.
_LEARNED, _HELD_OUT = 0, 1
# Of a token of a trace, as tensors and while it is written.
_BYTES_PER_TOKEN = 150


class Imitation(DecoderTask, kind="imitation"):
    """See the module. A checkpoint is a model folder, with the world's tokenizer.

    Attributes:
        world: whose traces.
    """

    headline = "nats_per_token"
    unit = "traces"
    material = "traces"

    @configclass
    class Config(DecoderTask.Config):
        """The world and the model.

        Attributes:
            world: whose traces.
            model: the decoder's shape.
            traces: to learn from.
            eval_traces: to be measured by, which are others.
        """

        world: TokenWorld.Config
        traces: Size = Field(default=4096, ge=1)
        eval_traces: Size = Field(default=128, ge=1)

    config: Config

    def __init__(self, config: Config, *, model: nn.Module | None = None) -> None:
        super().__init__(config, model=model)
        self.world: TokenWorld = config.world.build()
        self.tokenizer = self.world.tokenizer
        if self.world.vocab_size > config.model.vocab_size:
            raise ConfigError(
                f"model.vocab_size is {config.model.vocab_size}, but the world has {self.world.vocab_size} tokens; "
                f"set model.vocab_size={self.world.vocab_size}"
            )

    def _samples(self, count: int, seed: int) -> Samples:
        needed, room = _BYTES_PER_TOKEN * count * self.config.model.max_positions, room_bytes()
        if needed > room:
            raise CapacityError(
                f"{count:,} traces take up to {needed / 1e9:.1f} GB, and there are {room / 1e9:.1f}; use fewer"
            )
        made = []
        for prompt, parts in self.world.traces(count, seed=seed):
            each = Trajectory(prompt)
            for tokens, is_own in parts:
                if is_own:
                    each.write(tokens, [0.0] * len(tokens))
                else:
                    each.told(tokens)
            made.append(each)
        longest = max(len(each.ids) for each in made)
        if longest > self.config.model.max_positions:
            raise ConfigError(
                f"a trace has {longest} tokens, and model.max_positions is {self.config.model.max_positions}; make it larger"
            )
        return padded(made)

    def training_data(self, context: TaskContext) -> Examples:
        """Batches of (tokens, which of them were written by the player, which are no padding)."""
        made = self._samples(self.config.traces, 2 * context.settings.seed + _LEARNED)
        return Examples(
            made.token_BL,
            made.own_BL,
            seed=context.settings.seed,
            rank=context.rank,
            world_size=context.world_size,
        )

    def validation_data(self, context: TaskContext) -> tuple[Tensor, Tensor]:
        """Traces that are not learned from."""
        made = self._samples(self.config.eval_traces, 2 * context.settings.seed + _HELD_OUT)
        return made.token_BL, made.own_BL

    def step(self, model: nn.Module, batch: tuple[Tensor, Tensor], context: TaskContext) -> Losses:
        """Cross-entropy of the player's own tokens."""
        token_BL, own_BL = batch
        output = model(token_BL[:, :-1], _targets(token_BL, own_BL))
        return Losses(output.loss, {"cross_entropy": output.cross_entropy, **output.auxiliary}, output.metrics)

    def evaluate(self, model: Any, data: tuple[Tensor, Tensor], context: TaskContext) -> dict[str, Any]:
        """Nats per token of the player's, and how many the model holds for the likeliest."""
        nats, right, count = 0.0, 0, 0
        for token_BL, own_BL in zip(*(each.split(max(context.batch_size, 1)) for each in data), strict=True):
            logits_BLV = model(token_BL[:, :-1]).logits_BLV
            target_BL = _targets(token_BL, own_BL)
            is_own_BL = target_BL != -100
            said_TV, target_T = logits_BLV[is_own_BL].float(), target_BL[is_own_BL]
            nats += float(torch.nn.functional.cross_entropy(said_TV, target_T, reduction="sum"))
            right += int((said_TV.argmax(-1) == target_T).sum())
            count += len(target_T)
        return {
            "nats_per_token": nats / count if count else math.nan,
            "accuracy": right / max(count, 1),
            "tokens": count,
        }


def _targets(token_BL: Tensor, own_BL: Tensor) -> Tensor:
    """What is to be predicted at each place but the last; -100 for what is not learned."""
    return token_BL[:, 1:].masked_fill(~own_BL[:, 1:], -100)
