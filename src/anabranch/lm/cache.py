"""The key-value cache of a decoder: one buffer per layer, filled from the left."""
# Shapes: B batch, L positions, H key-value heads, D head width, P streams, M prefix entries

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.errors import CapacityError


class Prefix:
    """Keys and values that stand in front of every sequence: (key_PHMD, value_PHMD) of each layer, one for each of P streams.

    It is the store of a forward pass without a cache. A `KeyValueCache` writes it into its buffers once instead, so that
    attention reads one piece of memory; neither counts it as positions.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.layers = layers

    def __len__(self) -> int:
        """M, 0 where there is none."""
        return self.layers[0][0].shape[2] if self.layers else 0

    def append(self, layer: int, key_BHLD: Tensor, value_BHLD: Tensor) -> tuple[Tensor, Tensor]:
        """The prefix of ``layer``, then what is given; B is P times the sequences."""
        key_BHMD, value_BHMD = self.rows(layer, key_BHLD)
        return torch.cat((key_BHMD, key_BHLD), dim=2), torch.cat((value_BHMD, value_BHLD), dim=2)

    def rows(self, layer: int, like_BHLD: Tensor) -> tuple[Tensor, Tensor]:
        """(key_BHMD, value_BHMD): the prefix of each row of a stream-major batch, in the dtype of what it goes with."""
        key_PHMD, value_PHMD = (part_PHMD.to(like_BHLD) for part_PHMD in self.layers[layer])
        copies = like_BHLD.shape[0] // key_PHMD.shape[0]
        return _repeated(key_PHMD, copies), _repeated(value_PHMD, copies)


def _repeated(part_PHMD: Tensor, copies: int) -> Tensor:
    """Each stream's entries for each of its rows."""
    return part_PHMD[:, None].expand(-1, copies, -1, -1, -1).flatten(0, 1)


class KeyValueCache:
    """Keys and values of up to ``max_length`` positions of a batch.

    Layers ``append`` during a forward pass; the decoder calls ``advance`` after it. Buffers are made at the first append, in the
    dtype and on the device of what is stored. ``valid_BL`` marks real positions when prompts were padded. With ``num_streams`` P it
    holds P rows per sequence, stream-major, with the ``prefix`` of its stream in front of each.
    """

    def __init__(self, num_layers: int, max_length: int, *, num_streams: int = 1, prefix: Prefix | None = None) -> None:
        self.max_length = max_length
        self.num_streams = num_streams
        self.prefix = prefix
        self.length = 0
        self.valid_BL: Tensor | None = None
        self.state: dict[
            str, object
        ] = {}  # what a design carries from call to call, by a name of its own; what has `keep_rows` follows
        self._sequences: list[object] = []
        self._key: list[Tensor | None] = [None] * num_layers
        self._value: list[Tensor | None] = [None] * num_layers

    def append(self, layer: int, key_BHLD: Tensor, value_BHLD: Tensor) -> tuple[Tensor, Tensor]:
        """Store new positions of ``layer``; return all so far.

        Raises CapacityError if they exceed ``max_length``.
        """
        start, end = self.length, self.length + key_BHLD.shape[2]
        if end > self.max_length:
            raise CapacityError(f"the cache holds {self.max_length} positions, but {end} are needed")
        if self._key[layer] is None:
            self._make_buffers(layer, key_BHLD, value_BHLD)
        start, end = start + self.num_prefix, end + self.num_prefix
        return (
            self._store(self._key, layer, key_BHLD, start, end),
            self._store(self._value, layer, value_BHLD, start, end),
        )

    def _make_buffers(self, layer: int, key_BHLD: Tensor, value_BHLD: Tensor) -> None:
        size = self.num_prefix + self.max_length
        for buffers, new_BHLD in ((self._key, key_BHLD), (self._value, value_BHLD)):
            batch, heads, _, width = new_BHLD.shape
            buffers[layer] = new_BHLD.new_empty(batch, heads, size, width)
        if self.prefix is not None and self.num_prefix:
            key_BHMD, value_BHMD = self.prefix.rows(layer, key_BHLD)
            self._store(self._key, layer, key_BHMD, 0, self.num_prefix)
            self._store(self._value, layer, value_BHMD, 0, self.num_prefix)

    @staticmethod
    def _store(buffers: list[Tensor | None], layer: int, new_BHLD: Tensor, start: int, end: int) -> Tensor:
        buffer = buffers[layer]
        assert buffer is not None
        buffer[:, :, start:end] = new_BHLD
        return buffer[:, :, :end]

    @property
    def num_prefix(self) -> int:
        """Entries in front of every row, which are no positions."""
        return 0 if self.prefix is None else len(self.prefix)

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
        self._keep_names(row_B)
        for value in self.state.values():
            if hasattr(value, "keep_rows"):
                value.keep_rows(row_B)
        if self.num_streams > 1:
            row_B = rows_of_streams(row_B, self.num_streams, self._num_rows() // self.num_streams)
        self._key = [None if buffer is None else buffer[row_B] for buffer in self._key]
        self._value = [None if buffer is None else buffer[row_B] for buffer in self._value]
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
        return next((len(buffer) for buffer in self._key if buffer is not None), 0)

    @property
    def size_bytes(self) -> int:
        """Memory of the buffers made so far."""
        buffers = [buffer for buffer in self._key + self._value if buffer is not None]
        return sum(buffer.numel() * buffer.element_size() for buffer in buffers)


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
    valid_BL = _extend_valid(cache, token_mask_BL, length, past, device)
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


def _extend_valid(
    cache: KeyValueCache | None, token_mask_BL: Tensor | None, length: int, past: int, device: torch.device
) -> Tensor:
    earlier = cache.valid_BL if cache is not None else None
    batch = token_mask_BL.shape[0] if token_mask_BL is not None else earlier.shape[0]  # type: ignore[union-attr]
    if earlier is None:
        earlier = torch.ones(batch, past, dtype=torch.bool, device=device)
    new = token_mask_BL if token_mask_BL is not None else torch.ones(batch, length, dtype=torch.bool, device=device)
    valid_BL = torch.cat((earlier, new.to(device)), dim=1)
    if cache is not None:
        cache.valid_BL = valid_BL
    return valid_BL
