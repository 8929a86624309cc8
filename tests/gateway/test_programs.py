"""Programs in a gateway: what they say is an answer, whole or streamed; what they ask is paid, written and told of, however it ends."""

import asyncio
import contextlib
import json
from dataclasses import replace

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import AnabranchError, InputError, LimitError
from anabranch.gateway.config import (
    BreakerConfig,
    CacheConfig,
    DeploymentConfig,
    GatewayConfig,
    LimitsConfig,
    LogConfig,
    LostConfig,
    ModelConfig,
    RetryConfig,
    StrategyConfig,
)
from anabranch.gateway.core.program_run import ProgramRun
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.http.app import App
from anabranch.gateway.providers.assembling import assembled
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.providers.openai import OpenAI
from anabranch.gateway.store import LedgerQuery
from anabranch.gateway.store_outcomes import scored_requests
from anabranch.routers import Answered, Arm, Done, Program, ProgramRequest, Said, Shown, Step
from anabranch.routers.contract.query import Candidate, Decision, Model, Pool, Query
from anabranch.routers.money import Price, nano_dollars
from anabranch.web.api_error import ApiError
from anabranch.web.sse import read_data
from paced_time import run_paced

SMALL, LARGE = Price.of_dollars(1, 2), Price.of_dollars(10, 20)


def model(name, price=SMALL, **behaviour):
    provider = Mock.Config(model=name, **{"tokens": 4, **behaviour})
    return ModelConfig(name=name, price=price, max_tokens=100, deployments=(DeploymentConfig(provider=provider),))


def config(tmp_path, *models, **fields):
    fields = {
        "strategies": {"cheapest": StrategyConfig(use="cheapest"), "prog": StrategyConfig(use="static")},
        "default_strategy": "cheapest",
        "require_key": False,
        "store": str(tmp_path / "g.db"),
        "retries": RetryConfig(attempts=1),
        "lost": LostConfig(read_on_s=0),
        **fields,
    }
    return GatewayConfig(models=models or (model("small"), model("large", LARGE)), **fields)


class Scripted(Program):
    """Does what its test says."""

    def __init__(self, work):
        super().__init__(None)
        self.work, self.requests, self.told, self.closed = work, [], [], 0

    async def run(self, request, ask):
        self.requests.append(request)
        try:
            async for event in self.work(request, ask):
                yield event
        finally:
            self.closed += 1

    def observe(self, outcome):
        self.told.append(outcome)


def ask(**fields):
    return {"model": "auto/prog", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, **fields}


def run(config, work, program):
    """What ``work(gateway)`` gives, the ledger oldest first, and the program; the books are even and nothing is under way."""
    made = {} if program is None else {"prog": Scripted(program)}

    async def main():
        async with Gateway(config, strategies=made) as gateway:
            await gateway.store.set_budget("global", nano_dollars(1))
            found = await work(gateway)
            await gateway.settled()
            rows = await gateway.store.ledger(LedgerQuery(calls=True, limit=1000, newest_first=False))
            [budget] = await gateway.store.budgets()
            assert (budget.reserved_nano, budget.spent_nano) == (0, sum(row.cost_nano for row in rows))
            for row in rows:
                calls = [call for call in rows if call.parent_id == row.request_id]
                assert row.total_nano == row.cost_nano + sum(call.cost_nano for call in calls)
            assert gateway.in_flight == gateway.runtime.users == len(gateway.unsettled) == 0
            assert all(not state["in_flight"] for state in gateway.runtime.dispatcher.states())
            return found, rows

    return (*run_paced(main()), made.get("prog"))


@contextlib.asynccontextmanager
async def through_http(gateway, key=""):
    """A session against a gateway's real server."""
    server = App(gateway).server()
    listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        async with aiohttp.ClientSession(url, headers=headers) as session:
            yield session
    finally:
        listener.close()
        await server.shutdown(0.1)


async def both_drafts(request, ask):
    """Asks both models at once, and says what the dearer one says, word by word, behind a word of its own."""
    drafts = await asyncio.gather(*(ask(request.arm(name), request.messages) for name in request.names))
    yield Step("drafts", {"models": [draft.model for draft in drafts]})
    yield Said("So: ")
    async for piece in ask.stream(
        Arm("large", request.settings, system="be short"), request.messages, purpose="answer"
    ):
        if isinstance(piece, Said):
            yield piece
        else:
            yield Step("answered", {"tokens": piece.completion_tokens})
            yield Done(model=piece.model)


# Through HTTP


