"""Routed heads of our own attentions, and `RoutedAttention`, the part of a decoder that has them."""
# Shapes: B sequences, L queries, S keys, H heads, D width of a head, W model width

from typing import Any

from torch import Tensor, nn

from anabranch.config import configclass
from anabranch.errors import ConfigError
from anabranch.heads.config import HeadRouting
from anabranch.heads.form import Decision, Form, Shape, argument
from anabranch.heads.routed_heads import RoutedHeads
from anabranch.nn.attention import Attention, SelfAttention
from anabranch.nn.context import BuildContext, Count, ForwardContext
from anabranch.nn.description import WeighedHeads
from anabranch.nn.linear import call_linear, is_plain, numbers_of
from anabranch.nn.some_heads import can_spare, join_some
from anabranch.routing import RoutingContext
from anabranch.routing.context import argument_of

__all__ = ["OwnForm", "RoutedAttention"]


class OwnForm(Form):
    """An attention that says what each head gives (`anabranch.nn.Attention.per_head`), before a last projection ``out``."""

    def shape(self, attention: nn.Module) -> Shape:
        """Its ``num_heads``, the outputs of ``out``, its ``layer``."""
        if isinstance(attention, Attention) and type(attention).per_head is Attention.per_head:
            raise ConfigError(
                f"a {type(attention).__name__} does not say what each of its heads gives (per_head), so they cannot be routed"
            )
        num_heads, out = getattr(attention, "num_heads", None), getattr(attention, "out", None)
        if not isinstance(num_heads, int) or not isinstance(out, nn.Module):
            raise ConfigError(
                f"a {type(attention).__name__} has per_head, but not num_heads and a last projection out, so its heads cannot be routed"
            )
        try:
            width = numbers_of(out)[0].shape[0]
        except ConfigError:
            # A layer that is no matrix; whoever builds it knows the width.
            width = 0
        layer = getattr(attention, "layer", 0)
        return Shape(num_heads, width, layer if isinstance(layer, int) else 0)

    def run(self, heads: RoutedHeads, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """y_BLW."""
        attention: Any = heads.attention
        x_BLW, context = argument("x_BLW", 0, args, kwargs), argument_of(RoutingContext, args, kwargs)
        decision = heads.decide(x_BLW, context)
        y_BHLD = attention.per_head(*args, **kwargs, some=decision.some)
        y_BLHD = decision.scaled(y_BHLD.transpose(1, 2))
        self._count(heads, x_BLW, y_BLHD, decision, context)
        if decision.some is not None and self._joins_in_parts(attention, y_BLHD, decision):
            return join_some(y_BLHD, attention.out.weight, attention.out.bias, decision.some)
        return call_linear(attention.out, y_BLHD.flatten(2), context)

    def _joins_in_parts(self, attention: Any, y_BLHD: Tensor, decision: Decision) -> bool:
        return is_plain(attention.out) and can_spare(y_BLHD, attention.out.weight, decision.some)

    def _count(self, heads: RoutedHeads, x_BLW: Tensor, y_BLHD: Tensor, decision: Decision, context: Any) -> None:
        """Note the work; what a store attends itself it computes whole."""
        if not heads.counts:
            return
        attention: Any = heads.attention
        batch, length, num_heads, width = y_BLHD.shape
        cache = getattr(context, "cache", None)
        past = getattr(cache, "length", 0) if cache is not None else 0
        before = past if isinstance(past, int) else 0
        seen = length * before + length * (length + 1) // 2
        tokens, inner = batch * length, num_heads * width
        is_own = isinstance(attention, SelfAttention)
        stores = 2 * attention.num_kv_heads * width if is_own else 0
        some = decision.some
        spares = some is not None and is_own and attention.scoring.is_plain and not hasattr(cache, "attend")
        is_spared = is_own and attention.spares_queries(x_BLW, some)
        is_spared = is_spared and self._joins_in_parts(attention, y_BLHD, decision)
        heads.work.add(
            by_head=2 * tokens * inner * x_BLW.shape[-1],
            others=tokens * x_BLW.shape[-1] * stores,
            core=2 * batch * inner * seen,
            pairs=tokens * num_heads,
            share=some.share if some is not None and spares else 1.0,
            share_by_head=some.share_of_products if some is not None and is_spared else 1.0,
        )


class RoutedAttention(RoutedHeads, Attention, kind="routed_heads"):
    """An attention of a decoder with routed heads: it trains, generates, saves, serves and is recorded as any other.

    The losses of its layers go to the forward context, those of the rate added up over the layers.
    """

    @configclass
    class Config(Attention.Config):
        """Attributes: ``attention``, whose heads are routed; ``heads``, how."""

        attention: Attention.Config = SelfAttention.Config()
        heads: HeadRouting = HeadRouting(num_shared=2)

        def __post_init__(self) -> None:
            if isinstance(self.attention, RoutedAttention.Config):
                raise ConfigError("attention.attention has routed heads already; name what is inside of it")
            if not isinstance(getattr(self.attention, "num_heads", None), int):
                raise ConfigError(
                    f"attention of kind {getattr(self.attention.owner, 'kind', None)!r} does not say how many heads it has, so they "
                    "cannot be routed"
                )
            self.heads.check(self.num_heads)

        @property
        def num_heads(self) -> int:
            """Of the attention inside."""
            return int(getattr(self.attention, "num_heads"))  # noqa: B009

        @property
        def kv_heads(self) -> int:
            """Of the attention inside."""
            return self.attention.kv_heads

        @property
        def is_plain(self) -> bool:
            """As the attention inside."""
            return self.attention.is_plain

        def kept(self, dim: int) -> tuple[int, int]:
            """Of the attention inside."""
            return self.attention.kept(dim)

        def width(self, dim: int) -> int:
            """Of the attention inside."""
            return self.attention.width(dim)

        def count(self, context: BuildContext, sequence_length: int) -> Count:
            """The attention inside with all heads on, and what weighs them."""
            added = self.heads.num_parameters(context.dim, self.num_heads)
            return self.attention.count(context.at("attention"), sequence_length) + Count(added, added, 2 * added)

    config: Config

    def __init__(self, config: Config, context: BuildContext) -> None:
        attention = config.attention.build(context.at("attention"))
        self._build(attention, config.heads, layer=context.layer, width=context.dim, generator=context.generator)
        # That of the attention inside is asked for by its own name.
        self.config = config

    def forward(self, x_BLW: Tensor, context: ForwardContext) -> Tensor:
        """Same shape as ``x_BLW``."""
        return super().forward(x_BLW, context)

    def describe(self) -> WeighedHeads | str:
        """For fast paths."""
        return "heads are not routed" if self.gate is None else self.gate.describe(self.attention)

    def per_head(self, *args: Any, **kwargs: Any) -> Tensor:
        """Not to be routed again."""
        raise ConfigError("the attention has routed heads already; wrap the one inside of it (.attention)")
