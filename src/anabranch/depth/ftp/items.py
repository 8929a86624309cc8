"""What FTP learns from and is measured on: a prompt, whose tokens may be skipped, and what comes after it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anabranch.depth.stack import BlockStack
from anabranch.errors import DataError, InputError

__all__ = ["Item", "check_tokens", "items_of"]


@dataclass(frozen=True)
class Item:
    """Tokens of a prompt, and of its continuation.

    Attributes:
        prompt: ids, at least one.
        continuation: ids; may be empty where only the prompt is looked at.
    """

    prompt: tuple[int, ...]
    continuation: tuple[int, ...] = ()

    @property
    def tokens(self) -> tuple[int, ...]:
        """Both."""
        return self.prompt + self.continuation


def items_of(items: Iterable[Any], stack: BlockStack, *, needs_continuation: bool = True) -> list[Item]:
    """Items, or pairs of (prompt, continuation), as items.

    Raises DataError where there is none, for one that is longer than the model can be, and for one without a prompt or, if it is needed,
    a continuation; InputError for ids that the model has not.
    """
    made: list[Item] = []
    for number, one in enumerate(items):
        item = one if isinstance(one, Item) else Item(*(tuple(int(token) for token in part) for part in one))
        if not item.prompt or (needs_continuation and not item.continuation):
            raise DataError(
                f"item {number} has no {'prompt' if not item.prompt else 'continuation'}; give at least one token"
            )
        if len(item.tokens) > stack.max_positions:
            raise DataError(
                f"item {number} has {len(item.tokens)} tokens; the model takes at most {stack.max_positions}, cut it"
            )
        check_ids(item.tokens, stack)
        made.append(item)
    if not made:
        raise DataError("there are no items; give at least one prompt with its continuation")
    return made


def check_ids(ids: Sequence[int], stack: BlockStack) -> None:
    """Raises InputError for an id that the model has not."""
    low, high = min(ids), max(ids)
    if low < 0 or high >= stack.vocabulary:
        raise InputError(
            f"token id {low if low < 0 else high} is none of the model's; it has 0 to {stack.vocabulary - 1}"
        )


def check_tokens(ids: Any, stack: BlockStack, what: str = "ids") -> Tensor:
    """int64 ``[B, L]`` on the model's device, of a list, lists of one length, or a tensor ``[L]`` or ``[B, L]``.

    Raises InputError for anything else, no token at all, and ids that the model has not.
    """
    try:
        token_BL = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{what} are no tokens ({error}); give a list of ids, or lists of one length") from None
    if token_BL.ndim == 1:
        token_BL = token_BL.unsqueeze(0)
    if token_BL.ndim != 2 or not token_BL.numel() or token_BL.dtype.is_floating_point or token_BL.dtype == torch.bool:
        raise InputError(
            f"{what} have shape {tuple(token_BL.shape)} and type {token_BL.dtype}; give integers [prompts, positions], at least one"
        )
    token_BL = token_BL.long()
    check_ids([int(token_BL.min()), int(token_BL.max())], stack)
    return token_BL.to(stack.device)
