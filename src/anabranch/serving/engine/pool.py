"""`Pooling`: hidden states of prompts as one vector each, over as many steps as a prompt takes."""
# Shapes: T tokens of a step, X rows that are pooled, D width

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from anabranch.serving.core.batch import PENDING, Chunk, Sampled

__all__ = ["Pooled", "Pooling"]


class Pooled(NamedTuple):
    """What a step gives: vectors of requests whose prompts have ended, and sums of those whose have not."""

    done: dict[str, Sampled]
    sums: dict[str, NDArray[np.float64]]


class Pooling:
    """Pools the last layer's states, after the norm, of requests that ask for it (`Request.pooling`)."""

    def __init__(self) -> None:
        # sum_D of each request whose prompt has begun.
        self._sums: dict[str, NDArray[np.float64]] = {}

    @staticmethod
    def rows(chunks: Sequence[Chunk]) -> list[int]:
        """Rows of a step that are pooled."""
        rows: list[int] = []
        end = 0
        for chunk in chunks:
            start, end = end, end + len(chunk.tokens)
            if chunk.pooling == "mean":
                rows += range(start, end)
            elif chunk.pooling == "last" and chunk.is_whole:
                rows.append(end - 1)
        return rows

    def of(self, x_XD: Tensor, chunks: Sequence[Chunk]) -> Pooled:
        """What `rows` give; nothing is kept, as the step may still fail."""
        made, start = Pooled({}, {}), 0
        for chunk in chunks:
            count = len(chunk.tokens) if chunk.pooling == "mean" else int(chunk.pooling == "last" and chunk.is_whole)
            if not count:
                continue
            rows_XD = x_XD[start : start + count].double().cpu().numpy()
            start += count
            part_D = rows_XD[-1]
            if chunk.pooling == "mean":
                # One token after the other: where a prompt was cut, which is for its company to say, changes no bit.
                front = [] if chunk.start == 0 else [self._sums[chunk.id][None]]
                sum_D = np.add.accumulate(np.concatenate([*front, rows_XD]))[-1]
                made.sums[chunk.id] = sum_D
                part_D = sum_D / (chunk.start + count)
            if chunk.is_whole:
                part_D = part_D.astype(np.float32)
                is_right = bool(np.isfinite(part_D).all())
                error = None if is_right else "the model's vector of the text is not finite"
                vector = tuple(part_D.tolist()) if is_right else ()
                made.done[chunk.id] = Sampled(id=chunk.id, token=PENDING, error=error, embedding=vector)
        return made

    def keep(self, pooled: Pooled) -> None:
        """The step has run."""
        self._sums |= pooled.sums

    def forget(self, id: str) -> None:
        """Drop what is kept of a request."""
        self._sums.pop(id, None)
