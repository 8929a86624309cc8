"""Requests of the Responses API that chat has no words for: custom tools, allowed tools, log-probabilities; and what is refused."""

import json
import re
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.web.api_error import ApiError
from anabranch.web.responses import ResponseStream, to_chat, to_response
from anabranch.web.responses.tools import arguments_of, text_of
from anabranch.web.sse import read_data

FUNCTION = {"type": "function", "name": "add", "parameters": {"type": "object"}}
GRAMMAR = {"type": "grammar", "syntax": "lark", "definition": 'start: "x"'}
CUSTOM = {"type": "custom", "name": "patch", "description": "Change a file.", "format": GRAMMAR}
ASKED = {"model": "m", "input": "hi", "tools": [FUNCTION, CUSTOM]}


def refused(**fields):
    with pytest.raises(ApiError) as caught:
        to_chat({"model": "m", "input": "hi", **fields})
    return caught.value


def answer(logprobs=None, **message):
    choice = {"index": 0, "message": {"role": "assistant", "content": None, **message}, "finish_reason": "stop"}
    return {"model": "m", "created": 7, "choices": [{**choice, **({"logprobs": logprobs} if logprobs else {})}]}


def call(arguments, name="patch", **more):
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}, **more}


def told(body, *deltas, logprobs=None):
    """All events of a stream of such pieces."""
    made = ResponseStream(body)
    more = {"logprobs": logprobs} if logprobs else {}
    chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None, **more}]} for delta in deltas]
    raw = [*made.begin(), *(piece for chunk in chunks for piece in made.add(chunk)), *made.end()]
    return [value for piece in raw for value in read_data(piece)]


# How it ends


def events_of(body, *chunks):
    made = ResponseStream(body)
    raw = [*made.begin(), *(piece for chunk in chunks for piece in made.add(chunk)), *made.end()]
    return [value for piece in raw for value in read_data(piece)]


@pytest.mark.parametrize(
    ("reason", "status", "why"),
    [
        ("stop", "completed", None),
        ("length", "incomplete", "max_output_tokens"),
        ("content_filter", "incomplete", "content_filter"),
    ],
)
def test_why_an_answer_ended_is_told(reason, status, why):
    said = answer(content="so")
    said["choices"][0]["finish_reason"] = reason
    last = events_of(ASKED, {"choices": [{"index": 0, "delta": {"content": "so"}, "finish_reason": reason}]})[-1]
    assert last["type"] == f"response.{status}"
    for made in (to_response(ASKED, said), last["response"]):
        assert (made["status"], made["incomplete_details"]) == (status, None if why is None else {"reason": why})


@pytest.mark.parametrize("reason", ["length", "content_filter", "stop"])
@pytest.mark.parametrize("name", ["patch", "add"])
@pytest.mark.parametrize(
    ("delta", "statuses"),
    [
        ({"content": "so"}, ["incomplete"]),
        ({"reasoning_content": "hm"}, ["incomplete"]),
        ({"reasoning_content": "hm", "content": "so"}, ["completed", "incomplete"]),
        ({"content": "so", "tool_calls": ["{}"]}, ["completed", "completed"]),
        ({"content": "so", "tool_calls": ["{}", '{"x": ']}, ["completed", "completed", "incomplete"]),
        ({"tool_calls": ['{"x": ', "{}"]}, ["incomplete", "completed"]),
        ({"tool_calls": [""]}, ["incomplete"]),
    ],
)
def test_what_was_cut_off_is_not_completed(delta, statuses, name, reason):
    calls = [{**call(text, name), "index": at, "id": f"c{at}"} for at, text in enumerate(delta.get("tool_calls", ()))]
    said = {**delta, **({"tool_calls": calls} if calls else {})}
    whole = answer(**said)
    whole["choices"][0]["finish_reason"] = reason
    events = events_of(ASKED, {"choices": [{"index": 0, "delta": said, "finish_reason": reason}]})
    for output in (to_response(ASKED, whole)["output"], events[-1]["response"]["output"]):
        assert [item["status"] for item in output] == (statuses if reason != "stop" else ["completed"] * len(statuses))
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert sorted(item["status"] for item in done) == sorted(
        item["status"] for item in events[-1]["response"]["output"]
    )
    if reason != "stop":
        # Nobody is told that the arguments of a call are done which are not.
        told_done = [
            event for event in events if event["type"].endswith((".arguments.done", "_arguments.done", "input.done"))
        ]
        assert len(told_done) == sum(status == "completed" for status in statuses[len(statuses) - len(calls) :])


