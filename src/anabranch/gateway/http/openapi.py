"""The description of the public routes, OpenAPI 3.1: ``GET /openapi.json``."""

from typing import Any

_TEXT = {"type": "string"}
# What a request with a body may be refused with, and beside that one that is to be answered once (Idempotency-Key).
_OF_BODY = ("400", "401", "403", "404", "408", "413", "415", "429", "500", "502", "503", "504")
_OF_MODEL = ("409", "422")
# In the form of Anthropic's Messages API.
_MESSAGES_ERROR = {
    "type": "object",
    "required": ["type", "error", "request_id"],
    "properties": {
        "type": {"const": "error"},
        "error": {"type": "object", "required": ["type", "message"], "properties": {"type": _TEXT, "message": _TEXT}},
        "request_id": _TEXT,
    },
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "code", "param"],
            "properties": {
                "message": _TEXT,
                "type": _TEXT,
                "code": {"type": ["string", "null"]},
                "param": {"type": ["string", "null"]},
            },
        }
    },
}
_MODEL = {
    "type": "string",
    "minLength": 1,
    "maxLength": 512,
    "description": "a model, an alias, or auto/STRATEGY?knob=value",
}


def _number(low: float, high: float) -> dict[str, Any]:
    return {"type": ["number", "null"], "minimum": low, "maximum": high}


def _sampling(most_tokens: int) -> dict[str, Any]:
    tokens = {"type": ["integer", "null"], "minimum": 1, "maximum": most_tokens}
    return {
        "model": _MODEL,
        "max_tokens": tokens,
        "max_completion_tokens": tokens,
        "temperature": _number(0, 2),
        "top_p": _number(0, 1),
        "presence_penalty": _number(-2, 2),
        "frequency_penalty": _number(-2, 2),
        "n": {"type": ["integer", "null"], "minimum": 1, "maximum": 128},
        "seed": {"type": ["integer", "null"]},
        "stop": {"type": ["string", "array", "null"], "items": _TEXT},
        "stream": {"type": ["boolean", "null"]},
        "stream_options": {"type": ["object", "null"]},
        "user": {"type": ["string", "null"]},
    }


def _texts() -> dict[str, Any]:
    ids = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
    return {
        "oneOf": [
            _TEXT,
            {"type": "array", "minItems": 1, "items": _TEXT},
            ids,
            {"type": "array", "minItems": 1, "items": ids},
        ]
    }


def _bodies(most_tokens: int) -> dict[str, dict[str, Any]]:
    message = {
        "type": "object",
        "required": ["role", "content"],
        "properties": {
            "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
            "content": {
                "oneOf": [
                    _TEXT,
                    {"type": "array", "items": {"type": "object", "required": ["type"], "properties": {"type": _TEXT}}},
                ]
            },
            "tool_calls": {"type": ["array", "null"], "items": {"type": "object"}},
        },
    }
    tools = {
        "type": ["array", "null"],
        "items": {"type": "object", "required": ["type"], "properties": {"type": _TEXT}},
    }
    sampling = _sampling(most_tokens)
    return {
        "Chat": {
            "type": "object",
            "required": ["model", "messages"],
            "properties": {**sampling, "messages": {"type": "array", "minItems": 1, "items": message}, "tools": tools},
        },
        "Completion": {
            "type": "object",
            "required": ["model", "prompt"],
            "properties": {**sampling, "prompt": _texts()},
        },
        "Embeddings": {
            "type": "object",
            "required": ["model", "input"],
            "properties": {
                "model": _MODEL,
                "input": _texts(),
                "encoding_format": {"enum": ["float", "base64", None]},
                "dimensions": {"type": ["integer", "null"], "minimum": 1},
            },
        },
        "Responses": {
            "type": "object",
            "required": ["model", "input"],
            "properties": {
                "model": _MODEL,
                "input": {"oneOf": [_TEXT, {"type": "array", "minItems": 1, "items": {"type": "object"}}]},
                "instructions": {"type": ["string", "null"]},
                "max_output_tokens": {"type": ["integer", "null"], "minimum": 1, "maximum": most_tokens},
                "temperature": _number(0, 2),
                "top_p": _number(0, 1),
                "stream": {"type": ["boolean", "null"]},
            },
        },
        "Messages": {
            "type": "object",
            "required": ["model", "messages", "max_tokens"],
            "properties": {
                "model": _MODEL,
                "max_tokens": {"type": "integer", "minimum": 1, "maximum": most_tokens},
                "messages": {
                    "type": "array",
                    "minItems": 1,
                    "items": {"type": "object", "required": ["role", "content"]},
                },
                "system": {"type": ["string", "array", "null"]},
                "stream": {"type": ["boolean", "null"]},
                "stop_sequences": {"type": ["array", "null"], "items": _TEXT},
                "temperature": _number(0, 2),
                "tools": {"type": ["array", "null"], "items": {"type": "object"}},
            },
        },
        "MessagesCount": {
            "type": "object",
            "required": ["model", "messages"],
            "properties": {
                "model": _MODEL,
                "messages": {
                    "type": "array",
                    "minItems": 1,
                    "items": {"type": "object", "required": ["role", "content"]},
                },
                "system": {"type": ["string", "array", "null"]},
                "tools": {"type": ["array", "null"], "items": {"type": "object"}},
            },
        },
        "Feedback": {
            "type": "object",
            "required": ["request_id"],
            "oneOf": [{"required": ["score"]}, {"required": ["thumb"]}, {"required": ["preferred"]}],
            "additionalProperties": False,
            "properties": {
                "request_id": {"type": "string", "minLength": 1, "maxLength": 128},
                "score": {"type": "number", "minimum": 0, "maximum": 1},
                "thumb": {"type": "string", "enum": ["up", "down"]},
                "preferred": {
                    "description": "what is better, what is worse: models, or requests that they answered; one is this request's",
                    "type": "array",
                    "items": {"type": "string", "minLength": 1, "maxLength": 512},
                    "minItems": 2,
                    "maxItems": 2,
                },
                "comment": {"type": ["string", "null"], "maxLength": 2000},
            },
        },
        "Error": _ERROR,
        "MessagesError": _MESSAGES_ERROR,
    }