def test_a_program_that_the_config_does_not_name_is_served_by_its_name_and_after_a_reload(tmp_path):
    plain = config(tmp_path, strategies={"cheapest": StrategyConfig(use="cheapest")})

    async def work(gateway):
        before = (await gateway.achat(ask()))["choices"]
        await gateway.reload(plain.replace(retries=RetryConfig(attempts=2)))
        return before, (await gateway.achat(ask()))["choices"]

    async def says_so(request, ask):
        yield Said("so")
        yield Done(model="small")

    found, _, program = run(plain, work, says_so)
    assert [choices[0]["message"]["content"] for choices in found] == ["so", "so"]
    assert len(program.requests) == 2


def test_a_program_answers_through_http_whole_and_as_a_stream(tmp_path):
    async def work(gateway):
        operator, _ = await gateway.store.create_key("op", is_admin=True)
        async with through_http(gateway, operator) as session:
            async with session.post("/v1/chat/completions", json=ask(temperature=0.5)) as reply:
                assert reply.status == 200, await reply.text()
                whole, headers = json.loads(await reply.text()), reply.headers
            streamed = ask(temperature=0.5, stream=True, stream_options={"include_usage": True})
            async with session.post("/v1/chat/completions", json=streamed) as reply:
                text = await reply.read()
                assert reply.headers["x-route-model"] == "large"
            async with session.get("/admin/decisions") as reply:
                decisions = json.loads(await reply.text())
            async with session.get("/ui") as reply:
                assert "drafts" in await reply.text()
        # The page's line says what the answer's usage says, before its cost is known and after.
        for line in gateway.recent:
            assert (line.prompt_tokens, line.completion_tokens) == tuple(
                whole["usage"][f"{name}_tokens"] for name in ("prompt", "completion")
            )
        return whole, headers, text, decisions

    (whole, headers, text, decisions), rows, program = run(config(tmp_path), work, both_drafts)
    [choice] = whole["choices"]
    assert (whole["object"], whole["model"], choice["finish_reason"]) == ("chat.completion", "large", "stop")
    said = choice["message"]["content"]
    assert said.startswith("So: ")
    assert len(said.split()) == 4  # three tokens are allowed, and a word before
    chosen = ("x-route-model", "x-route-strategy", "x-route-calls", "x-route-attempts")
    assert [headers[name] for name in chosen] == ["large", "prog", "3", "0"]
    # The stream is the same answer, and ends as OpenAI's do.
    chunks = list(read_data(text))
    assert text.endswith(b"data: [DONE]\n\n")
    assert assembled(chunks, "chat")["choices"][0]["message"] == choice["message"]
    assert chunks[-1]["usage"] == whole["usage"]
    pieces = [one["choices"][0]["delta"].get("content") for one in chunks[:-2]]
    assert (pieces[0], "".join(pieces)) == ("So: ", said)
    # Each call has a row, and the usage is that of all.
    calls, request = rows[:3], rows[3]
    assert [(call.purpose, call.model, call.parent_id) for call in calls] == [
        ("draft", "small", request.request_id),
        ("draft", "large", request.request_id),
        ("answer", "large", request.request_id),
    ]
    assert whole["usage"]["completion_tokens"] == sum(call.completion_tokens for call in calls) == 9
    assert (request.model, request.attempts, request.cost_nano, request.calls, request.strategy) == (
        "large",
        0,
        0,
        3,
        "prog",
    )
    assert request.first_token_us is not None
    assert [row.status for row in rows] == ["ok"] * 8
    # Its trace is in the decision, and its cost is what it learns from.
    for decision in decisions["decisions"]:
        steps = decision["body"]["details"]["trace"]
        assert steps == [{"step": "drafts", "models": ["small", "large"]}, {"step": "answered", "tokens": 3}]
        assert decision["body"]["asked"] == ["small", "large"]
    assert [outcome.cost for outcome in program.told] == [
        pytest.approx(sum(call.cost_nano for call in calls) / 1e9)
    ] * 2
    assert program.requests[0].settings == {"max_tokens": 3, "temperature": 0.5}
    assert program.closed == 2


async def shows(request, ask):
    """Shows what it thinks before it says anything, and between two pieces."""
    yield Shown("thought", {"text": "musing", "turn": 1})
    yield Step("worked", {})
    yield Said("So ")
    yield Shown("thought", {"text": "ah", "turn": 2})
    yield Said("be it")
    yield Done(model="small")


