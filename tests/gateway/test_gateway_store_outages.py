"""Databases that cannot write for a while, by real faults: nobody waits for ever, nothing that was spent is lost, and all goes on after."""

import asyncio
import contextlib
import http.client
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from anabranch.errors import CapacityError, InputError
from anabranch.gateway.config import DeploymentConfig, GatewayConfig, ModelConfig
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.store import LedgerQuery, LedgerRow, open_store, writer
from anabranch.gateway.store.sqlite import SqliteConnection
from anabranch.routers.money import Price
from anabranch.web.api_error import ApiError
from gateway_process import SOURCE, served
from waiting import until_async

# In an outage alone: what is well may take as long as a busy machine needs.
PATIENCE_S, HASTE_S = 120.0, 0.4


def row(request_id, cost=0, **fields):
    return LedgerRow(request_id=request_id, cost_nano=cost, **fields)


def told(entries):
    return [(one.request_id, one.status, one.cost_nano) for one in entries]


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(writer, "PATIENCE_S", PATIENCE_S)
    monkeypatch.setattr(writer, "WATCH_S", 0.1)
    monkeypatch.setattr(writer, "TICK_S", 0.05)


# Faults: each yields two functions, that begin it and end it


@contextlib.contextmanager
def pragma(monkeypatch, on, off):
    """A setting of every connection of this process."""
    wanted, real = [off], SqliteConnection._opened

    def opened(self):
        raw = real(self)
        raw.execute(f"PRAGMA {wanted[0]}")
        return raw

    with monkeypatch.context() as patch:
        patch.setattr(SqliteConnection, "_opened", opened)
        yield lambda: wanted.__setitem__(0, on), lambda: wanted.__setitem__(0, off)


@contextlib.contextmanager
def locked(path):
    """Another process writes, and does not end."""
    held = []
    code = (
        "import sqlite3, sys; held = sqlite3.connect(sys.argv[1], isolation_level=None); held.execute('BEGIN IMMEDIATE');"
        "print('held', flush=True); sys.stdin.readline(); held.execute('COMMIT')"
    )

    def begin():
        command = [sys.executable, "-c", code, str(path)]
        held.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        assert held[0].stdout.readline() == b"held\n"

    def end():
        if held:
            held.pop().communicate(b"\n", timeout=60)

    try:
        yield begin, end
    finally:
        end()


@contextlib.contextmanager
def stopped(databases):
    is_down = []

    def begin():
        databases.stop()
        is_down.append(True)

    def end():
        databases.start()
        is_down.clear()

    try:
        yield begin, end
    finally:
        if is_down:
            databases.start()


@contextlib.contextmanager
def standby(url):
    """What a failover leaves: sessions are cut, and new ones may only read."""
    import psycopg

    def switch(state):
        with psycopg.connect(url, autocommit=True, options="-c default_transaction_read_only=off") as link:
            name = link.execute("SELECT current_database()").fetchone()[0]
            link.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = {state}')
            link.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )

    yield lambda: switch("on"), lambda: switch("off")


@pytest.fixture(params=["read_only", "full", "locked", "stopped", "standby"])
def fault(request, tmp_path, monkeypatch):
    """URL of a store, and what begins and ends a fault of its database."""
    path = tmp_path / "g.db"
    if request.param in ("stopped", "standby"):
        databases = request.getfixturevalue("databases")
        url = databases()
        made = stopped(databases) if request.param == "stopped" else standby(url)
    else:
        url = str(path)
        made = {
            "read_only": lambda: pragma(monkeypatch, "query_only = 1", "query_only = 0"),
            "full": lambda: pragma(monkeypatch, "max_page_count = 1", "max_page_count = 1000000"),
            "locked": lambda: locked(path),
        }[request.param]()
    with made as (begin, end):
        yield url, begin, end


def test_an_outage_refuses_what_is_new_and_keeps_what_is_under_way(fault, monkeypatch):
    url, begin, end = fault

    async def main():
        async with open_store(url) as store:
            await store.set_budget("global", 10**9)
            held = await store.reserve("a", ["global"], 50)
            begin()
            monkeypatch.setattr(writer, "PATIENCE_S", HASTE_S)
            # The decision is more than there may be room for in pages that are there.
            settled, decision = (
                store.settle(held, row("a", 30)),
                store.append_decision("a", "s", "m", {"x": "y" * 50_000}),
            )
            for attempt in (
                lambda: store.reserve("b", ["global"], 5),
                lambda: store.grow(held, 90),
                lambda: store.set_budget("team:t", 5),
                lambda: store.ledger(),
            ):
                with pytest.raises(CapacityError, match="the store cannot write"):
                    await attempt()
            assert not settled.done()
            assert not decision.done()
            monkeypatch.setattr(writer, "PATIENCE_S", PATIENCE_S)
            end()
            await asyncio.wait_for(asyncio.gather(settled, decision), 60)
            await store.settle(await store.reserve("c", ["global"], 5), row("c", 1))
            assert told(await store.ledger()) == [("c", "ok", 1), ("a", "ok", 30)]
            assert len(await store.decisions()) == 1
            assert [(one.spent_nano, one.reserved_nano) for one in await store.budgets()] == [(31, 0)]

    asyncio.run(main())


