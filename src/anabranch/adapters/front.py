"""`Front`: virtual tokens that stand in front of every sequence and take the first positions.

    embeddings   prompt tuning (Lester et al. 2021, arXiv 2104.08691): learned vectors in place of embeddings; what each layer makes of them
                 no token changes, as they stand in front, so they are met as keys and values
    keys         prefix tuning (Li and Liang 2021, arXiv 2101.00190): learned keys, not rotated, and values of each layer

Keys and values may stand behind a gate of each layer, as in UniPELT (Mao et al. 2021, arXiv 2110.07577): a token whose attention gets x
multiplies them by sigmoid(v . x + c), which starts as 1/2.

Keys and values may be of some layers alone; the others meet nothing in front.

They are the one stream of a decoder, see `anabranch.nn.streams`: a cache holds them once for all sequences.
"""
# Shapes: M virtual tokens, W numbers of each, P = 1 stream, H key-value heads, D head width, N layers

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.adapters.names import names_of
from anabranch.adapters.numbers import frozen_as
from anabranch.adapters.peft_folder import CONFIG, Adapter
from anabranch.adapters.peft_tables import PrefixTable, VirtualTable, table_of
from anabranch.bounds import Size
from anabranch.config import Field, configclass
from anabranch.errors import CheckpointError, ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.nn import BuildContext, Count, SelfAttention
from anabranch.nn.streams import Streams
from anabranch.routing import RoutingContext

__all__ = ["Front", "check_gates", "front_of"]


def check_gates(attention: Any) -> None:
    """Raise ConfigError for an attention, of this config, that knows no gates of virtual tokens."""
    if attention.owner is not SelfAttention:
        raise ConfigError(
            f"attention of kind {attention.owner.kind!r} knows no gates of virtual tokens; leave the gates out, or the virtual tokens"
        )


