"""Turns that are given back: text and calls go to a model in the order in which they came, wherever its form has one."""

import json
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from anabranch.gateway.prompt_tokens import count_prompt
from anabranch.gateway.providers.anthropic import Anthropic
from anabranch.gateway.providers.assembling import assembled
from anabranch.gateway.providers.bedrock import Bedrock
from anabranch.gateway.providers.engine import Engine
from anabranch.gateway.providers.gemini import Gemini
from anabranch.gateway.providers.ollama import Ollama
from anabranch.gateway.providers.one_message import in_one_message
from anabranch.gateway.providers.openai import OpenAI
from anabranch.gateway.providers.upstream_request import UpstreamRequest
from anabranch.web import messages, responses

# A piece is a text, or None for a call.
PIECES = st.lists(st.none() | st.text("ab é", min_size=1, max_size=4), min_size=1, max_size=7)
MIXED = ["one", None, "two", "three", None, "four"]


def calls_of(pieces):
    """Each piece, with the number of a call."""
    numbers = iter(range(len(pieces)))
    return [next(numbers) if piece is None else piece for piece in pieces]


def results(pieces):
    return [one for one in calls_of(pieces) if isinstance(one, int)]


# Forms in which a client gives a turn back


def of_messages(pieces):
    content = [
        {"type": "text", "text": one}
        if isinstance(one, str)
        else {"type": "tool_use", "id": f"call_{one}", "name": "f", "input": {"n": one}}
        for one in calls_of(pieces)
    ]
    back = [{"type": "tool_result", "tool_use_id": f"call_{one}", "content": "r"} for one in results(pieces)]
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": content},
        {"role": "user", "content": [*back, {"type": "text", "text": "go on"}]},
    ]
    return UpstreamRequest(
        "chat", messages.to_chat({"model": "m", "max_tokens": 9, "messages": turns}), is_foreign=True
    )


def of_responses(pieces):
    items = [
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": one}]}
        if isinstance(one, str)
        else {"type": "function_call", "call_id": f"call_{one}", "name": "f", "arguments": json.dumps({"n": one})}
        for one in calls_of(pieces)
    ]
    back = [{"type": "function_call_output", "call_id": f"call_{one}", "output": "r"} for one in results(pieces)]
    asked, last = ({"role": "user", "content": text} for text in ("hi", "go on"))
    return UpstreamRequest("chat", responses.to_chat({"model": "m", "input": [asked, *items, *back, last]}))


def of_chat(pieces):
    """The message of a whole answer, as it was told."""

    def delta(one):
        if isinstance(one, str):
            return {"content": one}
        function = {"name": "f", "arguments": json.dumps({"n": one})}
        return {"tool_calls": [{"index": one, "id": f"call_{one}", "type": "function", "function": function}]}

    chunks = [{"choices": [{"index": 0, "delta": delta(one)}]} for one in calls_of(pieces)]
    said = assembled(chunks)["choices"][0]["message"]
    back = [{"role": "tool", "tool_call_id": f"call_{one}", "content": "r"} for one in results(pieces)]
    asked, last = ({"role": "user", "content": text} for text in ("hi", "go on"))
    return UpstreamRequest("chat", {"model": "m", "messages": [asked, said, *back, last]})


FORMS = [of_messages, of_responses, of_chat]


# What a provider sends of it: texts, and numbers of calls


def to_anthropic(request):
    provider = Anthropic(Anthropic.Config(model="claude-sonnet-4-5", key_env=None))
    return [
        block["text"] if block["type"] == "text" else block["input"]["n"]
        for turn in json.loads(provider.build(request).body)["messages"]
        if turn["role"] == "assistant"
        for block in turn["content"]
    ]


def to_gemini(request):
    provider = Gemini(Gemini.Config(model="gemini-3-pro-preview", key_env=None))
    return [
        part["text"] if "text" in part else part["functionCall"]["args"]["n"]
        for turn in json.loads(provider.build(request).body)["contents"]
        if turn["role"] == "model"
        for part in turn["parts"]
    ]


def to_bedrock(model):
    def sent(request):
        provider = Bedrock(Bedrock.Config(model=model, region="us-east-1"))
        return [
            block["text"] if "text" in block else block["toolUse"]["input"]["n"]
            for turn in json.loads(provider.build(request).body)["messages"]
            if turn["role"] == "assistant"
            for block in turn["content"]
        ]

    return sent


TARGETS = {
    "anthropic": to_anthropic,
    "gemini": to_gemini,
    "claude of bedrock": to_bedrock("anthropic.claude-sonnet-4-5"),
    "nova of bedrock": to_bedrock("amazon.nova-pro-v1:0"),
}


def joined(told):
    """Texts that follow one another are one: some forms join them, with or without a line between."""
    found = []
    for one in told:
        if isinstance(one, str) and found and isinstance(found[-1], str):
            found[-1] += one
        else:
            found.append(one)
    return [one.replace("\n", "") if isinstance(one, str) else one for one in found]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("form", FORMS)
