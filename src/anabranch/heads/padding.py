"""Which queries are real, said to attentions that no mask says it to: cross-attention, whose mask is of the other sequence's keys."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

__all__ = ["real_queries", "said_real"]

_REAL: ContextVar[Tensor | None] = ContextVar("real_queries", default=None)


@contextmanager
def real_queries(real_BL: Tensor) -> Iterator[None]:
    """Within it, routed heads of transformers' attentions of ``[B, L]`` queries leave out those that are False, unless a mask says it."""
    token = _REAL.set(real_BL)
    try:
        yield
    finally:
        _REAL.reset(token)


def said_real(batch: int, length: int) -> Tensor | None:
    """What was said, of so many queries; None where nothing was, or it was of others."""
    real_BL = _REAL.get()
    return real_BL if real_BL is not None and real_BL.shape == (batch, length) else None