def describe(version: str, most_tokens: int) -> dict[str, Any]:
    """The document.

    Args:
        version: of the package.
        most_tokens: largest ``max_tokens``.
    """

    def error(schema: str) -> dict[str, Any]:
        form = "Anthropic's" if schema == "MessagesError" else "OpenAI's"
        return {
            "description": f"in {form} form",
            "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}},
        }

    def answers(kind: str, *more: str, stream: bool = False, form: str = "Error") -> dict[str, Any]:
        content: dict[str, Any] = {kind: {"schema": {"type": "object"} if kind == "application/json" else _TEXT}}
        if stream:
            content["text/event-stream"] = {"schema": _TEXT}
        return {"200": {"description": "the answer", "content": content}, **dict.fromkeys(sorted(more), error(form))}

    def post(schema: str, summary: str, *more: str, stream: bool = False, id: str = "") -> dict[str, Any]:
        body = {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}},
        }
        form = "MessagesError" if schema.startswith("Messages") else "Error"
        return {
            "post": {
                "summary": summary,
                "operationId": id or schema.lower(),
                "security": [{}, {"key": []}],
                "requestBody": body,
                "responses": answers("application/json", *_OF_BODY, *more, stream=stream, form=form),
            }
        }

    def get(summary: str, kind: str = "application/json", *more: str) -> dict[str, Any]:
        return {"get": {"summary": summary, "responses": answers(kind, *more, "500")}}

    return {
        "openapi": "3.1.0",
        "info": {"title": "anabranch gateway", "version": version},
        "paths": {
            "/v1/chat/completions": post("Chat", "Answer a conversation", *_OF_MODEL, stream=True),
            "/v1/completions": post("Completion", "Go on with a text", *_OF_MODEL, stream=True),
            "/v1/embeddings": post("Embeddings", "Turn texts into vectors", *_OF_MODEL),
            "/v1/responses": post("Responses", "Answer, in the form of the Responses API", *_OF_MODEL, stream=True),
            "/v1/responses/input_tokens": post("Responses", "Count the tokens of a prompt", id="input_tokens"),
            "/v1/messages": post(
                "Messages", "Answer, in the form of Anthropic's Messages API, errors too", *_OF_MODEL, stream=True
            ),
            "/v1/messages/count_tokens": post("MessagesCount", "Count the tokens of a prompt", id="count_tokens"),
            "/v1/feedback": post(
                "Feedback", "Score an answer, from 0 to 1, by a thumb, or against another; once", "409"
            ),
            "/v1/models": get("Models and strategies", "application/json", "401", "403", "503"),
            "/v1/key": get(
                "Limits, budgets and spend of the key that asks", "application/json", "401", "403", "429", "503"
            ),
            "/health": get("The process is alive"),
            "/ready": get("It takes requests", "application/json", "503"),
            "/metrics": get("For Prometheus", "text/plain", "401", "403", "503"),
        },
        "components": {
            "schemas": _bodies(most_tokens),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
