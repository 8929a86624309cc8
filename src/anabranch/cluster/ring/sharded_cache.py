"""A key-value cache of which each rank holds a share of the positions: for contexts that no rank has room for.

Keys stay where they are. New positions that are cut over the ranks attend by `placed_attention` (queries travel where they are few,
"pass-Q", Yang et al. 2024, arXiv 2411.01783); a few that every rank has whole, as in decoding, need not even travel: each rank makes a
partial result on its own share, and those go to everyone, N (N - 1) H (D + 1) numbers of float32 for a position however long the context.
"""
# Shapes: B sequences, H query heads, G key heads, L new rows, S rows of this rank, D head width

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from anabranch.cluster.ring.attention import RingOptions, placed_attention
from anabranch.cluster.ring.kernel import attend, fine_dtype, merge
from anabranch.cluster.ring.layout import Layout, Placement
from anabranch.cluster.ring.link import GroupLink, Traffic, drive, everyone
from anabranch.cluster.ring.pieces import Mask, pieces_between
from anabranch.cluster.ring.scored import options_of, with_sinks
from anabranch.cluster.ring.team import Group, process_group
from anabranch.errors import CapacityError, ConfigError, InputError
from anabranch.nn.scored import PLAIN, Scoring

__all__ = ["ShardedCache"]


