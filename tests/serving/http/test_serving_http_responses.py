"""OpenAI's Responses API through a server and the official client: text, tools and reasoning, whole and as events in their order."""

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.data import ByteTokenizer
from anabranch.serving.config import ServingConfig
from anabranch.serving.core.client import EngineInfo
from anabranch.serving.core.request import TokenLogprob
from anabranch.serving.engine.engine import Engine
from anabranch.serving.engine.local import LocalEngine
from anabranch.serving.http.choice import ChoiceDelta, TokenText
from anabranch.serving.http.reading import Reader
from anabranch.serving.http.responses import ResponseShape, read_response
from anabranch.web.api_error import ApiError
from anabranch.web.sse import read_data
from fake_engine import Script
from reasoning_models import QWEN3, Speaking
from serving_models import serve_process, small_moe
from serving_thread import serving

openai = pytest.importorskip("openai")
TOOL = {
    "type": "function",
    "name": "weather",
    "description": "Tells it.",
    "parameters": {
        "type": "object",
        "properties": {"warm": {"type": "boolean"}},
        "required": ["warm"],
        "additionalProperties": False,
    },
}
FORM = {"format": {"type": "json_schema", "name": "form", "schema": TOOL["parameters"], "strict": True}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"warm": true}}\n</tool_call>'


@pytest.fixture(scope="module")
def said():
    with serving(Script(say="It is warm.")) as running:
        yield running


@pytest.fixture(scope="module")
def client(said):
    with openai.OpenAI(base_url=f"{said.url}/v1", api_key="x", max_retries=0) as made:
        yield made


def in_order(events):
    """Check that a stream's events follow each other as they should; its last response."""
    events = list(events)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    last = events.pop()
    open_item, open_part, items = None, None, []
    for event in events[2:]:
        kind = event.type.removeprefix("response.")
        if kind == "output_item.added":
            assert open_item is None
            assert event.output_index == len(items)
            open_item = event.item
            assert open_item.status == "in_progress"
        elif kind == "output_item.done":
            assert event.item.id == open_item.id
            # What was cut off has no end of its own.
            is_cut_call = (event.item.type, event.item.status) == ("function_call", "incomplete")
            assert is_cut_call or open_part is None
            items.append(event.item)
            open_part = None
            open_item = None
        elif kind == "content_part.added":
            assert open_part is None
            open_part = ""
        elif kind == "content_part.done":
            assert event.part.text == open_part
            open_part = None
        elif kind.endswith(".delta"):
            assert (event.item_id, event.output_index) == (open_item.id, len(items))
            open_part = (open_part or "") + event.delta
        else:
            assert (event.text if hasattr(event, "text") else event.arguments) == open_part
            open_part = None if kind == "function_call_arguments.done" else open_part
    assert open_item is None
    assert [(item.id, item.status) for item in last.response.output] == [(item.id, item.status) for item in items]
    assert last.type == f"response.{last.response.status}"
    return last.response


def parts(response):
    """What a response says, without ids."""
    made = []
    for item in response.output:
        if item.type == "function_call":
            made.append((item.type, item.name, item.arguments))
        else:
            made.append((item.type, "".join(part.text for part in item.content)))
    return made


def both(client, **fields):
    """The response, which the events of a stream make too."""
    whole = client.responses.create(model="fake", **fields)
    stream = in_order(client.responses.create(model="fake", stream=True, **fields))
    assert parts(stream) == parts(whole)
    assert [item.status for item in stream.output] == [item.status for item in whole.output]
    assert (stream.status, stream.usage, stream.incomplete_details) == (
        whole.status,
        whole.usage,
        whole.incomplete_details,
    )
    return whole


def test_text(client, said):
    made = both(client, input="hello", instructions="Be brief.", temperature=0.5, metadata={"a": "b"})
    assert made.output_text == "It is warm."
    assert (made.status, made.object, made.model, made.error) == ("completed", "response", "fake", None)
    assert (made.instructions, made.temperature, made.metadata, made.store) == ("Be brief.", 0.5, {"a": "b"}, False)
    request = said.script.requests[-1]
    assert bytes(request.prompt).decode() == "System: Be brief.\nUser: hello\nAssistant:"
    assert request.sampling.temperature == 0.5
    assert (made.usage.input_tokens, made.usage.output_tokens) == (len(request.prompt), len("It is warm."))
    assert made.usage.total_tokens == made.usage.input_tokens + made.usage.output_tokens


