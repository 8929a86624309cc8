"""No part of what an upstream answers is dropped in silence: of every kind of provider, whole and streamed, in all three forms."""

import asyncio
import base64
import json
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from anabranch.config import from_dict
from anabranch.gateway.dispatch import Deployment, Dispatcher, DispatchRules, Group, Plan
from anabranch.gateway.providers import Provider, UpstreamRequest
from anabranch.gateway.providers.assembling import assembled
from anabranch.gateway.providers.chunks import as_chunks
from anabranch.gateway.providers.content_lists import flattened
from anabranch.gateway.providers.native_events import message_events, message_of
from anabranch.gateway.providers.provider import Native
from anabranch.web.messages import MessageEvents, to_message
from anabranch.web.responses import ResponseStream, to_response
from anabranch.web.sse import read_data
from cloud_providers import CONFIGS, keys

__all__ = ["keys"]
pytestmark = pytest.mark.usefixtures("keys")
INCLUDE = {"model": "m", "include": ["reasoning.encrypted_content"]}

# Of every part a name, and how it stands in a whole answer; each "#" is a mark of its own that must be found again.
PARTS = {
    "anthropic": {
        "text": {"type": "text", "text": "#"},
        "cited": {
            "type": "text",
            "text": "#",
            "citations": [{"type": "web_search_result_location", "url": "#", "cited_text": "#"}],
        },
        "thinking": {"type": "thinking", "thinking": "#", "signature": "#"},
        "redacted": {"type": "redacted_thinking", "data": "#"},
        "call": {"type": "tool_use", "id": "#", "name": "#", "input": {"a": "#"}},
        "theirs": {"type": "server_tool_use", "id": "#", "name": "web_search", "input": {"query": "#"}},
        "found": {"type": "web_search_tool_result", "tool_use_id": "#", "content": [{"type": "#", "url": "#"}]},
        "new": {"type": "of_next_year", "what": "#"},
    },
    "bedrock": {
        "text": {"text": "#"},
        "cited": {
            "citationsContent": {"content": [{"text": "#"}], "citations": [{"title": "#", "location": {"web": "#"}}]}
        },
        "thinking": {"reasoningContent": {"reasoningText": {"text": "#", "signature": "#"}}},
        "redacted": {"reasoningContent": {"redactedContent": "#"}},
        "call": {"toolUse": {"name": "#", "toolUseId": "#", "input": {"a": "#"}}},
        "theirs": {"toolUse": {"name": "#", "toolUseId": "#", "type": "server_tool_use", "input": {"a": "#"}}},
        "found": {"toolResult": {"toolUseId": "#", "status": "success", "content": [{"text": "#"}]}},
        "image": {"image": {"format": "png", "source": {"bytes": "#"}}},
    },
    "gemini": {
        "text": {"text": "#"},
        "signed": {"text": "#", "thoughtSignature": "#"},
        "thinking": {"text": "#", "thought": True},
        "sealed": {"text": "#", "thought": True, "thoughtSignature": "#"},
        "call": {"functionCall": {"name": "#", "args": {"a": "#"}}, "thoughtSignature": "#"},
        "image": {"inlineData": {"mimeType": "image/png", "data": "#"}, "thoughtSignature": "#"},
        "elsewhere": {"fileData": {"mimeType": "image/png", "fileUri": "#"}},
        "sound": {"inlineData": {"mimeType": "audio/L16;rate=24000", "data": "#"}},
        "code": {"executableCode": {"language": "PYTHON", "code": "#"}},
        "ran": {"codeExecutionResult": {"outcome": "OUTCOME_OK", "output": "#"}},
        "new": {"ofNextYear": {"what": "#"}},
    },
    "ollama": {
        "text": {"content": "#"},
        "thinking": {"thinking": "#"},
        "call": {"tool_calls": [{"function": {"name": "#", "arguments": {"a": "#"}}}]},
        "image": {"images": ["#"]},
    },
    "openai": {
        "text": {"content": "#"},
        "thinking": {"reasoning_content": "#"},
        "reasoning": {
            "reasoning": "#",
            "reasoning_details": [{"index": 0, "type": "reasoning.encrypted", "data": "#"}],
        },
        "refusal": {"refusal": "#"},
        "call": {"tool_calls": [{"id": "#", "type": "function", "function": {"name": "#", "arguments": '{"a": "#"}'}}]},
        "image": {"images": [{"index": 0, "type": "image_url", "image_url": {"url": "data:image/png;base64,#"}}]},
        "sound": {"audio": {"id": "#", "data": "#", "transcript": "#", "expires_at": 5}},
        "sources": {"annotations": [{"type": "url_citation", "url_citation": {"url": "#", "title": "#"}}]},
        "listed": {"content": [{"type": "text", "text": "#"}]},
        "thought": {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "#"}]}]},
        "reference": {"content": [{"type": "reference", "reference_ids": ["#"]}, {"type": "text", "text": "#"}]},
        "picture": {"content": [{"type": "image_url", "image_url": "https://example.com/#"}]},
    },
}
KINDS = (*PARTS, "native")


