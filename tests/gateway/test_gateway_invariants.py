"""What holds whatever clients and upstreams do: money, rows, requests under way, tenants; also when the process is killed under load."""

import asyncio
import contextlib
import http.client
import json
import random
import signal
import threading
import time
from collections import Counter

import pytest

from anabranch.gateway.config import (
    BreakerConfig,
    CacheConfig,
    DeploymentConfig,
    GatewayConfig,
    HedgeConfig,
    ModelConfig,
    RetryConfig,
    StrategyConfig,
)
from anabranch.gateway.dispatch.hedge import HedgeDelay
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.store import LedgerQuery, keyring, open_store
from anabranch.gateway.store.postgres import LEASE_S
from anabranch.routers.embed.hashed import Hashed
from anabranch.routers.money import Price, nano_dollars
from anabranch.web.api_error import ApiError
from gateway_process import served
from gateway_stores import missing, server
from paced_time import pace, run_paced
from waiting import until

STEPS = (
    *("ok",) * 9,
    *("slow:0.3",) * 5,
    "500",
    "429:0",
    "cut:2",
    "reset",
    "garbage",
    "slow:0.05",
    "filter",
    "credit",
    "html",
    "no_done",
    "short",
)
LIMITS = {"global": 1.0, "team:a": 0.2, "user:x": 0.2, "tag:t": 0.03}


def deployment(name, seed):
    script = tuple(random.Random(seed).choices(STEPS, k=200))
    return DeploymentConfig(
        name=name, provider=Mock.Config(model=name, tokens=6, latency_s=0.002, script=script, loops=True)
    )


def busy(tmp_path, seed, mode):
    """Three models with two deployments each, all of which fail now and then; hedges, retries, fallbacks, both caches."""
    models = tuple(
        ModelConfig(
            name=name,
            price=Price.of_dollars(dollars, 2 * dollars),
            max_tokens=40,
            deployments=(deployment(f"{name}-1", seed + at), deployment(f"{name}-2", seed + at + 100)),
        )
        for at, (name, dollars) in enumerate((("small", 1), ("medium", 3), ("large", 10)))
    )
    return GatewayConfig(
        models=models,
        strategies={"cheapest": StrategyConfig(use="cheapest"), "random": StrategyConfig(use="random")},
        fallbacks={"small": ("medium", "large"), "medium": ("small",)},
        require_key=True,
        deadline_s=3.0,
        hedge=HedgeConfig(),
        breaker=BreakerConfig(open_s=0.02, max_open_s=0.05),
        mid_stream=mode,
        retries=RetryConfig(attempts=3, base_s=0.002, cap_s=0.01, budget=1.0),
        cache=CacheConfig(semantic=True),
        embedder=Hashed.Config(),
        store=str(tmp_path / "g.db"),
    )


def draw_request(draw):
    """(endpoint, body, headers): small prompts that repeat, so that caches and single flight have something to do."""
    endpoint = draw.choices(("chat", "completions", "embeddings"), (8, 2, 1))[0]
    text = f"question {draw.randrange(30)}"
    names = ("small", "medium", "large", "auto/cheapest", "auto/random")
    body = {"model": draw.choice(names), "user": draw.choice(("x", "y"))}
    if endpoint == "chat":
        body |= {"messages": [{"role": "user", "content": text}], "stream": draw.random() < 0.5}
    elif endpoint == "completions":
        body |= {"prompt": draw.choice((text, [text, "more"])), "stream": draw.random() < 0.3}
    else:
        body |= {"input": [text, text]}
    if endpoint != "embeddings":
        body |= {"max_tokens": draw.choice((1, 5, 40)), "temperature": draw.choice((0, 1)), "n": draw.choice((1, 1, 2))}
    headers = {"x-tags": "t"} if draw.random() < 0.3 else {}
    if draw.random() < 0.1:
        headers["x-cache"] = draw.choice(("allow", "deny"))
    return endpoint, body, headers


async def one(gateway, draw, key, leaves, ids):
    """Send one request; read its answer, or leave at some moment."""
    endpoint, body, headers = draw_request(draw)
    patience_s = draw.random() * 0.3 if leaves else None
    await asyncio.sleep(draw.choice((0, draw.random())))

    async def whole():
        reply = await gateway.handle(endpoint, body, key=key, headers=headers)
        ids.append(reply.headers["x-request-id"])
        if reply.stream is not None:
            try:
                async for _ in reply.stream:
                    await asyncio.sleep(0)
            finally:
                await reply.stream.aclose()

    try:
        await asyncio.wait_for(whole(), patience_s)
    except TimeoutError:
        return "left"
    except ApiError as error:
        ids.append(error.headers["x-request-id"])
        return error.code
    return "answered"


async def watch(gateway, seen):
    """At every moment, no budget is passed."""
    while True:
        for budget in await gateway.store.budgets():
            assert budget.spent_nano + budget.reserved_nano <= budget.limit_nano, budget
            seen.append(budget.reserved_nano)
        await asyncio.sleep(0.002)


