"""Causal language models of Hugging Face transformers as stacks of blocks: Llama, Qwen2, Qwen3, Mistral, GPT-2.

Blocks, masks, rotary positions, norm and head are the model's own. What is ours is the key-value store that a block is given in place of
transformers' cache: a slot for each visit of a block, see `anabranch.lm.cache`.
"""
# Shapes: B sequences, R of them, L new positions, S all positions so far, D width, H heads, E head width

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.depth.fingerprint import fingerprint_of
from anabranch.depth.seen import check_mask, check_padding, check_positions, seen_pairs
from anabranch.errors import ConfigError
from anabranch.lm.cache import KeyValueCache, extend_valid
from anabranch.nn.visits import Visits, next_visits, take_back, visits_of_rows

__all__ = ["SUPPORTED", "TransformersPass", "TransformersStack", "is_supported"]

SUPPORTED = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM", "GPT2LMHeadModel")
# What transformers makes masks for that say which single positions are seen.
IMPLEMENTATIONS = ("sdpa", "eager")
# Names of one argument in the versions of transformers from 5.0 on.
ALIASES = {"cache": ("cache", "past_key_values"), "inputs_embeds": ("inputs_embeds", "input_embeds")}
FULL, SLIDING = "full_attention", "sliding_attention"


def is_supported(model: Any) -> bool:
    """Whether ``model`` is of one of the classes, without importing transformers."""
    return _family(model) is not None


def _family(model: Any) -> str | None:
    """The class of ``model`` among those supported."""
    own = [cls.__name__ for cls in type(model).__mro__ if cls.__module__.startswith("transformers.")]
    return next((name for name in own if name in SUPPORTED), None)


@dataclass
class TransformersPass:
    """The state of a pass.

    Attributes:
        position_BL: int64, place of each token in its sequence; ``[1, L]`` where all sequences have the same.
        rotary: (cos, sin), each ``[B, L, E]`` or ``[1, L, E]``; None for learned positions.
        real_BS: bool, False for padding, of all positions so far; None where there is none.
        past: positions in the cache before this pass.
        length: L.
        cache: of the pass; None for none.
        visits: how often sequences have come to each block.
        masks: what transformers made of ``real_BS``, by kind of attention and rows.
        is_ended: whether the new positions have been counted in the cache.
    """

    position_BL: Tensor
    rotary: tuple[Tensor, Tensor] | None
    real_BS: Tensor | None
    past: int
    length: int
    cache: KeyValueCache | None = None
    visits: Visits = field(default_factory=dict)
    masks: dict[tuple[str, tuple[int, ...] | None], Tensor | None] = field(default_factory=dict)
    is_ended: bool = False


