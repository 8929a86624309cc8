"""Whole answers of any shape: taken as they are, or held against the deployment that sent them, and never an error of the gateway."""

import asyncio
import json

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.config import (
    CacheConfig,
    DeploymentConfig,
    GatewayConfig,
    ModelConfig,
    RetryConfig,
    StrategyConfig,
)
from anabranch.gateway.dispatch.billed import whole_at_most
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.providers.answer_shape import read_answer
from anabranch.gateway.providers.anthropic import Anthropic
from anabranch.gateway.providers.chunks import as_chunks
from anabranch.gateway.providers.gemini import Gemini
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.providers.openai import OpenAI
from anabranch.gateway.providers.provider import Answer, UpstreamError, UpstreamRequest, Usage
from anabranch.gateway.store import LedgerQuery
from anabranch.web.responses import to_response

CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
ASKED = UpstreamRequest("chat", {"model": "m", "messages": [{"role": "user", "content": "hello"}]}, prompt_tokens=5)


def of(message=None, **choice):
    message = {"role": "assistant", "content": "x"} | (message or {})
    return {"choices": [{"index": 0, "message": message, "finish_reason": "stop"} | choice]}


def read(body, request=ASKED, provider=None):
    provider = provider or OpenAI.Config(model="m", key_env=None).build()
    return read_answer(provider, request, json.dumps(body).encode())


