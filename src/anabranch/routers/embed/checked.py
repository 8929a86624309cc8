"""What an embedder gives, looked at before anybody learns from it: embedders are written by others too."""
# Shapes: N texts, D dimensions, O rows of another length than 1

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from anabranch.errors import CheckpointError, DataError, InputError, first_line
from anabranch.routers.contract.strategy import Embed, Strategy
from anabranch.routers.embed.embedder import Embedder

__all__ = ["UNIT", "check_dim", "check_gave_unit", "dim_of", "embed_of", "unit_vectors"]

# A length so near to 1 is one: float16 has about three digits.
NEAR = 1e-3

# What says so of an embedder in files of what learned from it.
UNIT = "unit"

# Of several lengths and kinds; some embedders know only words.
SAMPLES = (
    "a",
    "What is the capital of France?",
    "add the numbers 7 and 12, and write down how you did it",
    "def f(x):\n    return [one for one in x if one]",
    "The answer to that question is not known to me; please say it again in other words. " * 8,
)


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
    given_ND = _rows(given, count, dim, source)
    is_odd_N = ~(np.abs(_lengths(given_ND) - 1) <= NEAR)
    if is_odd_N.any():
        given_ND = given_ND.astype(np.float64)
        given_ND[is_odd_N] = scaled(given_ND[is_odd_N])
    return given_ND.astype(np.float32, copy=False)


def _rows(given: Any, count: int, dim: int | None, source: str) -> np.ndarray:
    """As they came. Raises as `checked_rows`."""
    given_ND = _numbers(given, source)
    if given_ND.ndim != 2 or len(given_ND) != count or given_ND.shape[1] != (dim or max(given_ND.shape[1], 1)):
        due = f"[{count}, {dim or 'dimensions'}]"
        raise DataError(f"{source} numbers of shape {list(given_ND.shape)} where {due} is due")
    if not np.isfinite(given_ND).all():
        row = int((~np.isfinite(given_ND)).any(1).argmax())
        raise DataError(f"{source} numbers that are not finite, of text {row} of {count}")
    return given_ND


def are_unit(vector_ND: np.ndarray) -> np.ndarray:
    """Whether rows are as `unit_vectors` gives them: of length 1, or of zeros. Bool ``[N]``."""
    # A little more than there, for what rounding to float32 makes of a length.
    return (np.abs(_lengths(vector_ND) - 1) <= 1.01 * NEAR) | ~vector_ND.any(1)


def check_gave_unit(embedder: Embedder, texts: Sequence[str] = ()) -> None:
    """Look whether an embedder gives vectors of length 1 by itself, as what was learned before they were scaled has to have seen them.

    Our own do. One of others is asked for a few texts.

    Args:
        embedder: with what it learned.
        texts: further ones, for an embedder that knows nothing of ours.

    Raises CheckpointError for one that does not, or cannot be asked.
    """
    if type(embedder).__module__.partition(".")[0] == __name__.partition(".")[0]:
        return
    asked = (*SAMPLES, *filter(None, texts))
    try:
        given_ND = _rows(embedder.embed(asked), len(asked), dim_of(embedder), "the embedder gave")
    except Exception as error:
        raise CheckpointError(
            f"an earlier version fitted it on the vectors of embedder {embedder.kind!r} as they came, and whether these are of length 1 "
            f"cannot be told, since it fails ({type(error).__name__}: {first_line(error)}): mend that, or fit it again"
        ) from error
    if not (given_ND.any() and are_unit(given_ND).all()):
        raise CheckpointError(
            f"an earlier version fitted it on the vectors of embedder {embedder.kind!r} as they came, which are not of length 1; now they "
            "are scaled to it, so that it would decide by others than it learned from: fit it again"
        )


def check_dim(strategy: Strategy, embedder: Embedder | None) -> None:
    """Raises InputError for an embedder of other dimensions than the strategy learned from: it would refuse every query."""
    found = strategy.learned_dim
    if embedder is None or not strategy.needs_vector or found is None:
        return
    dim = dim_of(embedder)
    if dim not in (None, found):
        raise InputError(
            f"{strategy.name} learned from vectors of {found} dimensions, and embedder {embedder.kind!r} gives {dim}; use the embedder "
            "that it was fitted with, or fit it again with this one"
        )


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
