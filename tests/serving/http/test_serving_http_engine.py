"""The server in front of a real engine and a small mixture of experts; and the official client against it."""

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from anabranch.data import ByteTokenizer
from anabranch.lm import SamplingConfig, generate
from anabranch.serving.config import ServingConfig
from anabranch.serving.engine.engine import Engine
from anabranch.serving.engine.local import LocalEngine
from serving_models import EXPERTS, LAYERS, small_moe
from serving_thread import events, serving, streamed
from waiting import until

openai = pytest.importorskip("openai")
MODEL = "small"
HELLO = [{"role": "user", "content": "hello"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"warm": {"type": "boolean"}},
                "required": ["warm"],
                "additionalProperties": False,
            },
        },
    }
]


@pytest.fixture(scope="module")
def model():
    return small_moe()


@pytest.fixture(scope="module")
def server(model):
    config = ServingConfig(num_blocks=256, name=MODEL, dtype="float32", max_seqs=8, max_batched_tokens=64)

    def make():
        return LocalEngine(lambda: Engine.of(model, config, tokenizer=ByteTokenizer()))

    with serving(make) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="anything", max_retries=0, timeout=60) as made:
        yield made


def ask(server, **fields):
    return server.ask(
        "/v1/completions", {"model": MODEL, "prompt": "hello", "temperature": 0, "max_tokens": 12, **fields}
    )


def test_greedy_text_is_that_of_the_model(server, model):
    prompt = ByteTokenizer().encode("hello")
    [wanted] = generate(model, [prompt], SamplingConfig(max_tokens=12, temperature=0, stop=(256,)))
    status, _, body = ask(server)
    assert status == 200
    assert body["choices"][0]["text"] == ByteTokenizer().decode(wanted)
    assert streamed(ask(server, stream=True)[2]) == body["choices"][0]["text"]


def test_requests_that_an_engine_had_not_begun_are_answered_by_the_next(model):
    """The first hangs in its step; two wait behind it, one of them with two choices."""
    config = ServingConfig(num_blocks=256, name=MODEL, dtype="float32", max_seqs=1, scheduling="sync")
    may_go, may_load, made = threading.Event(), threading.Event(), []

    def make_engine():
        if made:
            assert may_load.wait(60)
        engine = Engine.of(model, config, tokenizer=ByteTokenizer())
        run = engine.runner.run
        is_first = not made
        made.append(engine)

        def hanging(batch):
            if is_first and batch.new:
                may_go.wait(60)
            return run(batch)

        engine.runner.run = hanging
        return engine

    body = {"model": MODEL, "prompt": "hello", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    # The next one has as long as a busy machine needs.
    with (
        serving(lambda: LocalEngine(make_engine, watchdog_s=120.0 if made else 3.0)) as running,
        ThreadPoolExecutor(3) as pool,
    ):
        first = pool.submit(running.ask, "/v1/completions", body)
        until(
            lambda: running.frontend.admission.in_flight == 1 and running.frontend.engine.stats().gauges["streams"] == 1
        )
        others = [pool.submit(running.ask, "/v1/completions", {**body, "n": n}) for n in (1, 2)]
        until(lambda: running.frontend.state == "loading")
        assert running.ask("/health/ready")[0] == running.ask("/health")[0] == 503
        may_load.set()
        status, _, answer = first.result(60)
        assert (status, answer["error"]["code"]) == (500, "engine_failed")
        texts = [[choice["text"] for choice in other.result(60)[2]["choices"]] for other in others]
        assert texts[0] * 2 == texts[1]
        assert len(made) == 2
        assert running.metrics()["engine_restarts_total"] == 1
        until(lambda: running.frontend.admission.in_flight == 0)
        may_go.set()


def test_text_does_not_depend_on_company(server):
    prompts = [f"number {number}" for number in range(12)]
    alone = [ask(server, prompt=prompt)[2]["choices"][0]["text"] for prompt in prompts]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda prompt: ask(server, prompt=prompt)[2]["choices"][0]["text"], prompts))
    assert together == alone
    assert [choice["text"] for choice in ask(server, prompt=prompts)[2]["choices"]] == alone


def test_a_seed_gives_the_same_again(server):
    first = ask(server, temperature=1, seed=5, n=3)[2]["choices"]
    again = ask(server, temperature=1, seed=5, n=3)[2]["choices"]
    assert [choice["text"] for choice in first] == [choice["text"] for choice in again]
    assert len({choice["text"] for choice in first}) == 3
    alone = ask(server, temperature=1, seed=6)[2]["choices"][0]["text"]
    assert alone == first[1]["text"]


def test_a_prefix_is_not_computed_twice(server):
    prompt = "a prompt of more than two blocks of sixteen tokens"
    first, second = (ask(server, prompt=prompt, cache_salt="x")[2] for _ in range(2))
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == 48
    assert second["choices"][0]["text"] == first["choices"][0]["text"]
    other = ask(server, prompt=prompt, cache_salt="y")[2]
    assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_routing_is_what_the_model_did(server):
    body = ask(server, routing=True)[2]
    tokens = body["choices"][0]["routing"]["tokens"]
    assert len(tokens) == body["usage"]["completion_tokens"] == body["routing"]["tokens"]
    assert set(body["routing"]["experts"]) == {str(layer) for layer in range(LAYERS)}
    for row in tokens:
        assert all(len(set(experts)) == 2 and max(experts) < EXPERTS for experts in row["experts"].values())
    assert sum(body["routing"]["experts"]["0"].values()) == 2 * len(tokens)


