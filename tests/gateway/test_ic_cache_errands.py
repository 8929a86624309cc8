"""IC-Cache in a gateway beside requests: replays, comparisons, upkeep, metrics, headers, erasure, and what outlives the process."""

import asyncio
import json
import time
import urllib.error
import urllib.request
from dataclasses import replace

import numpy as np
import pytest

from anabranch.errors import CapacityError, ConfigError
from anabranch.gateway.config import (
    DeploymentConfig,
    GatewayConfig,
    LearningConfig,
    LogConfig,
    ModelConfig,
    StrategyConfig,
)
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.store import LedgerQuery, learned, schema
from anabranch.routers.contract.query import Model, Outcome, Pool, Query
from anabranch.routers.embed.hashed import Hashed
from anabranch.routers.ic_cache import ICCache, ICCacheRouting
from anabranch.routers.ic_cache.critic import Critic
from anabranch.routers.ic_cache.router import Router
from anabranch.routers.ic_cache.upkeep import Manager
from anabranch.routers.judges import grade, grade_prompt
from anabranch.routers.money import Price
from gateway_process import served

EMBEDDER = Hashed.Config(dim=64).build()


def cache_config(**router):
    router = {"temperature": 0.0, "explore": 0.0, **router}
    return ICCache.Config(
        router=Router.Config(critic=Critic.Config(hidden=(8,)), **router), manager=Manager.Config(replays_per_tick=4)
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("grade: 7", 0.7),
        ("It is fine.\nGrade: 10/10.", 1.0),
        ("**grade: 0**", 0.0),
        ("my grade is 3", 0.3),
        ("8", 0.8),
        ("grade: 11", None),
        ("grade: 7\nbut then", None),
        ("good", None),
        ("", None),
        ("-5.5", None),
        ("grade: 7 of the 9 parts", None),
    ],
)
def test_grades(text, value):
    assert grade(text) == value


def test_the_grader_is_shown_both_as_json():
    assert '{"question": "a \\"b\\"", "answer": "c"}' in grade_prompt('a "b"', "c")


# By hand, without a gateway


class Run:
    """Errands of a world in which longer answers are better."""

    judge = "judge"

    def __init__(self, answers=(), allowed=True, most=100):
        self.answers, self.allowed, self.most, self.asked = list(answers), allowed, most, []

    async def alone(self, work):
        return work()

    def may_ask(self, tenant, models):
        return self.allowed

    async def ask(self, model, messages, *, temperature):
        if len(self.asked) == self.most:
            raise CapacityError("no money is left")
        self.asked.append(model)
        if model != "judge":
            return self.answers.pop(0)
        shown = json.loads(next(line for line in messages[0]["content"].splitlines() if line.startswith("{")))
        if "answer" in shown:
            return f"grade: {min(10, len(shown['answer']))}"
        first, second = len(shown["answer_A"]), len(shown["answer_B"])
        return f"verdict: {'A' if first > second else 'B' if second > first else 'tie'}"


def pool_of(load=0.0, now_s=1000.0):
    return Pool(
        tuple(
            Model(name=name, price=Price.of_dollars(price, price), load=load)
            for name, price in (("small", 0.1), ("large", 5.0))
        ),
        now_s,
    )


def routing(**router):
    return ICCacheRouting.Config(cache=cache_config(**router), domains=("",)).build()


def answered(strategy, text, answer, model="large", latency_s=1.0, **fields):
    query = Query(text=text, vector_D=EMBEDDER.embed([text])[0], **fields)
    decision = strategy.route(query, pool_of())
    strategy.observe(Outcome(query=query, model=model, decision=decision, answer=answer, latency_s=latency_s))
    return decision


def once(strategy, run):
    asyncio.run(strategy.errands(run))
    return run


def test_the_best_of_new_answers_is_kept_and_what_is_wanted_most_comes_first():
    strategy = routing(uncertain_below=0.0)
    for number, text in enumerate(("list the files", "count the words", "move a folder")):
        answered(strategy, text, "ls")
        strategy.cache.pool.get(number).gain = (0.0, 0.3, 0.2)[number]
    run = once(strategy, Run(["a", "four", "", "xyz", "y", "z"]))
    assert [one.response for one in strategy.cache.pool] == ["ls", "four", "xyz"]
    assert [one.quality for one in strategy.cache.pool] == [None, 0.4, 0.3]
    assert [one.replays for one in strategy.cache.pool] == [0, 1, 1]
    assert run.asked.count("large") == 6
    assert run.asked.count("judge") == 2 + 5  # what was there, and what came that was no empty text
    assert strategy.metrics.value("ic_cache_replays_bettered_total") == 2


