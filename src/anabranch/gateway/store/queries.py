"""What is asked of a store: SQL for ledgers, spending, keys and budgets, and how its rows are read."""

import json
import logging
import secrets
from collections.abc import Callable, Sequence
from typing import Any, Literal

from anabranch.errors import InputError
from anabranch.gateway.store import schema
from anabranch.gateway.store.accounts import has, read_budget, spent_since
from anabranch.gateway.store.database import Connection, Row
from anabranch.gateway.store.ledger_rows import read_ledger
from anabranch.gateway.store.period import Period, iso, window
from anabranch.gateway.store.records import (
    Budget,
    DecisionRow,
    FeedbackRow,
    KeyRecord,
    LedgerQuery,
    LedgerRow,
    PreferenceRow,
    Spend,
    parted,
)

logger = logging.getLogger(__name__)

MAX_ROWS = 100_000

# Scores read at a time.
SCORES = 5_000
DAY_US = 86_400 * 10**6
_GROUP = {
    "key": "key_id",
    "user": "owner",
    "team": "team",
    "model": "model",
    "deployment": "deployment",
    "strategy": "strategy",
    "requested": "requested",
    "status": "status",
    "cache": "cache",
    "purpose": "purpose",
    "tag": "tags",
    "day": f"ts_us / {DAY_US}",
}
GROUPS = tuple(_GROUP)


def read_ledger_rows(connection: Connection, query: LedgerQuery) -> list[LedgerRow]:
    """Rows that fit. Raises InputError for a limit that may not be."""
    if not 1 <= query.limit <= MAX_ROWS:
        raise InputError(f"limit is {query.limit}; it must be 1 to {MAX_ROWS:,}")
    parts, values = ["1 = 1"], {}
    for column in ("request_id", "key_id", "team", "model", "strategy", "status", "parent_id"):
        if (value := getattr(query, column)) is not None:
            parts.append(f"{column} = :{column}")
            values[column] = value
    if query.parent_id is not None:
        # So that the index is used.
        parts.append("parent_id <> ''")
    elif not query.calls:
        parts.append("parent_id = ''")
    if query.user is not None:
        parts.append("owner = :owner")
        values["owner"] = query.user
    if query.tag is not None:
        part, more = has("tags", "tag", query.tag)
        parts.append(part)
        values |= more
    bounds = (
        ("ts_us >=", "since_us", query.since_us),
        ("ts_us <", "until_us", query.until_us),
        ("seq <", "before", query.before_seq),
        ("seq >", "after", query.after_seq),
    )
    for comparison, name, bound in bounds:
        if bound is not None:
            parts.append(f"{comparison} :{name}")
            values[name] = bound
    quality = "(SELECT avg(score) FROM feedback WHERE feedback.request_id = ledger.request_id)"
    sql = (
        f"SELECT seq, {', '.join(schema.LEDGER)}, {quality} FROM ledger WHERE {' AND '.join(parts)}"
        f" ORDER BY seq {'DESC' if query.newest_first else 'ASC'} LIMIT {query.limit}"
    )
    return [read_ledger(row) for row in connection.rows(sql, **values)]


def read_spend(connection: Connection, by: Sequence[str], since_us: int | None, until_us: int | None) -> list[Spend]:
    """Totals by group, dearest first; of days, in their order. A row with several tags counts in each of them.

    Calls of strategies count for what they cost, and are no requests.
    """
    for name in by:
        if name not in _GROUP:
            raise InputError(f"spend by {name!r} is not known; use {', '.join(GROUPS)}")
    columns = [_GROUP[name] for name in by]
    sums = ", ".join(
        f"CAST(coalesce(sum({what}), 0) AS BIGINT)"
        for what in (
            "CASE WHEN parent_id = '' THEN 1 ELSE 0 END",
            "CASE WHEN parent_id = '' AND status <> 'ok' THEN 1 ELSE 0 END",
            "cost_nano",
            "prompt_tokens",
            "completion_tokens",
            "cached_tokens",
            "CASE WHEN parent_id = '' THEN 0 ELSE 1 END",
        )
    )
    grouped = f" GROUP BY {', '.join(columns)}" if columns else ""
    sql = f"SELECT {', '.join([*columns, sums])} FROM ledger WHERE ts_us >= :since AND ts_us < :until{grouped}"
    until = 2**62 if until_us is None else until_us
    totals: dict[tuple[str, ...], list[int]] = {}
    for row in connection.rows(sql, since=since_us or 0, until=until):
        for group in _groups(by, row[: len(by)]):
            total = totals.setdefault(group, [0] * 7)
            for place, value in enumerate(row[len(by) :]):
                total[place] += int(value)
    found = [
        Spend(
            group=group,
            requests=total[0],
            errors=total[1],
            cost_nano=total[2],
            prompt_tokens=total[3],
            completion_tokens=total[4],
            cached_tokens=total[5],
            calls=total[6],
        )
        for group, total in totals.items()
        if total[0] or total[6]
    ]
    order: Callable[[Spend], Any] = lambda one: one.group if "day" in by else (-one.cost_nano, one.group)  # noqa: E731
    return sorted(found, key=order)


