"""The clients of OpenAI and Anthropic before every kind of provider: words and structured output, whole and streamed; and errors.

Calls of tools are in ``test_cloud_clients`` and ``test_gateway_anthropic_client``.
"""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from gateway_process import served
from recorded_conversations import KEY, exchanges, played

anthropic, openai = pytest.importorskip("anthropic"), pytest.importorskip("openai")
KINDS = ("anthropic", "azure", "azure_v1", "bedrock", "gemini", "ollama", "openai", "openrouter", "vertex")
CLIENTS = ("openai", "anthropic")
KEYS = (
    "ANTHROPIC_API_KEY",
    "AWS_BEARER_TOKEN_BEDROCK",
    "AZURE_OPENAI_API_KEY",
    "GEMINI_API_KEY",
    "OPENAI_API_KEY",
    "OPENROUTER_API_KEY",
    "VERTEX_KEY",
)
ASKED = [{"role": "user", "content": "Which city is it?"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
WORDS, FORMED = "Ghent, on the Leie.", {"city": "Ghent"}


def providers(url):
    """Of every kind, as an operator would configure it."""
    google = {"model": "gemini-2.5-flash", "base_url": url, "thoughts": True, "thinking_budget": 1024}
    openrouter = {
        "model": "qwen/qwen3-32b",
        "base_url": f"{url}/api/v1",
        "routing": {"order": ["Together"], "allow_fallbacks": False},
        "models": ["meta-llama/llama-3.3-70b-instruct"],
        "reasoning": {"effort": "low"},
        "headers": {"HTTP-Referer": "https://example.com"},
    }
    claude = "us.anthropic.claude-sonnet-4-20250514-v1:0"
    return {
        "anthropic": {"kind": "anthropic", "model": "claude-sonnet-4-5-20250929", "base_url": url},
        "azure": {"kind": "azure", "model": "chat eu", "base_url": url},
        "azure_v1": {"kind": "azure", "model": "chat eu", "base_url": f"{url}/openai/v1/", "api_version": "v1"},
        "bedrock": {
            "kind": "bedrock",
            "model": claude,
            "base_url": url,
            "region": "us-east-1",
            "fields": {"top_k": 40},
        },
        "gemini": {"kind": "gemini", **google},
        "mistral": {"kind": "openai", "model": "magistral-medium-latest", "base_url": f"{url}/mistral/v1"},
        "ollama": {
            "kind": "ollama",
            "model": "qwen3:8b",
            "base_url": url,
            "num_ctx": 8192,
            "keep_alive": "10m",
            "think": True,
        },
        "openai": {"kind": "openai", "model": "gpt-5.1", "base_url": f"{url}/openai/v1"},
        "openrouter": {"kind": "openrouter", **openrouter},
        "vertex": {
            "kind": "vertex",
            **google,
            "project": "acme-1",
            "location": "europe-west4",
            "key_env": "VERTEX_KEY",
        },
    }


@contextlib.contextmanager
def gateway_of(path, models):
    """A gateway process before these: providers by the names of models."""
    made = [{"name": name, "deployments": [{"provider": provider}]} for name, provider in models.items()]
    fields = {
        "retries": {"attempts": 1},
        "cache": {"exact": False},
        "store": str(path / "gateway.db"),
        "require_key": False,
    }
    (path / "gateway.json").write_text(json.dumps({"models": made, **fields}))
    with served("--config", str(path / "gateway.json"), environment=dict.fromkeys(KEYS, KEY)) as running:
        yield running


@contextlib.contextmanager
def clients_of(url):
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=60) as one,
        anthropic.Anthropic(base_url=url, api_key="any", max_retries=0, timeout=60) as other,
    ):
        yield {"openai": one, "anthropic": other}


@pytest.fixture(scope="module")
def upstream():
    with played(*(exchanges(f"{kind}_words") for kind in KINDS), exchanges("mistral")) as server:
        yield server


@pytest.fixture(scope="module")
def clients(upstream, tmp_path_factory):
    with failing() as url:
        # A model for each error of each client, so that the breaker of none is another's.
        models = {
            f"{kind}-{case}-{client}": providers(f"{url}/{kind}/{case}")[kind]
            for kind, case in CASES
            for client in CLIENTS
        }
        models |= providers(upstream.url)
        with gateway_of(tmp_path_factory.mktemp("words"), models) as running, clients_of(running.url) as made:
            yield made


