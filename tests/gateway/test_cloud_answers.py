"""Answers of clouds in OpenAI's form, against their documentation."""

import json

import pytest

from anabranch.gateway.providers import UpstreamError, UpstreamRequest
from anabranch.gateway.providers.assembling import assembled
from anabranch.gateway.providers.usage import Usage
from cloud_providers import chat, keys, made
from recorded_conversations import exchanges

__all__ = ["keys"]
pytestmark = pytest.mark.usefixtures("keys")


@pytest.mark.parametrize(
    ("kind", "reply"),
    [
        ("bedrock", {"output": {"message": {"content": [7]}}}),
        ("bedrock", {"output": {}}),
        ("gemini", {"candidates": [{"content": {"parts": [7]}}]}),
        ("gemini", {"candidates": 7}),
        ("gemini", {}),
        ("gemini", {"candidates": [], "usageMetadata": {"promptTokenCount": -1}}),
        ("ollama", {"message": 7}),
        ("ollama", {"message": {"content": "a"}, "eval_count": "many"}),
        ("ollama", {}),
    ],
)
def test_an_answer_of_another_shape_is_garbage(kind, reply):
    provider = made(kind)
    with pytest.raises(UpstreamError) as caught:
        provider.parse(chat(), json.dumps(reply).encode())
    assert caught.value.failure.kind == "garbage"


@pytest.mark.parametrize(
    ("kind", "reply", "reason"),
    [
        ("gemini", {"candidates": [{"finishReason": "MAX_TOKENS"}]}, "length"),
        ("gemini", {"candidates": [{"finishReason": "SAFETY"}]}, "content_filter"),
        ("gemini", {"candidates": [{"finishReason": "MALFORMED_FUNCTION_CALL"}]}, "content_filter"),
        ("bedrock", {"stopReason": "max_tokens"}, "length"),
        ("bedrock", {"stopReason": "stop_sequence"}, "stop"),
        ("bedrock", {"stopReason": "guardrail_intervened"}, "content_filter"),
        ("bedrock", {"stopReason": "model_context_window_exceeded"}, "length"),
        ("ollama", {"done_reason": "length"}, "length"),
    ],
)
def test_why_an_answer_ended(kind, reply, reason):
    whole = {
        "gemini": {"usageMetadata": {"promptTokenCount": 3}},
        "bedrock": {"output": {"message": {"content": []}}, "usage": {"inputTokens": 3, "outputTokens": 0}},
        "ollama": {"message": {"content": ""}, "prompt_eval_count": 3},
    }[kind]
    answer = made(kind).parse(chat(), json.dumps({**whole, **reply}).encode())
    assert answer.finish_reason == reason
    assert answer.usage.prompt == 3


@pytest.mark.parametrize(
    ("given", "content"),
    [
        ({"chosenCandidates": [{"token": "a", "logProbability": -0.5}]}, [("a", -0.5, [])]),
        (
            {
                "chosenCandidates": [{"token": "a", "logProbability": 0}, {"token": "b"}, 7, None],
                "topCandidates": [{"candidates": [{"token": "c"}, {"token": "d", "logProbability": -1}, "x"]}, 5],
            },
            [("a", 0, ["d"])],
        ),
        ({"chosenCandidates": [{"token": "a", "logProbability": None}], "topCandidates": {"0": 1}}, [("a", None, [])]),
        ({"chosenCandidates": 7}, []),
        ([1], None),
        ("x", None),
        ({}, None),
    ],
)
def test_odd_log_probabilities_of_gemini_lose_no_answer(given, content):
    body = {"candidates": [{"content": {"parts": [{"text": "hi"}]}, "finishReason": "STOP", "logprobsResult": given}]}
    [choice] = made("gemini").parse(chat(), json.dumps(body).encode()).body["choices"]
    assert choice["message"]["content"] == "hi"
    found = choice.get("logprobs")
    told = (
        None
        if found is None
        else [(one["token"], one["logprob"], [top["token"] for top in one["top_logprobs"]]) for one in found["content"]]
    )
    assert told == content


