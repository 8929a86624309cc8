"""The form of Amazon Bedrock's Converse API: chat requests put into it, its answers and streams read.

Thoughts come as ``reasoning_content``, and with their signatures as ``thinking_blocks`` of the message; sent back in that form, they are
given to the model again, which some need to go on after a call of a tool.
"""

import json
import re
from typing import Any

from anabranch.gateway.providers.anthropic_models import Takes, takes
from anabranch.gateway.providers.openai import unsupported
from anabranch.gateway.providers.provider import Answer, FailureKind, Json, UpstreamError, Usage
from anabranch.gateway.providers.translation import (
    ForeignStream,
    Room,
    arguments,
    completion,
    count,
    data_url,
    functions,
    head,
    message,
    most_tokens,
    refuse,
    room,
    schema_of,
    stops,
    text_of,
    tool_call,
)

REFUSED = ("n", "logprobs", "top_logprobs")
# Of a call of a tool that runs at Amazon: nothing for the sender to call.
THEIRS = "server_tool_use"
FINISH = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "tool_use": "tool_calls",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
}
WITHHELD = "content_filter"

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

# The whole sentence, in which nothing is a sender's: there is no word for this in the error itself.
TOO_LONG = re.compile(r"Input is too long for requested model\.?")

# Tokens to think for, of models of Anthropic's, which want at least the first.
BUDGETS = {"minimal": 1024, "low": 1024, "medium": 4096, "high": 16384}
LEAST_BUDGET = 1024

_FORMATS = {"jpg": "jpeg", "plain": "txt", "markdown": "md", "msword": "doc"}
_DOCUMENTS = ("pdf", "csv", "doc", "docx", "xls", "xlsx", "html", "txt", "md")
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
    system, turns = _turns(body, marks)
    made: Json = {"messages": turns, **_tools(body, marks)}
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
    fields = {**config.fields, **_fields(body, config.model, settings)}
    if is_claude(config.model):
        _fit_claude(settings, fields, takes(config.model))
    if settings:
        made["inferenceConfig"] = settings
    if fields:
        made["additionalModelRequestFields"] = fields
    if config.guardrail:
        made["guardrailConfig"] = config.guardrail
    return made | _output(body)


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


def _fields(body: Json, model: str, settings: Json) -> Json:
    """What only some models know."""
    made: Json = {name: body[name] for name in ("top_k", "thinking") if body.get(name) is not None}
    effort = body.get("reasoning_effort")
    if effort is None or effort == "none" or "thinking" in made:
        return made
    if not is_claude(model):
        return made | {"reasoning_effort": effort}
    if effort not in BUDGETS:
        raise unsupported(f"reasoning_effort {effort!r} cannot be asked of {model}; it knows {', '.join(BUDGETS)}")
    can = takes(model)
    if can.adaptive and not can.budget:
        least = {"minimal": "low"}
        return made | {"thinking": {"type": "adaptive"}, "output_config": {"effort": least.get(effort, effort)}}
    # The answer must have room beside it.
    budget = min(BUDGETS[effort], settings.get("maxTokens", BUDGETS[effort] + 1) - 1)
    thinks = can.budget and budget >= LEAST_BUDGET
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


def _output(body: Json) -> Json:
    is_json, schema = schema_of(body)
    if not is_json:
        return {}
    if schema is None:
        raise unsupported("response_format json_object cannot be asked of bedrock; give a json_schema")
    form = {"schema": json.dumps(schema), "name": body["response_format"]["json_schema"].get("name") or "answer"}
    return {"outputConfig": {"textFormat": {"type": "json_schema", "structure": {"jsonSchema": form}}}}


def _tools(body: Json, marks: _Marks) -> Json:
    specs: list[Json] = []
    given = body.get("tools") or []
    for tool, function in zip(given, functions(body, "bedrock"), strict=True):
        schema = function.get("parameters") or {"type": "object", "properties": {}}
        spec: Json = {"name": function["name"], "inputSchema": {"json": schema}}
        if function.get("description"):
            spec["description"] = function["description"]
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


def _turns(body: Json, marks: _Marks) -> tuple[list[Json], list[Json]]:
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
            blocks = _said(given, kept, marks)
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


def _said(given: Json, kept: Room, marks: _Marks) -> list[Json]:
    blocks = [_thought(block) for block in given.get("thinking_blocks") or []]
    text_of(given.get("content"), "bedrock")
    blocks += _blocks(given.get("content"), marks)
    for call in given.get("tool_calls") or []:
        use = {"toolUseId": call["id"], "name": call["function"]["name"], "input": arguments(call, kept)}
        blocks += marks.behind([{"toolUse": use}], call)
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
        # Names may hold little, and say nothing that the model must know.
        return {"document": {"format": form, "name": f"file-{at}", "source": {"bytes": data}}}
    raise unsupported(f"a part of a message of type {kind!r} cannot be sent to bedrock")


def _media(url: str) -> tuple[str, str]:
    found = data_url(url)
    if found is None:
        raise unsupported("an image or file must be a data: URL for bedrock, which fetches none")
    form = found[0].partition("/")[2]
    return _OFFICE.get(form) or _FORMATS.get(form, form), found[1]


# Answers


