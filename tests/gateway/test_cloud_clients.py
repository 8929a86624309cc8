"""The clients of OpenAI and Anthropic through a real gateway in front of every kind of provider, on recorded conversations."""

import json

import pytest

from gateway_process import served
from recorded_conversations import KEY, exchanges, played

openai = pytest.importorskip("openai")
KINDS = ("azure", "azure_v1", "bedrock", "gemini", "ollama", "openrouter", "vertex")
GOOGLES = ("gemini", "vertex")
EMBEDS = ("azure", "azure_v1", "gemini", "ollama", "vertex")
ASKED = [
    {"role": "system", "content": "Be brief."},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "What is the weather here?"},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}},
        ],
    },
]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Of today.", "parameters": SCHEMA}}]


def providers(url):
    """Of every kind, as an operator would configure it."""
    google = {"model": "gemini-2.5-flash", "base_url": url, "thoughts": True, "thinking_budget": 1024}
    return {
        "azure": {"kind": "azure", "model": "chat eu", "base_url": url},
        "azure_v1": {"kind": "azure", "model": "chat eu", "base_url": f"{url}/openai/v1/", "api_version": "v1"},
        "bedrock": {
            "kind": "bedrock",
            "model": "us.anthropic.claude-sonnet-4-20250514-v1:0",
            "base_url": url,
            "region": "us-east-1",
            "fields": {"top_k": 40},
        },
        "gemini": {"kind": "gemini", **google},
        "ollama": {
            "kind": "ollama",
            "model": "qwen3:8b",
            "base_url": url,
            "num_ctx": 8192,
            "keep_alive": "10m",
            "think": True,
        },
        "openrouter": {
            "kind": "openrouter",
            "model": "qwen/qwen3-32b",
            "base_url": f"{url}/api/v1",
            "routing": {"order": ["Together"], "allow_fallbacks": False},
            "models": ["meta-llama/llama-3.3-70b-instruct"],
            "reasoning": {"effort": "low"},
            "headers": {"HTTP-Referer": "https://example.com"},
        },
        "vertex": {
            "kind": "vertex",
            **google,
            "project": "acme-1",
            "location": "europe-west4",
            "key_env": "VERTEX_KEY",
        },
    }


KEYS = ("AZURE_OPENAI_API_KEY", "AWS_BEARER_TOKEN_BEDROCK", "GEMINI_API_KEY", "OPENROUTER_API_KEY", "VERTEX_KEY")


@pytest.fixture(scope="module")
def upstream():
    with played(*(exchanges(kind) for kind in KINDS)) as server:
        yield server


@pytest.fixture(scope="module")
def gateway(upstream, tmp_path_factory):
    path = tmp_path_factory.mktemp("gateway") / "gateway.json"
    models = [
        {"name": name, "price": {"input_usd": 1, "output_usd": 2}, "deployments": [{"provider": provider}]}
        for name, provider in providers(upstream.url).items()
    ]
    path.write_text(json.dumps({"models": models, "retries": {"attempts": 1}, "require_key": False}))
    with served("--config", str(path), environment=dict.fromkeys(KEYS, KEY)) as running:
        yield running


@pytest.fixture
def client(gateway, upstream):
    del upstream.faults[:]
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="anything", max_retries=0, timeout=60) as made:
        yield made
    assert not upstream.faults, "\n".join(upstream.faults)
    assert KEY not in gateway.log.read_text()


def settings(kind, messages):
    return {"model": kind, "messages": messages, "tools": TOOLS, "max_tokens": 64, "temperature": 0.5}


def follow(message):
    """The conversation after the tool was called: the message goes back as it came."""
    kept = {name: message[name] for name in ("tool_calls", "thinking_blocks", "reasoning_content") if message.get(name)}
    [call] = kept["tool_calls"]
    for one in (call, *kept.get("thinking_blocks", ())):
        one.pop("index", None)
    answer = {"role": "tool", "tool_call_id": call["id"], "content": "rain, 9 degrees"}
    return [*ASKED, {"role": "assistant", "content": None, **kept}, answer]


def check_call(choice):
    [call] = choice.message.tool_calls
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == (
        "function",
        "weather",
        {"city": "Ghent"},
    )
    assert call.id
    assert choice.finish_reason == "tool_calls"


def check_usage(usage, prompt, completion, kind, cached):
    assert (usage.prompt_tokens, usage.completion_tokens) == (prompt, completion)
    assert usage.total_tokens == prompt + completion
    if cached and kind != "ollama":
        assert usage.prompt_tokens_details.cached_tokens == cached


