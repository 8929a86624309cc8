"""A pass in which each query sees the keys that a mask says: several continuations of one prompt in one sequence."""
# Shapes: B sequences, L positions, D width

from typing import Any

import torch
from torch import Tensor

from anabranch.depth.decoder_stack import DecoderPass, DecoderStack
from anabranch.depth.stack import BlockStack
from anabranch.depth.transformers_stack import FULL, TransformersPass, TransformersStack
from anabranch.errors import ConfigError

__all__ = ["embed_masked", "takes_masks"]


def takes_masks(stack: BlockStack) -> bool:
    """Whether `embed_masked` can be used: ours and transformers' stacks without windows, which count places and not positions."""
    if isinstance(stack, DecoderStack):
        return stack.module.config.has_plain_attention
    return isinstance(stack, TransformersStack) and set(stack.kinds) == {FULL}


def embed_masked(stack: BlockStack, token_BL: Tensor, mask_BLL: Tensor, position_BL: Tensor) -> tuple[Tensor, Any]:
    """As `BlockStack.embed`.

    Args:
        stack: see `takes_masks`.
        token_BL: int64.
        mask_BLL: bool, True where the query of a row sees the key of a column.
        position_BL: int64, place of each token in the sequence that it continues.

    Raises ConfigError for a stack that takes no masks, or a mask of another shape.
    """
    batch, length = token_BL.shape
    if mask_BLL.shape != (batch, length, length):
        raise ConfigError(
            f"the mask has shape {tuple(mask_BLL.shape)}; for these tokens it must have {(batch, length, length)}"
        )
    if not takes_masks(stack):
        raise ConfigError(
            "attention of this model has windows or a cache of its own, so that a mask of pairs cannot be set"
        )
    x_BLD, state = stack.embed(token_BL, position_BL=position_BL)
    mask_B1LL = mask_BLL.bool().unsqueeze(1)
    if isinstance(state, DecoderPass):
        state.context.attention_mask, state.context.is_causal = mask_B1LL, False
        return x_BLD, state
    assert isinstance(state, TransformersPass)
    # Added to scores, as both of transformers' attentions take it.
    shut = torch.finfo(x_BLD.dtype).min
    state.masks[FULL, None] = torch.zeros(mask_B1LL.shape, dtype=x_BLD.dtype, device=x_BLD.device).masked_fill(
        ~mask_B1LL, shut
    )
    return x_BLD, state
