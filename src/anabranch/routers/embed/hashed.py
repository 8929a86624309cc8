"""Hashed TF-IDF: words and word pairs fall into D signed buckets. No model, no vocabulary, the same in every process.

Weinberger et al., "Feature Hashing for Large Scale Multitask Learning", arXiv 0902.2206: the sign, drawn by the hash too, makes
collisions cancel on average. ``fit`` learns how rare what falls into a bucket is; without it all weigh the same.
"""
# Shapes: N texts, D buckets, F features of one text

from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from anabranch.config import Field, configclass
from anabranch.errors import CheckpointError
from anabranch.hashed_text import hashed_text
from anabranch.routers.contract.strategy import Arrays, Facts
from anabranch.routers.embed.embedder import Embedder


class Hashed(Embedder, kind="hashed"):
    """Weight of a feature: (1 + ln of its count in the text) times its idf, ln((1 + N) / (1 + texts with it)) + 1."""

    @configclass
    class Config(Embedder.Config):
        """What is counted, and in how many buckets.

        Attributes:
            dim: buckets, D.
            pairs: count pairs of neighbouring words too.
            max_words: a text counts up to here.
        """

        dim: int = Field(default=512, ge=2, le=2**20)
        pairs: bool = True
        max_words: int = Field(default=2048, ge=1)

    is_fast = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.idf_D = np.ones(config.dim)

    @property
    def dim(self) -> int:
        """D."""
        return int(self.config.dim)

    def fit(self, texts: Sequence[str]) -> Self:
        """Count in how many texts each bucket occurs."""
        count_D = np.zeros(self.dim)
        for text in texts:
            count_D[np.unique(self._features(text)[0])] += 1
        self.idf_D = np.log((1 + len(texts)) / (1 + count_D)) + 1
        return self

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 ``[N, D]`` of length 1; a text without letters and digits is a row of zeros."""
        vector_ND = np.zeros((len(texts), self.dim), np.float32)
        for row, text in enumerate(texts):
            bucket_F, weight_F = self._features(text)
            sum_D = np.bincount(bucket_F, weight_F, self.dim) * self.idf_D
            length = np.sqrt(sum_D @ sum_D)
            vector_ND[row] = sum_D / length if length > 0 else 0
        return vector_ND

    def _features(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Buckets of the different words and pairs of a text, and their signed weights."""
        config = self.config
        bucket_F, count_F = hashed_text(text, self.dim, pairs=config.pairs, max_words=config.max_words)
        return bucket_F, np.sign(count_F) * (1 + np.log(np.abs(count_F)))

    def state(self) -> tuple[Arrays, Facts]:
        """The weights of the buckets."""
        return {"idf_D": self.idf_D}, {}

    def load_state(self, arrays: Arrays, facts: Facts) -> None:
        """Take them back. Raises CheckpointError if they are of another number of buckets."""
        idf_D = arrays["idf_D"]
        if idf_D.shape != (self.dim,):
            raise CheckpointError(f"the weights of the hashed embedder are of {len(idf_D)} buckets, not {self.dim}")
        self.idf_D = idf_D
