"""Requests in the forms of clouds, against their documentation."""

import json

import pytest

from anabranch.gateway.providers import UpstreamError, UpstreamRequest
from anabranch.gateway.providers.assembling import assembled
from anabranch.gateway.providers.content_lists import is_mistral
from anabranch.web.messages import to_chat
from cloud_providers import CLAUDE, chat, keys, made, sent
from recorded_conversations import exchanges

__all__ = ["keys"]
pytestmark = pytest.mark.usefixtures("keys")


def test_gemini_is_asked_with_all_that_it_knows():
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    body = sent(
        "gemini",
        config={"safety": {"HARM_CATEGORY_HARASSMENT": "BLOCK_NONE"}},
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "a"}]},
            {"role": "system", "content": "b"},
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "https://x/y.png?z=1"}},
                    {"type": "input_audio", "input_audio": {"format": "wav", "data": "AAAA"}},
                    {"type": "file", "file": {"file_data": "data:application/pdf;base64,BBBB"}},
                ],
            },
        ],
        n=2,
        top_k=5,
        top_p=0.5,
        seed=7,
        stop=["x"],
        response_format=form,
        reasoning_effort="high",
        logprobs=True,
        max_completion_tokens=9,
        tool_choice={"type": "function", "function": {"name": "f"}},
        tools=[{"type": "function", "function": {"name": "f"}}],
    )
    assert body == {
        "contents": [
            {
                "role": "user",
                "parts": [
                    {"fileData": {"mimeType": "image/png", "fileUri": "https://x/y.png?z=1"}},
                    {"inlineData": {"mimeType": "audio/wav", "data": "AAAA"}},
                    {"inlineData": {"mimeType": "application/pdf", "data": "BBBB"}},
                ],
            }
        ],
        "systemInstruction": {"parts": [{"text": "a\n\nb"}]},
        "safetySettings": [{"category": "HARM_CATEGORY_HARASSMENT", "threshold": "BLOCK_NONE"}],
        "tools": [{"functionDeclarations": [{"name": "f", "description": ""}]}],
        "toolConfig": {"functionCallingConfig": {"mode": "ANY", "allowedFunctionNames": ["f"]}},
        "generationConfig": {
            "topP": 0.5,
            "topK": 5,
            "seed": 7,
            "candidateCount": 2,
            "maxOutputTokens": 9,
            "stopSequences": ["x"],
            "responseLogprobs": True,
            "logprobs": 0,
            "responseMimeType": "application/json",
            "responseJsonSchema": {"type": "object"},
            "thinkingConfig": {"thinkingBudget": 24576},
        },
    }


@pytest.mark.parametrize(
    ("model", "thinking", "effort", "config"),
    [
        (
            "gemini-2.5-flash",
            {"type": "enabled", "budget_tokens": 2048},
            None,
            {"includeThoughts": True, "thinkingBudget": 2048},
        ),
        ("gemini-2.5-flash", {"type": "adaptive"}, None, {"includeThoughts": True, "thinkingBudget": -1}),
        ("gemini-2.5-flash", {"type": "disabled"}, None, {"thinkingBudget": 0}),
        ("gemini-2.5-pro", {"type": "disabled"}, None, {"thinkingBudget": 128}),
        ("gemini-2.5-flash", {"type": "adaptive"}, "low", {"includeThoughts": True, "thinkingBudget": 1024}),
        ("gemini-3-pro-preview", {"type": "adaptive"}, "low", {"includeThoughts": True, "thinkingLevel": "low"}),
        ("gemini-2.0-flash", {"type": "adaptive"}, None, None),
        ("gemini-2.5-flash-image", {"type": "adaptive"}, None, None),
    ],
)
def test_what_anthropics_form_says_of_thinking_reaches_gemini(model, thinking, effort, config):
    body = {"model": "m", "max_tokens": 4096, "messages": [{"role": "user", "content": "hi"}], "thinking": thinking}
    body |= {} if effort is None else {"output_config": {"effort": effort}}
    request = UpstreamRequest("chat", to_chat(body), is_foreign=True)
    sent_body = json.loads(made("gemini", model=model).build(request).body)
    assert sent_body["generationConfig"].get("thinkingConfig") == config


