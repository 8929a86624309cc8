"""Several processes on one store: who is alive is told from who is not, and a mistake about it costs nobody anything."""

import asyncio
import os
import tempfile
import threading
import time
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.gateway.store import LedgerQuery, LedgerRow, open_store, writer
from anabranch.gateway.store.batch import recover
from anabranch.gateway.store.jobs import Do
from anabranch.gateway.store.sqlite import SqliteDatabase
from waiting import until, until_async

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC).timestamp()
HOUR = 3600.0


class Clock:
    def __init__(self, now=NOON):
        self.now = now

    def __call__(self):
        return self.now


def row(request_id, cost=0, **fields):
    return LedgerRow(request_id=request_id, cost_nano=cost, **fields)


def told(entries):
    return [(one.request_id, one.status, one.cost_nano, one.flags) for one in entries]


async def give_up(store, other):
    """``store`` takes ``other`` for dead, whatever is true."""
    store._database.dead = lambda connection: [other._database.replica]
    work = Do(lambda connection: recover(store._database, connection, store._now_us()), in_transaction=False)
    return await store._writer.give(work, at_once=True)


@pytest.fixture
def hasty(monkeypatch):
    """Signs of life come ten times as often, and are waited for as much shorter."""
    _with_times(monkeypatch, 0.5)


@pytest.fixture
def patient(monkeypatch):
    """They come as often, and nobody is dead before `pass_a_lease`."""
    _with_times(monkeypatch, 1e6)


def _with_times(monkeypatch, lease_s):
    from anabranch.gateway.store import postgres

    for module, name, value in (
        (postgres, "LEASE_S", lease_s),
        (postgres, "BEAT_S", 0.1),
        (writer, "WATCH_S", 0.1),
        (writer, "TICK_S", 0.05),
    ):
        monkeypatch.setattr(module, name, value)


async def pass_a_lease(store, alive):
    """As if ``store`` had seen the others as they are for longer than a lease; those that are ``alive`` give a sign after that."""
    database, alive = store._database, [one._database.replica for one in alive]

    def passed(connection):
        found = dict(connection.rows("SELECT id, seen_us FROM replicas"))
        until(
            lambda: all(dict(connection.rows("SELECT id, seen_us FROM replicas"))[one] != found[one] for one in alive)
        )
        database._signs = {replica: (seen_us, -1e9) for replica, seen_us in found.items()}

    await store._do(passed)
    # It has looked once more.
    await until_async(lambda: all(since_s >= 0 for _, since_s in database._signs.values()))


# Alive or not


def test_a_replica_whose_writer_is_busy_is_alive(databases, patient):
    """Its writer is held up for three leases, while another looks all the time."""
    url, is_over = databases(), threading.Event()

    async def main():
        async with open_store(url) as busy, open_store(url) as other:
            held = await busy.reserve("a", ["global"], 5)
            busies = asyncio.ensure_future(busy._do(lambda connection: is_over.wait(60)))
            for _ in range(3):
                await pass_a_lease(other, [busy])
            assert not busies.done()
            is_over.set()
            await busies
            assert await other.ledger() == []
            await busy.settle(held, row("a", 2))
            assert told(await other.ledger()) == [("a", "ok", 2, ())]

    asyncio.run(main())


def test_a_replica_that_says_nothing_any_more_is_dead(databases, hasty):
    url, began = databases(), time.monotonic()

    async def main():
        async with open_store(url) as silent, open_store(url) as other:
            await silent.reserve("a", ["global"], 5)
            silent._database._ends.set()
            await until_async(other.ledger)
            # A lease, which did not begin before the test.
            assert time.monotonic() - began > 0.5
            assert told(await other.ledger()) == [("a", "crashed", 5, ("recovered",))]

    asyncio.run(main())