def test_items_of_a_conversation(client, said):
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "Is it warm?"}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "yes"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "It is."}]},
        {"role": "user", "content": "Sure?"},
    ]
    both(client, input=items)
    prompt = bytes(said.script.requests[-1].prompt).decode()
    for text in (
        "User: Is it warm?",
        '"name": "weather", "arguments": {}',
        "<tool_response>\nyes",
        "Assistant: It is.",
        "User: Sure?",
    ):
        assert text in prompt


def test_the_end_of_what_there_may_be(client):
    made = both(client, input="hello", max_output_tokens=4)
    assert (made.output_text, made.status, made.incomplete_details.reason) == (
        "It i",
        "incomplete",
        "max_output_tokens",
    )
    assert [item.status for item in made.output] == ["incomplete"]


def test_a_call_that_is_cut_off_is_not_completed():
    with serving(Script(say=f"Let me see. {CALL}\n{CALL}")) as running:
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0) as client:
            made = both(
                client, input="Is it warm?", tools=[TOOL], max_output_tokens=len(f"Let me see. {CALL}\n{CALL}") - 20
            )
    assert [(item.type, item.status) for item in made.output][:2] == [
        ("message", "completed"),
        ("function_call", "completed"),
    ]
    assert [(item.type, item.status) for item in made.output][2:] in ([], [("function_call", "incomplete")])
    assert made.status == "incomplete"


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"text": []}, "text", "text must be an object"),
        ({"text": {"format": []}}, "text.format", "text.format must be an object"),
        ({"reasoning": False}, "reasoning", "reasoning must be an object"),
        ({"top_logprobs": False}, "top_logprobs", "top_logprobs is False"),
        ({"n": True}, "n", "n is True"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "text.verbosity"),
        ({"text": {"verbosity": ""}}, "text.verbosity", "text.verbosity is ''"),
        ({"reasoning": {"effort": []}}, "reasoning.effort", "reasoning.effort is a list"),
        ({"reasoning": {"effort": ""}}, "reasoning.effort", "reasoning.effort is ''"),
        ({"tools": {}}, "tools", "tools must be a list"),
        ({"tools": ""}, "tools", "tools must be a list"),
        ({"stream_options": 5}, "stream_options", "stream_options must be an object"),
    ],
)
def test_what_is_no_value_of_a_field_is_refused_under_its_name(said, fields, param, says):
    status, _, answer = said.ask("/v1/responses", {"model": "fake", "input": "hi", **fields})
    assert (status, answer["error"]["param"]) == (400, param)
    assert says in answer["error"]["message"]


def test_messages_beside_input_are_told_to_be_ignored(said):
    body = {"model": "fake", "input": "hi", "top_logprobs": 0, "n": 1, "text": None}
    assert "x-warning" not in said.ask("/v1/responses", body)[1]
    status, headers, _ = said.ask("/v1/responses", {**body, "messages": [{"role": "user", "content": "ho"}]})
    assert (status, headers["x-warning"]) == (200, "ignored unknown fields: messages")
    assert bytes(said.script.requests[-1].prompt).decode() == "User: hi\nAssistant:"