def test_ollama_thinks_unless_it_is_told_not_to():
    def think(thinking):
        body = {"model": "m", "max_tokens": 4096, "messages": [{"role": "user", "content": "hi"}], "thinking": thinking}
        return json.loads(made("ollama").build(UpstreamRequest("chat", to_chat(body), is_foreign=True)).body).get(
            "think"
        )

    assert think({"type": "disabled"}) is False
    # Models that cannot would refuse.
    assert think({"type": "enabled", "budget_tokens": 1024}) is None


@pytest.mark.parametrize(
    ("model", "is_own"),
    [
        ("magistral-medium-latest", True),
        ("mistral-small-2506", True),
        ("mistralai/Magistral-Small-2509", False),
        ("magistral:24b", False),
        ("mistral", False),
        ("qwen3", False),
    ],
)
def test_only_the_models_of_mistrals_own_api_are_given_thoughts_in_parts(model, is_own):
    assert is_mistral(model) == is_own


def test_gemini_is_asked_for_pictures():
    assert sent("gemini", modalities=["text", "image"])["generationConfig"] == {"responseModalities": ["TEXT", "IMAGE"]}
    assert "generationConfig" not in sent("gemini", modalities=["text"])


def test_gemini_3_gets_words_for_thinking_and_a_mark_for_calls_of_other_models():
    calls = [{"id": str(at), "type": "function", "function": {"name": "f", "arguments": "{}"}} for at in range(2)]
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "0", "content": "x"},
        {"role": "tool", "tool_call_id": "1", "content": "y"},
    ]
    body = sent("gemini", config={"model": "gemini-3-pro-preview"}, messages=messages, reasoning_effort="low")
    assert body["generationConfig"]["thinkingConfig"] == {"thinkingLevel": "low"}
    first, second = body["contents"][1]["parts"]
    assert first["thoughtSignature"] == "skip_thought_signature_validator"
    assert "thoughtSignature" not in second
    results = [part["functionResponse"]["response"]["output"] for part in body["contents"][2]["parts"]]
    assert results == ["x", "y"]
    assert "thoughtSignature" not in json.dumps(sent("gemini", messages=messages))


def test_bedrock_is_asked_with_all_that_it_knows():
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    body = sent(
        "bedrock",
        config={
            "guardrail": {"guardrailIdentifier": "g", "guardrailVersion": "1"},
            "fields": {"anthropic_beta": ["b"]},
            "model": CLAUDE_45,
        },
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "data:image/jpg;base64,AAAA"}},
                    {"type": "file", "file": {"file_data": "data:text/plain;base64,BBBB"}},
                ],
            },
            {"role": "assistant", "content": "ok", "thinking_blocks": [{"type": "redacted_thinking", "data": "R"}]},
            {"role": "user", "content": "b"},
        ],
        top_p=0.5,
        temperature=1.5,
        stop="x",
        response_format=form,
        reasoning_effort="high",
        max_tokens=3000,
    )
    assert body == {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"image": {"format": "jpeg", "source": {"bytes": "AAAA"}}},
                    {"document": {"format": "txt", "name": "file-1", "source": {"bytes": "BBBB"}}},
                ],
            },
            {"role": "assistant", "content": [{"reasoningContent": {"redactedContent": "R"}}, {"text": "ok"}]},
            {"role": "user", "content": [{"text": "b"}]},
        ],
        "inferenceConfig": {"maxTokens": 3000, "topP": 0.5, "stopSequences": ["x"]},
        "additionalModelRequestFields": {
            "anthropic_beta": ["b"],
            "thinking": {"type": "enabled", "budget_tokens": 2999},
        },
        "guardrailConfig": {"guardrailIdentifier": "g", "guardrailVersion": "1"},
        "outputConfig": {
            "textFormat": {
                "type": "json_schema",
                "structure": {
                    "jsonSchema": {"schema": '{"type": "object"}', "name": "a"},
                },
            }
        },
    }
    # No room to think in beside the answer.
    assert "additionalModelRequestFields" not in sent("bedrock", reasoning_effort="low", max_tokens=1000)
    assert sent("bedrock", temperature=1.5)["inferenceConfig"] == {"temperature": 1.0}
    other = sent("bedrock", config={"model": "openai.gpt-oss-120b-1:0"}, reasoning_effort="low")
    assert other["additionalModelRequestFields"] == {"reasoning_effort": "low"}