@pytest.mark.parametrize("leap_us", [-(10**15), 10**15])
def test_a_clock_that_leaps_makes_nobody_dead_and_nobody_immortal(databases, patient, leap_us):
    url = databases()

    def leap(connection):
        connection.run("UPDATE replicas SET seen_us = seen_us + :leap", leap=leap_us)

    async def main():
        async with open_store(url) as silent, open_store(url) as living, open_store(url) as other:
            await silent.reserve("dead", ["global"], 5)
            await living.reserve("alive", ["global"], 5)
            silent._database._ends.set()
            silent._database._beater.join()
            await other._do(leap)
            for _ in range(3):
                await pass_a_lease(other, [living])
            assert told(await other.ledger()) == [("dead", "crashed", 5, ("recovered",))]

    asyncio.run(main())


def test_what_others_left_is_settled_under_load_too(tmp_path, monkeypatch):
    """More comes all the time than the writer gets done."""
    monkeypatch.setattr(writer, "WATCH_S", 0.1)
    real = writer.apply

    def slow(*arguments):
        time.sleep(0.02)
        real(*arguments)

    monkeypatch.setattr(writer, "apply", slow)
    url = str(tmp_path / "g.db")

    async def main():
        async with open_store(url) as busy, open_store(url, serves=False) as onlooker:
            left = open_store(url)
            await left.reserve("left", ["global"], 5)
            await left.close()
            number, waiting = 0, []

            async def is_settled():
                nonlocal number
                for _ in range(600):
                    number += 1
                    busy.append(row(f"r{number}"))
                waiting.append(len(busy._writer._jobs))
                return await onlooker._ask(
                    lambda connection: connection.rows("SELECT status FROM ledger WHERE request_id = 'left'")
                )

            await until_async(is_settled)
            assert max(waiting) > 0

    asyncio.run(main())


@pytest.mark.parametrize("other_name", ["link.db", "folder/g.db"])
def test_two_names_of_one_file_are_one_store(tmp_path, monkeypatch, other_name):
    """Through a link to the file, or to its folder, a living process is seen to be alive."""
    monkeypatch.setattr(writer, "WATCH_S", 0.05)
    monkeypatch.setattr(writer, "TICK_S", 0.05)
    path = tmp_path / "real" / "g.db"
    path.parent.mkdir()
    (tmp_path / other_name.partition("/")[0]).symlink_to(path if other_name == "link.db" else path.parent)

    async def main():
        async with open_store(str(path)) as one, open_store(str(tmp_path / other_name)) as two:
            held, mine = await one.reserve("a", ["global"], 5), await two.reserve("b", ["global"], 7)
            async with open_store(str(tmp_path / other_name)) as three:
                assert three.recovered == 0
            await asyncio.sleep(0.3)
            assert await one.ledger() == await two.ledger() == []
            await one.settle(held, row("a", 2))
            await two.settle(mine, row("b", 1))
            assert told(await one.ledger()) == [("b", "ok", 1, ()), ("a", "ok", 2, ())]
        assert list(tmp_path.rglob("*-replica-*")) == []

    asyncio.run(main())


def test_a_process_is_found_whatever_its_file_is_called_meanwhile(tmp_path):
    """Renamed while it is in use, or under a second name in the same folder."""
    path, second = tmp_path / "g.db", tmp_path / "second.db"

    async def main():
        async with open_store(str(path)) as one:
            os.link(path, second)
            assert not SqliteDatabase(second)._is_dead(one._database.replica)
        assert SqliteDatabase(second)._is_dead(one._database.replica)

    asyncio.run(main())


def test_what_a_process_left_behind_under_another_name_is_settled(tmp_path):
    path, link = tmp_path / "g.db", tmp_path / "link.db"

    async def main():
        async with open_store(str(path)):
            pass
        link.symlink_to(path)
        first = open_store(str(link))
        await first.reserve("left", ["global"], 60)
        await first.close()
        async with open_store(str(path)) as second:
            assert second.recovered == 1
            assert told(await second.ledger()) == [("left", "crashed", 60, ("recovered",))]

    asyncio.run(main())


# Taken for dead by mistake


