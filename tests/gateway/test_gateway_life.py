"""One request's life: keys, budgets, caches, strategies, streams; and one row in the ledger whatever happens."""

import asyncio
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import ConfigError
from anabranch.gateway.config import (
    CacheConfig,
    DeploymentConfig,
    GatewayConfig,
    LimitsConfig,
    LostConfig,
    ModelConfig,
    RetryConfig,
    StrategyConfig,
)
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.store import LedgerQuery
from anabranch.routers.contract.query import Candidate, Decision
from anabranch.routers.contract.strategy import Strategy
from anabranch.routers.embed.hashed import Hashed
from anabranch.routers.money import Price, dollars
from anabranch.web.api_error import ApiError
from paced_time import run_paced

PRICE = Price.of_dollars(1, 2)  # 1,000 and 2,000 nano-dollars a token


def model(name, price=PRICE, **behaviour):
    provider = Mock.Config(model=name, tokens=4, **behaviour)
    return ModelConfig(name=name, price=price, max_tokens=100, deployments=(DeploymentConfig(provider=provider),))


def config(tmp_path, *models, **fields):
    fields = {
        "strategies": {"cheapest": StrategyConfig(use="cheapest")},
        "require_key": False,
        "store": str(tmp_path / "g.db"),
        **fields,
    }
    return GatewayConfig(models=models or (model("small"), model("large", Price.of_dollars(10, 20))), **fields)


def ask(text="hello", **fields):
    return {"model": "small", "messages": [{"role": "user", "content": text}], **fields}


def run(config, work, **options):
    """What ``work(gateway)`` gives, and all rows of the ledger, oldest first."""

    async def main():
        async with Gateway(config, **options) as gateway:
            found = await work(gateway)
            await gateway.settled()
            assert gateway.in_flight == gateway.runtime.users == 0
            assert len(gateway.caches.flights) == 0
            rows = await gateway.store.ledger(LedgerQuery(limit=10_000, newest_first=False))
            assert all(budget.reserved_nano == 0 for budget in await gateway.store.budgets())
            return found, rows

    return run_paced(main())


async def everything(gateway, body, **options):
    """The chunks of a stream."""
    return [chunk async for chunk in await gateway.achat({**body, "stream": True}, **options)]


def text_of(chunks):
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk.get("choices"))


# Answers and their rows


def test_an_answer_has_one_row_with_what_it_cost(tmp_path):
    answer, [row] = run(config(tmp_path), lambda gateway: gateway.achat(ask()))
    usage = answer["usage"]
    assert (row.status, row.model, row.deployment, row.attempts, row.requested, row.strategy) == (
        "ok",
        "small",
        "small",
        1,
        "small",
        "",
    )
    assert (row.prompt_tokens, row.completion_tokens) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert row.cost_nano == usage["prompt_tokens"] * 1_000 + usage["completion_tokens"] * 2_000
    assert row.reserved_nano >= row.cost_nano
    assert 0 <= row.overhead_us <= row.latency_us


def test_a_stream_says_and_costs_the_same(tmp_path):
    async def work(gateway):
        return await gateway.achat(ask()), await everything(gateway, ask())

    (answer, chunks), [whole, streamed] = run(config(tmp_path), work)
    assert text_of(chunks) == answer["choices"][0]["message"]["content"]
    assert streamed.cost_nano == whole.cost_nano
    assert streamed.first_token_us is not None


def test_a_stream_that_is_left_is_paid_for_as_far_as_it_got(tmp_path):
    async def work(gateway):
        stream = await gateway.achat(ask(stream=True, max_tokens=50))
        await anext(stream)
        assert gateway.in_flight == 1
        await stream.aclose()

    _, [row] = run(config(tmp_path, model("small", tokens_per_s=20)), work)
    assert row.status == "cancelled"
    assert 0 < row.cost_nano <= row.reserved_nano


def test_a_stream_that_nobody_reads_is_settled_too(tmp_path):
    async def work(gateway):
        reply = await gateway.handle("chat", ask(stream=True))
        await reply.stream.aclose()

    _, [row] = run(config(tmp_path), work)
    assert row.status == "cancelled"


