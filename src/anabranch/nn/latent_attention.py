"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, sec. 2.1): keys and values of all heads come from one narrow vector.

    c = norm(W_ckv x)                       R numbers, the latent of a position
    k_h = [W_uk,h c ; rotate(W_kr x)]       N numbers that know no position, and P rotated ones that all heads share
    v_h = W_uv,h c
    q_h = [W_uq,h c_q ; rotate(W_qr,h c_q)]  with c_q = norm(W_cq x), or x itself

A cache keeps c and the rotated key alone, R + P numbers of a position. With it queries go to the latents instead: since
q k = (W_uk^T q_n) c + q_r k_r, and sums of values are W_uv of sums of latents, keys and values are never made again ("absorbed" form).
Without a cache they are made once, which takes fewer operations for many queries.
"""
# Shapes: B batch, L positions, H heads, D width, N, P and V widths of a head (without positions, rotated, of values), R rank of the latent

from typing import Any

import torch
from torch import Tensor

from anabranch.config import Field, Size, configclass
from anabranch.errors import ConfigError
from anabranch.nn.attention import Attention, attend
from anabranch.nn.context import BuildContext, Count, ForwardContext
from anabranch.nn.linear import Projection, build_linear, call_linear, count_linear, is_plain
from anabranch.nn.rotary import rotate, yarn_factor
from anabranch.nn.scored import Scoring

__all__ = ["LatentAttention"]


class LatentAttention(Attention, kind="latent"):
    """Causal attention with compressed keys and values."""

    @configclass
    class Config(Attention.Config):
        """The sizes.

        Attributes:
            num_heads: H.
            kv_rank: R, of the latent that keys and values come from.
            q_rank: of the latent that queries come from; None for queries straight from x.
            head_dim: N, the numbers of a head's keys and queries that know no position.
            rotary_dim: P, those that are rotated.
            value_dim: V.
            bias: biases on the projections to latents and on the last one.
            norm_eps: epsilon of the norms of latents.
            mscale, mscale_factor: scores are multiplied by (0.1 mscale ln(mscale_factor) + 1)^2, where YaRN made the context longer by that
                factor (DeepSeek's ``mscale_all_dim``); 0 and 1 for not at all.
        """

        num_heads: Size = Field(default=4, ge=1)
        kv_rank: Size = Field(default=32, ge=1)
        q_rank: Size | None = Field(default=None, ge=1)
        head_dim: Size = Field(default=16, ge=1)
        rotary_dim: Size = Field(default=8, ge=2)
        value_dim: Size = Field(default=16, ge=1)
        bias: bool = False
        norm_eps: float = Field(default=1e-6, gt=0)
        mscale: float = Field(default=0.0, ge=0)
        mscale_factor: float = Field(default=1.0, ge=1)

        @property
        def kv_heads(self) -> int:
            """One: the latent."""
            return 1

        @property
        def is_plain(self) -> bool:
            """No: values are not kept beside the keys."""
            return False

        def kept(self, dim: int) -> tuple[int, int]:
            """(R + P, 0): values are in the keys."""
            return self.kv_rank + self.rotary_dim, 0

        def width(self, dim: int) -> int:
            """P, what is rotated."""
            if self.rotary_dim % 2:
                raise ConfigError(f"rotary_dim is {self.rotary_dim}; rotary positions need an even number")
            return self.rotary_dim

        @property
        def scale(self) -> float:
            """Factor on scores."""
            return (self.head_dim + self.rotary_dim) ** -0.5 * yarn_factor(self.mscale_factor, self.mscale) ** 2

        def count(self, context: BuildContext, sequence_length: int) -> Count:
            """Sizes; attention itself as it runs without a cache, over the mean causal context."""
            norms = self.kv_rank + (self.q_rank or 0)
            heads = self.num_heads * (self.head_dim + self.rotary_dim + self.value_dim)
            matrices = [count_linear(projection, context) for projection in self.projections(context).values()]
            return sum(matrices, start=Count(norms, norms, 2 * heads * sequence_length // 2))

        def projections(self, context: BuildContext) -> dict[str, Projection]:
            """By name: ``q``, or ``q_down`` and ``q_up``; ``kv_down``, ``kv_up``, ``out``."""
            dim, queries = context.dim, self.num_heads * (self.head_dim + self.rotary_dim)
            made = {}
            if self.q_rank is None:
                made["q"] = context.projection("q", dim, queries)
            else:
                made["q_down"] = context.projection("q_down", dim, self.q_rank, bias=self.bias)
                made["q_up"] = context.projection("q_up", self.q_rank, queries)
            made["kv_down"] = context.projection("kv_down", dim, self.kv_rank + self.rotary_dim, bias=self.bias)
            heads = self.num_heads * (self.head_dim + self.value_dim)
            made["kv_up"] = context.projection("kv_up", self.kv_rank, heads)
            values = self.num_heads * self.value_dim
            made["out"] = context.projection("out", values, dim, bias=self.bias, residual=True, parts={"o": dim})
            return made

    def __init__(self, config: Config, context: BuildContext) -> None:
        super().__init__()
        self.config, self.layer = config, context.layer
        self.num_heads = config.num_heads
        for name, projection in config.projections(context).items():
            setattr(self, name, build_linear(projection, context))
        self.q_norm = None if config.q_rank is None else context.norm(config.q_rank, config.norm_eps)
        self.kv_norm = context.norm(config.kv_rank, config.norm_eps)

    q: Any
    q_down: Any
    q_up: Any
    kv_down: Any
    kv_up: Any
    out: Any

    def forward(self, x_BLD: Tensor, context: ForwardContext) -> Tensor:
        """Same shape as ``x_BLD``. Reads and extends ``context.cache`` where there is one."""
        query_BHLN, turned_BHLP = self._queries(x_BLD, context)
        sizes = (self.config.kv_rank, self.config.rotary_dim)
        latent_BLR, key_BLP = call_linear(self.kv_down, x_BLD, context).split(sizes, dim=-1)
        latent_BLR, key_B1LP = self.kv_norm(latent_BLR), rotate(key_BLP.unsqueeze(1), context.rotary)
        run = self._whole if context.cache is None else self._absorbed
        y_BHLV = run(query_BHLN, turned_BHLP, latent_BLR, key_B1LP, context)
        return call_linear(self.out, y_BHLV.transpose(1, 2).flatten(2), context)

    def _queries(self, x_BLD: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor]:
        if self.q_norm is None:
            query = call_linear(self.q, x_BLD, context)
        else:
            query = call_linear(self.q_up, self.q_norm(call_linear(self.q_down, x_BLD, context)), context)
        heads = query.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        query_BHLN, turned_BHLP = heads.split((self.config.head_dim, self.config.rotary_dim), dim=-1)
        return query_BHLN, rotate(turned_BHLP, context.rotary)

    def _whole(
        self, query_BHLN: Tensor, turned_BHLP: Tensor, latent_BLR: Tensor, key_B1LP: Tensor, context: ForwardContext
    ) -> Tensor:
        """y_BHLV by the keys and values of each head."""
        heads = call_linear(self.kv_up, latent_BLR, context).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        key_BHLN, value_BHLV = heads.split((self.config.head_dim, self.config.value_dim), dim=-1)
        key = torch.cat((key_BHLN, key_B1LP.expand(-1, self.num_heads, -1, -1)), dim=-1)
        query = torch.cat((query_BHLN, turned_BHLP), dim=-1)
        return attend(query, key, value_BHLV, context, self.layer, Scoring(self.config.scale))

    def _absorbed(
        self, query_BHLN: Tensor, turned_BHLP: Tensor, latent_BLR: Tensor, key_B1LP: Tensor, context: ForwardContext
    ) -> Tensor:
        """y_BHLV by the latents themselves."""
        sizes = (self.config.head_dim, self.config.value_dim)
        key_HNR, value_HVR = self._matrix(latent_BLR, context).unflatten(0, (self.num_heads, -1)).split(sizes, dim=1)
        query = torch.cat((torch.einsum("bhln,hnr->bhlr", query_BHLN, key_HNR), turned_BHLP), dim=-1)
        key = torch.cat((latent_BLR.unsqueeze(1), key_B1LP), dim=-1)
        scoring = Scoring(self.config.scale, value_width=self.config.kv_rank)
        y_BHLR = attend(query, key, key[..., :0], context, self.layer, scoring)
        return torch.einsum("bhlr,hvr->bhlv", y_BHLR, value_HVR)

    def _matrix(self, latent_BLR: Tensor, context: ForwardContext) -> Tensor:
        """The matrix of ``kv_up``, ``[H (N + V), R]``; of a layer that is no plain one what it makes of unit vectors."""
        if is_plain(self.kv_up):
            return self.kv_up.weight.to(latent_BLR.dtype)
        unit_RR = torch.eye(self.config.kv_rank, dtype=latent_BLR.dtype, device=latent_BLR.device)
        return call_linear(self.kv_up, unit_RR, context).transpose(0, 1)
