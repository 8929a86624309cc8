"""Routed heads of transformers' attentions: Llama, Qwen2 and 3, Mistral, GPT-2, Whisper, and others that attend as they do.

They all compute queries, keys and values, store them, and hand them to one function that the model's config names
(``attn_implementation``). A routed attention has a config of its own that names ours, which scales the heads, leaves out those that are
off, and for the rest is the function that the model's config names. So the attention's own code runs, with its cache, positions and masks.
"""
# Shapes: B sequences, L queries, S keys, H heads, D width of a head

import copy
import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.errors import ConfigError, InputError
from anabranch.heads.form import Decision, Form, Shape, argument
from anabranch.heads.padding import said_real
from anabranch.heads.routed_heads import RoutedHeads
from anabranch.nn.some_heads import attention_of_some

__all__ = ["TransformersForm", "is_transformers"]

# What our function is called in a config, and what the decision is called among the arguments of a call.
NAME, DECISION = "anabranch_routed_heads", "anabranch_heads"
# In the config of a routed attention: that of its model.
_MODEL_CONFIG = "_anabranch_model_config"
# Functions that compute softmax(scale q k + mask) v and no more, so that parts of it are what they would give.
_PLAIN = ("sdpa", "eager")
# Arguments with which they compute something else.
_OTHERWISE = ("softcap", "s_aux", "position_bias", "output_attentions", "head_mask")


def is_transformers(attention: nn.Module) -> bool:
    """Whether it looks like an attention of transformers: it has their config, and queries of a projection of their names."""
    config = getattr(attention, "config", None)
    return hasattr(config, "_attn_implementation") and any(hasattr(attention, name) for name in ("q_proj", "c_attn"))


