"""What strategies expected beside what was said: by hand, on both kinds of store, and on the page."""

import asyncio
from datetime import UTC, datetime

import pytest

from anabranch.gateway.store import Calibration, LedgerRow, open_store
from anabranch.gateway.ui import Snapshot, render

THURSDAY = datetime(2026, 11, 26, 12, tzinfo=UTC).timestamp()
WEEK = 7 * 86_400.0


class Clock:
    now = THURSDAY

    def __call__(self):
        return self.now


async def ask(store, request_id, strategy, quality, *scores):
    """A request whose answer was expected to be worth ``quality``, and was then scored."""
    candidates = [{"model": "other", "quality": 0.123}, {"model": "m", "quality": quality}]
    await store.append(LedgerRow(request_id=request_id, strategy=strategy, model="m"))
    await store.append_decision(request_id, strategy, "m", {"candidates": candidates})
    for score in scores:
        await store.feedback(request_id, score)


def test_by_hand(url):
    async def main():
        clock = Clock()
        async with open_store(url, clock=clock) as store:
            assert await store.calibration() == []
            clock.now = THURSDAY - WEEK
            await ask(store, "old", "knn", 0.5, 1.0)
            clock.now = datetime(2026, 11, 23, 0, 0, 1, tzinfo=UTC).timestamp()  # Monday, a second after midnight
            await ask(store, "a", "knn", 0.9, 0.5)
            clock.now = THURSDAY
            await ask(store, "b", "knn", 0.5, 1.0, 0.8)  # scored twice: the last word counts
            await ask(store, "c", "ridge", 0.25, 0.25)
            await ask(store, "unscored", "knn", 0.9)
            await ask(store, "expects nothing", "rules", None, 1.0)
            found = await store.calibration()
            assert [(one.week, one.strategy, one.count) for one in found] == [
                ("2026-11-23", "knn", 2),
                ("2026-11-23", "ridge", 1),
                ("2026-11-16", "knn", 1),
            ]
            first = found[0]
            assert (first.expected, first.scored, first.error) == pytest.approx((0.7, 0.65, 0.35))
            assert first.bias == pytest.approx(0.05)
            assert found[2].bias == pytest.approx(-0.5)
            assert [one.week for one in await store.calibration(since_s=THURSDAY - 86_400)] == ["2026-11-23"] * 2

    asyncio.run(main())


def test_the_page_shows_it_where_there_is_any():
    assert "Expected and scored" not in render(Snapshot(now_s=0.0))
    week = Calibration(week="2026-11-23", strategy="<b>", count=1234, expected=0.75, scored=0.5, error=0.3)
    page = render(Snapshot(now_s=0.0, calibration=[week]))
    assert "Expected and scored" in page
    assert all(text in page for text in ("2026-11-23", "&lt;b&gt;", "1,234", "+0.25"))
