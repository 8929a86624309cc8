"""What a writer does with the jobs that have gathered: one transaction for all, decided in the order they came.

Every job may be applied again without harm, since a commit whose answer was lost may have happened: a reservation that is there was
made, one that is gone was settled, a request that is in the ledger has ended.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

from anabranch.errors import BudgetError, DataError, InputError
from anabranch.gateway.store import schema
from anabranch.gateway.store.accounts import Account, account_of
from anabranch.gateway.store.database import Connection, Database, Row
from anabranch.gateway.store.jobs import Append, Grow, Insert, Job, Reserve, Settle, Unmake
from anabranch.gateway.store.ledger_rows import ledger_values, owners
from anabranch.gateway.store.period import iso
from anabranch.gateway.store.records import GLOBAL, LedgerRow, Reservation, clean, joined, parted
from anabranch.routers.money import in_full

logger = logging.getLogger(__name__)

# Nano-dollars spent in one period, as an integer of a database holds them.
MOST_SPENT = 2**62

# Reservations settled in one transaction.
RECOVERED = 500
# What a row says of a request whose process is gone, and of one that was only taken for such.
CRASHED, CORRECTED = "crashed", "corrected"


def apply(connection: Connection, jobs: Sequence[Job], replica: str, now_us: int) -> None:
    """Do all jobs but `Do`, and set their results. Raises BusyError, and nothing or everything was written."""
    connection.begin()
    books = _Books(connection, jobs, replica, now_us)
    for job in jobs:
        job.result, job.error = None, None
        try:
            books.take(job)
        except (BudgetError, InputError, DataError) as error:
            job.error = error
    books.write()
    connection.commit()


class _Books:
    """Accounts and reservations that some jobs touch, locked, and what they will be."""

    def __init__(self, connection: Connection, jobs: Sequence[Job], replica: str, now_us: int) -> None:
        self.connection, self.replica, self.now_us = connection, replica, now_us
        moving = [job for job in jobs if isinstance(job, Reserve | Grow | Unmake | Settle)]
        self.accounts: dict[str, list[Account]] = {}
        # Request -> nano.
        self.open: dict[str, int] = {}
        self.closed: set[str] = set()
        self.foreign: set[str] = set()
        # Requests that were settled as left behind: nano, when, what was asked for, and the strategy.
        self.given_up: dict[str, tuple[int, int, str, str]] = {}
        if moving:
            self._lock({subject for job in moving for subject in job.reservation.subjects})
            self._look([job.reservation.request_id for job in moving])
        self.new: dict[str, Row] = {}
        self.grown: dict[str, int] = {}
        self.gone: list[str] = []
        self.revived: list[str] = []
        self.ledger: list[Row] = []
        self.inserts: dict[str, tuple[Sequence[str], list[Row]]] = {}

    def _lock(self, subjects: set[str]) -> None:
        columns = ", ".join(schema.BUDGETS)
        found = self.connection.rows(
            f"SELECT {columns} FROM budgets WHERE {self.connection.among('subject', 'subjects')} ORDER BY id"
            + self.connection.for_update,
            subjects=self.connection.values(sorted(subjects)),
        )
        for row in found:
            account = account_of(self.connection, row, self.now_us)
            self.accounts.setdefault(account.subject, []).append(account)

    def _look(self, requests: list[str]) -> None:
        among, values = self.connection.among("request_id", "requests"), self.connection.values(requests)
        # Locked, so that of two who settle a request one sees what the other has done.
        held = self.connection.rows(
            f"SELECT request_id, nano, replica FROM reservations WHERE {among} ORDER BY request_id"
            + self.connection.for_update,
            requests=values,
        )
        for request, nano, replica in held:
            self.open[request] = nano
            if replica != self.replica:
                self.foreign.add(request)
        ended = self.connection.rows(
            f"SELECT request_id, status, cost_nano, ts_us, requested, strategy FROM ledger WHERE {among}",
            requests=values,
        )
        for request, status, nano, ts_us, requested, strategy in ended:
            self.closed.add(request)
            if status == CRASHED:
                self.given_up[request] = (nano, ts_us, requested, strategy)

    def _of(self, subjects: Sequence[str]) -> list[Account]:
        return [account for subject in subjects for account in self.accounts.get(subject, ())]

    def take(self, job: Job) -> None:
        if isinstance(job, Reserve):
            job.result = self._reserve(job)
        elif isinstance(job, Settle):
            self._settle(job)
        elif isinstance(job, Grow):
            job.result = self._grow(job)
        elif isinstance(job, Unmake):
            self._unmake(job)
        elif isinstance(job, Append):
            self.ledger.append(ledger_values(replace(job.row, ts_us=self.now_us)))
        elif isinstance(job, Insert):
            self._insert(job)

    def _insert(self, job: Insert) -> None:
        self.inserts.setdefault(job.table, (job.columns, []))[1].append(job.row)

    def _reserve(self, job: Reserve) -> Reservation:
        made = job.reservation
        if made.request_id in self.closed or made.request_id in self.foreign:
            raise InputError(f"the request id {made.request_id!r} was used before; ids of requests must differ")
        if made.request_id not in self.open:
            self._set_aside(made.subjects, made.nano)
            self.open[made.request_id] = made.nano
            self.new[made.request_id] = (
                made.request_id,
                self.replica,
                self.now_us,
                made.nano,
                joined(made.subjects),
                clean(job.requested),
                clean(job.strategy),
            )
        return made

    def _grow(self, job: Grow) -> Reservation:
        request = job.reservation.request_id
        self._revive(job.reservation)
        if request not in self.open:
            raise DataError(f"the reservation of request {request!r} is gone; it was settled already")
        if job.nano > self.open[request]:
            self._set_aside(job.reservation.subjects, job.nano - self.open[request])
            self.open[request] = self.grown[request] = job.nano
        return replace(job.reservation, nano=self.open[request])

    def _unmake(self, job: Unmake) -> None:
        request = job.reservation.request_id
        self._revive(job.reservation)
        nano = self.open.pop(request, None)
        if nano is None:
            return
        for one in self._of(job.reservation.subjects):
            one.reserved -= nano
            one.is_changed = True
        self.gone.append(request)

    def _set_aside(self, subjects: Sequence[str], nano: int) -> None:
        accounts = self._of(subjects)
        full = [one for one in accounts if one.spent + one.reserved + nano > one.limit]
        if full:
            raise _refusal(max(full, key=lambda one: (one.resets is None, one.resets or 0)), nano, self.now_us)
        for one in accounts:
            one.reserved += nano
            one.is_changed = True

    def _settle(self, job: Settle) -> None:
        request = job.reservation.request_id
        flags = job.row.flags
        if job.row.status != CRASHED and self._revive(job.reservation):
            flags = (*flags, CORRECTED)
        nano = self.open.pop(request, None)
        if nano is None:
            logger.warning(
                "request %s was settled before; what it says now (%d nano-dollars) is not written",
                request,
                job.row.cost_nano,
            )
            return
        calls_nano = sum(call.cost_nano for call in job.calls)
        total_nano = job.row.cost_nano + calls_nano
        for one in self._of(job.reservation.subjects):
            one.reserved -= nano
            # Beyond that no database counts; no limit is near it.
            one.spent = min(one.spent + total_nano, MOST_SPENT)
            one.is_changed = True
        self.gone.append(request)
        self.closed.add(request)
        if total_nano > nano:
            flags = (*flags, "over_reserved")
        whose = owners(job.reservation.subjects)
        for call in job.calls:
            self.ledger.append(ledger_values(replace(call, ts_us=self.now_us, parent_id=request, **whose)))
        row = replace(
            job.row,
            ts_us=self.now_us,
            reserved_nano=nano,
            flags=flags,
            calls=len(job.calls),
            calls_nano=calls_nano,
            **whose,
        )
        self.ledger.append(ledger_values(row))
        for insert in job.also:
            self._insert(insert)

    def _revive(self, reservation: Reservation) -> bool:
        """A request that was taken for left behind goes on: what was charged for it is only held again. Whether it was so."""
        request = reservation.request_id
        if request not in self.given_up:
            return False
        nano, ts_us, requested, strategy = self.given_up.pop(request)
        for one in self._of(reservation.subjects):
            # What was charged in a period that is over went with it.
            if ts_us >= one.since:
                one.spent -= nano
            one.reserved += nano
            one.is_changed = True
        self.closed.discard(request)
        self.open[request] = nano
        self.revived.append(request)
        self.new[request] = (
            request,
            self.replica,
            self.now_us,
            nano,
            joined(reservation.subjects),
            requested,
            strategy,
        )
        logger.warning("request %s had been taken for left behind, and goes on", request)
        return True

    def write(self) -> None:
        connection, gone = self.connection, set(self.gone)
        connection.insert(
            "reservations", schema.RESERVATIONS, [row for key, row in self.new.items() if key not in gone]
        )
        for request, nano in self.grown.items():
            connection.run("UPDATE reservations SET nano = :nano WHERE request_id = :id", nano=nano, id=request)
        if gone:
            connection.run(
                f"DELETE FROM reservations WHERE {connection.among('request_id', 'gone')}",
                gone=connection.values(self.gone),
            )
        if self.revived:
            connection.run(
                f"DELETE FROM ledger WHERE {connection.among('request_id', 'revived')} AND status = :status",
                revived=connection.values(self.revived),
                status=CRASHED,
            )
        added = connection.insert("ledger", schema.LEDGER, self.ledger)
        if added < len(self.ledger):
            logger.warning("%d rows were in the ledger already and are not written again", len(self.ledger) - added)
        changed = [
            (one.id, one.spent, one.reserved, one.since)
            for accounts in self.accounts.values()
            for one in accounts
            if one.is_changed
        ]
        if changed:
            connection.update("budgets", ("id", "spent_nano", "reserved_nano", "window_us"), changed)
        for table, (columns, rows) in self.inserts.items():
            connection.insert(table, columns, rows)


def recover(database: Database, connection: Connection, now_us: int) -> int:
    """Settle what processes that are gone had reserved, at what was reserved, since what they spent of it is not known; how many."""
    count = 0
    columns = "request_id, nano, subjects, requested, strategy"
    for replica in database.dead(connection):
        while True:
            found = connection.rows(
                f"SELECT {columns} FROM reservations WHERE replica = :replica LIMIT {RECOVERED}", replica=replica
            )
            if not found:
                break
            apply(connection, [_left_behind(row) for row in found], replica, now_us)
            count += len(found)
    return count


def _left_behind(row: Row) -> Settle:
    request, nano, subjects, requested, strategy = row
    ended = LedgerRow(
        request_id=request,
        requested=requested,
        strategy=strategy,
        cost_nano=nano,
        status=CRASHED,
        flags=("recovered",),
    )
    return Settle(Reservation(request, parted(subjects), nano), ended)


def _refusal(account: Account, nano: int, now_us: int) -> BudgetError:
    left = max(0, account.limit - account.spent - account.reserved)
    whose = "everyone" if account.subject == GLOBAL else " ".join(account.subject.split(":", 1))
    when = f"; it begins anew at {iso(account.resets)}" if account.resets is not None else ""
    fits = nano <= account.limit
    message = (
        f"the {account.period} budget of {whose} has {in_full(left)} of {in_full(account.limit)} left, and this request may cost "
        f"{in_full(nano)}" + (when if fits else "; it is more than the whole budget")
    )
    if not fits:
        retry = None
    elif account.spent + nano <= account.limit:
        # What is in the way is only reserved, and may come back soon.
        retry = 1.0
    else:
        retry = None if account.resets is None else max(1.0, (account.resets - now_us) / 1e6)
    return BudgetError(
        message,
        subject=account.subject,
        period=account.period,
        limit_nano=account.limit,
        remaining_nano=left,
        resets_s=None if account.resets is None else account.resets / 1e6,
        retry_after_s=retry,
    )
