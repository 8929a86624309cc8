"""A small BERT-like encoder over the words of the query, trained from scratch on recorded outcomes; no vector needed.

    x = embedding of hashed words
    x = x + attention(norm(x)),   x = x + swiglu(norm(x))             in each block; every word sees every other
    quality_M = scale(sigma(U mean(norm(x)) + b))                     loss: cross-entropy with the scores as soft labels, over what is known

The BERT classifier of RouteLLM (Ong et al. 2024, arXiv 2406.18665, section 4.2) and of the survey's supervised routers, on our own
parts (`anabranch.nn`): Pre-norm, rotary positions, SwiGLU. It is tiny, since a few thousand outcomes cannot train more. Learning
is in torch, deciding in numpy, from the same weights.

Words are hashed into ``vocab_size`` rows (CRC-32), so there is no vocabulary to keep; of a long text the first and last halves of
``length`` words are read.
"""
# Shapes: B queries, L words, D width, H heads, E head width, F hidden, M models

import re
import zlib
from typing import Any, Self

import numpy as np

from anabranch.config import Field, configclass
from anabranch.errors import ConfigError
from anabranch.extras import require
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.predictor import Prediction, Predictor
from anabranch.routers.contract.query import Query
from anabranch.routers.contract.strategy import Arrays, Facts
from anabranch.routers.logistic import sigmoid
from anabranch.routers.score_scale import UNIT, Scale, ScoreScale
from anabranch.routers.strategies.adam import held_back
from anabranch.routers.strategies.training import closed, means, training_set

# Of the norms and of rotary positions, as in `anabranch.nn`.
EPS, THETA = 1e-5, 10000.0

# Characters of a text.
LOOKED_AT = 20_000
_WORD = re.compile(r"[^\W\d_]+|\d|[^\w\s]")


class Encoder(Predictor, kind="encoder"):
    """Words in, expected score of every model out."""

    @configclass
    class Config(Predictor.Config):
        """Size and training.

        Attributes:
            vocab_size: rows of the embedding, beside one for padding.
            length: words read of a text.
            dim: D.
            num_layers: blocks.
            num_heads: H.
            hidden_dim: F.
            rate: of AdamW, reached after a tenth of the steps, falling to 0 along a cosine.
            weight_decay: of AdamW, on matrices.
            batch: queries, of like length.
            epochs: passes; the best by the rows held back is kept.
            word_dropout: share of words hidden in training.
            holdout: share of the rows held back.
            scale: scores of the worst and the best answer in recorded outcomes; others are refused.
        """

        vocab_size: int = Field(default=8192, ge=16)
        length: int = Field(default=96, ge=2)
        dim: int = Field(default=64, ge=2)
        num_layers: int = Field(default=2, ge=1)
        num_heads: int = Field(default=4, ge=1)
        hidden_dim: int = Field(default=128, ge=1)
        rate: float = Field(default=2e-3, gt=0)
        weight_decay: float = Field(default=0.05, ge=0)
        batch: int = Field(default=64, ge=1)
        epochs: int = Field(default=10, ge=1)
        word_dropout: float = Field(default=0.1, ge=0, lt=1)
        holdout: float = Field(default=0.1, ge=0, lt=1)
        scale: Scale = UNIT

        def __post_init__(self) -> None:
            if self.dim % (2 * self.num_heads):
                raise ConfigError(
                    f"encoder.dim is {self.dim}; it must be a multiple of twice num_heads={self.num_heads}"
                )

    needs_vector = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.weights: dict[str, np.ndarray] = {}
        self.mean_M, self.scale = np.zeros(0), ScoreScale.of(config.scale)

    def fit(self, data: Recorded, *, seed: int = 0) -> Self:
        """Train; about a minute of one processor for 4,000 texts. Raises BackendError if torch is missing."""
        require("lm", by="learning the strategy encoder (deciding needs no torch)")
        from anabranch.routers.strategies.encoder_training import train

        training_set(data, "encoder", vector=False)
        scale = ScoreScale.of(self.config.scale)
        share_NM = scale.shares_of(data)
        self.models, self.mean_M, self.scale = data.models, means(data.score_NM), scale
        words = [self.words(text) for text in data.query]
        parts = held_back(len(data), self.config.holdout, np.random.default_rng(seed))
        self.weights = train(self.config, words, share_NM, *parts, seed=seed)
        return self

    def words(self, text: str) -> np.ndarray:
        """Rows of the embedding, 1 to vocab_size; row 0 is padding. A text without words is one padding word."""
        found = _WORD.findall(text[:LOOKED_AT].casefold())
        if len(found) > self.config.length:
            head = (self.config.length + 1) // 2
            found = [*found[:head], *found[len(found) - (self.config.length - head) :]]
        return np.array([1 + zlib.crc32(word.encode()) % self.config.vocab_size for word in found] or [0], np.int64)

    def predict(self, data: Recorded) -> Prediction:
        """Of every row, texts of one length at a time."""
        words = [self.words(text) for text in data.query]
        logit_NM = np.zeros((len(words), len(self.models)))
        length_N = np.array([len(one) for one in words], np.int64)
        for length in np.unique(length_N):
            rows = np.flatnonzero(length_N == length)
            for begin in range(0, len(rows), 256):
                at = rows[begin : begin + 256]
                logit_NM[at] = encode(self.weights, np.stack([words[row] for row in at]), self.config.num_heads)
        return Prediction(quality_NM=closed(self.scale.scores(sigmoid(logit_NM)), self.mean_M))

    def explain(self, query: Query) -> Facts:
        """How many words were read."""
        return {"words": len(self.words(query.text))}

    def state(self) -> tuple[Arrays, Facts]:
        """Weights."""
        return {**self.weights, "mean_M": self.mean_M}, {"low": self.scale.low, "high": self.scale.high}

    def load_state(self, arrays: Arrays, facts: Facts) -> None:
        """Take back what `state` gave."""
        self.weights = {name: value for name, value in arrays.items() if name != "mean_M"}
        self.mean_M, self.scale = arrays["mean_M"], ScoreScale(facts["low"], facts["high"])


