"""`StepLayout`: where the rows of one step stand, worked out once and read by every layer."""
# Shapes: T tokens of a step, N sequences, U block numbers of all sequences

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.serving.core.batch import Chunk


@dataclass(frozen=True)
class Span:
    """The rows of one sequence.

    Attributes:
        first: its first row in the step.
        count: rows.
        past: positions stored before them.
    """

    first: int
    count: int
    past: int

    @property
    def length(self) -> int:
        """Positions that its last row sees."""
        return self.past + self.count


class StepLayout:
    """Rows, positions and slots of a step's chunks.

    Args:
        chunks: the step's.
        block_tokens: tokens per block.
        device: where tensors shall be.
        is_local: read the blocks of layers that see less far back than others (`Chunk.local`).
        stored: of each chunk how much is stored before it, where that is not all that comes before it: blocks that pass over tokens keep
            the others one behind the other. None for `Chunk.start`.
        position_T: there, the position of each row; None for one after the other.
        position_NS: there, of each chunk those of all that is stored of it, its rows' last; needed by layers with a window alone.

    Attributes:
        spans: one per chunk.
        table_U: int32, the block numbers of all sequences, one after the other.
        start_N: int64, where each sequence's begin.
        position_T: int64, position of each row in its sequence.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk],
        block_tokens: int,
        device: torch.device | str = "cpu",
        *,
        is_local: bool = False,
        stored: Sequence[int] | None = None,
        position_T: NDArray[np.int64] | None = None,
        position_NS: Sequence[NDArray[np.int64]] | None = None,
    ) -> None:
        self.block_tokens, self.device = block_tokens, torch.device(device)
        self._position_NS = position_NS
        self.spans: list[Span] = []
        first, used, positions = 0, 0, []
        starts: list[int] = []
        tables: list[Sequence[int]] = []
        table: Sequence[int] | None = None
        for number, chunk in enumerate(chunks):
            count, past = len(chunk.tokens), chunk.start if stored is None else stored[number]
            self.spans.append(Span(first, count, past))
            needed, blocks = -(-(past + count) // block_tokens), chunk.local if is_local else chunk.blocks
            # Runs of tokens of one request, as of blocks that pass over some, come in order and share its blocks.
            has = used - starts[-1] if starts and blocks is table else 0
            starts.append(used - has)
            tables.append(blocks[has:needed])
            positions.append(np.arange(chunk.start, chunk.start + count))
            first, used, table = first + count, used + max(0, needed - has), blocks
        self.num_rows = first
        self.table_U = np.array([number for table in tables for number in table], np.int32)
        self.start_N = np.array(starts, np.int64)
        if position_T is None:
            position_T = np.concatenate(positions) if positions else np.zeros(0, np.int64)
        self.position_T: NDArray[np.int64] = position_T

    def slots(self, sequence: int) -> NDArray[np.int64]:
        """Slots of all that is stored of one sequence, in order; negative numbers for what was given back (`GONE`)."""
        span, size = self.spans[sequence], self.block_tokens
        start = self.start_N[sequence]
        block_S = self.table_U[start : start - (-span.length // size)].astype(np.int64)
        return (block_S[:, None] * size + np.arange(size)).reshape(-1)[: span.length]

    def positions(self, sequence: int) -> NDArray[np.int64] | None:
        """Positions of all that is stored of one sequence, ascending; None where they are its places there."""
        return None if self._position_NS is None else self._position_NS[sequence]

    @cached_property
    def slot_T(self) -> Tensor:
        """int64, the slot each row is written to."""
        parts = [self.slots(number)[span.past :] for number, span in enumerate(self.spans)]
        return torch.from_numpy(np.concatenate(parts)).to(self.device)

    @cached_property
    def sequence_N4(self) -> NDArray[np.int64]:
        """For the compiled kernel: (first row, rows, past, where its blocks begin in ``table_U``)."""
        rows = [
            (span.first, span.count, span.past, start) for span, start in zip(self.spans, self.start_N, strict=True)
        ]
        return np.array(rows, np.int64).reshape(-1, 4)

    @cached_property
    def groups(self) -> list["Group"]:
        """Sequences that attend together where there is no kernel: those of one row by length (a power of two), the others alone."""
        single: dict[int, list[int]] = {}
        groups = []
        for number, span in enumerate(self.spans):
            if span.count == 1:
                single.setdefault(max(span.length - 1, 15).bit_length(), []).append(number)
            else:
                groups.append(self._group([number], span.length))
        longest = {size: max(self.spans[number].length for number in numbers) for size, numbers in single.items()}
        return groups + [self._group(numbers, longest[size]) for size, numbers in single.items()]

    def _group(self, numbers: list[int], width: int) -> "Group":
        """``numbers`` padded to ``width`` positions; padding points at a slot that is written, so that nothing read is undefined."""
        spans = [self.spans[number] for number in numbers]
        slot_NS = np.empty((len(numbers), width), np.int64)
        for row, number in enumerate(numbers):
            slots = self.slots(number)
            slot_NS[row, : len(slots)], slot_NS[row, len(slots) :] = slots, slots[0]
        row_NL = np.stack([np.arange(span.first, span.first + span.count) for span in spans])
        place_NL = np.stack([np.arange(span.past, span.length) for span in spans])
        sees_NLS = np.arange(width) <= place_NL[..., None]
        return Group(*(torch.from_numpy(part).to(self.device) for part in (row_NL, slot_NS, sees_NLS)))


@dataclass(frozen=True)
class Group:
    """Sequences of equally many rows.

    Attributes:
        row_NL: their rows in the step.
        slot_NS: slots of their positions.
        sees_NLS: bool, which of these positions each row may see.
    """

    row_NL: Tensor
    slot_NS: Tensor
    sees_NLS: Tensor
