"""A chat request of OpenAI's form as a request to Anthropic's ``/v1/messages``: translated, or refused; nothing is left out in silence.

Beside OpenAI's own fields these are understood, wherever Anthropic knows them, so that nothing of its API is lost:

    cache_control      of the request, a tool, a message, a part, a tool call
    thinking_blocks    of an assistant's message, with their signatures; `anabranch.gateway.providers.anthropic` gives them out
    is_error           of a tool's message
    extra_content      of an assistant's message: the order of its text and calls, as the gateway gives it out
    thinking, top_k    of the request
    parts and tools    in Anthropic's own form (a ``document``, a ``search_result``, a tool of a dated type) go as they are; but that
                       ``max_tool_calls`` is the ``max_uses`` of each that searches or fetches there, at most

Left out, since they change nothing of what is asked: ``seed``, penalties, ``store``, ``prediction``, ``verbosity``, ``metadata`` but for
``user_id``, names of speakers, and ``detail`` of images.
"""

import base64
import json
import re
from collections.abc import Iterable
from typing import Any

from anabranch.gateway.providers.anthropic_models import Takes, takes
from anabranch.gateway.providers.openai import unsupported
from anabranch.gateway.providers.provider import Failure, Json, UpstreamError
from anabranch.gateway.providers.thoughts import is_claudes
from anabranch.web.body import is_too_deep
from anabranch.web.json_size import MOST_PARTS, MOST_VALUES, JsonRoom, JsonSizeError
from anabranch.web.said_order import in_turn

REFUSED = ("n", "logprobs", "top_logprobs", "logit_bias", "audio", "functions", "function_call", "web_search_options")

# By which a JSON answer is given where the model knows no schemas; taken out of the answer again.
ANSWER_TOOL = "answer_in_json"

# Parts that are Anthropic's own already.
NATIVE = frozenset(
    {
        "document",
        "search_result",
        "image",
        "thinking",
        "redacted_thinking",
        "server_tool_use",
        "web_search_tool_result",
        "web_fetch_tool_result",
        "code_execution_tool_result",
        "bash_code_execution_tool_result",
        "text_editor_code_execution_tool_result",
        "tool_search_tool_result",
        "mcp_tool_use",
        "mcp_tool_result",
        "container_upload",
        "compaction",
    }
)
_NATIVE_TOOL = re.compile(r"[a-z_]+_20\d{6}")

# Of these, such as take ``max_uses``: see `anabranch.gateway.asked`, which believes that.
_COUNTED = ("web_search", "web_fetch")

# Tokens to think with. The least that Anthropic takes is 1,024.
BUDGETS = {"minimal": 1024, "low": 2048, "medium": 8192, "high": 16384, "xhigh": 24576, "max": 32768}
LEAST_BUDGET = 1024
_TIERS = {"auto": "auto", "standard_only": "standard_only", "default": "standard_only"}


def translated(body: Json, model: str, max_tokens: int) -> Json:
    """A chat request as a messages request. Raises UpstreamError (``unsupported``) for what has no counterpart.

    Args:
        body: as it came, of any shape; one that is none raises KeyError, TypeError, AttributeError or ValueError.
        model: what it is called there, which says what it takes (`takes`).
        max_tokens: for a request that names none.
    """
    for name in REFUSED:
        if body.get(name) and not (name == "n" and body[name] == 1):
            raise unsupported(f"{name} cannot be asked of anthropic")
    if "audio" in (body.get("modalities") or ()):
        raise unsupported("modalities: anthropic answers in text alone")
    can = takes(model)
    system, messages = _messages(body.get("messages") or [])
    made: Json = {
        "model": model,
        "max_tokens": body.get("max_completion_tokens") or body.get("max_tokens") or max_tokens,
        "messages": messages,
    }
    if system:
        made["system"] = system
    for name in ("cache_control", "stream"):
        if body.get(name) is not None:
            made[name] = body[name]
    _add_metadata(made, body)
    made |= _tools(body, can)
    _add_format(made, body.get("response_format"), can)
    _add_thinking(made, body, can)
    _add_sampling(made, body, can)
    return made


