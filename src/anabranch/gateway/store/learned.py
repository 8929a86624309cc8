"""What strategies have learned, as the store keeps it: rows of bytes by strategy, by what it was made from, and by who learned it.

Who writes says which rows of others it has read: if one is newer, nothing is written, and it reads again. So of all that processes agree on
by writing, the first is seen by all.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from anabranch.gateway.store import schema
from anabranch.gateway.store.database import Connection
from anabranch.gateway.store.speaking import own_name

# Writer of what no process that is alive goes on with.
NOBODY = ""

# How the keys of pairs begin that a person judges, among what was collected (see `collect.labels`).
LABEL = "label:"

# And those of whole outcomes of a question: what every model that was compared said, and what that is worth.
OUTCOME = "outcome:"

# A field of those of conversations: the operator vouches for what stands before the last text (``conversations`` of `ShadowConfig`).
VOUCHED = "vouched"


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedRow:
    """What one process has learned with one strategy.

    Attributes:
        strategy: its name in the config.
        made: digest of what it was made from; what was learned with another config has another.
        writer: of the process, or `NOBODY`.
        kind: of the strategy, for people.
        version: counts the writes of the row.
        ts_us: when it was written last.
        body: what was learned.
    """

    strategy: str
    made: str
    writer: str
    kind: str
    version: int
    ts_us: int
    body: bytes


def read_marks(connection: Connection, strategy: str, made: str) -> dict[str, int]:
    """Version of each writer's row."""
    sql = "SELECT writer, version FROM learned WHERE strategy = :strategy AND made = :made"
    return dict(connection.rows(sql, strategy=strategy, made=made))


def read_learned(connection: Connection, strategy: str, made: str) -> list[LearnedRow]:
    """All rows, the newest last."""
    sql = f"SELECT {', '.join(schema.LEARNED)} FROM learned WHERE strategy = :strategy AND made = :made ORDER BY ts_us, writer"
    rows = connection.rows(sql, strategy=strategy, made=made)
    found = [dict(zip(schema.LEARNED, row, strict=True)) for row in rows]
    return [LearnedRow(**{**row, "body": bytes(row["body"])}) for row in found]


def others_of(connection: Connection, strategy: str) -> int:
    """How many rows there are of a strategy, whatever it was made from."""
    return int(connection.rows("SELECT count(*) FROM learned WHERE strategy = :strategy", strategy=strategy)[0][0])


def put_learned(connection: Connection, row: LearnedRow, seen: Mapping[str, int] | None) -> bool:
    """Write a row in place of the writer's last one, its version counted on; whether it was written.

    Args:
        connection: in a transaction.
        row: to write.
        seen: versions of all others that were read; None does not mind. Where the writer's own row has become part of nobody's, that has
            another version than was read.
    """
    connection.lock("learned")
    marks = read_marks(connection, row.strategy, row.made)
    last = marks.pop(row.writer, 0)
    if seen is not None and marks != seen:
        return False
    columns = ", ".join(schema.LEARNED)
    marks_sql = ", ".join(f":{name}" for name in schema.LEARNED)
    changes = ", ".join(f"{name} = excluded.{name}" for name in ("kind", "version", "ts_us", "body"))
    connection.run(
        f"INSERT INTO learned ({columns}) VALUES ({marks_sql}) ON CONFLICT (strategy, made, writer) DO UPDATE SET {changes}",
        **{name: getattr(row, name) for name in schema.LEARNED} | {"version": max(last + 1, row.version)},
    )
    return True


def read_leaving(connection: Connection, strategy: str, made: str, writer: str) -> list[LearnedRow]:
    """What `leave_learned` is told of: the row of a writer and that of nobody, as far as they are there."""
    return [row for row in read_learned(connection, strategy, made) if row.writer in (writer, NOBODY)]


def leave_learned(connection: Connection, rows: Sequence[LearnedRow], writer: str, body: bytes, now_us: int) -> bool:
    """Make the row of a writer that ends, or has ended, part of that of nobody; whether that is done, or need not be any more.

    It is there once, whoever else does the same: who comes second finds no row of the writer any more.

    Args:
        connection: in a transaction.
        rows: see `read_leaving`; where another is there by now, nothing is changed.
        writer: whose row goes.
        body: of all of them. Of one alone it is made too: what cannot be read must not become nobody's, which all others are joined with.
        now_us: the time.
    """
    connection.lock("learned")
    strategy, made = rows[0].strategy, rows[0].made
    marks = read_marks(connection, strategy, made)
    if writer not in marks:
        return True
    if {row.writer: row.version for row in rows} != {who: marks[who] for who in (writer, NOBODY) if who in marks}:
        return False
    version = 1 + max(row.version for row in rows)
    left = LearnedRow(
        strategy=strategy, made=made, writer=NOBODY, kind=rows[0].kind, version=version, ts_us=now_us, body=body
    )
    put_learned(connection, left, None)
    _delete(connection, strategy, made, writer)
    return True


