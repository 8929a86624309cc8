"""The description of the routes, OpenAPI 3.1: ``GET /openapi.json``."""

from typing import Any

from anabranch.serving.core.rewires import SETTINGS

_TEXT: dict[str, Any] = {"type": "string"}
_NAME = {"type": "string", "minLength": 1, "maxLength": 256}
_OBJECT: dict[str, Any] = {"type": "object"}


def _maybe(kind: str, **more: Any) -> dict[str, Any]:
    return {"type": [kind, "null"], **more}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    """Null is as what is not said, here as of all fields that need not be said."""
    if "enum" in schema:
        return {"enum": [*schema["enum"], None]}
    return {**schema, "type": [schema["type"], "null"]}


def _integer(low: int, high: int = 2**31 - 1) -> dict[str, Any]:
    return _maybe("integer", minimum=low, maximum=high)


def _number(low: float, high: float) -> dict[str, Any]:
    return _maybe("number", minimum=low, maximum=high)


def _error() -> dict[str, Any]:
    nullable = {"type": ["string", "null"]}
    fields = {"message": _TEXT, "type": _TEXT, "code": nullable, "param": nullable}
    error = {"type": "object", "required": [*fields], "properties": fields}
    return {"type": "object", "required": ["error"], "properties": {"error": error}}


def _shared(most_n: int) -> dict[str, Any]:
    stop = {"type": "string", "minLength": 1, "maxLength": 1000}
    bias = {"type": "number", "minimum": -100, "maximum": 100}
    return {
        "model": _NAME,
        "max_tokens": _integer(0),
        "min_tokens": _integer(0),
        "temperature": _number(0, 2),
        "top_p": _number(0, 1),
        "top_k": _integer(-1),
        "min_p": _number(0, 1),
        "n": _integer(1, most_n),
        "stop": {"oneOf": [stop, {"type": "array", "maxItems": 4, "items": stop}, {"type": "null"}]},
        "stop_token_ids": _maybe("array", maxItems=64, items={"type": "integer", "minimum": 0}),
        "seed": _integer(-(2**63), 2**63 - 1),
        "presence_penalty": _number(-2, 2),
        "frequency_penalty": _number(-2, 2),
        "repetition_penalty": _number(0.01, 100),
        "logit_bias": _maybe("object", maxProperties=1024, additionalProperties=bias),
        "stream": _maybe("boolean"),
        "stream_options": _maybe("object", properties={"include_usage": _maybe("boolean")}, additionalProperties=False),
        "response_format": _maybe("object", properties={"type": {"enum": ["text", "json_object", "json_schema"]}}),
        "ignore_eos": _maybe("boolean"),
        "priority": _integer(-1000, 1000),
        "cache_salt": _maybe("string", maxLength=256),
        "user": _maybe("string", maxLength=512),
        "metadata": _maybe("object", maxProperties=16, additionalProperties=_TEXT),
        "routing": {
            **_maybe("boolean"),
            "description": "tell which experts each token went to, and why a pool of adapters chose those it used",
        },
        "num_streams": {**_integer(1), "description": "parallel streams, of a model that has them (ParScale)"},
        "depth": _depth(),
        "depth_control": {**_number(-1, 1), "description": _CONTROL},
        "rewire": _rewire(),
        "adapters": _adapters(),
        "task": _task(),
        "query": {**_maybe("string", maxLength=2000), "description": _QUERY},
    }


def _rewire() -> dict[str, Any]:
    properties = {
        **{name: _or_null(schema) for name, schema in SETTINGS.items()},
        "state": {**_maybe("object"), "description": "rewire_state of a choice: the conversation goes on with it"},
        "return_state": {**_maybe("boolean"), "description": "tell rewire_state with each choice"},
    }
    what = (
        "turn routers of experts to this text as it goes on, where the server does that: true, or settings of this request within the "
        "server's limits"
    )
    settings = {"type": "object", "properties": properties, "additionalProperties": False}
    return {"anyOf": [_maybe("boolean"), settings], "description": what}


def _depth() -> dict[str, Any]:
    blocks = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
    what = (
        "blocks that run: all, as depth routers choose by the prompt, all with each passing over some tokens of the prompt, or these in "
        "order, each at most twice"
    )
    return {"anyOf": [{"enum": ["full", "routed", "pruned", None]}, blocks], "description": what}


_CONTROL = (
    "how deep routers go, beside depth routed: -1 skips all blocks, -0.5 is what they say, 0.5 is the whole model, 1 repeats all; "
    "default: the server's"
)


