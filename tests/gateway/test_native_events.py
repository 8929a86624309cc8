"""Kept answers in a form of their own: whole and streamed are the same, to the official clients too."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.providers.assembling import assembled
from anabranch.gateway.providers.chunks import as_chunks
from anabranch.gateway.providers.native_events import (
    message_events,
    message_of,
    response_events,
    response_of,
    whole_of,
)
from gateway_process import call
from gateway_scripted import fronted, model, scripted, sse, whole

CITED = {
    "type": "char_location",
    "cited_text": "q",
    "document_index": 0,
    "document_title": None,
    "start_char_index": 0,
    "end_char_index": 1,
    "file_id": None,
}
CONTENT = [
    {"type": "thinking", "thinking": "A", "signature": "sa"},
    {"type": "redacted_thinking", "data": "x"},
    {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "q"}},
    {"type": "web_search_tool_result", "tool_use_id": "s", "content": []},
    {"type": "text", "text": "done", "citations": [CITED]},
    {"type": "text", "text": "more"},
    {"type": "tool_use", "id": "t", "name": "now", "input": {}},
    {"type": "tool_use", "id": "u", "name": "weather", "input": {"city": "Ghent"}},
]
MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude",
    "content": CONTENT,
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {"input_tokens": 3, "output_tokens": 2},
}
RESPONSE = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1,
    "status": "completed",
    "model": "m",
    "error": None,
    "output": [
        {
            "type": "reasoning",
            "id": "r1",
            "summary": [{"type": "summary_text", "text": "why"}],
            "encrypted_content": "e",
        },
        {"type": "web_search_call", "id": "w1", "status": "completed", "action": {"type": "search", "query": "q"}},
        {
            "type": "message",
            "id": "m1",
            "role": "assistant",
            "status": "completed",
            "content": [
                {
                    "type": "output_text",
                    "text": "hello",
                    "annotations": [
                        {"type": "url_citation", "url": "u", "title": "t", "start_index": 0, "end_index": 1}
                    ],
                },
                {"type": "refusal", "refusal": "no"},
            ],
        },
        {
            "type": "function_call",
            "id": "f1",
            "call_id": "c1",
            "name": "f",
            "arguments": '{"a":1}',
            "status": "completed",
        },
    ],
    "usage": {"input_tokens": 3, "output_tokens": 2, "total_tokens": 5},
}


def without(events, kind):
    return [one for one in events if one["type"] != kind]


def test_a_message_begins_with_nothing_said_and_comes_block_by_block():
    events = message_events({**MESSAGE, "content": [CONTENT[4]]})
    assert [one["type"] for one in events] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    start, block, text, cited, _, last, _ = events
    assert (start["message"]["content"], start["message"]["stop_reason"]) == ([], None)
    assert start["message"]["usage"] == {"input_tokens": 3, "output_tokens": 0}
    assert block["content_block"] == {"type": "text", "text": "", "citations": []}
    assert text["delta"] == {"type": "text_delta", "text": "done"}
    assert cited["delta"] == {"type": "citations_delta", "citation": CITED}
    assert last["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert last["usage"] == MESSAGE["usage"]


words = st.text(max_size=5)
values = st.dictionaries(words, st.one_of(words, st.integers(), st.lists(words, max_size=2)), max_size=3)
blocks = st.one_of(
    st.builds(lambda text: {"type": "text", "text": text}, words),
    st.builds(lambda text, cited: {"type": "text", "text": text, "citations": cited}, words, st.lists(values)),
    st.builds(lambda a, b: {"type": "thinking", "thinking": a, "signature": b}, words, words),
    st.builds(
        lambda kind, given: {"type": kind, "id": "i", "name": "n", "input": given},
        st.sampled_from(["tool_use", "server_tool_use", "mcp_tool_use"]),
        values,
    ),
    st.builds(
        lambda kind, more: {"type": kind, "content": more}, st.sampled_from(["web_search_tool_result", "new"]), values
    ),
)


@given(st.lists(blocks, max_size=5), values, st.sampled_from(["end_turn", "pause_turn"]))
def test_the_events_of_any_message_make_it_again(content, usage, reason):
    message = {**MESSAGE, "content": content, "stop_reason": reason, "usage": {**usage, "output_tokens": 7}}
    events = message_events(message)
    assert message_of(json.loads(json.dumps(events))) == message
    # Whatever is lost on the way is noticed where it can be: the beginning, the end, the arguments.
    assert message_of(events[:-1]) is message_of(events[1:]) is None


@pytest.mark.parametrize(
    "delta",
    [{"type": "new_delta", "new": 1}, {"type": "text_delta"}, {}, {"type": "input_json_delta", "partial_json": "{"}],
)
def test_a_message_with_something_unknown_is_not_put_together(delta):
    events = message_events({**MESSAGE, "content": [CONTENT[5]]})
    events[2]["delta"] = delta
    assert message_of(events) is None
    assert whole_of([{"choices": [], "anthropic": one} for one in events]) == ({}, False)
    assert message_of([{**one, "index": 3} if "index" in one else one for one in message_events(MESSAGE)]) is None


def test_blocks_that_come_in_another_order_are_not_put_together():
    events = message_events({**MESSAGE, "content": [CONTENT[1], CONTENT[3]]})
    assert [one["index"] for one in events[1:5]] == [0, 0, 1, 1]
    assert message_of([events[0], *events[3:5], *events[1:3], *events[5:]]) is None


def test_the_last_of_a_message_says_more_of_it():
    events = message_events({**MESSAGE, "container": {"id": "c"}, "context_management": {"applied_edits": []}})
    last = events[-2]
    assert (last["delta"]["container"], last["context_management"]) == ({"id": "c"}, {"applied_edits": []})
    last["usage"] = {"input_tokens": None, "output_tokens": 5}
    ping = {"type": "ping"}
    assert message_of([events[0], ping, *events[1:]])["usage"] == {"input_tokens": 3, "output_tokens": 5}


def test_a_response_comes_item_by_item_and_its_end_holds_it():
    events = response_events(RESPONSE)
    assert [one["sequence_number"] for one in events] == list(range(len(events)))
    assert (events[0]["response"]["output"], events[0]["response"]["status"]) == ([], "in_progress")
    assert [one["item"] for one in events if one["type"] == "response.output_item.done"] == RESPONSE["output"]
    deltas = [one["delta"] for one in events if one["type"].endswith(".delta")]
    assert deltas == ["why", "hello", "no", '{"a":1}']
    assert response_of(events) == RESPONSE
    assert response_of(events[:-1]) is None
    cut = {**RESPONSE, "status": "incomplete"}
    assert response_events(cut)[-1]["type"] == "response.incomplete"
    assert response_of(response_events(cut)) == cut


@pytest.mark.parametrize(("name", "native"), [("anthropic", MESSAGE), ("responses", RESPONSE)])
def test_no_chunk_holds_the_whole_and_the_chunks_make_it_again(name, native):
    message = {"role": "assistant", "content": "done"}
    body = {"id": "c", "choices": [{"index": 0, "finish_reason": "stop", "message": message}], name: native}
    chunks = as_chunks(body, with_usage=True)
    assert chunks[0][name]["type"] in ("message_start", "response.created")
    assert all(chunk[name] != native for chunk in chunks)
    assert whole_of(chunks) == ({name: native}, True)
    assert assembled(chunks)["choices"][0]["message"] == message
    # Of what has another shape there is the chat.
    assert [name in chunk for chunk in as_chunks({**body, name: {"content": 3, "output": 3}})] == [False, False]


# Through the front door


def told(body):
    if body.get("stream"):
        return sse(*message_events(MESSAGE))
    return whole(MESSAGE)


def unknown(body):
    """A stream with a delta that nothing is known of."""
    events = message_events({**MESSAGE, "content": [CONTENT[5], CONTENT[5]]})
    events[2] = {**events[2], "delta": {"type": "new_delta", "new": 1}}
    return sse(*events) if body.get("stream") else whole(MESSAGE)


@pytest.fixture(scope="module")
def front(tmp_path_factory):
    answers = {"claude": told, "new": unknown, "whole": whole(MESSAGE), "gpt": whole(RESPONSE)}
    with scripted(answers) as url:
        models = [model(name, "anthropic", url, "claude-sonnet-4-5") for name in ("claude", "new", "whole")]
        models.append(model("gpt", "openai", url, "gpt-5.1", responses=True))
        keys = {"ANTHROPIC_API_KEY": "sk-ant-0123456789abcdef", "OPENAI_API_KEY": "sk-0123456789abcdef"}
        with fronted(tmp_path_factory.mktemp("native"), models, keys) as running:
            yield running


def asked(name, text, **fields):
    messages = [{"role": "user", "content": text}]
    return {"model": name, "max_tokens": 99, "temperature": 0, "messages": messages, **fields}


@pytest.mark.parametrize(("name", "text"), [("claude", "kept"), ("whole", "never streams")])
def test_a_kept_message_is_streamed_to_the_official_client(front, name, text):
    anthropic = pytest.importorskip("anthropic")
    if text == "kept":
        assert call(front.url, "POST", "/v1/messages", asked(name, text))[1] == MESSAGE
    fields = asked(name, text)
    temperature = fields.pop("temperature")
    with (
        anthropic.Anthropic(base_url=front.url, api_key="any", max_retries=0) as client,
        client.messages.stream(**fields, extra_body={"temperature": temperature}) as stream,
    ):
        if text == "kept":
            assert stream.response.headers["x-cache"] == "exact"
        final = stream.get_final_message().to_dict()
    assert [block["type"] for block in final["content"]] == [block["type"] for block in CONTENT]
    assert final["content"][4]["citations"] == [CITED]
    assert final["content"][2]["input"] == {"query": "q"}
    assert final["content"][7]["input"] == {"city": "Ghent"}
    assert (final["stop_reason"], final["usage"]["output_tokens"]) == ("end_turn", 2)


def test_a_message_that_was_streamed_is_kept_whole(front):
    fields = asked("claude", "streamed first")
    assert call(front.url, "POST", "/v1/messages", {**fields, "stream": True})[0] == 200
    _, found, headers = call(front.url, "POST", "/v1/messages", fields)
    assert (headers["x-cache"], found) == ("exact", MESSAGE)


def test_a_message_that_cannot_be_put_together_is_not_kept(front):
    fields = asked("new", "hi")
    assert b"new_delta" in raw(call(front.url, "POST", "/v1/messages", {**fields, "stream": True})[1])
    _, found, headers = call(front.url, "POST", "/v1/messages", fields)
    assert ("x-cache" in headers and headers["x-cache"] == "exact", found) == (False, MESSAGE)


def raw(said):
    return said if isinstance(said, bytes) else str(said).encode()


def test_a_kept_response_is_streamed_to_the_official_client(front):
    openai = pytest.importorskip("openai")
    fields = {"model": "gpt", "input": "hi", "temperature": 0}
    with openai.OpenAI(base_url=f"{front.url}/v1", api_key="any", max_retries=0) as client:
        assert client.responses.create(**fields).output_text == "hello"
        with client.responses.stream(**fields) as stream:
            final = stream.get_final_response()
    assert [item.type for item in final.output] == [item["type"] for item in RESPONSE["output"]]
    assert (final.output_text, final.output[3].arguments) == ("hello", '{"a":1}')
