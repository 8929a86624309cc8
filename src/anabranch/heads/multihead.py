"""Routed heads of `torch.nn.MultiheadAttention`, self and cross: the same computed here, where heads can be reached."""
# Shapes: B sequences, L queries, S keys, H heads, D width of a head, E width

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.errors import InputError
from anabranch.heads.form import Decision, Form, Shape, argument
from anabranch.heads.routed_heads import RoutedHeads
from anabranch.nn.some_heads import SomeHeads, attention_of_some, can_spare, join_some, project_some

__all__ = ["MultiheadForm"]

_ARGUMENTS = (
    "query",
    "key",
    "value",
    "key_padding_mask",
    "need_weights",
    "attn_mask",
    "average_attn_weights",
    "is_causal",
)
_DEFAULTS = {"need_weights": True, "average_attn_weights": True, "is_causal": False}


class MultiheadForm(Form):
    """`torch.nn.MultiheadAttention`: batch first or second, without a batch, masks, weights, biases and zeros among the keys."""

    def shape(self, attention: nn.Module) -> Shape:
        """Its ``num_heads`` and ``embed_dim``."""
        assert isinstance(attention, nn.MultiheadAttention)
        return Shape(attention.num_heads, attention.embed_dim)

    def run(self, heads: RoutedHeads, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """(output, weights), as the attention gives them."""
        unknown = [name for name in kwargs if name not in _ARGUMENTS]
        if unknown or len(args) > len(_ARGUMENTS):
            raise InputError(f"a MultiheadAttention takes {', '.join(_ARGUMENTS)}; not {(unknown or ['more'])[0]}")
        given = {
            name: argument(name, place, args, kwargs, _DEFAULTS.get(name)) for place, name in enumerate(_ARGUMENTS)
        }
        attention: Any = heads.attention
        query, key, value = (given[name] for name in ("query", "key", "value"))
        _check(attention, query, key, value)
        is_batched, turned = query.dim() == 3, query.dim() == 3 and not attention.batch_first
        is_self = query is key
        query, key, value = (
            part.transpose(0, 1) if turned else part if is_batched else part.unsqueeze(0)
            for part in (query, key, value)
        )
        padding = given["key_padding_mask"]
        if padding is not None and not is_batched:
            padding = padding.unsqueeze(0)
        real_BL = None
        _check_padding(padding, key)
        if is_self and padding is not None:
            real_BL = ~padding if padding.dtype == torch.bool else padding > -math.inf
        decision = heads.decide(query, real_BL=real_BL)
        y_BLE, weight = _Call(attention, given, padding, decision).run(heads, query, key, value)
        if not is_batched:
            return y_BLE.squeeze(0), None if weight is None else weight.squeeze(0)
        return y_BLE.transpose(0, 1) if turned else y_BLE, weight


class _Call:
    """One call."""

    def __init__(self, attention: Any, given: dict[str, Any], padding: Tensor | None, decision: Decision) -> None:
        self.attention, self.given, self.padding, self.decision = attention, given, padding, decision
        self.needs_weights = bool(given["need_weights"])
        some = decision.some
        # Weights are of all heads.
        self.some: SomeHeads | None = None if self.needs_weights or attention.training else some
        self.spares = can_spare(given["query"], attention.out_proj.weight, self.some)

    def run(self, heads: RoutedHeads, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
        """(y_BLE, weights)."""
        attention = self.attention
        query_BHLD, key_BHSD, value_BHSD = self._project(query, key, value)
        mask = _mask(attention, self.given, self.padding, query_BHLD, key_BHSD)
        y_BHLD, weight = self._attend(query_BHLD, key_BHSD, value_BHSD, mask)
        y_BLHD = self.decision.scaled(y_BHLD.transpose(1, 2))
        self._count(heads, query, key, key_BHSD.shape[2])
        if self.spares:
            assert self.some is not None
            return join_some(y_BLHD, attention.out_proj.weight, attention.out_proj.bias, self.some), weight
        return F.linear(y_BLHD.flatten(2), attention.out_proj.weight, attention.out_proj.bias), weight

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attention, width = self.attention, self.attention.embed_dim
        weights = [attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight]
        if attention.in_proj_weight is not None:
            weights = list(attention.in_proj_weight.split(width))
        bias = attention.in_proj_bias
        biases = [None] * 3 if bias is None else list(bias.split(width))
        if self.spares:
            assert self.some is not None
            made = project_some(query, weights[0], biases[0], self.some)
        else:
            made = F.linear(query, weights[0], biases[0])
        stored = [F.linear(part, weights[place], biases[place]) for place, part in ((1, key), (2, value))]
        if attention.bias_k is not None:
            more = (attention.bias_k, attention.bias_v)
            stored = [
                torch.cat((part, one.expand(len(part), 1, -1)), 1) for part, one in zip(stored, more, strict=True)
            ]
        if attention.add_zero_attn:
            stored = [F.pad(part, (0, 0, 0, 1)) for part in stored]
        return tuple(part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in (made, *stored))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        dropout = self.attention.dropout if self.attention.training else 0.0
        if self.needs_weights:
            score = (query * query.shape[-1] ** -0.5) @ key.transpose(2, 3)
            weight = F.dropout((score if mask is None else score + mask).softmax(-1), dropout)
            return weight @ value, weight.mean(1) if self.given["average_attn_weights"] else weight
        if self.some is not None:
            return attention_of_some(query, key, value, self.some, mask=mask), None
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout), None

    def _count(self, heads: RoutedHeads, query: Tensor, key: Tensor, num_keys: int) -> None:
        if not heads.counts:
            return
        batch, length, width = query.shape
        heads.work.add(
            by_head=2 * batch * length * width * width,
            others=key.shape[0] * key.shape[1] * width * (self.attention.kdim + self.attention.vdim),
            core=2 * batch * length * num_keys * width,
            pairs=batch * length * self.attention.num_heads,
            share=1.0 if self.some is None else self.some.share,
            share_by_head=self.some.share_of_products if self.some is not None and self.spares else 1.0,
        )


def _check(attention: Any, query: Any, key: Any, value: Any) -> None:
    """Raise InputError for what no attention can be made of."""
    for name, part in (("query", query), ("key", key), ("value", value)):
        if not isinstance(part, Tensor):
            raise InputError(f"{name} is {type(part).__name__}; a MultiheadAttention takes tensors")
        if part.is_nested:
            raise InputError(f"{name} is a nested tensor; routed heads take padded ones, with key_padding_mask")
        if part.dim() not in (2, 3) or part.dim() != query.dim():
            raise InputError(f"{name} has shape {list(part.shape)}; it must have 3 dimensions, or all parts 2")
    for name, part, width in (
        ("query", query, attention.embed_dim),
        ("key", key, attention.kdim),
        ("value", value, attention.vdim),
    ):
        if part.shape[-1] != width:
            raise InputError(f"{name} has {part.shape[-1]} numbers of each position; the attention takes {width}")
    if key.shape[:-1] != value.shape[:-1]:
        raise InputError(
            f"key has shape {list(key.shape)} and value {list(value.shape)}; they are of the same positions"
        )
    if query.dim() == 3:
        place = 0 if attention.batch_first else 1
        if query.shape[place] != key.shape[place]:
            raise InputError(f"query has {query.shape[place]} sequences and key {key.shape[place]}")


def _check_padding(padding: Tensor | None, key: Tensor) -> None:
    """Raise InputError for a mask of other keys than ``key``, ``[B, S, E]``."""
    wanted = list(key.shape[:2])
    if padding is not None and list(padding.shape) != wanted:
        raise InputError(f"key_padding_mask has shape {list(padding.shape)}; it must be {wanted}")


def _mask(
    attention: Any, given: dict[str, Any], padding: Tensor | None, query_BHLD: Tensor, key_BHSD: Tensor
) -> Tensor | None:
    """What is added to the scores, ``[B or 1, H or 1, L or 1, S]``; None for nothing."""
    mask = given["attn_mask"]
    if given["is_causal"] and mask is None:
        raise InputError("is_causal is a hint about attn_mask, and there is none; give the mask too")
    batch, num_heads, length = query_BHLD.shape[:3]
    added = int(attention.bias_k is not None) + int(attention.add_zero_attn)
    num_keys = key_BHSD.shape[2] - added
    total: Tensor | None = None
    if mask is not None:
        if mask.shape not in ((length, num_keys), (batch * num_heads, length, num_keys)):
            raise InputError(
                f"attn_mask has shape {list(mask.shape)}; it must be {[length, num_keys]} or {[batch * num_heads, length, num_keys]}"
            )
        total = _added(mask, query_BHLD.dtype, "attn_mask")
        total = total[None, None] if mask.dim() == 2 else total.view(batch, num_heads, length, num_keys)
    if padding is not None:
        hidden = _added(padding, query_BHLD.dtype, "key_padding_mask")[:, None, None]
        total = hidden if total is None else total + hidden
    return F.pad(total, (0, added)) if total is not None and added else total


def _added(mask: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """As numbers to add: minus infinity where a bool mask is True."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)
    if not mask.is_floating_point():
        raise InputError(f"{name} is {mask.dtype}; it must be bool or of floats")
    return mask.to(dtype)
