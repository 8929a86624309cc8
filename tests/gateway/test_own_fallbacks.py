"""Fallbacks for what is a request's own: whoever needs one has it at once, and of others' models no more than its limits let it ask."""

import asyncio
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.gateway.dispatch import Deployment, Dispatcher, DispatchRules, Group, Plan
from anabranch.gateway.dispatch.virtual_time import run_virtual, virtual_clock
from anabranch.gateway.providers.anthropic import Anthropic
from anabranch.gateway.providers.mock import MockReply
from anabranch.gateway.providers.openai import OpenAI
from anabranch.gateway.providers.provider import UpstreamError, UpstreamRequest
from anabranch.gateway.providers.scenes import Scene
from anabranch.gateway.store import open_store
from anabranch.routers.money import Price
from gateway_process import call
from gateway_scripted import fronted, model, scripted, whole
from gateway_upstream import ANSWER

# What `m0` and, if ``bad``, all others say of a prompt.
ERRORS = {
    "code": {"message": "no", "code": "context_length_exceeded"},
    "filter": {"message": "no", "code": "content_filter"},
    "words": {"message": "prompt is too long: 9 > 8", "type": "invalid_request_error"},
    "quoted": {"message": "Invalid value: 'prompt is too long: 9'", "code": "invalid_value"},
    # Of `m0` that the prompt is too long; of who is asked in its place an outage.
    "down": {"message": "down"},
    "out": {"message": "down"},
}
CHAIN = tuple(f"m{at}" for at in range(8))


class Upstream:
    """Refuses at `m0` each prompt that names an error, and everywhere those that are ``bad`` too."""

    def __init__(self, answer_s, refuse_s):
        self.asked, self.answer_s, self.refuse_s = Counter(), answer_s, refuse_s

    async def open(self, call):
        body = json.loads(call.body)
        name, _, how = body["messages"][0]["content"].partition(" ")
        self.asked[body["model"]] += 1
        await asyncio.sleep(0.1)
        if name not in ERRORS or (body["model"] != "m0" and how != "bad"):
            await asyncio.sleep(self.answer_s)
            return MockReply(Scene(parts=[(0.0, json.dumps(ANSWER).encode())]))
        if body["model"] != "m0":
            await asyncio.sleep(self.refuse_s)
        error = ERRORS["code" if name == "down" and body["model"] == "m0" else name]
        status = 500 if error["message"] == "down" else 400
        return MockReply(Scene(status=status, parts=[(0.0, json.dumps({"error": error}).encode())]))


class Gate:
    """A dispatcher before it, whose clock costs no time. It has no budget of extra attempts but what is given."""

    def __init__(self, *, first=OpenAI, answer_s=0.0, refuse_s=0.0, least=0):
        self.upstream = Upstream(answer_s, refuse_s)
        groups = [self._group(name, first if name == "m0" else OpenAI) for name in CHAIN]
        rules = DispatchRules(retries=0, backoff_s=0.0, extra=0.0, min_extra=least)
        self.dispatcher = Dispatcher(groups, rules, http=self.upstream, clock=virtual_clock)

    def _group(self, name, kind):
        provider = kind.Config(model=name, base_url="http://127.0.0.1:9/v1", key_env=None)
        deployment = Deployment(name=f"{name}-0", provider=provider)
        return Group(name=name, deployments=(deployment,), price=Price(input=1, output=1))

    async def ask(self, sender, text, *chain, seconds=30.0, further=None, n=1):
        request = UpstreamRequest("chat", {"model": "auto", "messages": [{"role": "user", "content": text}], "n": n})
        plan = Plan(candidates=chain, deadline=virtual_clock() + seconds, sender=sender, further=further)
        try:
            return (await self.dispatcher.complete(plan, request)).report.model
        except UpstreamError as error:
            return error.failure.kind


@pytest.mark.parametrize(
    ("name", "further"), [("code", 3), ("filter", 3), ("words", 1), ("quoted", 0), ("down", 1), ("out", 0)]
)
def test_one_request_is_asked_of_few_further_models(name, further):
    async def work():
        gate = Gate()
        await gate.ask("a", f"{name} bad", *CHAIN)
        assert gate.upstream.asked.total() == 1 + further

    run_virtual(work)


KINDS = st.sampled_from(["code", "filter", "words"])
# (what `m0` says of it, whether all others do, seconds after the one before)
BATCH = st.lists(st.tuples(KINDS, st.booleans(), st.sampled_from([0.0, 0.2, 5.0])), min_size=1, max_size=60)


