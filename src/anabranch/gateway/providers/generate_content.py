"""The form of Google's ``generateContent``: chat requests put into it, its answers and streams read.

Signatures of thoughts go out and come back as Google's own OpenAI-compatible API has them: ``extra_content.google.thought_signature`` of a
tool call, or of the message.
"""

import mimetypes
import re
from typing import Any

from anabranch.gateway.media_tokens import kind_of_url
from anabranch.gateway.providers.openai import unsupported
from anabranch.gateway.providers.provider import Failure, Json, UpstreamError, Usage
from anabranch.gateway.providers.translation import (
    ForeignStream,
    Room,
    arguments,
    count,
    data_url,
    functions,
    message,
    most_tokens,
    refuse,
    room,
    schema_of,
    stops,
    text_of,
    tool_call,
)

# Why an answer ended; all that is not here was held back, or came to nothing.
FINISH = {"STOP": "stop", "MAX_TOKENS": "length", "FINISH_REASON_UNSPECIFIED": "stop"}
WITHHELD = "content_filter"
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
    thinking = _thinking(body.get("reasoning_effort"), config)
    if thinking:
        generation["thinkingConfig"] = thinking
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
    for given in body.get("messages") or []:
        role = given.get("role")
        if role in ("system", "developer"):
            system.append(text_of(given.get("content"), "gemini"))
            continue
        if role == "assistant":
            role, parts = "model", _said(given, kept, names, model)
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


def _said(given: Json, kept: Room, names: dict[str, str], model: str) -> list[Json]:
    text = text_of(given.get("content"), "gemini")
    parts: list[Json] = [{"text": text}] if text else []
    if parts and (signature := _signature(given)):
        parts[0]["thoughtSignature"] = signature
    for at, call in enumerate(given.get("tool_calls") or []):
        name = call["function"]["name"]
        names[call.get("id")] = name
        part: Json = {"functionCall": {"name": name, "args": arguments(call, kept)}}
        # Of calls made side by side the first alone carries one.
        signature = _signature(call) or (NO_SIGNATURE if at == 0 and _is_third(model) else None)
        parts.append(part | ({"thoughtSignature": signature} if signature else {}))
    return parts


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


# Answers


def check_blocked(value: Json) -> None:
    """Raises UpstreamError (``filter``) where the prompt was refused, and so there is no answer."""
    reason = (value.get("promptFeedback") or {}).get("blockReason")
    if reason and not value.get("candidates"):
        message = f"the upstream's filter refused the prompt ({str(reason)[:100]})"
        raise UpstreamError(Failure(kind="filter", message=message, status=400, code="content_filter"))


def usage_of(given: Json) -> tuple[Usage, int]:
    """Tokens, and those of them that were thoughts. Gemini counts thoughts beside the answer, and cached tokens among the prompt."""
    prompt = count(given.get("promptTokenCount")) + count(given.get("toolUsePromptTokenCount"))
    thoughts = count(given.get("thoughtsTokenCount"))
    completion = count(given.get("candidatesTokenCount")) + thoughts
    if given.get("candidatesTokenCount") is None:
        # Left out of an answer that has some, they are in the sum.
        completion = max(completion, count(given.get("totalTokenCount")) - prompt)
    asked, made = given.get("promptTokensDetails"), given.get("candidatesTokensDetails")
    usage = Usage(
        prompt,
        completion,
        min(count(given.get("cachedContentTokenCount")), prompt),
        audio_input=min(prompt, _of_kind(asked, "AUDIO")),
        image_input=min(prompt, _of_kind(asked, "IMAGE")),
        audio_output=min(completion, _of_kind(made, "AUDIO")),
        image_output=min(completion, _of_kind(made, "IMAGE")),
    )
    return usage, thoughts


def _of_kind(details: Any, modality: str) -> int:
    """Tokens of sound or pictures, as far as they are told apart."""
    found = [one for one in details or () if isinstance(one, dict) and one.get("modality") == modality]
    return sum(count(one.get("tokenCount")) for one in found)


