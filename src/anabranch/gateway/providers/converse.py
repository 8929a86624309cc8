"""Chat requests in the form of Amazon Bedrock's Converse API; its answers see `conversed`.

``thinking_blocks`` of messages are given to the model again, which some need to go on after a call of a tool. Blocks of Anthropic's form
that chat has no words for (a ``document``, a ``search_result``) become what Converse has for them.
"""

import json
import re
from typing import Any

from anabranch.gateway.providers.anthropic_models import Takes, takes
from anabranch.gateway.providers.anthropic_request import ANSWER_TOOL
from anabranch.gateway.providers.openai import unsupported
from anabranch.gateway.providers.provider import FailureKind, Json
from anabranch.gateway.providers.thoughts import is_claudes
from anabranch.gateway.providers.translation import (
    Room,
    arguments,
    data_url,
    functions,
    most_tokens,
    refuse,
    room,
    schema_of,
    stops,
    text_of,
)
from anabranch.web.said_order import in_turn

REFUSED = ("n", "logprobs", "top_logprobs")
# Exceptions as documented: what they mean, and their status, which a stream does not have.
ERRORS: dict[str, tuple[FailureKind, int]] = {
    "AccessDeniedException": ("forbidden", 403),
    "UnrecognizedClientException": ("auth", 403),
    "InvalidSignatureException": ("auth", 403),
    "IncompleteSignatureException": ("auth", 403),
    "MissingAuthenticationTokenException": ("auth", 403),
    "ExpiredTokenException": ("auth", 403),
    "ThrottlingException": ("rate_limit", 429),
    "ServiceQuotaExceededException": ("rate_limit", 429),
    "ModelNotReadyException": ("rate_limit", 429),
    "ModelTimeoutException": ("timeout", 408),
    "ModelErrorException": ("server", 502),
    "ModelStreamErrorException": ("server", 502),
    "InternalServerException": ("server", 500),
    "ServiceUnavailableException": ("server", 503),
    "ResourceNotFoundException": ("missing", 404),
    "ValidationException": ("request", 400),
}

# Whole sentences, in which nothing is a sender's: there is no word for this in the error itself.
TOO_LONG = re.compile(
    r"Input is too long for requested model\.?"
    # Nova
    r"|Input Tokens Exceeded: Number of input tokens exceeds maximum length\.(?: Please update the input to try again\.)?"
    # Claude
    r"|(?:The model returned the following errors: )?prompt is too long: \d+ tokens > \d+ maximum\.?"
)

# Tokens to think for, of models of Anthropic's, which want at least the first.
BUDGETS = {"minimal": 1024, "low": 1024, "medium": 4096, "high": 16384, "xhigh": 24576, "max": 32768}
LEAST_BUDGET = 1024

_FORMATS = {"jpg": "jpeg", "plain": "txt", "markdown": "md", "msword": "doc"}
_DOCUMENTS = ("pdf", "csv", "doc", "docx", "xls", "xlsx", "html", "txt", "md")
# What a name of a document may not have, and most of its letters, of 200, beside its number.
_UNNAMED = re.compile(r"[^A-Za-z0-9\s\-()\[\]]+")
_NAME_LETTERS = 190
_OFFICE = {
    "vnd.openxmlformats-officedocument.wordprocessingml.document": "docx",
    "vnd.openxmlformats-officedocument.spreadsheetml.sheet": "xlsx",
    "vnd.ms-excel": "xls",
}


# Requests


def is_claude(model: str) -> bool:
    """It is a model of Anthropic's."""
    return "anthropic." in model