async def check_books(store, sent):
    """Each request has one row, no row costs more than was set aside, and budgets hold what the rows say."""
    rows = await store.ledger(LedgerQuery(limit=100_000))
    assert max(Counter(row.request_id for row in rows).values()) == 1
    assert len(rows) == sent
    over = [row for row in rows if row.cost_nano > row.reserved_nano]
    assert not over, over[0]
    assert [row for row in rows if row.cache and row.cost_nano] == []
    for budget in await store.budgets():
        scope, _, name = budget.subject.partition(":")
        owner = {"team": "team", "user": "user", "tag": "tags"}.get(scope)
        mine = [row.cost_nano for row in rows if owner is None or getattr(row, owner) in (name, (name,))]
        assert (budget.reserved_nano, budget.spent_nano) == (0, sum(mine))
    assert await store._read(lambda connection: connection.rows("SELECT count(*) FROM reservations")) == [(0,)]
    [total] = await store.spend()
    assert total.cost_nano == sum(row.cost_nano for row in rows)
    return rows


@pytest.mark.parametrize(("seed", "mode"), [(1, "error"), (2, "continue")])
def test_a_thousand_random_requests_at_once(tmp_path, monkeypatch, seed, mode):
    draw = random.Random(seed)
    monkeypatch.setattr(HedgeDelay, "delay_s", 0.002)  # from the first request on
    monkeypatch.setattr(keyring, "STALE_S", 1e9)  # a request that waits for its key has not begun, and leaves no row

    async def main():
        async with Gateway(busy(tmp_path, seed, mode)) as gateway:
            pace(gateway)
            keys = [
                (await gateway.store.create_key(f"k{at}", team="a" if at % 2 else "", speaks_for=["*"]))[0]
                for at in range(4)
            ]
            for subject, limit in LIMITS.items():
                await gateway.store.set_budget(subject, nano_dollars(limit))
            for key in keys:  # so that no request waits for its key, and each has begun when its client leaves
                await gateway.store.key_of(key)
            seen, ids = [], []
            watcher = asyncio.create_task(watch(gateway, seen))
            ended = Counter(
                await asyncio.gather(
                    *(
                        one(gateway, random.Random(draw.random()), draw.choice(keys), at % 5 == 0, ids)
                        for at in range(1000)
                    )
                )
            )
            await gateway.settled()
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher
            await asyncio.sleep(0)
            assert gateway.in_flight == gateway.runtime.users == 0
            assert len(gateway.caches.flights) == 0
            assert all(state["in_flight"] == 0 for state in gateway.runtime.dispatcher.states())
            assert gateway.runtime.dispatcher.budget.held == 0
            rows = await check_books(gateway.store, 1000)
            assert {row.request_id for row in rows} >= set(ids)
            return ended, seen, rows

    # A thousand at once are more work between two looks than a few.
    ended, seen, rows = run_paced(main(), 0.02)
    assert ended["answered"] > 50
    assert ended["left"] > 20
    assert ended["insufficient_quota"] > 0
    assert max(seen) > 0
    assert len({row.cache for row in rows}) >= 2
    assert {row.status for row in rows} >= {"ok", "error", "refused", "cancelled"}


def test_no_answer_of_one_tenant_reaches_another(tmp_path):
    """Upstreams answer each call with another text, so that a text twice is a text from a cache."""
    models = (
        ModelConfig(name="small", deployments=(DeploymentConfig(provider=Mock.Config(model="small", tokens=4)),)),
    )
    made = GatewayConfig(
        models=models,
        strategies={"cheapest": StrategyConfig(use="cheapest")},
        cache=CacheConfig(semantic=True, threshold=0.5),
        embedder=Hashed.Config(),
        store=str(tmp_path / "g.db"),
    )
    draw = random.Random(3)

    async def main():
        async with Gateway(made) as gateway:
            keys = [(await gateway.store.create_key(f"k{at}"))[0] for at in range(3)]

            async def ask(key):
                body = {
                    "model": "small",
                    "temperature": draw.choice((0, 1)),
                    "messages": [{"role": "user", "content": "the same words"}],
                }
                reply = await gateway.handle("chat", body, key=key, headers={"x-cache": draw.choice(("", "allow"))})
                return key, json.loads(reply.body)["id"], reply.headers["x-cache"]

            found = await asyncio.gather(*(ask(draw.choice(keys)) for _ in range(200)))
            found += [await ask(draw.choice(keys)) for _ in range(50)]
            for key in keys:
                record = await gateway.store.key_of(key)
                assert gateway.caches.delete(record.id) >= 1
            return found

    found = asyncio.run(main())
    whose = {}
    for key, id, _ in found:
        whose.setdefault(id, set()).add(key)
    assert all(len(keys) == 1 for keys in whose.values())
    assert {how for _, _, how in found} >= {"exact", "semantic", "shared", "miss"}
    assert len(whose) >= 3


# kill -9