def answer(value: Json, model: str) -> Answer:
    """A whole one. Raises what reading a value of another shape raises."""
    texts, thoughts, blocks, calls = [], [], [], []
    for block in value["output"]["message"]["content"]:
        if "text" in block:
            texts.append(block["text"])
        elif "toolUse" in block:
            use = block["toolUse"]
            if use.get("type") == THEIRS:
                continue
            calls.append(tool_call(use["name"], use.get("input"), use["toolUseId"]))
        elif "reasoningContent" in block:
            blocks.append(_thinking(block["reasoningContent"]))
            thoughts.append(blocks[-1].get("thinking", ""))
    made = message("".join(texts), "".join(thoughts), calls)
    if blocks:
        made["thinking_blocks"] = blocks
    choice = {"index": 0, "message": made, "finish_reason": finish_of(value["stopReason"])}
    return completion(head(None, model, "chat.completion"), [choice], usage_of(value["usage"]))


def _thinking(given: Json) -> Json:
    if "redactedContent" in given:
        return {"type": "redacted_thinking", "data": given["redactedContent"]}
    text = given["reasoningText"]
    made = {"type": "thinking", "thinking": text["text"]}
    return made | ({"signature": text["signature"]} if text.get("signature") else {})


def usage_of(given: Json) -> Usage:
    """Bedrock counts cached tokens beside the others, OpenAI among them."""
    cached, written = count(given.get("cacheReadInputTokens")), count(given.get("cacheWriteInputTokens"))
    prompt = count(given["inputTokens"]) + written + cached
    details = given.get("cacheDetails")
    for_hour = min(sum(count(one.get("inputTokens")) for one in details or () if one.get("ttl") == "1h"), written)
    return Usage(
        prompt,
        count(given["outputTokens"]),
        cached,
        cache_write=written - for_hour,
        cache_write_1h=for_hour,
        tells_ttl=bool(details),
    )


def finish_of(reason: Any) -> str:
    """OpenAI's word for why an answer ended; what is not known here was held back, or came to nothing."""
    return FINISH.get(reason, WITHHELD)


class ConverseStream(ForeignStream):
    """Turns the events of one answer into chunks. The usage comes after the end."""

    def __init__(self, provider: Any) -> None:
        super().__init__(provider)
        # Of each block of thoughts, what has come.
        self._thoughts: dict[int, Json] = {}
        self._blocks = 0
        # Of each block that is a call, which call it is.
        self._places: dict[int, int] = {}
        # Those calls whose arguments have not come.
        self._empty: set[int] = set()
        # And blocks that are calls of tools of Amazon's.
        self._theirs: set[int] = set()

    def _chunks(self, value: Json) -> list[Json]:
        if "exception" in value:
            raise self._exception(value["exception"])
        [(name, given)] = value.items()
        if name == "messageStart":
            return [self._chunk({"content": ""})]
        if name == "contentBlockStart":
            return self._begun(given["contentBlockIndex"], given["start"])
        if name == "contentBlockDelta":
            return self._continued(given["contentBlockIndex"], given["delta"])
        if name == "contentBlockStop":
            at = given["contentBlockIndex"]
            thought = self._thoughts.pop(at, None)
            if at in self._empty:
                # A call without arguments has some all the same: no other form of them can be read.
                self._empty.discard(at)
                return [self._chunk({"tool_calls": [{"index": self._places[at], "function": {"arguments": "{}"}}]})]
            if thought is None:
                return []
            # Clients put lists together by the index.
            self._blocks += 1
            return [self._chunk({"thinking_blocks": [{"index": self._blocks - 1, **thought}]})]
        if name == "messageStop":
            return [self._chunk({}, finish_of(given["stopReason"]))]
        if name == "metadata":
            self.is_done = True
            return [self._used(usage_of(given["usage"]))]
        return []

    def _begun(self, at: int, start: Json) -> list[Json]:
        if "toolUse" not in start:
            return []
        use = start["toolUse"]
        if use.get("type") == THEIRS:
            self._theirs.add(at)
            return []
        self._places[at] = self._calls.get(0, 0)
        self._empty.add(at)
        return [self._called(tool_call(use["name"], "", use["toolUseId"]))]

    def _continued(self, at: int, delta: Json) -> list[Json]:
        if delta.get("text"):
            return [self._chunk({"content": delta["text"]})]
        if "toolUse" in delta and at in self._theirs:
            return []
        if "toolUse" in delta:
            piece = {"index": self._places[at], "function": {"arguments": delta["toolUse"]["input"]}}
            if delta["toolUse"]["input"]:
                self._empty.discard(at)
            return [self._chunk({"tool_calls": [piece]})]
        if "reasoningContent" in delta:
            return self._thought(at, delta["reasoningContent"])
        return []

    def _thought(self, at: int, delta: Json) -> list[Json]:
        if "redactedContent" in delta:
            kept = self._thoughts.setdefault(at, {"type": "redacted_thinking", "data": ""})
            kept["data"] += delta["redactedContent"]
            return []
        kept = self._thoughts.setdefault(at, {"type": "thinking", "thinking": ""})
        if delta.get("signature"):
            kept["signature"] = delta["signature"]
        if not delta.get("text"):
            return []
        kept["thinking"] += delta["text"]
        return [self._chunk({"reasoning_content": delta["text"]})]

    def _exception(self, given: Json) -> UpstreamError:
        name = str(given.get("type"))
        known = ERRORS.get(name[:1].upper() + name[1:])
        return self._failed(
            {"__type": name, "message": given.get("message") or name}, 500 if known is None else known[1]
        )
