"""The key-value cache of a decoder: one buffer per visit of a layer, filled from the left."""
# Shapes: B batch, L positions, H key-value heads, D head width, P streams, M prefix entries

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.errors import CapacityError, ConfigError, InputError
from anabranch.nn.shared_prefix import SharedPrefix, copied, with_prefix
from anabranch.nn.visits import whole_sequences

# Places beside a window, so that what is in it is moved once in so many tokens.
ROOM = 64


class Prefix:
    """Keys and values that stand in front of every sequence: (key_PHMD, value_PHMD) of each layer, one for each of P streams.

    All layers have as many, or none. It is the store of a forward pass without a cache, and copies itself in front of every row. A
    `KeyValueCache` holds it once for all rows; neither counts it as positions.
    """

    def __init__(self, layers: Sequence[SharedPrefix]) -> None:
        self.layers = layers

    def __len__(self) -> int:
        """M, 0 where there is none."""
        return max((key_PHMD.shape[2] for key_PHMD, _ in self.layers), default=0)

    def append(
        self, layer: int, key_BHLD: Tensor, value_BHLD: Tensor, *, visit: int = 0, rows: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor, None]:
        """The prefix of ``layer``, then what is given; B is P times the sequences."""
        key_PHMD, value_PHMD = self.layers[layer]
        if rows is not None:
            _check_streams(rows, len(key_PHMD))
        return with_prefix(key_BHLD, key_PHMD), with_prefix(value_BHLD, value_PHMD), None

    def rows(self, layer: int, like_BHLD: Tensor) -> tuple[Tensor, Tensor]:
        """(key_BHMD, value_BHMD): the prefix of each row of a stream-major batch, in the dtype of what it goes with."""
        key_PHMD, value_PHMD = (part_PHMD.to(like_BHLD) for part_PHMD in self.layers[layer])
        return copied(key_PHMD, len(like_BHLD)), copied(value_PHMD, len(like_BHLD))

    def of(self, layer: int, rows: Sequence[int] | None, batch: int) -> SharedPrefix:
        """What stands in front of the ``rows`` of a stream-major batch of ``batch`` rows (None: all)."""
        key_PHMD, value_PHMD = self.layers[layer]
        if rows is None:
            return key_PHMD, value_PHMD
        stream_R = torch.tensor(rows, device=key_PHMD.device) // (batch // len(key_PHMD))
        return key_PHMD[stream_R], value_PHMD[stream_R]

    @property
    def size_bytes(self) -> int:
        """Memory of all layers."""
        return sum(part_PHMD.nbytes for layer in self.layers for part_PHMD in layer)


def _check_streams(rows: Sequence[int], num_streams: int) -> None:
    """Raise ConfigError unless each sequence comes with all its streams, one stream after another."""
    if whole_sequences(rows, num_streams) is None:
        raise ConfigError(
            "the streams of a sequence go through the blocks together, since each has a prefix of its own"
        )


class PrefixApart(Prefix):
    """The same, met apart from each sequence's own keys and values: where queries have gates for it. Of one stream."""

    def append(
        self, layer: int, key_BHLD: Tensor, value_BHLD: Tensor, *, visit: int = 0, rows: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor, None]:
        """What is given."""
        return key_BHLD, value_BHLD, None

    def front(self, layer: int, rows: Sequence[int] | None = None) -> SharedPrefix:
        """What stands in front of all rows."""
        return self.layers[layer]


