"""Google's Gemini API (``generateContent``) behind OpenAI's: requests, answers, streams and errors, both ways.

`anabranch.gateway.providers.vertex` is the same form under the addresses and tokens of Google Cloud.
"""

import json
import mimetypes
import re
from dataclasses import replace
from typing import Any, Literal
from urllib.parse import quote

from anabranch.config import Field, configclass
from anabranch.errors import ConfigError
from anabranch.gateway.providers.keys import read_key
from anabranch.gateway.providers.openai import unsupported
from anabranch.gateway.providers.provider import (
    RETRY_AFTER_S,
    Answer,
    Failure,
    Headers,
    HttpCall,
    Json,
    Provider,
    UpstreamError,
    UpstreamRequest,
    Usage,
    estimated,
    hidden,
    parse_object,
)
from anabranch.gateway.providers.translation import (
    ForeignStream,
    Room,
    arguments,
    asked,
    check_wire,
    completion,
    count,
    data_url,
    embeddings,
    functions,
    head,
    message,
    most_tokens,
    read,
    refuse,
    room,
    schema_of,
    stops,
    text_of,
    texts,
    tool_call,
)

REFUSED = ("logit_bias", "audio")
MODEL = re.compile(r"(?!.*\.\.)[\w.:@-]+(/[\w.:@-]+)*", re.ASCII)

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

# Whole sentences, in which nothing is a sender's: there is no word for this in the error itself.
_TOO_LONG = re.compile(r"The input token count \(?\d+\)? exceeds the maximum number of tokens allowed \(?\d+\)?\.?")
_REASONS = {"API_KEY_INVALID": "auth", "API_KEY_EXPIRED": "auth", "BILLING_DISABLED": "credit"}


class Gemini(Provider, kind="gemini"):
    """Talks to ``/v1beta/models/NAME:generateContent``."""

    @configclass
    class Config(Provider.Config):
        """Where it is and how it is asked.

        Attributes:
            base_url: without the version.
            key_env: environment variable that holds the key.
            key_file: encrypted file that holds it, read if the variable is not set.
            version: of the API.
            thoughts: ask for summaries of what the model thinks, given as ``reasoning_content``.
            thinking_budget: tokens that it may think for, where the request names no ``reasoning_effort``; 0 for none, -1 as it likes, None
                as the model comes.
            safety: category (``HARM_CATEGORY_...``) to threshold (``BLOCK_...``, ``OFF``).
            headers: to send with each call; no keys here.
            proxy: URL of an HTTP proxy; None connects directly.
        """

        base_url: str | None = "https://generativelanguage.googleapis.com"
        key_env: str | None = "GEMINI_API_KEY"
        key_file: str | None = None
        version: Literal["v1", "v1beta", "v1beta1"] = "v1beta"
        thoughts: bool = False
        thinking_budget: int | None = Field(default=None, ge=-1)
        safety: dict[str, str] = Field(default_factory=dict)
        headers: dict[str, str] = Field(default_factory=dict)
        proxy: str | None = None

        def __post_init__(self) -> None:
            check_wire(self)
            if self.model and not MODEL.fullmatch(self.model):
                raise ConfigError(f"model is {self.model!r}; it must be a name such as gemini-2.5-flash")

    endpoints = ("chat", "embeddings")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._key = read_key(config.key_env, config.key_file)
        key = {} if self._key is None else {"x-goog-api-key": self._key.reveal()}
        self._headers = {"content-type": "application/json", **config.headers, **key}
        self._at = self._place()

    def _place(self) -> str:
        """The address of the model."""
        return f"{self.config.base_url.rstrip('/')}/{self.config.version}/models/{quote(self.config.model)}"

    def build(self, request: UpstreamRequest) -> HttpCall:
        """The messages in Gemini's form. Raises UpstreamError."""
        if request.endpoint not in self.endpoints:
            raise unsupported(f"{request.endpoint} cannot be asked of {self.kind}")
        with asked():
            if request.endpoint == "embeddings":
                method, body = self._embedding(request)
            else:
                method = "streamGenerateContent?alt=sse" if request.stream else "generateContent"
                body = translated(request.body, self.config)
        headers = {**self._headers, **request.headers} if request.headers else self._headers
        return HttpCall(f"{self._at}:{method}", headers, request.dumped(body), self.config.proxy)

    def _embedding(self, request: UpstreamRequest) -> tuple[str, Json]:
        one: Json = {"model": f"models/{self.config.model}"}
        if request.body.get("dimensions"):
            one["outputDimensionality"] = request.body["dimensions"]
        found = [{**one, "content": {"parts": [{"text": text}]}} for text in texts(request, "gemini")]
        return "batchEmbedContents", {"requests": found}

    def parse(self, request: UpstreamRequest, body: bytes) -> Answer:
        """An answer in OpenAI's form. Raises UpstreamError."""
        value = parse_object(body)
        if isinstance(value.get("error"), dict):
            raise self._told(value)
        with read("an answer that is none of Gemini's", body):
            if request.endpoint == "embeddings":
                return self._embedded(request, value, body)
            check_blocked(value)
            told = value.get("usageMetadata")
            choices = [_choice(at, candidate) for at, candidate in enumerate(value["candidates"])]
            usage, reasoning = usage_of(told) if told else (estimated(request, {"choices": choices}), 0)
            top = head(value.get("responseId"), value.get("modelVersion"), "chat.completion")
            return completion(top, choices, usage, reasoning)

    def _embedded(self, request: UpstreamRequest, value: Json, body: bytes) -> Answer:
        vectors = [one["values"] for one in value["embeddings"]]
        return embeddings(request, body, self.config.model, vectors, None)

    def translator(self, request: UpstreamRequest) -> "GeminiStream":
        """What reads its events."""
        asked_for = request.body.get("n")
        return GeminiStream(self, asked_for if type(asked_for) is int else 1)

    def error(self, status: int, headers: Headers, body: bytes) -> Failure:
        """By its status, and by what Google's details say."""
        failure = super().error(status, headers, _one_error(body))
        if status == 404:
            # Of all that is asked, the address alone says what can be found, and there it is the model.
            failure = replace(failure, kind="missing")
        for detail in _details(body):
            kind = _REASONS.get(str(detail.get("reason")))
            if kind is not None and status in (400, 401, 403):
                failure = replace(failure, kind=kind)  # type: ignore[arg-type]
            if failure.retry_after_s is None and (wait_s := _seconds(detail.get("retryDelay"))) is not None:
                failure = replace(failure, retry_after_s=wait_s)
        if status == 400 and failure.kind == "request" and _TOO_LONG.fullmatch(failure.message):
            failure = replace(failure, kind="context")
        return failure

    def redacted(self, failure: Failure) -> Failure:
        """Without this provider's key."""
        return hidden(failure, None if self._key is None else self._key.reveal())

    def _told(self, value: Json) -> UpstreamError:
        """An error under 200, or in a stream; its code is a status."""
        code = value["error"].get("code")
        status = code if type(code) is int and 400 <= code < 600 else 500
        return UpstreamError(self.error(status, {}, json.dumps(value).encode()))