def marked(parts):
    """The parts with a mark in the place of each "#", and all marks."""
    marks = []

    def walk(value):
        if isinstance(value, dict):
            return {name: walk(one) for name, one in value.items()}
        if isinstance(value, list):
            return [walk(one) for one in value]
        while isinstance(value, str) and "#" in value:
            marks.append(f"mark{len(marks):03}q")
            value = value.replace("#", marks[-1], 1)
        return value

    return walk(parts), marks


# What each kind sends, whole and streamed


def whole(kind, parts):
    if kind in ("anthropic", "native"):
        return {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": "m",
            "content": parts,
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "usage": {"input_tokens": 3, "output_tokens": 9},
        }
    if kind == "bedrock":
        usage = {"inputTokens": 3, "outputTokens": 9, "totalTokens": 12}
        return {
            "output": {"message": {"role": "assistant", "content": parts}},
            "stopReason": "end_turn",
            "usage": usage,
        }
    if kind == "gemini":
        usage = {"promptTokenCount": 3, "candidatesTokenCount": 9}
        return {"candidates": [{"content": {"parts": parts}, "finishReason": "STOP"}], "usageMetadata": usage}
    if kind == "ollama":
        told = {"model": "m", "done": True, "done_reason": "stop", "prompt_eval_count": 3, "eval_count": 9}
        return {"message": {"role": "assistant", "content": "", **grown(parts)}, **told}
    usage = {"prompt_tokens": 3, "completion_tokens": 9}
    return {
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": None, **grown(parts)}, "finish_reason": "stop"}
        ],
        "usage": usage,
    }


def grown(parts):
    """One message of pieces of it, as `whole` has them; of content that is text and lists, a list."""
    made = {}
    for part in parts:
        for name, value in part.items():
            old = made.get(name)
            if old is None:
                made[name] = value
            elif name == "content" and isinstance(old, list) != isinstance(value, list):
                made[name] = [
                    one
                    for each in (old, value)
                    for one in ([{"type": "text", "text": each}] if isinstance(each, str) else each)
                ]
            elif isinstance(value, dict):
                # Of sound there is one.
                made[name] = {
                    field: f"{old[field]}{text}" if isinstance(text, str) else text for field, text in value.items()
                }
            else:
                made[name] = old + value
    for at, call in enumerate(made.get("tool_calls") or ()):
        call["index"] = at
    return made


