"""What strategies ask models: each call has money, limits and a row of its own, also where many are under way, and nothing is left held."""

import asyncio
import json
from types import SimpleNamespace

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import AnabranchError, BudgetError, InputError, LimitError
from anabranch.gateway.config import (
    DeploymentConfig,
    GatewayConfig,
    LimitsConfig,
    ModelConfig,
    RetryConfig,
    StrategyConfig,
)
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.http.app import App
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.store import LedgerQuery
from anabranch.routers.contract.query import Candidate, Decision
from anabranch.routers.contract.strategy import Strategy
from anabranch.routers.money import Price, dollars, nano_dollars
from anabranch.web.api_error import ApiError
from paced_time import run_paced

PRICE = Price.of_dollars(1, 2)  # 1,000 and 2,000 nano-dollars a token

# Of asking "which?" for two tokens: at most 13 tokens of prompt; of a request of "hello" for one token: at most 12.
WORST, WORST_ANSWER = 13_000 + 2 * 2_000, 12_000 + 2_000

# What they cost: words are tokens.
COST, COST_ANSWER = 1_000 + 2 * 2_000, 1_000 + 2_000


def model(name, price=PRICE, timeout_s=None, **behaviour):
    provider = Mock.Config(model=name, tokens=4, **behaviour)
    deployment = DeploymentConfig(provider=provider, timeout_s=timeout_s)
    return ModelConfig(name=name, price=price, max_tokens=100, deployments=(deployment,))


def config(tmp_path, *models, **fields):
    fields = {
        "strategies": {"cheapest": StrategyConfig(use="cheapest"), "asks": StrategyConfig(use="static")},
        "default_strategy": "cheapest",
        "require_key": False,
        "store": str(tmp_path / "g.db"),
        **fields,
    }
    return GatewayConfig(models=models or (model("small"), model("large", Price.of_dollars(10, 20))), **fields)


class Asker:
    """How one decision asks."""

    def __init__(self, ask):
        self.ask = ask

    async def which(self, model="small", **how):
        return (await self.ask(model, "which?", **{"max_tokens": 2, "temperature": 0, **how})).text


class Asks(Strategy):
    """Does what its test says before it sends everything to small, and when it has an answer."""

    is_async = True
    reads_answers = True

    def __init__(self, decides=None, accepts=None):
        super().__init__(None)
        self._decides, self._accepts, self.pools, self.askers = decides, accepts, [], []

    async def aroute(self, query, pool, ask):
        self.askers.append(Asker(ask))
        self.pools.append(pool)
        if self._decides is not None:
            await self._decides(self.askers[-1], query)
        candidates = tuple(Candidate(model=name, score=-float(at)) for at, name in enumerate(pool.names))
        return Decision(candidates=candidates, strategy="asks", reason="so")

    async def aaccept(self, query, model, answer, details, ask):
        return True if self._accepts is None else await self._accepts(Asker(ask), model)


def ask(text="hello", **fields):
    return {"model": "auto/asks", "messages": [{"role": "user", "content": text}], "max_tokens": 1, **fields}


def run(config, work, decides=None, accepts=None):
    """What ``work(gateway)`` gives, all rows of the ledger, oldest first, and the strategy; nothing may be left held or under way."""
    strategy = Asks(decides, accepts)
    made = {"asks": strategy} if config.strategies["asks"].use == "static" else {}

    async def main():
        async with Gateway(config, strategies=made) as gateway:
            found = await work(gateway)
            await gateway.settled()
            await check_books(gateway)
            assert gateway.in_flight == gateway.runtime.users == 0
            assert [state["in_flight"] for state in gateway.runtime.dispatcher.states() if state["in_flight"]] == []
            return found, await gateway.store.ledger(LedgerQuery(calls=True, limit=10_000, newest_first=False))

    return (*run_paced(main()), strategy)


