"""Keys and values of many sequences in blocks of one pool, and the view of it through which one step's layers attend."""
# Shapes: P streams, T tokens of a step, H query heads, G key-value heads, D head width, M prefix entries, N sequences, S slots or positions

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.errors import CapacityError, ConfigError, InputError
from anabranch.lm.decoder import Decoder
from anabranch.nn.kernels import paged as native
from anabranch.nn.kernels.operands import takes
from anabranch.nn.scored import PLAIN, Scoring, scored_attention
from anabranch.nn.shared_prefix import gated_sum, side_by_side
from anabranch.serving.engine.layout import StepLayout
from anabranch.serving.engine.steady_attention import steady_attention

Pairs = Sequence[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class PagedShape:
    """What one model keeps per position: ``heads`` keys and values of ``width`` numbers in each of ``layers``, for each of ``streams``.

    Values are of ``value_width`` where that is another number: none where keys hold them too.
    Streams are as many as a request may have: one with fewer leaves the rest of its blocks alone. Layers are as many as a request may
    visit, see `VisitSlots`.
    """

    layers: int
    heads: int
    width: int
    streams: int = 1
    dtype: torch.dtype = torch.float32
    value_width: int | None = None

    @classmethod
    def of(cls, model: Decoder, max_depth: int | None = None) -> Self:
        """That of a decoder, in the type of its weights, for paths of at most ``max_depth`` blocks, and for each block once."""
        attention = model.config.attention
        width, value_width = attention.kept(model.config.dim)
        return cls(
            layers=max(model.config.num_layers, max_depth or 0),
            heads=attention.kv_heads,
            width=width,
            value_width=None if value_width == width else value_width,
            streams=max(model.config.stream_choices),
            dtype=model.embedding.weight.dtype,
        )

    @property
    def widths(self) -> tuple[int, int]:
        """(of a key, of a value)."""
        return self.width, self.width if self.value_width is None else self.value_width

    @property
    def bytes_per_token(self) -> int:
        """Memory of one position."""
        return self.layers * self.streams * self.heads * sum(self.widths) * self.dtype.itemsize

    def blocks_in(self, size_bytes: int, block_tokens: int) -> int:
        """How many blocks fit. Raises CapacityError if not even one does."""
        count = size_bytes // (self.bytes_per_token * block_tokens)
        if count < 1:
            raise CapacityError(
                f"{size_bytes} bytes hold no block of the key-value cache; one of {block_tokens} tokens takes "
                f"{self.bytes_per_token * block_tokens} bytes"
            )
        return count


class PagedPool:
    """The memory: ``key`` and ``value``, each ``[layers, P, S, G, D]``; slot s lies in block s // block_tokens.

    Args:
        shape: what is kept.
        num_blocks: size.
        block_tokens: tokens per block.
        device: where.
        host_blocks: blocks of main memory to swap to.
        buffers: (key, value) made elsewhere, such as in shared memory, instead of new ones.
    """

    def __init__(
        self,
        shape: PagedShape,
        num_blocks: int,
        *,
        block_tokens: int = 16,
        device: torch.device | str = "cpu",
        host_blocks: int = 0,
        buffers: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.shape, self.num_blocks, self.block_tokens = shape, num_blocks, block_tokens
        front = (shape.layers, shape.streams, num_blocks * block_tokens, shape.heads)
        sizes = [(*front, width) for width in shape.widths]
        if buffers is None:
            buffers = self._empty(sizes[0], device), self._empty(sizes[1], device)
        for part, size in zip(buffers, sizes, strict=True):
            if tuple(part.shape) != size or part.dtype != shape.dtype:
                raise InputError(f"buffers must be of {shape.dtype} and shape {list(size)}")
        self.key, self.value = buffers
        self._host: tuple[Tensor, Tensor] | None = None
        self.host_blocks = host_blocks

    def _empty(self, sizes: tuple[int, ...], device: torch.device | str) -> Tensor:
        try:
            return torch.empty(sizes, dtype=self.shape.dtype, device=device)
        except RuntimeError as error:
            raise CapacityError(
                f"no memory for a key-value cache of {self.num_blocks} blocks, {2 * self.size_bytes // 2**20} MiB; use fewer"
            ) from error

    @property
    def device(self) -> torch.device:
        """Where the memory is."""
        return self.key.device

    @property
    def size_bytes(self) -> int:
        """Memory of all blocks."""
        return self.num_blocks * self.block_tokens * self.shape.bytes_per_token

    def copy(self, pairs: Pairs) -> None:
        """Copy blocks (from, to), all at once: what one pair writes no other reads."""
        if pairs:
            self._move(self._blocks(), self._blocks(), pairs)

    def swap_out(self, pairs: Pairs) -> None:
        """Save blocks: (block, host slot)."""
        if pairs:
            self._move(self._blocks(), self._host_blocks(), pairs)

    def swap_in(self, pairs: Pairs) -> None:
        """Bring blocks back: (host slot, block)."""
        if pairs:
            self._move(self._host_blocks(), self._blocks(), pairs)

    def _blocks(self) -> list[Tensor]:
        return [part.unflatten(2, (-1, self.block_tokens)) for part in (self.key, self.value)]

    def _host_blocks(self) -> list[Tensor]:
        if self._host is None:
            if not self.host_blocks:
                raise InputError("the pool has no host blocks to swap to; set host_blocks")
            sizes = (self.shape.layers, self.shape.streams, self.host_blocks, self.block_tokens, self.shape.heads)
            pinned = self.device.type == "cuda"
            made = [
                torch.empty(*sizes, width, dtype=self.shape.dtype, pin_memory=pinned) for width in self.shape.widths
            ]
            self._host = made[0], made[1]
        return list(self._host)

    @staticmethod
    def _move(source: list[Tensor], target: list[Tensor], pairs: Pairs) -> None:
        index = torch.tensor(pairs, dtype=torch.int64)
        for one, other in zip(source, target, strict=True):
            moved = one.index_select(2, index[:, 0].to(one.device))
            other.index_copy_(2, index[:, 1].to(other.device), moved.to(other.device))


class VisitSlots:
    """Which of a pool's layers keeps which visit of a block, in passes over one path.

    The first visit of a block is where its layer is, whatever the path, so requests of different paths may go through it together. Further
    visits are behind all layers, and then where those are that the path leaves out. Visits that the path does not tell of, as of a block
    whose attention runs twice, come behind them.

    Args:
        depth: layers of the pool.
        layers: whose keys and values it keeps, in order; at most as many.
        path: blocks, in order; None for each layer once.
        is_open: the path is not known yet, and ascends: a layer that was passed over makes room.
    """

    def __init__(
        self, depth: int, layers: Sequence[int], path: Sequence[int] | None = None, *, is_open: bool = False
    ) -> None:
        self.depth = depth
        self._place = {layer: place for place, layer in enumerate(layers)}
        self._is_open = is_open
        self._slots: dict[tuple[int, int], int] = {}
        self._taken: set[int] = set()
        told = () if is_open else layers if path is None else path
        left_out = set(self._place).difference(told)
        self._left_out = [place for layer, place in self._place.items() if layer in left_out]
        seen: Counter[int] = Counter()
        for layer in told:
            self.of(layer, seen[layer])
            seen[layer] += 1

    @property
    def per_pass(self) -> Counter[int]:
        """How often each block has been visited in a pass, as far as passes have shown it."""
        return Counter(layer for layer, _ in self._slots)

    def of(self, layer: int, visit: int) -> int:
        """The pool's layer of the ``visit``-th visit. Raises CapacityError for one more than there are."""
        slot = self._slots.get((layer, visit))
        if slot is None:
            slot = self._slots[layer, visit] = self._new(layer, visit)
            self._taken.add(slot)
        return slot

    def _new(self, layer: int, visit: int) -> int:
        own = self._place[layer]
        if not visit and own not in self._taken:
            return own
        left_out = self._left_out
        if self._is_open:
            left_out = [
                place for other, place in self._place.items() if other < layer and (other, 0) not in self._slots
            ]
        for slot in (*range(len(self._place), self.depth), *left_out):
            if slot not in self._taken:
                return slot
        raise CapacityError(
            f"the engine keeps keys and values of {self.depth} visits of blocks, and layer {layer} is visited once more; set "
            "engine.max_depth"
        )


class ToldSlot:
    """Where the visit that runs next is kept, in place of `VisitSlots`: requests that run a block together may come by different ways."""

    def __init__(self) -> None:
        self._slot: int | None = None

    def tell(self, slot: int) -> None:
        """The pool's layer of the visit that comes."""
        self._slot = slot

    def of(self, layer: int, visit: int) -> int:
        """The same, once. Raises ConfigError where a block asks twice, whose attention runs more than once."""
        slot, self._slot = self._slot, None
        if slot is None:
            raise ConfigError(f"attention of layer {layer} runs more than once, so its block cannot run by itself")
        return slot


class PagedStore:
    """One step's view of a pool: the `anabranch.nn.context.AttendingStore` of its forward pass, by requests of one path.

    Args:
        pool: the memory.
        layout: where the step's rows stand.
        prefix: (key_PGMD, value_PGMD) of each layer, in front of every sequence; empty without.
        visits: where each visit of a block is kept; None for each block once, in order.
        use_kernel: False for plain torch even where the compiled kernel could do it.
        is_steady: a row's result does not depend on what else is in the step, to the bit. The compiled kernel's never does.
    """

    keeps_visits = True
    takes_scoring = True
    takes_gates = True

    def __init__(
        self,
        pool: PagedPool,
        layout: StepLayout,
        prefix: Sequence[tuple[Tensor, Tensor]] = (),
        *,
        visits: VisitSlots | ToldSlot | None = None,
        use_kernel: bool = True,
        is_steady: bool = False,
    ) -> None:
        self.pool, self.layout, self.prefix, self.is_steady = pool, layout, prefix, is_steady
        self._visits = VisitSlots(pool.shape.layers, range(pool.shape.layers)) if visits is None else visits
        self.use_kernel = use_kernel and native.can(pool.key)

    def attend(
        self,
        layer: int,
        query_BHLD: Tensor,
        key_BGLD: Tensor,
        value_BGLD: Tensor,
        *,
        visit: int = 0,
        scoring: Scoring = PLAIN,
        gate_BL: Tensor | None = None,
    ) -> Tensor:
        """y_BHLD; B is the streams P of the pass, L its rows T. ``gate_BL`` is what a row multiplies the prefix by; None for 1."""
        prefix = self.prefix[layer] if self.prefix else None
        streams, slot = len(query_BHLD), self._visits.of(layer, visit)
        key_PSGD, value_PSGD = self.pool.key[slot, :streams], self.pool.value[slot, :streams]
        is_plain = scoring is PLAIN and gate_BL is None
        if self.use_kernel and is_plain and takes(query_BHLD, key_BGLD, value_BGLD, *(prefix or ())):
            layout = self.layout
            return native.attend(
                query_BHLD,
                key_BGLD,
                value_BGLD,
                key_PSGD,
                value_PSGD,
                layout.sequence_N4,
                layout.table_U,
                block_tokens=self.pool.block_tokens,
                prefix=prefix,
            )
        for stored_PSGD, new_BGLD in ((key_PSGD, key_BGLD), (value_PSGD, value_BGLD)):
            stored_PSGD.index_copy_(1, self.layout.slot_T, new_BGLD.transpose(1, 2))
        if scoring is not PLAIN or self.is_steady:
            return self._one_by_one(query_BHLD, key_PSGD, value_PSGD, scoring, prefix, gate_BL)
        return self._gathered(query_BHLD, key_PSGD, value_PSGD, prefix, gate_BL)

    def _one_by_one(
        self,
        query_PHTD: Tensor,
        key_PSGD: Tensor,
        value_PSGD: Tensor,
        scoring: Scoring,
        prefix: tuple[Tensor, Tensor] | None,
        gate_PT: Tensor | None,
    ) -> Tensor:
        """y_PHTV, sequence by sequence; of one with a window only what its rows see is gathered."""
        made = []
        for number, span in enumerate(self.layout.spans):
            seen, position_S = self._within(number, scoring.window)
            slot_S = torch.from_numpy(self.layout.slots(number)[-seen:]).to(self.pool.device)
            key, value = (part_PSGD[:, slot_S].transpose(1, 2) for part_PSGD in (key_PSGD, value_PSGD))
            rows = slice(span.first, span.first + span.count)
            query = query_PHTD[:, :, rows]
            if gate_PT is not None and prefix is not None:
                wide, gate = side_by_side(query, key, value, prefix, gate_PT[:, rows]), gate_PT[:, rows]
                past = span.past + prefix[0].shape[2]
                made.append(gated_sum(steady_attention(*wide, PLAIN, past), gate))
            elif self.is_steady:
                made.append(steady_attention(query, key, value, scoring, span.past, prefix, position_S=position_S))
            else:
                made.append(scored_attention(query, key, value, scoring, position_S=position_S))
        return torch.cat(made, dim=2)

    def _within(self, number: int, window: int | None) -> tuple[int, Tensor | None]:
        """(how many of what is stored last the rows of a sequence see, their positions); None for these where they follow each other."""
        span = self.layout.spans[number]
        if window is None:
            return span.length, None
        positions = self.layout.positions(number)
        if positions is None:
            return min(span.length, span.count - 1 + window), None
        first = int(np.searchsorted(positions, positions[span.past] - window, "right"))
        return span.length - first, torch.from_numpy(positions[first:]).to(self.pool.device)

    def _gathered(
        self,
        query_PHTD: Tensor,
        key_PSGD: Tensor,
        value_PSGD: Tensor,
        prefix: tuple[Tensor, Tensor] | None,
        gate_PT: Tensor | None,
    ) -> Tensor:
        y_PHTD = torch.empty_like(query_PHTD)
        streams, num_heads, num_kv_heads = len(query_PHTD), query_PHTD.shape[1], key_PSGD.shape[2]
        for group in self.layout.groups:
            size, count = group.row_NL.shape
            query = query_PHTD[:, :, group.row_NL.reshape(-1)].unflatten(2, (size, count))  # [P, H, N, L, D]
            key, value = (_gather(part_PSGD, group.slot_NS) for part_PSGD in (key_PSGD, value_PSGD))  # [P, N, G, S, D]
            mask = group.sees_NLS[:, None]
            gate: Tensor | None = None
            query = query.transpose(1, 2).flatten(0, 1)
            if prefix is not None:
                mask = F.pad(mask, (prefix[0].shape[2], 0), value=True)
            if prefix is not None and gate_PT is None:
                key, value = (_behind(front, part) for front, part in zip(prefix, (key, value), strict=True))
            key, value = key.flatten(0, 1), value.flatten(0, 1)
            if prefix is not None and gate_PT is not None:
                gate = gate_PT[:, group.row_NL.reshape(-1)].view(-1, count)
                query, key, value = side_by_side(query, key, value, prefix, gate)
            y = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask.repeat(streams, 1, 1, 1),
                enable_gqa=num_heads != num_kv_heads,
            )  # [P N, H, L, D]
            y = y if gate is None else gated_sum(y, gate)
            y = y.unflatten(0, (-1, size)).transpose(1, 2).flatten(2, 3)
            y_PHTD[:, :, group.row_NL.reshape(-1)] = y
        return y_PHTD


class StoreByKind:
    """`PagedStore` for a model whose layers see back differently far: each kind of them with a pool of its own.

    Args:
        stores: one per kind.
        kind_of: of each layer, the place of its store.
    """

    keeps_visits = True
    takes_scoring = True
    takes_gates = True

    def __init__(self, stores: Sequence[Any], kind_of: Mapping[int, int]) -> None:
        self.stores, self._kind_of = stores, kind_of

    def attend(
        self,
        layer: int,
        *parts: Tensor,
        visit: int = 0,
        scoring: Scoring = PLAIN,
        gate_BL: Tensor | None = None,
    ) -> Tensor:
        """See `PagedStore.attend`."""
        store = self.stores[self._kind_of[layer]]
        # Not every store takes gates.
        gate: dict[str, Any] = {} if gate_BL is None else {"gate_BL": gate_BL}
        found: Tensor = store.attend(layer, *parts, visit=visit, scoring=scoring, **gate)
        return found


def _gather(part_PSGD: Tensor, slot_NS: Tensor) -> Tensor:
    return part_PSGD[:, slot_NS].transpose(2, 3)


def _behind(front_PGMD: Tensor, part: Tensor) -> Tensor:
    """``part`` [P, N, G, S, D] with the stream's entries in front."""
    front = front_PGMD.to(part).unsqueeze(1).expand(-1, part.shape[1], -1, -1, -1)
    return torch.cat((front, part), dim=3)
