"""Ollama's own API behind OpenAI's: ``/api/chat`` (lines of JSON), ``/api/embed``.

Ollama has an OpenAI-compatible door too (``kind = "openai"``, ``base_url = ".../v1"``); this one can set what that cannot: the size of the
context, how long a model stays loaded, whether it thinks.
"""

from dataclasses import replace
from typing import Any, Literal

from anabranch.config import Field, configclass
from anabranch.gateway.providers.keys import read_key
from anabranch.gateway.providers.openai import unsupported
from anabranch.gateway.providers.plain_chat import plain
from anabranch.gateway.providers.provider import (
    Answer,
    Failure,
    Headers,
    HttpCall,
    Json,
    Provider,
    Transport,
    UpstreamError,
    UpstreamRequest,
    Usage,
    hidden,
    parse_object,
)
from anabranch.gateway.providers.reframed import Lines, Reframed
from anabranch.gateway.providers.thoughts import unsigned
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
    message_of,
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

REFUSED = ("n", "logprobs", "top_logprobs")
PATHS = {"chat": "/api/chat", "embeddings": "/api/embed"}

# Of OpenAI's fields, and those that Ollama's users know: what ``options`` calls them.
OPTIONS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "seed": "seed",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "repeat_penalty": "repeat_penalty",
    "num_ctx": "num_ctx",
}
# How pictures begin, in base64.
_PICTURES = {"iVBOR": "image/png", "/9j/": "image/jpeg", "UklGR": "image/webp", "R0lGO": "image/gif"}
FINISH = {"stop": "stop", "length": "length", "load": "stop", "unload": "stop"}


class Ollama(Provider, kind="ollama"):
    """Talks to an Ollama server."""

    stops_when_closed = True
    is_billed = False

    @configclass
    class Config(Provider.Config):
        """Where it is and how its models run.

        Attributes:
            base_url: of the server, without ``/api``.
            key_env: environment variable that holds a key; None, as a server of one's own wants none.
            key_file: encrypted file that holds it, read if the variable is not set.
            num_ctx: tokens of context that the model is loaded with; None takes the server's, and cuts longer prompts silently.
            keep_alive: how long the model stays loaded after a request, such as ``"10m"``; ``"-1"`` for ever, None as the server has it.
            think: whether the model thinks, or how hard; None leaves it to the request's ``reasoning_effort``, and then to the model.
            headers: to send with each call; no keys here.
            proxy: URL of an HTTP proxy; None connects directly.
        """

        base_url: str = "http://127.0.0.1:11434"
        key_env: str | None = None
        key_file: str | None = None
        num_ctx: int | None = Field(default=None, ge=1)
        keep_alive: str | None = Field(default=None, pattern=r"^(-?\d+|(-?\d+(\.\d+)?(ms|s|m|h))+)$")
        think: bool | Literal["low", "medium", "high"] | None = None
        headers: dict[str, str] = Field(default_factory=dict)
        proxy: str | None = None

        def __post_init__(self) -> None:
            check_wire(self)

    endpoints = ("chat", "embeddings")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._key = read_key(config.key_env, config.key_file)
        key = {} if self._key is None else {"authorization": f"Bearer {self._key.reveal()}"}
        self._headers = {"content-type": "application/json", **config.headers, **key}
        base = config.base_url.rstrip("/")
        self._urls = {endpoint: base + path for endpoint, path in PATHS.items()}

    def build(self, request: UpstreamRequest) -> HttpCall:
        """The messages in Ollama's form. Raises UpstreamError."""
        if request.endpoint not in PATHS:
            raise unsupported(f"{request.endpoint} cannot be asked of ollama")
        with asked():
            body = self._embed(request) if request.endpoint == "embeddings" else self._chat(request)
        if self.config.keep_alive is not None:
            # A number is a number of seconds, and only as a number.
            alive = self.config.keep_alive
            body["keep_alive"] = int(alive) if alive.lstrip("-").isdigit() else alive
        headers = {**self._headers, **request.headers} if request.headers else self._headers
        return HttpCall(self._urls[request.endpoint], headers, request.dumped(body), self.config.proxy)

    def _embed(self, request: UpstreamRequest) -> Json:
        body: Json = {"model": self.config.model, "input": texts(request, "ollama")}
        if request.body.get("dimensions"):
            body["dimensions"] = request.body["dimensions"]
        return body

    def _chat(self, request: UpstreamRequest) -> Json:
        given = plain(request.body, self.config.model, keeps_thoughts=True) if request.is_foreign else request.body
        refuse(given, REFUSED, "ollama")
        body: Json = {"model": self.config.model, "messages": _messages(given), "stream": request.stream}
        options = {ours: given[name] for name, ours in OPTIONS.items() if given.get(name) is not None}
        if self.config.num_ctx is not None:
            options.setdefault("num_ctx", self.config.num_ctx)
        if most := most_tokens(given):
            options["num_predict"] = most
        if stop := stops(given):
            options["stop"] = stop
        if options:
            body["options"] = options
        tools = functions(given, "ollama")
        if tools and given.get("tool_choice") != "none":
            if given.get("tool_choice", "auto") != "auto":
                raise unsupported("tool_choice other than auto or none cannot be asked of ollama")
            body["tools"] = [{"type": "function", "function": tool} for tool in tools]
        is_json, schema = schema_of(given)
        if is_json:
            body["format"] = schema or "json"
        think = _think(given.get("reasoning_effort"), self.config.think)
        if think is None and (given.get("thinking") or {}).get("type") == "disabled":
            # Models that can, think unasked; others would refuse to be asked.
            think = False
        if think is not None:
            body["think"] = think
        return body

    def parse(self, request: UpstreamRequest, body: bytes) -> Answer:
        """An answer in OpenAI's form. Raises UpstreamError."""
        value = parse_object(body)
        if "error" in value:
            raise UpstreamError(self.error(500, {}, body))
        with read("an answer that is none of Ollama's", body):
            if request.endpoint == "embeddings":
                told = value.get("prompt_eval_count")
                return embeddings(request, body, value["model"], value["embeddings"], told and count(told))
            said = value["message"]
            made = message_of([{**_told(said), "tool_calls": [_call(call) for call in said.get("tool_calls") or []]}])
            choice = {
                "index": 0,
                "message": made,
                "finish_reason": _finish(value, bool(made.get("tool_calls"))),
            }
            usage = _usage(value, request.prompt_tokens)
            return completion(head(None, value.get("model"), "chat.completion"), [choice], usage)

    def translator(self, request: UpstreamRequest) -> "OllamaStream":
        """What reads its lines."""
        return OllamaStream(self, request.prompt_tokens)

    def transport(self, http: Transport) -> Transport:
        """HTTP, whose lines come as events."""
        return Reframed(http, "application/x-ndjson", Lines)

    def error(self, status: int, headers: Headers, body: bytes) -> Failure:
        """By its status; what is not found is the model, which nobody has loaded there."""
        failure = super().error(status, headers, body)
        return replace(failure, kind="missing") if status == 404 else failure

    def redacted(self, failure: Failure) -> Failure:
        """Without this provider's key."""
        return hidden(failure, None if self._key is None else self._key.reveal())


