"""The store: one contract for SQLite and PostgreSQL. Budgets to the nano-dollar, one ledger row per request, keys, questions."""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import logging
import os
import random
import sqlite3
import stat
from datetime import UTC, datetime

import pytest

from anabranch.errors import BackendError, BudgetError, DataError, InputError
from anabranch.gateway.store import (
    CollectedRow,
    LedgerQuery,
    LedgerRow,
    SaidBeforeError,
    Spend,
    open_store,
    queries,
    schema,
    subjects_of,
)
from anabranch.gateway.store.ledger_rows import ledger_values
from anabranch.routers.money import Price
from waiting import until_async

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC).timestamp()
HOUR, DAY = 3600.0, 86_400.0


class Clock:
    def __init__(self, now=NOON):
        self.now = now

    def __call__(self):
        return self.now


def run(coroutine):
    return asyncio.run(coroutine)


def row(request_id, cost=0, **fields):
    return LedgerRow(request_id=request_id, cost_nano=cost, **fields)


async def spend(store, request_id, subjects, held, cost):
    reservation = await store.reserve(request_id, subjects, held)
    await store.settle(reservation, row(request_id, cost))


async def one_budget(store, subject="global", period="total"):
    return next(one for one in await store.budgets() if (one.subject, one.period) == (subject, period))


# Budgets


def test_a_budget_by_hand(url):
    """Limit 1000: 600 held, so 400 left; settled at 250, so 750 left; then 751 is refused and 750 is not."""

    async def main():
        async with open_store(url, clock=Clock()) as store:
            await store.set_budget("global", 1000)
            held = await store.reserve("a", ["global"], 600)
            budget = await one_budget(store)
            assert (budget.spent_nano, budget.reserved_nano, budget.remaining_nano) == (0, 600, 400)
            with pytest.raises(BudgetError):
                await store.reserve("b", ["global"], 401)
            store.settle(held, row("a", 250))
            budget = await one_budget(store)
            assert (budget.spent_nano, budget.reserved_nano, budget.remaining_nano) == (250, 0, 750)
            with pytest.raises(BudgetError) as refused:
                await store.reserve("c", ["global"], 751)
            assert (refused.value.remaining_nano, refused.value.limit_nano, refused.value.subject) == (
                750,
                1000,
                "global",
            )
            assert (await store.reserve("d", ["global"], 750)).nano == 750
            assert (await one_budget(store)).remaining_nano == 0

    run(main())


def test_all_budgets_of_a_request_take_part_or_none(url):
    async def main():
        async with open_store(url, clock=Clock()) as store:
            _, key = await store.create_key("k", user="ann", team="ml", tags=["prod"])
            subjects = subjects_of(key, user="ignored", tags=["x", "prod"])
            assert subjects == ("global", f"key:{key.id}", "team:ml", "user:ann", "tag:prod", "tag:x")
            for place, subject in enumerate(subjects):
                await store.set_budget(subject, 1000 - place)
            await store.set_budget("team:other", 1)
            with pytest.raises(BudgetError, match=r"total budget of tag x has .* left") as refused:
                await store.reserve("a", subjects, 996)
            assert refused.value.subject == "tag:x"
            assert {one.reserved_nano for one in await store.budgets()} == {0}
            await spend(store, "b", subjects, 995, 7)
            found = {one.subject: (one.spent_nano, one.reserved_nano) for one in await store.budgets()}
            assert found == {"team:other": (0, 0)} | dict.fromkeys(subjects, (7, 0))
            (entry,) = await store.ledger()
            assert (entry.key_id, entry.user, entry.team, entry.tags) == (key.id, "ann", "ml", ("prod", "x"))

    run(main())


def test_grow_takes_more_or_leaves_it_as_it_was(url):
    async def main():
        async with open_store(url, clock=Clock()) as store:
            await store.set_budget("global", 100)
            held = await store.reserve("a", ["global"], 40)
            held = await store.grow(held, 90)
            assert held.nano == 90
            assert (await store.grow(held, 10)).nano == 90  # never less
            with pytest.raises(BudgetError):
                await store.grow(held, 101)
            assert (await one_budget(store)).reserved_nano == 90
            await store.release(held, row("a", status="cancelled"))
            assert (await one_budget(store)).remaining_nano == 100
            assert (await store.ledger())[0].reserved_nano == 90
            with pytest.raises(DataError, match="is gone"):
                await store.grow(held, 95)

    run(main())