async def check_books(gateway):
    """One row for each request, calls belong to one of them, budgets hold what all rows say, and nothing is held any more."""
    store = gateway.store
    rows = await store.ledger(LedgerQuery(calls=True, limit=10_000))
    requests = await store.ledger(LedgerQuery(limit=10_000))
    for request in requests:
        calls = [row for row in rows if row.parent_id == request.request_id]
        assert (request.calls, request.calls_nano) == (len(calls), sum(row.cost_nano for row in calls))
        assert request.total_nano <= request.reserved_nano
        assert all(call.cost_nano <= call.reserved_nano <= request.reserved_nano for call in calls)
        assert {row.seq for row in await store.ledger(LedgerQuery(parent_id=request.request_id))} == {
            row.seq for row in calls
        }
    assert len(rows) == len(requests) + sum(request.calls for request in requests)
    total = sum(row.cost_nano for row in rows)
    assert total == sum(request.total_nano for request in requests)
    for budget in await store.budgets():
        assert (budget.reserved_nano, budget.spent_nano) == (0, total)
    assert await store._read(lambda connection: connection.rows("SELECT count(*) FROM reservations")) == [(0,)]
    spend = await store.spend()
    assert sum(one.cost_nano for one in spend) == total
    assert sum(one.requests for one in spend) == len(requests)


# Money


def test_of_two_asks_at_once_with_room_for_one_exactly_one_is_refused(tmp_path):
    """Neither counts on the money of the other, and the id of the request is reserved once."""
    found = []

    async def decides(strategy, query):
        found.extend(await asyncio.gather(strategy.which(), strategy.which(), return_exceptions=True))

    async def work(gateway):
        await gateway.store.set_budget("global", 2 * WORST - 1)
        return await gateway.achat(ask())

    answer, rows, _ = run(config(tmp_path, model("small", latency_s=0.02)), work, decides)
    assert answer["model"] == "small"
    assert isinstance(found[0], str)
    assert isinstance(found[1], BudgetError)
    call, request = rows
    assert (call.cost_nano, call.reserved_nano, call.parent_id) == (COST, WORST, request.request_id)
    assert (request.cost_nano, request.calls, request.calls_nano) == (COST_ANSWER, 1, COST)
    # What the call did not need was there for the answer.
    assert request.reserved_nano == COST + WORST_ANSWER


def test_rows_of_calls_by_hand(tmp_path):
    async def decides(strategy, query):
        await strategy.which("small", purpose="draft")
        await strategy.which("large", max_tokens=3)
        with pytest.raises(
            InputError, match=r"'gossip'; the purpose must be one of route, draft, judge, answer, other"
        ):
            await strategy.which(purpose="gossip")

    async def accepts(strategy, model):
        await asyncio.gather(strategy.which(), strategy.which())
        return True

    async def work(gateway):
        await gateway.store.set_budget("global", nano_dollars(1))
        secret, _ = await gateway.store.create_key("k", user="ann", team="ml", tags=["x"], speaks_for=["tag:*"])
        await gateway.achat(ask(), key=secret, headers={"x-tags": "y"})
        assert len(await gateway.store.ledger()) == 1
        by_purpose = {one.group[0]: one for one in await gateway.store.spend("purpose")}
        by_model = {one.group[0]: one for one in await gateway.store.spend("model")}
        metrics = gateway.metrics_text().decode()
        return by_purpose, by_model, metrics, gateway.recent[-1], (await gateway.snapshot()).points

    (by_purpose, by_model, metrics, seen, points), rows, _ = run(config(tmp_path), work, decides, accepts)
    *calls, request = rows
    assert [(call.request_id, call.parent_id) for call in calls] == [
        (f"{request.request_id}.{number}", request.request_id) for number in (1, 2, 3, 4)
    ]
    large = 10_000 + 3 * 20_000
    assert [(call.purpose, call.model, call.deployment, call.cost_nano) for call in calls] == [
        ("draft", "small", "small", COST),
        ("route", "large", "large", large),
        ("judge", "small", "small", COST),
        ("judge", "small", "small", COST),
    ]
    assert [(call.prompt_tokens, call.completion_tokens) for call in calls] == [(1, 2), (1, 3), (1, 2), (1, 2)]
    for call in calls:
        assert (call.status, call.attempts, call.strategy, call.requested) == ("ok", 1, "asks", call.model)
        assert (call.key_id, call.user, call.team, call.tags) == (request.key_id, "ann", "ml", ("x", "y"))
        assert call.latency_us > 0
    assert (request.parent_id, request.purpose, request.attempts, request.model) == ("", "", 1, "small")
    assert (request.cost_nano, request.calls, request.calls_nano) == (COST_ANSWER, 4, 3 * COST + large)
    assert request.total_nano == COST_ANSWER + 3 * COST + large
    assert {name: (one.cost_nano, one.requests, one.calls) for name, one in by_purpose.items()} == {
        "": (COST_ANSWER, 1, 0),
        "draft": (COST, 0, 1),
        "route": (large, 0, 1),
        "judge": (2 * COST, 0, 2),
    }
    assert {name: (one.cost_nano, one.requests, one.calls) for name, one in by_model.items()} == {
        "small": (COST_ANSWER + 3 * COST, 1, 3),
        "large": (large, 0, 1),
    }
    assert 'anabranch_strategy_calls_total{model="small",purpose="judge",status="ok"} 2.0' in metrics
    assert f'anabranch_spend_nano_dollars_total{{model="large",strategy="asks"}} {large:.1f}' in metrics
    assert 'anabranch_attempts_total{deployment="large",outcome="ok"} 1.0' in metrics
    assert 'anabranch_requests_total{endpoint="chat",model="small",status="200",strategy="asks"} 1.0' in metrics
    assert seen.nano == request.total_nano
    assert [call["purpose"] for call in seen.calls] == ["draft", "route", "judge", "judge"]
    assert points == ()  # nobody judged