@pytest.mark.parametrize(
    ("fields", "ignored"),
    [
        ({"max_tokens": 1}, "max_tokens"),
        ({"max_completion_tokens": 1}, "max_completion_tokens"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": True}, "logprobs"),
        ({"routing": True}, "routing"),
        ({"reasoning_effort": "low", "verbosity": "low"}, "reasoning_effort, verbosity"),
        ({"text": {"x": 1}, "reasoning": {"y": 1}}, "reasoning.y, text.x"),
        ({"stream_options": {"include_usage": True}}, "stream_options.include_usage"),
    ],
)
def test_what_chat_calls_otherwise_is_told_to_be_ignored(said, fields, ignored):
    status, headers, answer = said.ask("/v1/responses", {"model": "fake", "input": "hi", **fields})
    assert (status, headers["x-warning"]) == (200, f"ignored unknown fields: {ignored}")
    assert answer["status"] == "completed"
    assert not answer["output"][0]["content"][0]["logprobs"]


@pytest.fixture(scope="module")
def speaking():
    with Speaking(QWEN3) as asked:
        yield asked


PATCH = {"type": "custom", "name": "patch", "description": "Changes a file."}
SAYINGS = [
    "Yes. ",
    "  ",
    " and so on\n",
    CALL,
    '<tool_call>\n{"name": "patch", "arguments": {"input": "a\\nb"}}\n</tool_call>',
    "<tool_call>\n{",
]


def without_ids(response):
    """All that a response says, but for what is another each time."""
    gone = {"id", "call_id", "created_at"}
    items = [{name: value for name, value in item.items() if name not in gone} for item in response["output"]]
    return {name: value for name, value in response.items() if name not in gone} | {"output": items}


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(["", "<think>\nSo, so.\n</think>\n\n", "<think>\n</think>"]),
    st.lists(st.sampled_from(SAYINGS), max_size=4),
    st.floats(0, 1.1),
    st.booleans(),
    st.booleans(),
)
def test_whole_and_as_events_a_response_is_the_same_wherever_it_is_cut(
    speaking, thought, said, share, is_parallel, scored
):
    """Text behind a call was another item in one of them and not in the other, and so its status was; nothing at all was an item in one."""
    speaking.script.say = thought + "".join(said)
    most = max(1, round(share * len(speaking.tokenizer.encode(speaking.script.say))))
    body = {
        "model": "fake",
        "input": "hi",
        "tools": [TOOL, PATCH],
        "max_output_tokens": most,
        "parallel_tool_calls": is_parallel,
    }
    # Thoughts have no log probabilities here, and which tokens are told beside the last of them is chance.
    body |= {"include": ["message.output_text.logprobs"]} if scored and not thought else {}
    whole = speaking.server.ask("/v1/responses", body)[2]
    raw = speaking.server.ask("/v1/responses", {**body, "stream": True})[2].decode()
    event = json.loads(raw.rstrip().rpartition("\ndata: ")[2])
    assert without_ids(event["response"]) == without_ids(whole)
    assert event["type"] == f"response.{whole['status']}"
    *others, last = whole["output"]
    # What calls say is whole or not; all else ends before the next begins.
    assert all(item["status"] == "completed" for item in others if "call" not in item["type"])
    if "call" not in last["type"]:
        assert last["status"] == whole["status"]
    elif whole["status"] == "completed":
        assert last["status"] == "completed"


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_tells_what_it_was_sampled_by(stream):
    """The makers of a model say what is gone by where a request does not; 1.0 was told."""
    script = Script(say="Yes.")
    with serving(
        script, Reader(ByteTokenizer.Config().build(), {"temperature": 0.6, "top_p": 0.9, "top_k": 20})
    ) as running:
        for given_fields, wanted in (
            ({}, (0.6, 0.9)),
            ({"temperature": 0.0}, (0.0, 0.9)),
            ({"top_p": 1.0}, (0.6, 1.0)),
        ):
            body = {"model": "fake", "input": "hi", "stream": stream, **given_fields}
            found = running.ask("/v1/responses", body)[2]
            responses = [found]
            if stream:
                lines = [line for line in found.decode().splitlines() if line.startswith("data: ")]
                told = [json.loads(line.removeprefix("data: ")) for line in lines]
                responses = [event["response"] for event in told if "response" in event]
                assert len(responses) == 3
            for response in responses:
                assert (response["temperature"], response["top_p"]) == wanted
            sampling = script.requests[-1].sampling
            assert (sampling.temperature, sampling.top_p) == wanted


def test_many_log_probabilities_are_told_too():
    """Of a whole answer with more than a thousand none were."""
    with serving(Script(say="x" * 1100)) as running:
        body = {"model": "fake", "input": "hi", "include": ["message.output_text.logprobs"]}
        made = running.ask("/v1/responses", body)[2]
    assert len(made["output"][0]["content"][0]["logprobs"]) == 1100


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("say", ["<think>\n\n</think>\n\n", "<think>\n"])
def test_thoughts_that_hold_nothing_leave_a_message_of_nothing_without_log_probabilities(say, stream):
    body = {"model": "fake", "input": "hi", "include": ["message.output_text.logprobs"], "stream": stream}
    with Speaking(QWEN3) as made:
        made.script.say = say
        told = made.server.ask("/v1/responses", body)[2]
    response = [*read_data(told)][-1]["response"] if stream else told
    [item] = response["output"]
    assert item["content"] == [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}]