def asked_of_openai(client, kind, is_formed, is_streamed):
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    fields = {"model": kind, "messages": ASKED, "max_tokens": 64} | ({"response_format": form} if is_formed else {})
    if is_streamed:
        with client.chat.completions.stream(**fields, stream_options={"include_usage": True}) as stream:
            for _ in stream:
                pass
            made = stream.get_final_completion()
    else:
        made = client.chat.completions.create(**fields)
    [choice] = made.choices
    assert (choice.finish_reason, choice.message.role) == ("stop", "assistant")
    assert not choice.message.tool_calls
    return choice.message.content, (made.usage.prompt_tokens, made.usage.completion_tokens)


def asked_of_anthropic(client, kind, is_formed, is_streamed):
    more = {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}} if is_formed else {}
    fields = {"model": kind, "messages": ASKED, "max_tokens": 64, "extra_body": more}
    if is_streamed:
        with client.messages.stream(**fields) as stream:
            for _ in stream:
                pass
            made = stream.get_final_message()
    else:
        made = client.messages.create(**fields)
    assert (made.stop_reason, made.role, made.type) == ("end_turn", "assistant", "message")
    [block] = made.content
    return block.text, (made.usage.input_tokens, made.usage.output_tokens)


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("is_formed", [False, True])
@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_words_and_structured_output(clients, upstream, kind, client, is_formed, is_streamed):
    del upstream.faults[:]
    ask = asked_of_openai if client == "openai" else asked_of_anthropic
    text, usage = ask(clients[client], kind, is_formed, is_streamed)
    assert not upstream.faults, "\n".join(upstream.faults)
    assert (json.loads(text) if is_formed else text) == (FORMED if is_formed else WORDS)
    assert usage == (12, 8)


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("client", CLIENTS)
def test_mistral_thinks_in_parts_and_is_given_them_back(clients, upstream, client, is_streamed):
    del upstream.faults[:]
    asked = {"model": "mistral", "messages": ASKED, "max_tokens": 64}
    more = {"role": "user", "content": "How many live there?"}
    if client == "openai":
        ask = clients["openai"].chat.completions
        if is_streamed:
            with ask.stream(**asked, stream_options={"include_usage": True}) as stream:
                texts = [event.delta for event in stream if event.type == "content.delta" and event.delta]
                made = stream.get_final_completion()
            assert texts == ["Ghent, on", " the Leie."]
        else:
            made = ask.create(**asked)
        message = made.choices[0].message
        assert (message.content, message.reasoning_content) == (WORDS, "The river is the Leie.")
        back = {"role": "assistant", "content": message.content, "reasoning_content": message.reasoning_content}
        found = ask.create(**{**asked, "messages": [*ASKED, back, more]}).choices[0].message.content
    else:
        ask = clients["anthropic"].messages
        if is_streamed:
            with ask.stream(**asked) as stream:
                made = stream.get_final_message()
        else:
            made = ask.create(**asked)
        assert [(block.type, getattr(block, block.type)) for block in made.content] == [
            ("thinking", "The river is the Leie."),
            ("text", WORDS),
        ]
        back = {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in made.content]}
        found = ask.create(**{**asked, "messages": [*ASKED, back, more]}).content[0].text
    assert not upstream.faults, "\n".join(upstream.faults)
    assert found == "About 270,000."


CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "weather", "description": "Of today."}
BOTH = [{"role": "user", "content": "How is the weather in Ghent and in Bruges?"}]


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("client", CLIENTS)
def test_calls_that_are_told_side_by_side(clients, upstream, client, is_streamed):
    """It was an error: Anthropic's blocks come one after the other."""
    del upstream.faults[:]
    if client == "openai":
        ask = clients["openai"].chat.completions
        tools = [{"type": "function", "function": {**WEATHER, "parameters": CITY}}]
        asked = {"model": "openai", "messages": BOTH, "tools": tools, "max_tokens": 64}
        if is_streamed:
            with ask.stream(**asked, stream_options={"include_usage": True}) as stream:
                made = stream.get_final_completion()
        else:
            made = ask.create(**asked)
        calls = [(call.id, json.loads(call.function.arguments)) for call in made.choices[0].message.tool_calls]
        said = [call.to_dict() for call in made.choices[0].message.tool_calls]
        said = [{name: call[name] for name in ("id", "type", "function")} for call in said]
        said = [{**call, "function": {name: call["function"][name] for name in ("name", "arguments")}} for call in said]
        turns = [{"role": "assistant", "content": None, "tool_calls": said}]
        turns += [{"role": "tool", "tool_call_id": id, "content": "rain"} for id, _ in calls]
        found = ask.create(**{**asked, "messages": [*BOTH, *turns]}).choices[0].message.content
    else:
        ask = clients["anthropic"].messages
        asked = {"model": "openai", "messages": BOTH, "tools": [{**WEATHER, "input_schema": CITY}], "max_tokens": 64}
        if is_streamed:
            with ask.stream(**asked) as stream:
                made = stream.get_final_message()
        else:
            made = ask.create(**asked)
        calls = [(block.id, block.input) for block in made.content]
        said = [{"type": "tool_use", "id": id, "name": "weather", "input": given} for id, given in calls]
        results = [{"type": "tool_result", "tool_use_id": id, "content": "rain"} for id, _ in calls]
        turns = [{"role": "assistant", "content": said}, {"role": "user", "content": results}]
        found = ask.create(**{**asked, "messages": [*BOTH, *turns]}).content[0].text
    assert not upstream.faults, "\n".join(upstream.faults)
    assert calls == [("call_g", {"city": "Ghent"}), ("call_b", {"city": "Bruges"})]
    assert found == "Rain in both."


# Errors: what each kind answers, as documented, and what either client makes of it


def openais(status, kind, code, message="Say no"):
    return status, {}, {"error": {"message": message, "type": kind, "param": None, "code": code}}


def anthropics(status, kind):
    return status, {}, {"type": "error", "error": {"type": kind, "message": "Say no"}, "request_id": "req_011"}


def amazons(status, name):
    return status, {"x-amzn-errortype": f"{name}:http://internal.amazon.com/coral/"}, {"message": "Say no"}


def googles(status, word, *details):
    return status, {}, {"error": {"code": status, "message": "Say no", "status": word, "details": list(details)}}


GOOGLE = {
    "request": googles(400, "INVALID_ARGUMENT"),
    "key": googles(
        400, "INVALID_ARGUMENT", {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}
    ),
    "forbidden": googles(403, "PERMISSION_DENIED"),
    "missing": googles(404, "NOT_FOUND"),
    "rate": googles(
        429, "RESOURCE_EXHAUSTED", {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "7s"}
    ),
    "broken": googles(500, "INTERNAL"),
    "busy": googles(503, "UNAVAILABLE"),
}
AZURE = {
    "request": openais(400, "invalid_request_error", None),
    "filter": (
        400,
        {},
        {"error": {"code": "content_filter", "message": "Say no", "param": "prompt", "status": 400, "type": None}},
    ),
    "key": (401, {}, {"error": {"code": "401", "message": "Say no"}}),
    "missing": (404, {}, {"error": {"code": "DeploymentNotFound", "message": "Say no"}}),
    "rate": (429, {"retry-after": "7"}, {"error": {"code": "429", "message": "Say no"}}),
    "broken": (500, {}, {"error": {"code": "InternalServerError", "message": "Say no"}}),
}
ERRORS = {
    "openai": {
        "request": openais(400, "invalid_request_error", "invalid_value"),
        "context": openais(400, "invalid_request_error", "context_length_exceeded"),
        "key": openais(401, "invalid_request_error", "invalid_api_key"),
        "missing": openais(404, "invalid_request_error", "model_not_found"),
        "rate": (429, {"retry-after": "7"}, openais(429, "requests", "rate_limit_exceeded")[2]),
        "credit": openais(429, "insufficient_quota", "insufficient_quota"),
        "broken": openais(500, "server_error", None),
        "busy": openais(503, "server_error", None),
    },
    "anthropic": {
        "request": anthropics(400, "invalid_request_error"),
        "key": anthropics(401, "authentication_error"),
        "credit": anthropics(402, "billing_error"),
        "forbidden": anthropics(403, "permission_error"),
        "missing": anthropics(404, "not_found_error"),
        "context": anthropics(413, "request_too_large"),
        "rate": (429, {"retry-after": "7"}, anthropics(429, "rate_limit_error")[2]),
        "broken": anthropics(500, "api_error"),
        "busy": anthropics(529, "overloaded_error"),
    },
    "azure": AZURE,
    "azure_v1": AZURE,
    "bedrock": {
        "request": amazons(400, "ValidationException"),
        "key": amazons(403, "UnrecognizedClientException"),
        "forbidden": amazons(403, "AccessDeniedException"),
        "missing": amazons(404, "ResourceNotFoundException"),
        "rate": amazons(429, "ThrottlingException"),
        "broken": amazons(500, "InternalServerException"),
        "busy": amazons(503, "ServiceUnavailableException"),
    },
    "gemini": GOOGLE,
    "vertex": GOOGLE,
    "ollama": {
        "request": (400, {}, {"error": "Say no"}),
        "missing": (404, {}, {"error": "Say no"}),
        "broken": (500, {}, {"error": "Say no"}),
    },
    "openrouter": {
        "request": (400, {}, {"error": {"code": 400, "message": "Say no"}}),
        "key": (401, {}, {"error": {"code": 401, "message": "Say no"}}),
        "credit": (402, {}, {"error": {"code": 402, "message": "Say no"}}),
        "filter": (403, {}, {"error": {"code": 403, "message": "Say no", "metadata": {"reasons": ["violence"]}}}),
        "rate": (429, {}, {"error": {"code": 429, "message": "Say no"}}),
        "broken": (502, {}, {"error": {"code": 502, "message": "Say no"}}),
    },
}
CASES = [(kind, case) for kind, cases in ERRORS.items() for case in cases]