def spent_by_key(connection: Connection, key_id: str, since_us: int) -> tuple[int, int]:
    """Requests of a key, and nano-dollars of these and of what strategies asked for them."""
    sums = "CAST(coalesce(sum(CASE WHEN parent_id = '' THEN 1 ELSE 0 END), 0) AS BIGINT), CAST(coalesce(sum(cost_nano), 0) AS BIGINT)"
    sql = f"SELECT {sums} FROM ledger WHERE key_id = :key AND ts_us >= :since"
    [(count, nano)] = connection.rows(sql, key=key_id, since=since_us)
    return int(count), int(nano)


def _groups(by: Sequence[str], values: Row) -> list[tuple[str, ...]]:
    groups: list[tuple[str, ...]] = [()]
    for name, value in zip(by, values, strict=True):
        texts = (parted(value) or ("",)) if name == "tag" else (_day(value) if name == "day" else value,)
        groups = [(*group, text) for group in groups for text in texts]
    return groups


def _day(number: Any) -> str:
    return iso(int(number) * DAY_US)[:10]


def read_key(row: Row) -> KeyRecord:
    """A row of keys, in the order of `schema.KEYS`, without its hash."""
    named = dict(zip(schema.KEYS, row, strict=True))
    del named["hash"]
    for name in ("tags", "models", "speaks_for"):
        named[name] = parted(named[name])
    named["user"], named["is_admin"] = named.pop("owner"), bool(named["is_admin"])
    return KeyRecord(**named)


def find_key(connection: Connection, digest: str) -> tuple[str, KeyRecord] | None:
    """The key with this SHA-256, and that hash as it is stored."""
    rows = connection.rows(f"SELECT {', '.join(schema.KEYS)} FROM keys WHERE hash = :hash", hash=digest)
    return (rows[0][1], read_key(rows[0])) if rows else None


def read_keys(connection: Connection) -> list[KeyRecord]:
    """All keys, oldest first."""
    rows = connection.rows(f"SELECT {', '.join(schema.KEYS)} FROM keys ORDER BY created_us, id")
    return [read_key(row) for row in rows]


def read_budgets(connection: Connection, now_us: int, subject: str | None = None) -> list[Budget]:
    """All budgets, or those of one subject, as of now."""
    part, values = ("", {}) if subject is None else (" WHERE subject = :subject", {"subject": subject})
    rows = connection.rows(f"SELECT {', '.join(schema.BUDGETS)} FROM budgets{part} ORDER BY subject, period", **values)
    return [read_budget(connection, row, now_us) for row in rows]


def put_budget(connection: Connection, subject: str, period: Period, limit_nano: int, now_us: int) -> Budget:
    """Set the limit. A new budget counts what the ledger has of the period, and what is reserved now."""
    connection.lock_budgets()
    changed = connection.run(
        "UPDATE budgets SET limit_nano = :limit WHERE subject = :subject AND period = :period",
        limit=limit_nano,
        subject=subject,
        period=period,
    )
    if not changed:
        since = window(period, now_us)[0]
        spent = spent_since(connection, subject, since)
        held, named = has("subjects", "subject", subject)
        reserved = connection.rows(
            f"SELECT CAST(coalesce(sum(nano), 0) AS BIGINT) FROM reservations WHERE {held}", **named
        )[0][0]
        connection.insert("budgets", schema.BUDGETS[1:], [(subject, period, limit_nano, spent, reserved, since)])
    rows = connection.rows(
        f"SELECT {', '.join(schema.BUDGETS)} FROM budgets WHERE subject = :subject AND period = :period",
        subject=subject,
        period=period,
    )
    return read_budget(connection, rows[0], now_us)


def read_decisions(connection: Connection, request_id: str | None, limit: int) -> list[DecisionRow]:
    """Newest first."""
    part = "1 = 1" if request_id is None else "request_id = :request"
    values = {} if request_id is None else {"request": request_id}
    columns = ", ".join(schema.DECISIONS)
    rows = connection.rows(
        f"SELECT {columns} FROM decisions WHERE {part} ORDER BY ts_us DESC LIMIT {int(limit)}", **values
    )
    return [
        DecisionRow(request_id=request, ts_us=ts_us, strategy=strategy, model=model, body=json.loads(body))
        for request, ts_us, strategy, model, body in rows
    ]


def made_secret(connection: Connection, name: str) -> str:
    """A random text of the store's own: of those who make it at once, the first one's stays."""
    made = secrets.token_hex(32)
    sql = "INSERT INTO secrets (name, value) VALUES (:name, :value) ON CONFLICT (name) DO NOTHING"
    connection.run(sql, name=name, value=made)
    return str(connection.rows("SELECT value FROM secrets WHERE name = :name", name=name)[0][0])


