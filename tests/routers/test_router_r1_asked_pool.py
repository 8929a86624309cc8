"""Pools whose models are there: asked as behind a gateway, from any thread, with an end of their patience."""

import asyncio
import threading
import time

import pytest

from anabranch.errors import BackendError, InputError
from anabranch.routers.contract.ask import Answered, Arm
from anabranch.routers.router_r1 import asked_pool
from anabranch.routers.router_r1.asked_pool import AskPool, Member
from anabranch.routers.router_r1.environment import Price, Reply
from anabranch.routers.router_r1.prompts import agent_prompt


class Scripted:
    """An `Ask` that says what it was asked."""

    left = float("inf")

    def __init__(self, wait=0.0):
        self.calls, self._wait = [], wait

    async def __call__(self, arm, messages, **how):
        self.calls.append((arm.model, messages, how))
        await asyncio.sleep(self._wait)
        return Answered.saying("yes", model=arm.model, prompt_tokens=7, completion_tokens=3)


def test_models_are_asked_as_behind_a_gateway():
    ask = Scripted()
    pool = AskPool({"small": Member(ask, Arm("there"), Price(2.0, 1.0))}, reply_tokens=9)
    try:
        assert pool.reply("small", "Who?") == Reply("yes", 7, 3)
        [(model, prompt, how)] = ask.calls
        assert model == "there"
        assert prompt.endswith("Who?")
        assert "at most 9 tokens" in prompt
        assert how == {"purpose": "draft", "max_tokens": 9, "temperature": 0.0}
        # More than any tokens of it can cost, with a hundred of a chat's template.
        assert pool.most_usd("small", "Who?") >= (len(prompt) + 100 + 2 * 9) / 1e6
    finally:
        pool.close()
    # It begins anew.
    assert pool.reply("small", "Who?").text == "yes"
    pool.close()


def test_a_model_that_hangs_is_given_up():
    pool = AskPool({"small": Member(Scripted(wait=30), Arm("there"), Price(2.0))}, call_s=0.05)
    with pytest.raises(BackendError, match=r"did not answer within 0\.05 seconds"):
        pool.reply("small", "Who?")
    pool.close()


def test_what_a_call_may_cost_by_hand():
    """The prompt's bytes and 200 at 1 a million, 9 tokens at 2; a letter of two bytes counts two."""
    pool = AskPool({"small": Member(Scripted(), Arm("there"), Price(2.0, 1.0))}, reply_tokens=9)
    shared = len(agent_prompt("", 9))
    assert pool.most_usd("small", "abc") == pytest.approx((shared + 3 + 200 + 2 * 9) / 1e6)
    assert pool.most_usd("small", "é") == pytest.approx((shared + 2 + 200 + 2 * 9) / 1e6)
    # Half a surrogate, which is in no UTF-8, takes three.
    assert pool.most_usd("small", "\ud800") == pytest.approx((shared + 3 + 200 + 2 * 9) / 1e6)
    assert pool.prices == {"small": Price(2.0, 1.0)}


def test_each_model_is_asked_by_its_own():
    asks = {name: Scripted() for name in ("small", "large")}
    pool = AskPool({name: Member(ask, Arm(f"the {name}"), Price(1.0)) for name, ask in asks.items()})
    for name in ("large", "small", "large"):
        pool.reply(name, "Who?")
    pool.close()
    assert {name: [call[0] for call in ask.calls] for name, ask in asks.items()} == {
        "small": ["the small"],
        "large": ["the large"] * 2,
    }


def test_an_endpoint_that_counts_nothing_is_counted_in_words():
    class Uncounted(Scripted):
        async def __call__(self, arm, messages, **how):
            return Answered.saying("yes it is", prompt_tokens=70, completion_tokens=30, is_counted=False)

    pool = AskPool({"small": Member(Uncounted(), Arm("there"), Price(1.0))})
    assert pool.reply("small", "Who is it?") == Reply("yes it is", 3, 3, is_counted=False)
    pool.close()


def test_what_a_model_fails_with_is_what_comes_and_others_go_on():
    class Fails(Scripted):
        async def __call__(self, arm, messages, **how):
            raise BackendError("busy")

    members = {"small": Member(Fails(), Arm("a"), Price(1.0)), "large": Member(Scripted(), Arm("b"), Price(1.0))}
    pool = AskPool(members)
    with pytest.raises(BackendError, match=r"^busy$"):
        pool.reply("small", "Who?")
    assert pool.reply("large", "Who?").text == "yes"
    pool.close()