CLAUDE_45, NOVA = "us.anthropic.claude-sonnet-4-5-20250929-v1:0", "us.amazon.nova-pro-v1:0"
FORM = {"type": "json_schema", "json_schema": {"name": "a", "description": "Of it.", "schema": {"type": "object"}}}


@pytest.mark.parametrize(("model", "form"), [(CLAUDE, FORM), (NOVA, FORM), (CLAUDE_45, {"type": "json_object"})])
def test_a_model_of_bedrock_that_takes_no_schema_answers_by_a_tool(model, form):
    body = sent(
        "bedrock", config={"model": model}, response_format=form, reasoning_effort="high" if model != NOVA else None
    )
    assert "outputConfig" not in body
    [tool] = body["toolConfig"]["tools"]
    assert body["toolConfig"]["toolChoice"] == {"tool": {"name": tool["toolSpec"]["name"]}}
    assert tool["toolSpec"]["inputSchema"]["json"]["type"] == "object"
    # Before a tool that must be called Claude does not think.
    assert "additionalModelRequestFields" not in body
    usage = {"inputTokens": 3, "outputTokens": 2, "totalTokens": 5}
    use = {"name": tool["toolSpec"]["name"], "toolUseId": "t", "input": {"city": "Ghent"}}
    whole = {
        "output": {"message": {"content": [{"text": "Here:"}, {"toolUse": use}]}},
        "stopReason": "tool_use",
        "usage": usage,
    }
    provider = made("bedrock", model=model)
    choice = provider.parse(chat(response_format=form), json.dumps(whole).encode()).body["choices"][0]
    assert (json.loads(choice["message"]["content"]), choice["finish_reason"]) == ({"city": "Ghent"}, "stop")
    assert "tool_calls" not in choice["message"]
    translator = provider.translator(chat(response_format=form, stream=True))
    start = {
        "contentBlockStart": {"contentBlockIndex": 0, "start": {"toolUse": {"name": use["name"], "toolUseId": "t"}}}
    }
    deltas = [
        {"contentBlockDelta": {"contentBlockIndex": 0, "delta": {"toolUse": {"input": one}}}}
        for one in ('{"city"', ':"Ghent"}')
    ]
    events = [
        start,
        *deltas,
        {"contentBlockStop": {"contentBlockIndex": 0}},
        {"messageStop": {"stopReason": "tool_use"}},
    ]
    chunks = [chunk for event in events for chunk in translator.feed(json.dumps(event).encode())]
    assert assembled(chunks)["choices"][0] == {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": '{"city":"Ghent"}'},
    }


def test_other_models_of_bedrock_are_given_the_schema_or_refuse():
    body = sent("bedrock", config={"model": "qwen.qwen3-32b-v1:0"}, response_format=FORM)
    assert body["outputConfig"]["textFormat"]["structure"]["jsonSchema"] == {
        "schema": '{"type": "object"}',
        "name": "a",
        "description": "Of it.",
    }
    with pytest.raises(UpstreamError, match="json_object"):
        sent("bedrock", config={"model": "qwen.qwen3-32b-v1:0"}, response_format={"type": "json_object"})


def asked_of_claude(model=CLAUDE_45, **fields):
    """What a request of Anthropic's form becomes on Bedrock."""
    body = {"model": "m", "max_tokens": 4096, "messages": [{"role": "user", "content": "hi"}], **fields}
    request = UpstreamRequest("chat", to_chat(body), is_foreign=True)
    return json.loads(made("bedrock", model=model).build(request).body)