CONFIG = """
require_key = false
store = "{store}"
[retries]
base_s = 0.002
[strategies.cheapest]
kind = "cheapest"
[fallbacks]
small = ["large"]
[[models]]
name = "small"
max_tokens = 40
price = {{ input_usd = 1, output_usd = 2 }}
deployments = [{{ provider = {{ kind = "mock", tokens = 8, latency_s = 0.003, tokens_per_s = 2000, fails = 0.2 }} }}]
[[models]]
name = "large"
max_tokens = 40
price = {{ input_usd = 10, output_usd = 20 }}
deployments = [{{ provider = {{ kind = "mock", tokens = 8, latency_s = 0.003 }} }}]
"""


class Client(threading.Thread):
    """Sends requests one after another until the server is gone, and remembers which whole answers it got."""

    def __init__(self, port, seed):
        super().__init__(daemon=True)
        self.port, self.draw = port, random.Random(seed)
        self.answered, self.begun = [], 0

    def run(self):
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            while True:
                streams = self.draw.random() < 0.4
                body = {
                    "model": self.draw.choice(("small", "large", "auto")),
                    "stream": streams,
                    "max_tokens": 20,
                    "user": "x",
                }
                body["messages"] = [{"role": "user", "content": f"number {self.draw.random()}"}]
                link.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
                answer = link.getresponse()
                self.begun += 1
                text = answer.read()
                if answer.status == 200 and (not streams or text.endswith(b"data: [DONE]\n\n")):
                    self.answered.append((time.monotonic(), answer.headers["x-request-id"]))
        except (OSError, http.client.HTTPException):
            pass
        finally:
            link.close()


GATHER_S = 0.5  # rows are written within 50 ms of the answer; a busy machine is given more


def drill(tmp_path, kills, store=None):
    """Kill the server under load again and again; what it had told before must be there, and no money be stuck or passed."""
    store, config, draw = store or str(tmp_path / "g.db"), tmp_path / "gateway.toml", random.Random(kills)
    config.write_text(CONFIG.format(store=store))
    limits = {"global": nano_dollars(0.002 * kills), "user:x": nano_dollars(0.001 * kills)}

    async def prepare():
        async with open_store(store) as held:
            for subject, limit in limits.items():
                await held.set_budget(subject, limit)

    asyncio.run(prepare())
    crashed = told = 0
    for number in range(kills):
        with served("--config", str(config)) as running:
            clients = [Client(running.port, f"{number}-{at}") for at in range(6)]
            for client in clients:
                client.start()
            until(lambda clients=clients: any(client.begun for client in clients))
            time.sleep(draw.random() * 0.4)
            running.process.send_signal(signal.SIGKILL)
            killed = time.monotonic()
            running.process.wait(60)
            for client in clients:
                client.join(60)
        old = {id for client in clients for at, id in client.answered if at < killed - GATHER_S}
        all_told = {id for client in clients for _, id in client.answered}
        crashed, told = asyncio.run(_check(store, limits, old, all_told))
    assert crashed > 0
    assert told > kills
    return crashed, told


async def _check(store, limits, old, all_told):
    async with open_store(store) as held:
        await _settled(held)
        rows = await held.ledger(LedgerQuery(limit=100_000))
        count = Counter(row.request_id for row in rows)
        assert set(count.values()) == {1}
        assert all_told <= set(
            count
        )  # as its reservation was committed before the call, each has a row, if only as crashed
        status = {row.request_id: row.status for row in rows}
        assert [id for id in old if status[id] != "ok"] == []
        assert [row for row in rows if row.cost_nano > row.reserved_nano] == []
        assert [row for row in rows if row.status == "crashed" and row.flags != ("recovered",)] == []
        for budget in await held.budgets():
            mine = sum(row.cost_nano for row in rows if budget.subject == "global" or row.user == "x")
            assert (budget.reserved_nano, budget.spent_nano) == (0, mine)
            assert budget.spent_nano <= limits[budget.subject]
        assert await held._read(lambda connection: connection.rows("SELECT count(*) FROM reservations")) == [(0,)]
        return sum(value == "crashed" for value in status.values()), sum(value == "ok" for value in status.values())


async def _settled(held):
    """What was left behind is settled: at once in a file, in PostgreSQL when the lease of the replica that is gone is over."""
    until = time.monotonic() + 3 * LEASE_S
    while await held._read(lambda connection: connection.rows("SELECT count(*) FROM reservations")) != [(0,)]:
        assert time.monotonic() < until, "reservations of a killed process are still held"
        await asyncio.sleep(0.1)


def test_three_kills_of_a_server_under_load(tmp_path):
    drill(tmp_path, 3)


@pytest.mark.slow
def test_kills_of_a_server_on_postgresql(tmp_path):
    if reason := missing():
        pytest.skip(f"no PostgreSQL to test with: {reason}")
    with server() as database:
        drill(tmp_path, 5, database())


@pytest.mark.slow
def test_fifty_kills_of_a_server_under_load(tmp_path, record_property):
    crashed, told = drill(tmp_path, 50)
    record_property("crashed", crashed)
    record_property("ok", told)
    print(f"50 kills: {told} requests ended ok, {crashed} were settled as crashed")