def test_a_prompt_that_gemini_blocks_is_filtered():
    body = {"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": {"promptTokenCount": 3}}
    provider = made("gemini")
    for read in (lambda data: provider.parse(chat(), data), provider.translator(chat(stream=True)).feed):
        with pytest.raises(UpstreamError, match="SAFETY") as caught:
            read(json.dumps(body).encode())
        assert caught.value.failure.kind == "filter"


def test_two_candidates_of_a_stream_end_each_for_itself():
    translator = made("gemini").translator(chat(stream=True, n=2))

    def fed(index, reason=None):
        ends = {"finishReason": reason} if reason else {}
        candidate = {"index": index, "content": {"parts": [{"text": "a"}]}, **ends}
        usage = {"promptTokenCount": 1, "candidatesTokenCount": 2}
        return translator.feed(json.dumps({"candidates": [candidate], "usageMetadata": usage}).encode())

    assert not any("usage" in chunk for chunk in [*fed(0), *fed(0, "STOP"), *fed(1)])
    assert not translator.is_done
    assert fed(1, "STOP")[-1]["usage"]["completion_tokens"] == 2
    assert translator.is_done


def test_embeddings_as_base64_are_little_endian_floats():
    request = UpstreamRequest("embeddings", {"input": "a", "encoding_format": "base64"})
    answer = made("ollama").parse(request, b'{"model": "m", "embeddings": [[1.0, -2.0]], "prompt_eval_count": 1}')
    assert answer.body["data"][0]["embedding"] == "AACAPwAAAMA="


def test_bedrocks_embeddings():
    titan, cohere = made("bedrock", model="amazon.titan-embed-text-v2:0"), made("bedrock", model="cohere.embed-v4:0")
    one = UpstreamRequest("embeddings", {"input": "a", "dimensions": 256})
    assert json.loads(titan.build(one).body) == {"inputText": "a", "dimensions": 256}
    assert titan.build(one).url.endswith("/model/amazon.titan-embed-text-v2%3A0/invoke")
    answer = titan.parse(one, b'{"embedding": [0.5], "inputTextTokenCount": 4}')
    assert (answer.body["data"][0]["embedding"], answer.usage.prompt) == ([0.5], 4)
    two = UpstreamRequest("embeddings", {"input": ["a", "b"]})
    with pytest.raises(UpstreamError, match="one text a request"):
        titan.build(two)
    assert json.loads(cohere.build(two).body) == {"texts": ["a", "b"], "input_type": "search_document"}
    for vectors in ([[1.0], [2.0]], {"float": [[1.0], [2.0]]}):
        answer = cohere.parse(two, json.dumps({"embeddings": vectors}).encode())
        assert [item["embedding"] for item in answer.body["data"]] == [[1.0], [2.0]]
    with pytest.raises(UpstreamError, match="cannot be asked"):
        titan.build(chat())


def test_what_tokens_are_of_is_told_where_a_provider_tells_it():
    counts = {
        "promptTokenCount": 300,
        "toolUsePromptTokenCount": 5,
        "candidatesTokenCount": 10,
        "thoughtsTokenCount": 4,
        "cachedContentTokenCount": 100,
        "promptTokensDetails": [
            {"modality": "TEXT", "tokenCount": 10},
            {"modality": "IMAGE", "tokenCount": 258},
            {"modality": "AUDIO", "tokenCount": 32},
        ],
    }
    body = {"candidates": [{"content": {"parts": [{"text": "a"}]}, "finishReason": "STOP"}], "usageMetadata": counts}
    answer = made("gemini").parse(chat(), json.dumps(body).encode())
    usage = answer.usage
    assert (usage.prompt, usage.completion, usage.cached, usage.image_input, usage.audio_input) == (
        305,
        14,
        100,
        258,
        32,
    )
    assert answer.body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 4}
    assert Usage.of(answer.body) == usage