def test_a_short_outage_is_waited_out(fault):
    url, begin, end = fault

    async def main():
        async with open_store(url) as store:
            secret, key = await store.create_key("k")
            begin()
            waiting = asyncio.gather(store.reserve("a", ["global"], 50), store.key_of(secret))
            await asyncio.sleep(0.3)
            await asyncio.to_thread(end)
            held, found = await waiting
            assert found == key
            await store.settle(held, row("a", 3))
            assert told(await store.ledger()) == [("a", "ok", 3)]

    asyncio.run(main())


@pytest.mark.parametrize("seed", [0, 1])
def test_faults_that_come_and_go_lose_nothing(tmp_path, monkeypatch, seed):
    """What was granted is settled, once and at what it cost; what was refused holds nothing."""
    draw = random.Random(seed)
    monkeypatch.setattr(writer, "PATIENCE_S", 0.05)

    async def main():
        with pragma(monkeypatch, "query_only = 1", "query_only = 0") as (begin, end):
            async with open_store(str(tmp_path / "g.db")) as store:
                await store.set_budget("global", 10**9)
                costs, refused, is_over = {}, [], []

                async def request(number):
                    await asyncio.sleep(draw.random() * 1.2)
                    try:
                        held = await store.reserve(f"r{number}", ["global"], 100)
                    except CapacityError:
                        refused.append(number)
                        return
                    await asyncio.sleep(draw.random() * 0.1)
                    costs[held.request_id] = draw.randrange(100)
                    store.settle(held, row(held.request_id, costs[held.request_id]))

                async def flip():
                    while not is_over:
                        begin()
                        await asyncio.sleep(draw.random() * 0.2)
                        end()
                        await asyncio.sleep(draw.random() * 0.1)

                flipping = asyncio.ensure_future(flip())
                await asyncio.gather(*(request(number) for number in range(150)))
                is_over.append(True)
                await flipping
                await until_async(lambda: not store._writer.trouble and not store._writer._num_rows)
                assert refused
                assert costs
                rows = await store.ledger(LedgerQuery(limit=1000))
                assert {one.request_id: one.cost_nano for one in rows} == costs
                assert [(one.spent_nano, one.reserved_nano) for one in await store.budgets()] == [
                    (sum(costs.values()), 0)
                ]

    asyncio.run(main())


def test_the_gateway_says_503_and_is_back(tmp_path, monkeypatch):
    provider = Mock.Config(model="small", tokens=4)
    model = ModelConfig(
        name="small", price=Price.of_dollars(1, 2), max_tokens=50, deployments=(DeploymentConfig(provider=provider),)
    )
    config = GatewayConfig(models=(model,), require_key=False, store=str(tmp_path / "g.db"))
    body = {"model": "small", "messages": [{"role": "user", "content": "hello"}]}

    async def main():
        async with Gateway(config) as gateway:
            with locked(tmp_path / "g.db") as (begin, end):
                await gateway.achat(body)
                begin()
                monkeypatch.setattr(writer, "PATIENCE_S", HASTE_S)
                found = await asyncio.gather(*(gateway.achat(body) for _ in range(5)), return_exceptions=True)
                for error in found:
                    assert isinstance(error, ApiError)
                    assert (error.status, error.code, error.headers["Retry-After"]) == (503, "store_unavailable", "5")
                monkeypatch.setattr(writer, "PATIENCE_S", PATIENCE_S)
                end()
            await until_async(lambda: not gateway.store._writer._num_rows)
            await gateway.achat(body)
            rows = await gateway.store.ledger()
            assert sorted(one.status for one in rows) == ["ok", "ok", *["refused"] * 5]
            assert {one.code for one in rows if one.status == "refused"} == {"store_unavailable"}

    asyncio.run(main())


# Jobs that fail by themselves