def translated(body: Json, config: Any) -> Json:
    """A chat request as one of Converse. Raises UpstreamError."""
    refuse(body, REFUSED, "bedrock")
    marks = _Marks("anthropic." in config.model or "amazon.nova" in config.model)
    system, turns = _turns(body, marks, is_claude(config.model))
    made: Json = {"messages": turns, **_tools(body, marks)}
    made |= _output(body, config.model, made)
    if system:
        made["system"] = system
    settings: Json = {}
    if most := most_tokens(body):
        settings["maxTokens"] = most
    for name, ours in (("temperature", "temperature"), ("top_p", "topP")):
        if body.get(name) is not None:
            settings[ours] = body[name]
    if stop := stops(body):
        settings["stopSequences"] = stop
    fields = {**config.fields, **_fields(body, config.model, settings, _is_forced(made))}
    if is_claude(config.model):
        _fit_claude(settings, fields, takes(config.model))
    if settings:
        made["inferenceConfig"] = settings
    if fields:
        made["additionalModelRequestFields"] = fields
    if config.guardrail:
        made["guardrailConfig"] = config.guardrail
    return made


def _is_forced(made: Json) -> bool:
    """A tool must be called: Claude does not think before it."""
    return not {"any", "tool"}.isdisjoint(made.get("toolConfig", {}).get("toolChoice", {}))


def _fit_claude(settings: Json, fields: Json, can: Takes) -> None:
    """Take out what the model does not take."""
    # OpenAI's scale goes to 2, Anthropic's to 1.
    if settings.get("temperature", 0) > 1:
        settings["temperature"] = 1.0
    thinks = fields.get("thinking", {}).get("type") in ("enabled", "adaptive")
    if not can.sampling or thinks:
        # It thinks at a temperature of its own.
        settings.pop("temperature", None)
    if not can.sampling or (can.one_of_two and "temperature" in settings):
        settings.pop("topP", None)
    if not can.sampling or thinks:
        fields.pop("top_k", None)


def _fields(body: Json, model: str, settings: Json, is_forced: bool) -> Json:
    """What only some models know."""
    made: Json = {name: body[name] for name in ("top_k", "thinking") if body.get(name) is not None}
    effort = body.get("reasoning_effort")
    if not is_claude(model):
        is_said = effort is None or effort == "none" or "thinking" in made
        return made if is_said else made | {"reasoning_effort": effort}
    can = takes(model)
    given = made.get("thinking")
    if given is not None and not can.budget and can.adaptive and given.get("type") == "enabled":
        made["thinking"] = {name: value for name, value in given.items() if name != "budget_tokens"} | {
            "type": "adaptive"
        }
    if effort is None or effort == "none":
        return made
    if effort not in BUDGETS:
        raise unsupported(f"reasoning_effort {effort!r} cannot be asked of {model}; it knows {', '.join(BUDGETS)}")
    if can.adaptive and (given is not None or not can.budget):
        # How hard it works is a word beside how it thinks.
        level = {"minimal": "low", "xhigh": "xhigh" if can.xhigh else "high"}.get(effort, effort)
        made["output_config"] = {"effort": level}
        return made if given is not None or is_forced else made | {"thinking": {"type": "adaptive"}}
    # The answer must have room beside it.
    budget = min(BUDGETS[effort], settings.get("maxTokens", BUDGETS[effort] + 1) - 1)
    thinks = given is None and can.budget and budget >= LEAST_BUDGET and not is_forced
    return made | ({"thinking": {"type": "enabled", "budget_tokens": budget}} if thinks else {})


class _Marks:
    """Puts ``cache_control`` into Converse's words: a point behind what is to be kept; nothing where a model has no cache."""

    def __init__(self, has_cache: bool) -> None:
        self._has_cache = has_cache

    def behind(self, blocks: list[Json], *given: Any) -> list[Json]:
        """``blocks``, with a point behind them if one of ``given`` is marked."""
        mark = next((one["cache_control"] for one in given if isinstance(one, dict) and one.get("cache_control")), None)
        if mark is None or not self._has_cache or not blocks:
            return blocks
        point = {"type": "default"} | ({"ttl": mark["ttl"]} if mark.get("ttl") else {})
        return [*blocks, {"cachePoint": point}]


