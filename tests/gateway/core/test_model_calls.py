"""Calls of a strategy: what makes none, what they may cost, and that none outlives its request. Their money: `test_strategy_calls`."""

import asyncio
from types import SimpleNamespace

import pytest

from anabranch.errors import BudgetError, InputError, LimitError
from anabranch.gateway.config import LimitsConfig
from anabranch.gateway.core.call_bodies import CallBodies
from anabranch.gateway.core.model_calls import _streamed, answered, body_of, bounded
from anabranch.gateway.dispatch import Plan, Report
from anabranch.gateway.providers.openai import OpenAI
from anabranch.gateway.providers.provider import Answer, UpstreamError, UpstreamRequest, Usage
from anabranch.gateway.runtime import Runtime
from anabranch.gateway.store import KeyRecord
from anabranch.routers.contract.ask import Answered, Arm, Said
from gateway_states import FakeStore, at_once, begun, config, model, run, services, state_of


def asking(*, store=None, record=None, **fields):
    state = state_of(lent=services(store)[0], of=config(**fields))
    state.record = record
    begun(state)
    return state, state.calls


def test_a_call_is_paid_for_and_noted():
    async def work():
        state, calls = asking()
        answer = await calls("small", "which?", max_tokens=2, temperature=0)
        [call] = calls.made
        assert isinstance(answer, Answered)
        assert (call.id, call.model, call.purpose, call.status) == (f"{state.id}.1", "small", "route", "ok")
        assert (state.purse.held_nano, state.purse.spent_nano) == (0, call.report.cost)
        assert call.held_nano >= call.report.cost > 0
        calls.purpose = "draft"
        said = [piece async for piece in calls.stream("small", "which?")]
        assert isinstance(said[-1], Answered)
        assert "".join(piece.text for piece in said if isinstance(piece, Said)) == said[-1].text
        # Each by its own prompt, for what is known of one that was lost.
        await calls("small", "a much longer question " * 9)
        assert calls.made[-1].prompt_tokens > call.prompt_tokens > 0
        assert calls.made[1].purpose == "draft"

    run(work)


@pytest.mark.parametrize(
    ("arm", "how", "error", "message"),
    [
        ("nobody", {}, InputError, "not in the config"),
        ("small", {"purpose": "fun"}, InputError, "purpose must be one of"),
        ("large", {}, LimitError, "may not use"),
        (Arm("small", {"stream": True}), {}, InputError, "settings of an arm hold stream"),
        ("small", {"max_tokens": -1}, InputError, "cannot be asked"),
    ],
)
def test_what_makes_no_call_is_said_and_nothing_is_asked(arm, how, error, message):
    async def work():
        state, calls = asking(record=KeyRecord(id="k", models=("small",)))
        with pytest.raises(error, match=message):
            await calls(arm, "which?", **how)
        assert (calls.made, state.services.store.reserved) == ([], [])

    run(work)


def test_there_are_so_many_and_none_once_the_request_is_over():
    async def work():
        _, calls = asking(limits=LimitsConfig(strategy_calls=1))
        assert calls.left == 1
        await calls("small", "a")
        assert calls.left == 0
        with pytest.raises(LimitError, match="may make 1 calls"):
            await calls("small", "b")
        ended = []
        calls.close(lambda: ended.append(1))
        with pytest.raises(InputError, match="is over"):
            await calls("small", "c")
        assert ended == [1]

    run(work)


def test_a_call_without_room_is_not_made():
    async def work():
        _, calls = asking(store=FakeStore(limit=0))
        with pytest.raises(BudgetError):
            await calls("small", "a")
        assert calls.made == []

    run(work)


def test_a_request_ends_once_its_calls_have():
    async def work():
        slow = model("small").deployments[0].provider.replace(latency_s=30.0)
        small = model("small")
        small = small.replace(deployments=(small.deployments[0].replace(provider=slow),))
        state = state_of(lent=services()[0], of=config(small))
        begun(state)
        asking = asyncio.ensure_future(state.calls("small", "a"))
        while not state.calls.made:
            await asyncio.sleep(0)
        ended = asyncio.Event()
        state.calls.close(ended.set)
        assert not ended.is_set()
        await asyncio.wait_for(ended.wait(), 60)
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert (state.calls.made[0].status, state.purse.held_nano) == ("cancelled", 0)

    run(work)


def test_the_room_of_what_was_kept_is_given_back_also_where_its_closing_is_cancelled():
    class Stuck:
        """A stream that gives nothing, and is never closed."""

        num_forgotten = num_closing = 0

        def __aiter__(self):
            return self

        async def __anext__(self):
            await asyncio.Event().wait()

        async def aclose(self):
            self.num_closing += 1
            await asyncio.Event().wait()

        def forget(self):
            self.num_forgotten += 1

    async def work():
        stream = Stuck()

        async def begun_stream(plan, request):
            assert plan.keep
            return stream

        plan = Plan(candidates=("small",), deadline=1.0)
        dispatcher = SimpleNamespace(stream=begun_stream)
        calling = asyncio.ensure_future(_streamed(dispatcher, plan, UpstreamRequest("chat", {}), asyncio.Queue()))
        for num_closing in (1, 1):
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert stream.num_forgotten == 0
            calling.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert stream.num_closing == num_closing
        await asyncio.wait((calling,))
        assert (calling.cancelled(), stream.num_forgotten) == (True, 1)

    asyncio.run(work())


def test_a_body_is_the_arm_s_settings_the_conversation_and_what_the_call_says():
    given = [{"role": "system", "content": "old"}, {"role": "user", "content": "hi"}]
    arm = Arm("small", {"top_p": 0.5, "max_completion_tokens": 9}, samples=2, system="be kind")
    body = body_of(arm, given, max_tokens=5, seed=1, logprobs=3, stop=["x"])
    assert body == {
        "top_p": 0.5,
        "model": "small",
        "max_tokens": 5,
        "seed": 1,
        "stop": ["x"],
        "n": 2,
        "logprobs": True,
        "top_logprobs": 3,
        "messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}],
    }


def test_a_call_without_an_end_is_given_one():
    runtime = Runtime(config())
    given = {"model": "small", "messages": [{"role": "user", "content": "hi"}]}
    looked = at_once(CallBodies(runtime, "").look(given))
    body, most = bounded(runtime, {**given, "n": 2}, looked)
    assert (body["max_tokens"], most.completion, most.prompt) == (50, 100, looked.count.at_most)
    body, most = bounded(runtime, {**given, "max_tokens": 3}, looked)
    assert (body["max_tokens"], most.completion) == (3, 3)
    # What is predicted may be billed beside it, where it is sent on.
    runtime = Runtime(config(model("small", provider=OpenAI.Config(model="m", key_env=None))))
    _, most = bounded(runtime, {**given, "max_tokens": 3, "prediction": {"type": "content", "content": "abcd"}}, looked)
    assert (most.completion, most.predicted) == (7, 4)


def test_an_answer_without_choices_is_none():
    for choices in (None, [], ["x"], "x"):
        with pytest.raises(UpstreamError, match="without choices"):
            answered("small", Answer({"choices": choices}, None, Usage()), Report(), 0.1)
