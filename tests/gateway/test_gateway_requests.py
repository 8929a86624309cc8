"""What a request may be, and how long its prompt is."""

import pytest

from anabranch.gateway.prompt_tokens import count_prompt, has_images, last_text, num_made, num_shown
from anabranch.gateway.validate import check_chat, check_completion, check_embeddings
from anabranch.web.api_error import ApiError
from anabranch.web.body import parse

HELLO = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


@pytest.mark.parametrize(
    ("raw", "code", "says"),
    [
        (b"", "invalid_json", "not JSON"),
        (b'{"model": ', "invalid_json", "line 1, column 11"),
        (b"[1]", "invalid_json", "is a list"),
        (b"3", "invalid_json", "is a number"),
        (b'{"a": NaN}', "invalid_json", "not JSON"),
        (b'{"a": "\xff"}', "invalid_utf8", "byte 7"),
        (b"\x00", "invalid_json", "not JSON"),
        (b"[" * 100_000, "invalid_json", "deep"),
        (b'{"a": 1' + b"0" * 5_000 + b"}", "invalid_json", "not JSON"),
    ],
)
def test_what_is_no_object_is_refused(raw, code, says):
    with pytest.raises(ApiError, match=says) as caught:
        parse(raw)
    assert (caught.value.status, caught.value.code) == (400, code)
    assert set(caught.value.to_dict()["error"]) == {"message", "type", "code", "param"}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"model": None}, "model"),
        ({"model": 3}, "model"),
        ({"model": " "}, "model"),
        ({"model": "a\r\nx-injected: 1"}, "model"),
        ({"model": "m" * 513}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [{"content": "hello"}]}, "messages[0].role"),
        ({"messages": [{"role": "wizard", "content": "hello"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "assistant", "tool_calls": 3}]}, "messages[0].tool_calls"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"max_completion_tokens": "10"}, "max_completion_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "0"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"n": 0}, "n"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": True}, "stream_options"),
        ({"stop": [1]}, "stop"),
        ({"seed": 1.5}, "seed"),
        ({"tools": {}}, "tools"),
        ({"tools": [{}]}, "tools"),
        ({"user": 3}, "user"),
    ],
)
def test_a_wrong_field_is_named(change, param):
    with pytest.raises(ApiError) as caught:
        check_chat({**HELLO, **change}, 1_000_000)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert param.split(".")[-1].split("[")[0] in str(caught.value)


def test_what_is_right_or_unknown_passes():
    check_chat(
        {**HELLO, "temperature": None, "max_tokens": 5, "n": 2, "stop": ["a"], "a_field_of_tomorrow": {"x": 1}}, 10
    )
    check_chat(
        {
            "model": "m",
            "messages": [{"role": "assistant", "tool_calls": [{"id": "c"}]}, {"role": "tool", "content": "4"}],
        },
        10,
    )
    check_completion({"model": "m", "prompt": ["a", "b"]}, 10)
    check_completion({"model": "m", "prompt": [1, 2]}, 10)
    check_embeddings({"model": "m", "input": [[1, 2], [3]], "encoding_format": "base64", "dimensions": 8})


@pytest.mark.parametrize("prompt", [None, 3, [], [None], [["a"]], [-1], [True], ["a", 1]])
def test_a_wrong_prompt_is_refused(prompt):
    for check in (
        lambda: check_completion({"model": "m", "prompt": prompt}, 10),
        lambda: check_embeddings({"model": "m", "input": prompt}),
    ):
        with pytest.raises(ApiError):
            check()


def test_an_error_never_repeats_a_long_text():
    secret = "a very private text " * 10
    with pytest.raises(ApiError) as caught:
        check_chat({**HELLO, "temperature": secret}, 10)
    assert "private" not in str(caught.value)


def test_a_prompt_is_counted_by_bytes_or_by_a_tokenizer():
    body = {"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "héllo"}]}
    count = count_prompt(body)
    # 2 messages of 4 around and 3 for the answer's head: 11; 7 and 6 bytes: 13, a quarter of it is 4 when rounded up
    assert (count.tokens, count.at_most, count.is_estimate) == (15, 24, True)
    count = count_prompt(body, lambda text: len(text.split()))
    assert (count.tokens, count.at_most, count.is_estimate) == (11 + 3, 14, False)


def test_images_and_token_ids_count_too():
    parts = [{"type": "text", "text": "abcd"}, {"type": "image_url", "image_url": {"url": "data:" + "x" * 10_000}}]
    body = {"messages": [{"role": "user", "content": parts}]}
    assert count_prompt(body).tokens == 7 + 1600 + 1
    assert count_prompt({"prompt": [1, 2, 3]}).tokens == 3
    assert count_prompt({"input": [[1, 2], [3]]}).tokens == 3
    assert count_prompt({"input": ["abcd", "efgh"]}).tokens == 2
    assert has_images(body["messages"])
    assert not has_images([{"role": "user", "content": "image_url"}])


@pytest.mark.parametrize(
    ("endpoint", "body", "shown", "made"),
    [
        ("chat", {}, 1, 1),
        ("chat", {"n": 3}, 3, 3),
        ("chat", {"n": None, "best_of": None}, 1, 1),
        ("completions", {"prompt": "a", "best_of": 4}, 1, 4),
        ("completions", {"prompt": ["a", "b"], "n": 2, "best_of": 3}, 4, 6),
        ("completions", {"prompt": [1, 2, 3], "n": 2}, 2, 2),
        ("completions", {"prompt": [[1], [2, 3]]}, 2, 2),
    ],
)
def test_answers_that_are_shown_and_those_that_are_made(endpoint, body, shown, made):
    assert (num_shown(endpoint, body), num_made(endpoint, body)) == (shown, made)


def test_the_text_of_a_query_is_the_last_user_message():
    messages = [
        {"role": "user", "content": "one"},
        {"role": "user", "content": [{"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "x"},
    ]
    assert last_text(messages) == "two"
    assert last_text(messages[2:]) == "x"
    assert last_text([]) == ""
    assert last_text([{"role": "user", "content": None}]) == ""