def forces_json(body: Json, model: str) -> bool:
    """Whether the answer comes as a call of `ANSWER_TOOL`: of models of Anthropic and Amazon that take no schema, or get none."""
    is_json, schema = schema_of(body)
    if not is_json or not (is_claude(model) or "amazon.nova" in model):
        return False
    return schema is None or not is_claude(model) or not takes(model).schema


def _output(body: Json, model: str, made: Json) -> Json:
    is_json, schema = schema_of(body)
    if not is_json:
        return {}
    named = body["response_format"].get("json_schema") or {}
    if forces_json(body, model):
        if made.get("toolConfig"):
            raise unsupported(f"response_format and tools together cannot be asked of {model} on bedrock")
        shape = schema or {"type": "object", "properties": {}, "additionalProperties": True}
        spec = {
            "name": ANSWER_TOOL,
            "description": named.get("description") or "Give the whole answer as the input of this tool.",
            "inputSchema": {"json": shape},
        }
        return {"toolConfig": {"tools": [{"toolSpec": spec}], "toolChoice": {"tool": {"name": ANSWER_TOOL}}}}
    if schema is None:
        raise unsupported("response_format json_object cannot be asked of this model of bedrock; give a json_schema")
    form = {"schema": json.dumps(schema), "name": named.get("name") or "answer"}
    if named.get("description"):
        form["description"] = named["description"]
    return {"outputConfig": {"textFormat": {"type": "json_schema", "structure": {"jsonSchema": form}}}}


def _tools(body: Json, marks: _Marks) -> Json:
    specs: list[Json] = []
    given = body.get("tools") or []
    for tool, function in zip(given, functions(body, "bedrock"), strict=True):
        schema = function.get("parameters") or {"type": "object", "properties": {}}
        spec: Json = {"name": function["name"], "inputSchema": {"json": schema}}
        if function.get("description"):
            spec["description"] = function["description"]
        if function.get("strict"):
            spec["strict"] = True
        specs += marks.behind([{"toolSpec": spec}], tool, function)
    if not specs:
        return {}
    choice = body.get("tool_choice") or "auto"
    if choice == "none":
        if any(given.get("tool_calls") or given.get("role") == "tool" for given in body["messages"]):
            # A conversation with calls in it needs their tools; that they are not called cannot be said.
            raise unsupported("tool_choice none cannot be asked of bedrock where tools were called before")
        return {}
    if isinstance(choice, dict):
        how: Json = {"tool": {"name": choice["function"]["name"]}}
    else:
        how = {{"auto": "auto", "required": "any"}[choice]: {}}
    return {"toolConfig": {"tools": specs, "toolChoice": how}}


def _turns(body: Json, marks: _Marks, is_claudes_own: bool) -> tuple[list[Json], list[Json]]:
    """The system prompts, and turns that alternate between user and assistant."""
    kept = room()
    system: list[Json] = []
    turns: list[Json] = []
    for given in body.get("messages") or []:
        role, content = given.get("role"), given.get("content")
        if role in ("system", "developer"):
            text_of(content, "bedrock")
            system += _blocks(content, marks)
            continue
        if role == "assistant":
            blocks = _said(given, kept, marks, is_claudes_own)
        elif role == "tool":
            role, blocks = "user", marks.behind([_result(given, marks)], given)
        else:
            role, blocks = "user", _blocks(content, marks)
        if not blocks:
            continue
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += blocks
        else:
            turns.append({"role": role, "content": blocks})
    return system, turns


def _said(given: Json, kept: Room, marks: _Marks, is_claudes_own: bool) -> list[Json]:
    thoughts = given.get("thinking_blocks") or []
    # Claude takes none but its own, which are signed; others sign nothing.
    blocks = [
        _thought(block) for block in thoughts if is_claudes(block) or not (is_claudes_own or block.get("signature"))
    ]
    text_of(given.get("content"), "bedrock")
    for kind, piece in in_turn(given):
        if kind == "text":
            blocks += _blocks(piece, marks)
        else:
            use = {"toolUseId": piece["id"], "name": piece["function"]["name"], "input": arguments(piece, kept)}
            blocks += marks.behind([{"toolUse": use}], piece)
    return blocks


