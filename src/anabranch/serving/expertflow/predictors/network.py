"""The network of the Routing Path Predictor: a small T5-style encoder-decoder with one head per routed layer.

Attention has a relative bias per distance (clipped) and no positions, and the decoder sees a window of its own tokens, so that a
sequence can be continued token by token with the keys and values of that window.
"""
# Shapes: B sequences, S ids decoded, P ids encoded, W window, D hidden width, H heads, L routed layers, E experts, Q queries, M keys

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Bias(nn.Module):
    """A learned number per head and distance, distances clipped to ``most``."""

    def __init__(self, heads: int, most: int) -> None:
        super().__init__()
        self.most = most
        self.table = nn.Parameter(torch.zeros(heads, 2 * most + 1))

    def forward(self, distance_QM: Tensor) -> Tensor:
        """bias_HQM; positive distances look back."""
        return self.table[:, distance_QM.clamp(-self.most, self.most) + self.most]


class Layer(nn.Module):
    """Pre-norm attention to itself, to the encoder's output where there is one, and a ReLU feed-forward."""

    def __init__(self, dim: int, feed_forward: int, heads: int, has_cross: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in range(3 if has_cross else 2))
        self.query, self.key_value, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        if has_cross:
            self.cross_query, self.cross_out = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.cross_key_value = nn.Linear(dim, 2 * dim)
        self.up, self.down = nn.Linear(dim, feed_forward), nn.Linear(feed_forward, dim)

    def split(self, x_BSD: Tensor) -> Tensor:
        """Heads apart."""
        return x_BSD.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def attend(self, query_BQD: Tensor, key_value_BMD: Tensor, mask: Tensor) -> Tensor:
        """``mask`` is added to the scores; ``key_value_BMD`` is 2 D wide."""
        key, value = key_value_BMD.chunk(2, dim=-1)
        made = F.scaled_dot_product_attention(self.split(query_BQD), self.split(key), self.split(value), attn_mask=mask)
        return made.transpose(1, 2).flatten(2)

    def forward(
        self, x_BQD: Tensor, mask: Tensor, past: Tensor | None, cross: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """(x_BQD, keys and values of the new tokens). ``past``: those of earlier ones; ``cross``: those of the input, with its mask."""
        normed = self.norms[0](x_BQD)
        new = self.key_value(normed)
        seen = new if past is None else torch.cat((past, new), 1)
        x_BQD = x_BQD + self.out(self.attend(self.query(normed), seen, mask))
        if cross is not None:
            x_BQD = x_BQD + self.cross_out(self.attend(self.cross_query(self.norms[1](x_BQD)), *cross))
        return x_BQD + self.down(F.relu(self.up(self.norms[-1](x_BQD)))), new


class PathNetwork(nn.Module):
    """Logits of every (layer, expert) for each decoded id."""

    def __init__(
        self,
        vocab_size: int,
        num_layers: int,
        num_experts: int,
        *,
        dim: int,
        feed_forward: int,
        depth: int,
        heads: int,
        window: int,
    ) -> None:
        super().__init__()
        self.window, self.num_layers, self.num_experts = window, num_layers, num_experts
        # The last is an unknown id.
        self.embedding = nn.Embedding(vocab_size + 1, dim)
        self.encoder = nn.ModuleList(Layer(dim, feed_forward, heads, False) for _ in range(depth))
        self.decoder = nn.ModuleList(Layer(dim, feed_forward, heads, True) for _ in range(depth))
        self.encoder_bias, self.decoder_bias = Bias(heads, window), Bias(heads, window)
        self.norm, self.heads = nn.RMSNorm(dim), nn.Linear(dim, num_layers * num_experts)
        self.encoder_norm = nn.RMSNorm(dim)

    def known(self, id_BS: Tensor) -> Tensor:
        """The ids with those beyond the vocabulary as the unknown one."""
        most = self.embedding.num_embeddings - 1
        return torch.where((id_BS >= 0) & (id_BS < most), id_BS, most)

    def encode(self, id_BP: Tensor, real_BP: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of each decoder layer: keys and values of the input, and their mask."""
        place = torch.arange(id_BP.shape[1], device=id_BP.device)
        padding = torch.zeros(real_BP.shape, device=id_BP.device).masked_fill(~real_BP, -1e9)[:, None, None, :]
        mask = self.encoder_bias(place[:, None] - place[None, :]) + padding
        x_BPD = self.embedding(id_BP)
        for layer in self.encoder:
            x_BPD, _ = layer(x_BPD, mask, None, None)
        x_BPD = self.encoder_norm(x_BPD)
        return [(layer.cross_key_value(x_BPD), padding) for layer in self.decoder]  # type: ignore[operator]

    def decode(
        self,
        id_BS: Tensor,
        cross: list[tuple[Tensor, Tensor]],
        past: Tensor | None = None,
        real_BW: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(logit_BSLE, new keys and values [B, depth, S, 2 D]). ``past``: those of W earlier ids, of which ``real_BW`` count."""
        length, behind = id_BS.shape[1], 0 if past is None else past.shape[2]
        place = torch.arange(behind + length, device=id_BS.device)
        distance = place[behind:, None] - place[None, :]
        mask = self.decoder_bias(distance).masked_fill((distance < 0) | (distance >= self.window), -1e9)[None]
        if real_BW is not None:
            mask = mask + F.pad(torch.zeros(real_BW.shape).masked_fill(~real_BW, -1e9), (0, length))[:, None, None, :]
        x_BSD, made = self.embedding(id_BS), []
        for number, layer in enumerate(self.decoder):
            x_BSD, new = layer(x_BSD, mask, None if past is None else past[:, number], cross[number])
            made.append(new)
        logit = self.heads(self.norm(x_BSD)).unflatten(-1, (self.num_layers, self.num_experts))
        return logit, torch.stack(made, 1)