def test_what_a_program_shows_stands_beside_its_answer(tmp_path):
    async def work(gateway):
        async with through_http(gateway) as session:
            async with session.post("/v1/chat/completions", json=ask()) as reply:
                whole = json.loads(await reply.text())
            async with session.post("/v1/chat/completions", json=ask(stream=True)) as reply:
                text = await reply.read()
            body = {"model": "auto/prog", "input": "hello", "stream": True}
            async with session.post("/v1/responses", json=body) as reply:
                response = (await reply.read()).decode()
            body = {"model": "auto/prog", "messages": ask()["messages"], "max_tokens": 9, "stream": True}
            async with session.post("/v1/messages", json=body) as reply:
                message = (await reply.read()).decode()
        return whole, text, response, message

    (whole, text, response, message), rows, _ = run(config(tmp_path), work, shows)
    wanted = [{"text": "musing", "turn": 1, "event": "thought"}, {"text": "ah", "turn": 2, "event": "thought"}]
    assert whole["trace"] == wanted
    assert whole["choices"][0]["message"]["content"] == "So be it"
    chunks = list(read_data(text))
    assert [chunk["trace"] for chunk in chunks if "trace" in chunk] == wanted
    assert all(chunk["choices"] == [] for chunk in chunks if "trace" in chunk)
    # In the order in which it happened, behind the chunk that names the role.
    order = ["trace" if "trace" in one else one["choices"][0]["delta"].get("content", "") for one in chunks]
    assert order == ["", "trace", "So ", "trace", "be it", ""]
    assert assembled(chunks, "chat")["choices"][0]["message"]["content"] == "So be it"
    # Other forms of answer have no place for it.
    for form in (response, message):
        assert "be it" in form
        assert "musing" not in form
    assert len(rows) == 4


def test_what_is_shown_is_in_no_trace_that_is_kept(tmp_path):
    async def work(gateway):
        operator, _ = await gateway.store.create_key("op", is_admin=True)
        async with through_http(gateway, operator) as session:
            await (await session.post("/v1/chat/completions", json=ask())).read()
            async with session.get("/admin/decisions") as reply:
                return await reply.text()

    told, _, _ = run(config(tmp_path), work, shows)
    assert "worked" in told
    assert "musing" not in told


@pytest.mark.parametrize("streams", [False, True])
def test_consistency_answers_through_http(tmp_path, streams):
    """Samples of small agree; then they do not, and large says its answer as it comes."""
    fields = {"samples": 3, "models": ("small", "large"), "threshold": 0.6, "max_tokens": 8}
    made = config(
        tmp_path,
        model("small", reply="The answer is 4", script=("ok", "500", "ok", "ok", "500", "500")),
        model("large", LARGE, reply="It is 5"),
        strategies={"prog": StrategyConfig(use="consistency", fields=fields)},
        default_strategy=None,
    )

    async def work(gateway):
        async with through_http(gateway) as session:
            found = []
            for _ in range(2):
                async with session.post("/v1/chat/completions", json=ask(stream=streams, max_tokens=8)) as reply:
                    data = await reply.read()
                    body = assembled(list(read_data(data)), "chat") if streams else json.loads(data)
                    found.append((body["choices"][0]["message"]["content"], reply.headers["x-route-model"]))
            decisions = await gateway.store.decisions()
            return found, [decision.body["details"]["trace"] for decision in reversed(decisions)]

    (found, traces), rows, _ = run(made, work, None)
    assert found == [("The answer is 4", "small"), ("It is 5", "large")]
    assert [(step["came"], step["is_given"]) for [step] in traces] == [(2, True), (1, False)]
    assert [row.status for row in rows].count("error") == 3
    assert [row.purpose for row in rows] == ["draft"] * 3 + [""] + ["draft"] * 3 + ["answer", ""]


@pytest.mark.parametrize("streams", [False, True])
def test_log_probabilities_are_asked_for_by_the_gateway_itself(tmp_path, streams):
    """Nobody asked for any: before, nothing could be measured then, and every question went on to large."""
    fields = {"models": ("sure", "unsure", "large"), "threshold": -0.5}
    made = config(
        tmp_path,
        model("sure", reply="It is 4", logprob=-0.1),
        model("unsure", reply="It may be 4", logprob=-2.0),
        model("large", LARGE, reply="It is 5"),
        strategies={
            "prog": StrategyConfig(use="logprob", fields=fields),
            "other": StrategyConfig(use="logprob", fields={**fields, "models": ("unsure", "large")}),
        },
        default_strategy=None,
    )

    async def work(gateway):
        async with through_http(gateway) as session:
            found = []
            for more in ({}, {"logprobs": True}, {"model": "auto/other"}):
                async with session.post(
                    "/v1/chat/completions", json=ask(stream=streams, max_tokens=8, **more)
                ) as reply:
                    data = await reply.read()
                    body = assembled(list(read_data(data)), "chat") if streams else json.loads(data)
                    choice = body["choices"][0]
                    found.append(
                        (choice["message"]["content"], reply.headers["x-route-model"], bool(choice.get("logprobs")))
                    )
            return found

    found, rows, _ = run(made, work, None)
    assert found == [("It is 4", "sure", False), ("It is 4", "sure", True), ("It is 5", "large", False)]
    assert [row.purpose for row in rows] == ["draft", ""] * 2 + ["draft", "answer", ""]