def test_replays_are_off_peak_allowed_paid_and_capped():
    strategy = routing(uncertain_below=0.0)
    answered(strategy, "list the files", "ls")
    example = strategy.cache.pool.get(0)
    example.gain = 1.0
    strategy.upkeep(pool_of(load=2.0, now_s=1030.0))
    assert once(strategy, Run()).asked == []
    for second in range(60):
        strategy.upkeep(pool_of(load=0.0, now_s=1031.0 + second))  # the load falls though nobody asks
    assert once(strategy, Run(allowed=False)).asked == []
    with pytest.raises(CapacityError):
        once(strategy, Run(["x"], most=2))
    assert (example.response, example.replays) == ("ls", 1)
    for _ in range(9):
        example.gain = 1.0
        once(strategy, Run(["x"] * 3))
    assert example.replays == 5
    assert once(routing(), Run()).asked == []  # has seen nothing yet


def test_an_answer_that_was_erased_meanwhile_is_not_put_back():
    strategy = routing(uncertain_below=0.0)
    answered(strategy, "list the files", "ls", user="ann")
    strategy.cache.pool.get(0).gain = 1.0

    class Erases(Run):
        async def ask(self, model, messages, *, temperature):
            strategy.forget(tenant="", user="ann")
            return await super().ask(model, messages, temperature=temperature)

    once(strategy, Erases(["longer", "longer", "longer"]))
    assert len(strategy.cache.pool) == 0


@pytest.mark.parametrize(("other", "wins"), [("a longer answer", [1, 0]), ("x", [0, 1]), ("some", [0.5, 0.5])])
def test_an_uncertain_request_is_answered_twice_and_compared(other, wins):
    strategy = routing(uncertain_below=1.0)
    decision = answered(strategy, "list the files", "four")
    assert decision.details["second"] == "small"
    run = once(strategy, Run([other]))
    assert run.asked == ["small", "judge", "judge"]
    router = strategy.cache.router
    assert [router.wins_M[router.arms.index(name)] - 1 for name in ("small", "large")] == wins
    assert once(strategy, Run()).asked == []  # once


def test_what_may_not_teach_or_is_not_told_is_not_compared():
    strategy = routing(uncertain_below=1.0)
    answered(strategy, "list the files", "ls", latency_s=None)
    answered(strategy, "count the words", None)
    answered(strategy, "move a folder", "mv", model="small")
    run = Run()
    run.judge = ""
    answered(strategy, "no judge", "ls")
    assert once(strategy, run).asked == []
    assert once(strategy, Run()).asked == []


def test_an_unclear_verdict_teaches_nothing():
    strategy = routing(uncertain_below=1.0)
    answered(strategy, "list the files", "ls")

    class Unsure(Run):
        async def ask(self, model, messages, *, temperature):
            return "who knows"

    once(strategy, Unsure())
    assert strategy.cache.router.wins_M.tolist() == [1, 1]
    assert strategy.metrics.value("ic_cache_feedback_ignored_total", reason="unclear verdict") == 1


def test_one_decision_is_forgotten_and_nothing_else():
    strategy = routing()
    first = answered(strategy, "list the files", "ls", user="ann")
    answered(strategy, "count the words", "wc", user="ann")
    strategy.observe(
        Outcome(query=Query(text="list the files"), model="large", quality=1.0, decision=first, latency_s=1.0)
    )
    assert len(strategy.cache.router.critic.buffer) == 1
    assert strategy.forget(tenant=None, decision=first.details["id"]) == 1
    assert [one.request for one in strategy.cache.pool] == ["count the words"]
    assert len(strategy.cache.router.critic.buffer) == 0
    assert strategy.cache.pending(first.details["id"]) is None
    assert strategy.forget(tenant=None, decision=first.details["id"]) == 0
    answered(strategy, "else", "x", tenant="t")
    assert strategy.forget(tenant=None) == 2
    assert (len(strategy.cache.pool), len(strategy.cache.log)) == (0, 0)


