"""What the public routes are sent, and how they refuse: JSON Schema, for the document of them."""

from typing import Any

from anabranch.gateway.providers.media import SOUNDS

_TEXT = {"type": "string"}
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

_OR_NONE = {
    **_MODEL,
    "type": ["string", "null"],
    "description": "a model; left out, the default or the only one for it",
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


def _media() -> dict[str, dict[str, Any]]:
    """Of `anabranch.gateway.media_requests`. A file is bytes of a form."""
    file = {"type": "string", "format": "binary"}
    user = {"type": ["string", "null"]}
    pictures = {
        "model": _OR_NONE,
        "prompt": _TEXT,
        "n": {"type": ["integer", "null"], "minimum": 1, "maximum": 64},
        "user": user,
    }
    heard = {
        "type": "object",
        "required": ["model", "file"],
        "properties": {"model": _MODEL, "file": file, "response_format": _TEXT},
    }
    return {
        "Images": {"type": "object", "required": ["prompt"], "properties": pictures},
        "ImageEdits": {
            "type": "object",
            "required": ["prompt", "image"],
            "properties": {
                **pictures,
                "image": {"oneOf": [file, {"type": "array", "minItems": 1, "items": file}]},
                "mask": file,
            },
        },
        "Speech": {
            "type": "object",
            "required": ["model", "input", "voice"],
            "properties": {
                "model": _MODEL,
                "input": _TEXT,
                "voice": {"type": ["string", "object"]},
                "instructions": {"type": ["string", "null"]},
                "response_format": {"enum": [*SOUNDS, None]},
                "speed": {"type": ["number", "null"]},
            },
        },
        "Transcriptions": heard,
        "Translations": heard,
        "Moderations": {
            "type": "object",
            "required": ["input"],
            "properties": {"model": _OR_NONE, "input": {"type": ["string", "array"]}},
        },
        "Rerank": {
            "type": "object",
            "required": ["model", "query", "documents"],
            "properties": {
                "model": _MODEL,
                "query": _TEXT,
                "documents": {"type": "array"},
                "top_n": {"type": ["integer", "null"], "minimum": 1},
            },
        },
    }


def schemas(most_tokens: int) -> dict[str, dict[str, Any]]:
    """By name, as ``#/components/schemas`` has them.

    Args:
        most_tokens: largest ``max_tokens``.
    """
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
        **_media(),
        "Error": _ERROR,
        "MessagesError": _MESSAGES_ERROR,
    }
