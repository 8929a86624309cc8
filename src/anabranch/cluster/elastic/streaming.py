"""Pieces of slices that go to new owners while training goes on: chunk by chunk with their state, and from then on by their gradients.

A chunk is sent once, at some version. After that its new owner is given the gradient of each step, a third of the state under Adam, and
makes the same update as the old owner, to the bit. When all chunks are there a change of the layout needs no data any more but checksums,
and nobody stopped for the rest. Which chunk goes in which step is a function of the layouts, so nobody has to agree on it.
"""
# Shapes: N numbers of a layer

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

from torch import Tensor

from anabranch.cluster.elastic.layout import Layout, Move, moves, steps_of
from anabranch.cluster.elastic.links import LinkPool
from anabranch.cluster.elastic.state import Slice
from anabranch.cluster.elastic.updating import Updater

__all__ = ["Stream"]


class Stream:
    """One rank's part of a stream.

    Args:
        before, after: layouts.
        sizes: numbers of each layer.
        chunk: numbers of a move that go in one step.
        start: the version at which it begins.
        rank: this one.
        updater: as all have it.

    Attributes:
        moves: all that must travel.
        end: the version at which everything is with its new owner.
        sent_bytes: by this rank.
    """

    def __init__(
        self, before: Layout, after: Layout, sizes: Sequence[int], chunk: int, start: int, rank: int, updater: Updater
    ) -> None:
        self.moves = moves(before, after, sizes)
        self.start, self.end = start, start + steps_of(before, after, sizes, chunk)
        self.sent_bytes = 0
        self._chunk, self._rank, self._updater = chunk, rank, updater
        self._shadows: dict[int, Slice] = {}

    def send_chunks(self, links: LinkPool, slices: Mapping[int, Slice], version: int) -> None:
        """What is due at a version, of this rank's slices: queued, so that it goes while the step is computed."""
        for number, move in enumerate(self.moves):
            first, end = self._due(move, version)
            if move.source == self._rank and first < end:
                told, tensors = slices[move.layer].piece(first, end).told()
                self.sent_bytes += links.send(move.target, f"c{version}.{number}", tensors, told=told)

    def send_gradients(
        self,
        links: LinkPool,
        slices: Mapping[int, Slice],
        gradients: Mapping[int, Tensor] | None,
        version: int,
        without: Mapping[int, AbstractSet[int]] | None = None,
    ) -> None:
        """The gradients of a step, of all that was sent until now.

        Args:
            gradients: of this rank's slices; None for a step that changes nothing.
            without: by layer, which of its parameters have no part in the step; default: none.
        """
        for number, move in enumerate(self.moves):
            reach = self._due(move, version)[1]
            if move.source == self._rank and gradients is None:
                links.send(move.target, f"g{version}.{number}", [])
            elif move.source == self._rank and gradients is not None:
                own = slices[move.layer]
                piece = gradients[move.layer][move.first - own.first : reach - own.first]
                self.sent_bytes += links.send(
                    move.target, f"g{version}.{number}", [piece], without=sorted((without or {}).get(move.layer, ()))
                )

    def take(self, links: LinkPool, version: int) -> None:
        """What is sent to this rank for a version: chunks, and gradients, with which the next version is made."""
        gradients: dict[int, Tensor] = {}
        without: dict[int, frozenset[int]] = {}
        for number, move in enumerate(self.moves):
            if move.target != self._rank:
                continue
            first, end = self._due(move, version)
            if first < end:
                tensors, header = links.receive(move.source, f"c{version}.{number}")
                piece, have = Slice.heard(header["told"], tensors), self._shadows.get(number)
                self._shadows[number] = piece if have is None else Slice.joined(move.first, end, [have, piece])
            received, header = links.receive(move.source, f"g{version}.{number}")
            if received:
                gradients[number] = received[0]
                without[move.layer] = frozenset(header["without"])
        # All have one, or nobody has: then the step changed nothing.
        if gradients:
            layers = {number: self.moves[number].layer for number in self._shadows}
            self._shadows = self._updater.next_slices(self._shadows, gradients, version, layers=layers, without=without)

    def piece(self, move: Move, version: int) -> Slice | None:
        """What came for a move of this rank, where it is all there at this version."""
        if version != self.end or move not in self.moves:
            return None
        return self._shadows.get(self.moves.index(move))

    def has(self, move: Move, version: int) -> bool:
        """Whether the new owner of a move has it all at this version."""
        return version == self.end and move in self.moves

    def _due(self, move: Move, version: int) -> tuple[int, int]:
        """(first, end) of the chunk that goes at a version; all before it went earlier. Empty where all has gone."""
        step = version - self.start
        first = min(move.first + step * self._chunk, move.end)
        return first, min(first + self._chunk, move.end)
