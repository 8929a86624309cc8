"""What a request's own content brings about is the request's: a clear refusal, and nothing held against a deployment, of whatever kind."""

import asyncio
import gc
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.gateway.config import (
    CacheConfig,
    DeploymentConfig,
    GatewayConfig,
    ModelConfig,
    RetryConfig,
    StrategyConfig,
)
from anabranch.gateway.dispatch import Deployment, Dispatcher, DispatchRules, Group, Plan
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.providers.anthropic import Anthropic
from anabranch.gateway.providers.azure import Azure
from anabranch.gateway.providers.bedrock import Bedrock
from anabranch.gateway.providers.engine import Engine
from anabranch.gateway.providers.gemini import Gemini
from anabranch.gateway.providers.local import Local
from anabranch.gateway.providers.mock import Mock, MockReply
from anabranch.gateway.providers.ollama import Ollama
from anabranch.gateway.providers.openai import OpenAI
from anabranch.gateway.providers.openrouter import OpenRouter
from anabranch.gateway.providers.provider import UpstreamError, UpstreamRequest
from anabranch.gateway.providers.recorded import Record, Replay, write_answers
from anabranch.gateway.providers.scenes import Behaviour, Scene
from anabranch.gateway.providers.vertex import Vertex
from anabranch.gateway.store import LedgerQuery
from anabranch.registry import kinds, resolve
from anabranch.web.api_error import ApiError
from anabranch.web.body import MOST_DEPTH, is_too_deep
from anabranch.web.sse import DONE, event
from paced_time import run_paced
from waiting import until_async

HELLO = [{"role": "user", "content": "hello"}]


class Refusing:
    """A transport whose upstream takes nothing."""

    async def open(self, call):
        json.loads(call.body)
        return MockReply(Scene(status=400, parts=[(0.0, b'{"error": {"message": "no"}}')]))


@pytest.fixture(scope="module")
def providers(tmp_path_factory):
    """A config of each kind of provider there is."""
    folder = tmp_path_factory.mktemp("kinds")
    write_answers(folder / "answers.jsonl", {"hello": "yes"})
    found = {
        "anthropic": Anthropic.Config(model="m", key_env=None),
        "openai": OpenAI.Config(model="m", key_env=None),
        "azure": Azure.Config(model="m", key_env=None, base_url="https://name.openai.azure.com"),
        "bedrock": Bedrock.Config(model="m", key_env="A_KEY", region="us-east-1"),
        "gemini": Gemini.Config(model="m", key_env="A_KEY"),
        "vertex": Vertex.Config(model="m", key_env="A_KEY"),
        "ollama": Ollama.Config(model="m", key_env=None),
        "openrouter": OpenRouter.Config(model="m", key_env=None),
        "engine": Engine.Config(model="m"),
        "local": Local.Config(model="m"),
        "mock": Mock.Config(model="m"),
        "replay": Replay.Config(model="m", path=str(folder / "answers.jsonl")),
        "record": Record.Config(provider=Anthropic.Config(model="m", key_env=None), path=str(folder / "new.jsonl")),
    }
    ours = {kind for kind in kinds("provider") if resolve("provider", kind).__module__.startswith("anabranch.")}
    assert set(found) == ours
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("A_KEY", "key-0123456789")
        # In the place of an engine, which is not loaded here.
        patch.setattr(Local, "transport", lambda self, http: http)
        yield found


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


FIELDS = (
    "messages role content tool_calls function arguments name id type text image_url url tools parameters tool_choice max_tokens stop n"
    " response_format prompt input system developer assistant tool user"
    " thinking thinking_blocks signature cache_control reasoning_effort metadata file file_data document source data tool_call_id"
).split()
TEXT = st.sampled_from(["[" * 5000, '{"a":' * 5000, "\ud800", "data:,", "NaN", "1" * 5000, "", "{}"]) | st.sampled_from(
    FIELDS
)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.sampled_from([100, 980, 5000]).map(nested),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "system"])},
    optional={
        "content": VALUE,
        "tool_calls": st.lists(
            st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": TEXT, "arguments": VALUE})}), max_size=2
        ),
    },
)
BODY = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGE, max_size=3) | VALUE, "prompt": VALUE, "input": VALUE},
    optional=dict.fromkeys(
        ("tools", "tool_choice", "stop", "max_tokens", "response_format", "n", "stream_options"), VALUE
    ),
)


