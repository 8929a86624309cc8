"""What positions of a pass see: masks and places that a caller gives, and how many pairs of query and key there are."""
# Shapes: B sequences, L new positions

from torch import Tensor

from anabranch.errors import ConfigError

__all__ = ["check_mask", "check_padding", "check_positions", "seen_pairs"]


def check_mask(attention_mask: Tensor | None, token_BL: Tensor) -> Tensor | None:
    """The mask as bool on the tokens' device; None where it masks nothing. Raises ConfigError for another shape."""
    if attention_mask is None:
        return None
    if attention_mask.shape != token_BL.shape:
        raise ConfigError(
            f"attention_mask has shape {tuple(attention_mask.shape)} and the tokens {tuple(token_BL.shape)}; give the new positions "
            "alone, the cache knows the earlier ones"
        )
    mask_BL = attention_mask.to(token_BL.device).bool()
    return None if bool(mask_BL.all()) else mask_BL


def check_positions(position_BL: Tensor, token_BL: Tensor) -> Tensor:
    """The places of tokens in their sequences, on the tokens' device. Raises ConfigError for another shape."""
    if position_BL.shape != token_BL.shape:
        raise ConfigError(
            f"position_BL has shape {tuple(position_BL.shape)} and the tokens {tuple(token_BL.shape)}; give one for each new position"
        )
    return position_BL.to(token_BL.device)


def seen_pairs(length: int, context: int, window: int | None = None) -> int:
    """Pairs of a query and a position that it sees: ``length`` queries in a row, the last of which sees ``context`` positions.

    Args:
        length: queries.
        context: positions up to the last query, its own among them; at least ``length``.
        window: most positions that a query sees; None for all.

    Raises ConfigError for fewer positions than queries.
    """
    if not 0 <= length <= context:
        raise ConfigError(f"length is {length} and context {context}; every new position is one of those seen")
    first = context - length + 1
    growing = length if window is None else min(length, max(0, window - first + 1))
    return growing * (2 * first + growing - 1) // 2 + (length - growing) * (window or 0)


def check_padding(mask_BL: Tensor | None, past: int, *, has_window: bool) -> None:
    """Raise ConfigError for padding behind real tokens of a cache where attention has a window, which counts places and not tokens.

    Args:
        mask_BL: of the new positions; None for no padding.
        past: positions in the cache.
        has_window: whether attention of some block has one.
    """
    if mask_BL is None or not has_window:
        return
    if past or bool((mask_BL[:, :-1] & ~mask_BL[:, 1:]).any()):
        raise ConfigError(
            "there is padding behind real tokens, and attention of the model has a window, which would count it among what new tokens see; "
            "with a key-value cache, pad on the left"
        )
