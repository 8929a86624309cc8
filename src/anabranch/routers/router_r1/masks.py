"""Which tokens of a trajectory are the router's own: those it is trained on.

Turns are tokenised one by one and never again as a whole: ids are those that were sampled.
"""
# Shapes: T tokens of a response

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True)
class Tokens:
    """A response, turn by turn.

    Attributes:
        parts: ids, and whether the router wrote them (else the environment).
    """

    parts: list[tuple[tuple[int, ...], bool]] = field(default_factory=list)

    def add(self, ids: Sequence[int], *, is_router: bool) -> None:
        """A turn, or what the environment wrote after it."""
        if ids:
            self.parts.append((tuple(int(one) for one in ids), is_router))

    @property
    def ids_T(self) -> np.ndarray:
        """int64, all of it."""
        return np.array([one for ids, _ in self.parts for one in ids], np.int64)

    @property
    def info_mask_T(self) -> np.ndarray:
        """m_t: True on the router's tokens, False within information."""
        return np.array([is_router for ids, is_router in self.parts for _ in ids], bool)
