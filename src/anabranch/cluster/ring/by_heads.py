"""DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv 2309.14509): heads are cut instead of the sequence while attention runs.

    all-to-all: rank p gets all positions of its share of the heads;  attention of whole sequences;  all-to-all back

Per rank and pass it sends n (2 H + 2 G) D (N - 1) / N numbers, less than rings with their N - 1 hops, all at once and with nothing to
compute meanwhile. Heads must divide: each rank has H / N query heads, and the key heads that these see; a key head that heads of several
ranks see goes to each of them, and its gradient is their sum.
"""
# Shapes: B sequences, L positions of a rank, N ranks, H query heads, G key heads, D head width

from collections.abc import Generator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from anabranch.cluster.ring.inputs import Inputs, Program, like_rows
from anabranch.cluster.ring.kernel import attend, gradients
from anabranch.cluster.ring.layout import Placement
from anabranch.cluster.ring.link import Handle, Link
from anabranch.cluster.ring.pieces import Mask, Piece, pieces_between
from anabranch.errors import InputError

__all__ = ["ByHeads", "HeadShare", "backward", "forward", "head_shares", "schedule_by_heads"]


class HeadShare(NamedTuple):
    """The heads of a rank.

    Attributes:
        queries, keys: first head, and the first that is not of them any more.
    """

    queries: tuple[int, int]
    keys: tuple[int, int]


