"""What has come of a stream: bytes of text as they stand in JSON, and which usage is that of all of it."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.dispatch.stream_tally import Tally
from anabranch.gateway.providers.provider import Usage

FULL = {"prompt_tokens": 5, "completion_tokens": 7}
SAID = Usage(5, 7)


def event(field, text, **dump):
    return b"data: " + json.dumps({"choices": [{"delta": {field: text}}]}, **dump).encode() + b"\n\n"


@given(st.text(min_size=1), st.booleans(), st.sampled_from(["content", "reasoning_content", "arguments", "refusal"]))
def test_bytes_are_never_fewer_than_they_are(text, is_ascii, field):
    tally = Tally(1, 1)
    tally.count(event(field, text, ensure_ascii=is_ascii) if text.isprintable() else event(field, text))
    real = len(text.encode("utf-8", "surrogatepass"))
    assert (tally.texts, real <= tally.text_bytes) == (1, True)
    assert tally.at_most(1.0) >= real + 1


# What a text of JSON is, letter by letter; and one whose end has not come.
_LETTERS = re.compile(rb'"content"\s*:\s*"((?:[^"\\]|\\.)+)"')
_LETTERS_BEGUN = re.compile(rb'"content"\s*:\s*"((?:[^"\\]|\\.)+)')


@given(
    st.lists(
        st.sampled_from([b'"content":"', b"a", b"bc", b"\\", b'\\"', b'"', b"\\u00e9", b"\n", b", "]), max_size=12
    ).map(b"".join)
)
def test_texts_taken_in_runs_are_those_taken_letter_by_letter(raw):
    for count, naive in (("count", _LETTERS), ("count_begun", _LETTERS_BEGUN)):
        tally = Tally(1, 1)
        getattr(tally, count)(raw)
        assert tally.texts == len(naive.findall(raw))
        if count == "count_begun":
            assert tally.text_bytes == sum(map(len, naive.findall(raw)))


@given(st.text('ab\\"\né', min_size=1), st.data())
def test_of_half_an_event_what_is_there_counts(text, data):
    raw = event("content", text)
    cut = data.draw(st.integers(0, len(raw)))
    tally = Tally(1, 1)
    tally.count_begun(raw[:cut])
    start = raw.index(b'content": "') + 11
    assert tally.text_bytes >= min(cut, len(raw) - 7) - start - 1


def test_an_escape_counts_as_what_it_stands_for():
    tally = Tally(1, 1)
    tally.count(event("content", '中文\n"'))
    assert tally.text_bytes == 3 + 3 + 1 + 1


@pytest.mark.parametrize(
    ("delta", "num_bytes", "thought", "media"),
    [
        ({"content": 'he said "audio": {"thinking": ["reasoning_details"]}'}, 52, False, False),
        (
            {"content": "a", "reasoning_content": "", "reasoning_details": [], "audio": None, "images": []},
            1,
            False,
            False,
        ),
        ({"reasoning_content": "abc"}, 3, True, False),
        ({"reasoning_details": [{"type": "reasoning.summary", "summary": "abc"}]}, 3, True, False),
        ({"reasoning_details": [{"type": "reasoning.encrypted", "data": "AAAA"}]}, 0, True, False),
        ({"thinking_blocks": [{"type": "redacted_thinking", "data": "AAAA"}]}, 0, True, False),
        (
            {"tool_calls": [{"index": 0, "type": "custom", "custom": {"name": "f", "input": "print(1)"}}]},
            9,
            False,
            False,
        ),
        ({"audio": {"data": "AAAA"}}, 0, False, True),
        ({"audio": {"transcript": "hm"}}, 2, False, True),
        ({"images": [{"image_url": {"url": "data:image/png;base64,AAAA"}}]}, 0, False, True),
    ],
)
@pytest.mark.parametrize("is_whole", [True, False])
def test_which_fields_have_text_and_which_what_is_none(delta, num_bytes, thought, media, is_whole):
    tally = Tally(1, 1)
    data = b"data: " + json.dumps({"choices": [{"delta": delta}]}).encode()
    tally.count(data + b"\n\n") if is_whole else tally.count_begun(data)
    assert (tally.has_thought, tally.has_media) == (thought, media)
    assert (tally.text_bytes if is_whole else max(tally.text_bytes, num_bytes)) >= num_bytes
    assert tally.text_bytes <= num_bytes + 16


def test_spaces_in_json_hide_no_text():
    tally = Tally(1, 1)
    tally.count(b'data: {"choices" : [{"delta" : {"content" :  "abc"}}]}\n\n')
    assert tally.text_bytes == 3


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        (["text", ("usage", True)], True),
        (["text", ("usage", False)], True),
        ([("usage", False), "text"], False),
        ([("usage", True), "text"], True),
        (["text"], False),
    ],
)
def test_which_usage_is_that_of_the_whole(steps, told):
    tally = Tally(3, 1)
    for step in steps:
        if step == "text":
            tally.count(event("content", "hello"))
        else:
            tally.hear({"choices": [], "usage": FULL}, step[1])
    assert tally.is_told(True) == told
    assert (tally.counted(True) == SAID) == told


def test_in_the_middle_only_a_usage_behind_the_end_is_that_of_the_whole():
    tally = Tally(3, 1)
    tally.hear({"choices": [{}], "usage": FULL}, True)
    assert (tally.is_told(False), tally.is_told(True)) == (False, True)
    tally.hear({"choices": [], "usage": FULL}, True)
    assert tally.is_told(False)


def test_zeros_are_nothing_and_a_completion_without_a_prompt_is_a_least():
    tally = Tally(3, 1)
    tally.hear({"usage": {"prompt_tokens": 0, "completion_tokens": 0}}, True)
    assert (tally.told, tally.is_told(True)) == (None, False)
    tally.hear({"usage": {"prompt_tokens": 0, "completion_tokens": 9}}, True)
    assert (tally.told, tally.counted(True)) == (Usage(0, 9), Usage(3, 9, 0, True))


def used(prompt, completion, **more):
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion, **more}}


def test_what_is_said_later_takes_nothing_back():
    tally = Tally(3, 1)
    for said in (used(5, 7), used(6, 0), used(2, None, cost=0.5), used(5, 1, cost=0)):
        tally.hear(said, True)
    assert tally.counted(True) == Usage(6, 7, nano=500_000_000)


@pytest.mark.parametrize(
    ("completion", "num_bytes", "echoes", "told"),
    [
        (0, 256, False, True),
        (0, 257, False, False),
        (1, 257, False, False),
        (2, 9999, False, True),
        (1, 9999, True, True),
        (0, 0, False, True),
    ],
)
def test_no_text_is_made_of_nothing(completion, num_bytes, echoes, told):
    tally = Tally(3, 1, echoes)
    if num_bytes:
        tally.count(event("content", "a" * num_bytes))
    tally.hear(used(5, completion), True)
    assert tally.is_told(True) == told
    usage = tally.counted(True)
    assert (usage.prompt, usage.completion, usage.is_estimated) == (
        5,
        completion if told else num_bytes // 4,
        not told,
    )


def text_of(added):
    return {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": added}}


def argument_of(added):
    return {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": added}}


@given(st.lists(st.tuples(st.booleans(), st.text(min_size=1, max_size=9)), max_size=9))
def test_what_is_said_in_two_forms_counts_once_and_what_is_said_in_one_counts_too(pieces):
    """S5 and F4 of R20c: arguments for tools that run at the provider come in a message's own form alone."""
    tally = Tally(1, 1)
    for is_text, piece in pieces:
        if is_text:
            tally.count(event("content", piece))
        tally.count_native(text_of(piece) if is_text else argument_of(piece))
    real = sum(len(piece.encode("utf-8", "surrogatepass")) for _, piece in pieces)
    escaped = sum(len(json.dumps(piece)) * 3 for _, piece in pieces)
    assert tally.texts == len(pieces)
    assert real <= tally.text_bytes <= max(real, escaped)


@pytest.mark.parametrize(
    "value",
    [
        {"type": "response.output_text.delta", "delta": "abc"},
        {"type": "response.mcp_call_arguments.delta", "delta": "abc"},
        text_of("abc"),
        argument_of("abc"),
        {"delta": {"thinking": "abc", "text": None, "partial_json": 7}},
    ],
)
def test_what_an_event_of_another_form_adds(value):
    tally = Tally(1, 1)
    tally.count_native(value)
    assert (tally.texts, tally.text_bytes) == (1, 3)


@pytest.mark.parametrize(
    "value",
    [
        {"type": "response.output_text.done", "text": "abc"},
        {"type": "response.completed", "response": {"output": [{"content": [{"text": "abc"}]}]}},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}},
        {"delta": ["abc"]},
        {},
    ],
)
def test_what_is_said_again_adds_nothing(value):
    tally = Tally(1, 1)
    tally.count_native(value)
    assert (tally.texts, tally.text_bytes) == (0, 0)


def test_arguments_that_stand_in_a_block_count():
    tally = Tally(1, 1)
    tally.count(b'data: {"delta": {"type": "input_json_delta", "partial_json": "abc"}}\n\n')
    assert (tally.texts, tally.text_bytes) == (1, 3)
