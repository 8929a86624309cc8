"""From one layout to another: pieces of slices travel to their new owners, lost ones out of neighbours' snapshots; then whole weights.

Nothing of the old layout is changed by this: until all ranks are ready it is what holds.
"""
# Shapes: N numbers of a layer

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anabranch.cluster.elastic.layout import Layout, Move, moves
from anabranch.cluster.elastic.links import CalledAwayError, LinkPool
from anabranch.cluster.elastic.state import PARAM, Slice, Snapshot, State, digest_of
from anabranch.cluster.elastic.streaming import Stream
from anabranch.cluster.elastic.wire import Header
from anabranch.errors import InputError, PeerError

__all__ = ["Held", "Moved", "moved_state"]

# By (epoch of the layout, owner): snapshots by version.
Held = dict[tuple[int, int], dict[int, Snapshot]]


@dataclass(frozen=True)
class Moved:
    """What became of a move, for one rank.

    Attributes:
        state: what it has in the new layout; None where it has no place in it.
        sent_bytes: to others, for it.
        streamed, refused: moves that had come before by a stream, and those of them whose checksum was another.
    """

    state: State | None
    sent_bytes: int
    streamed: int = 0
    refused: int = 0


def moved_state(
    links: LinkPool,
    rank: int,
    before: Layout | None,
    after: Layout,
    sizes: Sequence[int],
    state: State | None,
    version: int,
    *,
    held: Held,
    layout_epoch: int,
    holders: Mapping[int, Sequence[int]],
    alive: Collection[int],
    damaged: Callable[[int, str], None],
    stream: Stream | None = None,
) -> Moved:
    """Take part in a move as one rank.

    Args:
        links: to all ranks, in the epoch of the move.
        before, after: layouts; None before training begins, where ``state`` is that of ``after``.
        sizes: numbers of each layer.
        state: what this rank has in ``before`` at ``version``; None where it had no place in it.
        held: snapshots here, of which those of ``layout_epoch`` count.
        holders: of each lost rank, who gives its slices.
        alive: all ranks that are there.
        stream: what travelled before, while training went on.
        damaged: called with a lost rank and why its snapshot here cannot be used; then a wait for what comes of it raises CalledAwayError.

    Raises CalledAwayError when called away, InputError for pieces that do not fit together.
    """
    if before is None:
        return Moved(state, 0)
    lost = _lost_slices(rank, held, layout_epoch, holders, version, damaged)
    found = list(enumerate(moves(before, after, sizes, alive=alive, holders=holders)))
    own = {} if state is None else state.slices
    # What came by a stream is not sent again: its checksum is, and only what differs from it.
    streamed = {number for number, move in found if stream is not None and stream.has(move, version)}
    pieces: dict[int, list[Slice]] = {}
    sent = 0
    refused = set()
    for number, move in found:
        if move.source == rank and move.target != rank:
            piece = _piece(move, own, lost)
            if number in streamed:
                links.send(move.target, f"d{number}", [], digest=digest_of({move.layer: piece}, version))
            else:
                sent += _send(links, move, number, piece, version)
    for number, move in found:
        if number in streamed and move.target == rank:
            assert stream is not None
            came = stream.piece(move, version)
            _, header = links.receive(move.source, f"d{number}")
            is_sound = came is not None and digest_of({move.layer: came}, version) == header["digest"]
            links.send(move.source, f"v{number}", [], is_sound=is_sound)
            if is_sound and came is not None:
                pieces.setdefault(move.layer, []).append(came)
            else:
                refused.add(number)
    for number, move in found:
        if number in streamed and move.source == rank:
            _, header = links.receive(move.target, f"v{number}")
            if not header["is_sound"]:
                sent += _send(links, move, number, _piece(move, own, lost), version)
    for number, move in found:
        if move.target != rank or (number in streamed and number not in refused):
            continue
        if move.source == rank:
            piece = _piece(move, own, lost)
        else:
            tensors, header = links.receive(move.source, f"m{number}")
            piece = _checked(Slice.heard(header["told"], tensors), move.layer, version, move.source, header)
        pieces.setdefault(move.layer, []).append(piece)
    slices = {}
    for layer, size in enumerate(sizes):
        for owner, first, end in after.slices(layer, size):
            if owner == rank:
                came_in = pieces.get(layer, [])
                slices[layer] = Slice.joined(first, end, [*came_in, *_kept(own.get(layer), first, end, came_in)])
    flat, more = _weights(links, rank, before, after, sizes, state, slices, version)
    return Moved(State(flat, slices) if rank in after.grid.ranks else None, sent + more, len(streamed), len(refused))