@dataclass
class _Slot:
    """What one visit of a layer left behind.

    Attributes:
        key_BHSD: of S places.
        value_BHSD: likewise.
        length: places from the left that were filled or passed over.
        filled_BS: bool, where sequences or positions were passed over; None as long as none was.
        window: of attention, None for none.
        first: the position of the first place, not 0 where attention has a window.
    """

    key_BHSD: Tensor
    value_BHSD: Tensor
    length: int
    filled_BS: Tensor | None = None
    window: int | None = None
    first: int = 0

    def make_room(self, start: int, count: int) -> None:
        """Forget what a window at ``start`` does not see, if there is no room for ``count`` positions, or room for a prompt before."""
        if self.window is None:
            return
        places, wanted = self.key_BHSD.shape[2], self.window + ROOM
        if start + count - self.first <= places <= max(wanted, count):
            return
        kept = min(start - self.first, self.window - 1)
        begin, places = start - kept - self.first, max(wanted, kept + count)
        kept_places = slice(begin, min(begin + kept, self.length))
        self.length = max(kept_places.stop - begin, 0)
        for name in ("key_BHSD", "value_BHSD"):
            part_BHSD = getattr(self, name)
            moved = part_BHSD.new_empty(*part_BHSD.shape[:2], places, part_BHSD.shape[3])
            moved[:, :, : self.length] = part_BHSD[:, :, kept_places]
            setattr(self, name, moved)
        if self.filled_BS is not None:
            filled_BS = self.filled_BS.new_zeros(self.filled_BS.shape[0], places)
            filled_BS[:, : self.length] = self.filled_BS[:, kept_places]
            self.filled_BS = filled_BS
        self.first = start - kept

    def widen(self, places: int) -> None:
        """Have room for so many places, at least as many as there are."""
        for name in ("key_BHSD", "value_BHSD"):
            part_BHSD = getattr(self, name)
            wider = part_BHSD.new_empty(*part_BHSD.shape[:2], places, part_BHSD.shape[3])
            wider[:, :, : self.length] = part_BHSD[:, :, : self.length]
            setattr(self, name, wider)
        if self.filled_BS is not None:
            self.filled_BS = F.pad(self.filled_BS, (0, places - self.filled_BS.shape[1]))

    def has_before(self, position: int) -> bool:
        """Whether what ``position`` sees is still there."""
        return self.window is None or self.first <= max(0, position - self.window + 1)