GOOD = [
    of(),
    of({"content": None, "tool_calls": [CALL]}),
    of({"tool_calls": []}),
    of({"tool_calls": None}),
    of({"tool_calls": {}}),
    of({"tool_calls": [{"id": "c", "type": "custom", "custom": {"name": "f", "input": "x"}}]}),
    of({"content": "\ud800"}),
    of(finish_reason=None),
    {"choices": [{"message": {"content": "x"}}], "object": 5, "created": "now", "model": None},
]
BAD = [
    {"choices": []},
    {"choices": [None]},
    {"choices": ["x"]},
    {"choices": [{}]},
    {"choices": [{"message": None}]},
    of(message={"content": 5}),
    of(message={"content": ["x"]}),
    {"choices": [{"message": "str", "finish_reason": "stop"}]},
    of({"tool_calls": "zz"}),
    of({"tool_calls": {"a": 1}}),
    of({"tool_calls": [{}]}),
    of({"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}),
    of({"reasoning_content": 5}),
    of({"refusal": ["x"]}),
    of(index="a"),
    of(finish_reason=5),
    of(logprobs="x"),
]


@pytest.mark.parametrize("body", GOOD)
def test_what_is_an_answer_passes_as_it_came(body):
    assert read(body).body == body


def test_content_in_parts_is_put_into_openais_form():
    thought = {"type": "thinking", "thinking": [{"type": "text", "text": "h"}, {"type": "text", "text": "m"}]}
    source = {"type": "reference", "reference_ids": [1, 2]}
    answer = read(of({"content": [thought, {"type": "text", "text": "x"}, source, {"type": "text", "text": "y"}]}))
    [choice] = answer.body["choices"]
    assert choice["message"] == {
        **of()["choices"][0]["message"],
        "content": "xy",
        "reasoning_content": "hm",
        "extra_content": {"parts": [{"index": 0, **source}]},
    }
    assert json.loads(answer.data) == answer.body


@pytest.mark.parametrize("body", BAD)
def test_what_is_none_is_garbage(body):
    with pytest.raises(UpstreamError) as caught:
        read(body)
    assert caught.value.failure.kind == "garbage"


def test_completions_and_vectors():
    completion = UpstreamRequest("completions", {"model": "m", "prompt": "x"}, prompt_tokens=1)
    vectors = UpstreamRequest("embeddings", {"model": "m", "input": "x"}, prompt_tokens=1)
    assert read({"choices": [{"text": "a", "index": 0}]}, completion).text == "a"
    assert read({"data": [{"embedding": [1.0]}]}, vectors).body["data"]
    for body, request in (
        ({"choices": [{"text": None}]}, completion),
        (of(), completion),
        ({"data": [5]}, vectors),
        ({"data": {}}, vectors),
    ):
        with pytest.raises(UpstreamError):
            read(body, request)


@pytest.mark.parametrize(
    "usage", [{"input_tokens": -5}, {"input_tokens": 1.5}, {"input_tokens": 10**12}, {"input_tokens": 0}, None, {}]
)
def test_a_usage_that_cannot_be_is_none(usage):
    body = {"type": "message", "content": [{"type": "text", "text": "word " * 8}], "usage": usage}
    found = read(body, provider=Anthropic.Config(key_env=None).build()).usage
    assert (found.prompt, found.completion, found.is_estimated) == (5, 10, True)


LONG = "word " * 500


@pytest.mark.parametrize(
    ("message", "told", "usage"),
    [
        ({"content": LONG}, {"completion_tokens": 0}, (50, 625, True)),
        ({"content": LONG}, {"completion_tokens": None}, (50, 625, True)),
        ({"content": LONG}, {"completion_tokens": 1}, (50, 625, True)),
        ({"content": LONG}, {"completion_tokens": 2}, (50, 2, False)),
        ({"content": None, "reasoning_content": LONG}, {"completion_tokens": 1}, (50, 625, True)),
        ({"content": [{"type": "text", "text": LONG}]}, {"completion_tokens": 1}, (50, 625, True)),
        ({"tool_calls": [{**CALL, "function": {"name": "f", "arguments": LONG}}]}, {}, (50, 625, True)),
        # The sum tells it.
        ({"content": LONG}, {"completion_tokens": 0, "total_tokens": 550}, (50, 500, False)),
        ({"content": LONG}, {"total_tokens": 550}, (50, 500, False)),
        ({"content": LONG}, {"completion_tokens": 0, "total_tokens": 49}, (50, 625, True)),
        ({"content": LONG}, {"completion_tokens": 7, "total_tokens": 550}, (50, 500, False)),
        # What is short, or no text, may well be one token.
        ({"content": "word " * 50}, {"completion_tokens": 1}, (50, 1, False)),
        ({"content": "", "images": [{"image_url": {"url": LONG}}]}, {"completion_tokens": 1}, (50, 1, False)),
    ],
)
def test_a_completion_that_is_told_as_nothing_beside_much_text_is_estimated(message, told, usage):
    answer = read(of(message) | {"usage": {"prompt_tokens": 50, **told}})
    found = answer.usage
    assert (found.prompt, found.completion, found.is_estimated) == usage
    # What is charged then: the prompt as told, and for each byte a token.
    charged = whole_at_most(Usage(999, 4000), answer)
    assert charged.prompt == 50
    assert charged.completion >= usage[1]
    assert (charged.completion > 2000) == usage[2] == charged.is_estimated


def test_the_echo_of_a_prompt_is_no_completion():
    request = UpstreamRequest("completions", {"prompt": LONG, "max_tokens": 1, "echo": True}, prompt_tokens=5)
    body = {
        "choices": [{"index": 0, "text": LONG, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 50, "completion_tokens": 1},
    }
    assert read(body, request).usage == Usage(50, 1)
    plain = UpstreamRequest("completions", {"prompt": LONG, "max_tokens": 1}, prompt_tokens=5)
    assert read(body, plain).usage.completion == 625


@pytest.mark.parametrize(
    ("told", "usage"),
    [
        ({"promptTokenCount": 50, "totalTokenCount": 650}, (50, 600, False)),
        ({"promptTokenCount": 50, "thoughtsTokenCount": 40, "totalTokenCount": 650}, (50, 600, False)),
        ({"promptTokenCount": 50, "toolUsePromptTokenCount": 9, "totalTokenCount": 650}, (59, 591, False)),
        ({"promptTokenCount": 50, "candidatesTokenCount": 7, "totalTokenCount": 650}, (50, 7, False)),
        ({"promptTokenCount": 50, "totalTokenCount": 3}, (50, 625, True)),
        ({"promptTokenCount": 50}, (50, 625, True)),
    ],
)
def test_the_completion_of_gemini_that_is_in_the_sum_alone_is_counted(monkeypatch, told, usage):
    monkeypatch.setenv("A_KEY", "key-0123456789")
    body = {"candidates": [{"content": {"parts": [{"text": LONG}]}, "finishReason": "STOP"}], "usageMetadata": told}
    found = read(body, provider=Gemini.Config(model="m", key_env="A_KEY").build()).usage
    assert (found.prompt, found.completion, found.is_estimated) == usage


def test_more_cached_than_asked_cannot_be():
    class Odd(Mock):
        def parse(self, request, body):
            return Answer(of(), None, Usage(5, 1, 9))

    assert read_answer(Odd(Mock.Config()), ASKED, b"").usage.is_estimated


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "index",
                    "message",
                    "content",
                    "tool_calls",
                    "function",
                    "name",
                    "arguments",
                    "type",
                    "text",
                    "finish_reason",
                    "logprobs",
                    "refusal",
                    "reasoning_content",
                    "usage",
                    "prompt_tokens",
                    "role",
                ]
            ),
            inner,
        )
    ),
)


