"""What a strategy learned from vectors of other dimensions than its embedder gives is kept aside, and it begins anew."""

import asyncio
import logging
import sqlite3

import numpy as np
import pytest

from anabranch.errors import CheckpointError
from anabranch.gateway.config import DeploymentConfig, GatewayConfig, LogConfig, ModelConfig, StrategyConfig
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.learning.kept_bytes import packed_part, read_part
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.store import learned
from anabranch.routers.contract.query import Outcome, Query
from anabranch.routers.embed.hashed import Hashed
from anabranch.routers.fitted import VERSION, packed
from anabranch.routers.money import Price
from anabranch.routers.strategies import make
from anabranch.routers.strategies.shared_bandit import Pooled

NAMES = ("small", "large")
RIGHT, WRONG = 8, 3


def config(store, use="linucb", **fields):
    models = tuple(
        ModelConfig(
            name=name, price=Price.of_dollars(1, 1), deployments=(DeploymentConfig(provider=Mock.Config(model=name)),)
        )
        for name in NAMES
    )
    strategies = {"s": StrategyConfig(use=use, fields=fields, timeout_s=5.0)}
    return GatewayConfig(
        models=models, store=str(store), embedder=Hashed.Config(dim=RIGHT), require_key=False, strategies=strategies
    )


def learned_from(dim, count, **fields):
    """A bandit that was told of outcomes."""
    made, rng = make("linucb", **fields), np.random.default_rng(dim)
    for number in range(count):
        vector_D = rng.standard_normal(dim).astype(np.float32)
        query = Query(text=str(number), vector_D=vector_D / np.linalg.norm(vector_D))
        made.observe(Outcome(query=query, model=NAMES[number % 2], quality=0.5))
    return made


async def put(gateway, writer, strategy):
    """A row of what another process learned."""
    part = strategy.part() if strategy.adds_up else strategy.kept_state()
    store, made = gateway.store, gateway.runtime.decider.lanes["s"].made
    row = learned.LearnedRow(
        strategy="s", made=made, writer=writer, kind="linucb", version=1, ts_us=1, body=packed_part(part, "s")
    )
    await store.change(lambda connection: learned.put_learned(connection, row, None))


async def use(gateway, numbers):
    """Steps after requests with feedback, none of which passed the strategy by."""
    for number in numbers:
        body = {"model": "auto/s", "messages": [{"role": "user", "content": f"question {number}"}]}
        reply = await gateway.handle("chat", body)
        assert "x-route-bypassed" not in reply.headers
        score = {"request_id": reply.headers["x-request-id"], "score": 1}
        assert (await gateway.feedback(score))["learned"]
    lane = gateway.runtime.decider.lanes["s"]
    return await lane.alone(lambda: lane.strategy.steps)


@pytest.mark.parametrize("discount", [1.0, 0.9])
@pytest.mark.parametrize("writer", ["", "dead.1", "of-old"])
def test_it_begins_anew_is_told_once_and_loses_nothing(tmp_path, caplog, writer, discount):
    path = tmp_path / "g.db"

    async def wrong():
        async with Gateway(config(path, discount=discount)) as gateway:
            await put(gateway, writer, learned_from(WRONG, 4, discount=discount))

    async def life(numbers):
        async with Gateway(config(path, discount=discount)) as gateway:
            return await use(gateway, numbers)

    asyncio.run(wrong())
    [before] = sqlite3.connect(path).execute("SELECT body FROM learned").fetchall()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert asyncio.run(life(range(3))) == 3
    told = [record.message for record in caplog.records if "strategy s" in record.message]
    assert len(told) == 1
    assert "of vectors of 3 dimensions, and the embedder gives 8" in told[0]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert asyncio.run(life(range(3, 5))) == 5
    assert "strategy s" not in caplog.text
    rows = dict(sqlite3.connect(path).execute("SELECT made, body FROM learned").fetchall())
    assert len(rows) == 2
    assert before[0] in rows.values()
    [aside] = [made for made, body in rows.items() if body == before[0]]
    assert aside in told[0]


def test_only_what_is_of_other_dimensions_is_set_aside(tmp_path):
    path = tmp_path / "g.db"

    async def others():
        async with Gateway(config(path)) as gateway:
            await put(gateway, "dead.1", learned_from(WRONG, 4))
            await put(gateway, "dead.2", learned_from(RIGHT, 6))
            await put(gateway, "", learned_from(WRONG, 2))

    async def life():
        async with Gateway(config(path)) as gateway:
            return await use(gateway, range(3))

    asyncio.run(others())
    assert asyncio.run(life()) == 9
    # What it learned joins that of nobody, which nothing of other dimensions is in the way of.
    made = sqlite3.connect(path).execute("SELECT writer FROM learned WHERE made NOT LIKE '%.%'").fetchall()
    assert made == [("",)]
    assert asyncio.run(life()) == 12