# Money and rights


def test_a_program_asks_no_model_that_the_key_may_not_use(tmp_path):
    refused = []

    async def work_of(request, ask):
        assert request.names == ("small",)
        try:
            await ask("large", "hello")
        except LimitError as error:
            refused.append(str(error))
        yield Done.of(await ask("small", "hello"))

    async def work(gateway):
        secret, _ = await gateway.store.create_key("k", models=["small"])
        return await gateway.achat(ask(), key=secret)

    answer, rows, _ = run(config(tmp_path), work, work_of)
    assert answer["model"] == "small"
    assert refused == ["the strategy asks large, which the key of this request may not use"]
    assert [row.model for row in rows] == ["small", "small"]


def test_calls_of_a_program_do_not_pass_the_limit_of_a_request(tmp_path):
    """The third call has no room left, and nor has an answer by the candidates."""

    async def work_of(request, ask):
        for _ in range(3):
            answered = await ask("small", "hello", max_tokens=10)
        yield Done.of(answered)

    async def work(gateway):
        with pytest.raises(ApiError, match="a request may cost") as caught:
            await gateway.achat(ask(max_tokens=100))
        return caught.value.status

    # Twelve tokens of prompt and ten of an answer are held, one and four are paid.
    limits = LimitsConfig(request_usd=2 * 9_000 / 1e9 + 31_999 / 1e9)
    status, rows, _ = run(config(tmp_path, limits=limits), work, work_of)
    assert (status, [row.status for row in rows]) == (429, ["ok", "ok", "refused"])


@pytest.mark.parametrize(
    ("one", "what"),
    [("x", "no strategy but 'x'"), (Scripted, r"the class Scripted: make one, Scripted\(...\)"), (None, "None")],
)
def test_what_is_no_strategy_is_told_at_once(tmp_path, one, what):
    with pytest.raises(InputError, match=rf"strategies has 'prog', which is .*{what}"):
        Gateway(config(tmp_path), strategies={"prog": one})


def test_an_answer_of_a_program_is_kept_and_given_again(tmp_path):
    async def work_of(request, ask):
        yield Done.of(await ask(request.arm("small"), request.messages))

    async def work(gateway):
        first = await gateway.handle("chat", ask(temperature=0))
        again = await gateway.handle("chat", ask(temperature=0))
        return first, again, gateway.metrics_text().decode()

    made = config(tmp_path, cache=CacheConfig(exact=True))
    (first, again, _), rows, program = run(made, work, work_of)
    assert first.body == again.body
    assert again.headers["x-cache"] == "exact"
    assert [row.cache for row in rows] == ["", "", "exact"]
    assert len(program.requests) == 1


@pytest.mark.parametrize("streams", [False, True])
def test_a_spare_answer_of_a_program_is_given_and_not_kept_for_long(tmp_path, streams):
    """A draft that would not do was given again after the model was back that had been down."""

    async def work_of(request, ask):
        found = Done.of(await ask(request.arm("small"), request.messages))
        yield replace(found, is_spare=not replies)

    replies = []

    async def work(gateway):
        for _ in range(3):
            # Longer than a breaker is open.
            await asyncio.sleep(0.01)
            replies.append(await gateway.handle("chat", ask(temperature=0, stream=streams)))
            if streams:
                async for _ in replies[-1].stream:
                    pass
        return [one.headers.get("x-cache") for one in replies]

    found, rows, program = run(
        config(tmp_path, cache=CacheConfig(exact=True), breaker=BreakerConfig(open_s=1e-3)), work, work_of
    )
    assert found[2] == "exact"
    assert [row.cache for row in rows if not row.parent_id] == ["", "", "exact"]
    assert len(program.requests) == 2