def move_learned(connection: Connection, strategy: str, made: str, new_made: str) -> int:
    """Put the rows of one make under another, which has none of these writers; how many there were."""
    connection.lock("learned")
    return connection.run(
        "UPDATE learned SET made = :new WHERE strategy = :strategy AND made = :made",
        strategy=strategy,
        made=made,
        new=new_made,
    )


def put_aside(connection: Connection, strategy: str, made: str, aside: str, versions: Mapping[str, int]) -> int:
    """Put rows, as they were read, under another make, which has none of these writers; how many there still were.

    Args:
        connection: in a transaction.
        strategy: whose.
        made: where they are.
        aside: where they go.
        versions: of the rows, by their writers; one that was written anew since stays.
    """
    connection.lock("learned")
    return sum(
        connection.run(
            "UPDATE learned SET made = :aside"
            " WHERE strategy = :strategy AND made = :made AND writer = :writer AND version = :version",
            aside=aside,
            strategy=strategy,
            made=made,
            writer=writer,
            version=version,
        )
        for writer, version in versions.items()
    )


def _delete(connection: Connection, strategy: str, made: str, writer: str) -> None:
    connection.run(
        "DELETE FROM learned WHERE strategy = :strategy AND made = :made AND writer = :writer",
        strategy=strategy,
        made=made,
        writer=writer,
    )


def delete_older(connection: Connection, strategy: str, made: str, before_us: int) -> int:
    """Delete rows that were written before, but for the newest."""
    return connection.run(
        "DELETE FROM learned WHERE strategy = :strategy AND made = :made AND ts_us < :before AND ts_us <"
        " (SELECT max(ts_us) FROM learned WHERE strategy = :strategy AND made = :made)",
        strategy=strategy,
        made=made,
        before=before_us,
    )


# Orders to forget


def put_erasure(connection: Connection, body: str, now_us: int, before_us: int) -> int:
    """Write an order, and delete those of before; its number."""
    connection.lock("erasures")
    # The last one stays: numbers go on from it.
    last = newest_erasure(connection)
    connection.run("DELETE FROM erasures WHERE ts_us < :before AND seq < :last", before=before_us, last=last)
    number = last + 1
    connection.run(
        "INSERT INTO erasures (seq, ts_us, body) VALUES (:seq, :ts, :body)", seq=number, ts=now_us, body=body
    )
    return number


def read_erasures(connection: Connection, after: int, since_us: int = 0) -> list[tuple[int, int, str]]:
    """Number, time and body of orders, in their order."""
    sql = "SELECT seq, ts_us, body FROM erasures WHERE seq > :after AND ts_us >= :since ORDER BY seq"
    return connection.rows(sql, after=after, since=since_us)


def newest_erasure(connection: Connection) -> int:
    """Number of the newest order; 0 if there is none."""
    return int(connection.rows("SELECT coalesce(max(seq), 0) FROM erasures")[0][0])


def delete_before(connection: Connection, strategy: str, before_us: int) -> int:
    """Delete what was learned with a strategy and written before."""
    return connection.run(
        "DELETE FROM learned WHERE strategy = :strategy AND ts_us < :before", strategy=strategy, before=before_us
    )


def delete_own(connection: Connection, strategy: str, replica: str) -> int:
    """Delete what one process wrote of what was learned with a strategy."""
    own = f"{replica}."
    return connection.run(
        "DELETE FROM learned WHERE strategy = :strategy AND substr(writer, 1, :length) = :own",
        strategy=strategy,
        length=len(own),
        own=own,
    )


# What is kept one by one

# Rows read at a time.
EXAMPLES = 1000


def put_examples(
    connection: Connection, strategy: str, made: str, writer: str, rows: Sequence[tuple[str, str, bytes]], now_us: int
) -> None:
    """Write examples in place of whoever wrote them last: key, body ("" for one that is gone) and vector."""
    connection.lock("examples")
    sql = "SELECT coalesce(max(version), 0) FROM examples WHERE strategy = :strategy AND made = :made"
    version = int(connection.rows(sql, strategy=strategy, made=made)[0][0])
    columns = ", ".join(schema.EXAMPLES)
    marks = ", ".join(f":{name}" for name in schema.EXAMPLES)
    changes = ", ".join(f"{name} = excluded.{name}" for name in ("writer", "version", "ts_us", "body", "vector"))
    for number, (key, body, vector) in enumerate(rows, version + 1):
        values = (strategy, made, key, writer, number, now_us, body, vector)
        connection.run(
            f"INSERT INTO examples ({columns}) VALUES ({marks}) ON CONFLICT (strategy, made, key) DO UPDATE SET {changes}",
            **dict(zip(schema.EXAMPLES, values, strict=True)),
        )


