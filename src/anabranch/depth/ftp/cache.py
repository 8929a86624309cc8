"""Key-value caches that differ from block to block, since each block kept other tokens: every entry knows its position.

A `BlockCache` is what one block holds; `Attending` is one call of the block's attention over it: new tokens are stored, see what lies at or
before them, and their attention is measured if somebody asks.
"""
# Shapes: B sequences, K new tokens, S entries, H query heads, G key heads, D head width

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from anabranch.depth.ftp.attention_scores import column_means
from anabranch.depth.gathered import Looks, Weigh, visible
from anabranch.depth.seen import seen_pairs

__all__ = ["Attending", "BlockCache", "SkipCache"]

# Entries beside those that are there, so that decoding does not copy at each token.
_ROOM = 64


@dataclass
class _Entries:
    """What a block holds after an append.

    Attributes:
        key_BGSD, value_BGSD: of the entries.
        position_BS: int64, their places in their sequences.
        real_BS: False at entries that only fill a row up; None where there are none.
    """

    key_BGSD: Tensor
    value_BGSD: Tensor
    position_BS: Tensor
    real_BS: Tensor | None


class BlockCache:
    """Keys and values of the tokens that one block has computed, each with its position."""

    def __init__(self) -> None:
        self.length = 0
        self._held: _Entries | None = None

    def append(
        self, key_BGKD: Tensor, value_BGKD: Tensor, position_BK: Tensor, real_BK: Tensor | None = None
    ) -> _Entries:
        """Store new tokens and give all that are held. ``real_BK`` is False at what only fills a row up; None for nothing."""
        batch, _, count, _ = key_BGKD.shape
        new = _Entries(key_BGKD, value_BGKD, position_BK.expand(batch, count), real_BK)
        if self._held is None:
            # Keys and values may be views of a projection, whose queries nobody needs any more.
            self._held = _Entries(key_BGKD.contiguous(), value_BGKD.contiguous(), new.position_BS, real_BK)
            self.length = count
            return new
        if torch.is_grad_enabled():
            # What was computed with is not written into.
            self._held = self._joined(self._entries(), new)
        else:
            self._write(new)
        self.length += count
        return self._entries()

    def _entries(self) -> _Entries:
        held, end = self._held, self.length
        assert held is not None, "something has been stored"
        real_BS = None if held.real_BS is None else held.real_BS[:, :end]
        return _Entries(held.key_BGSD[:, :, :end], held.value_BGSD[:, :, :end], held.position_BS[:, :end], real_BS)

    @staticmethod
    def _joined(old: _Entries, new: _Entries) -> _Entries:
        real_BS = None
        if old.real_BS is not None or new.real_BS is not None:
            parts = [
                torch.ones_like(one.position_BS, dtype=torch.bool) if one.real_BS is None else one.real_BS
                for one in (old, new)
            ]
            real_BS = torch.cat(parts, dim=1)
        return _Entries(
            torch.cat((old.key_BGSD, new.key_BGSD), dim=2),
            torch.cat((old.value_BGSD, new.value_BGSD), dim=2),
            torch.cat((old.position_BS, new.position_BS), dim=1),
            real_BS,
        )

    def _write(self, new: _Entries) -> None:
        """Behind what is held; into new memory, with room for more, where there is none left."""
        held = self._held
        assert held is not None, "something has been stored"
        end = self.length + new.key_BGSD.shape[2]
        if held.real_BS is None and new.real_BS is not None:
            held.real_BS = torch.ones_like(held.position_BS, dtype=torch.bool)
        if end > held.key_BGSD.shape[2]:
            held = self._held = self._grown(held, end + max(_ROOM, end // 8))
        place = slice(self.length, end)
        held.key_BGSD[:, :, place] = new.key_BGSD
        held.value_BGSD[:, :, place] = new.value_BGSD
        held.position_BS[:, place] = new.position_BS
        if held.real_BS is not None:
            held.real_BS[:, place] = True if new.real_BS is None else new.real_BS

    def _grown(self, held: _Entries, places: int) -> _Entries:
        def grown(tensor: Tensor, dim: int) -> Tensor:
            shape = list(tensor.shape)
            shape[dim] = places
            made = tensor.new_zeros(shape)
            made.narrow(dim, 0, self.length).copy_(tensor.narrow(dim, 0, self.length))
            return made

        real_BS = None if held.real_BS is None else grown(held.real_BS, 1)
        return _Entries(grown(held.key_BGSD, 2), grown(held.value_BGSD, 2), grown(held.position_BS, 1), real_BS)

    @property
    def size_bytes(self) -> int:
        """Memory of the entries and the room beside them."""
        if self._held is None:
            return 0
        held = self._held
        return sum(one.nbytes for one in (held.key_BGSD, held.value_BGSD, held.position_BS))


@dataclass
class SkipCache:
    """What a pruned prefill left behind, to decode on.

    Attributes:
        blocks: of each block what it holds.
        next_B: int64, the position of each sequence's next token.
    """

    blocks: list[BlockCache]
    next_B: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))

    @property
    def lengths(self) -> list[int]:
        """Entries of each block."""
        return [block.length for block in self.blocks]

    @property
    def size_bytes(self) -> int:
        """Memory of all blocks."""
        return sum(block.size_bytes for block in self.blocks)


