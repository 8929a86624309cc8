"""`MovedLowRank`: LoRA that starts elsewhere than at nothing, beside a matrix that stays as it is: scale (B A - B0 A0) x.

PiSSA and OLoRA start A and B as directions of W, and take these out of W. Here W stays, and what the adapter started as is taken off again
beside it, so that it is plain LoRA of twice the rank on the base that everybody has.
"""
# Shapes: C inputs, O outputs, R rank

from typing import Any

import torch
from torch import Tensor, nn

from anabranch.adapters.graft import layers_of, patterns_of
from anabranch.adapters.low_rank import LowRank, Pair
from anabranch.adapters.numbers import Numbers
from anabranch.adapters.put_on import put_on
from anabranch.adapters.tuners.build import started_pairs
from anabranch.config import configclass
from anabranch.lm.decoder import Decoder
from anabranch.nn import BuildContext, Count
from anabranch.nn.linear import Projection

__all__ = ["MovedLowRank", "put_moved"]


class MovedLowRank(LowRank, kind="moved_low_rank"):
    """scale (B A - B0 A0) x, which starts as nothing wherever A and B start."""

    @configclass
    class Config(LowRank.Config):
        """As of `LowRank`."""

        def count(self, projection: Projection, context: BuildContext) -> Count:
            """Both pairs, of which one learns."""
            each = LowRank.Config.count(self, projection, context)
            return each + each

    a0: Tensor
    b0: Tensor

    def __init__(self, config: Any, projection: Projection, context: BuildContext) -> None:
        super().__init__(config, projection, context)
        self.register_buffer("a0", self.a.detach().clone())
        self.register_buffer("b0", self.b.detach().clone())

    @torch.no_grad()
    def begin(self, pair: Pair) -> None:
        """Start as these numbers."""
        for name in ("a", "a0"):
            getattr(self, name).copy_(pair.a_RC)
        for name in ("b", "b0"):
            getattr(self, name).copy_(pair.b_OR)

    def product(self, x: Tensor) -> Tensor:
        """What is added to y."""
        started = nn.functional.linear(nn.functional.linear(x, self.a0), self.b0) * self.scale
        return super().product(x) - started

    def numbers(self) -> Numbers:
        """The same as plain LoRA, of twice the rank."""
        a_RC, b_OR = torch.cat([self.a.detach(), self.a0]), torch.cat([self.b.detach(), -self.b0], 1)
        return Pair(a_RC, b_OR, self.scale * len(a_RC))

    def pair(self) -> Pair:
        """As `numbers`."""
        made = self.numbers()
        assert isinstance(made, Pair)
        return made


def put_moved(model: Decoder, config: Any, parts: tuple[str, ...], *, seed: int) -> Decoder:
    """Put LoRA onto ``model``, in place, that starts as peft starts it by ``config``. Raises as `started_pairs` and `put_on`."""
    pairs, known = started_pairs(model, config, parts, seed=seed)
    layers = {part: MovedLowRank.Config(rank=pair.rank, alpha=float(pair.alpha)) for part, pair in pairs.items()}
    put_on(model, patterns_of(layers, known), seed=seed)
    for part, layer in layers_of(model).items():
        layer.begin(pairs[part])
    return model
