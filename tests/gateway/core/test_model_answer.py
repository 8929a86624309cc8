"""One model's answer: the money that is set aside for it, who is asked, and what a strategy's judgement may spend."""

import asyncio
import re

import pytest

from anabranch.errors import BudgetError
from anabranch.gateway.core import choice
from anabranch.gateway.core.cached_answers import CachedAnswers
from anabranch.gateway.core.model_answer import ModelAnswer
from anabranch.gateway.dispatch import Attempt, Report
from anabranch.gateway.providers.anthropic_request import LEAST_BUDGET
from anabranch.gateway.store import KeyRecord
from anabranch.web.api_error import ApiError
from gateway_states import FakeStore, begun, config, model, run, services, state_of


async def decided(body=None, *, store=None, record=None, **fields):
    """A request that has been decided on, and who is to answer it."""
    state = state_of(body, lent=services(store)[0], **fields)
    state.record = record
    begun(state)
    await choice.decide(state)
    return state, ModelAnswer(state, CachedAnswers(state))


def test_the_most_that_the_first_may_cost_is_set_aside():
    async def work():
        state, asked = await decided()
        await asked.reserve()
        worst = state.bounds.worst_nano("small", None)
        assert [nano for _, nano, _ in state.services.store.reserved] == [worst]
        assert (state.candidates, state.purse.held_nano) == (("small",), worst)

    run(work)


def test_a_strategy_s_candidates_that_no_budget_has_room_for_are_passed_over_and_a_named_model_is_not():
    of = config(model("dear", 10.0), model("cheap"), default_strategy="cheapest")

    async def work(body, limit):
        state, asked = await decided(body, store=FakeStore(limit), of=of)
        if state.target.strategy:
            # As a strategy would that likes what is dear.
            decision = state.decided.decision
            first, second = decision.candidates
            object.__setattr__(decision, "candidates", (second, first))
        await asked.reserve()
        await asked.ask()
        # What answers for want of money stands in for what would have.
        return state.candidates, state.report.is_stopgap

    async def worst(name):
        state, _ = await decided({"model": name}, of=of)
        return state.bounds.worst_nano(name, None)

    limit = run(worst, "cheap")
    assert run(work, {"model": "auto"}, run(worst, "dear")) == (("dear", "cheap"), False)
    assert run(work, {"model": "auto"}, limit) == (("cheap",), True)
    with pytest.raises(BudgetError):
        run(work, {"model": "dear"}, limit)
    with pytest.raises(BudgetError):
        run(work, {"model": "auto"}, limit - 1)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"n": 3},
        {"max_tokens": 40},
        {"max_completion_tokens": 40},
        {"max_tokens": 30, "max_completion_tokens": 40},
    ],
)
def test_a_refusal_says_with_how_many_tokens_there_would_be_room(body):
    """R20: with fewer it passed, and nobody said so."""

    async def work(limit, most=None):
        told = dict.fromkeys(names, most) if most is not None else {}
        state, asked = await decided({**body, **told}, store=FakeStore(limit))
        await asked.reserve()
        return state.purse.held_nano

    # In the words of the sender; the larger of two counts.
    names = [name for name in body if name.startswith("max_")] or ["max_tokens"]
    limit = run(work, 10**15) * 2 // 3
    with pytest.raises(BudgetError) as refused:
        run(work, limit)
    found = re.search(r"; with ([a-z_ ]+) = (\d+) or less it may cost no more than is left$", str(refused.value))
    assert found[1] == " and ".join(names)
    most = int(found[2])
    assert run(work, limit, most) <= limit
    with pytest.raises(BudgetError):
        run(work, limit, most + 1)
    # Where the prompt alone is too dear, no number of tokens would do.
    with pytest.raises(BudgetError) as refused:
        run(work, 1)
    assert "max_tokens" not in str(refused.value)


@pytest.mark.parametrize(
    ("budget", "share", "also"),
    [(100, 0.5, ""), (9_000, 0.5, ", and thinking.budget_tokens below that,"), (9_000, 0.05, ", and no thinking,")],
)
def test_and_what_becomes_of_the_thoughts_that_its_sender_named(budget, share, also):
    """Fewer tokens than thoughts are refused by their provider."""
    body = {"max_tokens": 10_000, "thinking": {"type": "enabled", "budget_tokens": budget}}

    async def work(limit):
        state, asked = await decided(body, store=FakeStore(limit))
        await asked.reserve()
        return state.purse.held_nano

    limit = int(run(work, 10**15) * share)
    with pytest.raises(BudgetError) as refused:
        run(work, limit)
    found = re.search(r"; with max_tokens = (\d+) or less(.*) it may cost no more than is left$", str(refused.value))
    assert found[2] == also
    assert (int(found[1]) > LEAST_BUDGET) is (share == 0.5)


def test_a_model_without_a_price_is_asked_where_no_money_is_limited():
    of = config(model("free", price=None))

    async def work(store):
        state, asked = await decided({"model": "free"}, store=store, of=of)
        await asked.reserve()
        return state.candidates

    assert run(work, FakeStore()) == ("free",)


def test_a_key_that_may_not_use_the_model_is_told_which_it_may():
    async def work():
        _, asked = await decided({"model": "large"}, record=KeyRecord(id="k", models=("small",)))
        await asked.reserve()

    with pytest.raises(ApiError, match="may use small"):
        run(work)


def test_whole_answers_and_streams_come_with_their_report():
    async def work():
        state, asked = await decided()
        await asked.reserve()
        whole = await asked.ask()
        assert (whole.report, state.report.model, state.calls.purpose) == (state.report, "small", "judge")
        assert state.dispatched is not None
        state, asked = await decided({"stream": True})
        await asked.reserve()
        stream = await asked.ask()
        pieces = [piece async for piece in stream]
        assert pieces[-1] == b"data: [DONE]\n\n"
        assert state.report.model == "small"
        # Nobody wants it as a whole: nothing is kept of it.
        assert stream.answer().text == ""

    run(work)


def test_a_further_attempt_is_paid_for_beside_those_under_way():
    async def work(limit):
        state, asked = await decided(store=FakeStore(limit), of=config(fallbacks={"small": ("large",)}))
        await asked.reserve()
        state.report = Report(attempts=[Attempt(model="small", deployment="small", start_s=0.0)])
        small, large = (state.bounds.worst_nano(name, state.report) for name in ("small", "large"))
        return await asked._allow("large", 5), 5 + small + large, state.purse.held_nano

    allowed, wanted, held = run(work, 10**15)
    assert (allowed, held) == (True, wanted)
    assert run(work, wanted)[0]
    assert not run(work, wanted - 1)[0]


def test_what_is_left_after_an_answer_may_be_spent_on_asking_about_it():
    async def work():
        state, asked = await decided()
        await asked.reserve()
        state.report = Report(attempts=[Attempt(model="small", deployment="small", start_s=0.0, status="ok", cost=3)])

        async def judge(name, answer):
            return state.purse.held_nano

        return await asked._accept(judge, "small", None)

    assert run(work) == 3


@pytest.mark.parametrize(
    ("mode", "header", "shown_as", "may"),
    [
        ("restart", "restart", "", True),
        ("restart", "", "", False),
        ("error", "restart", "", False),
        ("restart", "restart", "messages", False),
    ],
)
def test_a_stream_begins_anew_only_for_those_who_know_what_that_looks_like(mode, header, shown_as, may):
    async def work():
        headers = {"x-mid-stream": header}
        _, asked = await decided(of=config(mid_stream=mode), headers=headers, shown_as=shown_as)
        return asked._may_restart

    assert asyncio.run(work()) == may
