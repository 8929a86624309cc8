"""Answers are read as far as what was asked for takes, and one that is longer shuts no deployment."""

import asyncio
import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.dispatch import Deployment, Dispatcher, DispatchRules, Group, Plan
from anabranch.gateway.providers.answer_bounds import MOST_BYTES, most_bytes
from anabranch.gateway.providers.mock import MockReply
from anabranch.gateway.providers.openai import OpenAI
from anabranch.gateway.providers.provider import BODY_BYTES, UpstreamError, UpstreamRequest
from anabranch.gateway.providers.scenes import Scene

MIB = 1 << 20


class Saying:
    """A transport whose upstream says one thing."""

    def __init__(self, body):
        self.body = body

    async def open(self, call):
        call.is_sent = True
        return MockReply(Scene(parts=[(0.0, self.body)]))


def asked(endpoint="embeddings", **fields):
    return UpstreamRequest(endpoint, {"model": "m", **fields}, prompt_tokens=7)


def ask(body, request, times=1):
    """What so many senders get, and the state of the deployment."""

    async def work():
        config = OpenAI.Config(model="m", base_url="http://nowhere/v1", key_env=None)
        group = Group(name="m", deployments=(Deployment(name="m-0", provider=config),))
        dispatcher = Dispatcher([group], DispatchRules(retries=2, min_extra=100), http=Saying(body))
        got = []
        for sender in range(times):
            plan = Plan(candidates=("m",), deadline=dispatcher.now() + 60, sender=str(sender))
            try:
                got.append(len((await dispatcher.complete(plan, request)).body["data"]))
            except UpstreamError as error:
                got.append((error.failure.kind, len(error.report.attempts)))
        return got, dispatcher.states()[0]

    return asyncio.run(work())


@pytest.mark.parametrize(
    ("request_", "most"),
    [
        (asked("chat", messages=[]), 32 * MIB),
        (asked(input="a"), 32 * MIB),
        (asked(input=[1, 2, 3] * 9999), 32 * MIB),
        (asked(input=["a"] * 2048, dimensions=3072), 2048 * (3072 * 24 + 256)),
        (asked(input=[[1, 2]] * 2048, dimensions=3072), 2048 * (3072 * 24 + 256)),
        (asked(input=["a"] * 2048), 2048 * (4096 * 24 + 256)),
        (asked(input=["a"] * 2048, dimensions=10**30), MOST_BYTES),
        (asked(input=["a"] * 10**6), MOST_BYTES),
        (asked("images", prompt="a"), 32 * MIB),
        (asked("images", prompt="a", n=3), 96 * MIB),
        (asked("image_edits", prompt="a", n="4"), 128 * MIB),
        (asked("image_edits", prompt="a", n="9" * 5000), 32 * MIB),
    ],
)
def test_an_answer_may_be_as_long_as_what_was_asked_for(request_, most):
    assert most_bytes(request_) == most


@given(
    endpoint=st.sampled_from(["chat", "embeddings", "images", "speech"]),
    given_=st.none() | st.integers() | st.text(max_size=3) | st.lists(st.integers() | st.text(max_size=3), max_size=3),
    number=st.none() | st.integers() | st.text(max_size=3) | st.booleans() | st.floats(),
)
def test_the_bound_lies_between_two_whatever_is_asked(endpoint, given_, number):
    request = asked(endpoint, input=given_, dimensions=number, n=number)
    assert BODY_BYTES <= most_bytes(request) <= MOST_BYTES


def test_the_largest_batch_of_vectors_is_read():
    """2,048 texts at 3,072 dimensions as base64: 33.7 MB, more than the 32 MiB of other answers."""
    vector = base64.b64encode(b"\x00\x00\x80\x3c" * 3072).decode()
    rows = [{"object": "embedding", "index": at, "embedding": vector} for at in range(2048)]
    body = json.dumps({"object": "list", "model": "m", "data": rows, "usage": {"prompt_tokens": 9, "total_tokens": 9}})
    assert len(body) > BODY_BYTES
    got, state = ask(body.encode(), asked(input=["a"] * 2048, encoding_format="base64"))
    assert got == [2048]
    assert state["breaker"] == "closed"


def test_an_answer_that_is_too_long_shuts_no_deployment_and_is_not_asked_for_again(monkeypatch):
    monkeypatch.setattr("anabranch.gateway.providers.answer_bounds.BODY_BYTES", 1000)
    got, state = ask(b'{"data": [' + b" " * 8000 + b"]}", asked(input="a", dimensions=1), times=12)
    assert got == [("excess", 1)] * 12
    assert (state["breaker"], state["failing"]) == ("closed", 0)