def encode(weights: dict[str, np.ndarray], word_BL: np.ndarray, num_heads: int) -> np.ndarray:
    """Logits ``[B, M]`` in float32 numpy; no padding."""
    x_BLD = weights["embedding"][word_BL]
    rotary = _rotary(word_BL.shape[1], x_BLD.shape[2] // num_heads)
    layer = 0
    while f"{layer}.qkv" in weights:
        own = {name: weights[f"{layer}.{name}"] for name in ("norm1", "qkv", "out", "norm2", "w13", "w2")}
        x_BLD = x_BLD + _attention(_norm(x_BLD, own["norm1"]), own["qkv"], own["out"], rotary, num_heads)
        gate_BLF, up_BLF = np.split(_norm(x_BLD, own["norm2"]) @ own["w13"].T, 2, axis=-1)
        x_BLD = x_BLD + (gate_BLF * sigmoid(gate_BLF) * up_BLF) @ own["w2"].T
        layer += 1
    return _norm(x_BLD, weights["norm"]).mean(axis=1) @ weights["head"].T + weights["bias"]


def _norm(x_BLD: np.ndarray, weight_D: np.ndarray) -> np.ndarray:
    return x_BLD / np.sqrt(np.square(x_BLD).mean(-1, keepdims=True) + np.float32(EPS)) * weight_D


def _rotary(length: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    angle_LE = np.arange(length)[:, None] * THETA ** -(np.arange(0, width, 2) / width)
    angle_LE = np.concatenate((angle_LE, angle_LE), axis=1)
    return np.cos(angle_LE).astype(np.float32), np.sin(angle_LE).astype(np.float32)


def _attention(
    x_BLD: np.ndarray, qkv: np.ndarray, out: np.ndarray, rotary: tuple[np.ndarray, np.ndarray], num_heads: int
) -> np.ndarray:
    size, length, dim = x_BLD.shape
    parts = (x_BLD @ qkv.T).reshape(size, length, 3, num_heads, dim // num_heads).transpose(2, 0, 3, 1, 4)
    query_BHLE, key_BHLE, value_BHLE = _turned(parts[0], rotary), _turned(parts[1], rotary), parts[2]
    score_BHLL = query_BHLE @ key_BHLE.transpose(0, 1, 3, 2) / np.float32(np.sqrt(dim // num_heads))
    weight_BHLL = np.exp(score_BHLL - score_BHLL.max(axis=-1, keepdims=True))
    weight_BHLL /= weight_BHLL.sum(axis=-1, keepdims=True)
    return (weight_BHLL @ value_BHLE).transpose(0, 2, 1, 3).reshape(size, length, dim) @ out.T


def _turned(x_BHLE: np.ndarray, rotary: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    left, right = np.split(x_BHLE, 2, axis=-1)
    return x_BHLE * rotary[0] + np.concatenate((-right, left), axis=-1) * rotary[1]