# Requests


def translated(body: Json, config: Any) -> Json:
    """A chat request as one of ``generateContent``. Raises UpstreamError."""
    refuse(body, REFUSED, "gemini")
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
        return _media(part["image_url"]["url"], "image/jpeg")
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
    cached = min(count(given.get("cachedContentTokenCount")), prompt)
    completion = count(given.get("candidatesTokenCount")) + thoughts
    usage = Usage(
        prompt,
        completion,
        cached,
        audio_input=min(prompt, _of_kind(given.get("promptTokensDetails"), "AUDIO")),
        image_input=min(prompt, _of_kind(given.get("promptTokensDetails"), "IMAGE")),
        audio_output=min(completion, _of_kind(given.get("candidatesTokensDetails"), "AUDIO")),
        image_output=min(completion, _of_kind(given.get("candidatesTokensDetails"), "IMAGE")),
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


def _choice(at: int, candidate: Json) -> Json:
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

    def __init__(self, provider: Gemini, num_candidates: int) -> None:
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


# Errors


def _one_error(body: bytes) -> bytes:
    """Of a list of errors, which some of its addresses answer with, the first."""
    value = _read(body)
    return json.dumps(value[0]).encode() if isinstance(value, list) and value and isinstance(value[0], dict) else body


def _details(body: bytes) -> list[Json]:
    value = _read(_one_error(body))
    error = value.get("error") if isinstance(value, dict) else None
    details = error.get("details") if isinstance(error, dict) else None
    return [one for one in details if isinstance(one, dict)] if isinstance(details, list) else []


def _seconds(delay: Any) -> float | None:
    """Of a duration such as ``34.07s``."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d+)?)s", delay) if isinstance(delay, str) else None
    return min(float(match[1]), RETRY_AFTER_S) if match else None


def _read(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None
