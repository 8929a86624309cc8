"""Chat requests in the form of Google's ``generateContent``; its answers see `generated_content`.

Signatures of thoughts go out and come back as Google's own OpenAI-compatible API has them: ``extra_content.google.thought_signature`` of a
tool call, or of the message; and in ``thinking_blocks``, of which Anthropic's form has some too (`thoughts`).
"""

import mimetypes
import re
from collections import ChainMap
from collections.abc import Mapping
from typing import Any

from anabranch.gateway.media_tokens import kind_of_url
from anabranch.gateway.providers.openai import unsupported
from anabranch.gateway.providers.provider import Json
from anabranch.gateway.providers.thoughts import of_call, of_google, of_picture
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

SAMPLING = {
    "temperature": "temperature",
    "top_p": "topP",
    "top_k": "topK",
    "seed": "seed",
    "presence_penalty": "presencePenalty",
    "frequency_penalty": "frequencyPenalty",
}

# Gemini 3 refuses calls of tools without the signature of the thought that made them, unless it is this one: for calls that another model
# made (documented under "Thought signatures").
NO_SIGNATURE = "skip_thought_signature_validator"

# How much Gemini 2.5 may think, by OpenAI's words for it (documented under "OpenAI compatibility"); later models know the words.
BUDGETS = {"none": 0, "minimal": 1024, "low": 1024, "medium": 8192, "high": 24576}

# Models that think; those that paint do not before the third.
_THINKS = re.compile(r"(?:.*/)?gemini-(?:2\.5-(?!flash-image)|[3-9]|\d\d)")
# Gemini 2.5 Pro cannot go without.
LEAST_OF_PRO = 128


# Requests


def translated(body: Json, config: Any) -> Json:
    """A chat request as one of ``generateContent``. Raises UpstreamError."""
    refuse(body, (), "gemini")
    system, contents = _contents(body, config.model)
    made: Json = {"contents": contents, **_tools(body)}
    if system:
        made["systemInstruction"] = {"parts": [{"text": system}]}
    if config.safety:
        made["safetySettings"] = [{"category": name, "threshold": value} for name, value in config.safety.items()]
    generation = {ours: body[name] for name, ours in SAMPLING.items() if body.get(name) is not None}
    if body.get("n") not in (None, 1):
        generation["candidateCount"] = body["n"]
    if most := most_tokens(body):
        generation["maxOutputTokens"] = most
    if stop := stops(body):
        generation["stopSequences"] = stop
    if body.get("logprobs"):
        generation |= {"responseLogprobs": True, "logprobs": body.get("top_logprobs") or 0}
    is_json, schema = schema_of(body)
    if is_json:
        generation["responseMimeType"] = "application/json"
        if schema is not None:
            generation["responseJsonSchema"] = schema
    thinking = _thinking(body.get("reasoning_effort"), config) | _thinking_asked(body, config.model)
    if thinking:
        generation["thinkingConfig"] = thinking
    if "image" in (words := [str(word).lower() for word in body.get("modalities") or ()]):
        generation["responseModalities"] = [word.upper() for word in words]
    if generation:
        made["generationConfig"] = generation
    return made


def _thinking(effort: Any, config: Any) -> Json:
    made: Json = {"includeThoughts": True} if config.thoughts else {}
    if effort is None:
        return made if config.thinking_budget is None else made | {"thinkingBudget": config.thinking_budget}
    if effort not in BUDGETS:
        raise unsupported(f"reasoning_effort {effort!r} cannot be asked of gemini; it knows {', '.join(BUDGETS)}")
    if _is_third(config.model):
        # It always thinks a little.
        return made | {"thinkingLevel": {"none": "minimal"}.get(effort, effort)}
    return made | {"thinkingBudget": BUDGETS[effort]}


def _thinking_asked(body: Json, model: str) -> Json:
    """Anthropic's ``thinking``, of models that think; where effort is named too, that says how much."""
    given = body.get("thinking")
    if not isinstance(given, dict) or not _THINKS.match(model):
        return {}
    kind, budget = given.get("type"), given.get("budget_tokens")
    made: Json = {} if kind == "disabled" else {"includeThoughts": True}
    if body.get("reasoning_effort") is not None or _is_third(model):
        return made
    if kind == "disabled":
        return {"thinkingBudget": LEAST_OF_PRO if "-pro" in model else 0}
    return made | {"thinkingBudget": budget if kind == "enabled" and type(budget) is int else -1}


def _is_third(model: str) -> bool:
    return re.match(r"(?:.*/)?gemini-(?:[3-9]|\d\d)", model) is not None


def _tools(body: Json) -> Json:
    declared = []
    for function in functions(body, "gemini"):
        one = {"name": function["name"], "description": function.get("description") or ""}
        declared.append(one | ({"parametersJsonSchema": schema} if (schema := function.get("parameters")) else {}))
    if not declared:
        return {}
    choice = body.get("tool_choice") or "auto"
    if isinstance(choice, dict):
        how: Json = {"mode": "ANY", "allowedFunctionNames": [choice["function"]["name"]]}
    else:
        how = {"mode": {"auto": "AUTO", "required": "ANY", "none": "NONE"}[choice]}
    return {"tools": [{"functionDeclarations": declared}], "toolConfig": {"functionCallingConfig": how}}


