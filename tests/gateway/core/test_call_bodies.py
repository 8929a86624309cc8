"""Bodies of calls: a large one is looked at once for all calls that send it, and never in the loop's thread."""

import asyncio
import threading
from functools import partial
from itertools import pairwise

import pytest

from anabranch.errors import InputError
from anabranch.gateway.asked import asked_of
from anabranch.gateway.core import call_bodies
from anabranch.gateway.core.call_bodies import CallBodies
from anabranch.gateway.prompt_tokens import count_prompt
from anabranch.gateway.providers import upstream_request
from anabranch.gateway.runtime import Runtime
from anabranch.routers.contract.ask import Arm
from anabranch.web.large_json import LARGE
from gateway_states import at_once, begun, config, run, services, state_of

LONG = [{"role": "user", "content": "word " * 60} for _ in range(1_000)]


def _noting(done, inner, *given):
    done.append((inner.__name__, threading.current_thread() is threading.main_thread()))
    return inner(*given)


@pytest.fixture
def worked(monkeypatch):
    """Names of the long work that was done, each with whether it was the loop's thread that did it."""
    done = []
    for module, name in (
        (call_bodies, "check_depth"),
        (call_bodies, "count_prompt"),
        (call_bodies, "asked_of"),
        (upstream_request, "dump_parts"),
    ):
        monkeypatch.setattr(module, name, partial(_noting, done, getattr(module, name)))
    return done


def test_samples_of_a_long_conversation_are_looked_at_once_and_in_another_thread(worked):
    async def work():
        state = state_of(lent=services()[0], of=config())
        begun(state)
        ask = state.calls
        arm = Arm("small", {"tools": [{"type": "function", "function": {"name": "f"}}]}, system="be kind")
        drawn = [ask(arm, LONG, seed=number, temperature=number / 4, max_tokens=5 + number) for number in range(4)]
        await asyncio.gather(*drawn, ask(Arm("large", arm.settings, system="be kind"), LONG))
        counted = [call.report.usage.prompt for call in ask.made]
        assert [one for one in worked if one[0] != "dump_parts"] == [
            ("check_depth", False),
            ("count_prompt", False),
            ("asked_of", False),
        ]
        # Each is written for its own deployment.
        assert [one for one in worked if one[0] == "dump_parts"] == [("dump_parts", False)] * 5
        worked.clear()
        # Another conversation, and the same text told anew.
        text = "word " * LARGE
        await ask("small", text)
        await ask("large", "".join([text[:9], text[9:]]))
        await ask("small", "hi")
        assert [one for one in worked if one[0] == "count_prompt"] == [("count_prompt", False), ("count_prompt", True)]
        return counted

    assert len(set(run(work))) == 1


@pytest.mark.parametrize("messages", [LONG, LONG[:2]])
def test_what_is_known_of_a_body_is_what_is_told_of_it_at_once(messages):
    async def work():
        bodies = CallBodies(Runtime(config()), "")
        body = {"model": "small", "messages": messages, "service_tier": "flex"}
        for more in ({}, {"seed": 1}, {"service_tier": "priority"}, {"messages": [*messages, messages[0]]}):
            looked = await bodies.look({**body, **more})
            assert (looked.count, looked.asked) == (count_prompt({**body, **more}), asked_of({**body, **more}))
            assert (looked.num_bytes > LARGE) == (len(messages) > 2)

    run(work)


@pytest.mark.parametrize("messages", [LONG, LONG[:2]])
def test_what_one_call_says_wrong_is_its_own_fault_and_of_the_conversation_all_s(messages):
    async def work():
        bodies = CallBodies(Runtime(config()), "")
        body = {"model": "small", "messages": messages}
        given = [{"temperature": 9}, {}, {"max_tokens": -1}, {"seed": 1}]
        found = await asyncio.gather(*(bodies.look({**body, **one}) for one in given), return_exceptions=True)
        assert [isinstance(one, InputError) for one in found] == [True, False, True, False]
        body["messages"] = [*messages, {"role": "nobody", "content": "x"}]
        for _ in range(2):
            with pytest.raises(InputError, match=r"cannot be asked.*role"):
                await bodies.look(body)

    run(work)


def test_one_who_stops_waiting_leaves_the_others_what_they_wait_for(worked):
    async def work():
        bodies = CallBodies(Runtime(config()), "")
        body = {"model": "small", "messages": LONG}
        one, other = (asyncio.ensure_future(bodies.look(body)) for _ in range(2))
        await asyncio.sleep(0)
        one.cancel()
        assert (await other).count == count_prompt(body)
        assert one.cancelled()
        assert [name for name, _ in worked].count("asked_of") == 1

    run(work)


def test_so_many_conversations_are_remembered():
    async def work():
        bodies = CallBodies(Runtime(config()), "")
        for number in range(9):
            await bodies.look({"model": "small", "messages": [*LONG, *LONG[:number]]})
        assert len(bodies._known) == 4

    run(work)


def test_a_small_body_is_looked_at_at_once():
    looked = at_once(CallBodies(Runtime(config()), "").look({"model": "small", "messages": LONG[:1]}))
    assert 300 < looked.num_bytes < 800


@pytest.mark.parametrize(("num", "most"), [(1_000, 1), (80, 1), (2, 6)])
def test_samples_that_are_drawn_at_once_take_turns_and_others_have_theirs_between(num, most):
    """Some tens of kilobytes and more; short ones take no time."""

    async def work():
        bodies, begun_so_far, seen = CallBodies(Runtime(config()), ""), [], [0]
        inner = bodies._begun
        bodies._begun = lambda body: begun_so_far.append(1) or inner(body)

        async def other():
            while True:
                seen.append(len(begun_so_far))
                await asyncio.sleep(0)

        task = asyncio.ensure_future(other())
        body = {"model": "small", "messages": LONG[:num]}
        looked = await asyncio.gather(*(bodies.look({**body, "seed": number}) for number in range(6)))
        await asyncio.sleep(0)
        task.cancel()
        assert len(set(map(repr, looked))) == 1
        assert max(after - before for before, after in pairwise(seen)) == most

    run(work)