def test_what_a_program_says_is_no_outcome_of_a_model(tmp_path):
    async def work_of(request, ask):
        yield Done.of(await ask("small", request.messages))

    async def work(gateway):
        reply = await gateway.handle("chat", ask())
        await gateway.settled()
        await gateway.feedback({"request_id": reply.headers["x-request-id"], "score": 1})
        return await scored_requests(gateway.store)

    found, _, _ = run(config(tmp_path, log=LogConfig(prompts=True)), work, work_of)
    assert found == []


# How it ends


@pytest.mark.parametrize(
    ("fails", "why"),
    [
        (RuntimeError("secret text"), "RuntimeError in the program"),
        (InputError("odd"), "InputError in the program"),
        (LimitError("no room for it"), "no room for it"),
        (None, "InputError in the program"),  # it ends without a word
    ],
)
@pytest.mark.parametrize("streams", [False, True])
def test_a_program_that_fails_before_it_says_anything_is_passed_over(tmp_path, fails, why, streams):
    async def work_of(request, ask):
        await ask("large", "hello")
        left = asyncio.ensure_future(ask("large", "and more"))
        await asyncio.sleep(0.02)
        if fails is not None:
            raise fails
        yield Step("nothing", {"left": left.done()})

    async def work(gateway):
        reply = await gateway.handle("chat", ask(stream=streams))
        if reply.stream is not None:
            async for _ in reply.stream:
                pass
        return reply.headers

    made = config(tmp_path, model("small"), model("large", LARGE, latency_s=0.06))
    headers, rows, program = run(made, work, work_of)
    assert (headers["x-route-model"], headers["x-route-bypassed"]) == ("small", why)
    assert "x-route-calls" not in headers
    assert [row.status for row in rows] == ["ok", "cancelled", "ok"]
    assert (rows[-1].flags, rows[-1].attempts, program.closed) == (("bypassed",), 1, 1)


def test_what_a_program_that_failed_had_held_is_there_for_the_answer(tmp_path):
    """Its calls end with it, at once: one holds all that the request may cost."""

    async def work_of(request, ask):
        left = asyncio.ensure_future(ask("small", "hello", max_tokens=50))
        await asyncio.sleep(0.02)
        yield Step("left", {"is_done": left.done()})
        raise RuntimeError("broke")

    async def work(gateway):
        return (await gateway.handle("chat", ask())).headers["x-route-bypassed"]

    # Of the call 12 tokens of prompt and 50 of an answer; it waits to try again, and has cost nothing.
    made = config(
        tmp_path,
        model("small", script=("500",)),
        limits=LimitsConfig(request_usd=112_000 / 1e9),
        retries=RetryConfig(base_s=600.0, cap_s=600.0),
    )
    bypassed, rows, _ = run(made, work, work_of)
    assert bypassed == "RuntimeError in the program"
    assert [row.status for row in rows] == ["cancelled", "ok"]


def test_a_stream_that_a_program_leaves_ends_there(tmp_path):
    async def work_of(request, ask):
        stream = ask.stream("small", "hello", max_tokens=50)
        first = await anext(stream)
        await stream.aclose()
        left.append(len(ask._live))
        yield first

    async def work(gateway):
        return await gateway.achat(ask())

    left = []

    made = config(tmp_path, model("small", tokens=50, tokens_per_s=5.0))
    answer, rows, _ = run(made, work, work_of)
    assert left == [0]
    assert answer["choices"][0]["message"]["content"].strip() == "small"
    assert [row.status for row in rows] == ["cancelled", "ok"]


def test_a_program_that_breaks_in_the_middle_breaks_its_stream(tmp_path):
    async def work_of(request, ask):
        async for piece in ask.stream("small", "hello"):
            yield piece if isinstance(piece, Said) else Step("one", {})
        raise RuntimeError("secret text")

    async def work(gateway):
        async with (
            through_http(gateway) as session,
            session.post("/v1/chat/completions", json=ask(stream=True)) as reply,
        ):
            return await reply.text()

    text, rows, _ = run(config(tmp_path), work, work_of)
    assert "secret" not in text
    error = json.loads(text.rsplit("data: ", 2)[1])["error"]
    assert error["message"].endswith("the program failed (RuntimeError); the log says how")
    assert [(row.status, row.cost_nano > 0) for row in rows] == [("ok", True), ("error", False)]