def _contents(body: Json, model: str) -> tuple[str, list[Json]]:
    """The system instruction, and turns that alternate between user and model."""
    kept, names = room(), dict[str, str]()
    system: list[str] = []
    turns: list[Json] = []
    messages = body.get("messages") or []
    # What one turn said may have come in several messages, and its thoughts with the first.
    thoughts = (thought for given in messages for thought in of_google(given.get("thinking_blocks")))
    signed = {place: signature for _, place, signature in thoughts if place not in ("h", "t")}
    for given in messages:
        role = given.get("role")
        if role in ("system", "developer"):
            system.append(text_of(given.get("content"), "gemini"))
            continue
        if role == "assistant":
            role, parts = "model", _said(given, kept, names, signed, model)
        elif role == "tool":
            role, parts = "user", [_result(given, names)]
        else:
            role, parts = "user", _parts(given.get("content"))
        if not parts:
            continue
        if turns and turns[-1]["role"] == role:
            turns[-1]["parts"] += parts
        else:
            turns.append({"role": role, "parts": parts})
    return "\n\n".join(filter(None, system)), turns


def _said(given: Json, kept: Room, names: dict[str, str], signed: dict[str, str], model: str) -> list[Json]:
    """What the model thought, said and called, each with its signature. ``signed`` has those of calls and pictures of all messages."""
    thoughts = of_google(given.get("thinking_blocks"))
    # Its own first. Those of all are looked at and never copied: there are as many of them as there were turns.
    signatures = ChainMap({place: signature for _, place, signature in thoughts}, signed)
    parts: list[Json] = [
        {"text": thought, "thought": True} | _with(signature if place == "h" else None)
        for thought, place, signature in thoughts
        if thought
    ]
    begin, has_called = len(parts), False
    for kind, piece in _turn(given):
        if kind == "text":
            parts += _content(piece, signatures)
            continue
        name = piece["function"]["name"]
        names[piece.get("id")] = name
        part: Json = {"functionCall": {"name": name, "args": arguments(piece, kept)}}
        # Of calls made side by side the first alone carries one.
        own = _signature(piece) or signatures.get(of_call(piece.get("id")))
        parts.append(part | _with(own or (NO_SIGNATURE if not has_called and _is_third(model) else None)))
        has_called = True
    if of_text := _signature(given) or signatures.get("t"):
        texts = [part for part in parts[begin:] if "text" in part]
        if not texts:
            texts = [{"text": ""}]
            parts[begin:begin] = texts
        texts[-1] |= _with(of_text)
    return parts


def _turn(given: Json) -> list[tuple[str, Any]]:
    """See `in_turn`; pictures that are no part of the content stand before the calls."""
    pieces = in_turn(given)
    first_call = next((at for at, (kind, _) in enumerate(pieces) if kind == "call"), len(pieces))
    images = [image for image in given.get("images") or () if image.get("type") == "image_url"]
    return [*pieces[:first_call], *([("text", images)] if images else []), *pieces[first_call:]]


def _content(content: Any, signatures: Mapping[str, str]) -> list[Json]:
    """A piece of what the model said: its text as one part, and then its pictures."""
    content = content if isinstance(content, list) else [{"type": "text", "text": text_of(content, "gemini")}]
    text = text_of([part for part in content if part.get("type") != "image_url"], "gemini")
    parts: list[Json] = [{"text": text}] if text else []
    for picture in content:
        if picture.get("type") == "image_url":
            own = _signature(picture) or signatures.get(of_picture(picture["image_url"]["url"]))
            parts.append(_part(picture) | _with(own))
    return parts


def _with(signature: str | None) -> Json:
    return {"thoughtSignature": signature} if signature else {}


def _signature(given: Json) -> str | None:
    """Where Google's own OpenAI-compatible API has it."""
    found: Any = given
    for name in ("extra_content", "google", "thought_signature"):
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, str) else None


def _result(given: Json, names: dict[str, str]) -> Json:
    name = names.get(given.get("tool_call_id")) or given.get("name")  # type: ignore[arg-type]
    if not name:
        raise KeyError(f"no tool call before it has the id {given.get('tool_call_id')!r}")
    return {"functionResponse": {"name": name, "response": {"output": text_of(given.get("content"), "gemini")}}}


def _parts(content: Any) -> list[Json]:
    if isinstance(content, list):
        return [_part(part) for part in content]
    text = text_of(content, "gemini")
    return [{"text": text}] if text else []


def _part(part: Json) -> Json:
    kind = part.get("type")
    if kind == "text":
        return {"text": part["text"]}
    if kind == "image_url":
        url = part["image_url"]["url"]
        kind = kind_of_url(url)
        if kind and not kind.startswith("image/"):
            raise unsupported(f"an image_url of type {kind[:80]!r} cannot be sent to gemini; it must be an image")
        return _media(url, "image/jpeg")
    if kind == "input_audio":
        sound = part["input_audio"]
        return {"inlineData": {"mimeType": f"audio/{sound['format']}", "data": sound["data"]}}
    if kind == "file" and "file_data" in part["file"]:
        return _media(part["file"]["file_data"], "application/pdf")
    raise unsupported(f"a part of a message of type {kind!r} cannot be sent to gemini")


def _media(url: str, usual: str) -> Json:
    found = data_url(url)
    if found is not None:
        return {"inlineData": {"mimeType": found[0], "data": found[1]}}
    guessed = mimetypes.guess_type(url.partition("?")[0])[0]
    return {"fileData": {"mimeType": guessed or usual, "fileUri": url}}