def _thought(block: Json) -> Json:
    if block["type"] == "redacted_thinking":
        return {"reasoningContent": {"redactedContent": block["data"]}}
    text = {"text": block["thinking"]}
    if block.get("signature"):
        text["signature"] = block["signature"]
    return {"reasoningContent": {"reasoningText": text}}


def _result(given: Json, marks: _Marks) -> Json:
    content = given.get("content")
    inner = _blocks(content, _Marks(False)) if isinstance(content, list) else [{"text": text_of(content, "bedrock")}]
    result: Json = {"toolUseId": given["tool_call_id"], "content": inner}
    return {"toolResult": result | ({"status": "error"} if given.get("is_error") else {})}


def _blocks(content: Any, marks: _Marks) -> list[Json]:
    if isinstance(content, list):
        return [block for at, part in enumerate(content) for block in marks.behind([_block(part, at)], part)]
    text = text_of(content, "bedrock")
    return [{"text": text}] if text else []


def _block(part: Json, at: int) -> Json:
    kind = part.get("type")
    if kind in ("text", "refusal"):
        return {"text": part[kind]}
    if kind == "image_url":
        form, data = _media(part["image_url"]["url"])
        return {"image": {"format": form, "source": {"bytes": data}}}
    if kind == "file" and "file_data" in part["file"]:
        form, data = _media(part["file"]["file_data"])
        if form not in _DOCUMENTS:
            raise unsupported(f"a file of type {form!r} cannot be sent to bedrock; it takes {', '.join(_DOCUMENTS)}")
        return _document(form, {"bytes": data}, part, at)
    source = part.get("source")
    if kind == "document" and isinstance(source, dict):
        if source.get("type") == "text":
            return _document("txt", {"text": source["data"]}, part, at)
        if source.get("type") == "content":
            return _document("txt", {"content": _texts(source["content"])}, part, at)
    if kind == "search_result":
        found = {"source": source, "title": part["title"], "content": _texts(part["content"])}
        return {"searchResult": found | _cited(part)}
    where = f" by {source.get('type')}" if isinstance(source, dict) else ""
    raise unsupported(f"a part of a message of type {kind!r}{where} cannot be sent to bedrock")


def _document(form: str, source: Json, part: Json, at: int) -> Json:
    """Names may hold little: what is said in one is kept as far as it can be."""
    words = _UNNAMED.sub(" ", str(part.get("title") or (part.get("file") or {}).get("filename") or ""))
    # Two documents of one name are refused.
    name = f"{' '.join(words.split())[:_NAME_LETTERS].strip()} {at}".strip() if words.strip() else f"file-{at}"
    context = {"context": part["context"]} if part.get("context") else {}
    return {"document": {"format": form, "name": name, "source": source, **context, **_cited(part)}}


def _cited(part: Json) -> Json:
    given = part.get("citations")
    return {"citations": {"enabled": bool(given.get("enabled"))}} if isinstance(given, dict) else {}


def _texts(content: Any) -> list[Json]:
    """Of a document or a result of a search, which hold text alone. Raises UpstreamError (``unsupported``)."""
    if isinstance(content, str):
        return [{"text": content}]
    if any(one.get("type") != "text" for one in content):
        raise unsupported("a document or search result with anything but text in it cannot be sent to bedrock")
    return [{"text": one["text"]} for one in content]


def _media(url: str) -> tuple[str, str]:
    found = data_url(url)
    if found is None:
        raise unsupported("an image or file must be a data: URL for bedrock, which fetches none")
    form = found[0].partition("/")[2]
    return _OFFICE.get(form) or _FORMATS.get(form, form), found[1]