def test_a_period_begins_anew_and_open_reservations_stay(url):
    """January's month ends 12 hours after noon of the 31st; what is held then counts in February, what was spent does not."""

    async def main():
        clock = Clock()
        async with open_store(url, clock=clock) as store:
            await store.set_budget("global", 100, "month")
            await store.set_budget("global", 150, "total")
            await spend(store, "a", ["global"], 60, 60)
            held = await store.reserve("b", ["global"], 40)
            with pytest.raises(BudgetError) as refused:
                await store.reserve("c", ["global"], 70)
            assert (refused.value.period, refused.value.resets_s) == ("total", None)
            with pytest.raises(BudgetError) as refused:
                await store.reserve("c", ["global"], 41)
            assert refused.value.resets_s == datetime(2026, 2, 1, tzinfo=UTC).timestamp()
            assert refused.value.retry_after_s == 12 * HOUR
            clock.now += 12 * HOUR
            budget = await one_budget(store, period="month")
            assert (budget.spent_nano, budget.reserved_nano) == (0, 40)
            await spend(store, "c", ["global"], 50, 20)
            store.settle(held, row("b", 30))
            assert (await one_budget(store, period="month")).spent_nano == 50
            assert (await one_budget(store)).spent_nano == 110
            since = datetime(2026, 2, 1, tzinfo=UTC).timestamp()
            assert (await store.spend(since_s=since))[0].cost_nano == 50  # the ledger agrees

    run(main())


def test_a_new_budget_counts_what_was_spent_and_is_held(url):
    async def main():
        clock = Clock(NOON - DAY)
        async with open_store(url, clock=clock) as store:
            subjects = subjects_of(user="ann", tags=["a.b", "c"])
            await spend(store, "old", subjects, 10, 5)
            clock.now = NOON
            await spend(store, "new", subjects, 10, 3)
            await spend(store, "other", subjects_of(user="Ann", tags=["a_b", "C"]), 10, 1)
            held = await store.reserve("held", subjects, 20)
            for subject in ("user:ann", "tag:a.b", "tag:c"):
                day, total = await store.set_budget(subject, 50, "day"), await store.set_budget(subject, 50)
                assert (day.spent_nano, day.reserved_nano) == (3, 20), subject
                assert (total.spent_nano, total.reserved_nano) == (8, 20), subject
            assert (await store.set_budget("global", 50)).spent_nano == 9
            await store.settle(held, row("held", 2))
            assert {one.reserved_nano for one in await store.budgets()} == {0}
            assert (await one_budget(store, "tag:c")).spent_nano == 10

    run(main())


def test_limits_change_and_go(url):
    async def main():
        async with open_store(url) as store:
            await store.set_budget("team:ml", 100)
            await spend(store, "a", ["team:ml"], 80, 80)
            budget = await store.set_budget("team:ml", 50)
            assert (budget.limit_nano, budget.spent_nano, budget.remaining_nano) == (50, 80, 0)
            with pytest.raises(BudgetError):
                await store.reserve("b", ["team:ml"], 1)
            assert await store.remove_budget("team:ml")
            assert not await store.remove_budget("team:ml")
            await store.reserve("b", ["team:ml"], 10**12)

    run(main())


def test_a_cost_above_the_reservation_is_charged_and_flagged(url):
    async def main():
        async with open_store(url) as store:
            await store.set_budget("global", 100)
            await spend(store, "a", ["global"], 90, 110)
            budget = await one_budget(store)
            assert (budget.spent_nano, budget.reserved_nano, budget.remaining_nano) == (110, 0, 0)
            assert (await store.ledger())[0].flags == ("over_reserved",)
            with pytest.raises(BudgetError):
                await store.reserve("b", ["global"], 1)

    run(main())


def test_refusals_say_what_would_work(url):
    async def main():
        async with open_store(url, clock=Clock()) as store:
            await store.set_budget("team:ml", 25 * 10**9, "month")
            with pytest.raises(BudgetError) as refused:
                await store.reserve("a", ["team:ml"], 26 * 10**9)
            assert str(refused.value) == (
                "the month budget of team ml has $25.00 of $25.00 left, and this request may cost $26.00; "
                "it is more than the whole budget"
            )
            assert refused.value.retry_after_s is None
            await store.reserve("b", ["team:ml"], 20 * 10**9)
            with pytest.raises(BudgetError, match="it begins anew at 2026-02-01T00:00:00Z") as refused:
                await store.reserve("c", ["team:ml"], 6 * 10**9)
            assert refused.value.retry_after_s == 1.0  # what is in the way is only reserved

    run(main())


@pytest.mark.parametrize(
    ("subject", "limit", "period", "message"),
    [
        ("teams:ml", 1, "total", "it must be global, key:ID"),
        ("team:", 1, "total", "it must be global, key:ID"),
        ("tag:a,b", 1, "total", "the tag 'a,b' may not be"),
        ("global", -1, "total", "a limit is -1"),
        ("global", 1.5, "total", "a limit is 1.5"),
        ("global", True, "total", "a limit is True"),
        ("global", 1, "year", "the period is 'year'; use one of total, hour, day, week, month"),
    ],
)
def test_bad_budgets(tmp_path, subject, limit, period, message):
    async def main():
        async with open_store(str(tmp_path / "g.db")) as store:
            with pytest.raises(InputError, match=message):
                await store.set_budget(subject, limit, period)

    run(main())


# One row per request