def head_shares(heads: int, kv_heads: int, world: int) -> tuple[HeadShare, ...]:
    """The heads of each rank. Raises InputError where they do not divide."""
    own, group = heads // world, heads // kv_heads
    if heads % world or (own % group and group % own):
        raise InputError(
            f"{heads} query heads over {kv_heads} key heads cannot be cut over {world} ranks (as many each, of whole groups or of one); "
            "use another scheme than ulysses"
        )
    return tuple(
        HeadShare((first, first + own), (first // group, -(-(first + own) // group))) for first in range(0, heads, own)
    )


@dataclass(frozen=True)
class ByHeads:
    """The work where heads are cut; what `Schedule` is for the other schemes.

    Attributes:
        queries, keys: where positions are.
        mask: what queries see.
    """

    queries: Placement
    keys: Placement
    mask: Mask
    _found: dict[tuple[int, int], tuple[Piece, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    scheme: ClassVar[str] = "ulysses"

    @property
    def world(self) -> int:
        """N."""
        return self.queries.world

    def pieces(self, owner: int, rank: int) -> tuple[Piece, ...]:
        """What the queries of ``owner`` see of the keys of ``rank``."""
        if (owner, rank) not in self._found:
            self._found[owner, rank] = pieces_between(self.queries.runs[owner], self.keys.runs[rank], self.mask)
        return self._found[owner, rank]

    def all_pairs(self) -> int:
        """Pairs of query and key of one head."""
        ranks = range(self.world)
        return sum(piece.pairs for owner in ranks for rank in ranks for piece in self.pieces(owner, rank))

    def pairs(self, rank: int, step: int) -> int:
        """Pairs that a rank computes, as if of one head; all of it is one step."""
        return -(-self.all_pairs() // self.world) if step == 0 else 0


@lru_cache(maxsize=32)
def schedule_by_heads(queries: Placement, keys: Placement, mask: Mask) -> ByHeads:
    """The `ByHeads`, which remembers what it worked out."""
    return ByHeads(queries, keys, mask)


def forward(schedule: ByHeads, rank: int, inputs: Inputs, link: Link) -> Program:
    """(out_BHLD, lse_BHL) of this rank's queries, see `anabranch.cluster.ring.program.forward`."""
    query, key, value = inputs.query_BHLD, inputs.key_BGSD, inputs.value_BGSD
    shares = head_shares(query.shape[1], key.shape[1], schedule.world)
    blocks = yield from _spread(schedule, rank, link, shares, (query,), (key, value))
    made = []
    for owner, ((own_query,), _) in enumerate(blocks):
        out = torch.zeros(own_query.shape, dtype=inputs.fine, device=query.device)
        lse = torch.full(out.shape[:3], -torch.inf, dtype=inputs.fine, device=query.device)
        for other, (_, (other_key, other_value)) in enumerate(blocks):
            attend(own_query, other_key, other_value, schedule.pieces(owner, other), out, lse, scale=inputs.scale)
        home = inputs.home_dtype or inputs.fine
        made.append([lse, out if owner == rank else out.to(home)])
    like = [
        query.new_empty((query.shape[0], shares[0].queries[1], query.shape[2]), dtype=inputs.fine, device="meta"),
        like_rows(query[:, slice(*shares[0].queries)], query.shape[2]).to(inputs.home_dtype or inputs.fine),
    ]
    parts = yield from _home(schedule, rank, link, made, [like] * schedule.world)
    out = torch.cat([part.to(inputs.fine) for _, part in parts], 1)
    return out, torch.cat([lse for lse, _ in parts], 1)


def backward(
    schedule: ByHeads, rank: int, inputs: Inputs, dout: Tensor, lse: Tensor, delta: Tensor, link: Link
) -> Program:
    """(dquery, dkey, dvalue) of this rank, see `anabranch.cluster.ring.program.backward`."""
    query, key, value = inputs.query_BHLD, inputs.key_BGSD, inputs.value_BGSD
    shares = head_shares(query.shape[1], key.shape[1], schedule.world)
    blocks = yield from _spread(schedule, rank, link, shares, (lse, delta, query, dout), (key, value))
    made = [
        [torch.zeros(part.shape, dtype=inputs.fine, device=part.device) for part in (moved[2], *kept)]
        for moved, kept in blocks
    ]
    for owner, ((own_lse, own_delta, own_query, own_dout), _) in enumerate(blocks):
        for other, (_, (other_key, other_value)) in enumerate(blocks):
            into = (made[owner][0], made[other][1], made[other][2])
            pieces = schedule.pieces(owner, other)
            gradients(own_query, other_key, other_value, own_dout, own_lse, own_delta, pieces, into, scale=inputs.scale)
    likes = [
        [
            like_rows(part[:, slice(*heads)], part.shape[2]).to(inputs.fine)
            for part, heads in ((query, share.queries), (key, share.keys), (value, share.keys))
        ]
        for share in shares
    ]
    parts = yield from _home(schedule, rank, link, made, likes)
    found = [torch.zeros(part.shape, dtype=inputs.fine, device=part.device) for part in (query, key, value)]
    for share, own in zip(shares, parts, strict=True):
        for whole, part, heads in zip(found, own, (share.queries, share.keys, share.keys), strict=True):
            whole[:, slice(*heads)] += part
    return tuple(found)


def _spread(
    schedule: ByHeads,
    rank: int,
    link: Link,
    shares: tuple[HeadShare, ...],
    moved: tuple[Tensor, ...],
    kept: tuple[Tensor, ...],
) -> Generator[Handle, None, list[tuple[list[Tensor], list[Tensor]]]]:
    """A program: what each rank has of this rank's heads, of queries (``moved``, the largest numbers first) and of keys (``kept``)."""

    def cut(share: HeadShare) -> list[Tensor]:
        return [part[:, slice(*share.queries)] for part in moved] + [part[:, slice(*share.keys)] for part in kept]

    others = [other for other in range(schedule.world) if other != rank]
    mine = cut(shares[rank])
    rows = [(schedule.queries.rows[other],) * len(moved) + (schedule.keys.rows[other],) * len(kept) for other in others]
    receives = [
        (other, 0, [like_rows(part, count) for part, count in zip(mine, counts, strict=True)])
        for other, counts in zip(others, rows, strict=True)
    ]
    sent, received = link.exchange("travel", 0, [(other, 0, cut(shares[other])) for other in others], receives)
    yield from received
    yield from sent
    parts = {other: handle.parts() for other, handle in zip(others, received, strict=True)} | {rank: mine}
    return [(parts[other][: len(moved)], parts[other][len(moved) :]) for other in range(schedule.world)]


def _home(
    schedule: ByHeads, rank: int, link: Link, made: list[list[Tensor]], likes: list[list[Tensor]]
) -> Generator[Handle, None, list[list[Tensor]]]:
    """A program: what each rank made of this rank's positions, in order of ranks."""
    others = [other for other in range(schedule.world) if other != rank]
    sends = [(other, 0, made[other]) for other in others]
    sent, received = link.exchange("home", 1, sends, [(other, 0, likes[other]) for other in others])
    yield from received
    yield from sent
    parts = {other: handle.parts() for other, handle in zip(others, received, strict=True)} | {rank: made[rank]}
    return [parts[other] for other in range(schedule.world)]
