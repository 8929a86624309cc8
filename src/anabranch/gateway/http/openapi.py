"""The description of the public routes, OpenAPI 3.1: ``GET /openapi.json``."""

from collections.abc import Iterable
from typing import Any

from anabranch.gateway.http.openapi_bodies import schemas
from anabranch.gateway.media_requests import FORMS
from anabranch.gateway.providers.media import PATHS, SOUNDS

_TEXT = {"type": "string"}
_JSON = "application/json"

# What a request with a body may be refused with, and beside that one that is to be answered once (Idempotency-Key).
_OF_BODY = ("400", "401", "403", "404", "408", "413", "415", "429", "500", "502", "503", "504")
_OF_MODEL = ("409", "422")


def _error(schema: str) -> dict[str, Any]:
    form = "Anthropic's" if schema == "MessagesError" else "OpenAI's"
    return {
        "description": f"in {form} form",
        "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}},
    }


def _answers(kinds: Iterable[str], *more: str, form: str = "Error") -> dict[str, Any]:
    content = {kind: {"schema": {"type": "object"} if kind == _JSON else _TEXT} for kind in kinds}
    return {"200": {"description": "the answer", "content": content}, **dict.fromkeys(sorted(more), _error(form))}


def _post(
    schema: str, summary: str, *more: str, id: str = "", asked: str = _JSON, told: Iterable[str] = (_JSON,)
) -> dict[str, Any]:
    """A route that takes a body.

    Args:
        schema: of the body.
        summary: of the route.
        *more: statuses of refusals, beside those of all.
        id: of the operation; the schema's name if empty.
        asked: type of the body.
        told: types that an answer may have.
    """
    form = "MessagesError" if schema.startswith("Messages") else "Error"
    return {
        "post": {
            "summary": summary,
            "operationId": id or schema.lower(),
            "security": [{}, {"key": []}],
            "requestBody": {
                "required": True,
                "content": {asked: {"schema": {"$ref": f"#/components/schemas/{schema}"}}},
            },
            "responses": _answers(told, *_OF_BODY, *more, form=form),
        }
    }


def _get(summary: str, kind: str = _JSON, *more: str) -> dict[str, Any]:
    return {"get": {"summary": summary, "responses": _answers((kind,), *more, "500")}}


def _of_one_model() -> dict[str, Any]:
    route = _get("What is known of one of them", _JSON, "401", "403", "404", "503")
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    return {"get": {**route["get"], "parameters": [name]}}


def _asks() -> dict[str, Any]:
    """Routes that ask a model for text or vectors, or count what it would be asked."""
    streams = (_JSON, "text/event-stream")
    return {
        "/v1/chat/completions": _post("Chat", "Answer a conversation", *_OF_MODEL, told=streams),
        "/v1/completions": _post("Completion", "Go on with a text", *_OF_MODEL, told=streams),
        "/v1/embeddings": _post("Embeddings", "Turn texts into vectors", *_OF_MODEL),
        "/v1/responses": _post("Responses", "Answer, in the form of the Responses API", *_OF_MODEL, told=streams),
        "/v1/responses/input_tokens": _post("Responses", "Count the tokens of a prompt", id="input_tokens"),
        "/v1/messages": _post(
            "Messages", "Answer, in the form of Anthropic's Messages API, errors too", *_OF_MODEL, told=streams
        ),
        "/v1/messages/count_tokens": _post("MessagesCount", "Count the tokens of a prompt", id="count_tokens"),
    }


# Endpoint of media -> the schema of its body, what it does, and the types of its answers where they are not JSON.
_MEDIA: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "images": ("Images", "Make pictures", (_JSON,)),
    "image_edits": ("ImageEdits", "Make pictures of pictures", (_JSON,)),
    "speech": ("Speech", "Say a text", (*SOUNDS.values(), "application/octet-stream")),
    "transcriptions": ("Transcriptions", "Write down what is said", (_JSON, "text/plain")),
    "translations": ("Translations", "Write down in English what is said", (_JSON, "text/plain")),
    "moderations": ("Moderations", "Say what a text may not hold", (_JSON,)),
    "rerank": ("Rerank", "Put documents in the order in which they answer a query", (_JSON,)),
}


def _of_media() -> dict[str, Any]:
    found = {}
    for endpoint, path in PATHS.items():
        schema, summary, told = _MEDIA[endpoint]
        asked = "multipart/form-data" if endpoint in FORMS else _JSON
        found[f"/v1{path}"] = _post(schema, summary, *_OF_MODEL, asked=asked, told=told)
    return found


def describe(version: str, most_tokens: int) -> dict[str, Any]:
    """The document.

    Args:
        version: of the package.
        most_tokens: largest ``max_tokens``.
    """
    return {
        "openapi": "3.1.0",
        "info": {"title": "anabranch gateway", "version": version},
        "paths": {
            **_asks(),
            **_of_media(),
            "/v1/feedback": _post(
                "Feedback", "Score an answer, from 0 to 1, by a thumb, or against another; once", "409"
            ),
            "/v1/models": _get("Models and strategies", _JSON, "401", "403", "503"),
            "/v1/models/{name}": _of_one_model(),
            "/v1/key": _get("Limits, budgets and spend of the key that asks", _JSON, "401", "403", "429", "503"),
            "/health": _get("The process is alive"),
            "/ready": _get("It takes requests", _JSON, "503"),
            "/metrics": _get("For Prometheus", "text/plain", "401", "403", "503"),
        },
        "components": {
            "schemas": schemas(most_tokens),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