@pytest.mark.parametrize(("reason", "status"), [("stop", "completed"), ("length", "incomplete")])
def test_an_answer_that_says_nothing_is_a_message_without_text(reason, status):
    """It was one in a whole answer, and no item as events."""
    last = events_of(ASKED, {"choices": [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": reason}]})[-1]
    for content in ("", None):
        said = answer(content=content)
        said["choices"][0]["finish_reason"] = reason
        for output in (to_response(ASKED, said)["output"], last["response"]["output"]):
            [item] = output
            assert (item["type"], item["status"], item["content"][0]["text"]) == ("message", status, "")


def test_what_was_cut_off_while_it_thought_has_no_message():
    said = answer(content="", reasoning_content="hm")
    said["choices"][0]["finish_reason"] = "length"
    [item] = to_response(ASKED, said)["output"]
    assert (item["type"], item["status"]) == ("reasoning", "incomplete")


def test_log_probabilities_of_what_is_held_back_come_with_the_text():
    chunks = [
        {"choices": [{"index": 0, "delta": {"content": text}, "logprobs": {"content": [{"token": token}]}}]}
        for text, token in (("a", "a"), ("", "<"), ("<b", "b"))
    ]
    last = events_of(ASKED, *chunks)[-1]["response"]
    [part] = last["output"][0]["content"]
    assert (part["text"], [one["token"] for one in part["logprobs"]]) == ("a<b", ["a", "<", "b"])


def scored(*tokens):
    """What chat tells of tokens; of one that is a part of a character its bytes."""
    return {
        "content": [
            {"token": str(token), "bytes": list(token if isinstance(token, bytes) else token.encode())}
            for token in tokens
        ]
    }


def tokens_in(response):
    return [
        [one["token"] for one in item["content"][0]["logprobs"]]
        for item in response["output"]
        if item["type"] == "message"
    ]


@pytest.mark.parametrize(
    ("message", "chunks", "wanted"),
    [
        # Thoughts, what marks their end, and a text whose first piece comes beside the last of them.
        (
            {"reasoning_content": "hm", "content": "aéb"},
            [
                ({"reasoning_content": ""}, ["<think>"]),
                ({"reasoning_content": "h"}, ["h"]),
                ({"reasoning_content": "m"}, ["m", "</think>", "\n", "a"]),
                ({"content": "a"}, []),
                ({"content": "é"}, ["é"]),
                ({"content": "b"}, ["b"]),
                ({}, ["<end>"]),
            ],
            ["a", "é", "b", "<end>"],
        ),
        (
            {"reasoning_content": "hm", "content": "a"},
            [({"reasoning_content": "hm"}, ["hm"]), ({}, ["</think>"]), ({"content": "a"}, ["a"])],
            ["a"],
        ),
        # What is held back and never told: of what was said, as a whole answer has it.
        (
            {"content": "ab"},
            [({"content": "a"}, ["a"]), ({"content": "b"}, ["b"]), ({"content": ""}, ["<stop>"])],
            ["a", "b", "<stop>"],
        ),
        ({"content": ""}, [({"content": ""}, ["<stop>"])], ["<stop>"]),
        (
            {
                "content": "ab",
                "tool_calls": [
                    {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
                ],
            },
            [
                ({"content": "a"}, ["a"]),
                ({"content": "b"}, ["b"]),
                ({"content": ""}, ["<call>"]),
                (
                    {
                        "tool_calls": [
                            {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
                        ]
                    },
                    ["{}"],
                ),
            ],
            ["a", "b"],
        ),
        # Thoughts that hold nothing, of which nobody is told.
        (
            {"content": "yes"},
            [({}, ["<think>"]), ({}, ["\n\n"]), ({}, ["</think>"]), ({}, ["\n\n"]), ({"content": "yes"}, ["yes"])],
            ["yes"],
        ),
        # Words that come again in thoughts, in what marks them, and in what a stop string held back.
        (
            {"reasoning_content": "k", "content": "k"},
            [
                ({}, ["<think>"]),
                ({"reasoning_content": "k"}, ["k"]),
                ({}, ["</think>"]),
                ({"content": "k"}, ["k"]),
                ({}, ["b"]),
                ({}, ["k"]),
            ],
            ["k", "b", "k"],
        ),
        # Half of a character at the end, and white space that was not told.
        (
            {"reasoning_content": "hm", "content": "é\ufffd"},
            [
                ({"reasoning_content": "hm"}, ["hm"]),
                ({}, ["</think>"]),
                ({"content": "é"}, ["é"]),
                ({"content": "\ufffd"}, [b"\xf0"]),
            ],
            ["é", b"\xf0"],
        ),
        (
            {"reasoning_content": "hm", "content": "Yes.<call>{"},
            [
                ({"reasoning_content": "hm"}, ["hm"]),
                ({}, ["</think>"]),
                ({"content": "Yes."}, ["Yes."]),
                ({}, [" "]),
                ({}, ["<call>"]),
                ({"content": "<call>{"}, ["{"]),
            ],
            ["Yes.", " ", "<call>", "{"],
        ),
        # Thoughts, and a text, that begin with a blank and lost white space within: their tokens are theirs all the same.
        (
            {"reasoning_content": "ab", "content": "ab"},
            [
                ({}, ["<think>"]),
                ({"reasoning_content": "a"}, ["\n", " a"]),
                ({"reasoning_content": "b"}, ["\n", "b"]),
                ({}, ["</think>", "\n\n"]),
                ({"content": "ab"}, [" a", " ", "b"]),
            ],
            [" a", " ", "b"],
        ),
        # What was held before thoughts is not the text's behind them.
        (
            {"reasoning_content": "hm", "content": "a"},
            [({}, ["a", "<think>"]), ({"reasoning_content": "hm"}, ["hm"]), ({"content": "a"}, ["</think>a"])],
            ["</think>a"],
        ),
    ],
)
def test_a_message_has_the_log_probabilities_of_its_text_whole_and_as_events(message, chunks, wanted):
    said = answer(**message)
    said["choices"][0]["logprobs"] = scored(*(token for _, tokens in chunks for token in tokens))
    events = events_of(
        ASKED, *({"choices": [{"index": 0, "delta": delta, "logprobs": scored(*tokens)}]} for delta, tokens in chunks)
    )
    done = [event["logprobs"] for event in events if event["type"] == "response.output_text.done"]
    wanted = list(map(str, wanted))
    assert tokens_in(to_response(ASKED, said)) == tokens_in(events[-1]["response"]) == [wanted]
    assert [[one["token"] for one in each] for each in done] == [wanted]


@pytest.mark.parametrize(
    ("tokens", "completion", "thought", "wanted"),
    [
        (["<think>", "\n", "</think>", "\n\n"], 4, 3, []),
        (["<think>", "</think>", "\n", "<stop>"], 4, 2, ["<stop>"]),
        (["<stop>"], 1, 0, ["<stop>"]),
        # Thoughts that nobody sees are told of no tokens.
        (["<stop>"], 8, 7, ["<stop>"]),
        (["<stop>"], None, 1, ["<stop>"]),
        (["<stop>"], 1, True, ["<stop>"]),
    ],
)
def test_a_message_of_nothing_has_no_log_probabilities_of_thoughts_that_hold_nothing(
    tokens, completion, thought, wanted
):
    usage = {"completion_tokens": completion, "completion_tokens_details": {"reasoning_tokens": thought}}
    chunks = [{"choices": [{"index": 0, "delta": {"content": ""}, "logprobs": scored(one)}]} for one in tokens]
    streamed = events_of(ASKED, *chunks, {"choices": [], "usage": usage})[-1]["response"]
    whole = to_response(ASKED, {**answer(scored(*tokens), content=""), "usage": usage})
    assert tokens_in(streamed) == tokens_in(whole) == [wanted]


F_CALL = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def test_texts_around_a_call_have_their_own_log_probabilities_whole_and_as_events():
    chunks = [
        ({"content": "a"}, ["a"]),
        ({}, ["<call>"]),
        ({"tool_calls": [F_CALL]}, ["{", "}"]),
        ({}, ["</call>"]),
        ({"content": "a"}, ["a"]),
        ({"content": "b"}, ["b"]),
        ({}, ["<stop>"]),
    ]
    streamed = events_of(
        ASKED, *({"choices": [{"index": 0, "delta": delta, "logprobs": scored(*tokens)}]} for delta, tokens in chunks)
    )[-1]["response"]
    order = {"gateway": {"order": [{"text": 1}, {"call": 0}, {"text": 2}]}}
    said = answer(content="aab", tool_calls=[F_CALL], extra_content=order)
    said["choices"][0]["logprobs"] = scored(*(token for _, tokens in chunks for token in tokens))
    assert tokens_in(streamed) == tokens_in(to_response(ASKED, said)) == [["a"], ["a", "b", "<stop>"]]


def test_a_text_beside_which_a_call_goes_on_has_none_of_the_calls_log_probabilities():
    begun, behind = ({**F_CALL, "function": {"name": "f", "arguments": part}} for part in ("{", "}"))
    chunks = [({"tool_calls": [begun]}, ["{"]), ({"content": "a"}, ["a"]), ({"tool_calls": [behind]}, ["}"])]
    events = events_of(
        ASKED, *({"choices": [{"index": 0, "delta": delta, "logprobs": scored(*tokens)}]} for delta, tokens in chunks)
    )
    assert tokens_in(events[-1]["response"]) == [["a"]]


def test_a_refusal_with_log_probabilities_is_no_text_whole_or_as_events():
    [*_, last] = told(ASKED, {"refusal": "no"}, logprobs=scored("no"))
    whole = to_response(ASKED, answer(scored("no"), content=None, refusal="no"))
    for response in (last["response"], whole):
        assert [item["content"] for item in response["output"]] == [[{"type": "refusal", "refusal": "no"}]]


def test_a_refusal_behind_a_text_leaves_that_its_own_log_probabilities():
    chunks = [({"content": "a"}, ["a"]), ({"refusal": "no"}, ["no"])]
    streamed = events_of(
        ASKED, *({"choices": [{"index": 0, "delta": delta, "logprobs": scored(*tokens)}]} for delta, tokens in chunks)
    )[-1]["response"]
    whole = to_response(ASKED, answer(scored("a", "no"), content="a", refusal="no"))
    assert tokens_in(streamed) == tokens_in(whole) == [["a"]]


@pytest.mark.parametrize(
    "half", [{"bytes": [0xC3]}, {"bytes": None, "token": "\ud800"}, {"bytes": [True], "token": 3}, "odd", None]
)
def test_log_probabilities_of_what_is_no_text_are_told_as_they_are(half):
    said = answer(content="é")
    said["choices"][0]["logprobs"] = {"content": [half]}
    [part] = to_response(ASKED, said)["output"][0]["content"]
    assert part["logprobs"] == [half]
    # They may be those of thoughts, where there are any.
    said["choices"][0]["message"]["reasoning_content"] = "hm"
    [part] = to_response(ASKED, said)["output"][1]["content"]
    assert part["logprobs"] == []


def test_without_events_the_response_is_the_same():
    chunk = {"choices": [{"index": 0, "delta": {"content": "so"}, "finish_reason": "stop"}]}
    silent = ResponseStream(ASKED, tells=False)
    assert b"".join([*silent.begin(), *silent.add(chunk), *silent.end()]) == b""
    told = events_of(ASKED, chunk)[-1]["response"]
    for response in (silent.response, told):
        assert (response["status"], response["output"][0]["content"][0]["text"]) == ("completed", "so")


def test_what_had_come_before_a_failure_is_told():
    made = ResponseStream(ASKED)
    chunk = {"choices": [{"index": 0, "delta": {"content": "so"}}]}
    raw = [*made.begin(), *made.add(chunk), *made.add(chunk), *made.fail("it broke", None)]
    last = next(read_data(raw[-1]))["response"]
    assert (last["status"], last["output"][0]["content"][0]["text"]) == ("failed", "soso")


@pytest.mark.parametrize("pieces", [['{"input": "a b'], ["", '{"inp', 'ut": "a b'], ['{"input"']])
def test_of_a_custom_call_that_was_cut_off_what_came_is_told_as_it_is(pieces):
    """Whole and as events: what is no whole object has no input that could be taken out of it."""
    arguments = "".join(pieces)
    whole = answer(tool_calls=[call(arguments)])
    whole["choices"][0]["finish_reason"] = "length"
    first = {**call(pieces[0]), "index": 0}
    deltas = [first, *({"index": 0, "function": {"arguments": piece}} for piece in pieces[1:])]
    chunks = [{"choices": [{"index": 0, "delta": {"tool_calls": [delta]}, "finish_reason": None}]} for delta in deltas]
    events = events_of(ASKED, *chunks, {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    for item in (*to_response(ASKED, whole)["output"], *events[-1]["response"]["output"], *done):
        assert (item["type"], item["status"], item["input"]) == ("custom_tool_call", "incomplete", arguments)
    assert len(done) == 1


def test_the_model_is_the_one_that_was_told_last():
    one = {"choices": [{"index": 0, "delta": {"content": "a"}}]}
    first, *_, last = events_of(ASKED, one, {**one, "model": "m-1"}, {**one, "model": "m-2"}, one)
    assert (first["response"]["model"], last["response"]["model"]) == ("m", "m-2")


def test_calls_without_numbers_are_told_apart_by_what_names_them():
    deltas = (call('{"a"', "add"), {"function": {"arguments": ":1}"}}, {"id": "c2", "function": {"arguments": "{}"}})
    named = {"function": {"name": "add", "arguments": "[]"}}
    events = told(ASKED, *({"tool_calls": [delta]} for delta in (*deltas, named)))
    assert [item["arguments"] for item in events[-1]["response"]["output"]] == ['{"a":1}', "{}", "[]"]


@pytest.mark.parametrize("include", [None, [], ["message.output_text.logprobs"], "reasoning.encrypted_content", 7])
@pytest.mark.parametrize("thought", [{"reasoning_content": "hm"}, {"thinking_blocks": [{"signature": "s"}]}])
def test_thoughts_are_sealed_for_those_alone_who_ask_for_it(include, thought):
    body = ASKED if include is None else {**ASKED, "include": include}
    for output in (to_response(body, answer(**thought))["output"], told(body, thought)[-1]["response"]["output"]):
        assert [(item["type"], "encrypted_content" in item) for item in output] == [("reasoning", False)]
    asked = to_response({**ASKED, "include": ["reasoning.encrypted_content"]}, answer(**thought))["output"]
    assert "encrypted_content" in asked[0]


# Custom tools


def test_a_custom_tool_is_a_function_of_one_text_whose_grammar_is_told():
    [_, made] = to_chat(ASKED)["tools"]
    assert made["type"] == "function"
    function = made["function"]
    assert function["name"] == "patch"
    assert function["description"] == 'Change a file.\n\nThe input must be of this grammar (lark):\nstart: "x"'
    assert function["parameters"]["required"] == list(function["parameters"]["properties"]) == ["input"]
    [bare] = to_chat({**ASKED, "tools": [{"type": "custom", "name": "say"}]})["tools"]
    assert "description" not in bare["function"]
    assert to_chat({**ASKED, "tool_choice": {"type": "custom", "name": "patch"}})["tool_choice"] == {
        "type": "function",
        "function": {"name": "patch"},
    }


@given(st.text())
def test_a_text_is_what_stands_in_its_arguments(text):
    assert text_of(arguments_of(text)) == text


@pytest.mark.parametrize("arguments", ["", "x", "[]", '{"input": 5}', '{"other": "x"}', '{"input": "x"', "[" * 9999])
def test_what_a_model_wrote_that_is_no_such_arguments_is_passed_on(arguments):
    assert text_of(arguments) == arguments


def test_a_call_of_it_goes_out_as_one_and_comes_back():
    made = to_response(ASKED, answer(tool_calls=[call(arguments_of("a\nb")), call("{}", "add")]))
    first, second = made["output"]
    assert (first["type"], first["call_id"], first["name"], first["input"]) == (
        "custom_tool_call",
        "c1",
        "patch",
        "a\nb",
    )
    assert (second["type"], second["arguments"]) == ("function_call", "{}")
    assert first["id"].startswith("ctc_")
    result = {"type": "custom_tool_call_output", "call_id": "c1", "output": "done"}
    messages = to_chat({**ASKED, "input": [{"role": "user", "content": "?"}, first, result]})["messages"]
    assert messages[1]["tool_calls"] == [call(arguments_of("a\nb"))]
    assert messages[2] == {"role": "tool", "tool_call_id": "c1", "content": "done"}


def test_a_streamed_call_of_it_is_told_once_it_is_whole():
    text = arguments_of("a\nb")
    events = told(
        ASKED,
        {"tool_calls": [call("", index=0)]},
        {"tool_calls": [{"index": 0, "function": {"arguments": text[:5]}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": text[5:]}}]},
        {"tool_calls": [call("{}", "add", index=1)]},
    )
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "custom_tool_call_input.delta",
        "custom_tool_call_input.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    assert events[2]["item"] == {**events[5]["item"], "input": "", "status": "in_progress"}
    assert (events[3]["delta"], events[4]["input"], events[5]["item"]["input"]) == ("a\nb",) * 3
    assert events[4]["item_id"] == events[5]["item"]["id"]
    assert [item["type"] for item in events[-1]["response"]["output"]] == ["custom_tool_call", "function_call"]


@pytest.mark.parametrize(
    ("item", "param"),
    [
        ({"type": "custom_tool_call", "name": "patch", "call_id": "c"}, "input[0].input"),
        ({"type": "custom_tool_call", "input": "x", "call_id": "c"}, "input[0].name"),
        ({"type": "custom_tool_call_output", "output": "x"}, "input[0].call_id"),
        ({"type": "custom_tool_call_output", "call_id": "c", "output": 5}, "input[0].output"),
    ],
)
def test_items_of_custom_tools_are_looked_at(item, param):
    assert refused(input=[item]).param == param
    assert refused(tools=[{"type": "custom"}]).param == "tools[0].name"


# Allowed tools


def test_of_allowed_tools_no_other_is_offered():
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "custom", "name": "patch"}]}
    chat = to_chat({**ASKED, "tool_choice": choice})
    assert [tool["function"]["name"] for tool in chat["tools"]] == ["patch"]
    assert chat["tool_choice"] == "required"
    assert len(to_chat({**ASKED, "tool_choice": "required"})["tools"]) == 2


@pytest.mark.parametrize("name", [[], {}, None, 1])
def test_a_tool_has_a_text_for_a_name(name):
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "add"}]}
    odd = {"type": "function", "name": name}
    assert refused(tools=[FUNCTION, odd], tool_choice=choice).param == "tools[1].name"
    assert refused(tools=[odd]).param == "tools[0].name"


@pytest.mark.parametrize(
    ("choice", "param"),
    [
        ({"type": "allowed_tools", "mode": "none", "tools": [{"name": "add"}]}, "tool_choice.mode"),
        ({"type": "allowed_tools", "mode": "auto", "tools": []}, "tool_choice.tools"),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "mcp"}]}, "tool_choice.tools"),
        ({"type": "allowed_tools", "mode": "auto", "tools": "add"}, "tool_choice.tools"),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"name": "sub"}]}, "tool_choice.tools"),
        ({"type": "file_search"}, "tool_choice"),
        ({"type": "function"}, "tool_choice"),
    ],
)
def test_a_choice_that_cannot_be_is_refused(choice, param):
    assert refused(tools=[FUNCTION], tool_choice=choice).param == param


