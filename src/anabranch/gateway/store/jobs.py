"""What a store's writer is given to write."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from anabranch.gateway.store.database import Row, Work
from anabranch.gateway.store.records import LedgerRow, Reservation


@dataclass(slots=True, eq=False)
class Job:
    """Something to write, and who waits for it.

    Attributes:
        future: of the event loop; None if nobody waits.
        result, error: what to tell.
        is_tried: the writer has begun with it.
        is_withdrawn: nobody waits for it any more, and it is not to be done.
        is_aside: it failed by itself, which was said, and is tried again from time to time.
    """

    future: "asyncio.Future[Any] | None" = field(default=None, kw_only=True)
    result: Any = field(default=None, kw_only=True)
    error: Exception | None = field(default=None, kw_only=True)
    is_tried: bool = field(default=False, kw_only=True)
    is_withdrawn: bool = field(default=False, kw_only=True)
    is_aside: bool = field(default=False, kw_only=True)


@dataclass(slots=True, eq=False)
class Reserve(Job):
    """Set money aside."""

    reservation: Reservation
    requested: str
    strategy: str


@dataclass(slots=True, eq=False)
class Grow(Job):
    """Set more aside."""

    reservation: Reservation
    nano: int


@dataclass(slots=True, eq=False)
class Unmake(Job):
    """Give back what a reservation has set aside that nobody was told of, if it was made; there is no row of it."""

    reservation: Reservation


@dataclass(slots=True, eq=False)
class Append(Job):
    """Write the row of a request that reserved nothing."""

    row: LedgerRow


@dataclass(slots=True, eq=False)
class Insert(Job):
    """Write a row of another table."""

    table: str
    columns: Sequence[str]
    row: Row


@dataclass(slots=True, eq=False)
class Settle(Job):
    """Replace what was set aside by what was spent, and write the row of the request.

    Attributes:
        also: rows that belong to it, all or none.
        calls: rows of what a strategy asked for it; their cost is spent too.
    """

    reservation: Reservation
    row: LedgerRow
    also: tuple[Insert, ...] = ()
    calls: tuple[LedgerRow, ...] = ()


@dataclass(slots=True, eq=False)
class Do(Job):
    """Run ``work`` in a transaction of its own; without one if it may not have one."""

    work: Work
    in_transaction: bool = True