def test_what_a_strategy_asks_is_no_cost_of_the_model_that_it_chose(tmp_path):
    async def decides(strategy, query):
        await strategy.which("large")

    async def work(gateway):
        await gateway.achat(ask())
        id = (await gateway.store.ledger())[0].request_id
        await gateway.feedback({"request_id": id, "score": 1})
        with pytest.raises(ApiError, match="no request"):
            await gateway.feedback({"request_id": f"{id}.1", "score": 1})
        return {(point.kind, point.name): point.cost for point in (await gateway.snapshot()).points}

    cost, _, _ = run(config(tmp_path), work, decides)
    whole = pytest.approx(dollars(COST_ANSWER + 10 * COST))
    assert cost == {
        ("model", "small"): pytest.approx(dollars(COST_ANSWER)),
        ("strategy", "asks"): whole,
        ("live", "all traffic"): whole,
    }


def test_a_strategy_that_dies_in_the_middle_leaves_nothing(tmp_path):
    """Its calls end with it: they hold no money that the answer needs, and what they cost is charged."""

    async def decides(strategy, query):
        async def dies():
            await asyncio.sleep(0.02)
            raise RuntimeError("broke")

        await asyncio.gather(strategy.which(), strategy.which(), dies())

    async def work(gateway):
        await gateway.store.set_budget("global", 2 * WORST + WORST_ANSWER)
        reply = await gateway.handle("chat", ask())
        return reply.headers["x-route-bypassed"]

    made = config(tmp_path, model("small", script=("slow:0.6", "slow:0.6")))
    bypassed, rows, _ = run(made, work, decides)
    assert bypassed == "RuntimeError in the strategy"
    assert [(row.status, row.parent_id != "") for row in rows] == [
        ("cancelled", True),
        ("cancelled", True),
        ("ok", False),
    ]
    assert all(row.attempts == 1 and row.cost_nano > 0 for row in rows)


def test_what_a_strategy_that_died_had_held_is_there_for_the_answer(tmp_path):
    """Its calls wait to try again as it dies."""

    async def decides(strategy, query):
        async def dies():
            await asyncio.sleep(0.03)
            raise RuntimeError("broke")

        await asyncio.gather(strategy.which(), strategy.which(), dies())

    async def work(gateway):
        await gateway.store.set_budget("global", 2 * WORST)
        await gateway.achat(ask())

    made = config(tmp_path, model("small", script=("500", "500")), retries=RetryConfig(base_s=600.0, cap_s=600.0))
    _, rows, _ = run(made, work, decides)
    assert [(row.status, row.attempts, row.cost_nano) for row in rows] == [
        ("cancelled", 1, 0),
        ("cancelled", 1, 0),
        ("ok", 1, COST_ANSWER),
    ]


def test_a_call_that_outlives_the_answer_ends_with_it_and_is_charged(tmp_path):
    async def decides(strategy, query):
        async def later():
            await asyncio.sleep(0.02)
            await strategy.which()

        strategy.left = asyncio.create_task(later())

    async def work(gateway):
        await gateway.store.set_budget("global", nano_dollars(1))
        await gateway.achat(ask())
        await asyncio.sleep(0.05)

    _, rows, _ = run(config(tmp_path, model("small", script=("slow:0.1", "slow:0.6"))), work, decides)
    call, request = rows
    assert (call.status, call.attempts, request.status, request.calls) == ("cancelled", 1, "ok", 1)
    assert call.cost_nano > 0