def test_a_row_that_comes_while_it_runs_is_left_out(tmp_path, caplog):
    """As a process of before vectors were looked at may write it."""

    async def work():
        async with Gateway(config(tmp_path / "g.db")) as gateway:
            await use(gateway, range(2))
            await put(gateway, "of-old", learned_from(WRONG, 4))
            lanes = gateway.runtime.decider.lanes.values()
            for _ in range(2):
                await use(gateway, range(2))
                await gateway.kept.save(lanes, at_once=True)
            await put(gateway, "of-now", learned_from(RIGHT, 5))
            await gateway.kept.save(lanes, at_once=True)
            return await use(gateway, range(1))

    with caplog.at_level(logging.WARNING):
        assert asyncio.run(work()) == 2 + 2 * 2 + 5 + 1
    assert caplog.text.count("is left out: it is of vectors of 3 dimensions") == 1


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no row",
        packed({}, {"version": VERSION}, "s"),
        packed({}, {"version": VERSION, "facts": None}, "s"),
        packed({}, {"version": VERSION, "facts": "{"}, "s"),
        packed({}, {"version": VERSION, "facts": "[" * 99_999}, "s"),
        packed({}, {"version": VERSION, "facts": "[]"}, "s"),
        packed({}, [VERSION], "s"),
        packed({}, {"version": VERSION + 1}, "s"),
    ],
)
def test_a_row_that_is_damaged_is_told_as_that_whatever_is_wrong_with_it(body):
    """What looks at rows takes this error for a damaged one, and no other."""
    with pytest.raises(CheckpointError, match="version 3"):
        read_part(body, "version 3")


def test_a_damaged_row_is_passed_over_and_a_fault_of_the_strategy_is_told(tmp_path, monkeypatch, caplog):
    """Any error of a row was taken for damage; one that only the strategy met was told by nobody, or kept the others from being read."""
    inner, path = Pooled.vector_dim, tmp_path / "g.db"

    def vector_dim(self, arrays, facts):
        dim = inner(self, arrays, facts)
        if dim == WRONG:
            raise KeyError("by the strategy")
        return dim

    async def others():
        async with Gateway(config(path)) as gateway:
            await put(gateway, "dead.1", learned_from(WRONG, 4))
            await put(gateway, "dead.2", learned_from(RIGHT, 6))
            row = learned.LearnedRow(
                strategy="s",
                made=gateway.runtime.decider.lanes["s"].made,
                writer="dead.3",
                kind="linucb",
                version=1,
                ts_us=1,
                body=b"no row",
            )
            await gateway.store.change(lambda connection: learned.put_learned(connection, row, None))

    async def life():
        async with Gateway(config(path)) as gateway:
            return await use(gateway, range(3))

    asyncio.run(others())
    monkeypatch.setattr(Pooled, "vector_dim", vector_dim)
    with caplog.at_level(logging.WARNING):
        assert asyncio.run(life()) == 6 + 3
    assert "strategy s cannot say of which vectors it learned what is kept as version" in caplog.text
    # Nothing was put away: no row is of another make.
    assert sqlite3.connect(path).execute("SELECT count(DISTINCT made) FROM learned").fetchone() == (1,)


def test_an_embedder_that_does_not_say_its_dimensions_is_compared_with_nothing(tmp_path, monkeypatch):
    async def work():
        async with Gateway(config(tmp_path / "g.db")) as gateway:
            await put(gateway, "", learned_from(WRONG, 4))
        monkeypatch.setattr(Hashed, "dim", None)
        async with Gateway(config(tmp_path / "g.db")) as gateway:
            lane = gateway.runtime.decider.lanes["s"]
            return await lane.alone(lambda: lane.strategy.steps)

    assert asyncio.run(work()) == 4


def test_what_strategies_keep_says_its_dimensions():
    told = learned_from(WRONG, 4)
    assert told.vector_dim(*told.part()) == told.vector_dim(*told.kept_state()) == WRONG
    empty = make("linucb")
    assert empty.vector_dim(*empty.part()) is None
    assert empty.vector_dim(*empty.kept_state()) is None
    cache, other = make("ic_cache"), make("random")
    assert cache.vector_dim(*cache.kept_state()) is None
    assert other.vector_dim({}, {}) is None


def test_ic_cache_begins_anew_too(tmp_path, caplog):
    kept = config(tmp_path / "g.db", "ic_cache").replace(log=LogConfig(prompts=True))

    async def work():
        async with Gateway(kept) as gateway:
            before = make("ic_cache")
            before._cache_for([before._arm("small", 1e-3), before._arm("large", 2e-3)], WRONG)
            await put(gateway, "dead.1", before)
        async with Gateway(kept) as gateway:
            reply = await gateway.handle("chat", {"model": "auto/s", "messages": [{"role": "user", "content": "x"}]})
            assert "x-route-bypassed" not in reply.headers
            return gateway.runtime.decider.lanes["s"].strategy.cache.router.dim

    assert asyncio.run(work()) == RIGHT
    assert caplog.text.count("it is of vectors of 3 dimensions, and the embedder gives 8") == 1