@dataclass(frozen=True)
class _Slot:
    """What attention of a block is given as transformers' cache: one visit, by some rows."""

    cache: KeyValueCache
    layer: int
    visit: int
    rows: Sequence[int] | None

    def update(self, key_RHLE: Tensor, value_RHLE: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of this visit so far, the new ones among them. Places that were passed over are masked, see `_seen`."""
        key_RHSE, value_RHSE, _came = self.cache.append(
            self.layer, key_RHLE, value_RHLE, visit=self.visit, rows=self.rows
        )
        return key_RHSE, value_RHSE


@dataclass(frozen=True)
class _Sizes:
    """What transformers' masks ask a cache."""

    past: int
    length: int
    is_compileable: bool = False

    def get_mask_sizes(self, *_: Any, **__: Any) -> tuple[int, int]:
        """(keys, places in front that are not kept)."""
        return self.past + self.length, 0

    def get_query_offset(self, *_: Any, **__: Any) -> int:
        """Positions before the first query."""
        return self.past

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """Positions in the cache."""
        return self.past


class TransformersStack:
    """See `anabranch.depth.BlockStack`.

    Raises ConfigError for a model of another class, or with an attention other than ``sdpa`` and ``eager``.
    """

    def __init__(self, model: Any) -> None:
        family = _family(model)
        if family is None:
            raise ConfigError(f"the model is a {type(model).__name__}; it must be one of {', '.join(SUPPORTED)}")
        if model.config._attn_implementation not in IMPLEMENTATIONS:
            raise ConfigError(
                f"the model's attention is {model.config._attn_implementation!r}, which masks no single positions; load it with "
                f"attn_implementation={' or '.join(map(repr, IMPLEMENTATIONS))}"
            )
        from transformers import masking_utils

        self.module: Any = model
        self.body: Any = model.base_model
        self.config: Any = model.config
        self.has_learned_positions = family == "GPT2LMHeadModel"
        blocks = self.body.h if self.has_learned_positions else self.body.layers
        self.layers: nn.ModuleList = blocks[: self.config.num_hidden_layers]
        self.kinds = _kinds(family, self.config)
        self._make_mask = {
            FULL: masking_utils.create_causal_mask,
            SLIDING: masking_utils.create_sliding_window_causal_mask,
        }

    @property
    def num_blocks(self) -> int:
        """How many there are, numbered from 0."""
        return len(self.layers)

    @property
    def width(self) -> int:
        """D, of the residual stream."""
        return self.config.hidden_size

    @property
    def vocabulary(self) -> int:
        """Tokens that there are."""
        return self.config.vocab_size

    @property
    def max_positions(self) -> int:
        """Longest sequence that the model is meant for."""
        return self.config.max_position_embeddings

    @property
    def device(self) -> torch.device:
        """Of the embedding."""
        return self._embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the embedding."""
        return self._embedding.weight.dtype

    @property
    def _embedding(self) -> Any:
        return self.module.get_input_embeddings()

    def embed(
        self,
        token_BL: Tensor,
        attention_mask: Tensor | None = None,
        *,
        position_BL: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> tuple[Tensor, TransformersPass]:
        """See `BlockStack.embed`. Raises ConfigError for positions that a model with learned ones has not learned."""
        mask_BL = check_mask(attention_mask, token_BL)
        if position_BL is not None:
            position_BL = check_positions(position_BL, token_BL)
        (batch, length), device = token_BL.shape, token_BL.device
        past = 0
        if cache is not None:
            # What a pass that failed has left, and how many sequences there are before some of them come to a block.
            cache.begin()
            cache.sequences(batch)
            past = cache.length
            check_padding(mask_BL, past, has_window=SLIDING in self.kinds)
        real_BS = None
        if mask_BL is not None or (cache is not None and cache.valid_BL is not None):
            real_BS = extend_valid(cache, mask_BL, length, past, device)
        if position_BL is None and real_BS is not None:
            position_BL = (real_BS.long().cumsum(1) - 1).clamp_min(0)[:, past:]
        elif position_BL is None:
            position_BL = torch.arange(past, past + length, device=device)[None]
        x_BLD, rotary = self._embedded(token_BL, position_BL)
        return x_BLD, TransformersPass(position_BL, rotary, real_BS, past, length, cache)

    def _embedded(self, token_BL: Tensor, position_BL: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """(x_BLD, rotary angles), as the model makes them of tokens and their places."""
        x_BLD = self._embedding(token_BL)
        if not self.has_learned_positions:
            return x_BLD, self.body.rotary_emb(x_BLD, position_ids=position_BL)
        last = int(position_BL.max()) if position_BL.numel() else 0
        if last >= self.max_positions:
            raise ConfigError(
                f"there is a token at position {last}, and the model has learned positions 0 to {self.max_positions - 1}"
            )
        return self.body.drop(x_BLD + self.body.wpe(position_BL)), None

    def block(self, layer: int, x_BLD: Tensor, state: TransformersPass, *, rows: Sequence[int] | None = None) -> Tensor:
        """See `BlockStack.block`."""
        batch = len(x_BLD)
        if rows is None or list(rows) == list(range(batch)):
            return self._visited(layer, x_BLD, state, None)
        if not rows:
            return x_BLD
        row_R = torch.tensor(list(rows), device=x_BLD.device)
        y_RLD = self._visited(layer, x_BLD[row_R], state, list(rows), batch)
        return x_BLD.index_copy(0, row_R, y_RLD.to(x_BLD.dtype))

    def _visited(
        self, layer: int, x_RLD: Tensor, state: TransformersPass, rows: list[int] | None, batch: int = 0
    ) -> Tensor:
        """One visit by ``rows`` of the pass (None: all); each goes on in the slot of its own next visit."""
        if state.cache is None:
            return self._run(layer, x_RLD, state, rows, 0)
        visits = state.visits if rows is None else visits_of_rows(state.visits, rows)
        groups = next_visits(visits, layer, len(x_RLD))
        if rows is not None:
            take_back(state.visits, visits, rows, batch)
        if len(groups) == 1:
            return self._run(layer, x_RLD, state, rows, groups[0][0])
        y_RLD = torch.empty_like(x_RLD)
        for visit, places in groups:
            assert places is not None, "several groups, and one of them is everybody"
            here = places if rows is None else [rows[place] for place in places]
            y_RLD[places] = self._run(layer, x_RLD[places], state, here, visit)
        return y_RLD

    def _run(
        self, layer: int, x_RLD: Tensor, state: TransformersPass, rows: Sequence[int] | None, visit: int
    ) -> Tensor:
        """The block on ``rows`` of the pass (None: all), all of which come for the ``visit``-th time."""

        def own(value: Tensor) -> Tensor:
            return value if rows is None or len(value) == 1 else value[list(rows)]

        values: dict[str, Any] = {
            "hidden_states": x_RLD,
            "attention_mask": self._mask(layer, x_RLD, state, rows, visit),
            "position_ids": own(state.position_BL),
            "use_cache": state.cache is not None,
            "cache": None if state.cache is None else _Slot(state.cache, layer, visit, rows),
        }
        if state.rotary is not None:
            cos, sin = state.rotary
            values["position_embeddings"] = own(cos), own(sin)
        made = self.layers[layer](**_named(self._parameters[layer], values))
        return made[0] if isinstance(made, tuple) else made

    def _mask(
        self, layer: int, x_RLD: Tensor, state: TransformersPass, rows: Sequence[int] | None, visit: int
    ) -> Tensor | None:
        """What ``rows`` see in this visit, as transformers would have the model's attention told."""
        came_RS = None
        if state.cache is not None:
            came_RS = state.cache.came_by(layer, state.length, visit=visit, rows=rows)
        key = (self.kinds[layer], None if rows is None else tuple(rows))
        if came_RS is None and key in state.masks:
            return state.masks[key]
        seen_RS = state.real_BS if state.real_BS is None or rows is None else state.real_BS[list(rows)]
        if came_RS is not None:
            came_RS = came_RS.to(x_RLD.device)
            seen_RS = came_RS if seen_RS is None else seen_RS & came_RS
        make = self._make_mask[self.kinds[layer]]
        mask = make(
            **_named(
                _parameters_of(make),
                {
                    "config": self.config,
                    "inputs_embeds": x_RLD,
                    "attention_mask": seen_RS,
                    "cache": None if state.cache is None else _Sizes(state.past, state.length),
                    "cache_position": torch.arange(state.past, state.past + state.length, device=x_RLD.device),
                },
            )
        )
        if came_RS is None:
            state.masks[key] = mask
        return mask

    @cached_property
    def _parameters(self) -> list[frozenset[str]]:
        """Names of the arguments of each block."""
        return [_parameters_of(block.forward) for block in self.layers]

    def fork(self, state: TransformersPass) -> TransformersPass:
        """See `BlockStack.fork`. Raises ConfigError for a pass with a cache, which has one past."""
        if state.cache is not None:
            raise ConfigError("a pass with a key-value cache cannot be forked; run the branches without a cache")
        return replace(state)

    def head(self, x_BLD: Tensor, state: TransformersPass, *, last_only: bool = False) -> Tensor:
        """See `BlockStack.head`."""
        norm = self.body.ln_f if self.has_learned_positions else self.body.norm
        logits_BLV = self.module.lm_head(norm(x_BLD[:, -1:] if last_only else x_BLD))
        if not state.is_ended and state.cache is not None:
            state.cache.advance(state.length)
        state.is_ended = True
        return logits_BLV

    def count(self, layer: int, length: int, context: int) -> int:
        """See `BlockStack.count`."""
        matrices = sum(one.numel() for one in self.layers[layer].parameters() if one.dim() > 1)
        head_width = getattr(self.config, "head_dim", None) or self.width // self.config.num_attention_heads
        window = self.config.sliding_window if self.kinds[layer] == SLIDING else None
        pairs = seen_pairs(length, context, window)
        return matrices * length + 2 * self.config.num_attention_heads * head_width * pairs

    def new_cache(self, max_length: int) -> KeyValueCache:
        """See `BlockStack.new_cache`."""
        return KeyValueCache(self.num_blocks, max_length)

    def fingerprint(self) -> str:
        """See `BlockStack.fingerprint`."""
        sizes = {"num_blocks": self.num_blocks, "vocabulary": self.vocabulary, "width": self.width}
        return fingerprint_of(self.module, self._embedding, **sizes)


def _kinds(family: str, config: Any) -> list[str]:
    """The kind of attention of each block, as the model itself decides it."""
    if family.startswith("Qwen"):
        return list(config.layer_types[: config.num_hidden_layers])
    slides = family.startswith("Mistral") and config.sliding_window is not None
    return [SLIDING if slides else FULL] * config.num_hidden_layers


def _parameters_of(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _named(names: frozenset[str], values: dict[str, Any]) -> dict[str, Any]:
    """Those of ``values`` that a function with such arguments takes, by the names that it has for them."""
    found = {}
    for name, value in values.items():
        known = next((alias for alias in ALIASES.get(name, (name,)) if alias in names), None)
        if known is not None:
            found[known] = value
    return found
