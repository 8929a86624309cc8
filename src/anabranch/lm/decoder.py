"""A decoder-only language model small enough to read: embedding, L blocks of attention and feed-forward, norm, head.

    x = x + attention(norm(x));  x = x + feed_forward(norm(x))          (pre-norm, RMSNorm)

The decoder knows its attention and feed-forward only by their configs, so every routed design trains, generates, saves and
records through this one file.
"""
# Shapes: B batch, L positions, D width, V vocabulary

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.bounds import MOST_LAYERS
from anabranch.config import Config as BaseConfig
from anabranch.config import Field, Part, Size, configclass
from anabranch.errors import ConfigError
from anabranch.lm.cache import KeyValueCache, Prefix, PrefixApart, attention_mask
from anabranch.lm.token_ids import check_batch
from anabranch.lm.virtual import entries_of
from anabranch.nn.attention import Attention, SelfAttention, distinct
from anabranch.nn.block import Block, PreNorm
from anabranch.nn.context import BuildContext, Count, ForwardContext, recomputed
from anabranch.nn.feed_forward import FeedForward, SwiGLU
from anabranch.nn.items import on_positions
from anabranch.nn.linear import (
    Linear,
    Projection,
    build_linear,
    call_linear,
    check_patterns,
    count_linear,
    takes_context,
)
from anabranch.nn.rotary import Rotary
from anabranch.nn.shared_prefix import SharedPrefix
from anabranch.nn.streams import Streams
from anabranch.nn.visits import Path, check_path, on_rows, steps_of
from anabranch.precision import autocast_dtype
from anabranch.routing import RoutingContext, Score, Select


@dataclass(frozen=True)
class DecoderOutput:
    """What a forward pass gives.

    Attributes:
        logits_BLV: fp32 or the autocast dtype; None when a target was given.
        loss: mean cross-entropy in nats over real targets plus all auxiliary losses; None without a target.
        cross_entropy: the first term alone, detached.
        auxiliary: each auxiliary loss, mean over layers, detached.
        terms: what ``loss`` is the sum of, ``cross_entropy`` first, each differentiable; none without a target.
        metrics: what layers emitted to be logged (drop_ratio), mean over layers; none where a cache is used.
    """

    logits_BLV: Tensor | None = None
    loss: Tensor | None = None
    cross_entropy: Tensor | None = None
    auxiliary: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, Tensor] = field(default_factory=dict)
    terms: dict[str, Tensor] = field(default_factory=dict)