def adapted(body: Json, model: str, stream: bool) -> Json:
    """A request of Anthropic's own form for one of its models: as it came, but for what the model is known not to take.

    Raises as `translated` does.
    """
    can = takes(model)
    made = {name: value for name, value in body.items() if name not in ("model", "stream")} | {"model": model}
    if stream:
        made["stream"] = True
    if isinstance(made.get("messages"), list):
        made["messages"] = [one for message in made["messages"] if (one := _own_thoughts(message)) is not None]
    if not can.sampling:
        for name in ("temperature", "top_p", "top_k"):
            made.pop(name, None)
    thinking = made.get("thinking")
    if thinking is not None and not can.budget and can.adaptive and thinking.get("type") == "enabled":
        made["thinking"] = _without_budget(thinking)
    return made


_THOUGHTS = ("thinking", "redacted_thinking")


def _own_thoughts(message: Json) -> Json | None:
    """A message without what another model thought, which Anthropic refuses; None if nothing else is in it."""
    content = message.get("content") if message.get("role") == "assistant" else None
    if not isinstance(content, list):
        return message
    kept = [block for block in content if block.get("type") not in _THOUGHTS or is_claudes(block)]
    if len(kept) == len(content):
        return message
    return {**message, "content": kept} if kept else None


def _without_budget(thinking: Json) -> Json:
    return {name: value for name, value in thinking.items() if name != "budget_tokens"} | {"type": "adaptive"}


def forces_json(body: Json, model: str) -> bool:
    """Whether the answer to a request comes as a call of `ANSWER_TOOL`."""
    wanted = body.get("response_format")
    if not isinstance(wanted, dict) or wanted.get("type") != "json_schema":
        return isinstance(wanted, dict) and wanted.get("type") == "json_object"
    named = wanted.get("json_schema")
    # As `_add_format` has it: without a schema there is nothing that the model could take.
    return not takes(model).schema or not isinstance(named, dict) or named.get("schema") is None


def _add_metadata(made: Json, body: Json) -> None:
    """Whose request it is, if that is said; the rest of OpenAI's ``metadata`` is for its store."""
    metadata = body.get("metadata")
    user = metadata.get("user_id") if isinstance(metadata, dict) else None
    user = user or body.get("user") or body.get("safety_identifier")
    if user:
        made["metadata"] = {"user_id": user}
    tier = body.get("service_tier")
    if tier is not None:
        if tier not in _TIERS:
            raise unsupported(f"service_tier {tier!r} cannot be asked of anthropic")
        made["service_tier"] = _TIERS[tier]


def _add_sampling(made: Json, body: Json, can: Takes) -> None:
    stop = body.get("stop")
    if stop:
        stops = [stop] if isinstance(stop, str) else list(stop)
        if not all(one.strip() for one in stops):
            raise unsupported("stop: anthropic takes no text of blanks alone")
        made["stop_sequences"] = stops
    if not can.sampling:
        return
    for name in ("temperature", "top_p", "top_k"):
        if body.get(name) is not None:
            made[name] = body[name]
    # OpenAI's scale goes to 2, Anthropic's to 1.
    if made.get("temperature", 0) > 1:
        made["temperature"] = 1.0
    if can.one_of_two and "temperature" in made:
        made.pop("top_p", None)
    if (made.get("thinking") or {}).get("type") in ("enabled", "adaptive") and body.get("thinking") is None:
        # The thinking is ours, of a wish for effort; with it there is no sampling.
        for name in ("temperature", "top_p", "top_k"):
            made.pop(name, None)