def test_a_client_that_leaves_while_a_strategy_asks_leaves_nothing(tmp_path):
    async def decides(strategy, query):
        for _ in range(3):
            strategy.left = asyncio.create_task(strategy.which())
        await asyncio.sleep(5)

    async def work(gateway):
        await gateway.store.set_budget("global", nano_dollars(1))
        task = asyncio.create_task(gateway.achat(ask()))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.05)

    _, rows, _ = run(config(tmp_path, model("small", latency_s=0.6)), work, decides)
    assert [row.status for row in rows] == ["cancelled"] * 4


def test_nothing_is_asked_for_a_request_that_is_over(tmp_path):
    late = []

    async def decides(strategy, query):
        async def later():
            await asyncio.sleep(0.1)
            await strategy.which()

        late.append(asyncio.create_task(later()))

    async def work(gateway):
        await gateway.achat(ask())
        await gateway.aroute(ask())
        for task in late:
            with pytest.raises(InputError, match="is over"):
                await task

    _, rows, _ = run(config(tmp_path), work, decides)
    assert [row.parent_id for row in rows] == [""]


def test_a_strategy_whose_time_is_up_as_it_reserves_does_not_end_its_request(tmp_path):
    """The reservation was made, and nobody knew of it: the answer could not reserve under an id in use, and the money stayed away."""

    async def decides(strategy, query):
        async with asyncio.timeout(0.05):
            await strategy.which()

    async def work(gateway):
        await gateway.store.set_budget("global", nano_dollars(1))
        real = gateway.store.reserve

        async def slow(*given, **named):
            held = await real(*given, **named)
            await asyncio.sleep(0.2)
            return held

        gateway.store.reserve = slow
        return (await gateway.handle("chat", ask())).headers["x-route-bypassed"]

    bypassed, [request], _ = run(config(tmp_path), work, decides)
    assert bypassed == "it took longer than 10 s"
    assert (request.status, request.cost_nano) == ("ok", COST_ANSWER)


def test_further_attempts_of_a_call_are_paid_for_too(tmp_path):
    """The first attempt may cost something though nothing came of it; there is no room for a second one."""
    found = []

    async def decides(strategy, query):
        found.extend(await asyncio.gather(strategy.which(), return_exceptions=True))

    async def work(gateway):
        await gateway.store.set_budget("global", WORST)
        with pytest.raises(ApiError) as refused:
            await gateway.achat(ask("hello " * 50))
        return refused.value.code

    code, rows, _ = run(config(tmp_path, model("small", timeout_s=0.05, script=("slow:1", "ok"))), work, decides)
    assert code == "insufficient_quota"
    assert isinstance(found[0], AnabranchError)
    call, request = rows
    assert (call.status, call.attempts, request.status) == ("error", 1, "refused")
    assert 0 < call.cost_nano <= WORST


def test_money_that_an_answer_did_not_need_is_there_to_judge_it(tmp_path):
    async def accepts(strategy, model):
        await asyncio.gather(*(strategy.which() for _ in range(3)))
        return True

    async def work(gateway):
        # 100 tokens are reserved for the answer, which takes 4.
        await gateway.store.set_budget("global", 12_000 + 100 * 2_000)
        return await gateway.achat(ask(max_tokens=100))

    _, rows, _ = run(config(tmp_path), work, None, accepts)
    assert [(row.status, row.purpose) for row in rows] == [("ok", "judge")] * 3 + [("ok", "")]
    assert rows[-1].reserved_nano == 12_000 + 100 * 2_000


@pytest.mark.parametrize("streams", [False, True])
def test_a_stream_is_judged_and_paid_for_alike(tmp_path, streams):
    async def accepts(strategy, model):
        return "large" in await strategy.which(model)

    async def work(gateway):
        reply = await gateway.handle("chat", ask(stream=streams))
        if streams:
            async for _ in reply.stream:
                pass

    _, rows, _ = run(config(tmp_path), work, None, accepts)
    call, request = rows
    assert (call.model, call.purpose, request.model, request.attempts) == ("small", "judge", "large", 2)
    assert request.cost_nano == COST_ANSWER + 10 * COST_ANSWER


ASKED = st.lists(
    st.lists(st.tuples(st.sampled_from(["small", "large"]), st.integers(1, 60), st.integers(0, 4)), max_size=6),
    min_size=2,
    max_size=10,
)