def test_a_client_that_leaves_while_waiting_is_settled(tmp_path):
    async def work(gateway):
        task = asyncio.create_task(gateway.achat(ask()))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    _, [row] = run(config(tmp_path, model("small", latency_s=0.3)), work)
    assert row.status == "cancelled"


def test_what_fails_falls_back_and_the_row_says_so(tmp_path):
    made = config(tmp_path, model("small", fails=1), model("large"), fallbacks={"small": ("large",)})
    answer, [row] = run(made, lambda gateway: gateway.achat(ask()))
    assert answer["model"] == "large"
    assert (row.status, row.model, row.candidates) == ("ok", "large", ("small", "large"))
    assert row.attempts >= 2


def test_what_fails_altogether_is_an_error_of_the_upstreams(tmp_path):
    async def work(gateway):
        with pytest.raises(ApiError) as caught:
            await gateway.achat(ask())
        return caught.value

    error, [row] = run(config(tmp_path, model("small", fails=1)), work)
    assert error.status >= 500
    assert error.headers["x-request-id"] == row.request_id
    assert row.status == "error"
    assert row.cost_nano == 0


def test_a_stream_that_breaks_says_so_in_the_stream(tmp_path):
    async def work(gateway):
        with pytest.raises(ApiError):
            await everything(gateway, ask())

    _, [row] = run(config(tmp_path, model("small", script=("cut:2",))), work)
    assert row.status == "error"


@pytest.mark.parametrize("mode", ["error", "restart"])
@pytest.mark.parametrize("wish", [{}, {"x-mid-stream": "restart"}])
def test_a_stream_that_breaks_begins_anew_where_the_config_and_its_reader_want_that(tmp_path, mode, wish):
    made = config(tmp_path, model("small", script=("cut:2",)), mid_stream=mode, retries=RetryConfig(base_s=0.0))

    async def work(gateway):
        reply = await gateway.handle("chat", ask(stream=True, temperature=0), headers=wish)
        events = b"".join([piece async for piece in reply.stream])
        _, mark, after = events.partition(b"event: restart")
        again = await gateway.achat(ask(temperature=0))
        return bool(mark), b'"error"' in events, after.count(b'"content"'), text_of_answer(again)

    (restarted, failed, num_tokens, text), rows = run(made, work)
    assert restarted is (mode == "restart" and bool(wish))
    assert failed is not restarted
    if restarted:
        # The turn and four words; what is kept is the second one alone.
        assert (num_tokens, len(text.split()), [row.cache for row in rows]) == (5, 4, ["", "exact"])
        assert rows[0].attempts == 2


def text_of_answer(answer):
    return answer["choices"][0]["message"]["content"]


def test_each_stage_of_a_request_is_timed(tmp_path):
    """As often as it came to it; a failure in the stage that it came in."""

    def counts(gateway):
        lines = gateway.metrics_text().decode().splitlines()
        found = [line for line in lines if line.startswith("anabranch_stage_seconds_count")]
        return {line.partition('stage="')[2].partition('"')[0]: int(float(line.rpartition(" ")[2])) for line in found}

    async def work(gateway):
        await gateway.achat(ask(temperature=0))
        await gateway.achat(ask(temperature=0))
        await everything(gateway, ask(stream=True))
        with pytest.raises(ApiError):
            await gateway.achat(ask(model="none"))
        with pytest.raises(ApiError):
            await gateway.achat({**ask(), "model": "large", "max_tokens": 60})
        await gateway.settled()
        await gateway.store.ledger()
        return counts(gateway)

    made = config(tmp_path, model("small"), model("large", script=("422",)))
    assert run(made, work)[0] == {
        "key": 5,
        "read": 5,
        "cache": 4,
        "decide": 3,
        "reserve": 3,
        "call": 3,
        "stream": 1,
        "settle": 4,
    }


# Strategies