def test_threads_ask_side_by_side():
    """Six calls that each wait until all have begun: one after the other they would never end."""
    begun = []

    class Meets(Scripted):
        async def __call__(self, arm, messages, **how):
            begun.append(messages)
            while len(begun) < 6:
                await asyncio.sleep(0.001)
            return Answered.saying("yes")

    pool, found = AskPool({"small": Member(Meets(), Arm("a"), Price(1.0))}, call_s=60.0), []
    threads = [
        threading.Thread(target=lambda number=number: found.append(pool.reply("small", str(number)).text))
        for number in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pool.close()
    assert found == ["yes"] * 6
    # One thread of its own, which has ended.
    assert not [thread for thread in threading.enumerate() if thread.name == "anabranch pool"]


def test_calls_that_are_out_end_where_the_pool_is_closed():
    """They waited for a loop that had stopped, for ever, and the process with them."""
    ask, raised = Scripted(wait=600), []
    pool = AskPool({"small": Member(ask, Arm("there"), Price(2.0))}, call_s=600)

    def call():
        with pytest.raises(BackendError) as error:
            pool.reply("small", "Who?")
        raised.append(error.value)

    threads = [threading.Thread(target=call, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    while len(ask.calls) < 3:
        time.sleep(0.01)
    pool.close()
    for thread in threads:
        thread.join(60)
    assert [str(error) for error in raised] == ["small had not answered when the pool was closed"] * 3
    # Some of it may be billed, and nobody is to ask again.
    assert not any(error.is_free or error.is_transient for error in raised)
    ask._wait = 0.0
    assert pool.reply("small", "Who?").text == "yes"
    pool.close()


def test_whoever_was_not_asked_yet_where_the_pool_is_closed_is_owed_nothing(monkeypatch):
    """It counted as the most that it may have cost."""
    blocks, go, comes, asked, ended = threading.Event(), threading.Event(), threading.Event(), [], {}
    monkeypatch.setattr(asked_pool, "_CLOSE_S", 0.0)

    async def ask(arm, prompt, **how):
        # The loop has no turn for others meanwhile.
        asked.append(prompt)
        blocks.set()
        go.wait(600)
        await asyncio.sleep(600)

    pool = AskPool({"small": Member(ask, Arm("there"), Price(2.0))}, call_s=600)
    first = pool._asked

    def begins(model, query, *more):
        if query == "second":
            comes.set()
        return first(model, query, *more)

    def call(query):
        with pytest.raises(BackendError) as error:
            pool.reply("small", query)
        ended[query] = error.value

    pool._asked = begins
    threads = [threading.Thread(target=call, args=(query,), daemon=True) for query in ("first", "second")]
    threads[0].start()
    assert blocks.wait(60)
    threads[1].start()
    assert comes.wait(60)
    # It has a place behind the second, whose task is made and has had no turn when the loop stops.
    pool.close()
    go.set()
    for thread in threads:
        thread.join(60)
    assert len(asked) == 1
    assert {query: (str(error), error.is_free) for query, error in ended.items()} == {
        "first": ("small had not answered when the pool was closed", False),
        "second": ("small had not been asked when the pool was closed", True),
    }


def test_what_cannot_be_cancelled_does_not_hold_up_who_closes(monkeypatch):
    """The look-up of a name is a thread's."""
    looking, is_over, raised = threading.Event(), threading.Event(), []
    monkeypatch.setattr(asked_pool, "_CLOSE_S", 0.1)

    def looks():
        looking.set()
        is_over.wait(600)

    async def ask(arm, messages, **how):
        await asyncio.to_thread(looks)

    pool = AskPool({"small": Member(ask, Arm("there"), Price(2.0))}, call_s=600)

    def call():
        with pytest.raises(BackendError, match="when the pool was closed") as error:
            pool.reply("small", "Who?")
        raised.append(error.value)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    assert looking.wait(60)
    own = next(one for one in threading.enumerate() if one.name == "anabranch pool")
    pool.close()
    # The call has ended, and what it waited for has not.
    thread.join(60)
    assert len(raised) == 1
    assert own.is_alive()
    is_over.set()
    own.join(60)
    assert not own.is_alive()


def test_a_pool_that_was_not_asked_closes_and_one_of_nobody_is_refused():
    AskPool({"small": Member(Scripted(), Arm("a"), Price(1.0))}).close()
    with pytest.raises(InputError, match="a pool needs at least one model with a price"):
        AskPool({})