def test_a_settlement_that_fails_by_itself_is_kept_until_it_can_be_written(tmp_path, monkeypatch, caplog):
    fails, real = [3], writer.apply

    def failing(connection, jobs, *rest):
        if any(isinstance(job, writer.Settle) and job.row.request_id == "odd" for job in jobs) and fails[0]:
            fails[0] -= len(jobs) == 1
            raise ValueError("nobody knows why")
        real(connection, jobs, *rest)

    monkeypatch.setattr(writer, "apply", failing)

    async def main():
        async with open_store(str(tmp_path / "g.db")) as store:
            odd, even = await store.reserve("odd", ["global"], 5), await store.reserve("even", ["global"], 5)
            first, second = store.settle(odd, row("odd", 3)), store.settle(even, row("even", 4))
            await second
            assert not first.done()
            assert told(await store.ledger()) == [("even", "ok", 4)]
            await asyncio.wait_for(first, 60)
            assert told(await store.ledger()) == [("odd", "ok", 3), ("even", "ok", 4)]

    with caplog.at_level(logging.ERROR):
        asyncio.run(main())
    assert caplog.text.count("request odd cannot be settled yet") == 1


def test_what_is_never_written_is_said_and_settled_by_the_next(tmp_path, monkeypatch, caplog):
    def failing(connection, jobs, *rest):
        if any(isinstance(job, writer.Settle) for job in jobs):
            raise ValueError("nobody knows why")
        real(connection, jobs, *rest)

    real = writer.apply

    async def main():
        async with open_store(str(tmp_path / "g.db")) as store:
            store.settle(await store.reserve("a", ["global"], 5), row("a", 3)).add_done_callback(
                lambda done: done.exception()
            )

    with monkeypatch.context() as patch:
        patch.setattr(writer, "apply", failing)
        with caplog.at_level(logging.ERROR):
            asyncio.run(main())
    assert "request a is not settled, at 3 nano-dollars: nobody knows why" in caplog.text

    async def after():
        async with open_store(str(tmp_path / "g.db")) as store:
            assert told(await store.ledger()) == [("a", "crashed", 5)]

    asyncio.run(after())


def test_other_jobs_fail_alone(tmp_path):
    async def main():
        async with open_store(str(tmp_path / "g.db")) as store:
            huge = store.append(row("huge", prompt_tokens=2**70))
            fine = store.append(row("fine"))
            await fine
            with pytest.raises(OverflowError):
                await huge
            with pytest.raises(InputError, match="so it is"):
                await store._do(_raise)
            assert told(await store.ledger()) == [("fine", "ok", 0)]

    def _raise(connection):
        raise InputError("so it is")

    asyncio.run(main())


# Bounds