def _add_thinking(made: Json, body: Json, can: Takes) -> None:
    """``thinking`` as it is, as far as the model takes it, else what ``reasoning_effort`` comes to."""
    given, effort = body.get("thinking"), body.get("reasoning_effort")
    if given is not None:
        if not can.budget and can.adaptive and given.get("type") == "enabled":
            given = _without_budget(given)
        made["thinking"] = given
        budget = given.get("budget_tokens")
        if isinstance(budget, int) and not (body.get("max_completion_tokens") or body.get("max_tokens")):
            # Thoughts are part of the answer's tokens.
            made["max_tokens"] += budget
    if not effort or effort == "none":
        return
    if effort not in BUDGETS:
        raise unsupported(f"reasoning_effort is {effort!r}; anthropic has {', '.join(BUDGETS)}")
    if can.adaptive:
        level = {"minimal": "low", "xhigh": "xhigh" if can.xhigh else "high"}.get(effort, effort)
        made["output_config"] = {**made.get("output_config", {}), "effort": level}
        if given is None and not _is_forced(made):
            made["thinking"] = {"type": "adaptive"}
    elif can.budget and given is None and not _is_forced(made):
        # It is part of the answer's tokens, of which half is left for words.
        budget = min(BUDGETS[effort], made["max_tokens"] // 2)
        if budget >= LEAST_BUDGET:
            made["thinking"] = {"type": "enabled", "budget_tokens": budget}


def _is_forced(made: Json) -> bool:
    """A tool must be called: there is no thinking before it."""
    return made.get("tool_choice", {}).get("type") in ("any", "tool")


def _add_format(made: Json, wanted: Any, can: Takes) -> None:
    """``response_format``: a schema where the model takes one, else a tool that takes the answer."""
    kind = (wanted or {}).get("type", "text")
    if kind == "text":
        return
    if kind not in ("json_object", "json_schema"):
        raise unsupported(f"response_format {kind!r} cannot be asked of anthropic")
    schema = wanted["json_schema"].get("schema") if kind == "json_schema" else None
    if schema is not None and can.schema:
        made["output_config"] = {"format": {"type": "json_schema", "schema": schema}}
        return
    if made.get("tools"):
        raise unsupported(f"response_format {kind} and tools together cannot be asked of this model of anthropic")
    made["tools"] = [
        {
            "name": ANSWER_TOOL,
            "description": "Give the whole answer as the input of this tool.",
            "input_schema": schema or {"type": "object", "properties": {}, "additionalProperties": True},
        }
    ]
    made["tool_choice"] = {"type": "tool", "name": ANSWER_TOOL, "disable_parallel_tool_use": True}


# Tools


def _tools(body: Json, can: Takes) -> Json:
    most = body.get("max_tool_calls")
    tools = [_held_to(most, _tool(tool, can)) for tool in body.get("tools") or []]
    if not tools:
        return {}
    choice = body.get("tool_choice") or "auto"
    if isinstance(choice, dict):
        if choice.get("type", "function") != "function":
            raise unsupported(f"tool_choice {choice.get('type')!r} cannot be asked of anthropic")
        how: Json = {"type": "tool", "name": choice["function"]["name"]}
    else:
        how = {"type": {"auto": "auto", "required": "any", "none": "none"}.get(choice, "auto")}
    if body.get("parallel_tool_calls") is False and how["type"] != "none":
        how["disable_parallel_tool_use"] = True
    return {"tools": tools, "tool_choice": how}


def _held_to(most: Any, tool: Json) -> Json:
    """``max_tool_calls``, which Anthropic has for no request: of each tool that runs there, and that takes it, as its own."""
    if type(most) is not int or most <= 0 or not str(tool.get("type")).startswith(_COUNTED):
        return tool
    own = tool.get("max_uses")
    return {**tool, "max_uses": min(own, most) if type(own) is int else most}


def _tool(tool: Json, can: Takes) -> Json:
    kind = tool.get("type", "function")
    if kind != "function":
        if _NATIVE_TOOL.fullmatch(kind):
            return tool
        raise unsupported(f"a tool of type {kind!r} cannot be offered to anthropic")
    function = tool["function"]
    made = {
        "name": function["name"],
        "description": function.get("description") or "",
        "input_schema": function.get("parameters") or {"type": "object", "properties": {}},
    }
    if function.get("strict") and can.schema:
        made["strict"] = True
    return _marked(made, tool, function)


def _marked(block: Json, *sources: Json) -> Json:
    """A block with the ``cache_control`` of what it was made of."""
    mark = next((source["cache_control"] for source in sources if source.get("cache_control") is not None), None)
    return block if mark is None else {**block, "cache_control": mark}


# Messages


def _messages(given: Iterable[Json]) -> tuple[str | list[Json], list[Json]]:
    """The system prompt, and turns that alternate between user and assistant."""
    system: list[Json] = []
    turns: list[Json] = []
    room = JsonRoom(MOST_VALUES, MOST_PARTS)
    for message in given:
        role, content = message.get("role"), message.get("content")
        if role in ("system", "developer"):
            system += _last_marked(_blocks(content), message)
            continue
        if role == "function" or message.get("function_call"):
            raise unsupported("function_call: anthropic is asked by tools")
        if role == "tool":
            role, blocks = "user", [_tool_result(message)]
        elif role == "assistant":
            blocks = [
                *_thoughts(message.get("thinking_blocks")),
                *_turn(message, room),
            ]
        else:
            role, blocks = "user", _last_marked(_blocks(content), message)
        if not blocks:
            continue
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += blocks
        else:
            turns.append({"role": role, "content": blocks})
    return _system(system), turns


def _turn(message: Json, room: JsonRoom) -> list[Json]:
    """What an assistant said and called, in its order."""
    pieces = in_turn(message)
    last = max((at for at, (kind, _) in enumerate(pieces) if kind == "text"), default=-1)
    made: list[Json] = []
    for at, (kind, piece) in enumerate(pieces):
        if kind == "call":
            made.append(_tool_use(piece, room))
        else:
            blocks = _blocks(piece)
            made += _last_marked(blocks, message) if at == last else blocks
    return made


def _system(blocks: list[Json]) -> str | list[Json]:
    """As one text, unless something is said of a part of it."""
    if any(set(block) != {"type", "text"} for block in blocks):
        return blocks
    return "\n\n".join(block["text"] for block in blocks)


def _last_marked(blocks: list[Json], message: Json) -> list[Json]:
    """The mark of a message is that of the last block of its content."""
    return [*blocks[:-1], _marked(blocks[-1], blocks[-1], message)] if blocks else blocks


def _thoughts(blocks: Any) -> list[Json]:
    """What a model thought goes back to it whole; what is not signed it did not think."""
    return [
        {name: value for name, value in block.items() if name != "index"} for block in blocks or () if is_claudes(block)
    ]


def _tool_result(message: Json) -> Json:
    blocks = _blocks(message.get("content"))
    is_text = all(set(block) == {"type", "text"} for block in blocks)
    content = "".join(block["text"] for block in blocks) if is_text else blocks
    made: Json = {"type": "tool_result", "tool_use_id": message.get("tool_call_id"), "content": content}
    if message.get("is_error"):
        made["is_error"] = True
    return _marked(made, message)


def _blocks(content: Any) -> list[Json]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return [_block(part) for part in content or []]


def _block(part: Json) -> Json:
    kind = part.get("type")
    if kind in NATIVE:
        return part
    if kind == "text":
        made: Json = {"type": "text", "text": part["text"]}
        if part.get("citations"):
            made["citations"] = part["citations"]
    elif kind == "refusal":
        made = {"type": "text", "text": part["refusal"]}
    elif kind == "image_url":
        made = {"type": "image", "source": _source(part["image_url"]["url"])}
    elif kind == "file":
        made = _document(part)
    else:
        raise unsupported(f"a part of a message of type {kind!r} cannot be sent to anthropic")
    return _marked(made, part)


def _source(url: str) -> Json:
    if not url.startswith("data:"):
        return {"type": "url", "url": url}
    media, mark, data = url.removeprefix("data:").partition(";base64,")
    if not mark:
        raise ValueError("a data: URL must hold base64")
    return {"type": "base64", "media_type": media, "data": data}


def _document(part: Json) -> Json:
    """A file of OpenAI's form; what is said of it in Anthropic's words stays."""
    given = part["file"]
    data = given.get("file_data")
    if not data:
        raise unsupported("a file by its id cannot be sent to anthropic; send its data")
    source = (
        _source(data) if data.startswith("data:") else {"type": "base64", "media_type": "application/pdf", "data": data}
    )
    if source["media_type"].startswith("text/"):
        text = base64.b64decode(source["data"], validate=True).decode()
        source = {"type": "text", "media_type": "text/plain", "data": text}
    elif source["media_type"].startswith("image/"):
        return {"type": "image", "source": source}
    made: Json = {"type": "document", "source": source}
    if given.get("filename"):
        made["title"] = given["filename"]
    return made | {name: part[name] for name in ("title", "context", "citations") if part.get(name) is not None}


def _tool_use(call: Json, room: JsonRoom) -> Json:
    """A call; its arguments count in ``room``. Raises UpstreamError."""
    if call.get("type", "function") != "function":
        raise unsupported(f"a tool call of type {call.get('type')!r} cannot be sent to anthropic")
    function = call["function"]
    text, why_not = function.get("arguments") or "{}", ""
    try:
        # The parser holds up all other requests for as long as it takes.
        room.take(text.encode("utf-8", "replace"))
        given = json.loads(text)
        why_not = "are nested too deep" if is_too_deep(given) else ""
    except JsonSizeError as error:
        why_not = f"have, with those of the other calls, {error}"
    except RecursionError:
        why_not = "are nested too deep"
    except ValueError:
        why_not = "are no JSON"
    if not why_not and not isinstance(given, dict):
        why_not = "are no JSON object"
    if why_not:
        message = f"the arguments of the tool call {call.get('id')!r} {why_not}"
        raise UpstreamError(Failure(kind="request", message=message, status=400))
    return _marked({"type": "tool_use", "id": call.get("id"), "name": function["name"], "input": given}, call)