class Picky(Strategy):
    """Asks small what to do, takes no short answer, and remembers what it is told."""

    is_async = True
    reads_answers = True

    def __init__(self):
        super().__init__(None)
        self.told = []

    async def aroute(self, query, pool, ask):
        await ask("small", "which?", max_tokens=2, temperature=0)
        return Decision(
            candidates=(Candidate(model="small", score=1, quality=0.3), Candidate(model="large", score=0)),
            strategy="picky",
            reason="so",
        )

    async def aaccept(self, query, model, answer, details, ask):
        return model == "large"

    def observe(self, outcome):
        self.told.append(outcome)


def picky(tmp_path):
    return config(
        tmp_path, strategies={"picky": StrategyConfig(use="static"), "cheapest": StrategyConfig(use="cheapest")}
    )


def test_a_strategy_chooses_and_the_decision_is_kept(tmp_path):
    async def work(gateway):
        answer = await gateway.achat(ask(model="auto/cheapest"))
        return answer, await gateway.store.decisions()

    (answer, [decision]), [row] = run(config(tmp_path), work)
    assert answer["model"] == decision.model == row.model == "small"
    assert row.strategy == "cheapest"
    assert decision.body["candidates"][0]["model"] == "small"


def test_a_stream_says_before_its_first_token_who_answers(tmp_path):
    """Its headers named no model: they go out before it has ended."""

    async def work(gateway):
        broken = await gateway.handle("chat", ask(model="auto/cheapest", stream=True))
        async for _ in broken.stream:
            pass
        return broken.headers

    models = (model("small", fails=1.0), model("large", Price.of_dollars(10, 20)))
    headers, [row] = run(config(tmp_path, *models), work)
    assert (
        (headers["x-route-model"], headers["x-route-deployment"]) == (row.model, row.deployment) == ("large", "large")
    )


def test_calls_of_a_strategy_are_charged_and_answers_are_judged(tmp_path):
    strategy = Picky()

    async def work(gateway):
        answer = await gateway.achat(ask(model="auto/picky"))
        id = (await gateway.store.ledger())[0].request_id
        told = await gateway.feedback({"request_id": id, "score": 0.5})
        async with asyncio.timeout(60):  # it learns in a thread of its own, and closing drops what waits there
            while len(strategy.told) < 2:
                await asyncio.sleep(0.001)
        return answer, told

    (answer, told), [row] = run(picky(tmp_path), work, strategies={"picky": strategy})
    assert answer["model"] == told["model"] == row.model == "large"
    assert row.attempts == 2  # small was asked and not accepted
    parts = (4 + 4 * 10) * 2_000  # completions alone: small's and large's answers, large at ten times the price
    assert row.cost_nano > parts
    assert (row.calls, row.calls_nano) == (1, 1_000 + 2 * 2_000)
    assert row.reserved_nano >= row.total_nano
    assert [outcome.quality for outcome in strategy.told] == [None, 0.5]
    # What it asked is no cost of the models that it chose.
    assert strategy.told[0].cost == dollars(row.cost_nano)


def test_routing_alone_asks_and_keeps_nothing(tmp_path):
    decision, rows = run(config(tmp_path), lambda gateway: gateway.aroute(ask(model="auto/cheapest")))
    assert decision.model == "small"
    assert rows == []


# Keys, budgets, limits


def test_a_fallback_goes_to_no_model_that_the_key_may_not_use_and_stands_in_for_none(tmp_path):
    """Who names a model that is closed to them is told so, and is not answered by another one; and where the one they may use fails,
    nobody is asked that they may not.
    """

    async def work(gateway):
        bound, _ = await gateway.store.create_key("bound", models=["large"])
        other, _ = await gateway.store.create_key("other", models=["small"])
        with pytest.raises(ApiError) as closed:
            await gateway.achat(ask(), key=bound)
        with pytest.raises(ApiError) as failed:
            await gateway.achat(ask(), key=other)
        return closed.value, failed.value

    models = (model("small", script=("503",) * 20), model("large", Price.of_dollars(10, 20)))
    made = config(tmp_path, *models, require_key=True, fallbacks={"small": ("large",)})
    (closed, failed), rows = run(made, work)
    assert (closed.status, closed.code) == (403, "model_not_allowed")
    assert failed.status >= 500
    assert [row.model for row in rows if row.status == "ok"] == []


