"""How a scripted upstream behaves: each request gets a `Scene`, a list of waits and bytes, played in process or by a real server."""
# One step of a script: "ok", a status ("500", "429:2" with Retry-After 2), "hang", "slow:3" (first token after 3 s), "trickle" (a byte
# at a time), "cut:5" (a stream breaks off after 5 tokens), "reset" (after the headers), "garbage", "html", "short" (wrong length),
# "no_done" (no [DONE]), "credit", "context", "filter".

import hashlib
import json
import random
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from anabranch.errors import ConfigError
from anabranch.gateway.providers.provider import Json
from anabranch.web.sse import DONE, event

STEPS = (
    "ok",
    "hang",
    "slow",
    "trickle",
    "cut",
    "reset",
    "garbage",
    "html",
    "short",
    "no_done",
    "credit",
    "context",
    "filter",
)
EMBEDDING_DIM = 8
TRICKLE_S = 1.0
WORDS = (
    "the river parts here and every branch that leaves it joins it again further down where the water is calm".split()
)


@dataclass(slots=True)
class Scene:
    """What one request gets.

    Attributes:
        status: of HTTP.
        headers: lower case.
        parts: (seconds to wait, bytes to send).
        ending: ``end``, ``hang`` (nothing more, the connection stays) or ``reset`` (the connection breaks).
        length: what ``content-length`` says; None leaves it to the server.
    """

    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "application/json"})
    parts: list[tuple[float, bytes]] = field(default_factory=list)
    ending: str = "end"
    length: int | None = None


def check_step(step: str) -> str:
    """Raises ConfigError for what is no step of a script."""
    name, _, number = step.partition(":")
    is_status = name.isdigit() and 100 <= int(name) <= 599
    try:
        is_number = not number or float(number) >= 0
    except ValueError:
        is_number = False
    if not (is_status or name in STEPS) or not is_number:
        raise ConfigError(
            f"script has {step!r}; a step is a status such as 500 or 429:2, or one of {', '.join(STEPS)} (some with :number)"
        )
    return step


