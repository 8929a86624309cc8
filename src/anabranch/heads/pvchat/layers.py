"""Layers of a PVChat model: what sees patches, and what asks them."""
# Shapes: B clips, F frames, C colours (3), T = F P patches of a clip, Q queries, D width

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["SPREAD", "Layer", "PatchEncoder", "QueryFormer", "attended", "attention_of"]

# Standard deviation of what is learned for places, times and queries at the start. Much less, and attention makes all queries alike.
SPREAD = 0.3

# What replaces an attention: RoutedHeads around it, say. It is called with the layer's number.
Wrap = Callable[[nn.MultiheadAttention], nn.Module]


def attention_of(dim: int, num_heads: int) -> nn.MultiheadAttention:
    """A plain attention of many heads."""
    return nn.MultiheadAttention(dim, num_heads, batch_first=True)


def attended(attention: Any, query_BQD: Tensor, key_BTD: Tensor, hidden_BT: Tensor | None = None) -> Tensor:
    """y_BQD of an attention that is called like torch's, or of what is wrapped around one.

    Args:
        attention: the module.
        query_BQD: what asks.
        key_BTD: what is asked.
        hidden_BT: bool, True where nobody may look; None for nowhere.
    """
    made = attention(query_BQD, key_BTD, key_BTD, key_padding_mask=hidden_BT, need_weights=False)
    return made[0] if isinstance(made, tuple) else made


class Layer(nn.Module):
    """x = x + self(norm(x)); x = x + cross(norm(x), y) where there is a cross-attention; x = x + mlp(norm(x)).

    Args:
        dim: D.
        num_heads: of each attention.
        cross: whether it also looks at something else.
    """

    def __init__(self, dim: int, num_heads: int, *, cross: bool = False) -> None:
        super().__init__()
        self.self_norm = nn.LayerNorm(dim)
        self.self_attention: nn.Module = attention_of(dim, num_heads)
        self.cross_norm: nn.Module | None = nn.LayerNorm(dim) if cross else None
        self.cross_attention: nn.Module | None = attention_of(dim, num_heads) if cross else None
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x_BQD: Tensor, y_BTD: Tensor | None = None, hidden_BQ: Tensor | None = None) -> Tensor:
        """x_BQD of the next layer; ``hidden_BQ`` is True for those of x that nobody looks at."""
        normed_BQD = self.self_norm(x_BQD)
        x_BQD = x_BQD + attended(self.self_attention, normed_BQD, normed_BQD, hidden_BQ)
        if self.cross_attention is not None and self.cross_norm is not None and y_BTD is not None:
            x_BQD = x_BQD + attended(self.cross_attention, self.cross_norm(x_BQD), y_BTD)
        return x_BQD + self.mlp(self.mlp_norm(x_BQD))


class PatchEncoder(nn.Module):
    """Frames to vectors of patches: three convolutions (each patch of 8 x 8 pixels and what is around it), then layers within each frame.

    Args:
        dim: D.
        num_layers: of attention; the upper half of them may learn in a second stage alone.
        num_heads: of each.
        frames: that a clip has at most.
        size: pixels of a frame's side, a multiple of 8.
    """

    def __init__(self, dim: int, num_layers: int, num_heads: int, frames: int, size: int) -> None:
        super().__init__()
        widths = (3, max(dim // 4, 8), max(dim // 2, 8), dim)
        steps: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            steps += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GELU()]
        self.patches = nn.Sequential(*steps[:-1])
        # What convolutions give is small at first, and would be lost beside where it is.
        self.patch_norm = nn.LayerNorm(dim)
        side = size // 8
        self.place = nn.Parameter(SPREAD * torch.randn(side * side, dim))
        self.time = nn.Parameter(SPREAD * torch.randn(frames, dim))
        self.layers = nn.ModuleList(Layer(dim, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, frame_BFCHW: Tensor) -> Tensor:
        """x_BTD of uint8 frames; those of fewer frames than a clip has stand at its beginning."""
        batch, frames = frame_BFCHW.shape[:2]
        picture = frame_BFCHW.flatten(0, 1).to(self.place.dtype) / 127.5 - 1
        # A row of patches after the other.
        x = self.patch_norm(self.patches(picture).flatten(2).transpose(1, 2)) + self.place
        for layer in self.layers:
            x = layer(x)
        x_BFPD = self.norm(x).unflatten(0, (batch, frames)) + self.time[:frames, None]
        return x_BFPD.flatten(1, 2)


class QueryFormer(nn.Module):
    """Learned queries, and those of the subjects that are asked about, look at each other and, in every second layer, at patches.

    Args:
        dim: D.
        num_layers: of both.
        num_heads: of each attention.
        num_queries: that belong to no subject.
    """

    def __init__(self, dim: int, num_layers: int, num_heads: int, num_queries: int) -> None:
        super().__init__()
        self.query = nn.Parameter(SPREAD * torch.randn(num_queries, dim))
        self.layers = nn.ModuleList(Layer(dim, num_heads, cross=number % 2 == 0) for number in range(num_layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, patch_BTD: Tensor, personal_BND: Tensor, hidden_BN: Tensor | None = None) -> Tensor:
        """x_BQD: of the queries, then of the subjects' tokens; ``hidden_BN`` is True for tokens of nobody."""
        batch = len(patch_BTD)
        x_BQD = torch.cat([self.query.expand(batch, -1, -1), personal_BND], 1)
        hidden_BQ = None
        if hidden_BN is not None:
            hidden_BQ = torch.cat([hidden_BN.new_zeros(batch, len(self.query)), hidden_BN], 1)
        for layer in self.layers:
            x_BQD = layer(x_BQD, patch_BTD, hidden_BQ)
        return self.norm(x_BQD)

    def wrap(self, wrap: Wrap, first: int) -> None:
        """Put ``wrap`` around every attention of the layers from ``first`` on."""
        for layer in list(self.layers)[first:]:
            assert isinstance(layer, Layer)
            layer.self_attention = wrap(layer.self_attention)  # type: ignore[arg-type]
            if layer.cross_attention is not None:
                layer.cross_attention = wrap(layer.cross_attention)  # type: ignore[arg-type]
