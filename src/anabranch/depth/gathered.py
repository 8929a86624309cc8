"""A block of a stack on some tokens of a sequence, at the places that they have in it, with attention that the caller does.

`BlockStack.block` runs whole sequences. Here a block is given rows that were gathered, their original positions, and a function that gets
queries, keys and values with their positions in them, and gives what attention gives. So who skips tokens decides what is kept, who sees
whom, and looks at how attention is spread. Nothing of the model is copied or changed.
"""
# Shapes: B sequences, K gathered tokens, S keys, H query heads, G key heads, D width (of the model, or of a head)

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from anabranch.depth.decoder_stack import DecoderStack
from anabranch.errors import ConfigError
from anabranch.nn.attention import distinct
from anabranch.nn.causal import attention, causal_attention
from anabranch.nn.context import ForwardContext
from anabranch.nn.scored import PLAIN, Scoring, scored_attention

if TYPE_CHECKING:
    from anabranch.depth.stack import BlockStack
    from anabranch.depth.transformers_stack import TransformersStack

__all__ = ["Attend", "AttendedBy", "GatheredBlocks", "Looks", "Weigh", "gathered", "visible"]


@dataclass(frozen=True)
class Looks:
    """How queries of a block look at keys.

    Attributes:
        scale: factor on the product of a query and a key.
        window: positions that a query sees, its own among them; None for all before it.
        sink_H: scores of sinks, which take weight and give nothing; None without.
    """

    scale: float
    window: int | None = None
    sink_H: Tensor | None = None


# (query_BHKD, key_BGSD, value_BGSD, mask_BKS) -> y_BHKD. None masks nothing: the queries are those of all keys, each seeing those before it
# and its own, or there is one query, which sees all keys.
Weigh = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


class Attend(Protocol):
    """What does a block's attention."""

    def __call__(
        self, query_BHKD: Tensor, key_BGKD: Tensor, value_BGKD: Tensor, weigh: Weigh, looks: Looks, /
    ) -> Tensor:
        """y_BHKD of the gathered tokens; ``weigh`` is the block's own attention."""


class GatheredBlocks(Protocol):
    """The blocks of a stack."""

    @property
    def stack(self) -> "BlockStack":
        """Whose they are."""

    def run(
        self, layer: int, x_BKD: Tensor, position_BK: Tensor, attend: Attend, *, real_BK: Tensor | None = None
    ) -> Tensor:
        """x_BKD behind the block.

        Args:
            layer: number of the block.
            x_BKD: the gathered tokens.
            position_BK: int64, their places in their sequences; ``[1, K]`` where all sequences have the same.
            attend: does the attention.
            real_BK: False at what only fills a row up; None for nothing.

        Raises ConfigError where the block hands on what belongs to tokens from layer to layer, which others may have skipped.
        """

    def count_keys(self, layer: int) -> int:
        """Multiply-adds of `keys_of`, for each token."""


class _Found(Exception):  # noqa: N818
    """Ends a block when its keys and values are known."""

    def __init__(self, key_BGKD: Tensor, value_BGKD: Tensor) -> None:
        super().__init__("keys and values")
        self.key_BGKD, self.value_BGKD = key_BGKD, value_BGKD


def keys_of(blocks: GatheredBlocks, layer: int, x_BKD: Tensor, position_BK: Tensor) -> tuple[Tensor, Tensor]:
    """(key_BGKD, value_BGKD) that a block makes of tokens, which go no further into it than its first projection."""

    def stop(query: Tensor, key: Tensor, value: Tensor, weigh: Weigh, looks: Looks) -> Tensor:
        raise _Found(key, value)

    try:
        blocks.run(layer, x_BKD, position_BK, stop)
    except _Found as found:
        return found.key_BGKD, found.value_BGKD
    raise ConfigError(f"block {layer} has no attention, so it has no keys and values to keep; use kv='drop'")


def gathered(stack: "BlockStack") -> GatheredBlocks:
    """The blocks of ``stack``. Raises ConfigError for one that is neither of our decoder nor of transformers."""
    if isinstance(stack, DecoderStack):
        return DecoderBlocks(stack)
    from anabranch.depth.transformers_stack import TransformersStack

    if isinstance(stack, TransformersStack):
        return TransformersBlocks(stack)
    raise ConfigError(
        f"tokens cannot be skipped in a {type(stack).__name__}; give a stack of an anabranch Decoder or of transformers (stack_of)"
    )


def visible(
    query_position_BK: Tensor, key_position_BS: Tensor, key_real_BS: Tensor | None, window: int | None
) -> Tensor:
    """bool ``[B, K, S]``: the keys at or before each query, within the window, that are real."""
    behind_BKS = query_position_BK.unsqueeze(2) - key_position_BS.unsqueeze(1)
    seen_BKS = behind_BKS >= 0
    if window is not None:
        seen_BKS = seen_BKS & (behind_BKS < window)
    return seen_BKS if key_real_BS is None else seen_BKS & key_real_BS.unsqueeze(1)


def _matrices_but_last(attention_module: Any, last: tuple[str, ...]) -> int:
    """Numbers of the matrices of an attention layer that make queries, keys and values."""
    return sum(
        one.numel()
        for name, one in attention_module.named_parameters()
        if one.dim() > 1 and name.split(".")[0] not in last
    )


