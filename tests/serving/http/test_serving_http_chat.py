"""Chat and text completions over HTTP: shapes, parameters, streams that say what the whole answer says."""

import json

import pytest

from anabranch.serving.core.request import Sampling
from fake_engine import Script
from serving_thread import HELLO, events, serving, streamed

TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def said():
    """A server that says what its script says."""
    with serving(Script(say="one two three four")) as running:
        yield running


def last_sampling(server) -> Sampling:
    return server.script.requests[-1].sampling


def test_a_whole_answer(server):
    status, headers, body = server.chat(max_tokens=5)
    assert status == 200
    assert body["object"] == "chat.completion"
    assert body["model"] == "fake"
    assert body["system_fingerprint"].startswith("fp_")
    [choice] = body["choices"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": "User:", "refusal": None},
        "logprobs": None,
        "finish_reason": "length",
    }
    prompt = len(server.script.requests[-1].prompt)
    assert body["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 5,
        "total_tokens": prompt + 5,
        "prompt_tokens_details": {"cached_tokens": prompt // 16 * 16},
    }
    assert headers["x-route-model"] == "fake"
    assert headers["x-route-layers"] == "2"


def test_a_stream_says_what_the_whole_answer_says(server):
    whole = server.chat(max_tokens=12)[2]
    status, headers, raw = server.chat(max_tokens=12, stream=True)
    assert status == 200
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    made = events(raw)
    assert made[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert made[-1] == "[DONE]"
    assert made[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert {event["object"] for event in made[:-1]} == {"chat.completion.chunk"}
    assert len({event["id"] for event in made[:-1]}) == 1
    assert all("usage" not in event for event in made[:-1])
    assert streamed(raw) == whole["choices"][0]["message"]["content"]


def test_usage_in_a_stream(server):
    raw = server.chat(max_tokens=3, stream=True, stream_options={"include_usage": True})[2]
    made = events(raw)[:-1]
    assert [event["usage"] for event in made[:-1]] == [None] * (len(made) - 1)
    assert made[-1]["choices"] == []
    assert made[-1]["usage"] == server.chat(max_tokens=3)[2]["usage"]


@pytest.mark.parametrize(
    "stop", ["three", ["zzz", "two"], [" four"], ["x", "wo th", "two thr"], "one two three four", "nothing"]
)
def test_stop_strings_do_not_leak(said, stop):
    text = "one two three four"
    stops = [stop] if isinstance(stop, str) else stop
    ends = [(text.find(one) + len(one), one) for one in stops if one in text]
    expected = text[: min(ends)[0] - len(min(ends)[1])] if ends else text
    status, _, whole = said.chat(stop=stop)
    assert status == 200
    assert whole["choices"][0]["message"]["content"] == expected
    assert whole["choices"][0]["finish_reason"] == "stop"
    assert whole["usage"]["completion_tokens"] == (min(ends)[0] if ends else len(text))
    assert streamed(said.chat(stop=stop, stream=True)[2]) == expected


def test_a_stop_string_ends_the_request_in_the_engine(said):
    said.chat(stop="two")
    assert said.script.requests[-1].id in said.engine.aborted


def test_characters_are_never_split():
    text = "año 日本 🙂 end"
    with serving(Script(say=text)) as running:
        made = events(running.complete(stream=True, max_tokens=100)[2])[:-1]
        parts = [event["choices"][0]["text"] for event in made]
        assert "".join(parts) == text
        assert not any("\ufffd" in part for part in parts)
        cut = running.complete(max_tokens=2)[2]  # in the middle of one
        assert cut["choices"][0]["text"] == "a\ufffd"
        assert streamed(running.complete(max_tokens=2, stream=True)[2]) == "a\ufffd"


@pytest.mark.parametrize("is_stream", [False, True])
def test_several_choices(server, is_stream):
    status, _, body = server.chat(n=3, seed=7, max_tokens=4, stream=is_stream)
    assert status == 200
    requests = server.script.requests[-3:]
    assert sorted(request.sampling.seed for request in requests) == [7, 8, 9]
    assert len({request.id for request in requests}) == 3
    if is_stream:
        assert [streamed(body, at) for at in range(3)] == ["User"] * 3
        ends = [event["choices"][0] for event in events(body)[:-1] if event["choices"][0]["finish_reason"]]
        assert sorted(end["index"] for end in ends) == [0, 1, 2]
    else:
        assert [choice["message"]["content"] for choice in body["choices"]] == ["User"] * 3
        assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
        assert body["usage"]["completion_tokens"] == 12
        assert body["usage"]["prompt_tokens"] == len(requests[0].prompt)


def test_every_sampling_parameter_reaches_the_engine(server):
    given = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "seed": -3,
        "presence_penalty": 1.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.2,
        "min_tokens": 2,
        "ignore_eos": True,
    }
    more = {
        "max_tokens": 9,
        "logit_bias": {"65": -100, "66": 3.5},
        "stop_token_ids": [10],
        "priority": -2,
        "cache_salt": "pepper",
    }
    assert server.chat(**given, **more)[0] == 200
    sampling, request = last_sampling(server), server.script.requests[-1]
    assert {name: getattr(sampling, name) for name in given} == {**given, "seed": 2**63 - 3}
    assert sampling.max_tokens == 9
    assert sampling.logit_bias == ((65, -100.0), (66, 3.5))
    assert sampling.stop_tokens == (10,)
    assert (request.priority, request.own_priority, request.cache_salt) == (0, -2, "pepper")


def test_how_many_tokens_there_may_be(server):
    server.chat(max_tokens=3, max_completion_tokens=4)
    assert last_sampling(server).max_tokens == 4
    server.chat()
    assert last_sampling(server).max_tokens == 4096 - len(server.script.requests[-1].prompt)
    server.complete()
    assert last_sampling(server).max_tokens == 16
    server.chat(top_k=-1)
    assert last_sampling(server).top_k == 0


def test_parameters_that_are_null_are_not_there(server):
    names = (
        "temperature",
        "top_p",
        "n",
        "stop",
        "seed",
        "logit_bias",
        "tools",
        "response_format",
        "stream",
        "user",
        "audio",
        "store",
    )
    assert server.chat(max_tokens=2, **dict.fromkeys(names))[0] == 200
    assert last_sampling(server) == Sampling(max_tokens=2)


@pytest.mark.parametrize(
    ("form", "grammar"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {}),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}, "strict": True}},
            {"type": "integer"},
        ),
    ],
)
def test_the_form_of_the_answer(server, form, grammar):
    assert server.chat(max_tokens=2, response_format=form)[0] == 200
    assert last_sampling(server).grammar == grammar