def call_of(part: Json) -> Json:
    """A function call as a tool call, with the signature of its thought."""
    given = part["functionCall"]
    call = tool_call(given["name"], given.get("args"), given.get("id"))
    return call | _signed(part)


def _signed(part: Json) -> Json:
    signature = part.get("thoughtSignature")
    return {"extra_content": {"google": {"thought_signature": signature}}} if signature else {}


def finish_of(reason: Any, has_calls: bool) -> str:
    """OpenAI's word for why an answer ended."""
    found = FINISH.get(reason, WITHHELD)
    return "tool_calls" if has_calls and found == "stop" else found


def choice_of(at: int, candidate: Json) -> Json:
    """A candidate as a choice, in place ``at`` unless it says another. Raises what reading a value of another shape raises."""
    parts = (candidate.get("content") or {}).get("parts") or []
    said = [part for part in parts if "text" in part]
    calls = [call_of(part) for part in parts if "functionCall" in part]
    made = message(
        "".join(part["text"] for part in said if not part.get("thought")),
        "".join(part["text"] for part in said if part.get("thought")),
        calls,
    )
    for part in parts:
        if "functionCall" not in part:
            made |= _signed(part)
    choice = {
        "index": candidate.get("index", at),
        "message": made,
        "finish_reason": finish_of(candidate.get("finishReason"), bool(calls)),
    }
    logprobs = _logprobs(candidate.get("logprobsResult"))
    return choice | ({"logprobs": logprobs} if logprobs else {})


def _logprobs(given: Any) -> Json | None:
    if not given:
        return None
    tops = given.get("topCandidates") or []
    content = []
    for at, chosen in enumerate(given.get("chosenCandidates") or []):
        others = tops[at].get("candidates") or [] if at < len(tops) else []
        top = [{"token": one["token"], "logprob": one["logProbability"], "bytes": None} for one in others]
        content.append(
            {"token": chosen["token"], "logprob": chosen["logProbability"], "bytes": None, "top_logprobs": top}
        )
    return {"content": content}


class GeminiStream(ForeignStream):
    """Turns the events of one answer, each a piece of it in the form of a whole one, into chunks.

    There is no last event that says so: it is over when every candidate has ended, and the usage has been told.
    """

    def __init__(self, provider: Any, num_candidates: int) -> None:
        super().__init__(provider)
        self._num_candidates = num_candidates
        self._ended: set[int] = set()

    def _chunks(self, value: Json) -> list[Json]:
        if isinstance(value.get("error"), dict):
            raise self._provider._told(value)
        check_blocked(value)
        if value.get("responseId"):
            self._head["id"] = value["responseId"]
        self._head["model"] = value.get("modelVersion") or self._head["model"]
        chunks = [
            chunk
            for candidate in value.get("candidates") or []
            for chunk in self._of(candidate.get("index", 0), candidate)
        ]
        if "usageMetadata" in value:
            usage, reasoning = usage_of(value["usageMetadata"])
            self.told = usage
            if len(self._ended) >= self._num_candidates:
                chunks.append(self._used(usage, reasoning))
                self.is_done = True
        return chunks

    def _of(self, index: int, candidate: Json) -> list[Json]:
        chunks = []
        for part in (candidate.get("content") or {}).get("parts") or []:
            if "functionCall" in part:
                chunks.append(self._called(call_of(part), index))
            elif part.get("text"):
                name = "reasoning_content" if part.get("thought") else "content"
                chunks.append(self._chunk({name: part["text"], **_signed(part)}, None, index))
            elif signed := _signed(part):
                chunks.append(self._chunk(signed, None, index))
        if reason := candidate.get("finishReason"):
            self._ended.add(index)
            chunks.append(self._chunk({}, finish_of(reason, index in self._calls), index))
        return chunks
