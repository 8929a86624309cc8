"""Answers of A/B tests as the store has them: decisions that say which arm they belong to, what they cost, and their first feedback."""

import json
from dataclasses import dataclass
from typing import Any

from anabranch.gateway.store.database import Connection

# Oldest first, so that what is seen of a test only grows.
MOST_ROWS = 300_000


@dataclass(frozen=True, slots=True)
class ArmRow:
    """One request of a test.

    Attributes:
        arm: as `anabranch.gateway.ab.Arm.to_dict` wrote it.
        seq: its place in the ledger.
        status: see `LedgerRow`.
        cost_nano: nano-dollars, with what the strategy asked to decide.
        score, score_seq: its first feedback and the place of that among all feedback; None without.
    """

    arm: dict[str, Any]
    seq: int
    status: str
    cost_nano: int
    score: float | None
    score_seq: int | None


def read_arms(connection: Connection) -> list[ArmRow]:
    """Of all tests, in the order of the ledger."""
    rows = connection.rows(
        "SELECT d.body, l.seq, l.status, l.cost_nano + coalesce((SELECT sum(c.cost_nano) FROM ledger c "
        "WHERE c.parent_id = l.request_id AND c.parent_id <> ''), 0), f.score, f.seq "
        "FROM decisions d JOIN ledger l ON l.request_id = d.request_id "
        "LEFT JOIN (SELECT request_id, min(seq) AS first FROM feedback GROUP BY request_id) g ON g.request_id = d.request_id "
        "LEFT JOIN feedback f ON f.seq = g.first "
        f"WHERE substr(l.requested, 1, 5) = 'auto/' AND d.body LIKE :mark ORDER BY l.seq LIMIT {MOST_ROWS}",
        mark='%"ab":{"test":%',
    )
    found = []
    for body, seq, status, cost_nano, score, score_seq in rows:
        arm = json.loads(body).get("ab")
        if isinstance(arm, dict):
            found.append(
                ArmRow(arm, int(seq), status, int(cost_nano), None if score is None else float(score), score_seq)
            )
    return found
