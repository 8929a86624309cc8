"""Budgets as of now: in which period a row of their table stands, and which rows of the ledger count against it."""

from dataclasses import dataclass
from typing import Any

from anabranch.gateway.store.database import Connection, Row
from anabranch.gateway.store.period import SECOND_US, Period, window
from anabranch.gateway.store.records import GLOBAL, Budget, joined

# Of a WHERE, with its values.
Part = tuple[str, dict[str, Any]]
_COLUMN = {"key": "key_id", "user": "owner", "team": "team"}

# Clocks of replicas may differ by so much. A period that begins later than that has not begun.
AHEAD_US = 300 * SECOND_US
MARK_US = 1


@dataclass(slots=True)
class Account:
    """A budget inside a transaction."""

    id: int
    subject: str
    period: Period
    limit: int
    spent: int
    reserved: int
    since: int
    resets: int | None
    is_changed: bool = False


def in_scope(subject: str) -> Part:
    """Rows of the ledger that count against a budget of ``subject``."""
    scope, _, name = subject.partition(":")
    if scope == GLOBAL:
        return "1 = 1", {}
    if scope == "tag":
        return has("tags", "name", name)
    return f"{_COLUMN[scope]} = :name", {"name": name}


def has(column: str, value: str, name: str) -> Part:
    """``column``, made by `joined`, holds ``name``. Unlike LIKE, this minds upper and lower case, and no sign means another."""
    return f"replace({column}, :{value}, '') <> {column}", {value: joined([name])}


def spent_since(connection: Connection, subject: str, since_us: int, until_us: int | None = None) -> int:
    """Nano-dollars, as the ledger has them; without ``until_us`` also those that a clock that ran ahead wrote down."""
    part, values = in_scope(subject)
    sql = f"SELECT CAST(coalesce(sum(cost_nano), 0) AS BIGINT) FROM ledger WHERE ts_us >= :since AND ts_us < :until AND {part}"
    until = 2**62 if until_us is None else until_us
    return int(connection.rows(sql, since=since_us, until=until, **values)[0][0])


def account_of(connection: Connection, row: Row, now_us: int) -> Account:
    """A row of the table of budgets, its period begun anew where that is over.

    Where its period is still to come, since a clock ran ahead (or this one runs behind), the present one is taken up again, with what the
    ledger has of it. It is marked by a beginning of a microsecond later: at its end the ledger is asked again, so that nothing that was
    spent in the next one is forgotten, whichever clock was wrong. Otherwise a new period begins with nothing spent.
    """
    number, subject, period, limit, spent, reserved, since = row
    start, end = window(period, now_us)
    if since > now_us + AHEAD_US:
        spent, since = spent_since(connection, subject, start), start + MARK_US
    elif start > since:
        is_marked = since != window(period, since)[0]
        spent, since = (spent_since(connection, subject, start, end) if is_marked else 0), start
    return Account(number, subject, period, limit, spent, reserved, since, window(period, since)[1])


def read_budget(connection: Connection, row: Row, now_us: int) -> Budget:
    """A row of the table of budgets as of now."""
    one = account_of(connection, row, now_us)
    return Budget(
        id=one.id,
        subject=one.subject,
        period=one.period,
        limit_nano=one.limit,
        spent_nano=one.spent,
        reserved_nano=one.reserved,
        window_us=window(one.period, one.since)[0],
        resets_us=one.resets,
    )