def test_a_request_ends_once(url, caplog):
    async def main():
        async with open_store(url) as store:
            await store.set_budget("global", 100)
            held = await store.reserve("a", ["global"], 50)
            await store.settle(held, row("a", 10))
            await store.settle(held, row("a", 20))
            store.append(row("a", status="refused"))
            store.append(row("b", status="refused"))
            await store.append(row("b", status="error"))
            with pytest.raises(InputError, match="was used before"):
                await store.reserve("a", ["global"], 1)
            entries = await store.ledger()
            assert [(one.request_id, one.status, one.cost_nano) for one in entries] == [
                ("b", "refused", 0),
                ("a", "ok", 10),
            ]
            budget = await one_budget(store)
            assert (budget.spent_nano, budget.reserved_nano) == (10, 0)
            with pytest.raises(InputError, match="without a reservation cost 5"):
                store.append(row("c", 5))

    with caplog.at_level(logging.WARNING):
        run(main())
    assert "request a was settled before" in caplog.text


def test_request_ids(tmp_path):
    async def main():
        async with open_store(str(tmp_path / "g.db")) as store:
            await store.reserve("a", ["global"], 1)
            with pytest.raises(InputError, match="is in use"):
                await store.reserve("a", ["global"], 1)
            for bad in ("", "x" * 129, "a\nb", "ü"):
                with pytest.raises(InputError, match="1 to 128 printable ASCII"):
                    await store.reserve(bad, ["global"], 1)

    run(main())


def test_a_secret_is_made_once_and_is_each_stores_own(url, tmp_path):
    async def main():
        async with (
            open_store(url) as one,
            open_store(url, serves=False) as other,
            open_store(str(tmp_path / "o.db")) as far,
        ):
            first = await asyncio.gather(one.secret("x"), other.secret("x"), one.secret("x"))
            assert len({*first, await one.secret("y"), await far.secret("x")}) == 3
            assert len(first[0]) == 64
        async with open_store(url) as again:
            assert await again.secret("x") == first[0]

    run(main())


def test_whoever_stops_waiting_for_a_reservation_does_not_keep_it(url):
    async def main():
        async with open_store(url) as store:
            await store.set_budget("global", 100)
            waiting = asyncio.ensure_future(store.reserve("a", ["global"], 60))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            entries = await until_async(store.ledger)
            assert [(one.request_id, one.status) for one in entries] == [("a", "cancelled")]
            assert (await one_budget(store)).remaining_nano == 100

    run(main())


def test_a_change_that_fails_in_the_middle_has_changed_nothing(url):
    async def main():
        async with open_store(url, clock=Clock()) as store:
            await store.create_key("ci")

            def half(connection):
                connection.run("UPDATE keys SET name = 'other'")
                raise InputError("the second half")

            with pytest.raises(InputError, match="the second half"):
                await store.change(half)
            assert [key.name for key in await store.keys()] == ["ci"]

    run(main())


def test_a_row_reads_back_as_it_was(url):
    full = LedgerRow(
        request_id="full",
        key_id="k",
        user="ann \N{SNOWMAN}",
        team="t",
        tags=("a", "b"),
        requested="auto/knn?lambda=2",
        strategy="knn",
        candidates=("small", "la,rge"),
        model="small",
        deployment="small#1\0\ud800",
        attempts=3,
        prompt_tokens=2**40,
        completion_tokens=7,
        cached_tokens=5,
        is_estimated=True,
        price=Price(input=1, output=2, cached_input=None),
        latency_us=123456,
        first_token_us=0,
        overhead_us=9,
        status="error",
        code="upstream\0broke\ud800",
        cache="exact",
        flags=("hedged", "stitched"),
    )

    async def main():
        async with open_store(url, clock=Clock()) as store:
            store.append(full)
            await store.append(row("plain"))
            plain, found = await store.ledger()
            assert found.candidates == ("small", "la;rge")  # a comma parts names
            assert found.code == "upstream\N{REPLACEMENT CHARACTER}broke?"
            assert found.deployment == "small#1\N{REPLACEMENT CHARACTER}?"
            same = (
                "user",
                "tags",
                "requested",
                "price",
                "prompt_tokens",
                "is_estimated",
                "first_token_us",
                "flags",
                "latency_us",
            )
            assert [getattr(found, name) for name in same] == [getattr(full, name) for name in same]
            assert (found.ts_us, found.quality, plain.price, plain.latency_us) == (int(NOON * 1e6), None, None, None)
            assert plain.seq > found.seq
            assert json.loads(json.dumps(dataclasses.asdict(found)))["price"]["output"] == 2

    run(main())