# Log-probabilities, and fields that say nothing to chat

LOGPROBS = {"content": [{"token": "hi", "logprob": -0.5, "bytes": None, "top_logprobs": []}]}


@pytest.mark.parametrize("fields", [{"top_logprobs": 3}, {"include": ["message.output_text.logprobs"]}])
def test_log_probabilities_are_asked_for_and_told(fields):
    chat = to_chat({**ASKED, **fields})
    assert chat["logprobs"] is True
    assert chat.get("top_logprobs") == fields.get("top_logprobs")
    made = to_response(ASKED, answer(LOGPROBS, content="hi"))
    assert made["output"][0]["content"][0]["logprobs"] == LOGPROBS["content"]
    events = {
        event["type"].removeprefix("response."): event for event in told(ASKED, {"content": "hi"}, logprobs=LOGPROBS)
    }
    assert events["output_text.delta"]["logprobs"] == events["output_text.done"]["logprobs"] == LOGPROBS["content"]
    assert events["completed"]["response"]["output"] == [events["output_item.done"]["item"]]


def test_without_a_wish_there_are_none():
    assert "logprobs" not in to_chat({**ASKED, "top_logprobs": 0, "include": ["reasoning.encrypted_content"]})
    assert to_response(ASKED, answer(content="hi"))["output"][0]["content"][0]["logprobs"] == []