@settings(max_examples=60)
@given(body=BODY, endpoint=st.sampled_from(["chat", "completions", "embeddings"]), stream=st.booleans())
def test_no_body_is_held_against_a_deployment_of_any_kind(providers, body, endpoint, stream):
    async def work():
        groups = [
            Group(name=kind, deployments=(Deployment(name=f"{kind}-0", provider=one),))
            for kind, one in providers.items()
        ]
        dispatcher = Dispatcher(groups, DispatchRules(retries=0, min_extra=100), http=Refusing())
        asked = UpstreamRequest(endpoint, {"model": "x", **body, "stream": stream}, prompt_tokens=7)
        statuses = {}
        for kind in providers:
            plan = Plan(candidates=(kind,), deadline=dispatcher.now() + 5)
            try:
                if asked.stream:
                    await (await dispatcher.stream(plan, asked)).aclose()
                else:
                    await dispatcher.complete(plan, asked)
            except UpstreamError as error:
                statuses[kind] = error.status
        assert all(400 <= status < 500 for status in statuses.values()), statuses
        for state in dispatcher.states():
            assert (state["breaker"], state["failing"], state["in_flight"]) == ("closed", 0, 0), state

    asyncio.run(work())


class Saying:
    """A transport whose upstream says one thing."""

    def __init__(self, body, form="application/json"):
        self.body, self.form = body, form

    async def open(self, call):
        call.is_sent = True
        return MockReply(Scene(status=200, headers={"content-type": self.form}, parts=[(0.0, self.body)]))


CALLS = {
    "anthropic": b'{"type":"message","stop_reason":"tool_use","content":[{"type":"tool_use","id":"t","name":"f","input":%s}]}',
    "bedrock": b'{"output":{"message":{"content":[{"toolUse":{"toolUseId":"t","name":"f","input":%s}}]}},"stopReason":"tool_use"}',
    "gemini": b'{"candidates":[{"content":{"parts":[{"functionCall":{"name":"f","args":%s}}]},"finishReason":"STOP"}]}',
    "vertex": b'{"candidates":[{"content":{"parts":[{"functionCall":{"name":"f","args":%s}}]},"finishReason":"STOP"}]}',
    "ollama": b'{"done":true,"message":{"tool_calls":[{"function":{"name":"f","arguments":%s}}]}}',
    "openai": b'{"choices":[{"index":0,"finish_reason":"stop","message":{"role":"assistant","content":"hi","parsed":%s}}]}',
}
TOO_MUCH = {
    "deep": b'{"a":' * 1000 + b"1" + b"}" * 1000,
    # What can be read, and then not be written.
    "less deep": b'{"a":' * (MOST_DEPTH + 1) + b"1" + b"}" * (MOST_DEPTH + 1),
    "digits": b'{"a":' + b"1" * 5000 + b"}",
}


def failures(config, wire, stream):
    """What twelve senders meet at a deployment, and its state."""

    async def work():
        group = Group(name="m", deployments=(Deployment(name="m-0", provider=config),))
        dispatcher = Dispatcher([group], DispatchRules(retries=2, min_extra=100), http=wire)
        kinds = []
        for sender in range(12):
            plan = Plan(candidates=("m",), deadline=dispatcher.now() + 5, sender=str(sender))
            asked = UpstreamRequest("chat", {"messages": HELLO, "stream": stream}, prompt_tokens=7)
            ask = dispatcher.stream if stream else dispatcher.complete
            with pytest.raises(UpstreamError) as caught:
                await ask(plan, asked)
            kinds.append((caught.value.failure.kind, len(caught.value.report.attempts)))
        return kinds, dispatcher.states()[0]

    return asyncio.run(work())


