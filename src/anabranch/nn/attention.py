"""Attention: the interface of what mixes positions, and grouped-query self-attention (Ainslie et al. 2023, arXiv 2305.13245).

The latter has rotary positions and the variants that open checkpoints use.
"""
# Shapes: B batch, L positions, H heads, G key-value heads, D head width, W model width

import warnings
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.config import Config as BaseConfig
from anabranch.config import Field, Part, Size, configclass
from anabranch.errors import ConfigError
from anabranch.nn.causal import SHORT, attention, causal_attention
from anabranch.nn.context import BuildContext, Count, ForwardContext
from anabranch.nn.linear import Projection, build_linear, call_linear, count_linear, is_plain
from anabranch.nn.rotary import Rotary, rotate
from anabranch.nn.scored import PLAIN, Scoring, scored_attention
from anabranch.nn.shared_prefix import SharedPrefix, attend_few, gated_sum, side_by_side, with_prefix
from anabranch.nn.some_heads import SomeHeads, attention_of_some, can_spare, project_some
from anabranch.nn.visits import next_visits


class Attention(Part, nn.Module, family="attention", default="attention"):
    """Interface: ``(x_BLW, context) -> y_BLW``, where positions may see each other.

    A design is a subclass whose config has ``build(context)``, ``width(dim)`` and ``count(context, sequence_length)``. Keys and values of
    earlier positions are in ``context.cache``; `attend` reads and extends it. `anabranch.testing.check_attention` is the contract.
    """

    @configclass
    class Config(BaseConfig):
        """Base of attention configs."""

        def __new__(cls, **values: Any) -> "Attention.Config":
            """Fields given to the interface itself mean `SelfAttention`, as in versions before 0.2."""
            if cls is Attention.Config and values:
                warnings.warn(
                    "write SelfAttention.Config(...); Attention is the interface", DeprecationWarning, stacklevel=2
                )
                return object.__new__(SelfAttention.Config)
            return object.__new__(cls)

        @property
        def kv_heads(self) -> int:
            """Heads whose keys and values are kept of every position."""
            raise NotImplementedError  # abstract

        @property
        def is_plain(self) -> bool:
            """Whether each query weighs all before it by softmax(q k / sqrt(D)), which is all that some stores and kernels know."""
            return True

        def kept(self, dim: int) -> tuple[int, int]:
            """(width of a key, width of a value) of each head of a position, as they are kept."""
            return (self.width(dim),) * 2

        def width(self, dim: int) -> int:
            """Width of a head in a model of width ``dim``: what rotary positions rotate. Raises ConfigError where it cannot be."""
            raise NotImplementedError  # abstract

        def count(self, context: BuildContext, sequence_length: int) -> Count:
            """Sizes; attention itself is counted over the mean causal context, half of ``sequence_length``."""
            raise NotImplementedError  # abstract

    def forward(self, x_BLW: Tensor, context: ForwardContext) -> Tensor:
        """Same shape as ``x_BLW``."""
        raise NotImplementedError  # abstract

    def per_head(self, x_BLW: Tensor, context: ForwardContext, some: SomeHeads | None = None) -> Tensor:
        """y_BHLD: what each head gives, before the last projection, a layer ``out``.

        A design may have it, and then its heads can be routed (`anabranch.heads`). ``some`` says which heads are wanted; what the others
        give counts for nothing, so it need not be computed.
        """
        raise NotImplementedError  # optional