@pytest.mark.parametrize("tokens", [1, 8000])
def test_the_end_of_a_long_response_is_told_in_slices(tokens, monkeypatch):
    """It says all once more, thrice; made in one piece it held everybody up."""
    made = []
    slices = ResponseShape.long_last_events
    monkeypatch.setattr(ResponseShape, "long_last_events", lambda self: map(noted, slices(self)))

    def noted(piece):
        made.append(len(piece))
        return piece

    body = {"model": "fake", "input": "hi", "include": ["message.output_text.logprobs"], "stream": True}
    with serving(Script(say="x" * tokens, positions=100_000)) as running:
        told = running.ask("/v1/responses", body)[2].decode()
    events = [json.loads(line[6:]) for line in told.splitlines() if line.startswith("data: ")]
    names = [line[7:] for line in told.splitlines() if line.startswith("event: ")]
    assert names == [event["type"] for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    done, part, item, last = events[-4:]
    assert last["type"] == "response.completed"
    assert len(done["logprobs"]) == tokens
    assert last["response"]["output"] == [item["item"]]
    assert item["item"]["content"] == [part["part"]]
    assert part["part"]["logprobs"] == done["logprobs"]
    if tokens == 1:
        assert made == []
    else:
        assert len(made) > 20
        assert max(made) < sum(made) / 20


def test_of_a_whole_response_no_events_are_made():
    reader = Reader(ByteTokenizer.Config().build())
    request = read_response({"model": "fake", "input": "hi"}, reader, INFO, 1)
    shape = ResponseShape(replace(request, is_stream=False), [None], reader, INFO)
    assert shape.events(ChoiceDelta(0, "x")) == b""


@pytest.mark.parametrize("num_logprobs", [None, 20])
def test_what_of_a_response_waits_for_its_reader_is_told_in_slices(num_logprobs):
    reader = Reader(ByteTokenizer.Config().build())
    info = EngineInfo(model="fake", vocab_size=257, max_positions=4096, block_tokens=16, num_blocks=256)
    body = {"model": "fake", "input": "hi", "stream": True}
    request = replace(read_response(body, reader, info, 1), is_stream=True, logprobs=num_logprobs)
    score = TokenLogprob(token=120, logprob=-1.0, top=tuple((at, -2.0) for at in range(20)))
    change = ChoiceDelta(0, "x" * 200, [TokenText(120, at, at + 1, score) for at in range(200)])
    shape, whole = (ResponseShape(request, [None], reader, info) for _ in range(2))
    assert shape.is_long([change]) == (num_logprobs is not None)
    pieces = list(shape.long_events([change]))
    [told, wanted] = [
        [{**event, **dict.fromkeys(("response", "item", "item_id"))} for event in read_data(raw)]
        for raw in (b"".join(pieces), whole.events(change))
    ]
    assert told == wanted
    assert (len(pieces) > 1) == (num_logprobs is not None)


def test_calls_come_back_and_are_answered():
    with serving(Script(say=f"Let me see. {CALL}\n{CALL}")) as running:
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0) as client:
            made = both(client, input="Is it warm?", tools=[TOOL])
            call = ("function_call", "weather", '{"warm": true}')
            assert parts(made) == [("message", "Let me see."), call, call]
            assert made.tools[0].name == "weather"
            running.script.say = "Warm."
            answers = [
                {"type": "function_call_output", "call_id": item.call_id, "output": "yes"}
                for item in made.output
                if item.type == "function_call"
            ]
            again = both(
                client, input=[{"role": "user", "content": "Is it warm?"}, *made.output, *answers], tools=[TOOL]
            )
            assert again.output_text == "Warm."


def test_reasoning_is_an_item_of_its_own():
    with Speaking(QWEN3) as asked:
        asked.script.say = f"<think>\nSo, so.\n</think>\n\nYes.{CALL}"
        made = both(asked.client, input="Is it warm?", tools=[TOOL], reasoning={"effort": "high"})
        assert parts(made) == [
            ("reasoning", "So, so."),
            ("message", "Yes."),
            ("function_call", "weather", '{"warm": true}'),
        ]
        assert made.usage.output_tokens_details.reasoning_tokens == len("\nSo, so.\n") + 2
        asked.script.say = "Warm."
        items = [item.model_dump(exclude_none=True) for item in made.output]
        answer = {"type": "function_call_output", "call_id": made.output[2].call_id, "output": "yes"}
        both(asked.client, input=[{"role": "user", "content": "Is it warm?"}, *items, answer])
        assert "<think>So, so.</think>Yes." in asked.prompt
        both(asked.client, input="hello", reasoning={"effort": "none"})
        assert asked.prompt.endswith("</think>\n\n")


