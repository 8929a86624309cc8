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

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.config import Field, Size, configclass
from anabranch.errors import ConfigError, InputError
from anabranch.nn.attention import Attention, attend
from anabranch.nn.context import BuildContext, Count, ForwardContext
from anabranch.nn.linear import Projection, build_linear, call_linear, count_linear, is_plain, told_names
from anabranch.nn.rotary import rotate, yarn_factor
from anabranch.nn.scored import Scoring
from anabranch.nn.some_heads import SomeHeads

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
        y_BHLV = self.per_head(x_BLD, context)
        return call_linear(self.out, y_BHLV.transpose(1, 2).flatten(2), context)

    def per_head(self, x_BLD: Tensor, context: ForwardContext, some: SomeHeads | None = None) -> Tensor:
        """y_BHLV, see `Attention.per_head`; all heads are computed, since keys and values are not kept as such."""
        query_BHLN, turned_BHLP = self._queries(x_BLD, context)
        sizes = (self.config.kv_rank, self.config.rotary_dim)
        latent_BLR, key_BLP = call_linear(self.kv_down, x_BLD, context).split(sizes, dim=-1)
        latent_BLR, key_B1LP = self.kv_norm(latent_BLR), rotate(key_BLP.unsqueeze(1), context.rotary)
        run = self._whole if context.cache is None else self._absorbed
        return run(query_BHLN, turned_BHLP, latent_BLR, key_B1LP, context)

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
        matrix = self._matrix(latent_BLR, context)
        key_HNR, value_HVR = matrix.unflatten(-2, (self.num_heads, -1)).split(sizes, dim=-2)
        # Of each row, where there is one for each.
        own = "b" if matrix.dim() == 3 else ""
        query = torch.cat((torch.einsum(f"bhln,{own}hnr->bhlr", query_BHLN, key_HNR), turned_BHLP), dim=-1)
        key = torch.cat((latent_BLR.unsqueeze(1), key_B1LP), dim=-1)
        scoring = Scoring(self.config.scale, value_width=self.config.kv_rank)
        y_BHLR = attend(query, key, key[..., :0], context, self.layer, scoring)
        return torch.einsum(f"bhlr,{own}hvr->bhlv", y_BHLR, value_HVR)

    def _matrix(self, latent_BLR: Tensor, context: ForwardContext) -> Tensor:
        """The matrix of ``kv_up``, ``[H (N + V), R]``; of a layer that is no plain one what it makes of unit vectors.

        One for each row, ``[B, H (N + V), R]``, where a layer follows what rows are told. Raises ConfigError for one that routes each
        token: there is no such matrix.
        """
        if is_plain(self.kv_up):
            return self.kv_up.weight.to(latent_BLR.dtype)
        unit_RR = torch.eye(self.config.kv_rank, dtype=latent_BLR.dtype, device=latent_BLR.device)
        told = _told(self.kv_up, context, *latent_BLR.shape[:2])
        if told:
            return self._of_rows(unit_RR, told, context)
        if any(getattr(module, "router", None) is not None for module in self.kv_up.modules()):
            raise ConfigError(
                "kv_up of latent attention routes each token, and with a cache it is one matrix for all; leave it out of linears, or run "
                "without a cache"
            )
        return call_linear(self.kv_up, unit_RR, context).transpose(0, 1)

    def _of_rows(self, unit_RR: Tensor, told: dict[str, Tensor], context: ForwardContext) -> Tensor:
        """`_matrix` of each row; rows that are told the same have it made once."""
        place_B = None
        if not torch.compiler.is_compiling():
            first_U, place_B = _distinct(list(told.values()))
            told = {name: value[first_U] for name, value in told.items()}
        rows, rank = len(next(iter(told.values()))), len(unit_RR)
        state = {name: value.unsqueeze(1).expand(rows, rank, *value.shape[1:]) for name, value in told.items()}
        own = replace(context.fork(), item_mask_N=None, sequence_length=rank, state={**context.state, **state})
        made_URX = call_linear(self.kv_up, unit_RR.expand(rows, -1, -1), own).transpose(1, 2)
        if place_B is None:
            return made_URX
        return made_URX[0] if rows == 1 else made_URX[place_B]


def _told(layer: nn.Module, context: ForwardContext, batch: int, length: int) -> dict[str, Tensor]:
    """What each row of the pass is told, ``[B, ...]`` by name, of that which ``layer`` follows.

    Raises InputError for other rows than those of the pass, and where tokens of one row are told different things.
    """
    found = {}
    for name in told_names(layer):
        value = context.state.get(name)
        if value is None:
            continue
        if tuple(value.shape[:2]) != (batch, length):
            raise InputError(
                f"{name} is told of {list(value.shape[:2])} rows and tokens in a pass of {batch} rows of {length}"
            )
        if not torch.compiler.is_compiling() and bool((value != value[:, :1]).any()):
            raise InputError(
                f"{name} is told otherwise of tokens of one row, which latent attention has one matrix for"
            )
        found[name] = value[:, 0]
    return found


def _distinct(values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(a row of each kind, of which kind each row is), of rows that are told ``[B, ...]``."""
    key_BX = torch.cat([value.reshape(len(value), -1).double() for value in values], dim=1)
    kinds_UX, place_B = torch.unique(key_BX, dim=0, return_inverse=True)
    first_U = place_B.new_full((len(kinds_UX),), len(key_BX))
    number_B = torch.arange(len(key_BX), device=place_B.device)
    return first_U.scatter_reduce(0, place_B, number_B, "amin"), place_B