class SelfAttention(Attention, kind="attention"):
    """Causal self-attention; one fused projection makes queries, keys and values."""

    @configclass
    class Config(Attention.Config):
        """The variants.

        Attributes:
            num_heads: query heads.
            num_kv_heads: key-value heads, each shared by num_heads / num_kv_heads query heads; None means num_heads.
            head_dim: width of a head; None means dim / num_heads.
            qk_norm: RMSNorm of queries and keys: ``none``; per ``head`` (Qwen3); over the ``full`` width before heads are split (OLMoE).
            qkv_bias: biases on the first projection (Qwen2).
            out_bias: bias on the output projection.
            clip_qkv: clamp queries, keys and values to +-clip_qkv (OLMoE); None for no clamp.
            norm_eps: epsilon of the norms of ``qk_norm``.
            window: positions that a query sees, its own among them, and that a cache keeps (Mistral); None for all.
            sinks: each head has a learned score that takes weight and gives nothing (gpt-oss), see `anabranch.nn.scored`.
            scale: factor on scores; None for 1 / sqrt(head_dim).
            temperature_scale, temperature_length: queries at position p are multiplied by
                1 + temperature_scale ln(1 + floor(p / temperature_length)) (Llama 4, Ministral 3); a scale of 0 for not at all.
            rotary: rotary positions of this attention alone (Gemma 3's local layers); None for the model's.
        """

        num_heads: Size = Field(default=4, ge=1)
        num_kv_heads: Size | None = Field(default=None, ge=1)
        head_dim: Size | None = Field(default=None, ge=2)
        qk_norm: Literal["none", "head", "full"] = "none"
        qkv_bias: bool = False
        out_bias: bool = False
        clip_qkv: float | None = Field(default=None, gt=0)
        norm_eps: float = Field(default=1e-5, gt=0)
        window: Size | None = Field(default=None, ge=1)
        sinks: bool = False
        scale: float | None = Field(default=None, gt=0)
        temperature_scale: float = Field(default=0.0, ge=0)
        temperature_length: Size = Field(default=8192, ge=1)
        rotary: Rotary.Config | None = None

        @property
        def is_plain(self) -> bool:
            """See `Attention.Config.is_plain`."""
            return self.window is None and not self.sinks and self.scale is None and not self.temperature_scale

        def __post_init__(self) -> None:
            if self.num_heads % self.kv_heads:
                raise ConfigError(
                    f"num_kv_heads is {self.num_kv_heads}, which does not divide num_heads={self.num_heads}"
                )

        @property
        def kv_heads(self) -> int:
            """Key-value heads with the default filled in."""
            return self.num_kv_heads or self.num_heads

        def width(self, dim: int) -> int:
            """Width of a head in a model of width ``dim``."""
            if self.head_dim is None and dim % self.num_heads:
                raise ConfigError(f"dim {dim} is not a multiple of num_heads={self.num_heads}; set head_dim")
            head_dim = self.head_dim or dim // self.num_heads
            if head_dim % 2:
                raise ConfigError(f"head_dim is {head_dim}; rotary positions need an even number")
            return head_dim

        def count(self, context: BuildContext, sequence_length: int) -> Count:
            """Sizes; attention itself is counted over the mean causal context, half of ``sequence_length``."""
            head_dim = self.width(context.dim)
            query, store = self.num_heads * head_dim, self.kv_heads * head_dim
            norms = {"none": 0, "head": 2 * head_dim, "full": query + store}[self.qk_norm]
            norms += self.num_heads * self.sinks
            matrices = [count_linear(projection, context) for projection in self.projections(context)]
            return sum(matrices, start=Count(norms, norms, 2 * query * twice_seen(sequence_length, self.window)))

        def projections(self, context: BuildContext) -> tuple[Projection, Projection]:
            """(``q``, ``k`` and ``v`` in one, ``o``)."""
            head_dim = self.width(context.dim)
            query, store = self.num_heads * head_dim, self.kv_heads * head_dim
            return (
                context.projection(
                    "qkv",
                    context.dim,
                    query + 2 * store,
                    bias=self.qkv_bias,
                    parts={"q": query, "k": store, "v": store},
                ),
                context.projection(
                    "out", query, context.dim, bias=self.out_bias, residual=True, parts={"o": context.dim}
                ),
            )

    def __init__(self, config: Config, context: BuildContext) -> None:
        super().__init__()
        self.config = config
        self.layer = context.layer
        self.head_dim = config.width(context.dim)
        self.num_heads, self.num_kv_heads = config.num_heads, config.kv_heads
        query, store = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.split = (query, store, store)
        self.qkv, self.out = (build_linear(projection, context) for projection in config.projections(context))
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.qk_norm != "none":
            q_dim, k_dim = (query, store) if config.qk_norm == "full" else (self.head_dim, self.head_dim)
            self.q_norm, self.k_norm = (context.norm(dim, config.norm_eps) for dim in (q_dim, k_dim))
        self.sink_H = nn.Parameter(torch.zeros(config.num_heads)) if config.sinks else None
        self.rotary: Rotary | None = None if config.rotary is None else config.rotary.build(self.head_dim)

    @property
    def scoring(self) -> Scoring:
        """How scores become weights."""
        made = Scoring(self.config.scale, self.config.window, self.sink_H)
        return PLAIN if made.is_plain else made

    def forward(self, x_BLW: Tensor, context: ForwardContext) -> Tensor:
        """Same shape as ``x_BLW``. Reads and extends ``context.cache`` where there is one."""
        y_BHLD = self.per_head(x_BLW, context)
        return call_linear(self.out, y_BHLD.transpose(1, 2).flatten(2), context)

    def per_head(self, x_BLW: Tensor, context: ForwardContext, some: SomeHeads | None = None) -> Tensor:
        """See `Attention.per_head`."""
        # A subclass may have a `project` of before.
        told = {} if some is None else {"some": some}
        query, key, value = self.project(x_BLW, context, **told)
        gate_BL = None if context.front_gates is None else context.front_gates(self.layer, x_BLW)
        return attend(query, key, value, context, self.layer, self.scoring, some, gate_BL)

    def project(
        self, x_BLW: Tensor, context: ForwardContext, some: SomeHeads | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(query_BHLD, key_BGLD, value_BGLD), with positions; queries that are not wanted may be 0."""
        if some is not None and self.spares_queries(x_BLW, some):
            query, key, value = self._in_parts(x_BLW, some)
        else:
            query, key, value = call_linear(self.qkv, x_BLW, context).split(self.split, dim=-1)
        if self.config.qk_norm == "full":
            query, key = self.q_norm(query), self.k_norm(key)
        if self.config.clip_qkv is not None:
            limit = self.config.clip_qkv
            query, key, value = query.clamp(-limit, limit), key.clamp(-limit, limit), value.clamp(-limit, limit)
        query, key, value = self._heads(query), self._heads(key), self._heads(value)
        if self.config.qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        rotary = context.rotary if self.rotary is None else self.rotary(distinct(context.position_BL), query.dtype)
        query = rotate(query, rotary)
        if self.config.temperature_scale:
            query = query * self._growth(distinct(context.position_BL)).to(query.dtype)
        return query, rotate(key, rotary), value

    def spares_queries(self, x_BLW: Tensor, some: SomeHeads | None) -> bool:
        """Whether queries of some heads alone are made: by a plain matrix, and with no norm over all of them."""
        is_alone = is_plain(self.qkv) and self.config.qk_norm != "full"
        return is_alone and can_spare(x_BLW, self.qkv.weight, some)

    def _in_parts(self, x_BLW: Tensor, some: SomeHeads) -> tuple[Tensor, Tensor, Tensor]:
        queries, *stores = self.split
        weight, bias = self.qkv.weight, self.qkv.bias
        query = project_some(x_BLW, weight[:queries], None if bias is None else bias[:queries], some)
        made = F.linear(x_BLW, weight[queries:], None if bias is None else bias[queries:])
        return query, *made.split(stores, dim=-1)

    def _growth(self, position_BL: Tensor) -> Tensor:
        """``[B, 1, L, 1]``: what queries are multiplied by, see ``temperature_scale``."""
        steps_BL = (position_BL // self.config.temperature_length).clamp(min=0).float()
        return (1 + self.config.temperature_scale * torch.log1p(steps_BL))[:, None, :, None]

    def _heads(self, x_BLW: Tensor) -> Tensor:
        return x_BLW.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def attend(
    query_BHLD: Tensor,
    key_BGLD: Tensor,
    value_BGLD: Tensor,
    context: ForwardContext,
    layer: int,
    scoring: Scoring = PLAIN,
    some: SomeHeads | None = None,
    gate_BL: Tensor | None = None,
) -> Tensor:
    """y_BHLD: each query sees earlier positions, itself, and no padding. What is new is stored where there is a ``context.cache``.

    This is what an attention of one's own calls, once in each of its calls, so that its layer may run several times, or for some sequences,
    in one forward pass.

    Args:
        query_BHLD: of the new positions.
        key_BGLD: likewise; G divides H.
        value_BGLD: likewise.
        context: of the pass.
        layer: index of the layer.
        scoring: how scores become weights.
        some: the heads that are wanted, where not all; others may be computed all the same, or be 0.
        gate_BL: what each query multiplies keys and values in front of all sequences by; None for 1.

    Raises ConfigError where the store cannot keep another visit of a layer, weighs plainly alone, or knows no gates.
    """
    visits = next_visits(context.visits, layer, query_BHLD.shape[0])
    if context.cache is None:
        return _among(
            query_BHLD,
            key_BGLD,
            value_BGLD,
            context.attention_mask,
            None,
            context.is_causal,
            scoring=scoring,
            some=some,
        )
    if len(visits) == 1:
        return _stored(query_BHLD, key_BGLD, value_BGLD, context, layer, *visits[0], scoring, some, gate_BL)
    y_BHLD = query_BHLD.new_empty(*query_BHLD.shape[:3], scoring.value_width or value_BGLD.shape[-1])
    for visit, rows in visits:
        part = some if some is None or rows is None else some.of_rows(rows)
        parts = query_BHLD[rows], key_BGLD[rows], value_BGLD[rows]
        gate = None if gate_BL is None else gate_BL[rows]
        made = _stored(*parts, context, layer, visit, rows, scoring, part, gate)
        y_BHLD[rows] = made.to(y_BHLD.dtype)
    return y_BHLD


def _stored(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context: ForwardContext,
    layer: int,
    visit: int,
    rows: list[int] | None,
    scoring: Scoring,
    some: SomeHeads | None = None,
    gate_BL: Tensor | None = None,
) -> Tensor:
    """y_BHLD of the sequences ``rows`` of the pass (None: all), which come to this layer for the ``visit``-th time."""
    store: Any = context.cache
    if hasattr(store, "attend"):
        several = getattr(store, "keeps_visits", False)
        if rows is not None or context.rows is not None or (visit and not several):
            kept = "visits" if several else "one visit"
            raise ConfigError(
                f"the key-value store of this pass keeps {kept} of each block by all sequences, and layer {layer} is "
                "visited again or by some of them"
            )
        if scoring is not PLAIN and not getattr(store, "takes_scoring", False):
            raise ConfigError(
                f"the key-value store of this pass weighs all positions by their scores alone, and attention of layer {layer} has a "
                "window, sinks, a scale of its own or shared keys and values"
            )
        if gate_BL is not None and not getattr(store, "takes_gates", False):
            raise ConfigError(
                "the key-value store of this pass knows no gates of what stands in front, which the model's virtual tokens have"
            )
        options: dict[str, Any] = {"visit": visit} if visit else {}
        options |= {} if gate_BL is None else {"gate_BL": gate_BL}
        return store.attend(layer, query, key, value, **options, **({} if scoring is PLAIN else {"scoring": scoring}))
    here = rows if context.rows is None else context.rows if rows is None else [context.rows[row] for row in rows]
    kept_window = {} if scoring.window is None else {"window": scoring.window}
    key, value, seen = store.append(layer, key, value, visit=visit, rows=here, **kept_window)
    front = store.front(layer, here) if hasattr(store, "front") else None
    mask = context.attention_mask
    if mask is not None and rows is not None and mask.shape[0] > 1:
        mask = mask[rows]
    if mask is not None and scoring.window is not None:
        # Of what a window lets a store forget there is no key.
        mask = mask[..., -key.shape[2] :]
    elif mask is not None:
        # It is over what stands in front of other layers, where this one has nothing.
        mask = mask[..., -(key.shape[2] + (0 if front is None else front[0].shape[2])) :]
    return _among(query, key, value, mask, seen, context.is_causal, front, scoring, some, gate_BL)


def distinct(position_BL: Tensor) -> Tensor:
    """One row of positions where all sequences have the same: their angles are made once."""
    return position_BL[:1] if position_BL.stride(0) == 0 else position_BL


def twice_seen(sequence_length: int, window: int | None) -> int:
    """Twice the positions that a query sees on average over a sequence."""
    if window is None or window >= sequence_length:
        return sequence_length
    return 2 * window - window * (window - 1) // sequence_length


def _among(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seen_BL: Tensor | None,
    is_causal: bool,
    front: SharedPrefix | None = None,
    scoring: Scoring = PLAIN,
    some: SomeHeads | None = None,
    gate_BL: Tensor | None = None,
) -> Tensor:
    """Attention under the mask of the pass, apart from positions that are not there (``seen_BL`` is False).

    The mask is over what sequences share in front, too, which all see.
    """
    if front is not None:
        num_shared = front[0].shape[2]
        if query.shape[2] < SHORT:
            mask = None if mask is None else mask[..., num_shared:]
            if mask is None and is_causal:
                mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
                mask = mask.tril(key.shape[2] - query.shape[2])[None, None]
            if seen_BL is not None:
                mask = seen_BL[:, None, None] if mask is None else mask & seen_BL[:, None, None]
            return attend_few(query, key, value, front, mask, gate_BL)
        seen_BL = None if seen_BL is None else F.pad(seen_BL, (num_shared, 0), value=True)
        if gate_BL is not None:
            wide = side_by_side(query, key, value, front, gate_BL)
            return gated_sum(_among(*wide, mask, seen_BL, is_causal), gate_BL)
        key, value = with_prefix(key, front[0]), with_prefix(value, front[1])
    if seen_BL is not None:
        length, past = query.shape[2], key.shape[2] - query.shape[2]
        if mask is None:
            ones = torch.ones(length, past + length, dtype=torch.bool, device=query.device)
            mask = ones.tril(past) if is_causal else ones
        mask = mask & seen_BL[:, None, None, :]
    if scoring is not PLAIN:
        if not is_causal and mask is None and query.shape[2] > 1:
            raise ConfigError("attention to later positions has no windows, sinks or scale; leave them out")
        return scored_attention(query, key, value, scoring, mask)
    if some is not None:
        return attention_of_some(query, key, value, some, mask=mask, is_causal=is_causal)
    if is_causal and mask is None:
        return causal_attention(query, key, value)
    return attention(query, key, value, attn_mask=mask)
