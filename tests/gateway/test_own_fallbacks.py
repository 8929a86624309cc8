"""Fallbacks for what is a request's own: whoever needs one has it at once, and no model is asked more often than by its name."""

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

    async def ask(self, sender, text, *chain, seconds=30.0, n=1):
        request = UpstreamRequest("chat", {"model": "auto", "messages": [{"role": "user", "content": text}], "n": n})
        plan = Plan(candidates=chain, deadline=virtual_clock() + seconds, sender=sender)
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
        assert gate.upstream.asked == dict.fromkeys(CHAIN[: 1 + further], 1)

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


@pytest.mark.parametrize(("first", "text", "n"), [(OpenAI, "out", 1), (Anthropic, "hello", 2)])
def test_an_outage_costs_an_extra_attempt_and_what_is_not_supported_none(first, text, n):
    async def work():
        for least in (0, 1):
            gate = Gate(first=first, least=least)
            found = await gate.ask("a", text, "m0", "m1", n=n)
            assert (found == "m1") == (least == 1 or n == 2)
            assert gate.upstream.asked["m0"] == n % 2

    run_virtual(work)


# A minute, which gives another one after half of it.
FEW, MORE = 2, 5
TOO_LONG = whole({"error": {"message": "no", "code": "context_length_exceeded"}}, 400)


def test_a_key_has_each_model_of_a_chain_asked_no_more_often_than_by_its_name(tmp_path):
    """Through HTTP: `big` answers whatever is not hopeless, which all refuse."""
    calls = Counter()

    def said(name, answer):
        def answered(body):
            calls[name] += 1
            return TOO_LONG if "hopeless" in body["messages"][0]["content"] else answer

        return answered

    upstream = {"m0": said("m0", TOO_LONG), "mid": said("mid", TOO_LONG), "big": said("big", whole(ANSWER))}

    async def keys():
        async with open_store(str(tmp_path / "gateway.db")) as store:
            made = [await store.create_key(name, rpm=FEW) for name in ("long", "hopeless", "direct")]
            return [secret for secret, _ in made]

    with scripted(upstream) as url:
        models = [model(name, "openai", url, key_env="") for name in upstream]
        long, hopeless, direct = asyncio.run(keys())
        chains = {"context_fallbacks": {"m0": ["mid", "big"]}}
        with fronted(tmp_path, models, {}, cache={"exact": False}, require_key=True, **chains) as running:

            def many(key, text, name="m0"):
                body = {"model": name, "messages": [{"role": "user", "content": text}]}
                sent = [call(running.url, "POST", "/v1/chat/completions", body, key)[0] for _ in range(MORE)]
                return Counter(sent)

            assert many(hopeless, "hopeless") == {400: FEW, 429: MORE - FEW}
            assert calls == dict.fromkeys(upstream, FEW)
            # Whoever is merely long has an answer to each.
            assert many(long, "hello") == {200: FEW, 429: MORE - FEW}
            assert many(direct, "hello", "big") == {200: FEW, 429: MORE - FEW}
            assert calls == {"m0": 2 * FEW, "mid": 2 * FEW, "big": 3 * FEW}