# Requests


def _think(effort: Any, own: Any) -> bool | str | None:
    if own is not None or effort is None:
        return own
    return False if effort == "none" else "low" if effort == "minimal" else effort


def _messages(body: Json) -> list[Json]:
    kept, names, made = room(), dict[str, str](), []
    for given in body.get("messages") or []:
        role, content = given.get("role"), given.get("content")
        if role == "user":
            made.append({"role": "user", **_content(content)})
        elif role == "assistant":
            made.append(_assistant(given, kept, names))
        elif role == "tool":
            name = names.get(given.get("tool_call_id"))
            said = {"role": "tool", "content": text_of(content, "ollama")}
            made.append(said | ({"tool_name": name} if name else {}))
        else:
            made.append({"role": "system", "content": text_of(content, "ollama")})
    return made


def _content(content: Any) -> Json:
    if not isinstance(content, list):
        return {"content": text_of(content, "ollama")}
    images = []
    for part in content:
        if part.get("type") == "image_url":
            found = data_url(part["image_url"]["url"])
            if found is None:
                raise unsupported("an image must be a data: URL for ollama, which fetches none")
            images.append(found[1])
    said: Json = {"content": text_of([part for part in content if part.get("type") != "image_url"], "ollama")}
    return said | ({"images": images} if images else {})


def _assistant(given: Json, kept: Room, names: dict[str, str]) -> Json:
    made: Json = {"role": "assistant", "content": text_of(given.get("content"), "ollama")}
    thought = given.get("reasoning_content") or given.get("reasoning") or unsigned(given.get("thinking_blocks"))
    if isinstance(thought, str) and thought:
        made["thinking"] = thought
    calls = []
    for call in given.get("tool_calls") or []:
        name = call["function"]["name"]
        names[call.get("id")] = name
        calls.append({"function": {"name": name, "arguments": arguments(call, kept)}})
    return made | ({"tool_calls": calls} if calls else {})


# Answers


def _told(said: Json) -> Json:
    """A message, or a piece of one, but for its calls. Raises TypeError for what is none."""
    made: Json = {}
    for ours, name in (("reasoning_content", "thinking"), ("content", "content")):
        text = said.get(name) or ""
        if not isinstance(text, str):
            raise TypeError(f"{name} is no text")
        if text:
            made[ours] = text
    if said.get("images"):
        made["images"] = [{"type": "image_url", "image_url": {"url": _url(data)}} for data in said["images"]]
    return made


def _url(data: str) -> str:
    """Of a picture of which nothing is said but its base64."""
    kind = next((kind for head, kind in _PICTURES.items() if data.startswith(head)), "image/png")
    return f"data:{kind};base64,{data}"


def _call(given: Json) -> Json:
    function = given["function"]
    return tool_call(function["name"], function.get("arguments"), given.get("id"))


def _finish(value: Json, has_calls: bool) -> str:
    reason = FINISH.get(str(value.get("done_reason")), "stop")
    return "tool_calls" if has_calls and reason == "stop" else reason


def _usage(value: Json, prompt_tokens: int) -> Usage:
    """A prompt that was in memory whole has no count."""
    prompt = value.get("prompt_eval_count")
    completion = count(value.get("eval_count"))
    if prompt is None:
        return Usage(prompt_tokens, completion, 0, True)
    return Usage(count(prompt), completion)


class OllamaStream(ForeignStream):
    """Turns the lines of one answer into chunks."""

    def __init__(self, provider: Ollama, prompt_tokens: int) -> None:
        super().__init__(provider)
        self._prompt_tokens = prompt_tokens

    def _chunks(self, value: Json) -> list[Json]:
        if "error" in value:
            raise self._failed(value)
        self._head["model"] = value.get("model") or self._head["model"]
        said, chunks = value["message"], []
        if told := _told(said):
            chunks.append(self._chunk(told))
        chunks += [self._called(_call(call)) for call in said.get("tool_calls") or []]
        if value.get("done"):
            chunks.append(self._chunk({}, _finish(value, bool(self._calls))))
            chunks.append(self._used(_usage(value, self._prompt_tokens)))
            self.is_done = True
        return chunks
