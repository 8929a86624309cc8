"""Who has which block when, and which rows of it travel: what programs run, tests count and `plan` times.

    token_ring   queries travel; partial results return straight to the queries' owner, in the other direction
    ring         keys and values travel (Liu et al. 2023, arXiv 2310.01889)
    ring2        the same in two halves that travel in opposite directions
    all_gather   keys and values of each rank go to every other one at once

Under a causal mask blocks travel downwards, from rank j to j - 1: so in the zigzag layout a block is whole until it has come by rank 0,
and from there on only half of it is wanted. Rows travel no further than to the last rank that wants them: 1.5 c N (N - 1) rows of chunks
of c in zigzag, where all of them would be 2 c N (N - 1).
"""
# Shapes: N ranks, n rows of a rank, Hq and Hk heads, D head width, c rows of a chunk

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from anabranch.cluster.ring.layout import Placement
from anabranch.cluster.ring.pieces import Mask, Piece, Rows, hull, pieces_between
from anabranch.errors import InputError

__all__ = ["RINGS", "Message", "Schedule", "Share", "schedule_of"]

RINGS = ("token_ring", "ring", "ring2", "all_gather")


class Share(NamedTuple):
    """A part of every rank's block that travels by itself.

    Attributes:
        half: which half of the rows; None for all.
        direction: 1 for rank r to r + 1, -1 for r to r - 1.
    """

    half: int | None
    direction: int


class Message(NamedTuple):
    """Rows that one rank sends to another.

    Attributes:
        flow: ``travel``, or ``home`` for what was made of a block, back to its owner.
        step: in which it is sent.
        source, to: ranks.
        rows: of the owner's block.
    """

    flow: Literal["travel", "home"]
    step: int
    source: int
    to: int
    rows: Rows


@dataclass(frozen=True)
class Schedule:
    """One scheme on one placement of queries and keys.

    Attributes:
        scheme: see the top of the file.
        queries, keys: where they are.
        mask: what queries see.

    Raises InputError for a scheme that is none, or placements on different numbers of ranks.
    """

    scheme: str
    queries: Placement
    keys: Placement
    mask: Mask
    _found: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.scheme not in RINGS:
            raise InputError(f"scheme is {self.scheme!r}; use {', '.join(RINGS)}")
        if self.queries.world != self.keys.world:
            raise InputError(f"queries are on {self.queries.world} ranks and keys on {self.keys.world}")

    @property
    def world(self) -> int:
        """N."""
        return self.queries.world

    @property
    def moves_queries(self) -> bool:
        """Whether queries travel, and not keys and values."""
        return self.scheme == "token_ring"

    @property
    def is_direct(self) -> bool:
        """Whether a block goes from its owner to everyone, and not from rank to rank."""
        return self.scheme == "all_gather"

    @property
    def shares(self) -> tuple[Share, ...]:
        """The parts of a block that travel by themselves."""
        direction = -1 if self.mask.causal else 1
        if self.scheme == "ring2":
            return (Share(0, direction), Share(1, -direction))
        return (Share(None, direction),)

    def rows_of(self, share: Share, owner: int) -> Rows:
        """The rows of the owner's block that are this share."""
        rows = (self.queries if self.moves_queries else self.keys).rows[owner]
        half = (rows + 1) // 2
        return (0, rows) if share.half is None else ((0, half), (half, rows))[share.half]

    def owner(self, share: Share, rank: int, step: int) -> int:
        """Whose block ``rank`` has at ``step``."""
        return (rank - share.direction * step) % self.world

    def visitor(self, share: Share, owner: int, step: int) -> int:
        """Who has the block of ``owner`` at ``step``."""
        return (owner + share.direction * step) % self.world

    def pieces(self, share: Share, owner: int, rank: int) -> tuple[Piece, ...]:
        """The work at ``rank`` on the share of ``owner``; rows count from the beginnings of the blocks."""
        found: tuple[Piece, ...] = self._once(("pieces", share, owner, rank), lambda: self._pieces(share, owner, rank))
        return found

    def wanted(self, share: Share, owner: int, rank: int) -> Rows | None:
        """The rows of the share of ``owner`` that ``rank`` works on; None for none."""
        pieces = self.pieces(share, owner, rank)
        found: Rows | None = self._once(
            ("wanted", share, owner, rank),
            lambda: hull(piece.rows if self.moves_queries else piece.keys for piece in pieces),
        )
        return found

    def hop(self, share: Share, owner: int, step: int) -> Rows | None:
        """The rows that arrive at step ``step`` + 1 at `visitor`: those that are wanted there or further on."""
        hops: list[Rows | None] = self._once(("hops", share, owner), lambda: self._hops(share, owner))
        return hops[step]

    def pairs(self, rank: int, step: int) -> int:
        """Pairs of query and key that ``rank`` computes at ``step``, for one head."""
        found: int = self._once(("pairs", rank, step), lambda: self._pairs(rank, step))
        return found

    def _pairs(self, rank: int, step: int) -> int:
        work = (self.pieces(share, self.owner(share, rank, step), rank) for share in self.shares)
        return sum(piece.pairs for pieces in work for piece in pieces)

    def messages(self, *, brings_home: bool) -> Iterator[Message]:
        """All messages of a pass, by step; ``brings_home`` says whether something is made for the owner of a block."""
        for step in range(self.world):
            for share in self.shares:
                for owner in range(self.world):
                    yield from self._messages_of(share, owner, step, brings_home)

    def _messages_of(self, share: Share, owner: int, step: int, brings_home: bool) -> Iterator[Message]:
        here, rows = self.visitor(share, owner, step), self.hop(share, owner, step)
        if rows is not None:
            source = owner if self.is_direct else here
            yield Message("travel", step, source, self.visitor(share, owner, step + 1), rows)
        home = self.wanted(share, owner, here)
        if brings_home and step and home is not None:
            yield Message("home", step, here, owner, home)

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What is worked out at the first time it is asked for."""
        if key not in self._found:
            self._found[key] = make()
        return self._found[key]

    def _pieces(self, share: Share, owner: int, rank: int) -> tuple[Piece, ...]:
        first, last = self.rows_of(share, owner)
        placed = self.queries if self.moves_queries else self.keys
        moving = tuple(run.within(first, last) for run in placed.runs[owner])
        if self.moves_queries:
            return pieces_between(moving, self.keys.runs[rank], self.mask)
        return pieces_between(self.queries.runs[rank], moving, self.mask)

    def _hops(self, share: Share, owner: int) -> list[Rows | None]:
        """Of each step; from the last on, as what goes further on has come before."""
        rows: Rows | None = None
        hops: list[Rows | None] = [None]
        for step in range(self.world - 1, 0, -1):
            wanted = self.wanted(share, owner, self.visitor(share, owner, step))
            rows = wanted if self.is_direct else hull(one for one in (rows, wanted) if one is not None)
            hops.append(rows)
        return hops[::-1]


@lru_cache(maxsize=32)
def schedule_of(scheme: str, queries: Placement, keys: Placement, mask: Mask) -> Schedule:
    """The `Schedule`, which remembers what it worked out: layers and steps of a training ask for the same again and again."""
    return Schedule(scheme, queries, keys, mask)
