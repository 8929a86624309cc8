"""A layer of a decoder: the interface of a block, and the usual one."""
# Shapes: B batch, L positions, D width

from typing import Any, ClassVar

from torch import Tensor, nn

from anabranch.config import Config as BaseConfig
from anabranch.config import Part, configclass
from anabranch.nn.attention import Attention
from anabranch.nn.context import BuildContext, Count, ForwardContext
from anabranch.nn.feed_forward import FeedForward

__all__ = ["Block", "PreNorm", "Sandwich"]


class Block(Part, nn.Module, family="block", default="pre_norm"):
    """Interface: ``(x_BLD, context) -> x_BLD`` of the next layer.

    A design is a subclass whose config has ``build(context)`` and ``count(context, sequence_length)``. The context says which attention
    and feed-forward layer the model wants in this block; a design that wraps a block builds it from the same context.
    """

    @configclass
    class Config(BaseConfig):
        """Base of block configs. ``passes_gradient`` says whether gradients go through it to what is below, and into a wrapped block."""

        passes_gradient: ClassVar[bool] = True

        def count(self, context: BuildContext, sequence_length: int) -> Count:
            """Sizes of this block; attention is counted over half of ``sequence_length``, the mean causal context."""
            raise NotImplementedError  # abstract

    def forward(self, x_BLD: Tensor, context: ForwardContext) -> Tensor:
        """x_BLD of the next layer."""
        raise NotImplementedError  # abstract


class PreNorm(Block, kind="pre_norm"):
    """Pre-norm attention and pre-norm feed-forward, each added to the residual stream.

    x = x + attention(norm(x));  x = x + feed_forward(norm(x))
    """

    @configclass
    class Config(Block.Config):
        """Nothing to choose: the parts are the model's."""

        def count(self, context: BuildContext, sequence_length: int) -> Count:
            """Its attention, its feed-forward layer, and two norms."""
            attention, feed_forward = _parts(context)
            norms = Count(2 * context.dim, 2 * context.dim, 0)
            return (
                attention.count(context.at("attention"), sequence_length)
                + feed_forward.count(context.at("feed_forward"))
                + norms
            )

    def __init__(self, config: Config, context: BuildContext) -> None:
        super().__init__()
        self.config = config
        attention, feed_forward = _parts(context)
        self.attention_norm = context.norm(context.dim)
        self.attention: Attention = attention.build(context.at("attention"))
        self.feed_forward_norm = context.norm(context.dim)
        self.feed_forward: FeedForward = feed_forward.build(context.at("feed_forward"))

    def forward(self, x_BLD: Tensor, context: ForwardContext) -> Tensor:
        """x_BLD of the next layer."""
        x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), context)
        return self.feed_forward.add_to(x_BLD, self.feed_forward_norm, context)


class Sandwich(Block, kind="sandwich"):
    """Norms before and behind attention and feed-forward layer (Gemma 2 and 3; CogView, arXiv 2105.13290).

    x = x + after(attention(norm(x)));  x = x + after(feed_forward(norm(x)))
    """

    @configclass
    class Config(Block.Config):
        """Nothing to choose: the parts are the model's."""

        def count(self, context: BuildContext, sequence_length: int) -> Count:
            """Two norms more than `PreNorm`."""
            return PreNorm.Config().count(context, sequence_length) + Count(2 * context.dim, 2 * context.dim, 0)

    def __init__(self, config: Config, context: BuildContext) -> None:
        super().__init__()
        self.config = config
        attention, feed_forward = _parts(context)
        self.attention_norm = context.norm(context.dim)
        self.attention: Attention = attention.build(context.at("attention"))
        self.attention_after = context.norm(context.dim)
        self.feed_forward_norm = context.norm(context.dim)
        self.feed_forward: FeedForward = feed_forward.build(context.at("feed_forward"))
        self.feed_forward_after = context.norm(context.dim)

    def forward(self, x_BLD: Tensor, context: ForwardContext) -> Tensor:
        """x_BLD of the next layer."""
        x_BLD = x_BLD + self.attention_after(self.attention(self.attention_norm(x_BLD), context))
        return x_BLD + self.feed_forward_after(self.feed_forward(self.feed_forward_norm(x_BLD), context))


def _parts(context: BuildContext) -> tuple[Any, Any]:
    assert context.attention is not None, "a block is built in a model, which says its attention"
    assert context.feed_forward is not None, "and its feed-forward layer"
    return context.attention, context.feed_forward