def test_headers_say_what_was_decided():
    strategy = routing()
    answered(strategy, "list the files", "ls")
    strategy.cache.router.critic.utilities = lambda x_I: np.array([0.9, 0.2])
    decision = answered(strategy, "list the files", None)
    assert strategy.headers(decision) == {
        "x-ic-id": decision.details["id"],
        "x-ic-arm": "small",
        "x-ic-examples": "0",
        "x-ic-scores": "small=0.900,large=0.200",
    }
    strategy.cache.router.critic.utilities = lambda x_I: np.array([0.1, 0.2])
    assert strategy.headers(answered(strategy, "list the files", None))["x-ic-examples"] == ""


# A gateway


def model(name, dollars, reply=None):
    deployment = DeploymentConfig(provider=Mock.Config(model=name, reply=reply or f"{name} says ls"))
    return ModelConfig(name=name, price=Price.of_dollars(dollars, dollars), max_tokens=50, deployments=(deployment,))


def config(tmp_path, **fields):
    cache = {"router": {"critic": {"hidden": [8]}, "temperature": 0.0, "explore": 0.0, "uncertain_below": 1.0}}
    strategy = StrategyConfig(
        use="ic_cache", fields={"domains": [""], "cache": cache}, models=("small", "large"), timeout_s=5.0
    )
    return GatewayConfig(
        models=(model("small", 1), model("large", 10), model("judge", 1, "verdict: A\ngrade: 9")),
        store=str(tmp_path / "g.db"),
        embedder=Hashed.Config(dim=64),
        strategies={"ic": strategy},
        **{"learning": LearningConfig(judge="judge"), "require_key": False, "log": LogConfig(prompts=True), **fields},
    )


def run(made, work):
    async def main():
        async with Gateway(made) as gateway:
            return await work(gateway, gateway.runtime.decider.lanes["ic"])

    return asyncio.run(main())


async def ask(gateway, text="list the files", key=None, **body):
    reply = await gateway.handle(
        "chat", {"model": "auto/ic", "messages": [{"role": "user", "content": text}], **body}, key=key
    )
    await gateway.runtime.decider.lanes["ic"].alone(lambda: None)
    return reply


async def calls(gateway):
    return [row.model for row in reversed(await gateway.store.ledger(LedgerQuery(tag="learning")))]


def test_a_gateway_asks_on_a_budget_of_its_own(tmp_path):
    async def work(gateway, lane):
        reply = await ask(gateway)
        assert reply.headers["x-ic-arm"] == reply.headers["x-route-model"] == "large"
        await gateway.errands.once()
        assert await calls(gateway) == ["small", "judge", "judge"]
        example = lane.strategy.cache.pool.get(0)
        example.gain, example.quality = 1.0, 0.2
        await gateway.errands.once()
        assert await calls(gateway) == ["small", "judge", "judge"] + ["large", "judge"] * 3
        assert (example.quality, example.replays) == (0.9, 1)
        [budget] = await gateway.store.budgets()
        assert (budget.subject, budget.period, budget.limit_nano) == ("tag:learning", "day", 10**9)
        rows = await gateway.store.ledger(LedgerQuery(tag="learning"))
        assert budget.spent_nano == sum(row.cost_nano for row in rows) > 0
        assert budget.reserved_nano == 0
        assert {(row.strategy, row.key_id, row.status) for row in rows} == {("ic", "", "ok")}
        return gateway.metrics_text().decode()

    text = run(config(tmp_path), work)
    for line in (
        'ic_cache_requests_total{arm="large",strategy="ic"} 1.0',
        'ic_cache_pool_examples{strategy="ic"} 1.0',
        'ic_cache_feedback_total{kind="preference",strategy="ic"} 1.0',
        'ic_cache_replays_bettered_total{strategy="ic"} 1.0',
    ):
        assert line in text


@pytest.mark.parametrize("learning", [LearningConfig(judge="judge", budget_usd=0.0), LearningConfig()])
def test_without_a_judge_or_money_nothing_is_asked(tmp_path, learning):
    async def work(gateway, lane):
        await ask(gateway)
        lane.strategy.cache.pool.get(0).gain = 1.0
        await gateway.errands.once()
        return await calls(gateway)

    assert run(config(tmp_path, learning=learning), work) == []


def test_what_is_a_tenants_is_shown_only_to_models_that_its_key_may_use(tmp_path):
    async def work(gateway, lane):
        for name, models in (("few", ["small", "large"]), ("all", [])):
            secret, _ = await gateway.store.create_key(name, models=models)
            await gateway.teaching.read_keys()
            await ask(gateway, f"list {name} files", secret)
            await gateway.errands.once()
            assert await calls(gateway) == ([] if name == "few" else ["small", "judge", "judge"])

    run(config(tmp_path, require_key=True), work)