@settings(max_examples=6, deadline=None)
@given(ASKED, st.integers(20_000, 1_500_000), st.booleans())
def test_random_asks_at_once_never_pass_a_budget(tmp_path_factory, asked, limit, gathers):
    async def decides(strategy, query):
        async def one(name, most, wait_ms):
            await asyncio.sleep(wait_ms / 1e3)
            await strategy.which(name, max_tokens=most)

        works = asked[int(query.text)]
        if gathers:
            await asyncio.gather(*(one(*which) for which in works))
        for which in () if gathers else works:
            await one(*which)

    made = config(
        tmp_path_factory.mktemp("asks"),
        model("small", fails=0.2, latency_s=0.003),
        model("large", Price.of_dollars(10, 20), latency_s=0.002, script=("slow:0.02", "500", "ok"), loops=True),
        retries=RetryConfig(base_s=0.001, cap_s=0.002),
    )

    async def work(gateway):
        await gateway.store.set_budget("global", limit)
        requests = [gateway.achat(ask(str(at), max_tokens=20)) for at in range(len(asked))]
        tasks = [asyncio.create_task(request) for request in requests]
        while not all(task.done() for task in tasks):
            [budget] = await gateway.store.budgets()
            assert budget.spent_nano + budget.reserved_nano <= limit
            await asyncio.sleep(0.001)
        assert all(isinstance(task.exception(), ApiError) for task in tasks if task.exception())
        await gateway.settled()
        return (await gateway.store.budgets())[0].spent_nano

    spent, rows, _ = run(made, work, decides)
    assert len([row for row in rows if not row.parent_id]) == len(asked)
    assert spent == sum(row.cost_nano for row in rows) <= limit


def test_each_pays_for_what_it_asks_itself_through_one_worker(tmp_path):
    """As strategies do that put several questions together: whose call it is says the ask, not who began the worker."""

    class Batched(Strategy):
        is_async = True
        waiting = None

        async def work(self):
            while True:
                ask, done = await self.waiting.get()
                try:
                    done.set_result(await ask("large", "which?", max_tokens=2, temperature=0))
                except AnabranchError as error:
                    done.set_exception(error)

        async def aroute(self, query, pool, ask):
            if self.waiting is None:
                self.waiting = asyncio.Queue()
                self.task = asyncio.create_task(self.work())
            done = asyncio.get_running_loop().create_future()
            self.waiting.put_nowait((ask, done))
            await done
            return Decision(candidates=(Candidate(model="small", score=0),), strategy="asks", reason="so")

    async def main():
        batched = Batched(None)
        async with Gateway(config(tmp_path, require_key=True), strategies={"asks": batched}) as gateway:
            rich, _ = await gateway.store.create_key("rich")
            poor, _ = await gateway.store.create_key("poor", models=["small"])
            await gateway.achat(ask(), key=rich)
            reply = await gateway.handle("chat", ask(), key=poor)
            await gateway.settled()
            names = {key.id: key.name for key in await gateway.store.keys()}
            rows = await gateway.store.ledger(LedgerQuery(calls=True, newest_first=False))
            batched.task.cancel()
            return reply.headers["x-route-bypassed"], [(names[row.key_id], row.model) for row in rows]

    bypassed, rows = asyncio.run(main())
    assert bypassed == "the strategy asks large, which the key of this request may not use"
    assert rows == [("rich", "large"), ("rich", "small"), ("poor", "small")]


# Whom, how often, how long


def test_a_strategy_asks_no_model_that_the_key_may_not_use(tmp_path):
    async def decides(strategy, query):
        await strategy.which("large")
        await strategy.which("small")

    async def work(gateway):
        secret, _ = await gateway.store.create_key("k", models=["large"])
        reply = await gateway.handle("chat", ask(), key=secret)
        with pytest.raises(ApiError):
            await gateway.handle("chat", ask(model="small"), key=secret)
        await gateway.aroute(ask(), key=secret)
        return reply.headers

    headers, rows, strategy = run(config(tmp_path), work, decides)
    assert headers["x-route-bypassed"] == "the strategy asks small, which the key of this request may not use"
    assert headers["x-route-model"] == "large"
    assert [(row.requested, row.status) for row in rows if row.parent_id] == [("large", "ok")] * 2
    for pool in strategy.pools:
        assert {one.name: one.is_available for one in pool.models} == {"small": False, "large": True}