@pytest.mark.parametrize("value", TOO_MUCH.values(), ids=TOO_MUCH)
@pytest.mark.parametrize("kind", CALLS)
def test_a_call_that_is_too_much_to_be_read_is_held_against_no_deployment(providers, kind, value):
    """Whoever asks can have a model make one: it would shut the deployment for all others. Nor is it asked for, and billed, again."""
    wire = Saying(CALLS[kind] % value)
    kinds, state = failures(providers[kind], wire, False)
    assert kinds == [("excess", 1)] * 12
    assert (state["breaker"], state["failing"], state["in_flight"]) == ("closed", 0, 0)


@pytest.mark.parametrize("value", TOO_MUCH.values(), ids=TOO_MUCH)
@pytest.mark.parametrize("kind", ["gemini", "ollama", "openai", "anthropic"])
def test_an_event_that_is_too_much_to_be_read_is_held_against_no_deployment(providers, kind, value):
    form, line = "text/event-stream", b"data: %s\n\n"
    if kind == "ollama":
        form, line = "application/x-ndjson", b"%s\n"
    wire = Saying(line % (CALLS[kind] % value), form)
    kinds, state = failures(providers[kind], wire, True)
    assert kinds == [("excess", 1)] * 12
    assert (state["breaker"], state["failing"], state["in_flight"]) == ("closed", 0, 0)


def test_a_call_as_deep_as_one_may_be_is_passed_on(providers):
    wrapped = 7  # lists and objects around it
    deep = b'{"a":' * (MOST_DEPTH - wrapped) + b"1" + b"}" * (MOST_DEPTH - wrapped)
    asked = UpstreamRequest("chat", {"messages": HELLO}, prompt_tokens=7)
    answer = providers["gemini"].build().parse(asked, CALLS["gemini"] % deep)
    assert answer.body["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"].encode() == deep


OUR_KEY = "Zq7-0123456789abcdefghijklmnop"
ITS_KEY = "sk-proj-0123456789abcdefghijklmnop"


def says_error(kind, message, word):
    if kind == "bedrock":
        return json.dumps({"message": message, "type": word, "code": word, "param": word}).encode()
    return json.dumps({"error": {"message": message, "type": word, "code": word, "param": word}}).encode()


KEYED = ("anthropic", "openai", "azure", "bedrock", "gemini", "ollama", "openrouter")


@pytest.mark.parametrize(
    ("kind", "key"), [*((kind, OUR_KEY) for kind in KEYED), *((kind, ITS_KEY) for kind in (*KEYED, "mock"))]
)
def test_no_part_of_a_key_is_in_an_error_wherever_its_text_is_cut(monkeypatch, kind, key):
    """Cut first, the rest of a key is none by its form, and is not the whole of ours."""
    monkeypatch.setenv("A_KEY", OUR_KEY)
    more = {"azure": {"base_url": "https://x.openai.azure.com"}, "bedrock": {"region": "us-east-1"}, "mock": {}}
    fields = more.get(kind, {}) | ({} if kind == "mock" else {"key_env": "A_KEY"})
    provider = resolve("provider", kind).Config(model="m", **fields).build()
    for status in (400, 401, 500):
        for before in (0, 170, 185, 198, 270, 290, 299, 470, 485, 492, 499, 600):
            text = "x" * before + " " + key + " is no key"
            for body in (says_error(kind, text, text), text.encode(), json.dumps({"error": text}).encode()):
                failure = provider.error(status, {}, body)
                shown = [failure.message, failure.type or "", failure.code or "", failure.param or ""]
                # What is not the same in all keys.
                assert not any(key[8:11] in one for one in shown), (before, body, failure)
                assert [len(one) <= most for one, most in zip(shown, (500, 200, 200, 200), strict=True)] == [True] * 4


def config(tmp_path, provider, **fields):
    model = ModelConfig(name="small", deployments=(DeploymentConfig(provider=provider),))
    defaults = {
        "strategies": {"cheapest": StrategyConfig(use="cheapest")},
        "require_key": False,
        "store": str(tmp_path / "g.db"),
        "retries": RetryConfig(base_s=0.0, cap_s=0.0),
    }
    return GatewayConfig(models=(model,), **{**defaults, **fields})