def test_logprobs_of_a_chat(server):
    body = server.chat(max_tokens=2, logprobs=True, top_logprobs=2)[2]
    [first, second] = body["choices"][0]["logprobs"]["content"]
    assert first == {
        "token": "U",
        "logprob": -0.5,
        "bytes": [85],
        "top_logprobs": [
            {"token": "U", "logprob": -0.5, "bytes": [85]},
            {"token": "V", "logprob": -1.5, "bytes": [86]},
        ],
    }
    assert second["token"] == "s"
    assert server.chat(max_tokens=1, logprobs=True)[2]["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    made = events(server.chat(max_tokens=4, logprobs=True, stream=True, stop=["er"])[2])[:-1]
    told = [row["token"] for event in made for row in (event["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert told == ["U", "s"]  # what a stop string has taken away is not told


def test_logprobs_of_a_completion(server):
    body = server.complete(prompt="abc", max_tokens=3, logprobs=1)[2]
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["a", "b", "c"],
        "token_logprobs": [-0.5] * 3,
        "top_logprobs": [{"a": -0.5}, {"b": -0.5}, {"c": -0.5}],
        "text_offset": [0, 1, 2],
    }


def test_completions(server):
    status, _, body = server.complete(prompt="abc", max_tokens=10)
    assert status == 200
    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "text": "abc", "logprobs": None, "finish_reason": "stop"}]
    raw = server.complete(prompt="abc", max_tokens=10, stream=True)[2]
    assert streamed(raw) == "abc"
    assert events(raw)[-2]["choices"][0]["finish_reason"] == "stop"


def test_several_prompts_of_text_and_tokens(server):
    body = server.complete(prompt=["ab", "cde"], n=2, max_tokens=9)[2]
    assert [choice["text"] for choice in body["choices"]] == ["ab", "ab", "cde", "cde"]
    assert body["usage"]["prompt_tokens"] == 5
    assert server.complete(prompt=[104, 105])[2]["choices"][0]["text"] == "hi"
    assert server.complete(prompt=[104] * 300, max_tokens=1)[2]["usage"]["prompt_tokens"] == 300
    assert [choice["text"] for choice in server.complete(prompt=[[104], "x"])[2]["choices"]] == ["h", "x"]


@pytest.mark.parametrize("is_stream", [False, True])
def test_echo(server, is_stream):
    body = server.complete(prompt="abc", echo=True, stream=is_stream)[2]
    text = streamed(body) if is_stream else body["choices"][0]["text"]
    assert text == "abcabc"


def test_echo_of_the_prompt_alone(server):
    before = len(server.script.requests)
    body = server.complete(prompt=["abc", "d"], echo=True, max_tokens=0)[2]
    assert [choice["text"] for choice in body["choices"]] == ["abc", "d"]
    assert body["usage"]["completion_tokens"] == 0
    assert len(server.script.requests) == before


def test_routing_on_request(server):
    status, headers, body = server.complete(prompt="ab", routing=True)
    assert status == 200
    assert body["routing"] == {
        "arm": "fake",
        "experts": {"1": {"1": 1, "2": 2, "3": 1}, "3": {"1": 1, "2": 2, "3": 1}},
        "depth": 2.0,
        "tokens": 2,
    }
    rows = body["choices"][0]["routing"]["tokens"]
    assert rows[0] == {"text": "a", "experts": {"1": [1, 2], "3": [1, 2]}}
    assert headers["x-route-experts"] == "1=2*2,1*1,3*1;3=2*2,1*1,3*1"
    made = events(server.complete(prompt="ab", routing=True, stream=True)[2])[:-1]
    assert [row for event in made[:-1] for row in event["choices"][0]["routing"]["tokens"]] == rows
    assert made[-1]["routing"] == body["routing"]
    assert "routing" not in server.complete(prompt="ab")[2]


def test_the_parts_of_a_message_are_joined(server):
    parts = [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]
    whole = server.chat()[2]["choices"][0]["message"]["content"]
    assert server.chat(messages=[{"role": "user", "content": parts}])[2]["choices"][0]["message"]["content"] == whole


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ghent"}}\n</tool_call>'


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_of_a_tool(choice, is_stream):
    with serving(Script(say=CALL)) as running:
        body = running.chat(tools=[TOOL], tool_choice=choice, stream=is_stream)[2]
        assert (last_sampling(running).grammar is None) == (choice == "auto")
        assert "weather" in bytes(running.script.requests[-1].prompt).decode()  # the model is told of it
        call = the_call(body, is_stream)
        assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("weather", {"city": "Ghent"})
        assert call["id"].startswith("call_")
        assert call["type"] == "function"


@pytest.mark.parametrize(("is_parallel", "count"), [(True, 2), (False, 1)])
def test_several_calls(is_parallel, count):
    with serving(Script(say=f"Let me see. {CALL}\n{CALL}")) as running:
        body = running.chat(tools=[TOOL], parallel_tool_calls=is_parallel)[2]
        message = body["choices"][0]["message"]
        assert message["content"] == "Let me see."
        assert len(message["tool_calls"]) == count
        made = events(running.chat(tools=[TOOL], parallel_tool_calls=is_parallel, stream=True)[2])[:-1]
        calls = [call for event in made for call in event["choices"][0]["delta"].get("tool_calls", ())]
        assert [call["index"] for call in calls if "id" in call] == list(range(count))
        assert sorted({call["index"] for call in calls}) == list(range(count))


def test_a_call_of_a_tool_that_nobody_offered_is_text():
    text = '<tool_call>\n{"name": "launch", "arguments": {}}\n</tool_call>'
    with serving(Script(say=text)) as running:
        [choice] = running.chat(tools=[TOOL])[2]["choices"]
        assert "tool_calls" not in choice["message"]
        assert "launch" in choice["message"]["content"]
        assert choice["finish_reason"] == "stop"


def the_call(body, is_stream):
    """The one call of an answer that ends in it."""
    if not is_stream:
        assert body["choices"][0]["finish_reason"] == "tool_calls"
        assert body["choices"][0]["message"]["content"] is None
        [call] = body["choices"][0]["message"]["tool_calls"]
        return call
    parts = [event["choices"][0] for event in events(body)[:-1]]
    assert parts[-1]["finish_reason"] == "tool_calls"
    deltas = [call for part in parts for call in part["delta"].get("tool_calls", ())]
    assert {call["index"] for call in deltas} == {0}
    arguments = "".join(call["function"].get("arguments", "") for call in deltas)
    return {**deltas[0], "function": {**deltas[0]["function"], "arguments": arguments}}


def test_tools_that_are_not_wanted(server):
    assert server.chat(tools=[TOOL], tool_choice="none", max_tokens=3)[2]["choices"][0]["message"]["content"] == "Use"


def test_the_request_id_is_echoed(server):
    assert server.ask("/v1/chat/completions", HELLO, x_request_id="mine-1")[1]["x-request-id"] == "mine-1"
    assert server.ask("/v1/chat/completions", HELLO, x_request_id="not\tgood")[1]["x-request-id"].startswith("req_")