@settings(max_examples=40, deadline=None)
@given(BATCH, st.sampled_from([0.0, 4.5, 45.0, 110.0]), st.sampled_from([0.0, 5.0, 40.0]), st.sampled_from(["", "a"]))
def test_whoever_can_be_answered_is_at_once_whatever_comes_of_the_others(batch, answer_s, refuse_s, sender):
    """None waits for another, is lost by the deadline, or is refused because others came to nothing."""

    async def work():
        gate = Gate(answer_s=answer_s, refuse_s=refuse_s)
        asked, longest = [], []

        async def timed(text):
            began = virtual_clock()
            found = await gate.ask(sender, text, "m0", "m1", seconds=120.0)
            longest.append(virtual_clock() - began)
            return found

        for name, is_bad, after_s in batch:
            await asyncio.sleep(after_s)
            asked.append(asyncio.ensure_future(timed(f"{name} bad" if is_bad else name)))
        found = await asyncio.gather(*asked)
        assert [one == "m1" for one in found] == [not is_bad for _, is_bad, _ in batch]
        assert max(longest) < max(answer_s, refuse_s) + 1
        assert gate.upstream.asked == {"m0": len(batch), "m1": len(batch)}

    run_virtual(work)


class Door:
    """Of a sender who may go on so many times."""

    def __init__(self, most):
        self.asked, self.most = 0, most

    async def __call__(self):
        self.asked += 1
        return self.asked <= self.most


def test_a_sender_that_may_not_go_on_is_told_what_it_was_refused_for():
    async def work():
        gate, door = Gate(), Door(1)
        assert await gate.ask("a", "code", "m0", "m1", further=door) == "m1"
        assert await gate.ask("a", "code", "m0", "m1", further=door) == "context"
        assert gate.upstream.asked == {"m0": 2, "m1": 1}
        # Each further model is one.
        gate, door = Gate(), Door(2)
        assert await gate.ask("a", "filter bad", *CHAIN, further=door) == "filter"
        assert (door.asked, gate.upstream.asked) == (3, {"m0": 1, "m1": 1, "m2": 1})

    run_virtual(work)


@pytest.mark.parametrize(("first", "text", "n"), [(OpenAI, "out", 1), (Anthropic, "hello", 2)])
def test_neither_an_outage_nor_what_is_not_supported_counts(first, text, n):
    async def work():
        gate, door = Gate(first=first, least=1), Door(0)
        assert await gate.ask("a", text, "m0", "m1", n=n, further=door) == "m1"
        assert (door.asked, gate.upstream.asked["m0"]) == (0, n % 2)

    run_virtual(work)


# A minute, which gives another one after half of it.
FEW, MORE = 2, 5
TOO_LONG = whole({"error": {"message": "no", "code": "context_length_exceeded"}}, 400)


def test_a_key_has_as_many_as_it_may_send_requests_and_its_neighbour_its_own(tmp_path):
    """Through HTTP: the chain of `m0` is asked for each, `big` answers whatever is not hopeless."""
    calls = Counter()

    def said(name, answer):
        def answered(body):
            calls[name] += 1
            return TOO_LONG if "hopeless" in body["messages"][0]["content"] else answer

        return answered

    upstream = {"m0": said("m0", TOO_LONG), "mid": said("mid", TOO_LONG), "big": said("big", whole(ANSWER))}
    with scripted(upstream) as url:
        models = [model(name, "openai", url, key_env="") for name in upstream]

        async def keys():
            async with open_store(str(tmp_path / "gateway.db")) as store:
                made = [await store.create_key(name, rpm=rpm) for name, rpm in (("a", FEW), ("b", FEW), ("c", None))]
                return [secret for secret, _ in made]

        limited, neighbour, free = asyncio.run(keys())
        chains = {"context_fallbacks": {"m0": ["mid", "big"]}}
        with fronted(tmp_path, models, {}, cache={"exact": False}, require_key=True, **chains) as running:

            def many(key, text, name="m0"):
                return [
                    call(running.url, "POST", "/v1/chat/completions", asked(name, text), key)[::2] for _ in range(MORE)
                ]

            found = many(limited, "hopeless")
            assert Counter(status for status, _ in found) == {400: FEW, 429: MORE - FEW}
            # Of twice as many further models as requests, as many as requests.
            assert (calls["m0"], calls["mid"] + calls["big"]) == (FEW, FEW)
            status, told, _ = call(running.url, "POST", "/v1/chat/completions", asked("m0", "hopeless"), limited)
            assert (status, told["error"]["code"]) == (429, "rate_limit_exceeded")
            # Half as many of two further models each; and directly.
            assert Counter(status for status, _ in many(neighbour, "hello")) == {
                200: FEW // 2,
                400: FEW // 2,
                429: MORE - FEW,
            }
            assert Counter(status for status, _ in many(free, "hello")) == {200: MORE}
            assert Counter(status for status, _ in many(free, "hello", "big")) == {200: MORE}


def asked(name, text):
    return {"model": name, "messages": [{"role": "user", "content": text}]}