DOCUMENTS = [
    {
        "type": "document",
        "source": {"type": "text", "media_type": "text/plain", "data": "one"},
        "title": "A_b: c/d",
        "context": "of it",
    },
    {
        "type": "document",
        "source": {"type": "content", "content": [{"type": "text", "text": "two"}]},
        "citations": {"enabled": True},
    },
    {
        "type": "document",
        "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0="},
        "title": "p.pdf",
        "context": "c",
    },
    {"type": "search_result", "source": "https://x.org", "title": "T", "content": [{"type": "text", "text": "three"}]},
    {"type": "text", "text": "Read."},
]


def test_documents_in_words_are_documents_on_bedrock():
    body = asked_of_claude(messages=[{"role": "user", "content": DOCUMENTS}])
    assert body["messages"][0]["content"] == [
        {"document": {"format": "txt", "name": "A b c d 0", "source": {"text": "one"}, "context": "of it"}},
        {
            "document": {
                "format": "txt",
                "name": "file-1",
                "source": {"content": [{"text": "two"}]},
                "citations": {"enabled": True},
            }
        },
        {"document": {"format": "pdf", "name": "p pdf 2", "source": {"bytes": "JVBERi0="}, "context": "c"}},
        {"searchResult": {"source": "https://x.org", "title": "T", "content": [{"text": "three"}]}},
        {"text": "Read."},
    ]
    assert "Read." in json.dumps(
        asked_of_claude(model=NOVA, messages=[{"role": "user", "content": [DOCUMENTS[0], DOCUMENTS[4]]}])
    )
    image = {"type": "content", "content": [{"type": "image", "source": {}}]}
    for part in (
        {"type": "document", "source": {"type": "url", "url": "https://x"}},
        {"type": "document", "source": image},
    ):
        with pytest.raises(UpstreamError, match="cannot be sent to bedrock"):
            asked_of_claude(messages=[{"role": "user", "content": [part]}])


ADAPTIVE, BUDGET, OPUS = {"type": "adaptive"}, {"type": "enabled", "budget_tokens": 2048}, "anthropic.claude-opus-4-"


@pytest.mark.parametrize(
    ("model", "thinking", "effort", "fields"),
    [
        (f"{OPUS}6-v1", ADAPTIVE, "high", {"thinking": ADAPTIVE, "output_config": {"effort": "high"}}),
        (f"{OPUS}6-v1", ADAPTIVE, "xhigh", {"thinking": ADAPTIVE, "output_config": {"effort": "high"}}),
        (f"{OPUS}7", None, "max", {"thinking": ADAPTIVE, "output_config": {"effort": "max"}}),
        (f"{OPUS}7", BUDGET, None, {"thinking": ADAPTIVE}),
        (CLAUDE_45, BUDGET, "low", {"thinking": BUDGET}),
    ],
)
def test_how_hard_claude_works_on_bedrock_is_said_beside_how_it_thinks(model, thinking, effort, fields):
    more = ({"thinking": thinking} if thinking else {}) | ({"output_config": {"effort": effort}} if effort else {})
    assert asked_of_claude(model, **more)["additionalModelRequestFields"] == fields


def test_output_config_and_strict_tools_reach_bedrock():
    tool = {"name": "f", "input_schema": {"type": "object"}, "strict": True}
    form = {"format": {"type": "json_schema", "schema": {"type": "object"}}}
    body = asked_of_claude(tools=[tool], output_config=form)
    assert body["toolConfig"]["tools"][0]["toolSpec"]["strict"] is True
    assert body["outputConfig"]["textFormat"]["structure"]["jsonSchema"]["schema"] == '{"type": "object"}'


