"""A client that tries to hurt, beside one that does not: whatever it sends, the other's answers and their pace stay what they were."""

import http.client
import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest

from anabranch.data import ByteTokenizer
from anabranch.serving.config import ServingConfig
from anabranch.serving.engine.engine import Engine
from anabranch.serving.engine.local import LocalEngine
from fake_engine import Script
from hostile import FORMS
from serving_models import serve_process, small_moe
from serving_thread import serving
from waiting import until

KEYS = ("alice=a", "bob=b")
# Those that take no process to try a grammar out, or none for long.
QUICK = set(FORMS) - {
    "many properties",
    "enum",
    "pattern",
    "nested",
    "tools",
    "large body",
    "long text",
    "slow reader",
    "long prompt",
    "many rivals",
}
# What a step beside others, and two busy processors, may take; grammars used to take 6 to 17 s, and the engine's death for ever.
MOST_GAP_S = 4.0


def innocent(port, number, max_tokens):
    """The text of one of bob's streams, and the longest time between two of its events."""
    body = {
        "model": "small-moe",
        "prompt": f"hello {number % 4}",
        "temperature": 0,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
    }
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    text, gap, last = "", 0.0, None
    try:
        link.request(
            "POST",
            "/v1/completions",
            json.dumps(body),
            {"content-type": "application/json", "authorization": "Bearer b"},
        )
        answer = link.getresponse()
        assert answer.status == 200, answer.read()
        for line in answer:
            if line.startswith(b"data: {"):
                event, now = json.loads(line[6:]), time.monotonic()
                assert "error" not in event, event
                gap, last = max(gap, now - (last or now)), now
                text += event["choices"][0]["text"]
        assert line == b"\n"
    finally:
        link.close()
    return text, gap


def is_own_fault(error):
    """Whether a server may say this with a status of 500 or more: it is busy, or a grammar passed a limit in the middle of its output."""
    return error["code"] == "busy" or (error["code"] == "request_failed" and "grammar" in error["message"])


def attack(port, forms, count, seed, max_tokens, at_once):
    """Send attacks of alice's while bob streams; what alice was told, by form, and what went wrong with bob's."""
    alone = [innocent(port, number, max_tokens) for number in range(4)]
    random, told, wrong = Random(seed), Counter(), []
    names = [forms[place % len(forms)] for place in range(count)]
    random.shuffle(names)
    attacks = [(name, FORMS[name](Random(f"{seed} {place}"))) for place, name in enumerate(names)]
    with ThreadPoolExecutor(at_once) as pool:
        answers = [(name, pool.submit(one.run, port, "a")) for name, one in attacks]
        number = 0
        while number < 4 or not all(answer.done() for _, answer in answers):
            text, gap = innocent(port, number, max_tokens)
            if text != alone[number % 4][0]:
                wrong.append(f"stream {number}: another text")
            if gap > alone[number % 4][1] + MOST_GAP_S:
                wrong.append(f"stream {number}: {gap:.2f} s between two tokens")
            number += 1
    for name, answer in answers:
        result = answer.result()
        code = None if result is None else result[0]
        told[name, code] += 1
        if result is not None and code >= 500 and not is_own_fault(json.loads(result[1])["error"]):
            wrong.append(f"{name}: {code} {result[1][:300]!r}")
    return told, wrong


def test_a_hostile_client_hurts_nobody():
    """The short form, in this process, without what takes long."""
    model, config = (
        small_moe(),
        ServingConfig(num_blocks=512, name="small-moe", dtype="float32", max_seqs=8, max_batched_tokens=64),
    )
    with serving(
        lambda: LocalEngine(lambda: Engine.of(model, config, tokenizer=ByteTokenizer())), api_keys=KEYS
    ) as server:
        told, wrong = attack(server.port, sorted(QUICK), 60, seed=1, max_tokens=60, at_once=4)
        assert wrong == []
        assert {name for name, _ in told} == QUICK
        assert {200, 400, None} <= {code for _, code in told}
        until(lambda: server.frontend.admission.in_flight == 0 and server.frontend.state == "ready")
        shown = server.metrics()
        assert shown["engine_restarts_total"] == 0
        assert shown['aborted_total{reason="engine_failed"}'] == 0
        until(lambda: server.metrics()["streams"] == 0)