def test_the_tag_of_the_budget_is_nobody_elses(tmp_path):
    async def work(gateway, lane):
        from anabranch.web.api_error import ApiError

        with pytest.raises(ApiError, match="the tag learning is that of the gateway's own questions"):
            await gateway.handle(
                "chat",
                {"model": "small", "messages": [{"role": "user", "content": "x"}]},
                headers={"x-tags": "learning"},
            )

    run(config(tmp_path), work)
    with pytest.raises(ConfigError, match=r"learning.judge is 'jugde', and there is no such model"):
        config(tmp_path, learning=LearningConfig(judge="jugde"))


def test_an_upstream_that_fails_ends_the_round_and_is_settled(tmp_path):
    made = config(tmp_path)
    broken = ModelConfig(
        name="judge",
        price=Price.of_dollars(1, 1),
        deployments=(DeploymentConfig(provider=Mock.Config(fails=1.0, fail_with="400")),),
    )

    async def work(gateway, lane):
        await ask(gateway)
        await gateway.errands.once()
        rows = await gateway.store.ledger(LedgerQuery(tag="learning"))
        assert sorted((row.requested, row.status) for row in rows) == [("judge", "error"), ("small", "ok")]
        [budget] = await gateway.store.budgets()
        assert budget.reserved_nano == 0

    run(made.replace(models=(*made.models[:2], broken)), work)


def test_upkeep_comes_without_requests(tmp_path):
    async def work(gateway, lane):
        await ask(gateway)
        strategy = lane.strategy
        strategy.cache.pool.get(0).expires_s = 1.0
        strategy._ticked_s = 0.0
        await gateway.errands.once()
        return len(strategy.cache.pool)

    assert run(config(tmp_path, learning=LearningConfig()), work) == 0


def test_two_gateways_forget_what_one_is_told_to_and_so_does_the_store(tmp_path):
    made = config(tmp_path, learning=LearningConfig())

    async def main():
        async with Gateway(made) as one, Gateway(made) as other:
            for gateway in (one, other):
                await ask(gateway, "list the secrets", user="ann")
                await ask(gateway, "count the words", user="bob")
                await gateway.kept.save(gateway.runtime.decider.lanes.values(), at_once=True)
            assert b"secrets" in await bodies(one)
            assert await one.erasures.order(tenant="", user="ann") == (1, 2)  # an example here, and a text of both
            assert b"secrets" not in await bodies(one)
            await other.erasures.catch_up()
            for gateway in (one, other):
                pool = gateway.runtime.decider.lanes["ic"].strategy.cache.pool
                assert [example.request for example in pool] == ["count the words"]
            assert b"secrets" not in await bodies(one)
            assert b"words" in await bodies(one)
            await other.erasures.catch_up()  # once
            assert await other.erasures.order(tenant=None) == (1, 2)
            await one.erasures.catch_up()
            assert len(one.runtime.decider.lanes["ic"].strategy.cache.pool) == 0

    async def bodies(gateway):
        rows = await gateway.store.look(
            lambda connection: learned.read_learned(connection, "ic", gateway.runtime.decider.lanes["ic"].made)
        )
        texts = await gateway.store.look(
            lambda connection: connection.rows("SELECT body FROM examples UNION ALL SELECT body FROM texts")
        )
        return b"".join([*(row.body for row in rows), *(text.encode() for (text,) in texts)])

    asyncio.run(main())


@pytest.mark.parametrize("domains", [[""], []])
def test_without_leave_to_keep_prompts_nothing_of_them_is_stored(tmp_path, domains):
    """Who keeps texts is refused at the start; with no domain it keeps none."""
    made = config(tmp_path, learning=LearningConfig(), log=LogConfig())
    strategy = made.strategies["ic"]
    strategy = replace(strategy, fields={**strategy.fields, "domains": domains})
    made = replace(made, strategies={"ic": strategy})
    if domains:
        with pytest.raises(ConfigError, match=r"strategies.ic keeps texts .* set log.prompts = true"):
            Gateway(made)
        return

    async def main():
        async with Gateway(made) as gateway:
            await ask(gateway, "list the jewels")
            await gateway.kept.save(gateway.runtime.decider.lanes.values(), at_once=True)

    asyncio.run(main())
    assert not any(b"jewels" in file.read_bytes() for file in tmp_path.iterdir())