def test_keys_are_asked_for_and_may_be_bound_to_models(tmp_path):
    async def work(gateway):
        bound, _ = await gateway.store.create_key("bound", models=["large"])
        free, record = await gateway.store.create_key("free", team="t", tags=["x"], speaks_for=["*"])
        codes = []
        for secret in (None, "wrong", bound):
            with pytest.raises(ApiError) as caught:
                await gateway.achat(ask(), key=secret)
            codes.append((caught.value.status, caught.value.code))
        await gateway.achat(ask(user="u"), key=free, headers={"x-tags": "a, b"})
        await gateway.store.revoke_key(record.id)
        with pytest.raises(ApiError):
            await gateway.achat(ask(), key=free)
        return codes

    codes, rows = run(config(tmp_path, require_key=True), work)
    assert codes == [(401, "invalid_api_key")] * 2 + [(403, "model_not_allowed")]
    assert [(row.status, row.team, row.user, row.tags) for row in rows if row.status == "ok"] == [
        ("ok", "t", "u", ("x", "a", "b"))
    ]


def test_a_budget_is_never_passed_and_is_said_in_the_refusal(tmp_path):
    """max_tokens 100 at 2,000 and 16 tokens of prompt at 1,000 are reserved: 216,000. Two such fit in 0.0005 dollars, three do not."""

    async def work(gateway):
        await gateway.store.set_budget("global", 500_000)
        answers = await asyncio.gather(*(gateway.achat(ask()) for _ in range(3)), return_exceptions=True)
        return [answer for answer in answers if isinstance(answer, ApiError)]

    [error], rows = run(config(tmp_path, model("small", latency_s=0.05)), work)
    assert (error.status, error.code) == (429, "insufficient_quota")
    assert sorted(row.status for row in rows) == ["ok", "ok", "refused"]


def test_a_strategys_candidates_without_room_are_passed_over(tmp_path):
    async def work(gateway):
        await gateway.store.set_budget("global", 500_000)
        return await gateway.achat(ask(model="auto/dear", max_tokens=100))

    strategies = {"dear": StrategyConfig(use="static", fields={"model": "large"})}
    answer, [row] = run(config(tmp_path, strategies=strategies), work)
    assert answer["model"] == "small"
    assert row.candidates == ("large", "small")


def test_a_dear_fallback_is_not_taken_without_room(tmp_path):
    async def work(gateway):
        await gateway.store.set_budget("global", 500_000)
        with pytest.raises(ApiError) as caught:
            await gateway.achat(ask())
        return caught.value

    made = config(
        tmp_path, model("small", fails=1), model("large", Price.of_dollars(10, 20)), fallbacks={"small": ("large",)}
    )
    _, [row] = run(made, work)
    assert row.status == "error"
    assert row.cost_nano == 0


@settings(max_examples=5, deadline=None)
@given(
    st.integers(100_000, 3_000_000),
    st.lists(st.tuples(st.booleans(), st.integers(1, 100), st.booleans()), min_size=5, max_size=40),
)
def test_spent_and_reserved_stay_within_the_limit(tmp_path_factory, limit, requests):
    made = config(tmp_path_factory.mktemp("budget"), model("small", fails=0.2, latency_s=0.002))

    async def one(gateway, streamed, most, leaves):
        body = ask(max_tokens=most, stream=streamed)
        reply = await gateway.handle("chat", body)
        if reply.stream is not None:
            async for _ in reply.stream:
                if leaves:
                    break
            await reply.stream.aclose()

    async def work(gateway):
        await gateway.store.set_budget("global", limit)
        tasks = [asyncio.create_task(one(gateway, *request)) for request in requests]
        while not all(task.done() for task in tasks):
            [budget] = await gateway.store.budgets()
            assert budget.spent_nano + budget.reserved_nano <= limit
            await asyncio.sleep(0.001)
        errors = [task.exception() for task in tasks if task.exception()]
        assert all(isinstance(error, ApiError) for error in errors)
        return (await gateway.store.budgets())[0].spent_nano

    spent, rows = run(made, work)
    assert len(rows) == len({row.request_id for row in rows}) == len(requests)
    assert spent == sum(row.cost_nano for row in rows) <= limit