def split(text):
    """A text in two pieces, the first of which may be empty."""
    return [text[: len(text) // 2], text[len(text) // 2 :]]


def streamed(kind, parts, order):
    """The data of each event; ``order`` mixes what may be mixed."""
    if kind in ("anthropic", "native"):
        return message_events(whole(kind, parts))
    if kind == "bedrock":
        events = [{"messageStart": {"role": "assistant"}}]
        for at, part in enumerate(parts):
            events += [{name: {"contentBlockIndex": at, **value}} for name, value in converse_block(part)]
        return [*events, {"messageStop": {"stopReason": "end_turn"}}, {"metadata": {"usage": whole(kind, [])["usage"]}}]
    if kind == "gemini":
        found = []
        for part in parts:
            pieces = [part]
            if set(part) == {"text"}:
                pieces = [{"text": text} for text in split(part["text"])]
            found += [{"candidates": [{"content": {"parts": [piece]}}]} for piece in pieces]
        return [*found, whole(kind, [])]
    if kind == "ollama":
        said = [{"role": "assistant", "content": "", **part} for part in parts]
        return [*({"model": "m", "message": one, "done": False} for one in said), whole(kind, [])]
    return openai_stream(parts, order)


def converse_block(part):
    [(name, given)] = part.items()
    start, deltas = None, []
    if name == "text":
        deltas = [{"text": text} for text in split(given)]
    elif name == "citationsContent":
        deltas = [{"text": given["content"][0]["text"]}, {"citation": given["citations"][0]}]
    elif name == "reasoningContent":
        inner = given.get("reasoningText", given)
        deltas = [{"reasoningContent": {field: text}} for field, text in inner.items()]
    elif name == "toolUse":
        start = {"toolUse": {field: value for field, value in given.items() if field != "input"}}
        deltas = [{"toolUse": {"input": text}} for text in split(json.dumps(given["input"]))]
    elif name == "toolResult":
        start = {"toolResult": {field: value for field, value in given.items() if field != "content"}}
        deltas = [{"toolResult": given["content"]}]
    else:
        start, deltas = {"image": {"format": given["format"]}}, [{"image": {"source": given["source"]}}]
    began = [("contentBlockStart", {"start": start})] if start else []
    return [*began, *(("contentBlockDelta", {"delta": delta}) for delta in deltas), ("contentBlockStop", {})]


def openai_stream(parts, order):
    """Calls are told side by side, in any order, each in pieces of its own."""
    deltas, calls = [], []
    for part in parts:
        for call in part.get("tool_calls") or ():
            at = len(calls)
            first, second = split(call["function"]["arguments"])
            begun = {**call, "index": at, "function": {**call["function"], "arguments": ""}}
            calls.append([begun, *({"index": at, "function": {"arguments": text}} for text in (first, second))])
        if "tool_calls" not in part:
            deltas.append([part])
    lanes = [*deltas, *([{"tool_calls": [piece]} for piece in call] for call in calls)]
    while any(lanes):
        lane = lanes[order.draw(st.integers(0, len(lanes) - 1))] if order is not None else next(filter(None, lanes))
        if lane:
            deltas_first = lane.pop(0)
            yield {"choices": [{"index": 0, "delta": deltas_first, "finish_reason": None}]}
    yield {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}


# What is made of it


def provider_of(kind):
    if kind in CONFIGS:
        fields = CONFIGS[kind]
    else:
        fields = {"model": "m", "key_env": None, "base_url": "http://x/v1"}
    name = "anthropic" if kind == "native" else kind
    return from_dict(Provider.Config, {"kind": name, **fields}).build()


def request_of(kind, stream):
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": stream}
    return UpstreamRequest("chat", body, native=Native(body, {}) if kind == "native" else None)


def chunks_of(kind, parts, order):
    translator = provider_of(kind).translator(request_of(kind, True))
    for value in streamed(kind, parts, order):
        if translator is not None:
            yield from translator.feed(json.dumps(value).encode())
        else:
            chunk = json.loads(json.dumps(value))
            flattened(chunk, "delta")
            yield chunk


def messages_of(chunks):
    """The message that Anthropic's clients put together."""
    made = MessageEvents({"model": "m"})
    data = [piece for chunk in chunks for piece in made.add(chunk)]
    data += made.end()
    found = message_of([json.loads(piece.decode().partition("data: ")[2]) for piece in data])
    assert found is not None
    return found


def response_of(chunks):
    """The last word of a streamed response, and its events but for it."""
    made = ResponseStream(INCLUDE)
    data = [*made.begin(), *(piece for chunk in chunks for piece in made.add(chunk)), *made.end()]
    found = [value for piece in data for value in read_data(piece)]
    check_items(found)
    return found[-1]["response"]


def check_items(events):
    """Each item begins once, ends once, and nothing of it comes behind its end."""
    ended = set()
    for value in events:
        at = value.get("output_index")
        if at is None:
            continue
        assert at not in ended, value
        if value["type"] == "response.output_item.done":
            ended.add(at)
    assert ended == set(range(len(events[-1]["response"]["output"])))


def said(value):
    """All that is said, with what was sealed."""
    text = json.dumps(value)
    for item in value.get("output") or ():
        sealed = item.get("encrypted_content")
        if sealed:
            text += base64.urlsafe_b64decode(sealed.removeprefix("anabranch-1.")).decode()
    for seal in re.findall(r"details\.([\w=-]+)", text):
        text += base64.urlsafe_b64decode(seal).decode()
    return text


def check_all(marks, **forms):
    for name, value in forms.items():
        text = said(value)
        lost = [mark for mark in marks if mark not in text]
        assert not lost, (name, lost, text)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(order=st.data())
def test_nothing_is_dropped(kind, order):
    table = PARTS["anthropic" if kind == "native" else kind]
    names = order.draw(st.lists(st.sampled_from(sorted(table)), min_size=1, max_size=6))
    if "reasoning" in names:
        # A server has one word for it, or says the same under both.
        names = [name for name in names if name not in ("thinking", "thought")]
    # Of sound an answer has one.
    names = [name for at, name in enumerate(names) if kind != "openai" or name != "sound" or name not in names[:at]]
    parts, marks = marked([json.loads(json.dumps(table[name])) for name in names])
    check_kind(kind, parts, marks, order)


@pytest.mark.parametrize(("kind", "part"), [(kind, part) for kind in PARTS for part in PARTS[kind]])
def test_nothing_is_dropped_of_one_part(kind, part):
    parts, marks = marked([PARTS[kind][part]])
    check_kind(kind, parts, marks, None)


def check_kind(kind, parts, marks, order):
    body = provider_of(kind).parse(request_of(kind, False), json.dumps(whole(kind, parts)).encode()).body
    # As a stream of what was kept, too.
    kept = as_chunks(body)
    check_all(
        marks,
        chat=body,
        message=to_message({"model": "m"}, body),
        response=to_response(INCLUDE, body),
        again=messages_of(kept),
    )
    if kind != "native":
        check_all(marks, chunks=assembled(kept), events=response_of(kept))
    chunks = list(chunks_of(kind, parts, order))
    check_all(marks, message_stream=messages_of(chunks))
    if kind != "native":
        check_all(marks, chat_stream=assembled(chunks), response_stream=response_of(chunks))


# And back again

PLACES = ("text", "thinking", "call", "image", "sealed", "signed")


def turn_of_messages(message):
    from anabranch.web.messages import to_chat

    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": message["content"]}]
    results = [
        {"type": "tool_result", "tool_use_id": block["id"], "content": "r"}
        for block in message["content"]
        if block["type"] == "tool_use"
    ]
    turns.append({"role": "user", "content": [*results, {"type": "text", "text": "go on"}]})
    return UpstreamRequest("chat", to_chat({"model": "m", "max_tokens": 9, "messages": turns}), is_foreign=True)


def turn_of_chat(message):
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "r"} for call in message.get("tool_calls") or ()]
    asked = {"role": "user", "content": "hi"}
    return UpstreamRequest("chat", {"messages": [asked, message, *results, {"role": "user", "content": "go on"}]})