def test_logprobs_are_those_of_the_choice(server):
    body = ask(server, logprobs=3)[2]
    told = body["choices"][0]["logprobs"]
    assert len(told["tokens"]) == body["usage"]["completion_tokens"]
    for value, top in zip(told["token_logprobs"], told["top_logprobs"], strict=True):
        assert value == pytest.approx(max(top.values()))  # greedy


def test_json_on_demand(server):
    schema = {
        "type": "object",
        "properties": {"warm": {"type": "boolean"}},
        "required": ["warm"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for seed in range(3):
        body = server.ask(
            "/v1/chat/completions",
            {"model": MODEL, "messages": HELLO, "response_format": form, "seed": seed, "max_tokens": 200},
        )[2]
        assert isinstance(json.loads(body["choices"][0]["message"]["content"])["warm"], bool)


def test_a_schema_that_cannot_be_followed_is_refused(server):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {"type": "string"}}}}
    status, _, body = server.ask("/v1/chat/completions", {"model": MODEL, "messages": HELLO, "response_format": form})
    assert (status, body["error"]["param"]) == (400, "response_format")
    assert "not" in body["error"]["message"]


def test_the_official_client(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=HELLO, max_tokens=8, temperature=0)
    answer = raw.parse()
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert raw.headers["x-request-id"]
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=HELLO,
            max_tokens=8,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == answer.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
    assert client.completions.create(model=MODEL, prompt="Once", max_tokens=5).choices[0].finish_reason


def test_the_official_client_and_tools(client):
    choice = {"type": "function", "function": {"name": "weather"}}
    for wanted in (choice, "required"):
        answer = client.chat.completions.create(
            model=MODEL,
            messages=HELLO,
            tools=TOOLS,
            tool_choice=wanted,
            max_tokens=300,
            seed=1,
            parallel_tool_calls=False,
        )
        [call] = answer.choices[0].message.tool_calls
        assert call.function.name == "weather"
        assert isinstance(json.loads(call.function.arguments)["warm"], bool)
        assert answer.choices[0].finish_reason == "tool_calls"
        follow = [*HELLO, answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "yes"}]
        assert client.chat.completions.create(model=MODEL, messages=follow, tools=TOOLS, max_tokens=4).choices


def test_the_official_client_parses_forms(client):
    import pydantic

    class Weather(pydantic.BaseModel):
        warm: bool

    answer = client.chat.completions.parse(model=MODEL, messages=HELLO, response_format=Weather, max_tokens=200, seed=2)
    assert isinstance(answer.choices[0].message.parsed, Weather)


def test_the_official_async_client(server):
    async def main():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            answers = await asyncio.gather(
                *(client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=4) for _ in range(8))
            )
            assert all(answer.choices for answer in answers)
            stream = await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True, max_tokens=200)
            async for _ in stream:
                break
            await stream.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"model": "other"}, openai.NotFoundError, "other"),
        ({"max_tokens": -1}, openai.BadRequestError, "max_tokens"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"max_tokens": 5000}, openai.BadRequestError, "tokens"),
    ],
)
def test_errors_are_the_clients_own_kinds(client, fields, error, says):
    with pytest.raises(error, match=says) as caught:
        client.chat.completions.create(**{"model": MODEL, "messages": HELLO, **fields})
    assert set(caught.value.body) == {"message", "type", "code", "param"}
    assert caught.value.request_id


def test_what_is_told_adds_up(server):
    before = server.metrics()
    usage = ask(server, routing=True)[2]["usage"]
    raw = ask(server, stream=True, stream_options={"include_usage": True}, n=2, temperature=1)[2]
    other = events(raw)[-2]["usage"]
    after = server.metrics()
    made = after["generation_tokens_total"] - before["generation_tokens_total"]
    assert made == usage["completion_tokens"] + other["completion_tokens"]
    assert after["step_time_seconds_count"] > before["step_time_seconds_count"]
    assert after["batch_tokens_sum"] > before["batch_tokens_sum"]


@pytest.mark.parametrize(
    "fields",
    [
        *({name: 1e-46} for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty")),
        {"temperature": 5e-324, "top_p": 5e-324, "min_p": 5e-324, "seed": -(2**63)},
        {
            "temperature": 2,
            "repetition_penalty": 0.01,
            "logit_bias": {"1": 1e-320, "2": -100},
            "n": 2,
            "top_k": 2**31 - 1,
        },
    ],
    ids=str,
)
def test_numbers_that_float32_does_not_have_are_answered_and_the_engine_goes_on(server, fields):
    status, _, body = ask(server, **{"temperature": 1, "ignore_eos": True, **fields})
    assert status == 200, body
    assert all(choice["finish_reason"] == "length" for choice in body["choices"])
    assert server.metrics()["engine_restarts_total"] == 0