def test_rates_and_crowds_are_refused_with_the_time_to_wait(tmp_path):
    async def work(gateway):
        await gateway.achat(ask())
        with pytest.raises(ApiError) as caught:
            await gateway.achat(ask())
        return caught.value

    error, _ = run(config(tmp_path, limits=LimitsConfig(rpm=1)), work)
    assert (error.status, error.code) == (429, "rate_limit_exceeded")
    assert 1 <= int(error.headers["Retry-After"]) <= 60

    async def crowd(gateway):
        answers = await asyncio.gather(*(gateway.achat(ask()) for _ in range(3)), return_exceptions=True)
        return sorted(type(answer).__name__ for answer in answers)

    found, _ = run(config(tmp_path, model("small", latency_s=0.05), limits=LimitsConfig(in_flight=2)), crowd)
    assert found == ["ApiError", "dict", "dict"]


# Caches


def test_an_identical_request_at_temperature_0_is_answered_from_memory(tmp_path):
    async def work(gateway):
        first = await gateway.achat(ask(temperature=0))
        again = await gateway.achat(ask(temperature=0))
        streamed = await everything(gateway, ask(temperature=0))
        warm = await gateway.achat(ask(temperature=1))
        fresh = await gateway.achat(ask(temperature=0), headers={"cache-control": "no-cache"})
        allowed = [await gateway.achat(ask("b"), headers={"x-cache": "allow"}) for _ in range(2)]
        return first, again, streamed, warm, fresh, allowed

    (first, again, streamed, warm, fresh, allowed), rows = run(config(tmp_path), work)
    assert first == again
    assert text_of(streamed) == first["choices"][0]["message"]["content"]
    assert first["id"] not in (warm["id"], fresh["id"])
    assert allowed[0] == allowed[1]
    assert [(row.cache, row.cost_nano > 0) for row in rows] == [
        ("", True),
        ("exact", False),
        ("exact", False),
        ("", True),
        ("", True),
        ("", True),
        ("exact", False),
    ]


def test_a_stream_is_kept_once_it_is_whole(tmp_path):
    async def work(gateway):
        return await everything(gateway, ask(temperature=0)), await gateway.achat(ask(temperature=0))

    (chunks, answer), rows = run(config(tmp_path), work)
    assert text_of(chunks) == answer["choices"][0]["message"]["content"]
    assert [row.cache for row in rows] == ["", "exact"]


def test_identical_requests_at_once_make_one_call(tmp_path):
    async def work(gateway):
        streams = [everything(gateway, ask(temperature=0)) for _ in range(3)]
        await asyncio.gather(*streams, *(gateway.achat(ask(temperature=0)) for _ in range(5)))

    _, rows = run(config(tmp_path, model("small", latency_s=0.05)), work)
    assert sorted(row.cache for row in rows) == ["", *["shared"] * 7]


def test_tenants_never_see_each_others_answers(tmp_path):
    async def work(gateway):
        keys = [(await gateway.store.create_key(name))[0] for name in ("a", "b")]
        answers = [await gateway.achat(ask("what is two plus two", temperature=0), key=key) for key in (*keys, *keys)]
        return [answer["id"] for answer in answers]

    made = config(tmp_path, require_key=True, cache=CacheConfig(semantic=True, threshold=0.5), embedder=Hashed.Config())
    (a, b, again_a, again_b), rows = run(made, work)
    assert a == again_a != b == again_b
    assert [row.cache for row in rows] == ["", "", "exact", "exact"]


def test_what_means_the_same_is_answered_where_that_is_wanted(tmp_path):
    made = config(tmp_path, cache=CacheConfig(exact=False, semantic=True, threshold=0.6), embedder=Hashed.Config())

    async def work(gateway):
        texts = ("what is the capital of France", "what is the capital of france?", "who wrote Hamlet")
        return [(await gateway.achat(ask(text)))["id"] for text in texts]

    (one, two, three), rows = run(made, work)
    assert one == two != three
    assert [row.cache for row in rows] == ["", "semantic", ""]


# Reload, Python