def read_examples(
    connection: Connection, strategy: str, made: str, after: int
) -> list[tuple[str, str, int, int, str, bytes]]:
    """Key, writer, version, time, body and vector of rows behind a version, in the order of versions."""
    rows = connection.rows(
        "SELECT key, writer, version, ts_us, body, vector FROM examples WHERE strategy = :strategy AND made = :made"
        f" AND version > :after ORDER BY version LIMIT {EXAMPLES}",
        strategy=strategy,
        made=made,
        after=after,
    )
    return [(key, writer, version, ts_us, body, bytes(vector)) for key, writer, version, ts_us, body, vector in rows]


def delete_gone(connection: Connection, before_us: int) -> int:
    """Delete what is left of examples that went so long ago."""
    return connection.run("DELETE FROM examples WHERE body = '' AND ts_us < :before", before=before_us)


def with_examples(connection: Connection) -> list[str]:
    """Strategies that have examples, also such as no config names any more."""
    return [name for (name,) in connection.rows("SELECT DISTINCT strategy FROM examples ORDER BY strategy")]


def erase_texts(
    connection: Connection, *, request_id: str | None = None, key_id: str | None = None, user: str | None = None
) -> int:
    """Delete what was asked and answered: of one request, of a key (and a user of it), or all, what was collected too; how much."""
    if request_id is None and key_id is None:
        # What was collected is known by what was asked of whom, not by who asked it first.
        return connection.run("DELETE FROM texts") + connection.run("DELETE FROM collected")
    if request_id is not None:
        count = _erase_asked(connection, {request_id})
        return count + connection.run("DELETE FROM texts WHERE request_id = :request", request=request_id)
    # As the ledger has one whom the key may not speak for, too.
    part, values = (
        ("", {})
        if user is None
        else (" AND owner IN (:user, :own)", {"user": user, "own": own_name(key_id or "", user)})
    )
    sql = f"SELECT request_id FROM ledger WHERE key_id = :key{part}"
    count = _erase_asked(connection, {id for (id,) in connection.rows(sql, key=key_id, **values)})
    return count + connection.run(f"DELETE FROM texts WHERE request_id IN ({sql})", key=key_id, **values)


def _erase_asked(connection: Connection, request_ids: set[str]) -> int:
    """Delete the pairs for people to judge, and the outcomes, that hold questions of these requests, and damaged ones, which may be
    theirs.
    """
    count = 0
    sql = "SELECT key, body FROM collected WHERE key LIKE :label OR key LIKE :outcome"
    for key, body in connection.rows(sql, label=f"{LABEL}%", outcome=f"{OUTCOME}%"):
        try:
            is_theirs = json.loads(body)["request_id"] in request_ids
        except (ValueError, LookupError, TypeError):
            is_theirs = True
        if is_theirs:
            count += connection.run("DELETE FROM collected WHERE key = :key", key=key)
    return count


def read_outcomes(connection: Connection) -> list[str]:
    """Whole outcomes that were collected, as JSON; oldest first."""
    sql = "SELECT body FROM collected WHERE key LIKE :ours ORDER BY ts_us, key"
    return [body for (body,) in connection.rows(sql, ours=f"{OUTCOME}%")]


def withdraw_vouched(connection: Connection, after: str) -> str | None:
    """Take the mark `VOUCHED` off outcomes whose keys come behind ``after``, some at a time; the last key, None if there are no more."""
    rows = connection.rows(
        "SELECT key, body FROM collected WHERE key LIKE :ours AND key > :after AND body LIKE :marked"
        f" ORDER BY key LIMIT {EXAMPLES}",
        ours=f"{OUTCOME}%",
        after=after,
        marked=f'%"{VOUCHED}"%',
    )
    for key, body in rows:
        try:
            line = json.loads(body)
            is_marked = line.pop(VOUCHED, None) is not None
        except (ValueError, TypeError, AttributeError, RecursionError):
            # A damaged one is learned from by nobody.
            continue
        if is_marked:
            body = json.dumps(line, separators=(",", ":"))
            connection.run("UPDATE collected SET body = :body WHERE key = :key", body=body, key=key)
    return rows[-1][0] if rows else None


def erase_examples(connection: Connection, strategy: str, is_meant: Callable[[str], bool], now_us: int) -> int:
    """Leave nothing of examples but that they are gone, of whatever make; how many."""
    connection.lock("examples")
    rows = connection.rows(
        "SELECT made, key, writer, body FROM examples WHERE strategy = :strategy AND body <> ''", strategy=strategy
    )
    meant = [(made, key, writer) for made, key, writer, body in rows if is_meant(body)]
    for made in dict.fromkeys(made for made, _, _ in meant):
        gone = [(key, "", b"") for other, key, _ in meant if other == made]
        put_examples(connection, strategy, made, NOBODY, gone, now_us)
    return len(meant)
