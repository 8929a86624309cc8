"""Decoders whose sequences are cut over ranks: `ContextParallel` for models of ours and of transformers.

    model = ContextParallel(decoder)                 # every rank has all weights, and its share of every sequence
    loss = model(token_BL, target_BL).loss           # each rank is given the whole batch
    loss.backward()
    average_gradients(model)                         # or DistributedDataParallel(model), which does the same

Nothing but attention looks at other positions, so nothing but attention is replaced: in a decoder of ours by what its forward context has
in the place of a cache, in a model of transformers by an attention function of theirs. The loss averaged over ranks, and the gradients so
averaged, are those of one process. What layers add to the loss by themselves (balance of experts) is of a rank's own tokens, as in
data parallel training.
"""
# Shapes: B sequences, S positions of all, L of a rank, V vocabulary, H query heads, G key heads, D head width

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method

from anabranch.cluster.gradients import average_gradients as mean_over_ranks
from anabranch.cluster.ring.attention import placed_attention
from anabranch.cluster.ring.layout import KINDS, Layout
from anabranch.cluster.ring.options import RingOptions, read_options
from anabranch.cluster.ring.scored import options_of, with_sinks
from anabranch.cluster.ring.sharded_cache import ShardedCache
from anabranch.cluster.ring.team import Group, process_group
from anabranch.errors import ConfigError, InputError
from anabranch.nn.scored import PLAIN, Scoring

__all__ = ["ContextOutput", "ContextParallel", "RingStore", "average_gradients"]

# By what name a model whose weights are in shards has what is called in place of its forward.
_ON_SHARE = "_anabranch_on_share"


@dataclass(frozen=True)
class ContextOutput:
    """What a forward pass gives, as `anabranch.lm.DecoderOutput`.

    Attributes:
        logits_BLV: of the whole sequence, on every rank and without a gradient; None when a target was given.
        loss: of which the mean over ranks is the loss; None without a target.
        cross_entropy: mean over the targets of all ranks, detached.
        auxiliary: what layers added, of this rank, detached.
        metrics: what layers emitted to be logged, of this rank.
        terms: what ``loss`` is the sum of, each differentiable.
    """

    logits_BLV: Tensor | None = None
    loss: Tensor | None = None
    cross_entropy: Tensor | None = None
    auxiliary: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, Tensor] = field(default_factory=dict)
    terms: dict[str, Tensor] = field(default_factory=dict)


class RingStore:
    """What stands in a forward context in the place of a cache (`anabranch.nn.context.AttendingStore`): attention over ranks.

    Args:
        layout: of the sequence.
        group: of the ranks.
        options: of attention.
    """

    keeps_visits = True
    takes_scoring = True

    def __init__(self, layout: Layout, group: Group, options: RingOptions) -> None:
        self.layout, self.group, self.options = layout, group, options
        self._is_checked = False

    def attend(
        self,
        layer: int,
        query_BHLD: Tensor,
        key_BGLD: Tensor,
        value_BGLD: Tensor,
        *,
        visit: int = 0,
        scoring: Scoring = PLAIN,
    ) -> Tensor:
        """y_BHLD. Raises ConfigError where values are not stored beside keys."""
        told = options_of(self.options, scoring)
        # What differs between ranks does so in the first layer.
        told = replace(told, check=told.check and not self._is_checked)
        self._is_checked = True
        query, key, value = (part.transpose(1, 2) for part in (query_BHLD, key_BGLD, value_BGLD))
        placement = self.layout.placement
        out_BLHD, lse_BLH = placed_attention(
            query, key, value, placement, placement, self.group, return_lse=True, **vars(told)
        )
        return with_sinks(out_BLHD, lse_BLH, scoring).transpose(1, 2)


