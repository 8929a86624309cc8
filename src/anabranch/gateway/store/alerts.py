"""Alerts that are to be sent once, whichever process sends them: a table of what was noted, who tries now, and what has arrived.

Whoever claims an alert has it for a while. It is sent twice only if its process ends, or the store cannot write, between the
receiver's answer and the note of it; the id tells the receiver.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anabranch.gateway.store import schema
from anabranch.gateway.store.database import Connection

# An alert is given up after so many tries.
TRIES = 8

# Of an alert that a process has claimed, until it has told what came of it.
CLAIM_US = 60 * 10**6

# Alerts are remembered for so long, but those of budgets that never begin anew.
KEPT_US = 40 * 86_400 * 10**6


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """Something that somebody is told once.

    Attributes:
        id: the same for the same alert, whoever notes it.
        period: of the budget that it is about.
        ts_us: when it was noted, in microseconds since 1970.
        tries: made so far.
        body: what is told, of JSON, and ``webhook``: whom.
    """

    id: str
    period: str
    ts_us: int
    tries: int = 0
    body: dict[str, Any]


def note(connection: Connection, alerts: Sequence[Alert], now_us: int) -> int:
    """Note those that are not there yet, due at once; how many were new."""
    sql = "DELETE FROM alerts WHERE ts_us < :before AND period <> 'total'"
    connection.run(sql, before=now_us - KEPT_US)
    rows = [(one.id, one.period, one.ts_us, now_us, 0, 0, json.dumps(one.body)) for one in alerts]
    return connection.insert("alerts", schema.ALERTS, rows)


def due(connection: Connection, now_us: int) -> list[Alert]:
    """Those to be tried now, the oldest first."""
    columns = "id, period, ts_us, tries, body"
    sql = f"SELECT {columns} FROM alerts WHERE sent_us = 0 AND next_us <= :now AND tries < :most ORDER BY ts_us, id"
    return [
        Alert(id=id, period=period, ts_us=ts_us, tries=tries, body=json.loads(body))
        for id, period, ts_us, tries, body in connection.rows(sql, now=now_us, most=TRIES)
    ]


def claim(connection: Connection, alert: Alert, now_us: int) -> bool:
    """Take one for `CLAIM_US`; False if another process has it, or has sent it."""
    sql = (
        "UPDATE alerts SET tries = tries + 1, next_us = :next"
        " WHERE id = :id AND sent_us = 0 AND next_us <= :now AND tries = :tries"
    )
    return connection.run(sql, id=alert.id, now=now_us, tries=alert.tries, next=now_us + CLAIM_US) == 1


def arrived(connection: Connection, alert: Alert, now_us: int) -> None:
    """It is not sent again."""
    connection.run("UPDATE alerts SET sent_us = :now WHERE id = :id", id=alert.id, now=now_us)


def failed(connection: Connection, alert: Alert, next_us: int) -> None:
    """Try again then."""
    connection.run("UPDATE alerts SET next_us = :next WHERE id = :id AND sent_us = 0", id=alert.id, next=next_us)