class Behaviour:
    """The scripted upstream itself: which step comes next, and what it looks like.

    Args:
        config: a `Mock.Config`.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self._rng = random.Random(config.seed)
        self._steps = self._script()
        self.asked = 0

    def _script(self) -> Iterator[str]:
        yield from self.config.script
        while self.config.loops and self.config.script:
            yield from self.config.script

    def step(self) -> str:
        """Of the next request: of the script while it lasts, then by chance."""
        self.asked += 1
        found = next(self._steps, None)
        if found is None:
            found = str(self.config.fail_with) if self._rng.random() < self.config.fails else "ok"
        return found

    def scene(self, path: str, body: bytes) -> Scene:
        """What the next request gets."""
        try:
            asked = json.loads(body)
            return self._scene(path, asked)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            return _error(400, f"the body is no request ({type(error).__name__})")

    def _scene(self, path: str, asked: Json) -> Scene:
        name, _, number = self.step().partition(":")
        if name.isdigit():
            return _error(int(name), "scripted failure", number)
        refused = {"credit": 402, "context": 400, "filter": 400}
        if name in refused:
            words = {"credit": "insufficient_quota", "context": "context_length_exceeded", "filter": "content_filter"}
            return _error(refused[name], f"scripted {name}", code=words[name])
        if path.endswith("/embeddings"):
            return _broken(Scene(parts=[(self.config.latency_s, _embeddings(asked))]), name)
        if not path.endswith("/completions"):
            return _error(404, f"there is no {path[:80]!r} here")
        wait_s = float(number) if name == "slow" and number else self.config.latency_s
        scene = self._stream(asked, path, wait_s) if asked.get("stream") else self._whole(asked, path, wait_s)
        return _cut(scene, int(number or 1)) if name == "cut" else _broken(scene, name)

    def text(self, asked: Json) -> list[str]:
        """Tokens of the answer: the words that are configured, else some that depend on what is asked, only."""
        config, most = self.config, asked.get("max_completion_tokens") or asked.get("max_tokens")
        if config.reply is not None:
            words = config.reply.split(" ")
        else:
            seed = hashlib.sha256(
                json.dumps(asked.get("messages", asked.get("prompt")), sort_keys=True).encode()
            ).digest()
            rng = random.Random(seed + config.model.encode())
            words = [config.model, "says:", *(rng.choice(WORDS) for _ in range(config.tokens - 2))]
        words = words[: most or len(words)]
        return [word if at == 0 else " " + word for at, word in enumerate(words)]

    def _whole(self, asked: Json, path: str, wait_s: float) -> Scene:
        tokens = self.text(asked)
        choice: Json = {"index": 0, "finish_reason": "stop", "logprobs": self._logprobs(asked, tokens)}
        if path.endswith("/chat/completions"):
            choice["message"] = {"role": "assistant", "content": "".join(tokens)} | self._calls(asked)
            choice["finish_reason"] = "tool_calls" if "tool_calls" in choice["message"] else "stop"
        else:
            choice["text"] = "".join(tokens)
        body = {**_head(asked, path, False), "choices": [choice], "usage": _usage(asked, len(tokens))}
        rate = self.config.tokens_per_s
        return Scene(parts=[(wait_s + (len(tokens) / rate if rate else 0.0), json.dumps(body).encode())])

    def _calls(self, asked: Json) -> Json:
        """A call of the first tool, where the sender demands one."""
        if not asked.get("tools") or asked.get("tool_choice", "auto") in ("auto", "none"):
            return {}
        function = asked["tools"][0]["function"]["name"]
        call = {"id": "call_1", "type": "function", "function": {"name": function, "arguments": "{}"}}
        return {"content": None, "tool_calls": [call]}

    def _logprobs(self, asked: Json, tokens: list[str]) -> Json | None:
        if not asked.get("logprobs"):
            return None
        return {"content": [{"token": token, "logprob": self.config.logprob, "top_logprobs": []} for token in tokens]}

    def _stream(self, asked: Json, path: str, wait_s: float) -> Scene:
        tokens, head = self.text(asked), _head(asked, path, True)
        is_chat = path.endswith("/chat/completions")
        gap_s = 1.0 / self.config.tokens_per_s if self.config.tokens_per_s else 0.0
        calls = self._calls(asked) if is_chat else {}
        parts: list[tuple[float, bytes]] = []

        def add(choice: Json, seconds: float) -> None:
            parts.append((seconds, event({**head, "choices": [{"index": 0, "finish_reason": None, **choice}]})))

        if is_chat:
            add({"delta": {"role": "assistant", "content": ""}}, wait_s)
        if calls:
            add({"delta": {"tool_calls": [{"index": 0, **calls["tool_calls"][0]}]}}, gap_s)
        else:
            for at, token in enumerate(tokens):
                add({"delta": {"content": token}} if is_chat else {"text": token}, gap_s if at or is_chat else wait_s)
        add({**({"delta": {}} if is_chat else {"text": ""}), "finish_reason": "tool_calls" if calls else "stop"}, 0.0)
        if (asked.get("stream_options") or {}).get("include_usage"):
            parts.append((0.0, event({**head, "choices": [], "usage": _usage(asked, len(tokens))})))
        parts.append((0.0, DONE))
        return Scene(headers={"content-type": "text/event-stream"}, parts=parts)


def _head(asked: Json, path: str, streams: bool) -> Json:
    kind = (
        ("chat.completion.chunk" if streams else "chat.completion")
        if path.endswith("/chat/completions")
        else "text_completion"
    )
    return {
        "id": f"mock-{time.monotonic_ns():x}",
        "object": kind,
        "created": int(time.time()),
        "model": asked.get("model", ""),
    }


def prompt_tokens(asked: Json) -> int:
    """Words of what is asked."""
    messages = asked.get("messages")
    if isinstance(messages, list):
        return sum(len(str(message.get("content") or "").split()) for message in messages if isinstance(message, dict))
    return len(str(asked.get("prompt") or asked.get("input") or "").split())


def _usage(asked: Json, completion: int) -> Json:
    prompt = prompt_tokens(asked)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _embeddings(asked: Json) -> bytes:
    given = asked.get("input")
    texts = given if isinstance(given, list) else [given]
    data = [{"object": "embedding", "index": at, "embedding": _vector(text)} for at, text in enumerate(texts)]
    prompt = prompt_tokens({"input": given})
    usage = {"prompt_tokens": prompt, "total_tokens": prompt}
    return json.dumps({"object": "list", "data": data, "model": asked.get("model", ""), "usage": usage}).encode()


def _vector(text: Any) -> list[float]:
    digest = hashlib.sha256(str(text).encode()).digest()
    return [value / 2**31 for value in struct.unpack(f"<{EMBEDDING_DIM}i", digest[: 4 * EMBEDDING_DIM])]


def _error(status: int, message: str, retry_after: str = "", code: str | None = None) -> Scene:
    body = {"error": {"message": message, "type": "mock_error", "code": code, "param": None}}
    headers = {"content-type": "application/json"} | ({"retry-after": retry_after} if retry_after else {})
    return Scene(status, headers, [(0.0, json.dumps(body).encode())])


def _cut(scene: Scene, after: int) -> Scene:
    """A stream that breaks off behind its first tokens (and the chunk that only says whose turn it is)."""
    scene.parts, scene.ending = scene.parts[: after + 1], "reset"
    return scene


def _broken(scene: Scene, how: str) -> Scene:
    """The scene with one of the ways in which upstreams misbehave."""
    whole = b"".join(data for _, data in scene.parts)
    wait_s = scene.parts[0][0]
    if how == "hang":
        scene.parts, scene.ending = [], "hang"
    elif how == "trickle":
        scene.parts = [(TRICKLE_S, whole[at : at + 1]) for at in range(len(whole))]
    elif how == "reset":
        scene.parts, scene.ending = [(wait_s, b"")], "reset"
    elif how == "garbage":
        scene.parts = [(wait_s, b"\x00\xff{this is no answer\n\n")]
    elif how == "html":
        scene.headers, scene.parts = {"content-type": "text/html"}, [(wait_s, b"<!doctype html><title>502</title>")]
    elif how == "short":
        scene.length, scene.ending = len(whole) + 100, "reset"
    elif how == "no_done":
        scene.parts = [part for part in scene.parts if part[1] != DONE]
    return scene