def turn_of_response(response):
    from anabranch.web.responses import to_chat

    results = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": "r"}
        for item in response["output"]
        if item["type"] == "function_call"
    ]
    asked = {"role": "user", "content": "hi"}
    last = {"role": "user", "content": "go on"}
    return UpstreamRequest("chat", to_chat({"model": "m", "input": [asked, *response["output"], *results, last]}))


def follow_ups(kind, parts):
    """The next request of each form's client, after a whole answer and after a stream."""
    body = provider_of(kind).parse(request_of(kind, False), json.dumps(whole(kind, parts)).encode()).body
    chunks = list(chunks_of(kind, parts, None))
    for one in (body, assembled(chunks)):
        yield turn_of_chat(one["choices"][0]["message"])
    for one in (to_message({}, body), messages_of(chunks)):
        yield turn_of_messages(one)
    for one in (to_response(INCLUDE, body), response_of(chunks)):
        yield turn_of_response(one)


@settings(max_examples=40, deadline=None)
@given(names=st.lists(st.sampled_from(PLACES), min_size=1, max_size=5))
# In several messages, whose thoughts are all in the first.
@example(names=["call", "text", "call"])
def test_what_gemini_signed_goes_back_to_the_part_that_it_signed(names):
    parts, _ = marked([json.loads(json.dumps(PARTS["gemini"][name])) for name in names])
    signed = [part for part in parts if "thoughtSignature" in part]
    for request in follow_ups("gemini", parts):
        sent = json.loads(provider_of("gemini").build(request).body)["contents"]
        back = [part for turn in sent if turn["role"] == "model" for part in turn["parts"]]
        for part in signed:
            if "functionCall" in part or "inlineData" in part:
                assert part in back, (part, back)
            elif part.get("thought"):
                assert any(
                    one.get("thought") and one.get("thoughtSignature") == part["thoughtSignature"] for one in back
                )
        texts = "".join(one.get("text", "") for one in back if not one.get("thought"))
        # Blocks of one message are parts of a text.
        wanted = "".join(part["text"] for part in parts if "text" in part and not part.get("thought"))
        assert texts.replace("\n", "") == wanted