def thought(message):
    return getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_with_a_tool(client, upstream, kind):
    made = client.chat.completions.create(**settings(kind, ASKED))
    check_call(made.choices[0])
    check_usage(made.usage, 90, 16, kind, 0)
    assert kind.startswith("azure") or thought(made.choices[0].message) == "Look it up."
    made = client.chat.completions.create(**settings(kind, follow(made.choices[0].message.to_dict())))
    assert kind not in GOOGLES or "thoughtSignature" in json.dumps(upstream.bodies[-1])
    assert made.choices[0].message.content == "It rains in Ghent."
    assert made.choices[0].finish_reason == "stop"
    check_usage(made.usage, 120, 6, kind, 64)


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_with_a_tool(client, upstream, kind):
    def streamed(messages):
        with client.chat.completions.stream(
            **settings(kind, messages), stream_options={"include_usage": True}
        ) as stream:
            texts = [event.delta for event in stream if event.type == "content.delta"]
            return stream.get_final_completion(), [text for text in texts if text]

    made, texts = streamed(ASKED)
    check_call(made.choices[0])
    check_usage(made.usage, 90, 16, kind, 0)
    assert texts == []
    assert kind.startswith("azure") or thought(made.choices[0].message) == "Look it up."
    made, texts = streamed(follow(made.choices[0].message.to_dict(exclude_none=True)))
    assert kind not in GOOGLES or "thoughtSignature" in json.dumps(upstream.bodies[-1])
    assert texts == ["It rains", " in Ghent."]
    assert made.choices[0].message.content == "It rains in Ghent."
    assert made.choices[0].finish_reason == "stop"
    check_usage(made.usage, 120, 6, kind, 64)


@pytest.mark.parametrize("kind", EMBEDS)
def test_embeddings(client, kind):
    made = client.embeddings.create(model=kind, input=["one", "two"], encoding_format="float")
    assert [one.embedding for one in made.data] == [[0.25, -0.5], [1.0, 0.125]]
    assert made.usage.prompt_tokens > 0


# Anthropic's client

BLOCKS = [
    {"type": "text", "text": "What is the weather here?"},
    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}},
]


@pytest.fixture
def messages(gateway, upstream):
    """Asks through the client of Anthropic."""
    anthropic = pytest.importorskip("anthropic")
    del upstream.faults[:]
    with anthropic.Anthropic(base_url=gateway.url, api_key="anything", max_retries=0, timeout=60) as made:
        yield made.messages
    assert not upstream.faults, "\n".join(upstream.faults)


def of_anthropic(kind, turns):
    tools = [{"name": "weather", "description": "Of today.", "input_schema": SCHEMA}]
    return {
        "model": kind,
        "system": "Be brief.",
        "messages": turns,
        "tools": tools,
        "max_tokens": 64,
        "extra_body": {"temperature": 0.5},
    }


def whole(client, **asked):
    return client.create(**asked)


def streamed(client, **asked):
    with client.stream(**asked) as stream:
        for _ in stream:
            pass
        return stream.get_final_message()


@pytest.mark.parametrize("ask", [whole, streamed])
@pytest.mark.parametrize("kind", KINDS)
def test_anthropics_client_with_a_tool(messages, upstream, kind, ask):
    turns = [{"role": "user", "content": BLOCKS}]
    made = ask(messages, **of_anthropic(kind, turns))
    [use] = [block for block in made.content if block.type == "tool_use"]
    assert (use.name, use.input, made.stop_reason) == ("weather", {"city": "Ghent"}, "tool_use")
    assert (made.usage.input_tokens, made.usage.output_tokens) == (90, 16)
    said = [block.model_dump(exclude_none=True) for block in made.content]
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "rain, 9 degrees"}
    turns += [{"role": "assistant", "content": said}, {"role": "user", "content": [result]}]
    made = ask(messages, **of_anthropic(kind, turns))
    # What it thought has gone back to it, with what it is signed by.
    assert kind not in (*GOOGLES, "ollama", "bedrock", "openrouter") or "Look it up." in json.dumps(upstream.bodies[-1])
    assert kind not in GOOGLES or "thoughtSignature" in json.dumps(upstream.bodies[-1])
    assert ("".join(block.text for block in made.content if block.type == "text"), made.stop_reason) == (
        "It rains in Ghent.",
        "end_turn",
    )
    assert made.usage.output_tokens == 6