def _send(links: LinkPool, move: Move, number: int, piece: Slice, version: int) -> int:
    told, tensors = piece.told()
    return links.send(move.target, f"m{number}", tensors, told=told, digest=digest_of({move.layer: piece}, version))


def _checked(piece: Slice, layer: int, version: int, source: int, header: Header) -> Slice:
    """A piece that came. Raises PeerError where it is not the one that was sent."""
    if digest_of({layer: piece}, version) != header["digest"]:
        raise PeerError(
            f"what rank {source} sent of layer {layer}, {piece.first} to {piece.end}, has another checksum here"
        )
    return piece


def _lost_slices(
    rank: int,
    held: Held,
    layout_epoch: int,
    holders: Mapping[int, Sequence[int]],
    version: int,
    damaged: Callable[[int, str], None],
) -> dict[int, dict[int, Slice]]:
    """By lost rank, by layer, what this rank answers for: verified again, since it has lain in memory."""
    found = {}
    for owner, kept in holders.items():
        if not kept or kept[0] != rank:
            continue
        snapshot = held.get((layout_epoch, owner), {}).get(version)
        try:
            if snapshot is None:
                raise InputError(f"there is none of version {version}")
            found[owner] = snapshot.slices()
        except InputError as error:
            damaged(owner, str(error))
            raise CalledAwayError from None
    return found


def _piece(move: Move, own: Mapping[int, Slice], lost: Mapping[int, Mapping[int, Slice]]) -> Slice:
    for slices in (own, *lost.values()):
        have = slices.get(move.layer)
        if have is not None and have.first <= move.first and move.end <= have.end:
            return have.piece(move.first, move.end)
    raise InputError(
        f"layer {move.layer} has no numbers {move.first} to {move.end} here, and they are to go to rank {move.target}"
    )


def _kept(own: Slice | None, first: int, end: int, pieces: Sequence[Slice]) -> list[Slice]:
    """What this rank has of its new slice already, less what came."""
    if own is None:
        return []
    low, high = max(own.first, first), min(own.end, end)
    if low >= high or any(piece.first < high and low < piece.end for piece in pieces):
        return []
    return [own.piece(low, high)]


def _weights(
    links: LinkPool,
    rank: int,
    before: Layout,
    after: Layout,
    sizes: Sequence[int],
    state: State | None,
    slices: Mapping[int, Slice],
    version: int,
) -> tuple[dict[int, Tensor], int]:
    """Whole weights of the layers of this rank's stage: those that it had, and of others the slices of their owners."""
    sent, flat = 0, {}
    waiting = []
    for layer, size in enumerate(sizes):
        stage = after.grid.stages[after.stage_with(layer)]
        had = before.grid.stages[before.stage_with(layer)]
        new = [other for other in stage if other not in had]
        owners = after.slices(layer, size)
        for owner, first, end in owners:
            if owner == rank:
                piece = Slice(first, end, {PARAM: slices[layer].tensors[PARAM]})
                digest = digest_of({layer: piece}, version)
                for other in new:
                    if other != rank:
                        sent += links.send(other, f"p{layer}", [piece.tensors[PARAM]], digest=digest)
        if rank in stage:
            waiting.append((layer, rank in new, owners))
    for layer, is_new, owners in waiting:
        if not is_new:
            assert state is not None
            flat[layer] = state.flat[layer]
            continue
        parts = []
        for owner, first, end in owners:
            if owner == rank:
                parts.append(slices[layer].tensors[PARAM])
                continue
            (received,), header = links.receive(owner, f"p{layer}")
            parts.append(_checked(Slice(first, end, {PARAM: received}), layer, version, owner, header).tensors[PARAM])
        flat[layer] = torch.cat(parts) if parts else torch.empty(0)
    return flat, sent