def test_everything_at_once_stays_within_limits(url):
    """Concurrent random requests in random scopes: at no committed moment is a limit passed, and in the end all adds up."""
    draw = random.Random(7)
    subjects = ["global", "team:a", "team:b", "user:x", "user:y", "tag:t"]

    async def main():
        async with open_store(url) as store, open_store(url, serves=False) as onlooker:
            for subject in subjects:
                await store.set_budget(subject, draw.randrange(5_000, 50_000))
            count, over, looks, outcomes = 400 if "postgres" not in url else 150, [], [], {}

            async def request(number):
                name, mine = f"r{number}", draw.sample(subjects, draw.randrange(1, 5))
                try:
                    held = await store.reserve(name, mine, draw.randrange(0, 3_000))
                except BudgetError:
                    await store.append(row(name, status="refused"))
                    return
                # The onlooker has had its turn while something was held, however busy the machine is.
                if held.nano:
                    await asyncio.wait_for(seen.wait(), 60)
                await asyncio.sleep(draw.random() * 0.01)
                if draw.random() < 0.3:
                    try:
                        held = await store.grow(held, held.nano + draw.randrange(0, 500))
                    except BudgetError:
                        pass
                cost = draw.choice([0, held.nano, draw.randrange(0, held.nano + 1)])
                outcomes[name] = (mine, cost)
                store.settle(held, row(name, cost))

            async def watch():
                while True:
                    found = await onlooker.budgets()
                    looks.append(sum(one.reserved_nano for one in found))
                    if looks[-1] > 0:
                        seen.set()
                    over.extend(one for one in found if not 0 <= one.spent_nano + one.reserved_nano <= one.limit_nano)
                    over.extend(one for one in found if one.reserved_nano < 0)
                    await asyncio.sleep(0)

            seen = asyncio.Event()
            watching = asyncio.ensure_future(watch())
            await asyncio.gather(*(request(number) for number in range(count)))
            watching.cancel()
            assert over == []
            assert max(looks) > 0
            entries = await store.ledger(LedgerQuery(limit=10_000))
            assert sorted(one.request_id for one in entries) == sorted(f"r{number}" for number in range(count))
            assert sum(one.cost_nano for one in entries) == sum(cost for _, cost in outcomes.values())
            for one in await store.budgets():
                assert one.reserved_nano == 0
                assert one.spent_nano == sum(cost for mine, cost in outcomes.values() if one.subject in mine)
            assert any(one.status == "refused" for one in entries)

    run(main())


def test_two_stores_share_their_budgets(url):
    """Two writers on one database, as two replicas are: together they pass no limit, and a limit set meanwhile counts exactly."""

    async def main():
        async with open_store(url) as one, open_store(url) as two:
            await one.set_budget("global", 1_000)
            stores, granted = itertools.cycle([one, two]), []

            async def request(number):
                store = next(stores)
                try:
                    held = await store.reserve(f"r{number}", ["global", "team:t"], 30)
                except BudgetError:
                    return
                granted.append((store, held))

            asking = asyncio.gather(*(request(number) for number in range(60)))
            await asyncio.sleep(0.01)
            await two.set_budget("team:t", 10_000)
            await asking
            assert len(granted) == 33  # 33 * 30 <= 1000 < 34 * 30
            assert (await one_budget(one, "team:t")).reserved_nano == 990
            for number, (store, held) in enumerate(granted):
                if number % 2:
                    store.settle(held, row(held.request_id, number % 30))
                else:
                    await store.release(held, row(held.request_id, status="error"))
            total = sum(number % 30 for number in range(1, 33, 2))
            await one.budgets()
            for subject in ("global", "team:t"):
                budget = await one_budget(two, subject)
                assert (budget.spent_nano, budget.reserved_nano) == (total, 0)

    run(main())


def test_what_a_closed_process_left_is_settled(url):
    """Closing lets go of reservations; the next store ends them."""

    async def main():
        first = open_store(url)
        await first.set_budget("global", 100)
        await first.reserve("left", ["global", "team:ml", "tag:t"], 60, requested="auto", strategy="knn")
        await first.close()
        async with open_store(url) as second:
            assert second.recovered == 1
            (entry,) = await second.ledger()
            assert (entry.status, entry.cost_nano, entry.reserved_nano, entry.flags) == (
                "crashed",
                60,
                60,
                ("recovered",),
            )
            assert (entry.requested, entry.strategy, entry.team, entry.tags) == ("auto", "knn", "ml", ("t",))
            budget = await one_budget(second)
            assert (budget.spent_nano, budget.reserved_nano) == (60, 0)
        async with open_store(url) as third:
            assert third.recovered == 0

    run(main())


def test_the_living_are_left_alone(url, monkeypatch):
    """A store that is there already settles what another left, within its watch, and not what a living one holds."""

    async def main():
        monkeypatch.setattr("anabranch.gateway.store.writer.WATCH_S", 0.05)
        async with open_store(url) as living:
            mine = await living.reserve("mine", ["global"], 1)
            other = open_store(url)
            assert other.recovered == 0
            await other.reserve("left", ["global"], 2)
            await other.close()
            entries = await until_async(living.ledger)
            assert [(one.request_id, one.status) for one in entries] == [("left", "crashed")]
            await living.settle(mine, row("mine", 1))
            assert [one.status for one in await living.ledger(LedgerQuery(request_id="mine"))] == ["ok"]

    run(main())


# Keys


