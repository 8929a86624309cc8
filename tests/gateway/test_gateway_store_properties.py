"""What holds of budgets whatever is asked: against a model of one dictionary, under a thousand requests at once, and after kill -9."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import BudgetError
from anabranch.gateway.store import LedgerQuery, LedgerRow, open_store
from waiting import until

SUBJECTS = ("global", "team:a", "user:x", "tag:t")
REQUESTS = st.lists(
    st.tuples(
        st.sets(st.sampled_from(SUBJECTS), min_size=1),
        st.integers(0, 60),  # held
        st.integers(0, 60),  # grown to
        st.floats(0, 1),  # share of it that is spent
        st.booleans(),  # settled before the next one
    ),
    max_size=25,
)


@settings(max_examples=25)
@given(limits=st.dictionaries(st.sampled_from(SUBJECTS), st.integers(0, 200)), requests=REQUESTS)
def test_one_after_another_as_a_dictionary_would(limits, requests):
    """Every grant, refusal and counter is what a plain dictionary of numbers says."""
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(_compare(f"{folder}/g.db", limits, requests))


async def _compare(url, limits, requests):
    spent, reserved, costs = Counter(), Counter(), Counter()

    def fits(subjects, nano):
        return all(spent[one] + reserved[one] + nano <= limits[one] for one in subjects if one in limits)

    def end(store, held, cost):
        store.settle(held, LedgerRow(request_id=held.request_id, cost_nano=cost))
        for one in held.subjects:
            reserved[one] -= held.nano
            spent[one] += cost
        costs[held.request_id] = cost

    async with open_store(url) as store:
        for subject, limit in limits.items():
            await store.set_budget(subject, limit)
        later = []
        for number, (subjects, nano, grown, share, ends) in enumerate(requests):
            may = fits(subjects, nano)
            try:
                held = await store.reserve(f"r{number}", sorted(subjects), nano)
            except BudgetError:
                assert not may
                continue
            assert may
            reserved.update(dict.fromkeys(subjects, nano))
            more = max(0, grown - nano)
            may = fits(subjects, more)
            try:
                held = await store.grow(held, grown)
            except BudgetError:
                assert not may
                assert more
            else:
                assert may or not more
                reserved.update(dict.fromkeys(subjects, more))
            if ends:
                end(store, held, int(held.nano * share))
            else:
                later.append((held, int(held.nano * share)))
        for one in await store.budgets():
            assert (one.spent_nano, one.reserved_nano) == (spent[one.subject], reserved[one.subject])
            assert one.spent_nano + one.reserved_nano <= one.limit_nano
        for held, cost in later:
            end(store, held, cost)
        for one in await store.budgets():
            assert (one.spent_nano, one.reserved_nano) == (spent[one.subject], 0)
        assert {one.request_id: one.cost_nano for one in await store.ledger()} == dict(costs)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_thousand_at_once(tmp_path, seed):
    """No committed moment passes a limit, the ledger adds up to the budgets, and each request has one row."""
    draw = random.Random(seed)

    async def main():
        async with (
            open_store(str(tmp_path / "g.db")) as store,
            open_store(str(tmp_path / "g.db"), serves=False) as onlooker,
        ):
            for subject in SUBJECTS:
                await store.set_budget(subject, draw.randrange(20_000, 400_000))
            over, busy, granted = [], [0], []

            async def request(name, subjects, nano, wait_s, cost):
                try:
                    held = await store.reserve(name, subjects, nano)
                except BudgetError:
                    store.append(LedgerRow(request_id=name, status="refused"))
                    return
                granted.append(name)
                await asyncio.sleep(wait_s)
                store.settle(held, LedgerRow(request_id=name, cost_nano=cost))

            async def watch():
                while True:
                    for one in await onlooker.budgets():
                        busy[0] = max(busy[0], one.reserved_nano)
                        if not 0 <= one.reserved_nano <= one.limit_nano - one.spent_nano:
                            over.append(one)

            watching = asyncio.ensure_future(watch())
            plans = []
            for number in range(1000):
                nano = draw.randrange(2000)
                subjects = draw.sample(SUBJECTS, draw.randrange(1, 5))
                plans.append((f"r{number}", subjects, nano, draw.random() * 0.2, draw.randrange(nano + 1)))
            await asyncio.gather(*(request(*plan) for plan in plans))
            watching.cancel()
            assert over == []
            assert busy[0] > 0
            assert 0 < len(granted) < 1000
            entries = await store.ledger(LedgerQuery(limit=2000))
            assert sorted(one.request_id for one in entries) == sorted(plan[0] for plan in plans)
            assert sum(one.status == "ok" for one in entries) == len(granted)
            costs = {plan[0]: plan[4] for plan in plans if plan[0] in set(granted)}
            assert {one.request_id: one.cost_nano for one in entries if one.status == "ok"} == costs
            for one in await store.budgets():
                assert one.spent_nano == sum(
                    costs[name] for name, subjects, *_ in plans if name in costs and one.subject in subjects
                )
                assert one.reserved_nano == 0

    asyncio.run(main())


# kill -9

CHILD = """
import asyncio, random, sys
from anabranch.errors import BudgetError
from anabranch.gateway.store import LedgerRow, open_store