def test_a_reload_that_would_store_texts_without_leave_is_refused(tmp_path):
    made = config(tmp_path, learning=LearningConfig())

    async def main():
        async with Gateway(made) as gateway:
            with pytest.raises(ConfigError, match=r"log\.prompts"):
                await gateway.reload(replace(made, log=LogConfig()))
            await ask(gateway, "list the files")

    asyncio.run(main())


def test_examples_go_with_the_days_that_things_are_kept(tmp_path):
    """By their own age, however often they were written since; those of a strategy that is gone by when that was last."""
    made = config(tmp_path, learning=LearningConfig())
    day = 86_400.0

    async def main():
        async with Gateway(made) as one, Gateway(made) as other:
            for gateway in (one, other):
                await ask(gateway, "an old secret")
                for example in gateway.runtime.decider.lanes["ic"].strategy.cache.pool:
                    example.created_s -= 10 * day
                await ask(gateway, "a new word")
                await gateway.kept.save(gateway.runtime.decider.lanes.values(), at_once=True)
            gone = ("gone", "m", "k", "w", 1, 1, '{"request": "a secret"}', b"")
            await one.store.change(lambda connection: connection.insert("examples", schema.EXAMPLES, [gone]))
            await one.erasures.expire(time.time() - 7 * day)
            await one.store.prune(time.time() - 7 * day)
            rows = await one.store.look(
                lambda connection: connection.rows("SELECT body FROM examples WHERE body <> ''")
            )
            assert ["secret" in body for (body,) in rows] == [False]
            # Whoever has it too hears that it is gone, or lets go of it by itself.
            await other.kept.save(other.runtime.decider.lanes.values(), at_once=True)
            for gateway in (one, other):
                pool = gateway.runtime.decider.lanes["ic"].strategy.cache.pool
                assert [example.request for example in pool] == ["a new word"]

    asyncio.run(main())


def test_what_strategies_kept_that_are_gone_is_forgotten_too(tmp_path):
    made = config(tmp_path, learning=LearningConfig())

    async def main():
        async with Gateway(made) as gateway:
            await ask(gateway, "a secret of ann", user="ann")
            await ask(gateway, "a word of bob", user="bob")
        async with Gateway(replace(made, strategies={"cheapest": StrategyConfig(use="cheapest")})) as gateway:
            assert await gateway.erasures.order(tenant="", user="ann") == (0, 1)
            for table in ("examples", "texts"):
                rows = await gateway.store.look(lambda connection: connection.rows(f"SELECT body FROM {table}"))  # noqa: B023
                said = "".join(body for (body,) in rows)
                assert ("secret" in said, "word" in said) == (False, True)
        async with Gateway(made) as gateway:
            pool = gateway.runtime.decider.lanes["ic"].strategy
            await ask(gateway, "another")
            assert sorted(example.request for example in pool.cache.pool) == ["a word of bob", "another"]

    asyncio.run(main())


def test_a_row_that_was_written_while_it_was_to_be_forgotten_is_read_without_it(tmp_path):
    made = config(tmp_path, learning=LearningConfig())

    async def first():
        async with Gateway(made) as gateway:
            await ask(gateway, "list the secrets", user="ann")
            now_us = gateway.store.now_us()
            order = json.dumps({"tenant": "", "user": "ann", "decision": None})
            await gateway.store.change(lambda connection: learned.put_erasure(connection, order, now_us, 0))

    async def second():
        async with Gateway(made) as gateway:
            return len(gateway.runtime.decider.lanes["ic"].strategy.cache.pool)

    asyncio.run(first())
    assert asyncio.run(second()) == 0


CONFIG = """
require_key = false
store = "{folder}/gateway.db"
log = {{ prompts = true }}
admin = {{ key = "env:TEST_ADMIN_KEY" }}
embedder = {{ kind = "hashed", dim = 64 }}
{models}
[strategies.ic]
kind = "ic_cache"
domains = [""]
timeout_s = 5
cache = {{ router = {{ critic = {{ hidden = [8] }}, temperature = 0.0, explore = 0.0 }} }}
"""
MODEL = """[[models]]
name = "{name}"
price = {{ input_usd = {price}, output_usd = {price} }}
deployments = [{{ provider = {{ kind = "mock", model = "{name}", reply = "ls" }} }}]
"""