def test_keys(url):
    async def main():
        clock = Clock()
        async with open_store(url, clock=clock) as store:
            secret, key = await store.create_key(
                "ci", user="ann", team="m,l", tags=["prod"], models=["small"], rpm=5, tpm=100, expires_s=NOON + 60
            )
            assert secret.startswith("sk-ab-")
            assert len(secret) > 40
            assert (key.hint, key.team) == (secret[-4:], "m;l")
            assert await store.key_of(secret) == key == await store.key_of(secret)
            assert await store.key_of(secret + "x") is None
            assert await store.key_of("") is None
            assert await store.key_of("\ud800") is None
            assert (key.allows("small"), key.allows("large")) == (True, False)
            clock.now += 60
            assert await store.key_of(secret) is None  # expired
            other, record = await store.create_key("other", is_admin=True)
            assert record.is_admin
            assert record.allows("any")
            assert await store.key_of(other) == record
            ended = await store.revoke_key(record.id[:8])
            assert ended.revoked_us == int(clock.now * 1e6)
            assert await store.key_of(other) is None
            assert await store.revoke_key(record.id) == ended  # for good
            assert [one.name for one in await store.keys()] == ["ci", "other"]
            for bad in ("", "nothing", "k"):
                with pytest.raises(InputError, match="keys have the name"):
                    await store.revoke_key(bad)
            wrongs = (
                {"rpm": 0},
                {"tpm": -1},
                {"expires_s": NOON},
                {"tags": ["a b"]},
                {"tags": [f"t{n}" for n in range(17)]},
            )
            for wrong in wrongs:
                with pytest.raises(InputError):
                    await store.create_key("x", **wrong)

    run(main())


def test_what_another_process_does_to_a_key_is_seen(url, monkeypatch):
    async def main():
        monkeypatch.setattr("anabranch.gateway.store.keyring.STALE_S", 0.05)
        async with open_store(url) as store, open_store(url, serves=False) as tool:
            secret, key = await tool.create_key("k")
            assert await store.key_of(secret) == key
            await tool.revoke_key(key.id)
            await asyncio.sleep(0.06)
            assert await store.key_of(secret) is None

    run(main())


def test_a_key_in_use_is_read_again_behind_the_scenes(tmp_path, monkeypatch):
    async def main():
        monkeypatch.setattr("anabranch.gateway.store.store_keys.FRESH_S", 0.0)
        url = str(tmp_path / "g.db")
        async with open_store(url) as store, open_store(url, serves=False) as tool:
            secret, key = await tool.create_key("k")
            assert await store.key_of(secret) == key
            await tool.revoke_key(key.id)
            assert await store.key_of(secret) == key  # from memory, and now looked up

            async def is_read_again():
                return await store.key_of(secret) is None

            await until_async(is_read_again)

    run(main())


def test_the_key_itself_is_nowhere(tmp_path):
    async def main():
        async with open_store(str(tmp_path / "g.db")) as store:
            secret, key = await store.create_key("k")
            assert secret not in repr(key)
            return secret

    secret = run(main())
    held = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert secret.removeprefix("sk-ab-").encode() not in held
    assert (tmp_path / "g.db").stat().st_mode & 0o077 == 0


# Questions


def test_ledger_and_spend(url):
    async def main():
        clock = Clock(NOON - DAY)
        async with open_store(url, clock=clock) as store:
            for number, (model, status, tags, cost) in enumerate(
                [("a", "ok", ["x"], 5), ("b", "ok", ["x", "y"], 7), ("a", "error", [], 1), ("b", "ok", ["X"], 20)]
            ):
                held = await store.reserve(f"r{number}", subjects_of(user=f"u{number % 2}", tags=tags), 100)
                await store.settle(
                    held, row(f"r{number}", cost, model=model, status=status, prompt_tokens=10, strategy="s")
                )
                if number == 1:
                    clock.now = NOON

            async def ids(**query):
                return [one.request_id for one in await store.ledger(LedgerQuery(**query))]

            assert await ids() == ["r3", "r2", "r1", "r0"]
            assert await ids(newest_first=False, limit=2) == ["r0", "r1"]
            assert await ids(model="a") == ["r2", "r0"]
            assert await ids(tag="x") == ["r1", "r0"]
            assert await ids(user="u1", status="ok") == ["r3", "r1"]
            assert await ids(since_us=int(NOON * 1e6)) == ["r3", "r2"]
            assert await ids(until_us=int(NOON * 1e6)) == ["r1", "r0"]
            last = (await store.ledger(LedgerQuery(limit=2)))[-1].seq
            assert await ids(before_seq=last) == ["r1", "r0"]
            assert await ids(after_seq=last) == ["r3"]
            with pytest.raises(InputError, match="limit is 0"):
                await ids(limit=0)

            def total(group, requests, errors, cost):
                return Spend(
                    group=group,
                    requests=requests,
                    errors=errors,
                    cost_nano=cost,
                    prompt_tokens=10 * requests,
                    completion_tokens=0,
                    cached_tokens=0,
                )

            assert await store.spend() == [total((), 4, 1, 33)]
            assert await store.spend("model") == [total(("b",), 2, 0, 27), total(("a",), 2, 1, 6)]
            found = await store.spend("tag")
            assert found == [
                total(("X",), 1, 0, 20),
                total(("x",), 2, 0, 12),
                total(("y",), 1, 0, 7),
                total(("",), 1, 1, 1),
            ]
            assert await store.spend(["day"]) == [total(("2026-01-30",), 2, 0, 12), total(("2026-01-31",), 2, 1, 21)]
            assert await store.spend(("user", "model"), since_s=NOON) == [
                total(("u1", "b"), 1, 0, 20),
                total(("u0", "a"), 1, 1, 1),
            ]
            assert await store.spend("team", since_s=NOON + 1) == []
            with pytest.raises(InputError, match="spend by 'models' is not known; use key, user"):
                await store.spend("models")

    run(main())