async def main(path, prefix):
    draw = random.Random(prefix)
    store = open_store(path)
    def told(word, name):
        sys.stdout.write(f"{word} {name}\\n")
        sys.stdout.flush()
    async def worker(number):
        for turn in range(10**6):
            name = f"{prefix}-{number}-{turn}"
            subjects = draw.sample(["global", "team:a", "user:x", "tag:t"], draw.randrange(1, 5))
            nano = draw.randrange(1, 2000)
            try:
                held = await store.reserve(name, subjects, nano)
            except BudgetError:
                await store.append(LedgerRow(request_id=name, status="refused"))
                told("ended", name)
                continue
            told("held", name)
            await asyncio.sleep(draw.random() * 0.003)
            if draw.random() < 0.2:
                try:
                    held = await store.grow(held, nano + 100)
                except BudgetError:
                    pass
            done = store.settle(held, LedgerRow(request_id=name, cost_nano=draw.randrange(held.nano + 1)))
            if draw.random() < 0.5:
                await done
                told("ended", name)
    await asyncio.gather(*(worker(number) for number in range(12)))

asyncio.run(main(*sys.argv[1:]))
"""


def drill(folder: Path, kills: int) -> None:
    """A process under load is killed at random moments and followed by another; then what it said is compared with what is there."""
    path, draw, held, ended = folder / "g.db", random.Random(kills), set(), set()
    limits = {"global": 10**9, "team:a": 400_000 * kills, "user:x": 10**9, "tag:t": 100_000}

    async def prepare():
        async with open_store(str(path)) as store:
            for subject, limit in limits.items():
                await store.set_budget(subject, limit)

    asyncio.run(prepare())
    said = folder / "said"
    for number in range(kills):
        with said.open("w") as out:
            child = subprocess.Popen([sys.executable, "-c", CHILD, str(path), f"p{number}"], stdout=out, env=os.environ)
            until(lambda: said.stat().st_size)
            time.sleep(draw.random() * 0.15)
            child.send_signal(signal.SIGKILL)
            assert child.wait(60) == -signal.SIGKILL
        for line in said.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                word, name = line.split()
                (held if word == "held" else ended).add(name)
        asyncio.run(_check(path, limits, held, ended))
    assert len(held) > kills
    assert ended


async def _check(path, limits, held, ended):
    async with open_store(str(path)) as store:
        entries, last = [], None
        while page := await store.ledger(LedgerQuery(limit=100_000, before_seq=last)):
            entries += page
            last = page[-1].seq
        rows = Counter(one.request_id for one in entries)
        assert set(rows.values()) <= {1}
        assert held | ended <= set(rows)  # nothing that was committed is lost
        status = {one.request_id: one.status for one in entries}
        assert not [name for name in ended if status[name] == "crashed"]  # what ended before ended as it said
        assert all(
            one.cost_nano == one.reserved_nano and one.flags == ("recovered",)
            for one in entries
            if one.status == "crashed"
        )
        assert all(one.cost_nano <= one.reserved_nano for one in entries)
        for one in await store.budgets():
            assert one.reserved_nano == 0
            assert one.spent_nano <= limits[one.subject]
        scopes = {"global": "global", "team:a": "team", "user:x": "user", "tag:t": "tags"}
        for one in await store.budgets():
            if one.subject != "global":  # rows do not tell whether everyone's budget was among the subjects
                owner, name = scopes[one.subject], one.subject.partition(":")[2]
                mine = [entry for entry in entries if getattr(entry, owner) in (name, (name,))]
                assert one.spent_nano == sum(entry.cost_nano for entry in mine)
        left = await store._read(lambda connection: connection.rows("SELECT count(*) FROM reservations"))
        assert left == [(0,)]


@pytest.mark.slow
def test_five_kills(tmp_path):
    drill(tmp_path, 5)


@pytest.mark.slow
def test_fifty_kills(tmp_path):
    drill(tmp_path, 50)