class ContextParallel(nn.Module):
    """A decoder that is called with whole sequences on every rank, and works on this rank's share of them.

    Args:
        model: a `Decoder` of ours without streams, or a causal language model of transformers, which is changed: its attention is ours from
            then on. All ranks must have equal weights.
        group: of processes, or a mesh of one dimension; None for all processes.
        layout: see `anabranch.cluster.ring.layout`; ``zigzag`` balances causal work.
        chunk: tokens that are run at a time over a cache, which bounds what a long prompt takes beside it; None for all of them.
        options: see `RingOptions`, apart from the mask, which is the model's.

    Raises ConfigError for a model that looks at other positions elsewhere than in attention.
    """

    def __init__(
        self, model: nn.Module, group: Group = None, *, layout: str = "zigzag", chunk: int | None = None, **options: Any
    ) -> None:
        super().__init__()
        if chunk is not None and chunk < 1:
            raise InputError(f"chunk is {chunk}; use at least 1")
        self.chunk = chunk
        if layout not in KINDS:
            raise InputError(f"layout is {layout!r}; use {', '.join(KINDS)}")
        self.model = model
        self.layout_kind: Any = layout
        self.group = process_group(group)
        self.options, problem = read_options(options)
        if problem is not None:
            raise InputError(problem)
        self.rank = 0 if self.group is None else dist.get_rank(self.group)
        self.world = 1 if self.group is None else dist.get_world_size(self.group)
        if hasattr(model, "set_attn_implementation"):
            from anabranch.cluster.ring.transformers import TransformersForm

            self._form: Any = TransformersForm(model)
        else:
            self._form = _DecoderForm(model)

    def gather_by_fsdp(self) -> None:
        """Say that the model's weights are in shards (FSDP2): they are gathered where it is called, which is not by its own ``forward``."""
        setattr(self.model, _ON_SHARE, partial(_on_share, self.model))
        register_fsdp_forward_method(self.model, _ON_SHARE)

    def forward(
        self,
        token_BS: Tensor,
        target_BS: Tensor | None = None,
        *,
        cache: ShardedCache | None = None,
        token_mask_BL: Tensor | None = None,
        last_only: bool = False,
        state: dict[str, Any] | None = None,
    ) -> ContextOutput:
        """Logits, or the loss where there are targets. Called as a `Decoder` is, so `anabranch.lm.generate` samples from it.

        Args:
            token_BS: int64, the same on all ranks; any length.
            target_BS: int64 ids to predict at each position, -100 for none.
            cache: of `new_cache`; it is extended, and logits are those of the last position, see `extend`.
            token_mask_BL: bool, of which nothing may be False: padding in front of sequences is not cut over ranks.
            last_only: logits of the last position alone, of a pass with a cache.
            state: given to the forward context of a decoder of ours.

        Raises InputError for tensors of other shapes, ConfigError for padding.
        """
        if token_mask_BL is not None and not bool(token_mask_BL.all()):
            raise ConfigError(
                "prompts of different lengths are padded, which is not cut over ranks; run them one by one"
            )
        if cache is not None:
            if not last_only:
                raise ConfigError(
                    "a pass with a cache that is cut over ranks gives the last position's logits; set last_only"
                )
            return ContextOutput(self._extend_by(token_BS, cache, self.chunk)[:, None])
        if token_BS.dim() != 2 or (target_BS is not None and target_BS.shape != token_BS.shape):
            beside = "" if target_BS is None else f" and targets {list(target_BS.shape)}"
            raise InputError(f"tokens are {list(token_BS.shape)}{beside}; they must be [B, S], both the same")
        layout = Layout(self.layout_kind, self.world, token_BS.shape[1])
        store = RingStore(layout, self.group, self.options)
        logits_BLV, auxiliary, metrics = self._form.run(
            self._own(layout, token_BS), self._ids(layout, token_BS), layout, self.rank, store, state
        )
        if target_BS is None:
            return ContextOutput(self._whole(layout, logits_BLV), metrics=metrics)
        target_BL = layout.shard(target_BS, self.rank, value=-100)
        total = F.cross_entropy(
            logits_BLV.flatten(0, 1).float(), target_BL.flatten(), ignore_index=-100, reduction="sum"
        )
        count = (target_BS != -100).sum().clamp_min(1)
        # The mean over ranks is what is wanted; each has a part of the sum.
        share = total * (self.world / count)
        mean = total.detach() / count
        if self.group is not None:
            dist.all_reduce(mean, group=self.group)
        return ContextOutput(
            loss=sum(auxiliary.values(), start=share),
            cross_entropy=mean,
            auxiliary={name: loss.detach() for name, loss in auxiliary.items()},
            metrics=metrics,
            terms={"cross_entropy": share, **auxiliary},
        )

    @torch.no_grad()
    def token_nats(self, token_BS: Tensor, target_BS: Tensor) -> Tensor:
        """float32 ``[B, S]``: the cross-entropy of each target, on every rank. No rank has logits of more than its share."""
        layout = Layout(self.layout_kind, self.world, token_BS.shape[1])
        store = RingStore(layout, self.group, self.options)
        logits_BLV, _, _ = self._form.run(
            self._own(layout, token_BS), self._ids(layout, token_BS), layout, self.rank, store, None
        )
        target_BL = layout.shard(target_BS, self.rank)
        nats_N = F.cross_entropy(logits_BLV.flatten(0, 1).float(), target_BL.flatten(), reduction="none")
        return self._whole(layout, nats_N.view_as(target_BL))

    @property
    def embedding(self) -> Any:
        """The decoder's."""
        return self.model.embedding

    @property
    def config(self) -> Any:
        """The model's."""
        return self.model.config

    def new_cache(self, max_length: int | None = None) -> ShardedCache:
        """An empty cache of which each rank holds a share, for up to ``max_length`` positions of all ranks (None: as memory has)."""
        return ShardedCache(self.group, self.options, max_length=max_length)

    @torch.no_grad()
    def extend(self, token_BS: Tensor, cache: ShardedCache) -> Tensor:
        """Run new tokens behind what the cache has, and keep their keys and values; logits of the last one, ``[B, V]``, on every rank.

        Many tokens are cut over the ranks, and queries go to keys or the other way round, whichever is quicker (``auto``). A few, less than
        two for each rank, are run by every rank whole, each on its share of the cache, and one keeps what is new. Decoders of ours only.
        """
        if not isinstance(self._form, _DecoderForm):
            raise ConfigError(
                "a cache that is cut over ranks is of decoders of ours; use the model's own generation on one rank"
            )
        if token_BS.shape[1] == 0:
            raise InputError("there are no tokens; give at least 1")
        is_cut = token_BS.shape[1] >= 2 * self.world and self.world > 1
        layout = Layout(
            self.layout_kind if is_cut else "contiguous",
            self.world if is_cut else 1,
            token_BS.shape[1],
            first=cache.length,
        )
        rank = self.rank if is_cut else 0
        # Of a long prompt the logits of all positions would be larger than the cache.
        keeper, row = _place_of_last(layout)
        keep_L = torch.tensor([row if rank == keeper else 0], device=token_BS.device)
        position_L = layout.position_ids(rank).to(token_BS.device)
        cache.begin(layout, is_cut=is_cut)
        try:
            logits_B1V, _, _ = self._form.run(
                layout.shard(token_BS, rank), position_L, layout, rank, cache, None, keep_L=keep_L
            )
        except BaseException:
            cache.forget()
            raise
        cache.commit()
        logits_BV = logits_B1V[:, 0].contiguous()
        if is_cut:
            assert self.group is not None, "there are several ranks"
            dist.broadcast(logits_BV, dist.get_global_rank(self.group, keeper), group=self.group)
        return logits_BV

    def _extend_by(self, token_BS: Tensor, cache: ShardedCache, chunk: int | None) -> Tensor:
        """`extend`, so many tokens at a time."""
        *before, last = token_BS.split(chunk or max(1, token_BS.shape[1]), 1)
        for part_BS in before:
            self.extend(part_BS, cache)
        return self.extend(last, cache)

    def agreed(self, token_B: Tensor) -> Tensor:
        """The tokens that the first rank has chosen: ranks on machines of several makes may round to others."""
        if self.group is not None:
            dist.broadcast(token_B, dist.get_global_rank(self.group, 0), group=self.group)
        return token_B

    @torch.no_grad()
    def generate(self, token_BS: Tensor, max_new_tokens: int, *, chunk: int | None = None) -> Tensor:
        """The likeliest next tokens one after another, ``[B, max_new_tokens]``, equal on all ranks.

        ``chunk``: tokens of the prompt that are run at a time; None for all of them.
        """
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}; use at least 1")
        cache = self.new_cache()
        made = [self.agreed(self._extend_by(token_BS, cache, chunk or self.chunk).argmax(-1))]
        while len(made) < max_new_tokens:
            made.append(self.agreed(self.extend(made[-1][:, None], cache).argmax(-1)))
        return torch.stack(made, 1)

    def _own(self, layout: Layout, token_BS: Tensor) -> Tensor:
        return layout.shard(token_BS, self.rank)

    def _ids(self, layout: Layout, token_BS: Tensor) -> Tensor:
        return layout.position_ids(self.rank).to(token_BS.device)

    def _whole(self, layout: Layout, part: Tensor) -> Tensor:
        """The rows of all ranks, without a gradient."""
        if self.group is None:
            return layout.unshard([part.detach()])
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self.world)]
        dist.all_gather(parts, part.detach().contiguous(), group=self.group)
        return layout.unshard(parts)