@pytest.mark.parametrize("how", ["closes", "drops", "never reads", "goes"])
def test_a_reader_that_leaves_ends_the_program_and_its_calls(tmp_path, how):
    async def work_of(request, ask):
        yield Said("a")
        async for piece in ask.stream("small", "hello"):
            yield piece if isinstance(piece, Said) else Done()

    async def work(gateway):
        if how == "goes":
            async with through_http(gateway) as session:
                async with session.post("/v1/chat/completions", json=ask(stream=True)) as reply:
                    await reply.content.read(10)
                    reply.close()
                await asyncio.sleep(0.2)
            return
        reply = await gateway.handle("chat", ask(stream=True))
        stream, reply = reply.stream, None
        if how != "never reads":
            await anext(stream)
            await asyncio.sleep(0.03)
        if how == "closes":
            await stream.aclose()
        del stream
        await asyncio.sleep(0.05)

    made = config(tmp_path, model("small", tokens=90, tokens_per_s=20.0))
    _, rows, program = run(made, work, work_of)
    assert rows[-1].status == "cancelled"
    assert program.closed == 1
    assert [row.status for row in rows[:-1]] in ([], ["cancelled"])


def test_a_program_has_the_time_that_a_request_has(tmp_path):
    async def work_of(request, ask):
        yield Step("begun", {})
        await asyncio.sleep(60)

    async def work(gateway):
        with pytest.raises(ApiError) as caught:
            await gateway.achat(ask())
        return caught.value.status, gateway.metrics_text().decode()

    (status, metrics), [row], _ = run(config(tmp_path, deadline_s=0.1), work, work_of)
    assert (status, row.status) == (504, "error")
    assert 'anabranch_strategy_bypassed_total{strategy="prog",why="slow"} 1.0' in metrics


def test_a_program_has_the_time_of_the_slowest_model_that_it_may_ask(tmp_path):
    async def work_of(request, ask):
        yield Done.of(await ask("large", "hello"))

    async def work(gateway):
        return await gateway.achat(ask())

    slow = model("large", LARGE, latency_s=0.3).replace(deadline_s=5.0)
    answer, rows, _ = run(config(tmp_path, model("small"), slow, deadline_s=0.1), work, work_of)
    assert answer["model"] == "large"
    assert [row.status for row in rows] == ["ok", "ok"]


@pytest.mark.parametrize(("endpoint", "body"), [("chat", {"n": 2}), ("completions", {}), ("embeddings", {})])
def test_what_a_program_cannot_answer_is_refused(tmp_path, endpoint, body):
    asked = {
        "chat": ask(),
        "completions": {"model": "auto/prog", "prompt": "a"},
        "embeddings": {"model": "auto/prog", "input": "a"},
    }

    async def work(gateway):
        with pytest.raises(ApiError, match=r"auto/prog is a program: it answers (/v1/chat|with one choice)") as caught:
            await gateway.handle(endpoint, {**asked[endpoint], **body})
        return caught.value.status, caught.value.param

    found, [row], _ = run(config(tmp_path), work, both_drafts)
    assert (*found, row.status) == (400, "n" if endpoint == "chat" else "model", "refused")


def test_where_a_request_of_a_program_would_go_nothing_is_run(tmp_path):
    async def work(gateway):
        return await gateway.aroute(ask())

    decision, rows, program = run(config(tmp_path), work, both_drafts)
    assert (decision.model, decision.reason) == ("small", "Scripted answers itself, and may ask any model")
    assert (rows, program.requests) == ([], [])


# What it asks


@pytest.mark.parametrize(
    ("arm", "messages", "how", "message"),
    [
        ("none", "x", {}, "model 'none', which is not in the config"),
        ("small", "x", {"purpose": "gossip"}, "the purpose must be one of"),
        (
            Arm("small", {"n": 4, "stream": True}),
            "x",
            {},
            "settings of an arm hold n, stream, which the call says itself",
        ),
        ("small", [], {}, r"what cannot be asked: .*at least one message"),
        ("small", "x", {"n": 0}, "what cannot be asked: n"),
        ("small", "x", {"max_tokens": 10**9}, "what cannot be asked: max_tokens"),
        (Arm("small", {"temperature": "hot"}), "x", {}, "what cannot be asked: temperature"),
    ],
)
def test_what_cannot_be_asked(tmp_path, arm, messages, how, message):
    async def work_of(request, ask):
        with pytest.raises(InputError, match=message):
            await ask(arm, messages, **how)
        if "n" not in how:
            with pytest.raises(InputError, match=message):
                await anext(ask.stream(arm, messages, **how))
        yield Done(message={"content": "fine"})

    async def work(gateway):
        return await gateway.achat(ask())

    answer, [row], _ = run(config(tmp_path), work, work_of)
    assert answer["choices"][0]["message"]["content"] == "fine"
    assert (row.model, row.calls, row.cost_nano) == ("", 0, 0)