class KeyValueCache:
    """Keys and values of up to ``max_length`` positions of a batch, apart for each visit of a layer (see `anabranch.nn.visits`).

    Layers ``append`` during a forward pass; the decoder calls ``advance`` after it. Buffers are made at the first append, in the
    dtype and on the device of what is stored; of attention with a window only what the next position sees is kept, and room for the
    next ones. ``valid_BL`` marks real positions when prompts were padded. With ``num_streams`` P it
    holds P rows per sequence, stream-major. The ``prefix`` in front of them is held once for each stream, however many rows there are.
    """

    def __init__(self, num_layers: int, max_length: int, *, num_streams: int = 1, prefix: Prefix | None = None) -> None:
        self.max_length = max_length
        self.num_streams = num_streams
        self.prefix = prefix
        self.length = 0
        self.valid_BL: Tensor | None = None
        # What a design carries from call to call, by a name of its own. What has a method `keep_rows` is told which
        # rows stay.
        self.state: dict[str, object] = {}
        self._sequences: list[object] = []
        self.num_layers = num_layers
        self._slots: dict[tuple[int, int], _Slot] = {}

    def append(
        self,
        layer: int,
        key_BHLD: Tensor,
        value_BHLD: Tensor,
        *,
        visit: int = 0,
        rows: Sequence[int] | None = None,
        window: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store new positions of one visit of ``layer``, by the ``rows`` of the cache (None: all); see `KeyValueStore`.

        Raises CapacityError if they exceed ``max_length``, InputError if a layer that the cache has none of, or some rows of a batch
        that it has not seen whole.
        """
        start, end = self.length, self.length + key_BHLD.shape[2]
        if end > self.max_length:
            raise CapacityError(f"the cache holds {self.max_length} positions, but {end} are needed")
        if not 0 <= layer < self.num_layers:
            raise InputError(f"layer is {layer}; the cache is of a model of {self.num_layers} layers")
        slot = self._slots.get((layer, visit))
        if slot is None:
            slot = self._slots[layer, visit] = self._new_slot(key_BHLD, value_BHLD, rows, window)
        slot.make_room(start, end - start)
        start, end = start - slot.first, end - slot.first
        if rows is None and slot.filled_BS is None and slot.length >= start:
            slot.key_BHSD[:, :, start:end] = key_BHLD
            slot.value_BHSD[:, :, start:end] = value_BHLD
            slot.length = end
            return slot.key_BHSD[:, :, :end], slot.value_BHSD[:, :, :end], None
        return self._fill_some(slot, key_BHLD, value_BHLD, rows, start, end)

    def came_by(self, layer: int, length: int, *, visit: int = 0, rows: Sequence[int] | None = None) -> Tensor | None:
        """What `append` of ``length`` positions by ``rows`` (None: all) will say of who came by, for attention that has its mask before it.

        A bool mask ``[R, L_all]``, False where a position did not come by this visit of ``layer``; None if all did. Of attention without a
        window.
        """
        slot, start = self._slots.get((layer, visit)), self.length
        if slot is None or slot.filled_BS is None:
            reached = 0 if slot is None else min(slot.length, start)
            if reached == start:
                return None
            count = self._num_rows() if rows is None else len(rows)
            came_RS = torch.ones(count, start + length, dtype=torch.bool)
            came_RS[:, reached:start] = False
            return came_RS
        filled_RS = (
            slot.filled_BS[:, : start + length] if rows is None else slot.filled_BS[list(rows), : start + length]
        )
        came_RS = filled_RS.clone()
        came_RS[:, min(slot.length, start) : start] = False
        came_RS[:, start:] = True
        return None if bool(came_RS.all()) else came_RS

    def front(self, layer: int, rows: Sequence[int] | None = None) -> SharedPrefix | None:
        """What stands in front of all rows, or of some, see `KeyValueStore`; None where there is nothing."""
        if self.prefix is None or not self.num_prefix:
            return None
        return self.prefix.of(layer, rows, self._num_rows())

    def _new_slot(self, key_BHLD: Tensor, value_BHLD: Tensor, rows: Sequence[int] | None, window: int | None) -> _Slot:
        batch = key_BHLD.shape[0]
        if rows is not None:
            batch = self._num_rows()
            if not batch:
                raise InputError("some sequences come to a block before the cache knows how many there are")
        places = self.max_length if window is None else min(self.max_length, window + ROOM)
        key_BHSD, value_BHSD = (
            new.new_empty(batch, new.shape[1], places, new.shape[3]) for new in (key_BHLD, value_BHLD)
        )
        return _Slot(key_BHSD, value_BHSD, 0, window=window if places < self.max_length else None)

    @staticmethod
    def _fill_some(
        slot: _Slot, key_BHLD: Tensor, value_BHLD: Tensor, rows: Sequence[int] | None, start: int, end: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`append` where positions or sequences were passed over, or are now."""
        if slot.filled_BS is None:
            slot.filled_BS = torch.zeros(
                slot.key_BHSD.shape[0], slot.key_BHSD.shape[2], dtype=torch.bool, device=slot.key_BHSD.device
            )
            slot.filled_BS[:, : slot.length] = True
        # Nobody looks at places that were passed over, but what lies there takes part in sums, times zero: it must be finite.
        if slot.length < end:
            slot.key_BHSD[:, :, slot.length : end] = 0
            slot.value_BHSD[:, :, slot.length : end] = 0
            slot.length = end
        row_R = slice(None) if rows is None else torch.as_tensor(rows, device=slot.key_BHSD.device)
        slot.key_BHSD[row_R, :, start:end] = key_BHLD.to(slot.key_BHSD.dtype)
        slot.value_BHSD[row_R, :, start:end] = value_BHLD.to(slot.value_BHSD.dtype)
        slot.filled_BS[row_R, start:end] = True
        return slot.key_BHSD[row_R, :, :end], slot.value_BHSD[row_R, :, :end], slot.filled_BS[row_R, :end]

    @property
    def num_prefix(self) -> int:
        """Entries in front of every row, which are no positions."""
        return 0 if self.prefix is None else len(self.prefix)

    def begin(self, length: int | None = None) -> None:
        """Forget what a forward pass that failed has left behind the first ``length`` positions (None: those that were counted).

        Raises InputError for more positions than were counted, of which there is nothing to keep.
        """
        if length is not None and not 0 <= length <= self.length:
            raise InputError(
                f"length is {length}; the cache has {self.length} positions, so it must be 0 to {self.length}"
            )
        if length and not all(slot.has_before(length) for slot in self._slots.values()):
            raise InputError(f"length is {length}; layers with a window have forgotten what was seen there")
        self.length = self.length if length is None else length
        if self.length == 0:
            # Another batch may come.
            self._slots, self._sequences, self.valid_BL = {}, [], None
            return
        for slot in self._slots.values():
            end = max(self.length - slot.first, 0)
            if slot.length > end:
                slot.length = end
                if slot.filled_BS is not None:
                    slot.filled_BS[:, end:] = False
        if self.valid_BL is not None:
            self.valid_BL = self.valid_BL[:, : self.length]

    def grow(self, max_length: int) -> None:
        """Make room for up to ``max_length`` positions. Raises InputError for fewer than there was room for."""
        if max_length < self.max_length:
            raise InputError(f"max_length is {max_length}; the cache has room for {self.max_length} already")
        for slot in self._slots.values():
            # One with a window makes room for what it sees as it goes on.
            if slot.window is None:
                slot.widen(max_length)
        self.max_length = max_length

    def take_layers(self, other: "KeyValueCache") -> None:
        """Take over what ``other``, of the same sequences and positions, has of layers that were not run here."""
        for key, slot in other._slots.items():
            self._slots.setdefault(key, slot)

    def advance(self, num_positions: int) -> None:
        """Count positions that every layer has stored."""
        self.length += num_positions

    def sequences(self, batch: int) -> list[object]:
        """A name of each of the ``batch`` sequences, which stays its own when `keep_rows` moves it; of all streams together."""
        if not self._sequences:
            self._sequences = [object() for _ in range(batch)]
        return self._sequences

    def keep_rows(self, row_B: Tensor) -> None:
        """Keep, repeat or reorder sequences of the batch: a bool mask (finished ones leave) or int64 numbers (beams), for all streams.

        Copies of a sequence go on under names of their own.
        """
        batch = self._num_rows() // self.num_streams
        self._keep_names(row_B)
        for value in self.state.values():
            if hasattr(value, "keep_rows"):
                value.keep_rows(row_B)
        if self.num_streams > 1:
            row_B = rows_of_streams(row_B, self.num_streams, batch)
        for slot in self._slots.values():
            slot.key_BHSD, slot.value_BHSD = slot.key_BHSD[row_B], slot.value_BHSD[row_B]
            slot.filled_BS = None if slot.filled_BS is None else slot.filled_BS[row_B]
        if self.valid_BL is not None:
            self.valid_BL = self.valid_BL[row_B]

    def _keep_names(self, row_B: Tensor) -> None:
        names, self._sequences = self._sequences, []
        kept = torch.arange(len(names))[row_B.cpu()].tolist() if names else []
        seen: set[int] = set()
        for row in kept:
            self._sequences.append(object() if row in seen else names[row])
            seen.add(row)

    def _num_rows(self) -> int:
        return len(self._sequences) * self.num_streams or next((len(one.key_BHSD) for one in self._slots.values()), 0)

    @property
    def size_bytes(self) -> int:
        """Memory of the buffers made so far, and of the prefix."""
        rows = sum(slot.key_BHSD.nbytes + slot.value_BHSD.nbytes for slot in self._slots.values())
        return rows + (0 if self.prefix is None else self.prefix.size_bytes)


def rows_of_streams(row_B: Tensor, num_streams: int, batch: int) -> Tensor:
    """The rows of a stream-major batch that a choice of sequences stands for."""
    if row_B.dtype == torch.bool:
        return row_B.repeat(num_streams)
    return (row_B + batch * torch.arange(num_streams, device=row_B.device)[:, None]).flatten()


def attention_mask(
    cache: KeyValueCache | None,
    token_mask_BL: Tensor | None,
    length: int,
    device: torch.device,
    num_prefix: int = 0,
) -> tuple[Tensor | None, bool]:
    """(mask ``[B, 1, L, L_all]`` or None, is_causal) for ``length`` new positions; ``num_prefix`` entries before them all are seen by all.

    None wherever attention can do without: causal over a fresh sequence, with what stands in front of it, or one new token that sees
    everything. Updates ``cache.valid_BL`` where there is padding.
    """
    past = cache.length if cache is not None else 0
    padded = token_mask_BL is not None or (cache is not None and cache.valid_BL is not None)
    if not padded:
        if length == 1 and past + num_prefix:
            return None, False
        if past == 0:
            return None, True
        return _behind(num_prefix, _causal(length, past, device)[None, None]), False
    valid_BL = extend_valid(cache, token_mask_BL, length, past, device)
    mask = _causal(length, past, device)[None, None] & valid_BL[:, None, None, :]
    # A padding query would see nothing and softmax would give NaN: let it see itself, its output is never used.
    itself = torch.zeros(length, past + length, dtype=torch.bool, device=device)
    itself[torch.arange(length), past + torch.arange(length)] = True
    return _behind(num_prefix, mask | itself[None, None]), False


def _behind(num_prefix: int, mask: Tensor) -> Tensor:
    """``mask`` with entries in front that everything sees."""
    return F.pad(mask, (num_prefix, 0), value=True) if num_prefix else mask


def _causal(length: int, past: int, device: torch.device) -> Tensor:
    return torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past)


def extend_valid(
    cache: KeyValueCache | None, token_mask_BL: Tensor | None, length: int, past: int, device: torch.device
) -> Tensor:
    """valid_BL of all positions so far, where some of them are padding; ``cache.valid_BL`` is that from now on."""
    earlier = cache.valid_BL if cache is not None else None
    batch = token_mask_BL.shape[0] if token_mask_BL is not None else earlier.shape[0]  # type: ignore[union-attr]
    if earlier is None:
        earlier = torch.ones(batch, past, dtype=torch.bool, device=device)
    new = token_mask_BL if token_mask_BL is not None else torch.ones(batch, length, dtype=torch.bool, device=device)
    valid_BL = torch.cat((earlier, new.to(device)), dim=1)
    if cache is not None:
        cache.valid_BL = valid_BL
    return valid_BL