def test_rows_that_cost_nobody_anything_are_left_out_before_memory_is(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(writer, "MOST_ROWS", 20)
    monkeypatch.setattr(writer, "MOST_BYTES", 10_000)

    async def main():
        with pragma(monkeypatch, "query_only = 1", "query_only = 0") as (begin, end):
            async with open_store(str(tmp_path / "g.db")) as store:
                held = [await store.reserve(f"r{number}", ["global"], 5) for number in range(30)]
                begin()
                texts = [store.append_texts(f"r{number}", {"query": "x" * 4000}) for number in range(5)]
                settled = [store.settle(one, row(one.request_id, 1)) for one in held]
                refused = [store.append(row(f"refused{number}")) for number in range(50)]
                assert [isinstance(one.exception(), CapacityError) for one in refused] == [True] * 50
                assert [one.done() for one in texts] == [False, False, False, True, True]
                end()
                await asyncio.gather(*settled)
                await store.append(row("after"))
                assert len(await store.ledger()) == 31
                assert len((await store.told_of([f"r{number}" for number in range(5)]))[1]) == 3
                assert store._writer._num_rows == store._writer._num_bytes == 0

    with caplog.at_level(logging.ERROR):
        asyncio.run(main())
    assert "rows that cost nobody anything are left out" in caplog.text
    assert "there is room again; 52 rows were left out" in caplog.text


def test_closing_while_the_database_is_down_ends(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(writer, "GIVE_UP_S", 0.3)
    url = str(tmp_path / "g.db")

    async def main():
        with pragma(monkeypatch, "query_only = 1", "query_only = 0") as (begin, end):
            store = open_store(url)
            held = await store.reserve("a", ["global"], 50)
            begin()
            settled = store.settle(held, row("a", 30))
            await store.close()
            with pytest.raises(CapacityError):
                await settled
            end()
            async with open_store(url) as store:
                assert told(await store.ledger()) == [("a", "crashed", 50)]

    with caplog.at_level(logging.ERROR):
        asyncio.run(main())
    assert "could not write 1 rows before it closed" in caplog.text


# What the system takes away, in processes of their own

COMMON = """
import asyncio, os, resource, sys, time
from anabranch.errors import CapacityError
from anabranch.gateway.store import LedgerRow, open_store, writer
writer.PATIENCE_S, writer.WATCH_S, writer.TICK_S = 60, 0.1, 0.05

async def refused(work):
    writer.PATIENCE_S = 0.4
    try:
        await work
    except CapacityError:
        pass
    else:
        raise AssertionError("it was done")
    writer.PATIENCE_S = 60

async def well(store, held, settled, left):
    await asyncio.wait_for(settled, 60)
    await store.settle(await store.reserve("after", ["global"], 5), LedgerRow(request_id="after", cost_nano=1))
    for _ in range(1200):
        found = {one.request_id: (one.status, one.cost_nano) for one in await store.ledger()}
        if "left" in found or not left:
            break
        await asyncio.sleep(0.05)
    assert found == {"held": ("ok", 3), "after": ("ok", 1)} | ({"left": ("crashed", 7)} if left else {}), found
    print("well")
"""

DESCRIPTORS = (
    COMMON
    + """
writer.WATCH_S = 100

async def main(path):
    store = open_store(path)
    held = await store.reserve("held", ["global"], 5)
    left = open_store(path)
    await left.reserve("left", ["global"], 7)
    await left.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    taken = []

    def take():
        try:
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            pass

    take()
    # First nothing but who is alive cannot be seen; then the file cannot be opened again either, as after an error.
    writer.WATCH_S = 0.1
    await asyncio.sleep(0.3)
    await store._do(lambda connection: None)
    store._writer._connection._drop()
    take()
    settled = store.settle(held, LedgerRow(request_id="held", cost_nano=3))
    await refused(store.reserve("refused", ["global"], 5))
    await refused(store.key_of("nobody's"))
    await asyncio.sleep(0.3)
    for one in taken:
        os.close(one)
    await well(store, held, settled, True)
    await store.close()

asyncio.run(main(sys.argv[1]))
"""
)

RIGHTS = (
    COMMON
    + """
import pathlib
from anabranch.gateway.store import sqlite
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)

async def main(path):
    folder = pathlib.Path(path).parent
    store = open_store(path)
    held = await store.reserve("held", ["global"], 5)
    files = [one for one in folder.iterdir()]
    for one in files:
        one.chmod(0o400)
    folder.chmod(0o500)
    store._writer._connection._drop()
    settled = store.settle(held, LedgerRow(request_id="held", cost_nano=3))
    await refused(store.reserve("refused", ["global"], 5))
    await asyncio.sleep(0.3)
    folder.chmod(0o700)
    for one in files:
        if one.exists():
            one.chmod(0o600)
    await well(store, held, settled, False)
    await store.close()

asyncio.run(main(sys.argv[1]))
"""
)


def ran(code, path):
    environment = {**os.environ, "PYTHONPATH": SOURCE, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=250, env=environment
    )
    assert (done.returncode, done.stdout) == (0, "well\n"), done.stderr[-4000:]
    assert "Traceback" not in done.stderr


def test_a_process_without_descriptors_goes_on_when_it_has_some(tmp_path):
    """It can neither open the store anew nor see who is alive; both come back."""
    ran(DESCRIPTORS, tmp_path / "g.db")


def test_files_and_a_folder_that_may_only_be_read_for_a_while():
    folder = Path(tempfile.mkdtemp(prefix="store", dir="/tmp"))
    try:
        if os.geteuid() == 0:
            shutil.chown(folder, "nobody")
        ran(RIGHTS, folder / "g.db")
    finally:
        shutil.rmtree(folder)


CONFIG = """
require_key = false
store = "{store}"
[strategies.cheapest]
kind = "cheapest"
[[models]]
name = "small"
max_tokens = 20
deployments = [{{ provider = {{ kind = "mock", tokens = 4 }} }}]
"""


def asked(running):
    """Status of a request, and how long it took."""
    body = json.dumps({"model": "small", "messages": [{"role": "user", "content": "hello"}]})
    began, link = time.monotonic(), http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
    try:
        link.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        return link.getresponse().status, time.monotonic() - began
    finally:
        link.close()


@pytest.mark.slow
def test_a_server_refuses_after_five_seconds_and_is_back_at_once(tmp_path):
    """As users start it, while another process holds the store for longer than anybody waits."""
    store, config = tmp_path / "g.db", tmp_path / "gateway.toml"
    config.write_text(CONFIG.format(store=store))
    with served("--config", str(config)) as running:
        assert asked(running)[0] == 200
        with locked(store) as (begin, end):
            begin()
            with ThreadPoolExecutor(8) as pool:
                for status, seconds in pool.map(lambda _: asked(running), range(8)):
                    assert status == 503
                    assert 4.5 < seconds < 7
            end()
        # The writer has been waiting for the lock.
        assert [asked(running)[0] for _ in range(3)] == [200] * 3