class _DecoderForm:
    """How a decoder of ours is run on a share of a sequence."""

    def __init__(self, model: Any) -> None:
        missing = [name for name in ("context", "hidden", "logits", "rotary") if not hasattr(model, name)]
        if missing:
            raise ConfigError(
                f"{type(model).__name__} is neither a decoder of ours nor a model of transformers (it has no {missing[0]!r})"
            )
        if model.streams is not None:
            raise ConfigError(
                "parallel streams have keys and values in front of every sequence, which are not cut over ranks"
            )
        if not model.is_causal:
            raise ConfigError(
                "this model routes by looking at other tokens of a sequence, which are on other ranks; use context=1"
            )
        self.model = model

    def run(
        self,
        token_BL: Tensor,
        position_L: Tensor,
        layout: Layout,
        rank: int,
        store: Any,
        state: dict[str, Any] | None,
        *,
        keep_L: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """(logits_BLV, losses of layers, metrics); logits of the rows ``keep_L`` alone where given."""
        run = getattr(self.model, _ON_SHARE, None) or partial(_on_share, self.model)
        found: tuple[Tensor, dict[str, Tensor], dict[str, Tensor]] = run(
            token_BL, position_L, layout, rank, store, state, keep_L
        )
        return found


def _on_share(
    model: Any,
    token_BL: Tensor,
    position_L: Tensor,
    layout: Layout,
    rank: int,
    store: Any,
    state: dict[str, Any] | None,
    keep_L: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """See `_DecoderForm.run`."""
    context = model.context(token_BL, state=state)
    context.position_BL = position_L.expand(len(token_BL), -1)
    context.rotary = model.rotary(position_L[None], context.rotary[0].dtype)
    context.cache = store
    real_L = layout.is_real(rank).to(token_BL.device)
    if not real_L.all():
        # Padding is routed nowhere and counts for nothing.
        context.item_mask_N = real_L.expand(len(token_BL), -1).reshape(-1)
    x_BLD = model.hidden(token_BL, context, keep_L=keep_L)
    logits_BLV = model.logits(x_BLD, context, keep_L=keep_L)
    context.commit()
    return logits_BLV, context.mean_losses(), context.mean_metrics()


def _place_of_last(layout: Layout) -> tuple[int, int]:
    """(rank, row) of the last position."""
    for rank in range(layout.world):
        found = (layout.places(rank) == layout.length - 1).nonzero()
        if len(found):
            return rank, int(found[0])
    raise AssertionError("a layout has all positions")


def average_gradients(model: nn.Module, group: Group = None) -> None:
    """Replace the gradients of all parameters by their mean over ranks; a parameter that has none on some ranks counts as 0 there,
    and one that has none on any keeps none.

    ``group`` None means that of a `ContextParallel`, or all processes.
    """
    found = process_group(group if group is not None else getattr(model, "group", None))
    if found is None:
        return
    mean_over_ranks(list(model.parameters()), found)
