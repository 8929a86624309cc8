"""The seam of text embedding: texts in, unit vectors out."""
# Shapes: N texts, D dimensions

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np

from anabranch.config import Config as BaseConfig
from anabranch.config import Part, configclass
from anabranch.routers.contract.strategy import Arrays, Facts


class Embedder(Part, family="embedder"):
    """Interface.

    Attributes:
        needs_fit: it cannot embed before it has seen a corpus.
        is_fast: a short text takes well under a millisecond, so that a gateway may embed on its event loop.
    """

    @configclass
    class Config(BaseConfig):
        """Nothing in common."""

    needs_fit: ClassVar[bool] = False
    is_fast: ClassVar[bool] = False

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def dim(self) -> int:
        """D."""
        raise NotImplementedError

    def fit(self, texts: Sequence[str]) -> Self:
        """Learn from a corpus (weights of words)."""
        return self

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 ``[N, D]`` of length 1; an empty text is a row of zeros. Whoever calls one of others has `unit_vectors` look at it."""
        raise NotImplementedError

    def state(self) -> tuple[Arrays, Facts]:
        """What it learned."""
        return {}, {}

    def load_state(self, arrays: Arrays, facts: Facts) -> None:
        """Take back what `state` gave."""