def test_what_is_sent_to_bedrock_is_what_amazons_own_client_would_send():
    session = pytest.importorskip("botocore.session").Session()
    from botocore.validate import ParamValidator

    shape = session.get_service_model("bedrock-runtime").operation_model("Converse").input_shape
    own = [
        asked_of_claude(messages=[{"role": "user", "content": DOCUMENTS}]),
        asked_of_claude(output_config={"format": {"type": "json_schema", "schema": {"type": "object"}}}),
        asked_of_claude(tools=[{"name": "f", "input_schema": {"type": "object"}, "strict": True}]),
        sent("bedrock", response_format={"type": "json_object"}),
    ]
    for given in (*own, *(exchange["request"]["body"] for exchange in exchanges("bedrock"))):
        body = given | {"modelId": CLAUDE}
        assert not ParamValidator().validate(body, shape).has_errors(), body


def test_ollama_is_asked_with_all_that_it_knows():
    body = sent(
        "ollama",
        config={"keep_alive": "-1"},
        messages=[{"role": "assistant", "content": "a", "reasoning_content": "b"}, {"role": "user", "content": "c"}],
        stop="x",
        seed=7,
        top_k=5,
        reasoning_effort="none",
        tool_choice="none",
        max_tokens=3,
        response_format={"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
        tools=[{"type": "function", "function": {"name": "f"}}],
    )
    assert body == {
        "model": "qwen3:8b",
        "stream": False,
        "think": False,
        "format": {"type": "object"},
        "keep_alive": -1,
        "messages": [
            {"role": "assistant", "content": "a", "thinking": "b"},
            {"role": "user", "content": "c"},
        ],
        "options": {"seed": 7, "top_k": 5, "num_predict": 3, "stop": ["x"]},
    }
    assert sent("ollama", response_format={"type": "json_object"})["format"] == "json"


def test_openrouter_keeps_what_the_sender_says():
    config = {"routing": {"sort": "price"}, "models": ["b"], "reasoning": {"effort": "low"}}
    own = {"provider": {"only": ["x"]}, "models": ["c"], "reasoning_effort": "high", "usage": {"include": False}}
    body = sent("openrouter", config=config, **own)
    assert {name: body.get(name) for name in (*own, "reasoning")} == {**own, "reasoning": None}
    assert "usage" not in sent("openrouter", config={"tells_cost": False})


@pytest.mark.parametrize("kind", ["bedrock", "gemini", "ollama", "vertex"])
@pytest.mark.parametrize(
    "fields",
    [
        {"messages": ["x"]},
        {"messages": 7},
        {"messages": [{"role": "user", "content": 7}]},
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}]},
        {"messages": [{"role": "assistant", "tool_calls": [{}]}]},
        {"tools": [{"type": "function"}]},
        {"tools": ["f"]},
        {"response_format": "json"},
    ],
)
def test_a_request_of_another_shape_is_the_senders_mistake(kind, fields):
    if kind == "ollama" and fields.get("tools") == [{"type": "function"}]:
        fields = {"tools": [{"type": "function"}, "f"]}
    with pytest.raises(UpstreamError) as caught:
        made(kind).build(chat(**fields))
    assert (caught.value.failure.kind, caught.value.status) == ("request", 400)


@pytest.mark.parametrize("kind", ["bedrock", "gemini", "ollama", "vertex"])
@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ("[" + "[]," * 70_000 + "[]]", "more than 65,536"),
        ('{"a":' * 10_000 + "1" + "}" * 10_000, "too deep"),
        ("{", "no JSON"),
        ("[]", "no object"),
    ],
)
def test_arguments_that_cannot_be_read_are_the_senders_mistake(kind, arguments, why):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    with pytest.raises(UpstreamError, match=why) as caught:
        made(kind).build(chat(messages=[{"role": "assistant", "tool_calls": [call]}]))
    assert caught.value.failure.kind == "request"


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("bedrock", {"n": 2}),
        ("bedrock", {"tools": [{"function": {"name": "f"}}], "parallel_tool_calls": False}),
        ("bedrock", {"logprobs": True}),
        ("bedrock", {"response_format": {"type": "json_object"}, "tools": [{"function": {"name": "f"}}]}),
        (
            "bedrock",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x"}}]}]},
        ),
        ("gemini", {"logit_bias": {"1": 2}}),
        ("gemini", {"reasoning_effort": "xhigh"}),
        ("gemini", {"tools": [{"type": "custom", "custom": {"name": "f"}}]}),
        ("ollama", {"n": 2}),
        ("ollama", {"tools": [{"function": {"name": "f"}}], "tool_choice": "required"}),
        (
            "ollama",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x"}}]}]},
        ),
        ("vertex", {"messages": [{"role": "user", "content": [{"type": "other"}]}]}),
    ],
)
def test_what_has_no_counterpart_goes_to_another_model(kind, fields):
    with pytest.raises(UpstreamError) as caught:
        made(kind).build(chat(**fields))
    assert caught.value.failure.kind == "unsupported"
    with pytest.raises(UpstreamError) as caught:
        made(kind).build(UpstreamRequest("completions", {"prompt": "x"}))
    assert caught.value.failure.kind == "unsupported"