@given(pieces=PIECES)
@example(pieces=MIXED)
@example(pieces=[None, "a"])
def test_text_and_calls_go_back_in_their_order(form, target, pieces):
    """All text stood before all calls."""
    assert joined(TARGETS[target](form(pieces))) == joined(calls_of(pieces))


@pytest.mark.parametrize("form", FORMS)
@given(pieces=PIECES)
@example(pieces=MIXED)
def test_a_chat_has_one_message_for_a_turn_with_all_text_before_all_calls(form, pieces):
    """Its known loss: OpenAI refuses a message between calls and their results, and fields that it does not know."""
    sent = json.loads(OpenAI(OpenAI.Config(model="m", key_env=None)).build(form(pieces)).body)["messages"]
    assert [message["role"] for message in sent].count("tool") == len(results(pieces))
    said = [message for message in sent if message["role"] == "assistant"]
    if results(pieces):
        at = next(at for at, message in enumerate(sent) if message.get("tool_calls"))
        assert [message["role"] for message in sent[at + 1 :]] == ["tool"] * len(results(pieces)) + ["user"]
    calls = [json.loads(call["function"]["arguments"])["n"] for one in said for call in one.get("tool_calls") or ()]
    assert calls == results(pieces)
    texts = "".join(one.get("content") or "" for one in said)
    assert texts.replace("\n", "") == "".join(piece for piece in pieces if piece)
    assert not any("extra_content" in message for message in sent)


def test_our_own_engine_has_the_items_of_a_response_as_messages_in_their_order():
    sent = json.loads(Engine(Engine.Config(model="m")).build(of_responses(MIXED)).body)["messages"]
    said = [(one["content"], len(one.get("tool_calls") or ())) for one in sent if one["role"] == "assistant"]
    assert said == [("one", 1), ("two", 0), ("three", 1), ("four", 0)]


@pytest.mark.parametrize("form", FORMS)
def test_ollama_has_all_text_before_all_calls(form):
    sent = json.loads(Ollama(Ollama.Config(model="m")).build(form(MIXED)).body)["messages"]
    said = [message for message in sent if message["role"] == "assistant"]
    assert [call["function"]["arguments"]["n"] for one in said for call in one.get("tool_calls") or ()] == [0, 1]
    assert "".join(one["content"] for one in said).replace("\n", "") == "onetwothreefour"


def test_the_mark_of_a_turn_is_that_of_its_last_text_and_blocks_keep_theirs():
    kept = {"type": "ephemeral"}
    content = [
        {"type": "text", "text": "a", "cache_control": kept},
        {"type": "tool_use", "id": "c", "name": "f", "input": {}, "cache_control": kept},
        {"type": "text", "text": "b"},
    ]
    asked = {"model": "m", "max_tokens": 9, "messages": [{"role": "assistant", "content": content}]}
    chat = messages.to_chat(asked)
    provider = Anthropic(Anthropic.Config(model="claude-sonnet-4-5", key_env=None))
    sent = json.loads(provider.build(UpstreamRequest("chat", chat, is_foreign=True)).body)["messages"]
    assert sent == asked["messages"]
    chat["messages"][0]["cache_control"] = kept
    sent = json.loads(provider.build(UpstreamRequest("chat", chat, is_foreign=True)).body)["messages"]
    assert sent[0]["content"][2] == {"type": "text", "text": "b", "cache_control": kept}


def test_an_order_costs_no_tokens_of_the_prompt():
    """No model is sent it as text."""
    [_, said, *_] = of_messages(MIXED).body["messages"]
    assert said["extra_content"]["gateway"]["order"][:3] == [{"parts": 1}, {"call": 0}, {"parts": 2}]
    without = {name: value for name, value in said.items() if name != "extra_content"}
    assert count_prompt({"messages": [said]}) == count_prompt({"messages": [without]})