def test_what_limits_what_is_not_there_is_left_out():
    chat = to_chat(
        {**ASKED, "max_tool_calls": 3, "stream_options": {"include_obfuscation": False}, "truncation": "auto"}
    )
    assert not {"max_tool_calls", "stream_options", "truncation"} & set(chat)
    shown = to_response({**ASKED, "max_tool_calls": 3, "safety_identifier": "s"}, answer(content="hi"))
    assert (shown["max_tool_calls"], shown["safety_identifier"], shown["background"]) == (3, "s", False)


# All that the official library may send


def words_of(hint):
    """All words that a type allows."""
    found = {one for one in typing.get_args(hint) if isinstance(one, str)}
    return found.union(*(words_of(one) for one in typing.get_args(hint)))


def kinds_of(union):
    """The words of ``type`` of a union of tables."""
    return set().union(*(words_of(typing.get_type_hints(one).get("type")) for one in typing.get_args(union)))


def test_each_kind_of_tool_and_item_of_the_library_is_taken_or_refused_by_name():
    pytest.importorskip("openai")
    from openai.types.responses.response_input_item_param import ResponseInputItemParam
    from openai.types.responses.tool_param import ToolParam

    tools, items = kinds_of(ToolParam), kinds_of(ResponseInputItemParam)
    assert {"function", "custom", "web_search", "mcp"} <= tools
    assert {"message", "function_call", "custom_tool_call", "item_reference"} <= items
    for kind in tools - {"function", "custom"}:
        error = refused(tools=[{"type": kind, "name": "x"}])
        assert (error.code, error.param) == ("unsupported", "tools[0]")
        assert repr(kind) in str(error)
    known = {
        "message",
        "function_call",
        "function_call_output",
        "custom_tool_call",
        "custom_tool_call_output",
        "reasoning",
        "image_generation_call",
    }
    for kind in items - known:
        error = refused(input=[{"type": kind, "id": "x"}])
        assert (error.code, error.param) == ("unsupported", "input[0].type")