def test_what_a_call_says_reaches_the_model(tmp_path):
    """Samples, logprobs, ends and arms; what all answers of a call may cost is held, and what it cost is told."""
    asked = []

    async def upstream(request):
        asked.append(body := await request.json())
        choices = [
            {
                "index": at,
                "message": {"role": "assistant", "content": f"no {at}"},
                "finish_reason": "stop",
                "logprobs": {"content": [{"token": "no", "logprob": -0.5 - at}]},
            }
            for at in range(body.get("n", 1))
        ]
        usage = {"prompt_tokens": 5, "completion_tokens": 2 * len(choices), "total_tokens": 0}
        return web.json_response({"id": "x", "object": "chat.completion", "choices": choices, "usage": usage})

    found = []

    async def work_of(request, ask):
        thinks = Arm(
            "small", {"reasoning_effort": "high", "max_completion_tokens": 9, "seed": 1}, system="be short", samples=3
        )
        found.append(await ask(thinks, request.messages))
        found.append(
            await ask(thinks, request.messages, n=2, max_tokens=7, seed=2, logprobs=4, stop=["x"], temperature=0)
        )
        yield Done.of(found[1], 1)

    async def main():
        app = web.Application()
        app.router.add_post("/v1/chat/completions", upstream)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        provider = OpenAI.Config(model="up", base_url=f"http://127.0.0.1:{runner.addresses[0][1]}/v1", key_env=None)
        there = ModelConfig(
            name="small", price=SMALL, max_tokens=100, deployments=(DeploymentConfig(provider=provider),)
        )
        made = config(tmp_path, there)
        try:
            async with Gateway(made, strategies={"prog": Scripted(work_of)}) as gateway:
                messages = [{"role": "system", "content": "be long"}, {"role": "user", "content": "hello"}]
                answer = await gateway.achat(ask(messages=messages))
                await gateway.settled()
                return answer, await gateway.store.ledger(LedgerQuery(calls=True, newest_first=False))
        finally:
            await runner.cleanup()

    answer, rows = asyncio.run(main())
    first, second = asked
    assert first["messages"] == [{"role": "system", "content": "be short"}, {"role": "user", "content": "hello"}]
    assert (first["reasoning_effort"], first["max_completion_tokens"], first["n"], first["seed"]) == ("high", 9, 3, 1)
    chosen = ("n", "max_tokens", "seed", "logprobs", "top_logprobs", "stop", "temperature")
    assert [second[name] for name in chosen] == [2, 7, 2, True, 4, ["x"], 0]
    assert "max_completion_tokens" not in second
    three, two = found
    assert (three.texts, two.texts) == (("no 0", "no 1", "no 2"), ("no 0", "no 1"))
    assert two.logprobs(1)[0]["logprob"] == -1.5
    assert (two.prompt_tokens, two.completion_tokens, two.cost) == (5, 4, pytest.approx((5 * 1000 + 4 * 2000) / 1e9))
    assert [row.reserved_nano >= tokens * 2000 for row, tokens in zip(rows, (27, 14), strict=False)] == [True, True]
    assert answer["choices"][0]["message"]["content"] == "no 1"
    assert answer["choices"][0]["logprobs"]["content"][0]["logprob"] == -1.5


# By itself: whatever a program says, its stream and its whole answer are the same


class NoCalls:
    made = ()


def run_of(*events):
    async def work(request, ask):
        for event in events:
            yield event

    query, pool = Query(text="x"), Pool((Model(name="small"), Model(name="large")))
    decision = Decision(candidates=(Candidate(model="small", score=0),), strategy="s", reason="")
    request = ProgramRequest(query=query, pool=pool, decision=decision)
    return ProgramRun(Scripted(work), request, NoCalls(), id="1", left_s=5)


async def whole_of(*events):
    running = run_of(*events)
    await running.open()
    return await running.whole()


async def streamed_of(*events):
    running = run_of(*events)
    await running.open()
    return b"".join([block async for block in running]), running


