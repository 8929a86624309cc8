"""Calls that are demanded of a model, in every format that a grammar holds, through a server and the official client."""

import json

import pytest

from anabranch.data import ByteTokenizer
from anabranch.serving.chat import FORMATS, Dialect
from anabranch.serving.config import ServingConfig
from anabranch.serving.engine.engine import Engine
from anabranch.serving.engine.local import LocalEngine
from anabranch.serving.http.reading import Reader
from serving_models import serve_process, small_moe
from serving_thread import serving

openai = pytest.importorskip("openai")
ASK = [{"role": "user", "content": "hello"}]


def tool(name, **properties):
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [tool("switch", on={"type": "boolean"}, level={"enum": [1, 2, 3]}), tool("now")]


@pytest.fixture(scope="module")
def model():
    return small_moe()


def ask(client, model, *, named, is_stream, **more):
    fields = {
        "model": model,
        "messages": ASK,
        "tools": TOOLS,
        "max_tokens": 500,
        "temperature": 1,
        "seed": 3,
        "parallel_tool_calls": False,
        "tool_choice": {"type": "function", "function": {"name": "switch"}} if named else "required",
        **more,
    }
    if is_stream:
        with client.chat.completions.stream(**fields) as stream:
            return stream.get_final_completion().choices[0]
    return client.chat.completions.create(**fields).choices[0]


def check(choice, *, named):
    [call] = choice.message.tool_calls
    given = json.loads(call.function.arguments)
    assert choice.finish_reason == "tool_calls"
    assert not choice.message.content
    if named or call.function.name == "switch":
        assert call.function.name == "switch"
        assert set(given) == {"on", "level"}
        assert isinstance(given["on"], bool)
        assert given["level"] in (1, 2, 3)
    else:
        assert given == {}


# Of the others each is one of these with other marks.
QUICK = ("hermes", "mistral_args", "pythonic", "qwen3_coder")


@pytest.mark.parametrize(
    "format", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in sorted(FORMATS)]
)
def test_a_call_that_is_demanded_is_made(model, format):
    config = ServingConfig(num_blocks=256, name="small", dtype="float32", max_seqs=8, max_batched_tokens=64)
    reader = Reader(ByteTokenizer(), dialect=Dialect(tools=format))
    with (
        serving(lambda: LocalEngine(lambda: Engine.of(model, config, tokenizer=ByteTokenizer())), reader) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client,
    ):
        if FORMATS[format].call is None:
            with pytest.raises(openai.BadRequestError, match="no grammar holds") as raised:
                ask(client, "small", named=False, is_stream=False)
            assert raised.value.param == "tool_choice"
            return
        for named in (True, False):
            whole, stream = (ask(client, "small", named=named, is_stream=is_stream) for is_stream in (False, True))
            check(whole, named=named)
            assert stream.message.tool_calls[0].function.arguments == whole.message.tool_calls[0].function.arguments


@pytest.mark.slow
def test_formats_are_told_to_a_process():
    settings = ("--set", "http.tool_format=qwen3_coder", "--set", "http.reasoning_format=magistral")
    with serve_process(*settings) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
        choice = ask(client, "small-moe", named=True, is_stream=False, logit_bias={str(ord("[")): -100})
        check(choice, named=True)
        answer = client.chat.completions.create(model="small-moe", messages=ASK, max_tokens=5)
        assert answer.usage.completion_tokens_details.reasoning_tokens in range(6)