class Attending:
    """One call of a block's attention, see `anabranch.depth.gathered.Attend`.

    Args:
        cache: of the block.
        position_BK: int64, of the new tokens, rising in each row.
        real_BK: False at what only fills a row up; None for nothing.
        wants_scores: measure how much attention each new token gets.
        queries_BK, keys_BK: which new tokens count in scores, as queries and as keys; None for those that are real.
        own_only: of scores, see `column_means`.
        allowed: changes who sees whom, given the mask ``[B, K, S]``; None for as it is.

    After the call:
        pairs: pairs of a query and a key that it sees.
        score_BK: if wanted, in float32.
    """

    def __init__(
        self,
        cache: BlockCache,
        position_BK: Tensor,
        real_BK: Tensor | None = None,
        *,
        wants_scores: bool = False,
        queries_BK: Tensor | None = None,
        keys_BK: Tensor | None = None,
        own_only: bool = False,
        allowed: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.pairs = 0
        self.score_BK: Tensor | None = None
        self._cache, self._position_BK, self._real_BK = cache, position_BK, real_BK
        self._wants_scores, self._own_only, self._allowed = wants_scores, own_only, allowed
        self._queries_BK, self._keys_BK = queries_BK, keys_BK

    def __call__(self, query_BHKD: Tensor, key_BGKD: Tensor, value_BGKD: Tensor, weigh: Weigh, looks: Looks) -> Tensor:
        """y_BHKD."""
        is_first = self._cache.length == 0
        seen = self._cache.append(key_BGKD, value_BGKD, self._position_BK, self._real_BK)
        batch, count = len(query_BHKD), query_BHKD.shape[2]
        mask_BKS = None
        if self._allowed is not None or not self._sees_all(seen, count, is_first, looks.window):
            mask_BKS = visible(self._position_BK, seen.position_BS, seen.real_BS, looks.window)
            if self._allowed is not None:
                mask_BKS = self._allowed(mask_BKS)
            if self._real_BK is not None:
                mask_BKS = _with_itself(mask_BKS, self._real_BK)
        self._count(mask_BKS, batch, count, seen.key_BGSD.shape[2], looks.window)
        y_BHKD = weigh(query_BHKD, seen.key_BGSD, seen.value_BGSD, mask_BKS)
        if self._wants_scores:
            score_BS = column_means(
                query_BHKD.detach(),
                seen.key_BGSD.detach(),
                looks,
                query_position_BQ=self._position_BK.expand(batch, count),
                key_position_BS=seen.position_BS,
                query_real_BQ=self._real_BK if self._queries_BK is None else self._queries_BK,
                key_real_BS=seen.real_BS if self._keys_BK is None else self._keys_BK,
                own_only=self._own_only,
            )
            self.score_BK = score_BS[:, -count:]
        return y_BHKD

    def _sees_all(self, seen: _Entries, count: int, is_first: bool, window: int | None) -> bool:
        """Whether no mask is needed: the first tokens of a block, or a single one behind all that it holds."""
        if seen.real_BS is not None:
            return False
        if window is not None and bool((seen.position_BS.amax() - seen.position_BS.amin()) >= window):
            # The block's own window is by places, which are positions only where nothing was skipped.
            return is_first and bool((seen.position_BS.diff(dim=1) == 1).all())
        return is_first or (count == 1 and bool((seen.position_BS <= self._position_BK).all()))

    def _count(self, mask_BKS: Tensor | None, batch: int, count: int, entries: int, window: int | None) -> None:
        if mask_BKS is None:
            self.pairs = batch * seen_pairs(count, entries, window)
        else:
            counted_BKS = mask_BKS if self._real_BK is None else mask_BKS & self._real_BK.unsqueeze(2)
            self.pairs = int(counted_BKS.sum())


def _with_itself(mask_BKS: Tensor, real_BK: Tensor) -> Tensor:
    """What only fills a row up would see nothing, and softmax would give NaN: let it see what was stored with it."""
    own_BKS = torch.zeros_like(mask_BKS)
    own_BKS[:, :, -real_BK.shape[1] :] = torch.diag_embed(~real_BK)
    return mask_BKS | own_BKS