def read_bodies(
    connection: Connection, table: str, ids: Sequence[str], column: str = "request_id"
) -> dict[str, dict[str, Any]]:
    """What ``decisions``, ``texts`` or ``collected`` hold under some ids. A row that is damaged is as if it were not there."""
    rows = connection.rows(
        f"SELECT {column}, body FROM {table} WHERE {connection.among(column, 'ids')}", ids=connection.values(ids)
    )
    found = {}
    for id, body in rows:
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            found[id] = value
        else:
            logger.warning("the row %s of %s is damaged and left out", id, table)
    return found


def put_feedback(
    connection: Connection,
    row: Row,
    key_id: str | None,
    once: bool,
    table: Literal["feedback", "preferences"] = "feedback",
) -> tuple[LedgerRow | None, bool]:
    """Keep a row of feedback, or a preference, in the place of what its key said of the request before; the row of the request as it was.

    None if there is no such request, or it was of another key than ``key_id`` (None for an operator). And whether it was kept: not where
    its key has said something before and may do so ``once``. Applied again, it is kept still.
    """
    values = {"request": row[0], "key": row[2]}
    # Until the transaction ends: of two who speak for one key at once, one comes after the other.
    connection.rows(f"SELECT seq FROM ledger WHERE request_id = :request{connection.for_update}", request=row[0])
    found = read_ledger_rows(connection, LedgerQuery(request_id=row[0], key_id=key_id))
    if not found:
        return None, False
    columns = schema.FEEDBACK if table == "feedback" else schema.PREFERENCES
    if once:
        sql = f"SELECT {', '.join(columns)} FROM {table} WHERE request_id = :request AND key_id = :key"
        before = connection.rows(sql, **values)
        if before:
            return found[0], tuple(row) in [tuple(one) for one in before]
    connection.run(f"DELETE FROM {table} WHERE request_id = :request AND key_id = :key", **values)
    connection.insert(table, columns, [row])
    return found[0], True


def read_feedback(connection: Connection, request_id: str | None, limit: int) -> list[FeedbackRow]:
    """Newest first."""
    part = "1 = 1" if request_id is None else "request_id = :request"
    values = {} if request_id is None else {"request": request_id}
    columns = ", ".join(schema.FEEDBACK)
    rows = connection.rows(
        f"SELECT {columns} FROM feedback WHERE {part} ORDER BY seq DESC LIMIT {int(limit)}", **values
    )
    return [FeedbackRow(**dict(zip(schema.FEEDBACK, row, strict=True))) for row in rows]


def read_preferences(connection: Connection, request_id: str | None, limit: int) -> list[PreferenceRow]:
    """Newest first."""
    part = "1 = 1" if request_id is None else "request_id = :request"
    values = {} if request_id is None else {"request": request_id}
    sql = f"SELECT {', '.join(schema.PREFERENCES)} FROM preferences WHERE {part} ORDER BY seq DESC LIMIT {int(limit)}"
    return [PreferenceRow(**dict(zip(schema.PREFERENCES, row, strict=True))) for row in connection.rows(sql, **values)]


def read_new_preferences(connection: Connection, after: int) -> list[Row]:
    """Number, request, who said so, what is better and what is worse, in the order of the numbers."""
    columns = "seq, request_id, key_id, better, worse"
    return connection.rows(
        f"SELECT {columns} FROM preferences WHERE seq > :after ORDER BY seq LIMIT {SCORES}", after=after
    )


def newest_preference(connection: Connection) -> int:
    """Number of the newest one; 0 if there is none."""
    return int(connection.rows("SELECT coalesce(max(seq), 0) FROM preferences")[0][0])


def read_scores(connection: Connection, after: int) -> list[Row]:
    """Number, request, who said so and score, in the order of the numbers."""
    sql = f"SELECT seq, request_id, key_id, score FROM feedback WHERE seq > :after ORDER BY seq LIMIT {SCORES}"
    return connection.rows(sql, after=after)


def newest_score(connection: Connection) -> int:
    """Number of the newest one; 0 if there is none."""
    return int(connection.rows("SELECT coalesce(max(seq), 0) FROM feedback")[0][0])


def delete_before(connection: Connection, before_us: int, most: int) -> int:
    """Delete old rows of all that happened, ``most`` of each table at once; how many were deleted."""
    count = 0
    for table, key in (
        ("ledger", "seq"),
        ("decisions", "request_id"),
        ("texts", "request_id"),
        ("collected", "key"),
        ("feedback", "seq"),
        ("preferences", "seq"),
    ):
        count += connection.run(
            f"DELETE FROM {table} WHERE {key} IN (SELECT {key} FROM {table} WHERE ts_us < :before LIMIT {most})",
            before=before_us,
        )
    # Those that nobody has written since; whoever has them at work lets go of them, and writes that, by their own age.
    count += connection.run(
        "DELETE FROM examples WHERE (strategy, made, key) IN"
        f" (SELECT strategy, made, key FROM examples WHERE ts_us < :before AND body <> '' LIMIT {most})",
        before=before_us,
    )
    return count