class Front(Streams, kind="front"):
    """One stream, behind virtual tokens."""

    @configclass
    class Config(Streams.Config):
        """What they are.

        Attributes:
            num_tokens: M.
            of: what is learned of them: their ``embeddings``, or their ``keys`` and values in each layer.
            gated: whether keys and values have gates.
            layers: which have keys and values, ascending; None for all.
        """

        num_tokens: Size = Field(default=8, ge=1)
        of: Literal["embeddings", "keys"] = "embeddings"
        gated: bool = False
        layers: tuple[int, ...] | None = Field(default=None, min_length=1)

        def __post_init__(self) -> None:
            if self.num_streams != 1:
                raise ConfigError(f"num_streams is {self.num_streams}; behind virtual tokens there is one stream")
            if self.gated and self.of != "keys":
                raise ConfigError(f"gated is for keys and values, and of is {self.of!r}; use of='keys'")
            if self.layers is None:
                return
            if self.gated or self.of != "keys":
                raise ConfigError("layers is for keys and values without gates; leave it out")
            if list(self.layers) != sorted({layer for layer in self.layers if layer >= 0}):
                raise ConfigError(f"layers is {list(self.layers)}; they must be ascending numbers from 0")

        @property
        def choices(self) -> tuple[int, ...]:
            """One."""
            return (1,)

        def width(self, dim: int, num_layers: int, attention: Any) -> int:
            """W."""
            if self.of == "embeddings":
                return dim
            return len(self.layers_of(num_layers)) * 2 * attention.kv_heads * attention.width(dim)

        def layers_of(self, num_layers: int) -> tuple[int, ...]:
            """Those that meet virtual tokens, of a model of so many. Raises ConfigError for one that it has not."""
            if self.layers is None:
                return tuple(range(num_layers))
            if self.layers[-1] >= num_layers:
                raise ConfigError(f"layers has {self.layers[-1]}, and the model has 0 to {num_layers - 1}")
            return self.layers

        def count(self, layers: Count, dim: int, num_layers: int, attention: Any) -> Count:
            """M W numbers, and D + 1 of each gate; each query meets M more keys in each layer."""
            made = self.num_tokens * self.width(dim, num_layers, attention) + self.gated * num_layers * (dim + 1)
            met = 4 * attention.num_heads * attention.width(dim) * self.num_tokens * len(self.layers_of(num_layers))
            return layers + Count(made, made, met)

    def __init__(self, config: Config, context: BuildContext, attention: Any) -> None:
        super().__init__()
        self.config = config
        self.num_layers, self.places = context.num_layers, config.layers_of(context.num_layers)
        self.heads = (len(self.places), 2, attention.kv_heads, attention.width(context.dim))
        width = config.width(context.dim, context.num_layers, attention)
        self.weight = nn.Parameter(torch.empty(config.num_tokens, width))
        if not self.weight.is_meta:
            nn.init.normal_(self.weight, std=context.init_std, generator=context.generator)
        if config.gated:
            check_gates(attention)
            self.gate_ND = nn.Parameter(torch.zeros(context.num_layers, context.dim))
            self.gate_bias_N = nn.Parameter(torch.zeros(context.num_layers))

    @property
    def num_streams(self) -> int:
        """One."""
        return 1

    def check(self, num_streams: int) -> None:
        """Raise ConfigError for any number but one."""
        if num_streams != 1:
            raise ConfigError(f"num_streams is {num_streams}; behind virtual tokens there is one stream")

    def num_prefix_of(self, num_streams: int) -> int:
        """M."""
        return self.config.num_tokens

    @property
    def first_position(self) -> int:
        """M."""
        return self.config.num_tokens

    @property
    def front_gates(self) -> Callable[[int, Tensor], Tensor] | None:
        """As configured."""
        return self._gate if self.config.gated else None

    def _gate(self, layer: int, x_BLD: Tensor) -> Tensor:
        """gate_BL, in the type of the gates."""
        own = slice(layer, layer + 1)
        gate_BL1 = F.linear(x_BLD.to(self.gate_ND.dtype), self.gate_ND[own], self.gate_bias_N[own])
        return gate_BL1.sigmoid().squeeze(-1)

    @property
    def prompt_MW(self) -> Tensor | None:
        """The embeddings, where it is these that are learned."""
        return self.weight if self.config.of == "embeddings" else None

    def prefixes(self, num_streams: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """(key_PHMD, value_PHMD) of each layer, where it is these that are learned."""
        weight_N2HMD = self.weight.unflatten(1, self.heads).permute(1, 2, 3, 0, 4)
        nothing = self.weight.new_zeros(1, self.heads[2], 0, self.heads[3])
        found = {place: (key[None], value[None]) for place, (key, value) in zip(self.places, weight_N2HMD, strict=True)}
        return [found.get(layer, (nothing, nothing)) for layer in range(self.num_layers)]

    def merge(self, x_BLW: Tensor, context: RoutingContext) -> Tensor:
        """The one stream."""
        return x_BLW

    def put(self, weight_MW: Tensor, device: torch.device | None = None, *, trainable: bool = False) -> None:
        """Take over the virtual tokens of an adapter. Gates are those that training starts from."""
        self.weight = frozen_as(weight_MW, device, trainable=trainable)
        if self.config.gated:
            for name in ("gate_ND", "gate_bias_N"):
                shape = getattr(self, name).shape
                setattr(self, name, frozen_as(torch.zeros(shape), device, trainable=trainable))

    def described(self, config: Decoder.Config) -> dict[str, Any]:
        """What the config of an adapter of peft's says of them. Raises ConfigError for gates, and for those of some layers alone."""
        if self.config.gated:
            raise ConfigError("no adapter of peft's has gates of virtual tokens")
        if self.config.layers is not None:
            raise ConfigError("no adapter of peft's has virtual tokens of some layers alone")
        layers, _, heads, width = self.heads
        of_keys = self.config.of == "keys"
        return {
            "peft_type": "PREFIX_TUNING" if of_keys else "PROMPT_TUNING",
            "num_virtual_tokens": self.config.num_tokens,
            "num_layers": layers,
            "token_dim": heads * width if of_keys else config.dim,
            "num_attention_heads": heads if of_keys else getattr(config.attention, "num_heads", heads),
            "num_transformer_submodules": 1,
        }

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"tokens={self.config.num_tokens}, of={self.config.of}{', gated' * self.config.gated}"


def front_of(adapter: Adapter, config: Decoder.Config, folder: Path, family: str | None) -> Decoder.Config:
    """The config of a model with the virtual tokens of ``adapter`` in front.

    Raises:
        CheckpointError: no family of Hugging Face's, or not the one asked for, has such a model; the tokens are of a model of another
            width or depth. It begins with ``folder``.
        ConfigError: the model's attention cannot meet keys that are no tokens'.
    """
    assert adapter.prompt_MW is not None
    table: VirtualTable = table_of(adapter.table, folder / CONFIG)
    names_of(config, (), family)
    of_keys = isinstance(table, PrefixTable)
    if config.embedding_scale != 1 and not of_keys:
        raise ConfigError(
            f"the model multiplies embeddings by {config.embedding_scale:g}, and whether virtual tokens too depends on who trained them; "
            "they cannot be put in front of it"
        )
    front = Front.Config(num_tokens=table.num_tokens, of="keys" if of_keys else "embeddings")
    wanted, given = front.width(config.dim, config.num_layers, config.attention), adapter.prompt_MW.shape[1]
    heads = config.attention.kv_heads * config.attention.width(config.dim)
    said = {
        "token_dim": heads if of_keys else config.dim,
        "num_layers": config.num_layers,
        **({"num_attention_heads": config.attention.kv_heads} if of_keys else {}),
    }
    for name, own in said.items():
        if table.said(name) not in (None, own):
            raise CheckpointError(
                f"{folder} has virtual tokens of a model whose {name} is {table.said(name)}, and this one's is {own}; is it an adapter of "
                "another model?"
            )
    if given != wanted:
        raise CheckpointError(
            f"{folder} has {given} numbers for each virtual token, and this model wants {wanted}; is it an adapter of another model?"
        )
    try:
        return config.replace(streams=front)
    except ConfigError as error:
        raise ConfigError(f"{folder} has virtual tokens, which this model cannot have in front: {error}") from None