@pytest.mark.parametrize(
    ("details", "split"),
    [(None, (50, 0)), ([{"ttl": "1h", "inputTokens": 20}, {"ttl": "5m", "inputTokens": 30}], (30, 20))],
)
def test_bedrock_tells_what_was_put_into_the_cache(details, split):
    told = {"inputTokens": 10, "outputTokens": 3, "cacheReadInputTokens": 40, "cacheWriteInputTokens": 50}
    told |= {} if details is None else {"cacheDetails": details}
    body = {"output": {"message": {"content": [{"text": "a"}]}}, "stopReason": "end_turn", "usage": told}
    usage = made("bedrock").parse(chat(), json.dumps(body).encode()).usage
    assert (usage.prompt, usage.completion, usage.cached) == (100, 3, 40)
    assert (usage.cache_write, usage.cache_write_1h) == split


def test_openrouter_tells_what_it_cost():
    whole = exchanges("openrouter")[0]["reply"]["json"]
    assert made("openrouter").parse(chat(), json.dumps(whole).encode()).usage.nano == 23_100


def test_two_calls_of_a_stream_of_bedrocks_stay_two():
    translator = made("bedrock").translator(chat(stream=True))
    chunks = []
    for at, name in enumerate("fg"):
        use = {"toolUse": {"name": name, "toolUseId": name}}
        chunks += translator.feed(json.dumps({"contentBlockStart": {"contentBlockIndex": at, "start": use}}).encode())
        delta = {"toolUse": {"input": json.dumps({"is": name})}}
        chunks += translator.feed(json.dumps({"contentBlockDelta": {"contentBlockIndex": at, "delta": delta}}).encode())
    calls = assembled(chunks)["choices"][0]["message"]["tool_calls"]
    assert [(call["id"], call["function"]["arguments"]) for call in calls] == [
        ("f", '{"is": "f"}'),
        ("g", '{"is": "g"}'),
    ]


@pytest.mark.parametrize("deltas", [[], [""], ["", '{"a":', "1}"]])
def test_a_streamed_call_of_bedrocks_without_arguments_has_an_empty_object_of_them(deltas):
    translator, at = made("bedrock").translator(chat(stream=True)), {"contentBlockIndex": 0}
    events = [
        {"contentBlockStart": {**at, "start": {"toolUse": {"name": "now", "toolUseId": "t"}}}},
        *({"contentBlockDelta": {**at, "delta": {"toolUse": {"input": one}}}} for one in deltas),
        {"contentBlockStop": at},
    ]
    chunks = [chunk for event in events for chunk in translator.feed(json.dumps(event).encode())]
    [call] = assembled(chunks)["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "now", "arguments": "".join(deltas) or "{}"}


def test_a_tool_that_runs_at_amazon_is_no_call_of_the_senders():
    uses = [
        {"name": "nova_grounding", "toolUseId": "s", "type": "server_tool_use"},
        {"name": "now", "toolUseId": "t"},
    ]
    content = [{"toolUse": {**use, "input": {"is": use["name"]}}} for use in uses]
    body = {
        "output": {"message": {"role": "assistant", "content": content}},
        "stopReason": "tool_use",
        "usage": {"inputTokens": 1, "outputTokens": 2, "totalTokens": 3},
    }
    whole = made("bedrock").parse(chat(), json.dumps(body).encode()).body
    translator, chunks = made("bedrock").translator(chat(stream=True)), []
    for at, use in enumerate(uses):
        delta = {"toolUse": {"input": json.dumps({"is": use["name"]})}}
        for name, more in (("Start", {"start": {"toolUse": use}}), ("Delta", {"delta": delta}), ("Stop", {})):
            event = {f"contentBlock{name}": {"contentBlockIndex": at, **more}}
            chunks += translator.feed(json.dumps(event).encode())
    for answer in (whole, assembled(chunks)):
        [call] = answer["choices"][0]["message"]["tool_calls"]
        assert (call["id"], json.loads(call["function"]["arguments"])) == ("t", {"is": "now"})


def test_what_openrouter_thought_is_put_together_whole():
    chunks = [event for event in exchanges("openrouter")[2]["reply"]["events"] if isinstance(event, dict)]
    whole = assembled(chunks)["choices"][0]["message"]
    assert whole["reasoning"] == "Look it up."
    assert [detail["text"] for detail in whole["reasoning_details"]] == ["Look it up."]