@dataclass
class _Rows:
    """Keys and values of one visit of a layer, in buffers that grow by half."""

    key_BGSD: Tensor
    value_BGSD: Tensor
    length: int = 0

    def append(self, key_BGLD: Tensor, value_BGLD: Tensor) -> None:
        """Keep new rows behind the others."""
        end = self.length + key_BGLD.shape[2]
        room = self.key_BGSD.shape[2]
        if end > room:
            for name in ("key_BGSD", "value_BGSD"):
                old = getattr(self, name)
                new = old.new_empty(*old.shape[:2], max(end, room + room // 2), old.shape[3])
                new[:, :, : self.length] = old[:, :, : self.length]
                setattr(self, name, new)
        self.key_BGSD[:, :, self.length : end] = key_BGLD
        self.value_BGSD[:, :, self.length : end] = value_BGLD
        self.length = end

    @property
    def kept(self) -> tuple[Tensor, Tensor]:
        """All of them."""
        return self.key_BGSD[:, :, : self.length], self.value_BGSD[:, :, : self.length]


class ShardedCache:
    """What one rank holds; all ranks call its methods alike.

    Args:
        group: of the ranks.
        options: of attention.
        max_length: positions that all ranks together keep at most; None for as many as memory has room for.

    Attributes:
        length: positions that were run.
        placement: which rank has which of them.
    """

    keeps_visits = True
    takes_scoring = True

    def __init__(
        self, group: Group = None, options: RingOptions | None = None, *, max_length: int | None = None
    ) -> None:
        self.group = process_group(group)
        self.rank = 0 if self.group is None else dist.get_rank(self.group)
        self.world = 1 if self.group is None else dist.get_world_size(self.group)
        self.options = RingOptions() if options is None else options
        self.max_length = max_length
        self.length = 0
        self.placement = Placement((0,) * self.world, ((),) * self.world)
        self._slots: dict[tuple[int, int], _Rows] = {}
        self._new: Layout | None = None
        self._is_cut = False
        # Where all positions are when the pass is done.
        self._target = self.placement
        self._is_checked = False

    def begin(self, layout: Layout, *, is_cut: bool) -> None:
        """Say what is about to run: positions that are cut over the ranks as ``layout`` says, or are on all of them whole.

        Raises InputError for positions that do not follow those that are here, CapacityError for more than ``max_length``.
        """
        if layout.first != self.length:
            raise InputError(f"the new positions begin at {layout.first}, and the cache has {self.length}")
        end = self.length + layout.length
        if self.max_length is not None and end > self.max_length:
            raise CapacityError(f"the cache holds {self.max_length} positions, but {end} are needed")
        self._new, self._is_cut, self._target = layout, is_cut, self._after(layout, is_cut)
        self._is_checked = False

    def _after(self, layout: Layout, is_cut: bool) -> Placement:
        """Where all positions are, with new ones: those that are on all ranks are kept by the one that has fewest."""
        if is_cut:
            return self.placement.followed_by(layout.placement)
        rows = self.placement.rows
        keeper = rows.index(min(rows))
        mine = tuple(layout.rows * (rank == keeper) for rank in range(self.world))
        runs = tuple(layout.placement.runs[0] if count else () for count in mine)
        return self.placement.followed_by(Placement(mine, runs))

    def commit(self) -> None:
        """The pass is done: what was new is part of the cache."""
        assert self._new is not None, "a pass was begun"
        self.placement = self._target
        self.length += self._new.length
        self._new = None

    def forget(self) -> None:
        """The pass failed: what it stored is gone."""
        for slot in self._slots.values():
            slot.length = min(slot.length, self.placement.rows[self.rank])
        self._new = None

    def keep_rows(self, keep_B: Tensor) -> None:
        """Forget the sequences of the batch for which the bool ``keep_B`` is False."""
        for slot in self._slots.values():
            slot.key_BGSD, slot.value_BGSD = slot.key_BGSD[keep_B], slot.value_BGSD[keep_B]

    @property
    def size_bytes(self) -> int:
        """Of the keys and values that this rank holds."""
        return sum(part.nbytes for slot in self._slots.values() for part in slot.kept)

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
        """y_BHLD of the new rows, which see all before them; keys and values are kept.

        Raises ConfigError where values are not stored beside keys, or a pass was not begun.
        """
        if self._new is None:
            raise ConfigError("call begin before a pass")
        told = options_of(self.options, scoring)
        after = self._target
        slot = self._slots.get((layer, visit))
        if slot is None:
            empty = key_BGLD[:, :, :0]
            slot = self._slots[layer, visit] = _Rows(empty, value_BGLD[:, :, :0])
        if slot.length != self.placement.rows[self.rank]:
            raise ConfigError(
                f"layer {layer} was passed over before (visit {visit}), which a cache over ranks does not keep"
            )
        if after.rows[self.rank] > slot.length:
            slot.append(key_BGLD, value_BGLD)
        if self._is_cut:
            # What differs between ranks does so in the first layer.
            told = replace(told, check=told.check and not self._is_checked)
            self._is_checked = True
            query, key, value = (part.transpose(1, 2) for part in (query_BHLD, *slot.kept))
            out, lse = placed_attention(
                query, key, value, self._new.placement, after, self.group, return_lse=True, **vars(told)
            )
            return with_sinks(out, lse, scoring).transpose(1, 2)
        out_BHLD, lse_BHL = self._partials(query_BHLD, slot, after, told)
        out = with_sinks(out_BHLD.transpose(1, 2), lse_BHL.transpose(1, 2), scoring)
        return out.transpose(1, 2).to(query_BHLD.dtype)

    def _partials(self, query_BHLD: Tensor, slot: _Rows, after: Placement, told: RingOptions) -> tuple[Tensor, Tensor]:
        """(out_BHLD, lse_BHL) of rows that all ranks have, from each rank's partial result."""
        assert self._new is not None
        fine = fine_dtype(query_BHLD.dtype)
        out = torch.zeros(query_BHLD.shape, dtype=fine, device=query_BHLD.device)
        lse = torch.full(query_BHLD.shape[:3], -torch.inf, dtype=fine, device=query_BHLD.device)
        pieces = pieces_between(self._new.placement.runs[0], after.runs[self.rank], Mask(True, told.window))
        scale = query_BHLD.shape[3] ** -0.5 if told.softmax_scale is None else told.softmax_scale
        with torch.autocast(query_BHLD.device.type, enabled=False):
            attend(query_BHLD, *slot.kept, pieces, out, lse, scale=scale)
        if self.group is None:
            return out, lse
        link = GroupLink(self.group, traffic=told.traffic, timeout_s=told.timeout_s)
        parts: Any = drive(everyone(link, "home", [lse, out]), told.traffic or Traffic())
        # In the order of ranks, on all of them: so they go on with equal bits.
        whole, total = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
        for part_lse, part in parts:
            merge(whole, total, part, part_lse)
        return whole, total
