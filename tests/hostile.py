"""Requests that are meant to hurt: each form makes one from a random generator, and some behave badly beside."""

import http.client
import json
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

Body = dict[str, Any]
OPEN = {"$defs": {"a": {"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/a"}}] * 2}}, "$ref": "#/$defs/a"}
WRONG = [None, True, -1, 0, 1e308, -1e-46, 10**30, "", "x", "\x00", [], [[]], {}, {"a": []}, [None], "9" * 5000]
FIELDS = (
    "messages",
    "prompt",
    "model",
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "stop",
    "stop_token_ids",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "stream",
    "stream_options",
    "response_format",
    "ignore_eos",
    "priority",
    "cache_salt",
    "user",
    "metadata",
    "routing",
    "num_streams",
    "path",
    "depth",
    "logprobs",
    "top_logprobs",
    "tools",
    "tool_choice",
    "echo",
    "best_of",
    "suffix",
    "parallel_tool_calls",
    "max_completion_tokens",
    "chat_template_kwargs",
    "reasoning_effort",
)


@dataclass
class Attack:
    """One request.

    Attributes:
        path, body: what is sent; bytes go as they are.
        headers: beside those of JSON.
        read_s: seconds after which the connection is closed, unread; None reads the answer.
        share: of the body that is sent before the connection is closed.
    """

    path: str
    body: Body | bytes
    headers: dict[str, str] = field(default_factory=dict)
    read_s: float | None = None
    share: float = 1.0

    def run(self, port: int, key: str) -> tuple[int, bytes] | None:
        """Status and body of the answer; None where nobody waits for it or the server has hung up."""
        raw = self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode("utf-8", "surrogatepass")
        headers = {"content-type": "application/json", "authorization": f"Bearer {key}", **self.headers}
        if self.read_s is not None or self.share < 1:
            self._leave(port, raw, headers)
            return None
        link = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        try:
            link.request("POST", self.path, raw, headers)
            answer = link.getresponse()
            return answer.status, answer.read()
        except (ConnectionError, http.client.HTTPException):
            return None
        finally:
            link.close()

    def _leave(self, port: int, raw: bytes, headers: dict[str, str]) -> None:
        with socket.socket() as link:
            link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            link.settimeout(60)
            link.connect(("127.0.0.1", port))
            lines = [f"POST {self.path} HTTP/1.1", "host: localhost", f"content-length: {len(raw)}"]
            lines += [f"{name}: {value}" for name, value in headers.items()]
            try:
                link.sendall("\r\n".join([*lines, "", ""]).encode() + raw[: int(len(raw) * self.share)])
            except ConnectionError:
                return
            time.sleep(self.read_s or 0.0)


def completion(**fields: Any) -> Attack:
    return Attack("/v1/completions", {"model": "small-moe", "prompt": "x", "max_tokens": 8, **fields})


def chat(**fields: Any) -> Attack:
    messages = [{"role": "user", "content": "x"}]
    return Attack("/v1/chat/completions", {"model": "small-moe", "messages": messages, "max_tokens": 8, **fields})


def schema(form: Any) -> Attack:
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "form", "schema": form}})


def properties(random: Random, most: int) -> Body:
    count, salt = random.randrange(1, most), random.random()
    return {"type": "object", "properties": {f"p{salt}{n}": {"type": "string"} for n in range(count)}}


def nested(random: Random) -> Any:
    form: Any = {"type": "null"}
    for _ in range(random.randrange(1, 450)):
        form = {random.choice(("items", "additionalProperties", "anyOf")): form}
        form = {"anyOf": [form["anyOf"]]} if "anyOf" in form else {"type": "array", **form}
    return form


def pattern(random: Random) -> str:
    return random.choice(
        (
            f"([a-z]{{1,{random.randrange(2000)}}}[0-9]{{1,500}}){{1,3}}",
            "(a|a)*b",
            "(?=a)b",
            "[",
            "(.*)*" * 20,
            "\\p{L}" * 300,
            "^$",
            "a{99999}",
        )
    )


