"""A pretrained model as a stack of residual blocks, which depth routing runs in another order: four methods, whatever the model's make.

    x, state = stack.embed(tokens);  for each block of the path: x = stack.block(layer, x, state);  logits = stack.head(x, state)

Nothing of the model is copied or changed. `stack_of` finds the stack of a model; `run_path` is the loop above.
"""
# Shapes: B sequences, R of them, L new positions, D width, V vocabulary

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from anabranch.depth.decisions import check_depth_path
from anabranch.errors import ConfigError
from anabranch.lm.cache import KeyValueCache
from anabranch.lm.decoder import Decoder
from anabranch.nn.visits import Path, steps_of

__all__ = ["BlockStack", "run_path", "stack_of"]


@runtime_checkable
class BlockStack(Protocol):
    """A stack of residual blocks of a pretrained model."""

    @property
    def module(self) -> nn.Module:
        """The model, which owns all weights."""

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks."""

    @property
    def num_blocks(self) -> int:
        """How many there are, numbered from 0."""

    @property
    def width(self) -> int:
        """D, of the residual stream."""

    @property
    def vocabulary(self) -> int:
        """V."""

    @property
    def max_positions(self) -> int:
        """Longest sequence that the model is meant for."""

    @property
    def device(self) -> torch.device:
        """Of the embedding."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the embedding."""

    def embed(
        self,
        token_BL: Tensor,
        attention_mask: Tensor | None = None,
        *,
        position_BL: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> tuple[Tensor, Any]:
        """(x_BLD that goes into the first block, the state of this pass, which the other methods are given).

        Args:
            token_BL: int64, the new positions.
            attention_mask: ``[B, L]``, 0 or False for padding, on either side; None for no padding.
            position_BL: int64, place of each token in its sequence; None counts the real tokens, those in the cache among them.
            cache: of `new_cache`, with the earlier positions; it is extended. The pass ends in `head`, which counts the new positions.

        Raises ConfigError for ids outside the vocabulary (of a decoder, on the CPU), a mask of another shape, and where the model has no
        such positions.
        """

    def block(self, layer: int, x_BLD: Tensor, state: Any, *, rows: Sequence[int] | None = None) -> Tensor:
        """x_BLD behind one visit of a block, all sequences in it.

        Args:
            layer: number of the block.
            x_BLD: what goes in.
            state: of the pass; it counts visits where there is a cache.
            rows: numbers of the sequences that run the block, each at most once; the others stay as they are. None for all.
        """

    def fork(self, state: Any) -> Any:
        """A state to go on with from here along another path, as tree search does; the first one stays. For passes without a cache."""

    def head(self, x_BLD: Tensor, state: Any, *, last_only: bool = False) -> Tensor:
        """Logits, ``[B, L, V]``; of the last position alone, ``[B, 1, V]``, with ``last_only``. May be called at any depth.

        The first call of a pass with a cache counts its new positions there: no block may run after it.
        """

    def count(self, layer: int, length: int, context: int) -> int:
        """Multiply-adds of one visit of a block for ``length`` new positions; the last sees ``context`` positions, its own among them.

        Matrices and attention; not norms, activations and additions.
        """

    def new_cache(self, max_length: int) -> KeyValueCache:
        """An empty cache for up to ``max_length`` positions: a slot for each visit of a block (see `anabranch.nn.visits`)."""

    def fingerprint(self) -> str:
        """What tells the model from others, see `anabranch.depth.fingerprint`: 64 hexadecimal digits, the same for a quantised copy."""


def stack_of(model: Any) -> BlockStack:
    """The stack of ``model``: our `Decoder`, or transformers' causal language models Llama, Qwen2, Qwen3, Mistral and GPT-2.

    A stack is given back as it is. Raises ConfigError for any other model, with what is supported.
    """
    if isinstance(model, Decoder):
        from anabranch.depth.decoder_stack import DecoderStack

        return DecoderStack(model)
    from anabranch.depth.transformers_stack import SUPPORTED, TransformersStack, is_supported

    if is_supported(model):
        return TransformersStack(model)
    if isinstance(model, BlockStack) and not isinstance(model, nn.Module):
        return model
    raise ConfigError(
        f"depth routing knows no blocks of a {type(model).__name__}; give an anabranch Decoder, one of transformers' "
        f"{', '.join(SUPPORTED)}, or an object with the methods of anabranch.depth.BlockStack"
    )


def run_path(
    stack: BlockStack,
    token_BL: Tensor,
    path: Path | None = None,
    *,
    cache: KeyValueCache | None = None,
    attention_mask: Tensor | None = None,
    last_only: bool = False,
) -> Tensor:
    """Logits, ``[B, L, V]``, of the model when it runs the blocks of ``path``.

    Args:
        stack: of the model.
        token_BL: int64, the new positions.
        path: blocks in order, e.g. ``(0, 1, 1, 3)``, or such a path for each sequence; None runs each block once.
        cache: as of `BlockStack.embed`; it is extended.
        attention_mask: likewise.
        last_only: logits of the last position alone, ``[B, 1, V]``.

    Raises ConfigError for a block that there is not, one that comes more than twice, or another number of paths than sequences.
    """
    batch = len(token_BL)
    checked = check_depth_path(range(stack.num_blocks) if path is None else path, stack.num_blocks, batch)
    x_BLD, state = stack.embed(token_BL, attention_mask, cache=cache)
    for layer, rows in steps_of(checked, 1, batch):
        x_BLD = stack.block(layer, x_BLD, state, rows=rows)
    return stack.head(x_BLD, state, last_only=last_only)