def test_pool_metrics_headers_and_erasure_over_http(tmp_path):
    path = tmp_path / "gateway.toml"
    models = "".join(MODEL.format(name=name, price=price) for name, price in (("small", 1), ("large", 10)))
    path.write_text(CONFIG.format(folder=tmp_path, models=models))

    def call(url, path, body=None):
        request = urllib.request.Request(
            url + path,
            None if body is None else json.dumps(body).encode(),
            {"content-type": "application/json", "authorization": "Bearer operator"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return dict(answer.headers), answer.read()

    def chat(text, **fields):
        return {"model": "auto/ic", "messages": [{"role": "user", "content": text}], **fields}

    def examples(url):
        found = json.loads(call(url, "/admin/explain", chat("list the files of a"))[1])
        return {item["id"] for item in found["details"]["examples"]}

    def forget(url, **body):
        return json.loads(call(url, "/admin/ic-cache/forget", body)[1])["forgotten"]

    def refused(url, place="forget", **body):
        with pytest.raises(urllib.error.HTTPError) as error:
            call(url, f"/admin/ic-cache/{place}", body)
        error.value.close()
        return error.value.code

    def served_here():
        return served("--config", str(path), environment={"TEST_ADMIN_KEY": "operator"})

    with served_here() as gateway:
        ids = []
        for number, user in enumerate(("ann", "ann", "bob", "cid")):
            headers, _ = call(
                gateway.url, "/v1/chat/completions", chat(f"list the files of {'abcd'[number]}", user=user)
            )
            assert headers["x-ic-arm"] == "large"
            assert headers["x-ic-scores"].startswith("large=")
            ids.append(headers["x-request-id"])
        assert examples(gateway.url)
        text = call(gateway.url, "/metrics")[1].decode()
        assert 'ic_cache_requests_total{arm="large",strategy="ic"} 5.0' in text
        assert 'ic_cache_admissions_total{reason="kept",strategy="ic"} 4.0' in text
    with served_here() as gateway:
        assert examples(gateway.url)
        assert forget(gateway.url, request_id=ids[2]) == 1
        assert forget(gateway.url, key="", user="ann") == 2
        # One without examples has texts all the same, once.
        body = {
            "request_id": call(gateway.url, "/v1/chat/completions", {**chat("x"), "model": "large"})[0]["x-request-id"]
        }
        told = [json.loads(call(gateway.url, "/admin/ic-cache/forget", body)[1]) for _ in range(2)]
        assert told == [{"forgotten": 0, "texts": 1}, {"forgotten": 0, "texts": 0}]
        assert [
            refused(gateway.url, **body)
            for body in ({}, {"user": "x"}, {"all": False}, {"all": True, "key": ""}, {"every": True}, {"key": 3})
        ] == [400] * 6
        assert refused(gateway.url, request_id="unheard of") == 404
        # What was meant is still there: nobody is told that nothing was.
        assert refused(gateway.url, key="unheard of") == 404
        assert refused(gateway.url, place="remember", all=True) == 404
    with served_here() as gateway:
        assert forget(gateway.url, all=True) == 1
        assert examples(gateway.url) == set()


def test_processes_share_examples_and_lose_none(tmp_path, caplog):
    made = config(tmp_path, learning=LearningConfig())

    def requests(gateway):
        return {example.request for example in gateway.runtime.decider.lanes["ic"].strategy.cache.pool}

    async def save(*gateways):
        for gateway in gateways:
            await gateway.kept.save(gateway.runtime.decider.lanes.values(), at_once=True)

    async def several():
        async with Gateway(made) as one, Gateway(made) as other:
            for gateway, words in ((one, "abc"), (other, "cde")):
                for word in words:
                    await ask(gateway, f"list {word}")
            await save(one, other, one)
            assert requests(one) == requests(other) == {f"list {word}" for word in "abcde"}
            pool = one.runtime.decider.lanes["ic"].strategy.cache.pool
            pool.remove([example.id for example in pool if example.request == "list e"])
            await ask(other, "list f")
            await save(one, other, one)
            assert requests(one) == requests(other) == {f"list {word}" for word in "abcdf"}

    async def later():
        async with Gateway(made) as gateway:
            found = requests(gateway)
            await gateway.store.change(
                lambda connection: connection.run(
                    "UPDATE examples SET body = :body WHERE body LIKE '%list a%'", body="{"
                )
            )
            return found

    asyncio.run(several())
    assert asyncio.run(later()) == {f"list {word}" for word in "abcdf"}
    assert asyncio.run(later()) == {f"list {word}" for word in "bcdf"}
    assert "damaged and left out" in caplog.text