@given(
    st.dictionaries(st.sampled_from(["choices", "usage", "model", "created", "id"]), JSON)
    | JSON.map(lambda message: {"choices": [{"message": message}]})
)
def test_what_passes_can_be_streamed_and_told_as_a_response(body):
    try:
        answer = read(body)
    except UpstreamError:
        return
    assert isinstance(answer.text, str)
    assert answer.usage.prompt >= 0
    assert json.dumps(as_chunks(answer.body, with_usage=True))
    assert to_response({"model": "m"}, answer.body)["output"] is not None


def gateway_of(tmp_path, url):
    upstream = DeploymentConfig(name="odd", provider=OpenAI.Config(model="m", base_url=url, key_env=None))
    other = DeploymentConfig(name="good", provider=Mock.Config(model="good", reply="well"))
    return GatewayConfig(
        models=(ModelConfig(name="m", deployments=(upstream,)), ModelConfig(name="good", deployments=(other,))),
        strategies={"cheapest": StrategyConfig(use="cheapest")},
        require_key=False,
        fallbacks={"m": ("good",)},
        retries=RetryConfig(attempts=1),
        store=str(tmp_path / "g.db"),
        cache=CacheConfig(),
    )


def against(tmp_path, body, work):
    async def handler(request):
        return web.Response(body=json.dumps(body).encode(), content_type="application/json")

    async def main():
        app = web.Application()
        app.router.add_post("/v1/chat/completions", handler)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            async with Gateway(gateway_of(tmp_path, f"http://127.0.0.1:{runner.addresses[0][1]}/v1")) as gateway:
                await work(gateway)
                await gateway.settled()
                return await gateway.store.ledger(LedgerQuery(newest_first=False))
        finally:
            await runner.cleanup()

    return asyncio.run(main())


def ask(**fields):
    return {"model": "m", "messages": [{"role": "user", "content": "hello"}], **fields}


@pytest.mark.parametrize("body", BAD[:2] + BAD[7:10])
def test_another_model_answers_where_one_sends_garbage(tmp_path, body):
    async def work(gateway):
        assert "well" in (await gateway.achat(ask()))["choices"][0]["message"]["content"]
        assert [one async for one in await gateway.achat(ask(stream=True))]

    rows = against(tmp_path, body, work)
    assert [(row.status, row.model, row.attempts) for row in rows] == [("ok", "good", 2)] * 2


def test_a_kept_answer_is_streamed_with_all_that_it_says(tmp_path):
    """Its tier was lost, and an odd field made a 500 of what the ledger called well."""

    async def work(gateway):
        await gateway.achat(ask(temperature=0))
        chunks = [one async for one in await gateway.achat(ask(temperature=0, stream=True))]
        assert [chunk["service_tier"] for chunk in chunks] == ["flex"] * 2
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "x"}
        usage = [
            one
            async for one in await gateway.achat(
                ask(temperature=0, stream=True, stream_options={"include_usage": True})
            )
        ][-1]["usage"]
        assert usage["prompt_tokens"] == 9

    told = {"service_tier": "flex", "usage": {"prompt_tokens": 9, "completion_tokens": 1}}
    rows = against(tmp_path, {**of({"tool_calls": {}}), **told}, work)
    assert [row.cache for row in rows] == ["", "exact", "exact"]