def test_decisions_and_feedback(url):
    async def main():
        async with open_store(url, clock=Clock()) as store:
            body = {"scores": {"a": 0.25, "b": None}, "why": "near \N{SNOWMAN}"}
            store.append_decision("r", "knn", "a", body)
            (decision,) = await store.decisions("r")
            assert (decision.body, decision.model, decision.strategy) == (body, "a", "knn")
            assert await store.decisions("other") == []
            with pytest.raises(InputError, match="no request 'r'"):
                await store.feedback("r", 1.0)
            _, key = await store.create_key("k")
            await spend(store, "r", subjects_of(key), 1, 1)
            assert (await store.feedback("r", 1.0, key_id=key.id, comment="good")).request_id == "r"
            await store.feedback("r", 0.5)
            with pytest.raises(InputError, match="no request 'r'"):
                await store.feedback("r", 0.0, key_id="another tenant")
            for bad in (float("nan"), float("inf"), True):
                with pytest.raises(InputError, match="score is"):
                    await store.feedback("r", bad)
            assert (await store.ledger())[0].quality == 0.75
            assert [one.comment for one in await store.feedbacks("r")] == ["", "good"]

    run(main())


def test_of_all_processes_on_a_store_one_takes_the_score_of_a_key(url):
    async def main():
        async with open_store(url) as one, open_store(url) as other:
            for number in range(10):
                id = f"r{number}"
                await spend(one, id, subjects_of(None), 1, 1)
                told = await asyncio.gather(
                    *(
                        store.feedback(id, score, key_id=key, owner="", once=True)
                        for key in ("k", "l")
                        for store, score in ((one, 1.0), (other, 0.0))
                    ),
                    return_exceptions=True,
                )
                for of_key in (told[:2], told[2:]):
                    assert sum(isinstance(each, SaidBeforeError) for each in of_key) == 1
                    assert sum(isinstance(each, LedgerRow) for each in of_key) == 1
                assert sorted(row.key_id for row in await other.feedbacks(id)) == ["k", "l"]

    run(main())


def test_a_score_that_is_written_again_after_its_answer_was_lost_is_no_second_one(url):
    async def main():
        async with open_store(url) as store:
            await spend(store, "r", subjects_of(None), 1, 1)

            def put(score):
                row = ("r", 5, "k", score, "")
                return store._do(lambda connection: queries.put_feedback(connection, row, None, True))

            assert [(await put(score))[1] for score in (0.75, 0.75, 0.5)] == [True, True, False]
            assert [row.score for row in await store.feedbacks("r")] == [0.75]

    run(main())


def test_prune_keeps_budgets(url, monkeypatch):
    async def main():
        monkeypatch.setattr("anabranch.gateway.store.store_history.PRUNED", 2)
        clock = Clock(NOON - DAY)
        async with open_store(url, clock=clock) as store:
            await store.set_budget("global", 100)
            for number in range(5):
                await spend(store, f"old{number}", ["global"], 1, 1)
                store.append_decision(f"old{number}", "s", "m", {})
            await store.feedback("old0", 1.0)
            clock.now = NOON
            await spend(store, "new", ["global"], 1, 1)
            assert await store.prune(NOON) == 11
            assert [one.request_id for one in await store.ledger()] == ["new"]
            assert await store.decisions() == []
            assert (await one_budget(store)).spent_nano == 6
            await store.vacuum()

    run(main())


# Files and servers


def test_backup_is_a_store_of_its_own(tmp_path):
    async def main():
        async with open_store(str(tmp_path / "g.db")) as store:
            await store.set_budget("global", 100)
            await spend(store, "a", ["global"], 5, 5)
            await store.backup(tmp_path / "copy.db")
            await spend(store, "b", ["global"], 5, 5)
        async with open_store(str(tmp_path / "copy.db")) as copy:
            assert [one.request_id for one in await copy.ledger()] == ["a"]
            assert (await one_budget(copy)).spent_nano == 5

    run(main())
    assert not list(tmp_path.glob("*-replica-*"))


@pytest.mark.parametrize("other", ["g.db", "symbolic.db", "hard.db", "g.db-wal"])
def test_a_store_that_is_at_work_is_never_replaced_by_its_backup(other, tmp_path):
    async def main():
        async with open_store(str(tmp_path / "g.db")) as store:
            await store.create_key(user="before")
            (tmp_path / "symbolic.db").symlink_to("g.db")
            os.link(tmp_path / "g.db", tmp_path / "hard.db")
            with pytest.raises(InputError, match=r"is read.*, and would be lost if it were written; name another file"):
                await store.backup(tmp_path / other)
            await store.create_key(user="after")
        async with open_store(str(tmp_path / "g.db")) as store:
            assert [key.user for key in await store.keys()] == ["before", "after"]

    run(main())


