"""The encoder in torch, for learning only; `encoder` computes the same in numpy to decide."""
# Shapes: B queries, L words, D width, M models

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.nn import BuildContext, ForwardContext, RMSNorm, Rotary, SelfAttention, SwiGLU


class _Block(nn.Module):
    def __init__(self, config: Any, context: BuildContext) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(config.dim), RMSNorm(config.dim)
        self.attention = SelfAttention.Config(num_heads=config.num_heads).build(context)
        self.feed_forward = SwiGLU.Config(hidden_dim=config.hidden_dim).build(context)

    def forward(self, x_BLD: Tensor, context: ForwardContext) -> Tensor:
        x_BLD = x_BLD + self.attention(self.norm1(x_BLD), context)
        return x_BLD + self.feed_forward(self.norm2(x_BLD))


class Network(nn.Module):
    """Logits ``[B, M]`` of words ``[B, L]``, 0 being padding."""

    def __init__(self, config: Any, num_models: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        std = 1 / math.sqrt(config.dim)
        self.embedding = nn.Embedding(config.vocab_size + 1, config.dim)
        nn.init.normal_(self.embedding.weight, std=std, generator=generator)
        contexts = [
            BuildContext(
                dim=config.dim,
                num_layers=config.num_layers,
                layer=layer,
                init_std=std,
                residual_std=std / 2,
                generator=generator,
            )
            for layer in range(config.num_layers)
        ]
        self.blocks = nn.ModuleList(_Block(config, context) for context in contexts)
        self.norm = RMSNorm(config.dim)
        self.head = contexts[0].linear(config.dim, num_models, bias=True)
        self.rotary = Rotary.Config().build(config.dim // config.num_heads)

    def forward(self, word_BL: Tensor) -> Tensor:
        """Padding is neither seen nor averaged, unless there is nothing else."""
        position_BL = torch.arange(word_BL.shape[1]).expand(word_BL.shape)
        real_BL = word_BL > 0
        real_BL = real_BL | ~real_BL.any(1, keepdim=True) & (position_BL == 0)
        x_BLD = self.embedding(word_BL)
        context = ForwardContext(
            position_BL=position_BL,
            rotary=self.rotary(position_BL, x_BLD.dtype),
            is_causal=False,
            attention_mask=real_BL[:, None, None, :].expand(-1, 1, word_BL.shape[1], -1),
        )
        for block in self.blocks:
            x_BLD = block(x_BLD, context)
        real_BL1 = real_BL.unsqueeze(-1).to(x_BLD.dtype)
        return self.head((self.norm(x_BLD) * real_BL1).sum(1) / real_BL1.sum(1))

    def weights(self) -> dict[str, np.ndarray]:
        """As `encoder.encode` names them."""
        found = {
            "embedding": self.embedding.weight,
            "norm": self.norm.weight,
            "head": self.head.weight,
            "bias": self.head.bias,
        }
        for layer, block in enumerate(self.blocks):
            parts = {
                "norm1": block.norm1,
                "qkv": block.attention.qkv,  # type: ignore[union-attr]
                "out": block.attention.out,  # type: ignore[union-attr]
                "norm2": block.norm2,
                "w13": block.feed_forward.w13,  # type: ignore[union-attr]
                "w2": block.feed_forward.w2,  # type: ignore[union-attr]
            }
            found |= {f"{layer}.{name}": part.weight for name, part in parts.items()}  # type: ignore[union-attr]
        return {name: value.detach().numpy().copy() for name, value in found.items()}


def train(
    config: Any, words: list[np.ndarray], label_NM: np.ndarray, learn_N: np.ndarray, check_N: np.ndarray, *, seed: int
) -> dict[str, np.ndarray]:
    """Weights of the epoch that does best on the rows held back. Draws from its own generators only."""
    with torch.random.fork_rng(devices=[]):
        network = Network(config, label_NM.shape[1], seed)
    with torch.no_grad():
        known_M = np.isfinite(label_NM).any(0)
        mean_M = np.array(
            [np.nanmean(label_N) if known else 0.5 for label_N, known in zip(label_NM.T, known_M, strict=True)]
        )
        mean_M = np.clip(mean_M, 0.01, 0.99)
        network.head.bias.copy_(torch.from_numpy(np.log(mean_M / (1 - mean_M))))
    matrices = [weight for weight in network.parameters() if weight.dim() == 2]
    others = [weight for weight in network.parameters() if weight.dim() != 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.rate)
    rng = np.random.default_rng([seed, 1])
    steps = config.epochs * math.ceil(len(learn_N) / config.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    best, kept = np.inf, network.weights()
    for _ in range(config.epochs):
        for at in _batches(words, learn_N, config.batch, rng):
            loss = _loss(network, _padded([words[row] for row in at], config.word_dropout, rng), label_NM[at])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        now = _mean_loss(network, words, label_NM, check_N, config.batch)
        if now < best:
            best, kept = now, network.weights()
    return kept


def _rate(step: int, steps: int) -> float:
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _batches(words: list[np.ndarray], rows: np.ndarray, size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Batches of like length in random order, so that little is padding."""
    jitter_N = rng.uniform(0.9, 1.1, len(rows))
    order = rows[np.argsort(np.array([len(words[row]) for row in rows]) * jitter_N, kind="stable")]
    batches = [order[begin : begin + size] for begin in range(0, len(order), size)]
    return [batches[at] for at in rng.permutation(len(batches))]


def _padded(words: list[np.ndarray], dropout: float, rng: np.random.Generator) -> Tensor:
    word_BL = np.zeros((len(words), max(map(len, words))), np.int64)
    for row, one in enumerate(words):
        word_BL[row, : len(one)] = one
    if dropout:
        word_BL[rng.random(word_BL.shape) < dropout] = 0
    return torch.from_numpy(word_BL)


def _loss(network: Network, word_BL: Tensor, label_BM: np.ndarray) -> Tensor:
    label = torch.from_numpy(label_BM).float()
    known = torch.isfinite(label)
    loss_BM = F.binary_cross_entropy_with_logits(network(word_BL), torch.nan_to_num(label), reduction="none")
    return (loss_BM * known).sum() / known.sum().clamp_min(1)


@torch.no_grad()
def _mean_loss(network: Network, words: list[np.ndarray], label_NM: np.ndarray, rows: np.ndarray, size: int) -> float:
    rng = np.random.default_rng(0)
    losses = [
        float(_loss(network, _padded([words[row] for row in at], 0.0, rng), label_NM[at])) * len(at)
        for at in _batches(words, rows, size, rng)
    ]
    return sum(losses) / len(rows)
