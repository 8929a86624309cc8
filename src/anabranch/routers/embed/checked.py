"""What an embedder gives, looked at before anybody learns from it: embedders are written by others too."""
# Shapes: N texts, D dimensions, O rows of another length than 1

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from anabranch.errors import DataError
from anabranch.routers.contract.strategy import Embed
from anabranch.routers.embed.embedder import Embedder

__all__ = ["dim_of", "embed_of", "unit_vectors"]

# A length so near to 1 is one: float16 has about three digits.
NEAR = 1e-3


def unit_vectors(embedder: Embedder, texts: Sequence[str]) -> np.ndarray:
    """What ``embedder.embed(texts)`` gives, as an embedder has to give it: one row for each text, and each of length 1.

    Rows of another length are scaled to 1; rows of zeros stay. What learns from vectors takes their lengths for a measure of how much was
    seen, so that one row of a huge length would outweigh all the others together.

    Args:
        embedder: that may be anybody's; one that does not say its `dim` may give rows of any dimension.
        texts: any number.

    Returns: float32 ``[N, D]``.

    Raises DataError for anything but N rows of ``embedder.dim`` finite numbers; and whatever the embedder raises.
    """
    dim = dim_of(embedder)
    if not len(texts):
        return np.zeros((0, dim or 0), np.float32)
    return checked_rows(embedder.embed(texts), len(texts), dim)


def checked_rows(given: Any, count: int, dim: int | None = None, *, source: str = "the embedder gave") -> np.ndarray:
    """What somebody gave as vectors of ``count`` texts, at least one, as `unit_vectors` gives them.

    Args:
        given: arrays, tensors, or lists of them or of numbers.
        count: N.
        dim: D; None for any.
        source: who gave it, for messages.

    Returns: float32 ``[N, D]``.

    Raises DataError for anything but N rows of D finite numbers.
    """
    given_ND = _numbers(given, source)
    if given_ND.ndim != 2 or len(given_ND) != count or given_ND.shape[1] != (dim or max(given_ND.shape[1], 1)):
        due = f"[{count}, {dim or 'dimensions'}]"
        raise DataError(f"{source} numbers of shape {list(given_ND.shape)} where {due} is due")
    if not np.isfinite(given_ND).all():
        row = int((~np.isfinite(given_ND)).any(1).argmax())
        raise DataError(f"{source} numbers that are not finite, of text {row} of {count}")
    is_odd_N = ~(np.abs(_lengths(given_ND) - 1) <= NEAR)
    if is_odd_N.any():
        given_ND = given_ND.astype(np.float64)
        given_ND[is_odd_N] = scaled(given_ND[is_odd_N])
    return given_ND.astype(np.float32, copy=False)


def are_unit(vector_ND: np.ndarray) -> np.ndarray:
    """Whether rows are as `unit_vectors` gives them: of length 1, or of zeros. Bool ``[N]``."""
    # A little more than there, for what rounding to float32 makes of a length.
    return (np.abs(_lengths(vector_ND) - 1) <= 1.01 * NEAR) | ~vector_ND.any(1)


def embed_of(embedder: Embedder | None) -> Embed | None:
    """`unit_vectors` of an embedder, as `Strategy.connect` takes it; None for none."""
    return None if embedder is None else partial(unit_vectors, embedder)


def dim_of(embedder: Embedder) -> int | None:
    """``embedder.dim``; None where it does not say. Raises DataError for what is no dimension."""
    try:
        said: Any = getattr(embedder, "dim", None)
    except NotImplementedError:
        return None
    if said is None:
        return None
    if not isinstance(said, int | np.integer) or said < 1:
        raise DataError(f"dim of the embedder is {str(said)[:80]!r}; it must be an integer of at least 1")
    return int(said)


def _numbers(given: Any, source: str) -> np.ndarray:
    """Raises DataError for what is none."""
    try:
        made = np.asarray([_detached(row) for row in given] if isinstance(given, list | tuple) else _detached(given))
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise DataError(f"{source} what is no array of numbers ({type(error).__name__})") from None
    if made.dtype.kind not in "iuf":
        raise DataError(f"{source} values of type {made.dtype}, not numbers")
    if made.dtype in (np.float32, np.float64):
        return made
    with np.errstate(over="ignore"):
        # A wider float may be larger than any of these, which is infinite then.
        return made.astype(np.float64)


def _detached(given: Any) -> Any:
    """A tensor without what torch would need for its gradient, which no array has; all else as it is."""
    detach = getattr(given, "detach", None)
    return detach() if callable(detach) else given


def _lengths(vector_ND: np.ndarray) -> np.ndarray:
    """Of rows; infinite where the squares are larger than any float."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(np.sqrt(np.einsum("nd,nd->n", vector_ND, vector_ND)))


def scaled(row_OD: np.ndarray) -> np.ndarray:
    """Rows of length 1, but for those of zeros; by the largest number first, since a square may be larger than any float."""
    largest_O1 = np.abs(row_OD).max(1, keepdims=True)
    row_OD = row_OD / np.where(largest_O1 > 0, largest_O1, 1.0)
    length_O1 = np.linalg.norm(row_OD, axis=1, keepdims=True)
    return np.asarray(row_OD / np.where(length_O1 > 0, length_O1, 1.0))
