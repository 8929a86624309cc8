"""Grammars that are meant to hurt, sent to a server that streams to somebody else meanwhile."""

import json
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from serving_models import serve_process

pytestmark = pytest.mark.slow
MODEL = "small-moe"
INNOCENT = {"model": MODEL, "prompt": "hello", "temperature": 0, "max_tokens": 400, "ignore_eos": True, "stream": True}
OPEN = {"$defs": {"a": {"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/a"}}] * 2}}, "$ref": "#/$defs/a"}


def properties(count, **more):
    return {"type": "object", "properties": {f"property {n}": {"type": "string"} for n in range(count)}, **more}


def ask(server, **fields):
    """Status and body of a chat."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 60,
        "temperature": 0,
        **fields,
    }
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def follow(server, schema, **fields):
    form = {"type": "json_schema", "json_schema": {"name": "form", "schema": schema}}
    return ask(server, response_format=form, **fields)


def stream(server, began):
    """The text of the innocent stream, and the longest time between two of its events."""
    request = urllib.request.Request(
        f"{server.url}/v1/completions", json.dumps(INNOCENT).encode(), {"content-type": "application/json"}
    )
    text, gap, last = [], 0.0, None
    with urllib.request.urlopen(request, timeout=60) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                began.set()
                now = time.monotonic()
                gap, last = max(gap, now - (last or now)), now
                text += [choice["text"] for choice in json.loads(line[6:])["choices"]]
    return "".join(text), gap


def beside(server, schema, **fields):
    """What the innocent stream gives beside three requests with this schema, and what those are answered."""
    began = threading.Event()
    with ThreadPoolExecutor(4) as pool:
        innocent = pool.submit(stream, server, began)
        assert began.wait(60)
        hostile = [pool.submit(follow, server, schema, **fields) for _ in range(3)]
        return innocent.result(), [future.result() for future in hostile]


@pytest.fixture(scope="module")
def server():
    with serve_process("--set", "engine.num_blocks=256", "--set", "engine.max_positions=512") as made:
        ask(made)
        yield made


def restarts(server):
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as answer:
        (line,) = [line for line in answer.read().decode().splitlines() if "restarts_total " in line and line[0] != "#"]
    return float(line.split()[-1])


@pytest.mark.parametrize(
    ("schema", "fields", "status", "says"),
    [
        (properties(20_005), {}, 400, "characters as JSON"),
        (OPEN, {"logit_bias": {str(ord("[")): 100}, "n": 2}, 200, "[" * 60),
        (properties(200, additionalProperties=True), {"n": 4}, 200, "{"),
        ({"type": "integer", "multipleOf": 1_234_567}, {}, 400, "it asked for more|it took more"),
        (
            {"$defs": {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(4000)}, "$ref": "#/$defs/d0"},
            {},
            400,
            "cannot be followed",
        ),
        ({"type": "array", "uniqueItems": True}, {}, 400, "keyword 'uniqueItems' not supported"),
    ],
    ids=["large", "open", "wide", "slow", "deep", "unknown"],
)
def test_a_grammar_hurts_nobody_but_who_sends_it(server, schema, fields, status, says):
    # The same bodies for a model that is not there: read, and no more.
    (alone, gap_alone), refused = beside(server, schema, **fields, model="another")
    assert [code for code, _ in refused] == [404] * 3
    (text, gap), answers = beside(server, schema, **fields)
    for code, body in answers:
        assert code == status, body
        if status == 400:
            assert body["error"]["param"] == "response_format"
            assert any(part in body["error"]["message"] for part in says.split("|"))
        else:
            assert all(choice["message"]["content"].startswith(says) for choice in body["choices"])
    assert text == alone
    assert gap < 2 * gap_alone + 0.5
    assert restarts(server) == 0


def test_devices_follow_grammars_and_refuse_what_cannot_be_followed():
    with serve_process("--devices", "2") as server:
        code, body = follow(server, {"enum": ["left", "right"]})
        assert (code, body["choices"][0]["message"]["content"]) in [(200, '"left"'), (200, '"right"')]
        code, body = follow(server, {"type": "array", "uniqueItems": True})
        assert (code, body["error"]["param"]) == (400, "response_format")
        assert "'uniqueItems'" in body["error"]["message"]
        with ThreadPoolExecutor(6) as pool:
            for code, body in pool.map(lambda n: follow(server, {"const": f"number {n}"}), range(6)):
                assert code == 200, body
