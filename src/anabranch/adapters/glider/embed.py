"""Texts to vectors, for the global router: offline by hashed features, by a model's hidden states, or by a function of one's own."""
# Shapes: N texts, D dimensions, F features of one text, G of all, P numbers of all texts, M texts of a stack, K nearest

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
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
from anabranch.lm.generate import evaluating
from anabranch.nn.kernels.postings import products

__all__ = ["HiddenStates", "Sparse", "Stack", "TextEmbedder", "TextFeatures", "Vector", "embedded", "is_zero"]

# So many that hardly two features of any pool share one.
_BUCKETS = 2**31


@runtime_checkable
class TextEmbedder(Protocol):
    """What makes vectors of texts; `anabranch.routers.embed.Embedder` is one too. Lengths do not matter: angles are compared."""

    def embed(self, texts: Sequence[str]) -> Any:
        """``[N, D]``, or a list of `Sparse`."""


@dataclass(frozen=True, eq=False)
class Sparse:
    """A vector of few numbers among very many.

    Attributes:
        id_F: int64, rising: which numbers.
        weight_F: float64, what they are.
    """

    id_F: np.ndarray
    weight_F: np.ndarray


# Of one text: float32 [D], or sparse.
Vector = np.ndarray | Sparse


class TextFeatures:
    """Words, pairs of words and runs of four characters, hashed to 31 bits; by the weight (1 + ln count) of each times its idf.

    The idf, ln((1 + N) / (1 + texts with it)) + 1, is what `fit` found; 1 before. It changes at no other time, so that vectors that were
    made stay comparable.
    """

    @configclass
    class Config(BaseConfig):
        """What is counted.

        Attributes:
            pairs: pairs of neighbouring words.
            pieces: length of runs of characters within words; 0 for none.
            shortest: characters of a word that counts as one.
        """

        pairs: bool = True
        pieces: int = Field(default=4, ge=0, le=16)
        shortest: int = Field(default=2, ge=1)

    def __init__(self, config: "TextFeatures.Config | None" = None) -> None:
        self.config = TextFeatures.Config() if config is None else config
        # Features that were seen, rising, in how many texts each, and how many texts there were.
        self.seen_F: np.ndarray = np.zeros(0, np.int64)
        self.count_F: np.ndarray = np.zeros(0, np.int64)
        self.num_texts = 0

    def fit(self, texts: Sequence[str]) -> None:
        """Count in how many texts each feature occurs."""
        features = [self._features(text)[0] for text in texts]
        self.seen_F, self.count_F = np.unique(np.concatenate([np.zeros(0, np.int64), *features]), return_counts=True)
        self.num_texts = len(texts)

    def embed(self, texts: Sequence[str]) -> list[Sparse]:
        """A vector each; without numbers for a text without letters and digits."""
        found = []
        for text in texts:
            id_F, count_F = self._features(text)
            weight_F = np.sign(count_F) * (1 + np.log(np.abs(count_F))) * self._idf(id_F)
            found.append(Sparse(id_F, weight_F))
        return found

    def _idf(self, id_F: np.ndarray) -> np.ndarray:
        if not len(self.seen_F):
            return np.ones(len(id_F))
        place_F = np.searchsorted(self.seen_F, id_F).clip(max=len(self.seen_F) - 1)
        texts_F = np.where(self.seen_F[place_F] == id_F, self.count_F[place_F], 0)
        idf_F: np.ndarray = np.log((1 + self.num_texts) / (1 + texts_F)) + 1
        return idf_F

    def _features(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        config = self.config
        id_F, count_F = hashed_text(text, _BUCKETS, pairs=config.pairs, pieces=config.pieces, shortest=config.shortest)
        # Two features in one bucket are one.
        id_F, place_F = np.unique(id_F, return_inverse=True)
        count_F = np.bincount(place_F, count_F, len(id_F))
        kept_F = count_F != 0
        return id_F[kept_F], count_F[kept_F]


class HiddenStates:
    """The mean over a text's tokens of a model's last hidden states, of the base where adapters are on it.

    Args:
        model: of ours.
        tokenizer: its own.
        max_tokens: a text is cut to so many.
        turn: entered for each pass, by whoever shares the model with others; None where nobody else runs it.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        *,
        max_tokens: int = 256,
        turn: AbstractContextManager[Any] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.max_tokens = model, tokenizer, max_tokens
        self._turn = nullcontext() if turn is None else turn

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 ``[N, D]``; zeros for a text without tokens."""
        model = self.model
        device = model.embedding.weight.device
        vector_ND = np.zeros((len(texts), model.config.dim), np.float32)
        most = min(self.max_tokens, model.config.max_positions)
        for row, text in enumerate(texts):
            ids = self.tokenizer.encode(text, parse_special=False)[:most]
            if not ids:
                continue
            token_BL = torch.tensor([ids], device=device)
            with self._turn, evaluating(model):
                attached = getattr(model, ATTACHED, None)
                state = rows_for(model, [None], len(ids)) if attached is not None and attached.is_pool else None
                context = model.context(token_BL, state=state)
                # Whoever records routing is told of texts that are continued, and of no others.
                is_repeated_N = torch.ones(len(ids) * context.num_streams, dtype=torch.bool, device=device)
                context.state |= {"repeated_N": is_repeated_N}
                x_BLD = model.hidden(token_BL, context)
                vector_ND[row] = x_BLD[0].float().mean(0).cpu().numpy()
        return vector_ND


def embedded(
    embedder: TextEmbedder | Callable[[Sequence[str]], Any], texts: Sequence[str], dim: int | None = None
) -> list[Vector]:
    """A vector of each text, of length 1 or 0.

    Raises ConfigError for an embedder that gives something else, ``dim`` numbers where that is told, or numbers that are not finite.
    """
    embed = embedder.embed if isinstance(embedder, TextEmbedder) else embedder
    given = embed(list(texts))
    if isinstance(given, list) and given and all(isinstance(one, Sparse) for one in given):
        return [Sparse(one.id_F, one.weight_F / (np.linalg.norm(one.weight_F) or 1.0)) for one in given]
    try:
        vector_ND = np.asarray(given, np.float32)
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
    return list((vector_ND / np.where(length_N1 > 0, length_N1, 1)).astype(np.float32))


def is_zero(vector: Vector) -> bool:
    """Whether its length is 0."""
    return not (vector.weight_F if isinstance(vector, Sparse) else vector).any()


class Stack:
    """Unit vectors of M texts, whose products with one more are asked for."""

    def __init__(self, vectors: Sequence[Vector]) -> None:
        self.num = len(vectors)
        sparse = [vector for vector in vectors if isinstance(vector, Sparse)]
        self.is_sparse = bool(sparse)
        if self.is_sparse:
            # All numbers by what they are of: a query looks up its own few.
            id_P = np.concatenate([vector.id_F for vector in sparse])
            order_P = np.argsort(id_P, kind="stable")
            row_P = np.repeat(np.arange(self.num, dtype=np.int32), [len(vector.id_F) for vector in sparse])
            self.row_P = row_P[order_P]
            self.weight_P = np.concatenate([vector.weight_F for vector in sparse])[order_P].astype(np.float64)
            # Features, rising, and where the numbers of each begin; those of the last end where all do.
            self.id_G, start_G = np.unique(id_P[order_P], return_index=True)
            self.start_G1 = np.append(start_G, len(id_P)).astype(np.int64)
        else:
            self.vector_MD = (
                np.stack([np.asarray(vector) for vector in vectors]) if vectors else np.zeros((0, 1), np.float32)
            )

    def cosines(self, vector: Vector) -> np.ndarray:
        """cosine_M."""
        if not isinstance(vector, Sparse):
            cosine_M: np.ndarray = self.vector_MD @ vector
            return cosine_M
        place_F = np.searchsorted(self.id_G, vector.id_F)
        has_F = place_F < len(self.id_G)
        has_F[has_F] = self.id_G[place_F[has_F]] == vector.id_F[has_F]
        place_K, weight_K = place_F[has_F], vector.weight_F[has_F].astype(np.float64)
        return products(
            self.start_G1[place_K], self.start_G1[place_K + 1], weight_K, self.row_P, self.weight_P, self.num
        )

    def nearest(self, vector: Vector, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows, their cosines) of the ``k`` nearest, best first; of equals the first come first. ``k`` is at most M."""
        cosine_M = self.cosines(vector)
        if k == 1:
            row_K = np.array([cosine_M.argmax()])
        elif k < self.num:
            # Of all, those that may be among the k: the k-th best and what equals it.
            row_X = (cosine_M >= np.partition(cosine_M, self.num - k)[self.num - k]).nonzero()[0]
            row_K = row_X[np.argsort(-cosine_M[row_X], kind="stable")[:k]]
        else:
            row_K = np.argsort(-cosine_M, kind="stable")
        return row_K, cosine_M[row_K]