TEXTS = st.text(max_size=5)
PIECES = st.lists(st.one_of(st.builds(Said, TEXTS), st.just(Step("s", {"a": 1}))), max_size=40)
MESSAGES = st.fixed_dictionaries(
    {},
    optional={
        "refusal": TEXTS,
        "tool_calls": st.just([{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]),
    },
)


@given(PIECES, TEXTS, MESSAGES, st.sampled_from(["stop", "length", "tool_calls"]))
@settings(max_examples=60, deadline=None)
def test_the_stream_of_a_program_is_its_answer(pieces, rest, message, reason):
    said = "".join(piece.text for piece in pieces if isinstance(piece, Said))
    done = Done(message={**message, "content": said + rest}, model="large", finish_reason=reason)
    whole = asyncio.run(whole_of(*pieces, done)).body["choices"][0]
    text, running = asyncio.run(streamed_of(*pieces, done))
    chunks = list(read_data(text))
    streamed = assembled(chunks, "chat")["choices"][0]
    assert (whole["message"]["content"], whole["finish_reason"]) == (said + rest, reason)
    named = {name: value for name, value in streamed["message"].items() if value}
    assert named == {name: value for name, value in whole["message"].items() if value}
    assert streamed["finish_reason"] == reason
    assert text.count(b"[DONE]") == 1
    assert running.report.model == "large"
    assert len(running.trace) == sum(isinstance(piece, Step) for piece in pieces)


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ((), "ended without an answer"),
        ((Step("a"),), "ended without an answer"),
        (("text",), "yields str; it may yield Said, Shown, Step and Done"),
        ((Said(5),), "yields Said"),
        ((Done(message={"content": 5}),), "content must be text, or None"),
        ((Done(message={"content": "a", "x": float("nan")}),), "not ready for JSON"),
        ((Step("a", {"x": object()}),), "facts of the program's step 'a' are not ready for JSON"),
        ((Shown("a", {"x": float("nan")}),), "facts of the program's event 'a' are not ready for JSON"),
        ((Done(message={"content": "a"}, model="gpt"),), "names 'gpt', which is not in the pool"),
    ],
)
def test_what_makes_no_answer(events, message):
    with pytest.raises(InputError, match=message):
        asyncio.run(whole_of(*events))


def test_another_answer_than_was_begun():
    with pytest.raises(InputError, match="another answer than the one that it began to give"):
        asyncio.run(whole_of(Said("a"), Done(message={"content": "b"})))
    text, running = asyncio.run(streamed_of(Said("a"), Done(message={"content": "b"})))
    assert b"InputError" in text
    assert running.failure is not None
    with pytest.raises(AnabranchError, match="did not come to its end"):
        run_of().answer()


def test_a_trace_has_an_end():
    answer = asyncio.run(streamed_of(*[Step("s", {"at": at}) for at in range(400)], Step("s"), Said("a")))[1]
    assert len(answer.trace) == 256
    long = asyncio.run(streamed_of(Step("s", {"at": "x" * 5000}), Said("a")))[1]
    assert long.trace == [{"step": "s", "is_left_out": True}]


def test_what_comes_after_the_end_is_not_run():
    whole = asyncio.run(whole_of(Done.of(Answered.saying("a", model="small")), Said("b"), "no event"))
    assert whole.text == "a"


UNPRICED = (
    {"service_tier": "priority"},
    {"models": ["other"]},
    {"plugins": [{"id": "web"}]},
    {"web_search_options": {}},
    {"tools": [{"type": "code_interpreter"}]},
    {"modalities": ["audio"]},
)


@pytest.mark.parametrize("field", UNPRICED, ids=lambda field: next(iter(field)))
def test_what_has_no_price_is_refused_before_a_program_runs(tmp_path, field):
    async def say(request, ask):
        yield Done.of(await ask(request.arm("small"), request.messages))

    async def work(gateway):
        found = []
        for name in ("small", "auto/prog"):
            with pytest.raises(ApiError) as caught:
                await gateway.achat(ask(model=name, **field))
            found.append((caught.value.status, caught.value.code, caught.value.param))
        return found

    found, rows, program = run(config(tmp_path), work, say)
    assert found[0] == found[1] == (400, "unpriced", found[0][2])
    assert program.requests == []
    assert not any(row.calls or row.total_nano for row in rows)


def test_a_program_may_ask_only_models_that_have_the_price(tmp_path):
    async def say(request, ask):
        with pytest.raises(LimitError, match="has no price for"):
            await ask(request.arm("small"), request.messages, purpose="draft")
        with pytest.raises(LimitError, match="has no price for"):
            await ask(Arm("small", settings={"service_tier": "priority"}), request.messages)
        yield Done.of(await ask(request.arm("large"), request.messages))

    async def work(gateway):
        return await gateway.achat(ask(service_tier="priority"))

    dear = replace(LARGE, tiers={"priority": LARGE})
    found, rows, _ = run(config(tmp_path, model("small"), model("large", dear)), work, say)
    assert found["model"] == "large"
    assert [row.model for row in rows if row.parent_id] == ["large"]