class TransformersForm(Form):
    """An attention of transformers that attends through the function its config names."""

    def shape(self, attention: nn.Module) -> Shape:
        """By its first projection."""
        part: Any = attention
        name = type(attention).__name__
        takes = inspect.signature(part.forward).parameters.values()
        if all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in takes):
            raise ConfigError(f"a {name} hands no arguments on to what attends, so its heads cannot be routed")
        if getattr(part, "reorder_and_upcast_attn", False):
            raise ConfigError(
                f"the {name} has reorder_and_upcast_attn, which attends by itself; turn it off in its config"
            )
        if hasattr(part, "q_proj"):
            width, inner = part.q_proj.weight.shape[1], part.q_proj.weight.shape[0]
        else:
            # Conv1D, whose weight stands the other way.
            first = getattr(part, "q_attn", part.c_attn)
            width, inner = first.weight.shape[0], first.weight.shape[0]
        head_dim = getattr(part, "head_dim", None)
        if not isinstance(head_dim, int) or inner % head_dim:
            raise ConfigError(f"a {name} does not say how wide its heads are (head_dim), so they cannot be routed")
        layer = getattr(part, "layer_idx", None)
        return Shape(inner // head_dim, width, layer if isinstance(layer, int) else 0)

    def prepare(self, attention: nn.Module) -> None:
        """Give it a config of its own."""
        from transformers import AttentionInterface

        AttentionInterface.register(NAME, _attend)
        part: Any = attention
        own = copy.copy(part.config)
        # Not by its setter, which changes the configs inside of it, and those are the model's.
        object.__setattr__(own, "_attn_implementation_internal", NAME)
        object.__setattr__(own, _MODEL_CONFIG, part.config)
        part.config = own

    def restore(self, attention: nn.Module) -> None:
        """Give it its model's config again."""
        part: Any = attention
        part.config = getattr(part.config, _MODEL_CONFIG, part.config)

    def run(self, heads: RoutedHeads, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the attention returns."""
        hidden = argument("hidden_states", 0, args, kwargs)
        if not isinstance(hidden, Tensor) or hidden.dim() != 3:
            found = f"shape {list(hidden.shape)}" if isinstance(hidden, Tensor) else type(hidden).__name__
            raise InputError(f"hidden_states is {found}; it must be [sequences, positions, width]")
        crosses = any(kwargs.get(name) is not None for name in ("key_value_states", "encoder_hidden_states"))
        real_BL = None if crosses else _real(kwargs.get("attention_mask"), hidden)
        if real_BL is None:
            real_BL = said_real(*hidden.shape[:2])
        position_BL = kwargs.get("position_ids")
        decision = heads.decide(hidden, real_BL=real_BL, position_BL=position_BL)
        told = _Told(heads, decision, kwargs.get("key_value_states", kwargs.get("encoder_hidden_states")))
        made = heads.attention(*args, **kwargs, **{DECISION: told})
        if not told.was_asked:
            raise ConfigError(
                f"a {type(heads.attention).__name__} does not attend through the function its config names, so its heads cannot be routed"
            )
        return made


class _Told:
    """What goes with one call to our function."""

    def __init__(self, heads: RoutedHeads, decision: Decision, others: Tensor | None) -> None:
        self.heads, self.decision, self.others = heads, decision, others
        self.was_asked = False

    def count(self, query: Tensor, key: Tensor, is_causal: bool, share: float) -> None:
        """Note the work. The products are the attention's own, and are made of all heads."""
        if not self.heads.counts:
            return
        batch, num_heads, length, width = query.shape
        num_keys = key.shape[2]
        tokens = batch * length
        gate = self.heads.gate
        assert gate is not None
        # Of what another sequence gives, keys and values may be there already.
        new = tokens if self.others is None else self.others.shape[0] * self.others.shape[1]
        past = num_keys - length
        seen = length * past + length * (length + 1) // 2 if is_causal else length * num_keys
        self.heads.work.add(
            by_head=2 * tokens * gate.width * num_heads * width,
            others=2 * new * gate.width * key.shape[1] * width,
            core=2 * batch * num_heads * width * seen,
            pairs=tokens * num_heads,
            share=share,
        )


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """(y_BLHD, weights or None): the function of the model's config, with heads scaled, and without those that are off."""
    part: Any = module
    told: _Told | None = kwargs.pop(DECISION, None)
    config = getattr(part.config, _MODEL_CONFIG)
    name = config._attn_implementation
    if told is None:
        return _function(part, name)(module, query, key, value, attention_mask, **kwargs)
    told.was_asked = True
    decision = told.decision
    if decision.scale_BLH.shape != (query.shape[0], query.shape[2], query.shape[1]):
        raise ConfigError(
            f"a {type(module).__name__} has {query.shape[1]} heads and {query.shape[2]} queries, not {decision.scale_BLH.shape[2]} and "
            f"{decision.scale_BLH.shape[1]}; its heads cannot be routed"
        )
    length = query.shape[2]
    causal = kwargs.get("is_causal")
    is_causal = bool(getattr(module, "is_causal", True) if causal is None else causal) and length > 1
    # Alone "sdpa" hides later positions by itself, and there counts them from the first key.
    hides = is_causal and attention_mask is None and name == "sdpa"
    is_plain = _is_plain(name, attention_mask, kwargs) and not (hides and length != key.shape[2])
    some = decision.some if is_plain else None
    told.count(query, key, is_causal, 1.0 if some is None else some.share)
    weight: Tensor | None = None
    if some is None:
        y_BLHD, weight = _function(part, name)(module, query, key, value, attention_mask, **kwargs)
    else:
        mask = None if attention_mask is None else attention_mask[..., : key.shape[2]]
        y_BHLD = attention_of_some(query, key, value, some, mask=mask, is_causal=hides, scale=kwargs.get("scaling"))
        y_BLHD = y_BHLD.transpose(1, 2)
    return decision.scaled(y_BLHD), weight


def _function(module: Any, name: str | None) -> Any:
    """What attends in a model whose config names ``name``."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    found = ALL_ATTENTION_FUNCTIONS.get_interface(name or "eager", eager)
    if found is None:
        raise ConfigError(f"a {type(module).__name__} has no function for attn_implementation {name!r}; use 'sdpa'")
    return found


def _is_plain(name: str | None, mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
    """Whether parts of the work can be computed here as they would be there."""
    if name not in _PLAIN or kwargs.get("dropout") or any(kwargs.get(each) is not None for each in _OTHERWISE[:3]):
        return False
    if any(kwargs.get(each) not in (None, False) for each in _OTHERWISE[3:]):
        return False
    if mask is None:
        # A window is in the mask, or there is nothing beyond it.
        return True
    return isinstance(mask, Tensor) and mask.dim() == 4


def _real(mask: Any, hidden: Tensor) -> Tensor | None:
    """bool ``[B, L]``: which queries are no padding, by whether they may look at themselves; None where nothing says it.

    Of a mask over more keys than queries it is not known which of them are the queries' own: a cache may be longer than what is in it.
    """
    batch, length = hidden.shape[:2]
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[2:] != (length, length):
        return None
    own_BL = mask[:, 0].diagonal(dim1=1, dim2=2)
    real_BL = own_BL if mask.dtype == torch.bool else own_BL > torch.finfo(mask.dtype).min / 2
    return None if bool(real_BL.all()) else real_BL.expand(batch, length)