def test_a_backup_takes_the_place_of_a_store_that_nobody_uses_and_of_nothing_else(tmp_path):
    bookmarks, copy = tmp_path / "bookmarks.sqlite", tmp_path / "copy.db"
    with contextlib.closing(sqlite3.connect(bookmarks)) as other:
        other.execute("CREATE TABLE bookmarks (url)")
        other.execute("PRAGMA user_version = 1")
    (tmp_path / "thesis.txt").write_text("years of work")
    kept = bookmarks.read_bytes()

    async def main():
        async with open_store(str(tmp_path / "g.db")) as store:
            for place in (bookmarks, tmp_path / "thesis.txt"):
                with pytest.raises(DataError, match="is no SQLite store of a gateway, and would be lost"):
                    await store.backup(place)
            await store.backup(copy)
            await store.create_key(user="after")
            async with open_store(str(copy)):
                with pytest.raises(DataError, match=r"copy.db is a database in use, .*\(copy.db-wal lies beside it\)"):
                    await store.backup(copy)
            await store.backup(copy)
        async with open_store(str(copy)) as other:
            assert [key.user for key in await other.keys()] == ["after"]

    run(main())
    assert bookmarks.read_bytes() == kept
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert not [name for name in os.listdir(tmp_path) if name.startswith((".", "bookmarks.sqlite-"))]


@pytest.mark.parametrize("mode", [0o600, 0o640])
def test_a_backup_is_for_the_eyes_of_those_who_may_read_the_store(mode, tmp_path):
    async def main():
        async with open_store(str(tmp_path / "g.db")) as store:
            (tmp_path / "g.db").chmod(mode)
            for _ in range(2):
                await store.backup(tmp_path / "copy.db")
                assert stat.S_IMODE((tmp_path / "copy.db").stat().st_mode) == mode
                (tmp_path / "copy.db").chmod(0o644)

    run(main())


def test_postgres_is_backed_up_otherwise(databases):
    async def main():
        async with open_store(databases(), serves=False) as store:
            with pytest.raises(BackendError, match="pg_dump"):
                await store.backup("x")

    run(main())


def test_a_locked_file_is_waited_for(tmp_path):
    """Another process writes for a while: reservations wait, nothing is lost."""
    path = tmp_path / "g.db"

    async def main():
        async with open_store(str(path)) as store:
            other = sqlite3.connect(path, isolation_level=None)
            other.execute("BEGIN IMMEDIATE")
            waiting = asyncio.ensure_future(store.reserve("a", ["global"], 1))
            await asyncio.sleep(0.1)
            assert not waiting.done()
            other.execute("COMMIT")
            other.close()
            await store.settle(await waiting, row("a", 1))
            assert len(await store.ledger()) == 1

    run(main())


def test_a_database_that_cannot_write_refuses_reservations_and_keeps_the_rest(tmp_path, monkeypatch, caplog):
    from anabranch.errors import CapacityError
    from anabranch.gateway.store import writer
    from anabranch.gateway.store.database import BusyError

    monkeypatch.setattr(writer, "PATIENCE_S", 120.0)
    works, real = [True], writer.apply

    def failing(connection, *arguments):
        if not works[0]:
            raise BusyError("database or disk is full")
        real(connection, *arguments)

    monkeypatch.setattr(writer, "apply", failing)

    async def main():
        async with open_store(str(tmp_path / "g.db")) as store:
            held = await store.reserve("a", ["global"], 5)
            works[0] = False
            settled = store.settle(held, row("a", 5))
            await until_async(lambda: store._writer.trouble)
            monkeypatch.setattr(writer, "PATIENCE_S", 0.05)
            with pytest.raises(CapacityError, match="the store cannot write: database or disk is full"):
                await store.reserve("b", ["global"], 5)
            monkeypatch.setattr(writer, "PATIENCE_S", 120.0)
            assert not settled.done()
            works[0] = True
            await settled
            assert [one.request_id for one in await store.ledger()] == ["a"]
            await store.reserve("b", ["global"], 5)

    with caplog.at_level(logging.WARNING):
        run(main())
    assert "disk is full" in caplog.text


def test_files_that_are_no_store(tmp_path):
    (tmp_path / "text.db").write_text("something else entirely, and long enough to be looked at\n" * 50)
    with pytest.raises(DataError, match=r"text.db: file is not a database"):
        open_store(str(tmp_path / "text.db"))
    other = sqlite3.connect(tmp_path / "theirs.db")
    other.execute("CREATE TABLE t (x)")
    other.close()
    with pytest.raises(DataError, match="is a database of something else"):
        open_store(str(tmp_path / "theirs.db"))
    with pytest.raises(DataError, match="cannot open the store"):
        open_store(str(tmp_path))
    for url in ("mysql://x/y", "sqlite:///", "sqlite:///x?mode=fast", "sqlite://host/x", "sqlite://[host/x"):
        with pytest.raises(DataError, match="the URL of the store cannot be read"):
            open_store(url)
    with pytest.raises(DataError, match="synchronous is 'fast'"):
        open_store(f"sqlite:///{tmp_path}/g.db?synchronous=fast")
    assert not (tmp_path / "g.db").exists()


def test_no_server_is_one_line(databases):
    with pytest.raises(DataError) as failed:
        open_store("postgresql://someone:hush@127.0.0.1:1/nothing")
    assert "\n" not in str(failed.value)
    assert "hush" not in str(failed.value)