def test_prompt_takes_its_fallback_where_its_model_is_not_allowed(tmp_path):
    strategies = {"asks": StrategyConfig(use="prompt", fields={"model": "small", "fallback": ("large",)})}

    async def work(gateway):
        secret, _ = await gateway.store.create_key("k", models=["large"])
        free, _ = await gateway.store.create_key("free")
        return [(await gateway.handle("chat", ask(), key=key)).headers["x-route-reason"] for key in (secret, free)]

    reasons, rows, _ = run(config(tmp_path, strategies=strategies, default_strategy=None), work)
    assert reasons == ["small gave no answer that can be used; fallback"] * 2
    assert [(row.model, row.purpose) for row in rows] == [("large", ""), ("small", "route"), ("large", "")]


def test_a_request_has_so_many_calls(tmp_path):
    found = []

    async def decides(strategy, query):
        found.extend(await asyncio.gather(*(strategy.which() for _ in range(4)), return_exceptions=True))
        await strategy.which()

    async def work(gateway):
        return (await gateway.handle("chat", ask())).headers["x-route-bypassed"]

    bypassed, rows, _ = run(config(tmp_path, limits=LimitsConfig(strategy_calls=3)), work, decides)
    assert bypassed == "a strategy may make 3 calls for one request (limits.strategy_calls), and has made them"
    assert [type(one) for one in found] == [str, str, str, LimitError]
    assert [row.parent_id != "" for row in rows] == [True, True, True, False]


def test_calls_of_a_request_have_so_much_time(tmp_path):
    """Those under way at once count once: 0.1 s of two are half of 0.2 s."""
    found = []

    async def decides(strategy, query):
        await asyncio.gather(strategy.which(), strategy.which())
        found.extend(await asyncio.gather(strategy.which(), return_exceptions=True))
        await strategy.which()

    async def work(gateway):
        return (await gateway.handle("chat", ask())).headers["x-route-bypassed"]

    made = config(tmp_path, model("small", script=("slow:0.1", "slow:0.1", "slow:0.8")))
    bypassed, rows, _ = run(made.replace(limits=LimitsConfig(strategy_calls_s=0.2)), work, decides)
    told = "calls of a strategy may take 0.2 s of one request (limits.strategy_calls_s), and have taken them"
    assert bypassed == told
    assert [str(one) for one in found] == [told]
    assert [(row.status, row.code) for row in rows] == [
        ("ok", ""),
        ("ok", ""),
        ("error", "deadline_exceeded"),
        ("ok", ""),
    ]


def test_a_request_has_a_limit_of_its_own_in_dollars(tmp_path):
    """The calls of its strategy and its answer count alike, and it is said which limit it was."""

    async def decides(strategy, query):
        await strategy.which()

    async def work(gateway):
        await gateway.achat(ask())
        with pytest.raises(ApiError) as refused:
            await gateway.achat(ask(max_tokens=5))
        return refused.value

    limit = COST + WORST_ANSWER
    made = config(tmp_path, limits=LimitsConfig(request_usd=dollars(limit)))
    error, rows, _ = run(made, work, decides)
    assert (error.status, error.code) == (429, "insufficient_quota")
    assert "a request may cost $0.000019 in all (limits.request_usd)" in str(error)
    assert "retry-after" not in {name.lower() for name in error.headers}
    assert [(row.status, row.purpose) for row in rows] == [
        ("ok", "route"),
        ("ok", ""),
        ("ok", "route"),
        ("refused", ""),
    ]


def test_a_model_that_is_not_there_is_no_fault_of_the_request(tmp_path):
    async def accepts(strategy, model):
        await strategy.which("none")

    async def work(gateway):
        await gateway.achat(ask())
        return gateway.metrics_text().decode()

    metrics, [request], _ = run(config(tmp_path), work, None, accepts)
    assert (request.status, request.model) == ("ok", "small")
    assert 'anabranch_strategy_bypassed_total{strategy="asks",why="raised"} 1.0' in metrics


def test_asking_where_a_request_would_go_is_charged_to_the_key(tmp_path):
    async def decides(strategy, query):
        await strategy.which()

    async def work(gateway):
        secret, record = await gateway.store.create_key("k")
        await gateway.store.set_budget(f"key:{record.id}", nano_dollars(1))
        await gateway.aroute(ask(), key=secret)
        return record.id

    id, [call, request], _ = run(config(tmp_path), work, decides)
    assert (call.key_id, request.key_id, request.cost_nano, request.calls_nano) == (id, id, 0, COST)


