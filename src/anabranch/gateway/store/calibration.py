"""What strategies expected of answers beside what people said of them, week by week: the sight of a router that goes stale."""

import json
from dataclasses import dataclass
from math import fsum

from anabranch.gateway.store.database import Connection
from anabranch.gateway.store.period import iso

WEEK_US = 7 * 86_400 * 10**6

# The first one after the start of 1970, a Thursday.
MONDAY_US = 4 * 86_400 * 10**6
MAX_ROWS = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Scored answers of one strategy in one week.

    Attributes:
        week: its Monday, as ``2026-11-23`` (UTC).
        strategy: that chose.
        count: answers with a score and an expectation.
        expected: mean quality that was predicted of the chosen models.
        scored: mean score, of several scores of an answer their mean.
        error: mean distance of the two, answer by answer.
    """

    week: str
    strategy: str
    count: int
    expected: float
    scored: float
    error: float

    @property
    def bias(self) -> float:
        """By how much the strategy expected too much."""
        return self.expected - self.scored


def read_calibration(connection: Connection, since_us: int) -> list[Calibration]:
    """Newest week first, then by strategy. Of more than `MAX_ROWS` scored answers the newest count."""
    rows = connection.rows(
        "SELECT d.ts_us, d.strategy, d.model, d.body, f.score FROM decisions d JOIN "
        "(SELECT request_id, avg(score) AS score FROM feedback GROUP BY request_id) f ON f.request_id = d.request_id "
        f"WHERE d.ts_us >= :since ORDER BY d.ts_us DESC LIMIT {MAX_ROWS}",
        since=since_us,
    )
    groups: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for ts_us, strategy, model, body, score in rows:
        expected = _expected(body, model)
        if expected is not None:
            groups.setdefault(((ts_us - MONDAY_US) // WEEK_US, strategy), []).append((expected, float(score)))
    return [
        Calibration(
            week=iso(week * WEEK_US + MONDAY_US)[:10],
            strategy=strategy,
            count=len(pairs),
            expected=fsum(one for one, _ in pairs) / len(pairs),
            scored=fsum(one for _, one in pairs) / len(pairs),
            error=fsum(abs(one - other) for one, other in pairs) / len(pairs),
        )
        for (week, strategy), pairs in sorted(groups.items(), key=lambda item: (-item[0][0], item[0][1]))
    ]


def _expected(body: str, model: str) -> float | None:
    """The quality predicted of the chosen model; None if the strategy predicts none."""
    found = json.loads(body).get("candidates") or ()
    quality = next((one.get("quality") for one in found if one.get("model") == model), None)
    return None if quality is None else float(quality)