@pytest.mark.parametrize("has_call", [False, True])
def test_what_ollama_thought_goes_back_to_it(has_call):
    names = ["thinking", "call"] if has_call else ["thinking", "text"]
    parts, _ = marked([json.loads(json.dumps(PARTS["ollama"][name])) for name in names])
    for request in follow_ups("ollama", parts):
        sent = json.loads(provider_of("ollama").build(request).body)["messages"]
        [back] = [message for message in sent if message["role"] == "assistant"]
        assert back["thinking"] == parts[0]["thinking"]
        assert ("tool_calls" in back) == has_call


def test_what_mistral_thought_goes_back_to_it_as_it_came():
    thought = {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}
    parts = [{"content": [thought, {"type": "text", "text": "Rain."}]}]
    provider = from_dict(
        Provider.Config, {"kind": "openai", "model": "magistral-medium-latest", "key_env": None}
    ).build()
    for request in follow_ups("openai", parts):
        [back] = [one for one in json.loads(provider.build(request).body)["messages"] if one["role"] == "assistant"]
        assert back == {"role": "assistant", "content": parts[0]["content"]}


@pytest.mark.parametrize("kind", ["gemini", "ollama"])
def test_claude_is_not_sent_what_another_model_thought(kind):
    names = ["thinking", "call", "text"]
    parts, marks = marked([json.loads(json.dumps(PARTS[kind][name])) for name in names])
    body = provider_of(kind).parse(request_of(kind, False), json.dumps(whole(kind, parts)).encode()).body
    message = to_message({}, body)
    assert message["content"][0]["type"] == "thinking"
    chat = turn_of_messages(message)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": message["content"]}]
    own = {"model": "m", "max_tokens": 9, "messages": turns}
    native = UpstreamRequest("chat", chat.body, native=Native(own, {}))
    for claude, request in (
        (provider_of("anthropic"), chat),
        (provider_of("native"), native),
        (provider_of("bedrock"), chat),
    ):
        text = claude.build(request).body.decode()
        assert marks[0] not in text
        assert "google." not in text
        assert parts[2]["content" if kind == "ollama" else "text"] in text