def test_a_reload_does_not_break_off_an_explanation_that_asks(tmp_path):
    async def decides(strategy, query):
        await strategy.which()

    async def work(gateway):
        task = asyncio.create_task(gateway.aroute(ask()))
        await asyncio.sleep(0.02)
        old = gateway.runtime
        assert old.users == 1
        await gateway.reload(gateway.config.replace(deadline_s=gateway.config.deadline_s + 1))
        decision = await task
        return decision.strategy, old.users

    found, [call, _], _ = run(config(tmp_path, model("small", latency_s=0.1)), work, decides)
    assert (found, call.status) == (("asks", 0), "ok")


# Through HTTP


def test_self_consistency_through_http(tmp_path):
    """Four samples of small agree, or come to nothing: then large answers."""
    fields = {"samples": 4, "models": ("small", "large"), "threshold": 0.9, "max_tokens": 8}
    strategies = {"asks": StrategyConfig(use="consistency", fields=fields)}
    says = "The answer is 4"
    steps = ("ok",) * 4 + ("ok", "500", "500", "500")
    made = config(
        tmp_path,
        model("small", reply=says, script=steps),
        model("large", Price.of_dollars(10, 20), reply=says),
        strategies=strategies,
        default_strategy=None,
    )
    made = made.replace(retries=made.retries.replace(attempts=1))

    async def work(gateway):
        await gateway.store.set_budget("global", nano_dollars(1))
        server = App(gateway).server()
        listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        try:
            operator, _ = await gateway.store.create_key("op", is_admin=True)
            async with aiohttp.ClientSession(headers={"authorization": f"Bearer {operator}"}) as session:
                ids = []
                for _ in range(2):
                    body = {**ask("2 + 2?"), "max_tokens": 8}
                    async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
                        assert answer.status == 200, await answer.text()
                        ids.append((answer.headers["x-request-id"], answer.headers["x-route-model"]))
                async with session.get(f"{url}/metrics") as answer:
                    metrics = await answer.text()
                async with session.get(f"{url}/ui") as answer:
                    page = await answer.text()
                rows = {}
                for query in ("", f"?parent_id={ids[0][0]}", "?calls=true", "?calls=maybe"):
                    async with session.get(f"{url}/admin/ledger{query}") as answer:
                        rows[query] = json.loads(await answer.text())
                return SimpleNamespace(ids=ids, metrics=metrics, page=page, rows=rows)
        finally:
            listener.close()
            await server.shutdown(0.1)

    found, rows, _ = run(made, work)
    assert [model for _, model in found.ids] == ["small", "large"]
    first_rows, second_rows = rows[:5], rows[5:]
    assert [(row.purpose, row.status) for row in first_rows] == [("draft", "ok")] * 4 + [("", "ok")]
    assert sorted((row.purpose, row.model, row.status) for row in second_rows) == [
        ("", "large", "ok"),
        ("answer", "large", "ok"),
        *[("draft", "", "error")] * 3,
        ("draft", "small", "ok"),
    ]
    assert 'anabranch_strategy_calls_total{model="small",purpose="draft",status="ok"} 5.0' in found.metrics
    assert 'anabranch_strategy_calls_total{model="small",purpose="draft",status="error"} 3.0' in found.metrics
    assert 'anabranch_strategy_calls_total{model="large",purpose="answer",status="ok"} 1.0' in found.metrics
    assert "<li>draft by small: 4 times, $" in found.page
    assert "<li>draft by small: 4 times, 3 without an answer, $" in found.page
    listed = {query: [row["request_id"] for row in answer.get("rows", ())] for query, answer in found.rows.items()}
    first, second = (id for id, _ in found.ids)
    assert listed[""] == [second, first]
    assert listed[f"?parent_id={first}"] == [f"{first}.{number}" for number in (4, 3, 2, 1)]
    assert len(listed["?calls=true"]) == 11
    assert found.rows["?calls=maybe"]["error"]["param"] == "calls"
    requests = {row["request_id"]: row for row in found.rows[""]["rows"]}
    assert (requests[first]["calls"], requests[second]["calls"], requests[first]["cost_nano"]) == (4, 5, 0)