def run(config, work):
    """What ``work(gateway)`` gives, and the ledger's rows; nothing may be left under way."""

    async def main():
        async with Gateway(config) as gateway:
            found = await work(gateway)
            await until_async(lambda: gateway.in_flight == gateway.runtime.users == 0)
            assert [state["in_flight"] for state in gateway.runtime.dispatcher.states()] == [0]
            left = await gateway.store._read(lambda connection: connection.rows("SELECT request_id FROM reservations"))
            assert left == []
            return found, await gateway.store.ledger(LedgerQuery(limit=1000, newest_first=False))

    return run_paced(main())


def called(arguments):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "x"},
    ]


@pytest.mark.parametrize("depth", [300, 950, 60_000, 100_000])
@pytest.mark.parametrize("end", [False, True])
def test_tool_arguments_that_are_nested_too_deep_are_the_senders_mistake(tmp_path, monkeypatch, depth, end):
    answer = {
        "type": "message",
        "content": [{"type": "text", "text": "yes"}],
        "usage": {"input_tokens": 1, "output_tokens": 1},
    }

    class Answering:
        async def open(self, call):
            return MockReply(Scene(parts=[(0.0, json.dumps(answer).encode())]))

    monkeypatch.setattr(Anthropic, "transport", lambda self, http: Answering())

    async def work(gateway):
        for _ in range(10):
            with pytest.raises(ApiError) as caught:
                await gateway.achat({"model": "small", "messages": called("[" * depth + "]" * depth * end)})
            assert caught.value.status == 400
            assert (await gateway.achat({"model": "small", "messages": HELLO}))["choices"][0]["message"][
                "content"
            ] == "yes"
        assert not gateway.runtime.dispatcher.changes

    run(config(tmp_path, Anthropic.Config(model="m", key_env=None)), work)


@pytest.mark.parametrize("field", ["tools", "response_format", "metadata", "unknown", "logit_bias", "stop"])
@pytest.mark.parametrize("depth", [MOST_DEPTH, 900])
def test_a_body_that_is_nested_too_deep_is_a_400(tmp_path, field, depth):
    async def work(gateway):
        with pytest.raises(ApiError) as caught:
            await gateway.achat({"model": "small", "messages": HELLO, "temperature": 0, field: nested(depth)})
        assert caught.value.status == 400

    run(config(tmp_path, Mock.Config(model="m")), work)


def test_how_deep_a_body_is():
    assert not is_too_deep(1, 0)
    assert [is_too_deep({"a": [1, {"b": [2]}]}, most) for most in (3, 4)] == [True, False]
    assert [is_too_deep(nested(depth - 1)) for depth in (MOST_DEPTH, MOST_DEPTH + 1)] == [False, True]


# Several choices


def chunk(index, text=None, reason=None):
    return event(
        {"id": "x", "choices": [{"index": index, "delta": {"content": text} if text else {}, "finish_reason": reason}]}
    )


def says(monkeypatch, *parts, ending="end"):
    """All mocks send these bytes."""
    scene = Scene(
        headers={"content-type": "text/event-stream"}, parts=[(0.0001, part) for part in parts], ending=ending
    )
    monkeypatch.setattr(
        Behaviour, "scene", lambda self, path, body: Scene(scene.status, scene.headers, list(scene.parts), scene.ending)
    )


STREAM = {"model": "small", "messages": HELLO, "stream": True, "n": 2, "temperature": 0}
FIRST = [chunk(0, "a"), chunk(1, "b"), chunk(0, reason="stop")]


@pytest.mark.parametrize("ending", ["end", "reset"])
def test_a_break_in_one_choice_after_another_has_ended_is_told(tmp_path, monkeypatch, ending):
    says(monkeypatch, *FIRST, ending=ending)

    async def work(gateway):
        for _ in range(2):
            reply = await gateway.handle("chat", STREAM)
            raw = b"".join([piece async for piece in reply.stream])
            assert not raw.endswith(DONE)
            assert b'"error"' in raw
            assert reply.headers["x-cache"] == "miss"

    _, rows = run(config(tmp_path, Mock.Config(model="m"), retries=RetryConfig(attempts=1)), work)
    assert [row.status for row in rows] == ["error", "error"]