MARK = {"cache_control": {"type": "ephemeral"}}
POINT = {"cachePoint": {"type": "default"}}


def test_marks_of_the_cache_are_points_for_claude_on_bedrock_and_nothing_elsewhere():
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "a", **MARK}]},
        {
            "role": "user",
            "content": [{"type": "text", "text": "b", "cache_control": {"type": "ephemeral", "ttl": "1h"}}],
        },
        {
            "role": "assistant",
            "content": "c",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}, **MARK},
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "x", "is_error": True, **MARK},
    ]
    tools = [{"type": "function", "function": {"name": "f"}, **MARK}]
    body = sent("bedrock", messages=messages, tools=tools)
    use = {"toolUse": {"toolUseId": "1", "name": "f", "input": {}}}
    result = {"toolResult": {"toolUseId": "1", "content": [{"text": "x"}], "status": "error"}}
    assert body["system"] == [{"text": "a"}, POINT]
    assert [turn["content"] for turn in body["messages"]] == [
        [{"text": "b"}, {"cachePoint": {"type": "default", "ttl": "1h"}}],
        [{"text": "c"}, use, POINT],
        [result, POINT],
    ]
    assert body["toolConfig"]["tools"][1:] == [POINT]
    assert "cachePoint" not in json.dumps(
        sent("bedrock", config={"model": "meta.llama3-8b"}, messages=messages, tools=tools)
    )


@pytest.mark.parametrize(
    ("model", "settings", "fields"),
    [
        ("anthropic.claude-opus-4-7", {}, {"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}),
        (
            "anthropic.claude-sonnet-4-5-20250929-v1:0",
            {"topP": 0.5},
            {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        ),
        ("anthropic.claude-3-haiku-20240307-v1:0", {"temperature": 0.5, "topP": 0.5}, {"top_k": 9}),
        ("amazon.nova-pro-v1:0", {"temperature": 0.5, "topP": 0.5}, {"top_k": 9, "reasoning_effort": "low"}),
    ],
)
def test_each_model_on_bedrock_gets_what_it_takes(model, settings, fields):
    body = sent("bedrock", config={"model": model}, reasoning_effort="low", temperature=0.5, top_p=0.5, top_k=9)
    assert body.get("inferenceConfig", {}) == settings
    assert body["additionalModelRequestFields"] == fields


@pytest.mark.parametrize("kind", ["azure", "gemini", "ollama", "openrouter", "vertex"])
def test_what_came_in_anthropics_form_is_put_into_words_that_all_know(kind):
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "a", **MARK},
                {"type": "document", "source": {"type": "text", "data": "b"}},
            ],
        },
        {
            "role": "assistant",
            "content": "c",
            "thinking_blocks": [{"type": "thinking", "thinking": "t", "signature": "s"}],
        },
    ]
    body = {"model": "x", "messages": messages, "context_management": {"edits": []}}
    made_of = made(kind).build(UpstreamRequest("chat", body, is_foreign=True)).body.decode()
    for word in ("cache_control", "signature", "context_management", "document"):
        assert word not in made_of
    assert '"b"' in made_of or "\\nb" in made_of