@pytest.mark.parametrize(
    "given",
    [
        {"messages": 3},
        {"messages": [3, None, {"role": "assistant", "content": 3, "tool_calls": [{}]}, {"role": "assistant"}]},
        {"messages": [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {
            "messages": [
                {"role": "assistant", "extra_content": {"google": {}}},
                {"role": "assistant", "tool_calls": [{}]},
            ]
        },
        {},
    ],
)
def test_a_chat_in_which_nothing_is_to_be_joined_is_the_same_object(given):
    assert in_one_message(given) is given


def test_messages_of_one_turn_are_joined_with_all_that_they_say():
    call, other = ({"id": id, "type": "function", "function": {"name": "f", "arguments": "{}"}} for id in "ab")
    image = {"type": "image_url", "image_url": {"url": "http://x/a.png"}}
    order = {"google": {"s": 1}, "gateway": {"order": [{"text": 1}, {"call": 0}]}}
    given = [
        {"role": "assistant", "content": "x", "reasoning_content": "h", "tool_calls": [call], "extra_content": order},
        {"role": "assistant", "content": [image], "reasoning_content": "m", "tool_calls": [other], "refusal": None},
        {"role": "tool", "tool_call_id": "a", "content": "r"},
        {"role": "assistant", "content": "y"},
    ]
    [said, result, last] = in_one_message({"messages": given})["messages"]
    assert said == {
        "role": "assistant",
        "content": [{"type": "text", "text": "x"}, image],
        "reasoning_content": "hm",
        "tool_calls": [call, other],
        "extra_content": {"google": {"s": 1}},
        "refusal": None,
    }
    assert [result, last] == given[2:]
    assert given[0]["tool_calls"] == [call]


CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
LATER = {
    "texts": {"content": "b" * 20},
    "parts": {"content": [{"type": "text", "text": "b"}]},
    "texts and parts": {"content": "b", "refusal": [{"type": "text"}]},
    "calls": {"content": None, "tool_calls": [CALL]},
    "thoughts": {"content": "", "reasoning_content": "b" * 20},
    "details of thoughts": {"reasoning_details": [{"text": "b"}]},
    "signatures": {"content": "b", "extra_content": {"google": {"parts": [{"n": 1}], "thought_signature": "s"}}},
    "orders": {"content": "b", "extra_content": {"gateway": {"order": [{"text": 1}]}}},
    "names of their own": {"content": "b"},
}


def size_of(value):
    """How much a value holds: characters of its texts, and places of its lists and tables."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(1 + size_of(one) for one in value.values())
    return sum(1 + size_of(one) for one in value) if isinstance(value, list | tuple) else 0


def work_of(call):
    """The sizes of all that the functions of the module give back while it runs, which is what they copy."""
    sizes = []

    def note(frame, event, value):
        if event == "return" and frame.f_globals.get("__name__") == in_one_message.__module__:
            sizes.append(size_of(value))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return sum(sizes)


@pytest.mark.parametrize("kind", LATER)
def test_a_turn_of_many_messages_is_joined_with_as_much_work_as_it_holds(kind):
    """It was joined message by message, and all before copied for each: a legal request kept those of others waiting for 40 seconds."""

    def work(count):
        later = [{"role": "assistant", **LATER[kind]} for _ in range(count)]
        if kind == "names of their own":
            later = [{**one, f"field_{at}": "x" * 20} for at, one in enumerate(later)]
        body = {"messages": [{"role": "assistant", "content": "a", "tool_calls": [CALL]}, *later]}
        assert len(in_one_message(body)["messages"]) == 1
        return work_of(lambda: in_one_message(body))

    few, many = work(100), work(400)
    assert many < 5 * few


@given(
    texts=st.lists(st.none() | st.text("ab", max_size=3) | st.lists(st.just({"type": "text", "text": "p"}), max_size=2))
)
def test_all_that_the_messages_of_a_turn_say_stands_in_one_in_its_order(texts):
    later = [{"role": "assistant", "content": text} for text in texts]
    [made] = in_one_message({"messages": [{"role": "assistant", "content": None, "tool_calls": [CALL]}, *later]})[
        "messages"
    ]

    def told(content):
        return [part["text"] for part in content] if isinstance(content, list) else (content or "").split("\n\n")

    assert [one for one in told(made["content"]) if one] == [one for text in texts for one in told(text) if one]
    assert made["tool_calls"] == [CALL]


def signed(signature, **more):
    return {"google": {"thought_signature": signature, **more}}


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        ([signed("s"), None], signed("s")),
        ([None, signed("s")], signed("s")),
        ([signed("s"), signed("t")], signed("s")),
        ([signed("s"), {"anthropic": {"blocks": [1]}}], signed("s") | {"anthropic": {"blocks": [1]}}),
        ([signed("s", parts=[1]), signed("t", parts=[2], other=3)], signed("s", parts=[1, 2], other=3)),
        ([{"parts": [1]}, {"parts": [2]}], {"parts": [1, 2]}),
        ([signed(None), signed("t")], signed("t")),
        ([{"google": None}, signed("t")], signed("t")),
        ([{"google": 3}, signed("t")], {"google": 3}),
        ([{}, signed("s"), {}, signed("t"), {"x": 1}], signed("s") | {"x": 1}),
        # An order is that of one message alone, and no model of this form is told it.
        ([signed("s") | {"gateway": {"order": [{"text": 1}]}}, signed("t")], signed("s")),
        ([{"gateway": {"order": [{"call": 0}]}}, {"gateway": {"order": [{"text": 1}]}}], None),
    ],
)
def test_what_each_message_of_a_turn_has_beside_the_rest_stays_and_of_two_signatures_the_first(tables, expected):
    """The last table took the place of the others: the first signature was lost."""
    said = [
        {"role": "assistant", "content": "x", **({} if table is None else {"extra_content": table})} for table in tables
    ]
    given = [{**said[0], "tool_calls": [CALL]}, *said[1:]]
    kept = json.dumps(given)
    [made] = in_one_message({"messages": given})["messages"]
    assert made.get("extra_content") == expected
    assert json.dumps(given) == kept
