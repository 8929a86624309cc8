"""The key-value cache of a decoder: one buffer per layer, filled from the left."""
# Shapes: B batch, L positions, H key-value heads, D head width

import torch
from torch import Tensor

from anabranch.errors import CapacityError


class KeyValueCache:
    """Keys and values of up to ``max_length`` positions of a batch.

    Layers ``append`` during a forward pass; the decoder calls ``advance`` after it. Buffers are made at the first append, in the
    dtype and on the device of what is stored. ``valid_BL`` marks real positions when prompts were padded.
    """

    def __init__(self, num_layers: int, max_length: int) -> None:
        self.max_length = max_length
        self.length = 0
        self.valid_BL: Tensor | None = None
        self.state: dict[str, object] = {}  # what a design carries from call to call, by a name of its own
        self._key: list[Tensor | None] = [None] * num_layers
        self._value: list[Tensor | None] = [None] * num_layers

    def append(self, layer: int, key_BHLD: Tensor, value_BHLD: Tensor) -> tuple[Tensor, Tensor]:
        """Store new positions of ``layer``; return all so far.

        Raises CapacityError if they exceed ``max_length``.
        """
        start, end = self.length, self.length + key_BHLD.shape[2]
        if end > self.max_length:
            raise CapacityError(f"the cache holds {self.max_length} positions, but {end} are needed")
        return (
            self._store(self._key, layer, key_BHLD, start, end),
            self._store(self._value, layer, value_BHLD, start, end),
        )

    def _store(self, buffers: list[Tensor | None], layer: int, new_BHLD: Tensor, start: int, end: int) -> Tensor:
        buffer = buffers[layer]
        if buffer is None:
            batch, heads, _, width = new_BHLD.shape
            buffer = new_BHLD.new_empty(batch, heads, self.max_length, width)
            buffers[layer] = buffer
        buffer[:, :, start:end] = new_BHLD
        return buffer[:, :, :end]

    def advance(self, num_positions: int) -> None:
        """Count positions that every layer has stored."""
        self.length += num_positions

    def keep_rows(self, row_B: Tensor) -> None:
        """Keep only some sequences of the batch (finished ones leave)."""
        self._key = [None if buffer is None else buffer[row_B] for buffer in self._key]
        self._value = [None if buffer is None else buffer[row_B] for buffer in self._value]
        if self.valid_BL is not None:
            self.valid_BL = self.valid_BL[row_B]

    @property
    def size_bytes(self) -> int:
        """Memory of the buffers made so far."""
        buffers = [buffer for buffer in self._key + self._value if buffer is not None]
        return sum(buffer.numel() * buffer.element_size() for buffer in buffers)


def attention_mask(
    cache: KeyValueCache | None, token_mask_BL: Tensor | None, length: int, device: torch.device
) -> tuple[Tensor | None, bool]:
    """(mask ``[B, 1, L, L_all]`` or None, is_causal) for ``length`` new positions.

    None wherever attention can do without: plain causal over a fresh sequence, or one new token that sees everything. Updates
    ``cache.valid_BL`` where there is padding.
    """
    past = cache.length if cache is not None else 0
    padded = token_mask_BL is not None or (cache is not None and cache.valid_BL is not None)
    if not padded:
        if past == 0:
            return None, True
        if length == 1:
            return None, False
        return _causal(length, past, device)[None, None], False
    valid_BL = _extend_valid(cache, token_mask_BL, length, past, device)
    mask = _causal(length, past, device)[None, None] & valid_BL[:, None, None, :]
    # A padding query would see nothing and softmax would give NaN: let it see itself, its output is never used.
    itself = torch.zeros(length, past + length, dtype=torch.bool, device=device)
    itself[torch.arange(length), past + torch.arange(length)] = True
    return mask | itself[None, None], False


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