@pytest.mark.parametrize("last", [[], [chunk(1, reason="stop")]])
def test_an_answer_is_kept_only_if_every_choice_of_it_is_whole(tmp_path, monkeypatch, last):
    says(monkeypatch, *FIRST, *last, DONE)

    async def work(gateway):
        found = []
        for _ in range(2):
            reply = await gateway.handle("chat", STREAM)
            assert b"".join([piece async for piece in reply.stream]).endswith(DONE)
            found.append(reply.headers["x-cache"])
        return found

    found, _ = run(config(tmp_path, Mock.Config(model="m"), cache=CacheConfig(exact=True)), work)
    assert found == ["miss", "exact" if last else "miss"]


# Streams that nobody reads


@pytest.mark.parametrize("is_kept", [False, True])
@pytest.mark.parametrize(
    "how", ["close", "let go", "close chunks", "let go of chunks", "read one", "read one and let go"]
)
def test_a_stream_that_is_not_read_to_its_end_is_over_all_the_same(tmp_path, how, is_kept):
    body = {"model": "small", "messages": HELLO, "stream": True, "temperature": 0}

    async def work(gateway):
        if is_kept:
            await gateway.achat({**body, "stream": False})
        given = gateway.achat(body) if "chunks" in how or "read" in how else gateway.handle("chat", body)
        held = await given
        assert gateway.in_flight == 1
        stream = getattr(held, "stream", held)
        if "read" in how:
            await anext(stream)
        if "let go" not in how:
            await stream.aclose()
        del held, stream
        gc.collect()
        await asyncio.sleep(0.01)

    made = config(tmp_path, Mock.Config(model="m", tokens=50, tokens_per_s=50.0 if not is_kept else None))
    _, rows = run(made, work)
    assert rows[-1].status == ("ok" if is_kept else "cancelled")


def test_a_stream_of_code_without_a_loop_that_is_not_read_is_over_too(tmp_path):
    made = config(tmp_path, Mock.Config(model="m", tokens=50, tokens_per_s=50.0))
    with Gateway(made) as gateway:
        for is_closed in (False, True):
            chunks = gateway.chat(model="small", messages=HELLO, stream=True)
            assert gateway.in_flight == 1
            if is_closed:
                chunks.close()
            del chunks
            gc.collect()
            gateway.route(model="small", messages=HELLO)  # the loop has come round
            assert gateway.in_flight == 0


# Labels


def test_no_text_of_senders_or_upstreams_becomes_a_label(tmp_path, monkeypatch):
    at = iter(range(10**6))

    def scene(self, path, body):
        word = f"hostile-{next(at)}"
        told = {"error": {"message": word, "type": word, "code": word, "param": word}}
        return Scene(status=400, parts=[(0.005, json.dumps(told).encode())])

    monkeypatch.setattr(Behaviour, "scene", scene)

    async def hostile(gateway, number):
        word = f"hostile-{number}"
        odd = [
            {"model": word},
            {"model": f"auto/{word}"},
            {"model": f"auto/cheapest?{word}=1"},
            {"user": word},
            {word: word},
            {"temperature": word},
            {"messages": word},
            {"messages": [{"role": word}]},
            {"stream": True},
            {"temperature": 0},
        ]
        bodies = [{"model": "small", "messages": HELLO, **fields} for fields in odd]
        headers = {"x-tags": word, "x-task": word}
        # Of two alike, one waits for the other, and fails with it.
        calls = [gateway.handle("chat", body, headers=headers, key=word) for body in [*bodies, bodies[-1]]]
        calls += [gateway.handle("chat", bodies[-1], headers={name: word}) for name in ("x-cache", "x-mid-stream")]
        assert all(isinstance(one, ApiError) for one in await asyncio.gather(*calls, return_exceptions=True))
        return gateway.metrics_text().decode()

    async def work(gateway):
        first = await hostile(gateway, 0)
        for number in range(1, 20):
            last = await hostile(gateway, number)
        assert "hostile" not in last
        assert len(last.splitlines()) == len(first.splitlines())

    run(config(tmp_path, Mock.Config(model="m")), work)