class Slow:
    """A transport whose answer comes event by event, each when it is asked for."""

    def __init__(self, chunks):
        self.status, self.headers = 200, {"content-type": "text/event-stream"}
        self._events = [f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n".encode() for chunk in chunks] + [
            b"data: [DONE]\n\n"
        ]

    async def open(self, call):
        return self

    def read_ready(self):
        return b""

    async def read_some(self):
        return self._events.pop(0) if self._events else b""

    def close(self):
        """Nothing."""


def test_content_in_parts_is_put_into_openais_form_all_along_a_stream():
    """Chunks behind the first token are passed on unread, but for these."""

    async def main():
        group = Group(name="a", deployments=(Deployment(name="a-0", provider=provider_of("openai").config),))
        parts = [[{"type": "thinking", "thinking": [{"type": "text", "text": text}]}] for text in ("h", "m")]
        deltas = [
            {"content": part}
            for part in (*parts, [{"type": "text", "text": "a"}], "b", [{"type": "text", "text": "c"}])
        ]
        chunks = [{"choices": [{"index": 0, "delta": one, "finish_reason": None}]} for one in deltas]
        chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        dispatcher = Dispatcher([group], DispatchRules(retries=0), http=Slow(chunks))
        opened = await dispatcher.stream(
            Plan(candidates=("a",), deadline=dispatcher.now() + 5), request_of("openai", True)
        )
        data = [value async for block in opened for value in read_data(block)]
        await dispatcher.close()
        return data

    found = [value["choices"][0]["delta"] for value in asyncio.run(main()) if value.get("choices")]
    assert "".join(delta.get("reasoning_content", "") for delta in found) == "hm"
    assert "".join(delta.get("content") or "" for delta in found) == "abc"


def test_calls_that_are_told_side_by_side_each_end_once_in_a_response():
    def piece(at, text, **more):
        return {
            "choices": [
                {"delta": {"tool_calls": [{"index": at, **more, "function": {"name": "f", "arguments": text}}]}}
            ]
        }

    side = [
        piece(0, "", id="a"),
        piece(1, "", id="b"),
        piece(0, '{"x"'),
        piece(1, "{}"),
        piece(0, ":1}"),
        piece(2, "{}", id="c"),
    ]
    output = response_of([*side, {"choices": [{"delta": {"content": "so"}, "finish_reason": "tool_calls"}]}])["output"]
    assert [(item.get("call_id"), item.get("arguments")) for item in output] == [
        ("a", '{"x":1}'),
        ("b", "{}"),
        ("c", "{}"),
        (None, None),
    ]


def test_a_block_of_bedrocks_that_nobody_ended_is_told_with_the_message():
    translator = provider_of("bedrock").translator(request_of("bedrock", True))
    thought = [{"reasoningContent": {"text": "hm"}}, {"reasoningContent": {"signature": "s"}}]
    events = [{"contentBlockDelta": {"contentBlockIndex": 0, "delta": delta}} for delta in thought]
    events += [{"contentBlockStart": {"contentBlockIndex": 1, "start": {"toolUse": {"name": "f", "toolUseId": "t"}}}}]
    chunks = [
        chunk
        for event in [*events, {"messageStop": {"stopReason": "tool_use"}}]
        for chunk in translator.feed(json.dumps(event).encode())
    ]
    message = assembled(chunks)["choices"][0]["message"]
    assert message["thinking_blocks"] == [{"type": "thinking", "thinking": "hm", "signature": "s"}]
    assert message["tool_calls"][0]["function"]["arguments"] == "{}"


@pytest.mark.parametrize(
    "fields", [{"kind": "openai", "model": "magistral-medium-latest"}, {"kind": "openrouter", "model": "m"}]
)
def test_a_turn_of_nothing_but_what_another_model_thought_is_left_out(fields):
    provider = from_dict(Provider.Config, {"key_env": None, **fields}).build()
    signed = {"type": "thinking", "thinking": "Hm.", "signature": "EqQB"}
    for block, roles in ((signed, ["user", "user"]), ({**signed, "signature": ""}, ["user", "assistant", "user"])):
        request = turn_of_messages({"content": [block]})
        assert [message["role"] for message in json.loads(provider.build(request).body)["messages"]] == roles
