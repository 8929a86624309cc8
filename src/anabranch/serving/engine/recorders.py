"""What recorders inside a model are told of a step: whose tokens these are, which of them they have seen, and when the layers have run."""
# Shapes: T tokens of a step, P streams

from collections.abc import Callable, Sequence
from typing import Any

import torch

from anabranch.routing.sequences import WHEN_DONE
from anabranch.serving.core.batch import Chunk

__all__ = ["Told"]


class Told:
    """Kept of each request that runs, for those who record where its tokens go (`anabranch.routing.record_routing`).

    Of a request that is computed again after it was preempted, they are told each position once. A step may fail and be run again, so what
    they record waits until its layers have run.
    """

    def __init__(self) -> None:
        # An id may come again, so a request has a name that is its own.
        self._names: dict[str, object] = {}
        # Positions of each request that have been seen.
        self._seen: dict[str, int] = {}
        # Of the step under way.
        self._recordings: list[Callable[[], None]] = []

    def forget(self, id: str) -> None:
        """A request is gone."""
        self._names.pop(id, None)
        self._seen.pop(id, None)

    def hide(self, id: str, end: int) -> None:
        """Tell nobody of a request's positions before ``end``."""
        self._seen[id] = end

    def names(self, chunks: Sequence[Chunk]) -> list[object]:
        """Of the request of each token."""
        return [self._names.setdefault(chunk.id, object()) for chunk in chunks for _ in chunk.tokens]

    def begin(self) -> None:
        """A step begins; what one that failed has left is gone."""
        self._recordings.clear()

    def state(
        self, chunks: Sequence[Chunk], num_streams: int, positions: Sequence[int] | None = None
    ) -> dict[str, Any]:
        """For the context of a pass: where to put what is recorded, and which of the P T positions have been seen before.

        ``positions`` are those of the tokens, where they do not follow each other.
        """
        state: dict[str, Any] = {WHEN_DONE: self._recordings}
        if positions is None:
            positions = [chunk.start + place for chunk in chunks for place in range(len(chunk.tokens))]
        seen = [self._seen.get(chunk.id, 0) for chunk in chunks for _ in chunk.tokens]
        repeated = [position < end for position, end in zip(positions, seen, strict=True)]
        if any(repeated):
            state["repeated_N"] = torch.tensor(repeated).repeat(num_streams)
        return state

    def end(self, chunks: Sequence[Chunk]) -> None:
        """The layers have run: recorders keep what they heard."""
        for chunk in chunks:
            self._seen[chunk.id] = max(self._seen.get(chunk.id, 0), chunk.start + len(chunk.tokens))
        for record in self._recordings:
            record()
        self._recordings.clear()