def _adapters() -> dict[str, Any]:
    weight = {"type": "number", "minimum": -1000, "maximum": 1000}
    what = "adapters and the weights with which they are added up, where model names none"
    return {**_maybe("object", maxProperties=16, additionalProperties=weight), "description": what}


_QUERY = (
    "what is asked for, in words, as routers compare it with instructions of adapters; default: the last message, or the prompt, of which "
    "the writer of a pool makes an instruction"
)


def _task() -> dict[str, Any]:
    what = "name of the task, where the model or an adapter goes by tasks (Poly, MHR)"
    return {**_maybe("string", maxLength=256), "description": what}


def _texts() -> dict[str, Any]:
    ids = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
    several = {"type": "array", "minItems": 1, "maxItems": 128, "items": {"anyOf": [_TEXT, ids]}}
    return {"anyOf": [_TEXT, ids, several]}


def _message() -> dict[str, Any]:
    part = {"type": "object", "required": ["type", "text"], "properties": {"type": {"const": "text"}, "text": _TEXT}}
    return {
        "type": "object",
        "required": ["role", "content"],
        "properties": {
            "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
            "content": {"anyOf": [_TEXT, {"type": "array", "items": part}]},
            "name": _maybe("string"),
            "reasoning_content": _maybe("string"),
            "tool_call_id": _TEXT,
            "tool_calls": _maybe("array", items=_OBJECT),
        },
    }


def _tool() -> dict[str, Any]:
    function = {
        "type": "object",
        "required": ["name"],
        "properties": {"name": _NAME, "description": _TEXT, "parameters": _OBJECT},
    }
    properties = {"type": {"const": "function"}, "function": function}
    return {"type": "object", "required": ["type", "function"], "properties": properties}


def _bodies(most_n: int) -> dict[str, dict[str, Any]]:
    shared = _shared(most_n)
    messages = {"type": "array", "minItems": 1, "items": _message()}

    def body(needed: list[str], **properties: Any) -> dict[str, Any]:
        return {"type": "object", "required": needed, "properties": properties}

    return {
        "Chat": body(
            ["model", "messages"],
            **shared,
            messages=messages,
            max_completion_tokens=_integer(1),
            logprobs=_maybe("boolean"),
            top_logprobs=_integer(0, 20),
            tools=_maybe("array", maxItems=128, items=_tool()),
            tool_choice={"anyOf": [{"enum": ["none", "auto", "required", None]}, _OBJECT]},
            parallel_tool_calls=_maybe("boolean"),
            chat_template_kwargs={
                **_maybe("object", maxProperties=16),
                "description": "more for the model's chat template",
            },
            reasoning_effort={"enum": ["none", "minimal", "low", "medium", "high", "xhigh", None]},
        ),
        "Completion": body(
            ["model", "prompt"],
            **shared,
            prompt=_texts(),
            logprobs={
                **_integer(0, 20),
                "description": "alternatives told beside each token; with echo beside the prompt's too",
            },
            echo={**_maybe("boolean"), "description": "put the prompt before the answer; max_tokens may then be 0"},
            best_of=_integer(1, 128),
        ),
        "Responses": body(
            ["model", "input"],
            model=_NAME,
            input={"anyOf": [_TEXT, {"type": "array", "minItems": 1, "items": _OBJECT}]},
            instructions=_maybe("string"),
            max_output_tokens=_integer(1),
            temperature=_number(0, 2),
            top_p=_number(0, 1),
            tools=_maybe("array", maxItems=128, items=_OBJECT),
            tool_choice={"anyOf": [{"enum": ["none", "auto", "required", None]}, _OBJECT]},
            parallel_tool_calls=_maybe("boolean"),
            text=_maybe("object"),
            reasoning=_maybe("object"),
            stream=_maybe("boolean"),
            metadata=_maybe("object", maxProperties=16, additionalProperties=_TEXT),
            user=_maybe("string", maxLength=512),
        ),
        "Embeddings": body(
            ["model", "input"],
            model=_NAME,
            input=_texts(),
            encoding_format={"enum": ["float", "base64", None]},
            dimensions={
                **_integer(1),
                "description": "of the vectors: as many of their first numbers, of length 1 again",
            },
            cache_salt=_maybe("string", maxLength=256),
            adapters=_adapters(),
            task=_task(),
        ),
        "Tokenize": body(
            [],
            model=_NAME,
            prompt=_TEXT,
            messages=messages,
            add_generation_prompt=_maybe("boolean"),
            chat_template_kwargs=_maybe("object", maxProperties=16),
            return_token_strs=_maybe("boolean"),
        ),
        "Detokenize": body(
            ["tokens"], model=_NAME, tokens={"type": "array", "items": {"type": "integer", "minimum": 0}}
        ),
        "Adapter": body(
            ["name", "folder"], name={"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"}, folder=_TEXT
        ),
        "Scale": body(["devices"], devices={"type": "integer", "minimum": 1, "maximum": 1024}),
        "Error": _error(),
    }