SCORES = {"prompt": ["x" * 4_000] * 2, "n": 2, "echo": True, "logprobs": 20}
LARGE = {
    "scores": ("/v1/completions", {**SCORES, "max_tokens": 0}),
    "scores in a stream": ("/v1/completions", {**SCORES, "max_tokens": 1, "stream": True}),
    "chat": (
        "/v1/chat/completions",
        {"max_tokens": 800, "n": 8, "logprobs": True, "top_logprobs": 20, "routing": True},
    ),
    "vectors": ("/v1/embeddings", {"input": ["x"] * 512}),
    "packed vectors": ("/v1/embeddings", {"input": ["x"] * 2_048, "encoding_format": "base64"}),
    "tokens": ("/tokenize", {"prompt": "x" * 8_000_000}),
    "named tokens": ("/tokenize", {"prompt": "x" * 600_000, "return_token_strs": True}),
    "text of tokens": ("/detokenize", {"tokens": [97] * 200_000}),
}
SLOW = {"chat", "tokens", "named tokens", "packed vectors", "scores in a stream"}
# Processor seconds that may pass between two turns of the loop. Each of these answers was made in one go, which took up to two.
MOST_HELD_S = 0.2


@pytest.fixture(scope="module")
def wide():
    with serving(Script(say="y", endless=True, positions=8_192, width=1_024), api_keys=KEYS) as running:
        yield running


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in LARGE])
def test_a_large_answer_is_made_and_written_while_others_are_answered(wide, name):
    path, fields = LARGE[name]
    messages = {"messages": [{"role": "user", "content": "hello"}]} if "chat" in path else {}
    raw = json.dumps({"model": "fake", **messages, **fields}).encode()
    link = http.client.HTTPConnection("127.0.0.1", wide.port, timeout=120)
    link.request("POST", path, raw, {"content-type": "application/json", "authorization": "Bearer a"})
    with wide.holds() as held:
        answer = link.getresponse()
        # Read as it comes: to read JSON would hold up the server of this process.
        told = b"".join(iter(lambda: answer.read(1 << 16), b""))
    link.close()
    assert answer.status == 200, told[:500]
    assert max(held) < MOST_HELD_S
    assert told.endswith((b"}", b"data: [DONE]\n\n"))


def test_what_would_be_hundreds_of_megabytes_is_refused_before_it_is_made():
    with serving(Script(width=8_192)) as server:
        status, _, told = server.ask("/v1/embeddings", {"model": "fake", "input": ["x"] * 1_025})
        assert (status, told["error"]["code"], told["error"]["param"]) == (400, "too_many_numbers", "input")
        assert "1,024 may be at a time" in told["error"]["message"]
        assert server.ask("/v1/embeddings", {"model": "fake", "input": ["x"] * 1_025, "dimensions": 9})[0] == 200
        prompts = {"prompt": ["x" * 800] * 128, "max_tokens": 0, "echo": True}
        status, _, told = server.complete(**prompts, logprobs=20)
        assert (status, told["error"]["code"], told["error"]["param"]) == (400, "too_many_scores", "echo")
        assert len(server.script.requests) == 1_025


@pytest.mark.slow
@pytest.mark.parametrize("scheduling", ["sync", "async"])
def test_two_thousand_hostile_requests_hurt_nobody(scheduling):
    """In a process of its own, a thousand for each way of scheduling."""
    arguments = [part for key in KEYS for part in ("--api-key", key)]
    with serve_process("--set", f"engine.scheduling={scheduling}", *arguments) as server:
        told, wrong = attack(server.port, sorted(FORMS), 1000, seed=2, max_tokens=200, at_once=12)
        log = server.log.read_text()
        assert wrong == [], log[-3000:]
        assert "a bug:" not in log
        assert "the engine died" not in log
        assert {name for name, _ in told} == set(FORMS)
        assert innocent(server.port, 0, 20)
