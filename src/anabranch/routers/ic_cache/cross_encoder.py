"""A utility proxy that reads: one small transformer over request, example and answer together.

The paper's proxy is of TinyBERT's class. This one is smaller (words are hashed into a table, so there is no vocabulary to carry), is
trained by torch inside ``fit``, and scores in numpy, since what serves holds no torch.

    x = [request | example's request | its answer], cut to ``max_tokens``; table + segment + position + "the word is in another part too"
    layers: x += attention(norm(x)); x += relu(norm(x) W1) W2;   h = sigmoid(mean(norm(x)) . w + b)
"""
# Shapes: K candidates, L tokens, D width, H heads, E = D / H, F inner width, V buckets

import re
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from anabranch.config import Field, configclass
from anabranch.errors import ConfigError
from anabranch.extras import require
from anabranch.routers.contract.strategy import Arrays, Facts
from anabranch.routers.ic_cache.features import Pairs
from anabranch.routers.ic_cache.proxy import Proxy
from anabranch.routers.logistic import sigmoid

TOKEN = re.compile(r"\w+|[^\w\s]")
SEGMENTS = 3
NORM_EPSILON = 1e-5


class CrossEncoder(Proxy, kind="cross_encoder"):
    """See the module."""

    @configclass
    class Config(Proxy.Config):
        """Size and training.

        Attributes:
            dim: D.
            layers: of attention and feed-forward.
            heads: H; divides D.
            inner: F.
            buckets: V, rows of the table that words are hashed into.
            max_tokens: of the three texts together; each gets a third, and what others leave.
            epochs: over the outcomes.
            batch_size: outcomes per step.
            learning_rate: of Adam.
        """

        dim: int = Field(default=32, ge=2)
        layers: int = Field(default=1, ge=1)
        heads: int = Field(default=2, ge=1)
        inner: int = Field(default=64, ge=1)
        buckets: int = Field(default=4096, ge=2)
        max_tokens: int = Field(default=48, ge=6)
        epochs: int = Field(default=8, ge=1)
        batch_size: int = Field(default=32, ge=1)
        learning_rate: float = Field(default=2e-3, gt=0)

        def __post_init__(self) -> None:
            if self.dim % self.heads:
                raise ConfigError(f"heads is {self.heads}; it must divide dim, {self.dim}")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.weights: Arrays = {}

    def encode(self, texts: Sequence[tuple[str, str, str]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, segments and marks of shared words, int64 [K, L] each; id 0 is padding."""
        rows = [self._encode(parts) for parts in texts]
        longest = max((len(row) for row in rows), default=1)
        table_KL3 = np.zeros((len(rows), longest, 3), np.int64)
        for at, row in enumerate(rows):
            table_KL3[at, : len(row)] = row
        return table_KL3[..., 0], table_KL3[..., 1], table_KL3[..., 2]

    def _encode(self, parts: tuple[str, str, str]) -> list[tuple[int, int, int]]:
        words = [TOKEN.findall(part.casefold()) for part in parts]
        room, row = self.config.max_tokens, []
        for segment, own in enumerate(words):
            others = set().union(*(set(other) for at, other in enumerate(words) if at != segment))
            kept = own[: max(1, room // (SEGMENTS - segment))]
            room -= len(kept)
            row += [
                (1 + zlib.crc32(word.encode()) % (self.config.buckets - 1), segment, int(word in others))
                for word in kept
            ]
        return row or [(1, 0, 0)]

    def _score(self, pairs: Pairs) -> np.ndarray:
        if not len(pairs):
            return np.zeros(0)
        id_KL, segment_KL, shared_KL = self.encode(pairs.texts)
        weights, config = self.weights, self.config
        x_KLD = (
            weights["table"][id_KL]
            + weights["segment"][segment_KL]
            + weights["shared"][shared_KL]
            + weights["position"][: id_KL.shape[1]]
        )
        is_text_KL = id_KL > 0
        bias_K11L = np.where(is_text_KL, 0.0, -1e9).astype(np.float32)[:, None, None, :]
        for layer in range(config.layers):
            x_KLD = x_KLD + self._attention(norm(x_KLD), bias_K11L, layer)
            inner_KLF = np.maximum(norm(x_KLD) @ weights[f"{layer}.w1"] + weights[f"{layer}.b1"], 0)
            x_KLD = x_KLD + inner_KLF @ weights[f"{layer}.w2"]
        mean_KD = (norm(x_KLD) * is_text_KL[..., None]).sum(1) / is_text_KL.sum(1, keepdims=True)
        return sigmoid((mean_KD @ weights["head"] + weights["bias"]).astype(np.float64))

    def _attention(self, x_KLD: np.ndarray, bias_K11L: np.ndarray, layer: int) -> np.ndarray:
        count, length, width = x_KLD.shape
        heads = self.config.heads
        qkv = (x_KLD @ self.weights[f"{layer}.qkv"]).reshape(count, length, 3, heads, width // heads)
        query_KHLE, key_KHLE, value_KHLE = (qkv[:, :, part].transpose(0, 2, 1, 3) for part in range(3))
        score_KHLL = query_KHLE @ key_KHLE.transpose(0, 1, 3, 2) / np.sqrt(width / heads).astype(np.float32) + bias_K11L
        score_KHLL = np.exp(score_KHLL - score_KHLL.max(-1, keepdims=True))
        mixed_KHLE = (score_KHLL / score_KHLL.sum(-1, keepdims=True)) @ value_KHLE
        return mixed_KHLE.transpose(0, 2, 1, 3).reshape(count, length, width) @ self.weights[f"{layer}.out"]

    def _fresh(self, seed: int) -> Arrays:
        config, random = self.config, np.random.default_rng(seed)

        def normal(*shape: int, scale: float) -> np.ndarray:
            return (scale * random.standard_normal(shape)).astype(np.float32)

        width = config.dim
        weights = {
            "table": normal(config.buckets, width, scale=0.5),
            "segment": normal(SEGMENTS, width, scale=0.5),
            "shared": normal(2, width, scale=0.5),
            "position": normal(config.max_tokens, width, scale=0.1),
            "head": np.zeros(width, np.float32),
            "bias": np.zeros((), np.float32),
        }
        for layer in range(config.layers):
            weights |= {
                f"{layer}.qkv": normal(width, 3 * width, scale=width**-0.5),
                f"{layer}.out": normal(width, width, scale=width**-0.5),
                f"{layer}.w1": normal(width, config.inner, scale=(2 / width) ** 0.5),
                f"{layer}.b1": np.zeros(config.inner, np.float32),
                f"{layer}.w2": normal(config.inner, width, scale=config.inner**-0.5),
            }
        return weights

    def _fit(self, pairs: Pairs, helped_N: np.ndarray, seed: int) -> None:
        require("lm", by="learning a cross-encoder (scoring needs no torch)")
        import torch

        self.weights = self._fresh(seed)
        weights = {name: torch.from_numpy(value.copy()).requires_grad_() for name, value in self.weights.items()}
        optimizer = torch.optim.Adam(weights.values(), lr=self.config.learning_rate)
        id_NL, segment_NL, shared_NL = (torch.from_numpy(part) for part in self.encode(pairs.texts))
        target_N = torch.from_numpy(helped_N).float()
        generator = torch.Generator().manual_seed(seed)
        for _ in range(self.config.epochs):
            for at in torch.randperm(len(target_N), generator=generator).split(self.config.batch_size):
                logit_N = torch_logits(weights, self.config, id_NL[at], segment_NL[at], shared_NL[at])
                loss = torch.nn.functional.binary_cross_entropy_with_logits(logit_N, target_N[at])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        self.weights = {name: value.detach().numpy().copy() for name, value in weights.items()}

    def state(self) -> tuple[Arrays, Facts]:
        """With the weights."""
        arrays, facts = super().state()
        return arrays | self.weights, facts

    def load_state(self, arrays: Arrays, facts: Facts) -> None:
        """Take them back."""
        super().load_state(arrays, facts)
        self.weights = dict(arrays)


def norm(x: np.ndarray) -> np.ndarray:
    """To mean 0 and variance 1 over the last dimension."""
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + np.float32(NORM_EPSILON))


def torch_logits(weights: dict[str, Any], config: Any, id_NL: Any, segment_NL: Any, shared_NL: Any) -> Any:
    """What `CrossEncoder` computes, in torch, before the sigmoid."""
    import torch
    from torch.nn.functional import layer_norm, scaled_dot_product_attention

    def normed(x: Any) -> Any:
        return layer_norm(x, x.shape[-1:], eps=NORM_EPSILON)

    x_NLD = weights["table"][id_NL] + weights["segment"][segment_NL] + weights["shared"][shared_NL]
    x_NLD = x_NLD + weights["position"][: id_NL.shape[1]]
    is_text_NL = id_NL > 0
    for layer in range(config.layers):
        qkv = (normed(x_NLD) @ weights[f"{layer}.qkv"]).unflatten(-1, (3, config.heads, -1))
        query, key, value = (qkv[:, :, part].transpose(1, 2) for part in range(3))
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=is_text_NL[:, None, None, :])
        x_NLD = x_NLD + mixed.transpose(1, 2).flatten(2) @ weights[f"{layer}.out"]
        inner = torch.relu(normed(x_NLD) @ weights[f"{layer}.w1"] + weights[f"{layer}.b1"])
        x_NLD = x_NLD + inner @ weights[f"{layer}.w2"]
    mean_ND = (normed(x_NLD) * is_text_NL[..., None]).sum(1) / is_text_NL.sum(1, keepdim=True)
    return mean_ND @ weights["head"] + weights["bias"]