# Status, and OpenAI's type and code, of what whoever asks is told. What is between the gateway and the provider (a key, an account) is
# none of theirs: to them the gateway is broken.
TOLD = {
    "request": (400, "invalid_request_error", {"invalid_request", "invalid_value"}),
    "context": (None, "invalid_request_error", {"context_length_exceeded"}),
    "filter": (None, "invalid_request_error", {"content_filter"}),
    "key": (502, "server_error", None),
    "credit": (502, "server_error", None),
    "forbidden": (403, "invalid_request_error", None),
    "missing": (404, "invalid_request_error", None),
    "rate": (429, None, None),
    "broken": (502, "server_error", None),
    "busy": (502, "server_error", None),
}
ANTHROPICS = {
    400: "invalid_request_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    502: "api_error",
}


@contextlib.contextmanager
def failing():
    """Answers every call with the error that its path names first: ``/KIND/CASE/...``."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            _, kind, case, *_ = self.path.split("/")
            status, headers, body = ERRORS[kind][case]
            data = json.dumps(body).encode()
            self.send_response(status)
            for name, value in {
                "content-type": "application/json",
                "content-length": str(len(data)),
                **headers,
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def error_of(client, clients, model, is_streamed):
    fields = {"model": model, "messages": ASKED, "max_tokens": 64, "stream": is_streamed}
    ask = clients["openai"].chat.completions.create if client == "openai" else clients["anthropic"].messages.create
    module = openai if client == "openai" else anthropic
    with pytest.raises(module.APIStatusError) as caught:
        ask(**fields)
    return caught.value


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize(("kind", "case"), CASES)
def test_errors_of_every_kind_are_those_that_the_clients_know(clients, kind, case, client):
    status, type, codes = TOLD[case]
    # One of the two is asked for a stream: the error comes before it.
    error = error_of(client, clients, f"{kind}-{case}-{client}", is_streamed=client == "anthropic")
    if status is None:
        status = ERRORS[kind][case][0]
    assert error.status_code == status
    assert error.request_id.startswith("req_")
    assert KEY not in str(error)
    if client == "openai":
        assert set(error.body) == {"message", "type", "code", "param"}
        assert "Say no" in error.body["message"]
        assert type is None or error.body["type"] == type
        assert codes is None or error.body["code"] in codes
    else:
        assert set(error.body) == {"type", "error", "request_id"}
        assert error.body["type"] == "error"
        assert "Say no" in error.body["error"]["message"]
        assert error.body["error"]["type"] == ANTHROPICS[status]
    if case == "rate" and ("retry-after" in ERRORS[kind][case][1] or kind in ("gemini", "vertex")):
        assert 0 < float(error.response.headers["retry-after"]) <= 7