def test_a_new_config_is_taken_while_a_stream_goes_on_and_a_bad_one_is_not(tmp_path):
    old = config(tmp_path, model("small", tokens_per_s=100))

    async def work(gateway):
        stream = await gateway.achat(ask(stream=True))
        first = await anext(stream)
        await gateway.reload(config(tmp_path, model("other")))
        rest = [first, *[chunk async for chunk in stream]]
        with pytest.raises(ConfigError, match="store"):
            await gateway.reload(config(tmp_path, model("third"), store="elsewhere.db"))
        with pytest.raises(ConfigError, match="learn"):
            await gateway.reload(config(tmp_path, model("third"), strategies={"knn": StrategyConfig(use="knn")}))
        with pytest.raises(ApiError):
            await gateway.achat(ask())
        return rest, await gateway.achat(ask(model="other"))

    (rest, answer), _ = run(old, work)
    assert rest[-1]["choices"][0]["finish_reason"]
    assert answer["model"] == "other"


def test_the_plain_api_needs_no_event_loop(tmp_path):
    with Gateway(config(tmp_path)) as gateway:
        assert gateway.chat(ask())["choices"][0]["message"]["content"]
        assert text_of(list(gateway.chat(ask(), stream=True)))
        assert gateway.route(ask(model="auto/cheapest")).model == "small"
        with pytest.raises(ApiError, match="did you mean") as refused:
            gateway.chat(ask(model="smal"))
        # Where it was refused in the gateway says nothing to who asked: forty lines above the one that does.
        assert len(refused.traceback) <= 5
        assert refused.value.__suppress_context__


def test_the_package_gives_gateway_and_strategies():
    from anabranch import gateway as package
    from anabranch.routers import strategies

    assert package.Gateway is Gateway
    assert "knn" in strategies.names()
    with pytest.raises(AttributeError):
        _ = package.nothing


def test_prompts_and_keys_are_nowhere_in_the_store(tmp_path):
    async def work(gateway):
        secret, _ = await gateway.store.create_key("k")
        await gateway.achat(ask("a very private prompt", model="auto/cheapest"), key=secret)
        await everything(gateway, ask("a very private prompt"), key=secret)
        assert not [seen for seen in gateway.recent if "private" in json.dumps(repr(seen))]
        return secret

    secret, _ = run(config(tmp_path), work)
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"private" not in stored
    assert secret.encode() not in stored


class Examples(Strategy):
    """Gives the small model an example to go by."""

    def route(self, query, pool):
        candidates = tuple(Candidate(model=name, score=-float(at)) for at, name in enumerate(pool.names))
        return Decision(candidates=candidates, strategy="examples", reason="in order")

    def prepare(self, query, model, messages, *, decision=None):
        example = [{"role": "user", "content": "two words"}, {"role": "assistant", "content": "like these three"}]
        return [*example, *messages] if model == "small" else messages


@pytest.mark.parametrize("streams", [False, True])
def test_what_a_strategy_prepares_is_sent_paid_for_and_reserved_for(tmp_path, streams):
    async def work(gateway):
        reply = await gateway.handle("chat", {**ask("and now"), "model": "auto/cheapest", "stream": streams})
        if streams:
            async for _ in reply.stream:
                pass

    _, (row,) = run(config(tmp_path), work, strategies={"cheapest": Examples(Examples.Config())})
    assert (row.model, row.prompt_tokens) == ("small", 2 + 3 + 2)
    assert "over_reserved" not in row.flags


def test_clients_are_told_not_to_ask_again_where_it_would_end_alike(tmp_path):
    async def work(gateway):
        with pytest.raises(ApiError) as late:
            await gateway.achat(ask())
        assert (late.value.status, late.value.headers["x-should-retry"]) == (504, "false")
        await gateway.store.set_budget("global", 1)
        with pytest.raises(ApiError) as spent:
            await gateway.achat(ask())
        assert (spent.value.code, spent.value.headers["x-should-retry"]) == ("insufficient_quota", "false")

    run(config(tmp_path, model("small", latency_s=1.0), deadline_s=0.05, lost=LostConfig(read_on_s=0.0)), work)