ODD = [True, "x", 3, ["x"], {"id": "x"}]


def test_each_field_of_the_library_is_taken_or_refused_in_words():
    """Whatever stands in it; what asks for something that would have to be kept here is refused."""
    pytest.importorskip("openai")
    from openai.types.responses.response_create_params import ResponseCreateParamsBase

    fields = set(typing.get_type_hints(ResponseCreateParamsBase))
    assert {"background", "input", "text", "tools"} <= fields
    for name in fields - {"input", "model"}:
        for value in ODD:
            error, chat = None, {}
            try:
                chat = to_chat({"model": "m", "input": "hi", name: value})
            except ApiError as found:
                error = found
            if error is not None:
                assert (error.status, re.split(r"[.\[]", error.param)[0]) == (400, name)
            else:
                assert name not in ("background", "conversation", "previous_response_id", "prompt")
                json.dumps(chat)


@pytest.mark.parametrize(
    ("include", "param", "says"),
    [
        (["bogus"], "include[0]", "include[0] is 'bogus'; it must be one of message.output_text.logprobs, reasoning"),
        (["reasoning.encrypted_content", 7], "include[1]", "include[1] is 7; it must be one of"),
        ("reasoning.encrypted_content", "include", "it must be a list"),
    ],
)
def test_what_nobody_can_include_is_refused(include, param, says):
    error = refused(include=include)
    assert (error.status, error.param) == (400, param)
    assert says in str(error)