def test_what_ends_after_all_is_charged_what_it_cost(url):
    """By hand: 60 of 100 are held and charged by mistake; then 25 are spent of it, and 75 are left."""

    async def main():
        async with open_store(url) as one, open_store(url) as other:
            await one.set_budget("global", 100)
            held = await one.reserve("a", ["global", "team:t"], 60, requested="auto", strategy="knn")
            assert await give_up(other, one) == 1
            (budget,) = await one.budgets()
            assert (budget.spent_nano, budget.reserved_nano) == (60, 0)
            assert told(await one.ledger()) == [("a", "crashed", 60, ("recovered",))]
            await one.settle(held, row("a", 25))
            await one.settle(held, row("a", 30))
            (entry,) = await other.ledger()
            assert (entry.status, entry.cost_nano, entry.reserved_nano, entry.team) == ("ok", 25, 60, "t")
            assert entry.flags == ("corrected",)
            (budget,) = await other.budgets()
            assert (budget.spent_nano, budget.reserved_nano, budget.remaining_nano) == (25, 0, 75)
            assert await give_up(other, one) == 0

    asyncio.run(main())


def test_what_was_given_up_may_still_grow(url):
    async def main():
        async with open_store(url) as one, open_store(url) as other:
            await one.set_budget("global", 100)
            held = await one.reserve("a", ["global"], 60, requested="auto", strategy="knn")
            await give_up(other, one)
            held = await one.grow(held, 90)
            (budget,) = await other.budgets()
            assert (budget.spent_nano, budget.reserved_nano) == (0, 90)
            assert await other.ledger() == []
            # It is held by the one whose it is, and would be settled by others again.
            assert await give_up(other, one) == 1
            (entry,) = await other.ledger()
            assert (entry.requested, entry.strategy, entry.cost_nano) == ("auto", "knn", 90)
            await one.settle(held, row("a", 70))
            (budget,) = await one.budgets()
            assert (budget.spent_nano, budget.reserved_nano) == (70, 0)

    asyncio.run(main())


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("reserve"), st.integers(0, 60)),
        st.tuples(st.just("grow"), st.integers(0, 9), st.integers(0, 90)),
        st.tuples(st.just("settle"), st.integers(0, 9), st.floats(0, 1)),
        st.tuples(st.just("give up")),
        st.tuples(st.just("hours"), st.integers(1, 30)),
    ),
    max_size=20,
)


@settings(max_examples=25)
@given(steps=STEPS)
def test_whatever_others_believe_budgets_are_what_a_dictionary_says(steps):
    """Requests that are held, given up by another, grown, settled, in any order and over hours and days."""
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(_compare(f"{folder}/g.db", steps))


async def _compare(url, steps):
    clock, open_, charged, held = Clock(), {}, {}, []
    async with open_store(url, clock=clock) as one, open_store(url, clock=clock) as other:
        for period in ("total", "day"):
            await one.set_budget("global", 10**9, period)
        for step in steps:
            if step[0] == "reserve":
                held.append(await one.reserve(f"r{len(held)}", ["global"], step[1]))
                open_[held[-1].request_id] = step[1]
            elif step[0] == "give up":
                assert await give_up(other, one) == len(open_)
                charged |= {name: (nano, clock.now, "crashed") for name, nano in open_.items()}
                open_.clear()
            elif step[0] == "hours":
                clock.now += step[1] * HOUR
            elif held:
                at = step[1] % len(held)
                name = held[at].request_id
                if charged.get(name, (0, 0, "crashed"))[2] != "crashed":
                    continue
                before = charged.pop(name)[0] if name in charged else open_[name]
                if step[0] == "grow":
                    held[at] = await one.grow(held[at], step[2])
                    open_[name] = max(before, step[2])
                    assert held[at].nano == open_[name]
                else:
                    open_.pop(name, None)
                    cost = int(before * step[2])
                    await one.settle(held[at], row(name, cost))
                    charged[name] = (cost, clock.now, "ok")
            await _check(one, clock, open_, charged)


async def _check(store, clock, open_, charged):
    since = {"total": 0, "day": clock.now - clock.now % (24 * HOUR)}
    for budget in await store.budgets():
        spent = sum(cost for cost, at, _ in charged.values() if at >= since[budget.period])
        assert (budget.spent_nano, budget.reserved_nano) == (spent, sum(open_.values())), budget.period
    rows = await store.ledger(LedgerQuery(limit=1000))
    assert {one.request_id: (one.cost_nano, one.ts_us / 1e6, one.status) for one in rows} == charged
    assert len(rows) == len(charged)