def describe(version: str, most_n: int) -> dict[str, Any]:
    """The document.

    Args:
        version: of the package.
        most_n: largest ``n``.
    """
    schema = {"$ref": "#/components/schemas/Error"}
    error = {"description": "in OpenAI's form", "content": {"application/json": {"schema": schema}}}

    def answers(kind: str, *statuses: str, stream: bool = False) -> dict[str, Any]:
        content: dict[str, Any] = {kind: {"schema": _OBJECT if kind == "application/json" else _TEXT}}
        if stream:
            content["text/event-stream"] = {"schema": _TEXT}
        return {"200": {"description": "the answer", "content": content}, **dict.fromkeys(statuses, error)}

    def post(name: str, summary: str, *more: str, stream: bool = False, scheme: str = "key") -> dict[str, Any]:
        body = {"required": True, "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}}
        statuses = ("400", "401", "404", "408", "413", "415", "429", "500", "503", "504", *more)
        return {
            "summary": summary,
            "operationId": name.lower(),
            "security": [{}, {scheme: []}],
            "requestBody": body,
            "responses": answers("application/json", *statuses, stream=stream),
        }

    def act(summary: str, *more: str, kind: str = "application/json", scheme: str | None = None) -> dict[str, Any]:
        made: dict[str, Any] = {"summary": summary, "responses": answers(kind, *more)}
        return made if scheme is None else {**made, "security": [{}, {scheme: []}]}

    closed = ("400", "401", "404", "503")
    name = {"name": "id", "in": "path", "required": True, "schema": _NAME}
    return {
        "openapi": "3.1.0",
        "info": {"title": "anabranch serving", "version": version},
        "paths": {
            "/v1/chat/completions": {"post": post("Chat", "Answer a conversation", stream=True)},
            "/v1/responses": {"post": post("Responses", "Answer, in the form of the Responses API", stream=True)},
            "/v1/completions": {"post": post("Completion", "Go on with a text", stream=True)},
            "/v1/embeddings": {"post": post("Embeddings", "Turn texts into vectors", "501")},
            "/v1/models": {"get": act("The model", "401", scheme="key")},
            "/v1/models/{id}": {"get": {**act("The model", "401", "404", scheme="key"), "parameters": [name]}},
            "/v1/adapters": {
                "get": act("The adapters", "401", "501", "503", scheme="key"),
                "post": post("Adapter", "Load an adapter", "403", "409", "501", scheme="admin"),
            },
            "/v1/adapters/{id}": {
                "get": {**act("An adapter", "401", "404", "501", "503", scheme="key"), "parameters": [name]},
                "delete": {
                    **act("Unload an adapter", *closed, "403", "409", "501", scheme="admin"),
                    "parameters": [name],
                },
            },
            "/tokenize": {"post": post("Tokenize", "A text or conversation as token ids")},
            "/detokenize": {"post": post("Detokenize", "The text of token ids")},
            "/health/live": {"get": act("The process is alive", "503")},
            "/health/ready": {"get": act("It takes requests", "503")},
            "/health": {"get": act("As /health/ready", "503")},
            "/metrics": {"get": act("For Prometheus", kind="text/plain")},
            "/version": {"get": act("Of the package")},
            "/v1/admin/drain": {
                "get": act("What the server does", *closed, scheme="admin"),
                "post": act("Take no more requests", *closed, scheme="admin"),
                "delete": act("Take requests again", *closed, scheme="admin"),
            },
            "/v1/admin/scale": {"post": post("Scale", "Use so many devices", scheme="admin")},
            "/v1/admin/cache": {
                "get": act("How the caches did", *closed, scheme="admin"),
                "delete": act("Forget cached prefixes", *closed, scheme="admin"),
            },
            "/v1/admin/routes": {"get": act("What the model routes", *closed, scheme="admin")},
        },
        "components": {
            "schemas": _bodies(most_n),
            "securitySchemes": {name: {"type": "http", "scheme": "bearer"} for name in ("key", "admin")},
        },
    }