def test_what_may_be_included_is(client, said):
    made = both(client, input="hello", include=["reasoning.encrypted_content", "message.output_text.logprobs"])
    assert "".join(token.token for token in made.output[0].content[0].logprobs) == "It is warm."
    status, _, body = said.ask("/v1/responses", {"model": "fake", "input": "hello", "include": ["bogus"]})
    assert (status, body["error"]["param"]) == (400, "include[0]")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": ["x"]}, "input[0]"),
        ({"input": [{"role": "king", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": 5}, "tools"),
        ({"text": "x"}, "text"),
        ({"text": {"format": "x"}}, "text.format"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"reasoning": {"effort": "low"}}, "reasoning.effort"),
        ({"reasoning": 5}, "reasoning"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": "x"}, "max_output_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_output_tokens": 10**6}, "max_output_tokens"),
        ({"n": 2}, "n"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"input": [{"type": "function_call", "name": 5, "arguments": "{}"}]}, "input[0].name"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": [5]}]}, "input[0].arguments"),
        ({"input": [{"type": "reasoning", "content": 5}]}, "input"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        (
            {"tools": [{"type": "function", "name": "f"}], "tool_choice": {"type": "function", "name": "g"}},
            "tool_choice.name",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_by_its_name(said, fields, param):
    status, _, body = said.ask("/v1/responses", {"model": "fake", "input": "hello", **fields})
    assert (status, body["error"]["param"]) == (400, param), body


def test_a_stream_that_fails_says_so():
    with serving(Script(say="x" * 50, crash_after=3), restarts=0) as running:
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0) as client:
            events = list(client.responses.create(model="fake", input="hello", stream=True))
    assert events[-1].type == "response.failed"
    assert events[-1].response.error.code == "engine_failed"


def test_streams_end_with_their_last_event(said):
    raw = said.ask("/v1/responses", {"model": "fake", "input": "hello", "stream": True})[2].decode()
    assert "[DONE]" not in raw
    assert "chat.completion" not in raw
    assert raw.split("\n\n")[-2].startswith("event: response.completed\ndata: ")


def check_demands(client, model):
    made = client.responses.create(model=model, input="hello", text=FORM, max_output_tokens=200)
    assert set(json.loads(made.output_text)) == {"warm"}
    named = {"type": "function", "name": "weather"}
    for choice in ("required", named):
        made = client.responses.create(
            model=model,
            input="hello",
            tools=[TOOL],
            tool_choice=choice,
            parallel_tool_calls=False,
            max_output_tokens=300,
        )
        [call] = made.output
        assert (call.type, call.name, set(json.loads(call.arguments))) == ("function_call", "weather", {"warm"})
    with client.responses.stream(model=model, input="hello", text=FORM, max_output_tokens=200) as stream:
        assert set(json.loads(stream.get_final_response().output_text)) == {"warm"}


def test_forms_and_calls_are_demanded_of_a_real_engine():
    model, config = small_moe(), ServingConfig(num_blocks=256, name="small", dtype="float32")
    with serving(lambda: LocalEngine(lambda: Engine.of(model, config, tokenizer=ByteTokenizer()))) as running:
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0) as client:
            check_demands(client, "small")
        # What only the engine finds.
        bad = {"format": {"type": "json_schema", "name": "f", "schema": {"type": "messages"}}}
        status, _, body = running.ask("/v1/responses", {"model": "small", "input": "hello", "text": bad})
        assert (status, body["error"]["param"]) == (400, "text.format")
        assert body["error"]["message"].endswith("Invalid type: messages")


@pytest.mark.slow
def test_a_server_process_answers_them():
    with serve_process() as served, openai.OpenAI(base_url=f"{served.url}/v1", api_key="x") as client:
        check_demands(client, "small-moe")


ITEM = {"type": "function_call", "call_id": "1", "name": "f"}


@pytest.mark.parametrize(
    "fields",
    [
        {"input": [{"type": "function_call_output", "call_id": None, "output": "x"}]},
        {"input": [{**ITEM, "name": None}]},
        {"input": [{**ITEM, "arguments": {"a": 1}}]},
        {"input": [{**ITEM, "arguments": "a: 1"}]},
        {"input": [{"role": [1], "content": "x"}]},
        {"input": [{"role": "user", "content": None}]},
        {"input": "x", "instructions": {"a": 1}},
        {"input": "x", "tool_choice": {"type": "allowed_tools"}},
        {"input": "x", "tool_choice": {"type": "function", "name": "g"}},
        {"input": "x", "reasoning": {"effort": {"a": 1}}},
        {"input": "x", "tools": [{"type": "function", "name": 5}]},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
    ],
)
def test_errors_speak_of_what_this_api_has(fields):
    with serving(Script()) as server:
        status, _, body = server.ask("/v1/responses", {"model": "fake", **fields})
    assert status == 400
    for word in ("messages", "tool_calls", "tool_call_id", "function.", '{"name"', "reasoning_effort"):
        assert word not in body["error"]["message"] + body["error"]["param"], body


# Names that fields of chat have, as a client may well call its own things, and what looks like their paths.
OWN = st.lists(
    st.sampled_from(
        [
            "messages",
            "messages[0]",
            ".content",
            "[1]",
            "tool_choice.function",
            "tools[0].function",
            "max_completion_tokens",
            "max_tokens",
            "response_format",
            "reasoning_effort",
            "input",
            "!",
            " ",
            "arguments",
        ]
    ),
    min_size=1,
    max_size=3,
).map("".join)
INFO = EngineInfo(
    model="fake",
    vocab_size=257,
    max_positions=4096,
    block_tokens=16,
    num_blocks=100,
    stop_tokens=(256,),
    routed_layers={},
)


def function(name, **more):
    return {"type": "function", "name": name, **more}


# What is wrong with a request, by a text of the client's, and where the error shows it.
WRONG = {
    "two of a name": lambda own: {"tools": [function(own)] * 2},
    "a name that is none": lambda own: {"tools": [function(f"{own}?")]},
    "a choice that is none": lambda own: {"tools": [function("f")], "tool_choice": function(own)},
    "a choice as text": lambda own: {"tools": [function("f")], "tool_choice": own},
    "a choice of nothing": lambda own: {"tool_choice": own},
    "a kind of tool": lambda own: {"tools": [{"type": own}]},
    "parameters": lambda own: {"tools": [function("f", parameters=[own])]},
    "a role": lambda own: {"input": [{"role": own, "content": "x"}]},
    "a kind of item": lambda own: {"input": [{"type": own}]},
    "a kind of part": lambda own: {"input": [{"role": "user", "content": [{"type": own}]}]},
    "a form": lambda own: {"text": {"format": {"type": own}}},
    "an effort": lambda own: {"reasoning": {"effort": own}},
    "content": lambda own: {"input": [{"role": "user", "content": {own: 1}}]},
    "metadata": lambda own: {"metadata": own},
}


@pytest.mark.parametrize("wrong", WRONG)
@given(own=OWN)
@settings(max_examples=25, deadline=None)
def test_an_error_leaves_what_a_client_wrote_as_it_is(wrong, own):
    """It says the same of a text of the same form that means nothing."""

    def told(text):
        with pytest.raises(ApiError) as raised:
            read_response({"model": "fake", "input": "hello", **WRONG[wrong](text)}, Reader(ByteTokenizer()), INFO, 8)
        return raised.value.param, str(raised.value)

    other = re.sub("[a-z]", "q", own)
    param, message = told(other)
    # Where it is long, its beginning is shown.
    for length in (len(own), 60, 40):
        message = message.replace(other[:length], own[:length])
    assert told(own) == (param, message)


def test_errors_name_a_field_as_this_api_does():
    def told(**fields):
        with pytest.raises(ApiError) as raised:
            read_response({"model": "fake", "input": "hello", **fields}, Reader(ByteTokenizer()), INFO, 8)
        return raised.value.param, str(raised.value)

    twice = "tools has two functions of the name 'messages'; names must differ"
    assert told(tools=[function("messages")] * 2) == ("tools", twice)
    name = "tools[1].name is 'response_format!'; it must be 1 to 64 letters, digits, _, - or ."
    assert told(tools=[function("f"), function("response_format!")]) == ("tools[1].name", name)
    choice = "tool_choice.name is 'messages', which is none of tools"
    assert told(tools=[function("f")], tool_choice=function("messages")) == ("tool_choice.name", choice)
    missing = "content of an item of input is missing; a message of role user needs one"
    assert told(input=[{"role": "user", "content": None}]) == ("input", missing)
    most = "max_output_tokens is 1,000,000, but the model reads 4,096 tokens, and the prompt has 22"
    assert told(max_output_tokens=10**6) == ("max_output_tokens", most)
    form = "text.format.type is 'xml'; it must be text, json_object or json_schema"
    assert told(text={"format": {"type": "xml"}}) == ("text.format.type", form)
