"""Money in a `Store`: what is set aside for requests, what they cost, and the budgets that both count against.

Budgets are decided in the writer's thread, on rows that nobody else can touch, so they are exact over any number of processes.
"""

import asyncio
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from anabranch.bounds import is_whole, shown
from anabranch.errors import CapacityError, InputError
from anabranch.gateway.store import queries, schema
from anabranch.gateway.store.database import Connection, Database
from anabranch.gateway.store.jobs import Append, Grow, Insert, Reserve, Settle, Unmake
from anabranch.gateway.store.period import check_period
from anabranch.gateway.store.records import Budget, CollectedRow, LedgerRow, Reservation, check_subject, listed
from anabranch.gateway.store.store_keys import StoreKeys
from anabranch.routers.money import MOST_NANO

logger = logging.getLogger(__name__)
REQUEST_CHARACTERS = 128


class StoreMoney(StoreKeys):
    """Reservations, settlements and budgets."""

    def __init__(self, database: Database, *, serves: bool = True, clock: Callable[[], float] = time.time) -> None:
        super().__init__(database, serves=serves, clock=clock)
        # Ids of requests that have money set aside here.
        self._open = set[str]()

    async def reserve(
        self, request_id: str, subjects: Sequence[str], nano: int, *, requested: str = "", strategy: str = ""
    ) -> Reservation:
        """Set aside the most that a request may cost, in every budget of its subjects or in none. It is committed on return.

        Args:
            request_id: unique for ever; it names the row in the ledger.
            subjects: of `subjects_of`.
            nano: nano-dollars.
            requested, strategy: for the ledger, should this process end before the request does.

        Raises BudgetError if a budget has no room, InputError for an id that was used before, CapacityError if the store could not write
        for `PATIENCE_S`.
        """
        assert self._serves
        if not (request_id.isascii() and request_id.isprintable() and 0 < len(request_id) <= REQUEST_CHARACTERS):
            raise InputError(
                f"the request id is {request_id!r}; it must be 1 to {REQUEST_CHARACTERS} printable ASCII characters"
            )
        if request_id in self._open:
            raise InputError(f"the request id {request_id!r} is in use; ids of requests must differ")
        subjects = tuple(dict.fromkeys(listed("subjects", subjects)))
        reservation = Reservation(request_id, subjects, _money("a reservation", nano))
        self._open.add(request_id)
        job = Reserve(reservation, requested, strategy)
        try:
            await self._writer.done(job)
        except (asyncio.CancelledError, CapacityError) as error:
            assert job.future is not None
            is_refused = isinstance(error, CapacityError)
            job.future.add_done_callback(lambda done: self._unwanted(done, reservation, is_refused))
            raise
        except Exception:
            self._open.discard(request_id)
            raise
        return reservation

    def _unwanted(self, done: "asyncio.Future[Any]", reservation: Reservation, is_refused: bool) -> None:
        """Whoever asked for it is gone, or was told that it cannot be made: give it back as soon as it is there."""
        if done.cancelled() or done.exception() is not None or is_refused:
            self._open.discard(reservation.request_id)
            if not done.cancelled() and done.exception() is None:
                self._writer.give(Unmake(reservation), at_once=False)
        else:
            self.release(reservation, LedgerRow(request_id=reservation.request_id, status="cancelled"))

    async def grow(self, reservation: Reservation, nano: int) -> Reservation:
        """Set aside ``nano`` in all, if that is more: for a dearer fallback, or a second attempt that is paid too.

        Raises BudgetError or, if the store cannot write, CapacityError, and the reservation is as it was.
        """
        return await self._writer.done(Grow(reservation, _money("a reservation", nano)))

    def settle(
        self,
        reservation: Reservation,
        row: LedgerRow,
        collected: CollectedRow | None = None,
        calls: Sequence[LedgerRow] = (),
    ) -> "asyncio.Future[Any]":
        """End a request: what it cost takes the place of what was set aside, and its row is written.

        With it what was ``collected``: there is no moment at which it is paid for and not to be found. And with it the ``calls`` that a
        strategy made for it, whose cost is not in ``row``.

        A cost above the reservation is charged in full and flagged, since the money is spent: reserve the worst case. One above all that
        can be paid (`MOST_NANO`) is charged that much and flagged ``capped``: whatever an upstream says, the request has its row.

        Returns what may be awaited until it is committed, which happens anyway. A second settlement of a request is ignored.
        """
        assert row.request_id == reservation.request_id, (row.request_id, reservation.request_id)
        row, calls = _payable(row, calls)
        self._open.discard(row.request_id)
        also: tuple[Insert, ...] = ()
        if collected is not None:
            body = json.dumps(collected.body, separators=(",", ":"))
            also = (Insert("collected", schema.COLLECTED, (collected.key, collected.ts_us, body)),)
        return self._writer.give(Settle(reservation, row, also, calls), at_once=False)

    def release(self, reservation: Reservation, row: LedgerRow) -> "asyncio.Future[Any]":
        """`settle` for a request that cost nothing."""
        assert row.cost_nano == 0
        return self.settle(reservation, row)

    def append(self, row: LedgerRow) -> "asyncio.Future[Any]":
        """The row of a request that ended without a reservation: refused, or answered from a cache."""
        if row.cost_nano:
            raise InputError(
                f"a request without a reservation cost {row.cost_nano} nano-dollars; reserve before calling"
            )
        return self._writer.give(Append(row), at_once=False)

    # Budgets

    async def budgets(self, subject: str | None = None) -> list[Budget]:
        """All budgets, or those of one subject, as they stand now."""
        return await self._read(lambda connection: queries.read_budgets(connection, self._now_us(), subject))

    async def has_budget(self, subjects: Sequence[str]) -> bool:
        """Whether one of the subjects has a budget."""

        def work(connection: Connection) -> bool:
            condition = connection.among("subject", "subjects")
            values = connection.values(sorted(subjects))
            return bool(connection.rows(f"SELECT 1 FROM budgets WHERE {condition} LIMIT 1", subjects=values))

        return await self._ask(work)

    async def set_budget(self, subject: str, limit_nano: int, period: str = "total") -> Budget:
        """Set a limit on what may be spent for ``subject`` in each period. What was spent in the current one counts.

        Raises InputError for a subject, period or limit that may not be.
        """
        subject, span, limit = check_subject(subject), check_period(period), _money("a limit", limit_nano)
        now_us = self._now_us()
        return await self._do(lambda connection: queries.put_budget(connection, subject, span, limit, now_us))

    async def remove_budget(self, subject: str, period: str = "total") -> bool:
        """Lift a limit; whether there was one.

        Args:
            subject: as `budgets` shows it, or as `named_subject` takes it.
            period: of it.

        Raises InputError for a subject or a period that may not be, UnknownKeyError for a key that is not there.
        """
        subject, span = check_subject(subject), check_period(period)
        # As it stands: a limit that was set for a key that was never there can be lifted.
        if not await self.budgets(subject):
            subject = await self.named_subject(subject)

        def work(connection: Connection) -> bool:
            connection.lock_budgets()
            sql = "DELETE FROM budgets WHERE subject = :subject AND period = :period"
            return bool(connection.run(sql, subject=subject, period=span))

        return await self._do(work)


def _payable(row: LedgerRow, calls: Sequence[LedgerRow]) -> tuple[LedgerRow, tuple[LedgerRow, ...]]:
    """A row and its calls as they are; where they cost more than can be paid, each what is left of that."""
    rows, left, is_capped = [], MOST_NANO, False
    for one in (row, *calls):
        nano = min(max(one.cost_nano, 0), left)
        is_capped = is_capped or nano != one.cost_nano
        rows.append(one if nano == one.cost_nano else replace(one, cost_nano=nano))
        left -= nano
    if is_capped:
        logger.error("request %s costs more than can be paid; it is charged %d nano-dollars", row.request_id, MOST_NANO)
        rows[0] = replace(rows[0], flags=(*rows[0].flags, "capped"))
    return rows[0], tuple(rows[1:])


def _money(what: str, nano: int) -> int:
    if not is_whole(nano) or not 0 <= nano <= MOST_NANO:
        raise InputError(f"{what} is {shown(nano)}; it must be whole nano-dollars from 0 to {MOST_NANO:,}")
    return nano