class Decoder(Part, nn.Module):
    """The model. ``seed`` fixes the initial weights."""

    @configclass
    class Config(BaseConfig):
        """The model's shape.

        Attributes:
            vocab_size: V.
            dim: D.
            num_layers: blocks.
            block: what a layer is; pre-norm attention and feed-forward unless a design says otherwise.
            attention: attention of every block that is not in ``local_layers``.
            local_attention: attention of the blocks in ``local_layers``, which see less (a window); it keeps of a position what the
                other does.
            local_layers: indices of these blocks (gpt-oss: every second; Gemma 3: five of six).
            feed_forward: feed-forward of every block that is not in ``dense_layers``.
            dense_feed_forward: feed-forward of the blocks in ``dense_layers``.
            dense_layers: indices of blocks that stay dense (DeepSeekMoE keeps the first, Qwen2-MoE may alternate).
            linears: linear layers that are not plain, by patterns of their names (``blocks.*.attention.q``; * spans dots); the first that
                fits counts. Parts are q, k, v, o of attention, gate, up, down of feed-forward layers and of each expert (``experts.5.up``),
                and head.
            rotary: rotary positions.
            norm_eps: epsilon of all norms.
            norm_offset: added to the weights of all norms (Gemma: 1).
            embedding_scale: factor on the embedding where it goes in, not where it is the head (Gemma: sqrt(dim)).
            tie_embeddings: the head is the transposed embedding.
            max_positions: longest context the model is meant for.
            init_std: standard deviation of initial weights.
            depth_scaled_init: scale weights that write to the residual stream by 1 / sqrt(2 num_layers) (GPT-2).
            streams: run the blocks several times at once and merge what comes out (ParScale); None for the plain model.
        """

        vocab_size: Size = Field(default=257, ge=1)
        dim: Size = Field(default=128, ge=2)
        num_layers: int = Field(default=4, ge=1, le=MOST_LAYERS)
        block: Block.Config = PreNorm.Config()
        attention: Attention.Config = SelfAttention.Config()
        local_attention: Attention.Config | None = None
        local_layers: tuple[int, ...] = ()
        feed_forward: FeedForward.Config = SwiGLU.Config()
        dense_feed_forward: FeedForward.Config | None = None
        dense_layers: tuple[int, ...] = ()
        linears: dict[str, Linear.Config] = Field(default_factory=dict)
        rotary: Rotary.Config = Rotary.Config()
        norm_eps: float = Field(default=1e-5, gt=0)
        norm_offset: float = Field(default=0.0, ge=0, le=1)
        embedding_scale: float = Field(default=1.0, gt=0)
        tie_embeddings: bool = False
        max_positions: Size = Field(default=2048, ge=1)
        init_std: float = Field(default=0.02, gt=0)
        depth_scaled_init: bool = True
        streams: Streams.Config | None = None

        def __post_init__(self) -> None:
            for name in ("dense_layers", "local_layers"):
                outside = [layer for layer in getattr(self, name) if not 0 <= layer < self.num_layers]
                if outside:
                    raise ConfigError(f"{name} has {outside[0]}, but layers are 0 to {self.num_layers - 1}")
            if self.dense_layers and self.dense_feed_forward is None:
                raise ConfigError("dense_layers is set, but dense_feed_forward is not; say what those layers are")
            self._check_attention()
            # Counting checks designs against depth and width before anything is built.
            self.count()

        def _check_attention(self) -> None:
            self.rotary.width(self.attention.width(self.dim))
            if self.local_layers:
                if self.local_attention is None:
                    raise ConfigError("local_layers is set, but local_attention is not; say what those layers are")
                kept = [(part.kv_heads, *part.kept(self.dim)) for part in (self.attention, self.local_attention)]
                if kept[0] != kept[1]:
                    raise ConfigError(
                        f"local_attention keeps (heads, key width, value width) {kept[1]} of a position and attention {kept[0]}; "
                        "they must be the same"
                    )
            if self.streams is not None and not self.has_plain_attention:
                raise ConfigError(
                    "streams have keys and values in front, for attention without windows, sinks, a scale or a temperature"
                )

        @property
        def has_plain_attention(self) -> bool:
            """Whether attention of all layers is as `Attention.Config.is_plain` says."""
            return all(self.attention_of(layer).is_plain for layer in range(self.num_layers))

        def attention_of(self, layer: int) -> Attention.Config:
            """The attention config of one block."""
            local = self.local_attention
            return local if layer in self.local_layers and local is not None else self.attention

        def feed_forward_of(self, layer: int) -> FeedForward.Config:
            """The feed-forward config of one block."""
            dense = self.dense_feed_forward
            return dense if layer in self.dense_layers and dense is not None else self.feed_forward

        @property
        def stream_choices(self) -> tuple[int, ...]:
            """The numbers of streams that a forward pass can have, ascending."""
            return (1,) if self.streams is None else self.streams.choices

        def head(self, context: BuildContext) -> Projection:
            """The linear layer to the vocabulary, where the embedding is not it."""
            return replace(context, path="").projection("head", self.dim, self.vocab_size)

        def contexts(self, **values: Any) -> Iterator[BuildContext]:
            """One build context, moved from block to block; ``values`` are its other fields."""
            routed = [layer for layer in range(self.num_layers) if self.feed_forward_of(layer).is_routed]
            scale = 1 / math.sqrt(2 * self.num_layers) if self.depth_scaled_init else 1.0
            context = BuildContext(
                self.dim,
                self.num_layers,
                init_std=self.init_std,
                residual_std=self.init_std * scale,
                linears=self.linears,
                norm_eps=self.norm_eps,
                norm_offset=self.norm_offset,
                **values,
            )
            context.num_routed_layers = len(routed)
            for layer in range(self.num_layers):
                context.layer, context.path = layer, f"blocks.{layer}"
                context.attention = self.attention_of(layer)
                context.feed_forward = self.feed_forward_of(layer)
                context.routed_layer = bisect_left(routed, layer)
                yield context

        def count(self, sequence_length: int | None = None) -> Count:
            """Parameters, active parameters and forward FLOPs per token, without building anything.

            The embedding look-up costs no FLOPs and is not active; the head is both. Attention is counted over half of
            ``sequence_length`` (default max_positions), the mean causal context.
            """
            length = sequence_length or self.max_positions
            table = self.vocab_size * self.dim
            total = Count(table + self.dim, self.dim, 0)
            layers = Count()
            for context in self.contexts():
                layers += self.block.count(context, length)
            total += Count(0, table, 2 * table) if self.tie_embeddings else count_linear(self.head(context), context)
            if self.streams is not None:
                layers = self.streams.count(layers, self.dim, self.num_layers, self.attention)
            return total + layers

    def __init__(self, config: Config, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        # Activation recompute, block by block; the trainer sets it.
        self.recompute = False
        generator = torch.Generator().manual_seed(seed)
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.shared = nn.ModuleDict()
        self.blocks = nn.ModuleList()
        for context in config.contexts(seed=seed, generator=generator, shared=self.shared):
            self.blocks.append(config.block.build(context))
        self.norm = context.norm(config.dim)
        self.rotary: Rotary = config.rotary.build(config.attention.width(config.dim))
        nn.init.normal_(self.embedding.weight, std=config.init_std, generator=generator)
        self.head: Any = None
        if not config.tie_embeddings:
            self.head = build_linear(config.head(context), context)
        check_patterns(config.linears, context.projections)
        self.streams: Streams | None = None
        self.is_frozen = config.streams is not None and bool(config.streams.freezes_model)
        if config.streams is not None:
            if self.is_frozen:
                self.requires_grad_(False)
            self.streams = config.streams.build(context, config.attention)

    def forward(
        self,
        token_BL: Tensor,
        target_BL: Tensor | None = None,
        *,
        cache: KeyValueCache | None = None,
        token_mask_BL: Tensor | None = None,
        last_only: bool = False,
        state: dict[str, Any] | None = None,
        path: Path | None = None,
        num_streams: int | None = None,
    ) -> DecoderOutput:
        """Logits, or the training loss when ``target_BL`` is given (entries of -100 are ignored).

        Args:
            token_BL: int64 token ids.
            target_BL: int64 ids to predict at each position.
            cache: earlier positions; it is extended.
            token_mask_BL: bool, False for padding, which must stand on the left.
            last_only: logits of the last position alone.
            state: given to the forward context, for designs and recorders.
            path: the blocks to run, in order, e.g. ``(0, 1, 2, 2, 3)``: some may be left out, some run again; or a path for each
                sequence. None runs each block once.
            num_streams: P of this pass, of a model with streams; None for the number in use.

        Raises ConfigError for ids outside the vocabulary (of a batch on the CPU), a block that there is not, another number of paths than
        sequences, or a P that the model has no gate for.
        """
        check_batch(token_BL, self.config.vocab_size)
        context = self.context(
            token_BL, cache=cache, token_mask_BL=token_mask_BL, state=state, path=path, num_streams=num_streams
        )
        before = 0 if cache is None else cache.length
        try:
            x_BLD = self.hidden(token_BL, context)
            keep_L = torch.tensor([token_BL.shape[1] - 1], device=x_BLD.device) if last_only else None
            if last_only:
                x_BLD = x_BLD[:, -1:]
            if self.streams is not None:
                x_BLD = self.streams.merge(x_BLD, context)
            logits_BLV = self.logits(x_BLD, context, keep_L=keep_L)
        except BaseException:
            # The same pass may be tried again: positions that have no logits were not seen.
            if cache is not None:
                cache.begin(before)
            raise
        context.commit()
        return output_of(logits_BLV, target_BL, context)

    def context(
        self,
        token_BL: Tensor,
        *,
        cache: KeyValueCache | None = None,
        token_mask_BL: Tensor | None = None,
        state: dict[str, Any] | None = None,
        path: Path | None = None,
        num_streams: int | None = None,
    ) -> ForwardContext:
        """The forward context of a batch: positions, rotary angles, masks. P streams are P times as many sequences, see `Streams`."""
        num_streams, num_prefix = self.streams_of(num_streams)
        store = self._store(cache, num_streams, num_prefix)
        path = None if path is None else check_path(path, len(self.blocks), len(token_BL))
        if cache is not None:
            cache.begin()
        # Recording runs eagerly; compiled code would be compiled anew for every name.
        is_named = cache is not None and not torch.compiler.is_compiling()
        sequences = cache.sequences(len(token_BL)) if cache is not None and is_named else None
        if self.streams is not None:
            token_BL = self.streams.expand(token_BL, num_streams)
            token_mask_BL = None if token_mask_BL is None else self.streams.expand(token_mask_BL, num_streams)
        batch, length = token_BL.shape
        device = token_BL.device
        mask, is_causal = attention_mask(cache, token_mask_BL, length, device, num_prefix)
        position_BL = _positions(cache, token_mask_BL, batch, length, device, self.first_position)
        return ForwardContext(
            item_mask_N=None if token_mask_BL is None else token_mask_BL.reshape(-1),
            sequence_length=length,
            num_streams=num_streams,
            sequences=sequences,
            is_measured=cache is None,
            # Routers of a frozen model are not balanced either.
            training=self.training and not self.is_frozen,
            state={} if state is None else state,
            position_BL=position_BL,
            rotary=self.rotary(distinct(position_BL), self._dtype(device)),
            attention_mask=mask,
            is_causal=is_causal,
            cache=store,
            token_BL=token_BL,
            path=path,
            front_gates=None if self.streams is None else self.streams.front_gates,
        )

    def hidden(self, token_BL: Tensor, context: ForwardContext, *, keep_L: Tensor | None = None) -> Tensor:
        """x_BLD after the last norm, of all streams if there are several; of the positions ``keep_L`` alone where given."""
        x_BLD = self.embed(token_BL)
        if self.streams is not None:
            x_BLD = self.streams.expand(x_BLD, context.num_streams)
        if context.path is None:
            for block in self.blocks:
                x_BLD = self._run(block, x_BLD, context)
        else:
            for layer, rows in steps_of(context.path, context.num_streams, len(token_BL)):
                run = partial(self._run, self.blocks[layer])
                x_BLD = run(x_BLD, context) if rows is None else on_rows(run, x_BLD, context, rows)
        if isinstance(context.cache, KeyValueCache):
            context.cache.advance(token_BL.shape[1])
        return self.norm(x_BLD if keep_L is None else x_BLD[:, keep_L])

    def embed(self, token_BL: Tensor) -> Tensor:
        """x_BLD that goes into the first block."""
        x_BLD: Tensor = self.embedding(token_BL)
        scale = self.config.embedding_scale
        # In the type of the embedding, as models were trained.
        return x_BLD if scale == 1.0 else x_BLD * torch.tensor(scale, dtype=x_BLD.dtype, device=x_BLD.device)

    def _run(self, block: nn.Module, x_BLD: Tensor, context: ForwardContext) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return recomputed(block, x_BLD, context)
        return block(x_BLD, context)

    def logits(self, x_BLD: Tensor, context: ForwardContext | None = None, *, keep_L: Tensor | None = None) -> Tensor:
        """Scores over the vocabulary.

        Args:
            x_BLD: what `hidden` gave, of all streams merged.
            context: of the pass, which a head that routes needs; it is called with what that says of these rows.
            keep_L: the positions that ``x_BLD`` has, where not all of them.
        """
        if self.head is None:
            return F.linear(x_BLD, self.embedding.weight)
        if context is None or not takes_context(self.head):
            return call_linear(self.head, x_BLD, context)
        return on_positions(partial(call_linear, self.head), x_BLD, context, keep_L)

    @property
    def is_causal(self) -> bool:
        """Whether no output depends on later tokens; expert-choice routing makes it so."""
        return not self._not_causal()

    def check_causal(self) -> None:
        """Raises ConfigError, with the parts that look at later tokens, for a model that cannot generate."""
        if parts := self._not_causal():
            raise ConfigError(
                f"this model routes by looking at later tokens ({', '.join(parts)}), so it cannot generate"
            )

    def _not_causal(self) -> list[str]:
        """Kinds of the parts whose routing depends on later tokens."""
        parts = [module for module in self.modules() if isinstance(module, Score | Select) and not module.is_causal]
        return list(dict.fromkeys(str(getattr(part, "kind", type(part).__name__)) for part in parts))

    def new_cache(self, max_length: int, num_streams: int | None = None) -> KeyValueCache:
        """An empty cache for up to ``max_length`` positions, of passes with ``num_streams`` streams (None: those in use).

        Raises ConfigError if a token's routing depends on later ones, as cached decoding cannot know them, or for a P without a gate.
        """
        self.check_causal()
        num_streams, _ = self.streams_of(num_streams)
        if self.streams is None:
            return KeyValueCache(self.config.num_layers, max_length)
        with torch.no_grad():
            prefix = Prefix(self.prefixes(num_streams))
        return KeyValueCache(self.config.num_layers, max_length, num_streams=num_streams, prefix=prefix)

    @property
    def config_in_use(self) -> Any:
        """The config to save: ``config``, with the number of streams as it was chosen since."""
        return self.config if self.streams is None else self.config.replace(streams=self.streams.config_in_use)

    def streams_of(self, num_streams: int | None) -> tuple[int, int]:
        """(P, M) of a pass that asks for ``num_streams``. Raises ConfigError for a number that cannot be."""
        if self.streams is None:
            if num_streams not in (None, 1):
                raise ConfigError(f"num_streams is {num_streams}, but the model has no streams; leave it out")
            return 1, 0
        if num_streams is None:
            num_streams = self.streams.num_streams
        else:
            self.streams.check(num_streams)
            # Where compiled code sees several numbers they become symbols; it must know the number, as it decides which gate runs.
            num_streams = next(number for number in self.config.stream_choices if number == num_streams)
        return num_streams, self.streams.num_prefix_of(num_streams)

    def _store(self, cache: KeyValueCache | None, num_streams: int, num_prefix: int) -> KeyValueCache | Prefix | None:
        """What attention keeps keys and values in. Raises ConfigError for a cache of another number of streams."""
        wanted = (num_streams, num_prefix)
        if cache is not None:
            given = (cache.num_streams, cache.num_prefix)
            if given != wanted:
                raise ConfigError(
                    f"the cache is for {given[0]} streams with {given[1]} prefix entries, the model runs {wanted[0]} with "
                    f"{wanted[1]}; make a new one with model.new_cache"
                )
            return cache
        if not num_prefix:
            return None
        assert self.streams is not None
        made = Prefix if self.streams.front_gates is None else PrefixApart
        return made(self.prefixes(num_streams))

    @property
    def first_position(self) -> int:
        """Position of the first token of a sequence."""
        return 0 if self.streams is None else self.streams.first_position

    def prefixes(self, num_streams: int | None = None) -> list[SharedPrefix]:
        """(key_PHMD, value_PHMD) of each layer, in front of all sequences of so many streams (None: those in use); empty without."""
        if self.streams is None:
            return []
        prompt_MW = self.streams.prompt_MW
        return self.streams.prefixes(num_streams) if prompt_MW is None else entries_of(self, prompt_MW)

    def _dtype(self, device: torch.device) -> torch.dtype:
        return autocast_dtype(device.type) or self.embedding.weight.dtype


def output_of(logits_BLV: Tensor, target_BL: Tensor | None, context: RoutingContext) -> DecoderOutput:
    """What a forward pass gives: logits, or where there is a target its losses and those that layers emitted into ``context``."""
    if target_BL is None:
        return DecoderOutput(logits_BLV, metrics=context.mean_metrics())
    total = F.cross_entropy(logits_BLV.flatten(0, 1).float(), target_BL.flatten(), ignore_index=-100, reduction="sum")
    # Zero, not nan, where nothing is to be predicted.
    cross_entropy = total / (target_BL != -100).sum().clamp_min(1)
    auxiliary = context.mean_losses()
    return DecoderOutput(
        loss=sum(auxiliary.values(), start=cross_entropy),
        cross_entropy=cross_entropy.detach(),
        auxiliary={name: loss.detach() for name, loss in auxiliary.items()},
        metrics=context.mean_metrics(),
        terms={"cross_entropy": cross_entropy, **auxiliary},
    )


def _positions(
    cache: KeyValueCache | None, token_mask_BL: Tensor | None, batch: int, length: int, device: torch.device, first: int
) -> Tensor:
    """Position of each token among the real ones of its sequence, of which the first has ``first``."""
    valid_BL = cache.valid_BL if cache is not None else token_mask_BL
    if valid_BL is None:
        past = first + (cache.length if cache is not None else 0)
        return torch.arange(past, past + length, device=device).expand(batch, length)
    return (valid_BL.long().cumsum(1) - 1).clamp_min(0)[:, -length:] + first