def test_migrations(url):
    """A store of today opens with the next version's schema and keeps its rows; the other way round is refused."""

    async def main(then):
        async with open_store(url) as store:
            await then(store)

    async def look(store):
        assert [one.request_id for one in await store.ledger()] == ["a"]
        assert await store._read(lambda connection: connection.rows("SELECT mood FROM feedback")) == []

    run(main(lambda store: spend(store, "a", ["global"], 5, 5)))
    schema.MIGRATIONS.append(["ALTER TABLE feedback ADD COLUMN mood TEXT"])
    try:
        run(main(look))
        run(main(look))
    finally:
        schema.MIGRATIONS.pop()
    known = len(schema.MIGRATIONS)
    with pytest.raises(
        DataError, match=f"has schema {known + 1}, and this version knows up to {known}; upgrade anabranch"
    ):
        open_store(url)


def test_a_store_of_the_first_release_is_brought_up_to_date(url, monkeypatch):
    def write(connection):
        columns = schema.LEDGER[: schema.LEDGER.index("parent_id")]
        connection.insert("ledger", columns, [ledger_values(row("a", 5))[: len(columns)]])
        connection.insert("feedback", schema.FEEDBACK, [("a", 1, "", 1.0, "")])

    async def old():
        async with open_store(url) as store:
            await store._do(write)

    async def new():
        async with open_store(url) as store:
            assert [(row.request_id, row.quality) for row in await store.ledger()] == [("a", 1.0)]
            await store.append_texts("a", {"query": "what?"})
            assert await store.told_of(["a", "b"]) == ({}, {"a": {"query": "what?"}})

    with monkeypatch.context() as patch:
        # The schema last: a module that is imported only now takes in what it holds, and would keep the older one.
        older = schema.MIGRATIONS[:1]
        for module in ("sqlite", "postgres"):
            patch.setattr(f"anabranch.gateway.store.{module}.MIGRATIONS", older)
        patch.setattr(schema, "MIGRATIONS", older)
        run(old())
    run(new())


def test_texts_go_with_what_they_were_said_in(url):
    async def main():
        clock = Clock(NOON - DAY)
        async with open_store(url, clock=clock) as store:
            store.append_texts("old", {"query": "\ud800 half", "messages": [{"role": "user"}]})
            store.append_decision("old", "knn", "a", {"reason": "so"})
            clock.now = NOON
            await store.append_texts("new", {"query": "x"})
            assert await store.told_of(["old"]) == (
                {"old": {"reason": "so"}},
                {"old": {"query": "\ud800 half", "messages": [{"role": "user"}]}},
            )
            assert await store.prune(NOON) == 2
            assert await store.told_of(["old", "new"]) == ({}, {"new": {"query": "x"}})

    run(main())


def test_what_was_collected_is_written_with_its_settlement_and_once(url):
    async def main():
        async with open_store(url, clock=Clock()) as store:
            for number in range(2):
                held = await store.reserve(f"r{number}", ["global"], 10)
                store.settle(
                    held, row(f"r{number}", 5), CollectedRow("k", int(NOON * 1e6) - 1, {"answer": f"{number}"})
                )
            # A second settlement is ignored, and what came with it too.
            store.settle(held, row("r1", 5), CollectedRow("other", 0, {}))
            assert await store.collected(["k", "other", "none"]) == {"k": {"answer": "0"}}
            await store.prune(NOON)
            assert await store.collected(["k"]) == {}

    run(main())


def test_work_is_done_by_one_at_a_time(url):
    async def main():
        async with open_store(url) as one, open_store(url, serves=False) as other:
            with one.alone("this") as first, other.alone("this") as second, other.alone("that") as third:
                assert (first, second, third) == (True, False, True)
            with pytest.raises(RuntimeError, match="broke"), one.alone("this"):
                raise RuntimeError("broke")
            with other.alone("this") as again:
                assert again

    run(main())


def test_a_link_to_a_store_has_its_lock(tmp_path):
    async def main():
        (tmp_path / "link.db").symlink_to(tmp_path / "g.db")
        async with open_store(str(tmp_path / "g.db")) as one, open_store(str(tmp_path / "link.db")) as other:
            with one.alone("this"), other.alone("this") as second:
                assert not second

    run(main())


def test_a_store_that_is_not_there_is_not_made_by_those_who_look(tmp_path):
    with pytest.raises(DataError, match="not there"):
        open_store(str(tmp_path / "none.db"), serves=False, makes=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["{}/none/g.db", "sqlite:///{}/none/g.db"])
def test_no_folder_is_made_for_a_store(tmp_path, url):
    with pytest.raises(
        DataError, match=r"cannot open the store .*: there is no folder .*none; make it, or name another"
    ):
        open_store(url.format(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [":memory:", "sqlite:///:memory:", "file::memory:?cache=shared", "file:g.db"])
def test_what_sqlite_takes_for_no_file_is_refused_and_makes_none(name, tmp_path, monkeypatch):
    """A file of that name was made in the folder of whoever asked for a store in memory."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"name a (file|path)"):
        open_store(name)
    assert not list(tmp_path.iterdir())
