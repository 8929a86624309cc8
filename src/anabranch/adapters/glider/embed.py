"""Texts to vectors, for the global router: offline by hashed features, by a model's hidden states, or by a function of one's own."""
# Shapes: N texts, D dimensions, F features

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from anabranch.adapters.attached import ATTACHED
from anabranch.adapters.pooled import rows_for
from anabranch.config import Config as BaseConfig
from anabranch.config import Field, configclass
from anabranch.data import Tokenizer
from anabranch.errors import ConfigError
from anabranch.hashed_text import hashed_text
from anabranch.lm.decoder import Decoder

__all__ = ["HiddenStates", "TextEmbedder", "TextFeatures", "embedded"]


@runtime_checkable
class TextEmbedder(Protocol):
    """What makes vectors of texts; `anabranch.routers.embed.Embedder` is one too. Lengths do not matter: angles are compared."""

    def embed(self, texts: Sequence[str]) -> Any:
        """``[N, D]``."""


class TextFeatures:
    """Words, pairs of words and runs of four characters, hashed; by the weight (1 + ln count) of each times its idf.

    The idf, ln((1 + N) / (1 + texts with it)) + 1, is what `fit` found; 1 before. It changes at no other time, so that vectors that were
    made stay comparable.
    """

    @configclass
    class Config(BaseConfig):
        """What is counted.

        Attributes:
            dim: buckets, D; for thousands of experts 1,024 take less memory and time, and find a little less.
            pairs: pairs of neighbouring words.
            pieces: length of runs of characters; 0 for none.
        """

        dim: int = Field(default=16384, ge=2, le=2**20)
        pairs: bool = True
        pieces: int = Field(default=4, ge=0, le=16)

    def __init__(self, config: "TextFeatures.Config | None" = None) -> None:
        self.config = TextFeatures.Config() if config is None else config
        self.idf_D = np.ones(self.config.dim)

    def fit(self, texts: Sequence[str]) -> None:
        """Count in how many texts each bucket occurs."""
        count_D = np.zeros(self.config.dim)
        for text in texts:
            count_D[np.unique(self._features(text)[0])] += 1
        self.idf_D = np.log((1 + len(texts)) / (1 + count_D)) + 1

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 ``[N, D]``; zeros for a text without letters and digits."""
        vector_ND = np.zeros((len(texts), self.config.dim), np.float32)
        for row, text in enumerate(texts):
            bucket_F, count_F = self._features(text)
            weight_F = np.sign(count_F) * (1 + np.log(np.abs(count_F)))
            vector_ND[row] = np.bincount(bucket_F, weight_F, self.config.dim) * self.idf_D
        return vector_ND

    def _features(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        return hashed_text(text, self.config.dim, pairs=self.config.pairs, pieces=self.config.pieces)


class HiddenStates:
    """The mean over a text's tokens of a model's last hidden states, of the base where adapters are on it.

    Args:
        model: of ours.
        tokenizer: its own.
        max_tokens: a text is cut to so many.
    """

    def __init__(self, model: Decoder, tokenizer: Tokenizer, *, max_tokens: int = 256) -> None:
        self.model, self.tokenizer, self.max_tokens = model, tokenizer, max_tokens

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 ``[N, D]``; zeros for a text without tokens."""
        model = self.model
        device = model.embedding.weight.device
        vector_ND = np.zeros((len(texts), model.config.dim), np.float32)
        was_training = model.training
        model.eval()
        try:
            for row, text in enumerate(texts):
                ids = self.tokenizer.encode(text, parse_special=False)[: self.max_tokens]
                if not ids:
                    continue
                token_BL = torch.tensor([ids], device=device)
                attached = getattr(model, ATTACHED, None)
                state = rows_for(model, [None], len(ids)) if attached is not None and attached.is_pool else None
                x_BLD = model.hidden(token_BL, model.context(token_BL, state=state))
                vector_ND[row] = x_BLD[0].float().mean(0).cpu().numpy()
        finally:
            model.train(was_training)
        return vector_ND


def embedded(
    embedder: TextEmbedder | Callable[[Sequence[str]], Any], texts: Sequence[str], dim: int | None = None
) -> np.ndarray:
    """float32 ``[N, D]``, each of length 1 or 0.

    Raises ConfigError for an embedder that gives something else, ``dim`` numbers where that is told, or numbers that are not finite.
    """
    embed = embedder.embed if isinstance(embedder, TextEmbedder) else embedder
    try:
        vector_ND = np.asarray(embed(list(texts)), np.float32)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the embedder gave no array of numbers: {error}") from None
    if vector_ND.ndim != 2 or len(vector_ND) != len(texts) or vector_ND.shape[1] < 1:
        raise ConfigError(
            f"the embedder gave shape {list(vector_ND.shape)} for {len(texts)} texts; it must be [{len(texts)}, dimensions]"
        )
    if dim is not None and vector_ND.shape[1] != dim:
        raise ConfigError(
            f"the embedder gave vectors of {vector_ND.shape[1]} numbers, and those of the pool have {dim}"
        )
    if not np.isfinite(vector_ND).all():
        raise ConfigError("the embedder gave numbers that are not finite")
    length_N1 = np.linalg.norm(vector_ND.astype(np.float64), axis=1, keepdims=True)
    return (vector_ND / np.where(length_N1 > 0, length_N1, 1)).astype(np.float32)