class DecoderBlocks:
    """See `GatheredBlocks`: of our decoder."""

    def __init__(self, stack: DecoderStack) -> None:
        self.stack = stack

    def run(
        self, layer: int, x_BKD: Tensor, position_BK: Tensor, attend: Attend, *, real_BK: Tensor | None = None
    ) -> Tensor:
        """See `GatheredBlocks.run`."""
        model, (batch, length) = self.stack.module, x_BKD.shape[:2]
        context = ForwardContext(
            item_mask_N=None if real_BK is None else real_BK.reshape(-1),
            sequence_length=length,
            is_measured=False,
            position_BL=position_BK.expand(batch, length),
            rotary=model.rotary(distinct(position_BK), model._dtype(x_BKD.device)),
            cache=AttendedBy(attend),
        )
        y_BKD = model.blocks[layer](x_BKD, context)
        if context.carry:
            raise ConfigError(
                f"block {layer} hands {next(iter(context.carry))!r} of its tokens on to later blocks, where other tokens are computed; "
                "such a design cannot skip tokens"
            )
        return y_BKD

    def count_keys(self, layer: int) -> int:
        """See `GatheredBlocks.count_keys`."""
        return _matrices_but_last(getattr(self.stack.module.blocks[layer], "attention", nn.Module()), ("out",))


class AttendedBy:
    """What a decoder's attention is given as its key-value store, see `anabranch.nn.context.AttendingStore`: ``attend`` does it all."""

    takes_scoring = True

    def __init__(self, attend: Attend) -> None:
        self._attend = attend

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scoring: Scoring = PLAIN) -> Tensor:
        """See `anabranch.nn.context.AttendingStore`."""
        scale = key.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale

        def weigh(query: Tensor, key: Tensor, value: Tensor, mask_BKS: Tensor | None) -> Tensor:
            mask = None if mask_BKS is None else mask_BKS.unsqueeze(1)
            if scoring is not PLAIN:
                # A mask has the window in it, by positions; the store's own is by places among what was kept.
                by_mask = scoring if mask is None else replace(scoring, window=None)
                return scored_attention(query, key, value, by_mask, mask)
            if mask is None and query.shape[2] == key.shape[2]:
                return causal_attention(query, key, value)
            return attention(query, key, value, attn_mask=mask)

        return self._attend(query, key, value, weigh, Looks(scale, scoring.window, scoring.sink_H))


# What does the attention of a block of transformers that runs in this thread.
_RUNNING: ContextVar["_Running | None"] = ContextVar("_RUNNING", default=None)
_NAME = "anabranch_gathered"


@dataclass(frozen=True)
class _Running:
    """A block that runs.

    Attributes:
        attend: does its attention.
        window: of the block.
        implementation: the model's own, ``sdpa`` or ``eager``.
    """

    attend: Attend
    window: int | None
    implementation: str


class TransformersBlocks:
    """See `GatheredBlocks`: of transformers' models. While one of their blocks runs here no other thread may run the same model."""

    def __init__(self, stack: "TransformersStack") -> None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        self.stack = stack
        if _NAME not in ALL_ATTENTION_FUNCTIONS:
            ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention)

    def run(
        self, layer: int, x_BKD: Tensor, position_BK: Tensor, attend: Attend, *, real_BK: Tensor | None = None
    ) -> Tensor:
        """See `GatheredBlocks.run`."""
        from anabranch.depth.transformers_stack import SLIDING, _named

        stack: Any = self.stack
        window = stack.config.sliding_window if stack.kinds[layer] == SLIDING else None
        values: dict[str, Any] = {"hidden_states": x_BKD, "position_ids": position_BK, "use_cache": False}
        if not stack.has_learned_positions:
            values["position_embeddings"] = stack.body.rotary_emb(x_BKD, position_ids=position_BK)
        block = stack.layers[layer]
        with _attending(stack.config, attend, window):
            made = block(**_named(stack._parameters[layer], values))
        return made[0] if isinstance(made, tuple) else made

    def count_keys(self, layer: int) -> int:
        """See `GatheredBlocks.count_keys`."""
        block = self.stack.layers[layer]
        return _matrices_but_last(getattr(block, "self_attn", None) or block.attn, ("o_proj", "c_proj"))


@contextmanager
def _attending(config: Any, attend: Attend, window: int | None) -> Iterator[None]:
    """The model's attention is done by ``attend``; afterwards as it was."""
    before = config._attn_implementation
    token = _RUNNING.set(_Running(attend, window, before))
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _RUNNING.reset(token)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """What transformers calls in the place of its own attention."""
    running = _RUNNING.get()
    if running is None:
        raise ConfigError("a model whose tokens are being skipped was run by another thread; give each thread a model")
    own = _own_attention(module, running.implementation)

    def weigh(query: Tensor, key: Tensor, value: Tensor, mask_BKS: Tensor | None) -> Tensor:
        mask = None if mask_BKS is None else mask_BKS.unsqueeze(1)
        is_cut = running.window is not None and key.shape[2] > running.window
        if mask is None and query.shape[2] > 1 and (is_cut or running.implementation == "eager"):
            mask = _causal(key.shape[2], running.window, key.device)
        if mask is not None and running.implementation == "eager":
            # Which adds it to scores.
            mask = torch.where(mask, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
        return own(module, query, key, value, mask, **options)[0].transpose(1, 2)

    scale = options.get("scaling") or key.shape[-1] ** -0.5
    y_BHKD = running.attend(query, key, value, weigh, Looks(scale, running.window))
    return y_BHKD.transpose(1, 2), None


def _own_attention(module: Any, implementation: str) -> Callable[..., Any]:
    """The attention function that a model of transformers would have called."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get(implementation, eager)


def _causal(length: int, window: int | None, device: torch.device) -> Tensor:
    """bool ``[1, 1, L, L]``: a sequence sees itself, as far as the window reaches."""
    place_L = torch.arange(length, device=device)[None]
    return visible(place_L, place_L, None, window).unsqueeze(1)