def test_what_the_library_can_ask_to_be_included_is_taken():
    pytest.importorskip("openai")
    from openai.types.responses import ResponseIncludable

    words = list(words_of(ResponseIncludable))
    assert "reasoning.encrypted_content" in words
    assert to_chat({**ASKED, "include": words})["logprobs"] is True
    assert "logprobs" not in to_chat({**ASKED, "include": None})


def test_usage_tells_what_our_servers_tell_and_no_more():
    """Layers that ran, and turns of routers; others' own counts have no place in a response."""
    usage = {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "depth": {"layers_per_token": 1.5},
        "rewiring": [[]],
        "cost": 1,
    }
    wanted = {
        "input_tokens": 3,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": 2,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 5,
        "depth": {"layers_per_token": 1.5},
        "rewiring": [[]],
    }
    assert to_response(ASKED, {**answer(content="x"), "usage": usage})["usage"] == wanted
    *_, end = events_of(ASKED, {"choices": [{"index": 0, "delta": {"content": "x"}}]}, {"choices": [], "usage": usage})
    assert end["response"]["usage"] == wanted
    plain = {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}
    assert not {"depth", "rewiring"} & set(to_response(ASKED, {**answer(content="x"), "usage": plain})["usage"])


@pytest.mark.parametrize("delta", [{"content": 5}, {"refusal": 5}, {"content": ["a"]}])
def test_what_fails_at_text_that_is_none_fails_once(delta):
    made = ResponseStream({"model": "m"})
    list(made.begin())
    list(made.add({"choices": [{"index": 0, "delta": {"content": "well"}}]}))
    with pytest.raises(TypeError, match="text of a chunk is"):
        list(made.add({"choices": [{"index": 0, "delta": delta}]}))
    list(made.fail("no answer", "upstream_garbage"))
    assert made.response["status"] == "failed"
    assert made.response["output"][0]["content"][0]["text"] == "well"