FORMS: dict[str, Callable[[Random], Attack]] = {
    "many properties": lambda random: schema(properties(random, 3000)),
    "open": lambda random: schema(OPEN),
    "nested": lambda random: schema(nested(random)),
    "pattern": lambda random: schema({"type": "string", "pattern": pattern(random)}),
    "enum": lambda random: schema({"enum": [f"{random.random()}{n}" for n in range(random.randrange(3000))]}),
    "no schema": lambda random: schema(
        random.choice([{"type": "x"}, {"$ref": "#/no"}, {"allOf": [{}, {"not": {}}]}, {"minimum": "a"}])
    ),
    "many additional": lambda random: schema({**properties(random, 200), "additionalProperties": True}),
    "bias": lambda random: completion(
        logit_bias={str(n): random.choice((-100, 100, 1e-46)) for n in range(random.randrange(1030))}
    ),
    "small temperature": lambda random: completion(
        temperature=random.choice((1e-46, 1e-320, 0.0, 5e-324)), top_p=1e-46, min_p=1.0
    ),
    "huge n": lambda random: completion(n=random.choice((16, 17, 128, 10**9)), best_of=random.choice((None, 16))),
    "unicode": lambda random: chat(
        messages=[
            {"role": "user", "content": "".join(chr(random.randrange(0x110000)) for _ in range(random.randrange(600)))}
        ]
    ),
    "lone surrogate": lambda random: Attack(
        "/v1/completions", b'{"model": "small-moe", "prompt": "\\ud83d", "max_tokens": 2}'
    ),
    "slow reader": lambda random: Attack(
        "/v1/completions",
        {
            "model": "small-moe",
            "prompt": "x",
            "max_tokens": 1500,
            "ignore_eos": True,
            "stream": True,
            "logprobs": 20,
            "n": 2,
        },
        read_s=random.random() * 2,
    ),
    "disconnect": lambda random: Attack(
        "/v1/completions",
        {"model": "small-moe", "prompt": "x", "max_tokens": 1500, "ignore_eos": True},
        read_s=random.random() / 20,
    ),
    "half a body": lambda random: Attack(
        "/v1/completions", b'{"model": "small-moe", "prompt": "' + b"x" * 5000 + b'"}', share=random.random()
    ),
    "many names": lambda random: random.choice((completion, chat))(
        **{f"{random.choice(FIELDS)}{n:x}": 1 for n in range(random.choice((11, 1000, 150_000)))}
    ),
    "wrong type": lambda random: random.choice((completion, chat))(**{random.choice(FIELDS): random.choice(WRONG)}),
    "wrong types": lambda random: random.choice((completion, chat))(
        **{random.choice(FIELDS): random.choice(WRONG) for _ in range(5)}
    ),
    "deep JSON": lambda random: Attack("/v1/completions", b'{"a": ' + b"[" * random.randrange(200_000)),
    "many stops": lambda random: completion(stop=[f"{n}" for n in range(random.choice((4, 5, 10_000)))]),
    "long text": lambda random: Attack(
        "/tokenize",
        {
            "prompt": "x" * random.choice((*[random.randrange(900_000)] * 9, 8_000_000)),
            "return_token_strs": random.random() < 0.2,
        },
    ),
    # Each choice tells the scores of its prompt.
    "long prompt": lambda random: completion(
        prompt=["x" * random.randrange(4000)] * random.choice((1, 1, 1, 8)),
        n=random.choice((1, 4, 16)),
        max_tokens=random.choice((0, 1)),
        echo=True,
        logprobs=20,
        stream=random.choice((False, True)),
    ),
    "many rivals": lambda random: chat(
        n=random.choice((1, 16)),
        max_tokens=random.choice((8, 200)),
        logprobs=True,
        top_logprobs=20,
        routing=True,
        stream=random.choice((False, True)),
    ),
    "large body": lambda random: Attack(
        "/v1/completions", {"model": "small-moe", "prompt": ["x" * 100_000] * random.choice((10, 100))}
    ),
    "tokens": lambda random: completion(
        prompt=[[random.randrange(-3, 300) for _ in range(random.randrange(50))] for _ in range(random.randrange(130))]
    ),
    "first of all": lambda random: completion(priority=-1000, prompt="x" * 1000, max_tokens=200, ignore_eos=True),
    "no JSON": lambda random: Attack("/v1/chat/completions", random.randbytes(random.randrange(3000))),
    "not for us": lambda random: Attack(
        "/v1/completions",
        {"model": "small-moe", "prompt": "x"},
        random.choice(({"host": "page.example"}, {"content-type": "text/plain"})),
    ),
    "responses": lambda random: Attack(
        "/v1/responses",
        {
            "model": "small-moe",
            "input": random.choice(
                (
                    "x",
                    WRONG,
                    [{"role": "user", "content": WRONG}],
                    [{"type": random.choice(WRONG)}],
                    [{"type": "reasoning"}] * 2000,
                )
            ),
            "max_output_tokens": 8,
            random.choice(
                ("text", "reasoning", "tools", "tool_choice", "instructions", "stream", "previous_response_id")
            ): random.choice(
                (*WRONG, {"format": {"type": "json_schema", "schema": OPEN}}, [{"type": "function", "name": {}}])
            ),
        },
    ),
    "vectors": lambda random: Attack(
        "/v1/embeddings",
        {
            "model": "small-moe",
            "input": random.choice(
                ("x" * random.randrange(3000), ["x"] * random.randrange(2100), [[random.randrange(300)]], WRONG)
            ),
            "dimensions": random.choice((None, 1, 16, 17, *WRONG)),
            "encoding_format": random.choice((None, "base64", "float", "x")),
        },
        read_s=random.choice((None, None, 0.05)),
    ),
    "template values": lambda random: chat(
        reasoning_effort=random.choice((None, "none", "high", "x" * 1000)),
        chat_template_kwargs=random.choice(
            (
                {"messages": []},
                {f"a{n}": "x" * random.randrange(2000) for n in range(random.randrange(20))},
                {"enable_thinking": nested(random)},
                {"\x00": 1},
                {"\ud83d": "\ud83d"},
            )
        ),
        messages=[{"role": "assistant", "content": "x", "reasoning_content": random.choice(("<think>" * 99, 5, None))}],
    ),
    "tools": lambda random: chat(
        tool_choice="required",
        tools=[
            {
                "type": "function",
                "function": {
                    "name": f"f{random.random():.9f}"[:20].replace(".", "_"),
                    "parameters": properties(random, 60),
                },
            }
            for _ in range(random.randrange(1, 130))
        ],
    ),
}
