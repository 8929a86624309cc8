"""The end of a request: its row, who is told, and what the strategy learns."""

from anabranch.gateway.config import LogConfig
from anabranch.gateway.core import choice, ending
from anabranch.gateway.core.model_calls import ModelCall
from anabranch.gateway.dispatch import Attempt, Report
from anabranch.gateway.providers.provider import Usage
from anabranch.gateway.store import KeyRecord
from gateway_states import FakeStore, begun, config, run, services, state_of


def attempt(**fields):
    given = {"model": "small", "deployment": "small", "start_s": 0.0, "status": "ok", "total_s": 0.5, **fields}
    return Attempt(**given)


async def decided(body=None, *, of=None, lent=None):
    state = state_of(body, lent=lent, of=of)
    begun(state)
    await choice.decide(state)
    return state


def test_a_request_has_one_row_and_its_reservation_is_settled_with_it():
    store = FakeStore()
    lent, told = services(store)

    async def work():
        state = await decided({"model": "auto/cheapest"}, of=config(log=LogConfig(prompts=True)), lent=lent)
        await state.purse.hold(900)
        state.report = Report(attempts=[attempt(usage=Usage(3, 4, 0), cost=700)], model="small", deployment="small")
        state.answer_text, state.finish_reason = "yes", "stop"
        ending.conclude(state, "ok", 200, "", "", 0.75)
        return state

    state = run(work)
    [(held, row, collected, calls)] = store.settled
    assert (held.nano, row.request_id, row.cost_nano, row.status, row.latency_us) == (900, state.id, 700, "ok", 750_000)
    assert (row.model, row.strategy, row.requested, row.prompt_tokens, row.completion_tokens) == (
        "small",
        "cheapest",
        "auto/cheapest",
        3,
        4,
    )
    assert (collected, calls, len(state.services.unsettled)) == (None, (), 0)
    [finished], [priced] = told.finished, told.priced
    assert (finished.row.request_id, finished.http_status, priced.nano) == (state.id, 200, 700)
    assert (finished.outcome.model, finished.outcome.cost, priced.outcome.cost) == ("small", None, 7e-7)
    [(id, strategy, chosen, why)], [(_, texts)] = store.decisions, store.texts
    assert (id, strategy, chosen, why["asked"]) == (state.id, "cheapest", "small", ["small"])
    assert (texts["query"], texts["answer"]) == ("hello there", "yes")


def test_a_request_without_money_has_a_row_too_and_nothing_to_learn():
    store = FakeStore()
    lent, told = services(store)

    async def work():
        state = await decided(lent=lent, of=config(log=LogConfig(decisions=False)))
        ending.conclude(state, "refused", 429, "insufficient_quota", "", 0.1)
        return state

    run(work)
    [row] = store.appended
    assert (row.status, row.code, row.cost_nano, row.model) == ("refused", "insufficient_quota", 0, "")
    assert (store.decisions, store.texts, told.priced[0].outcome) == ([], [], None)


def test_the_row_waits_for_a_call_that_is_read_on():
    store = FakeStore()
    lent, told = services(store)

    async def work():
        state = await decided(lent=lent)
        late = attempt(status="timeout", cost=900, is_late=True)
        state.report = Report(attempts=[late])
        ending.conclude(state, "error", 504, "upstream_timeout", "", 0.1)
        assert (len(told.finished), told.priced, store.appended) == (1, [], [])
        assert state.id in lent.unsettled
        late.is_late, late.cost = False, 0
        state.report.now_known()
        assert (store.appended[0].cost_nano, len(lent.unsettled)) == (0, 0)

    run(work)


def rated(tpm=100, is_shared=True):
    """A request whose rate is corrected, and what its admission was told."""
    lent, _ = services()
    corrected = []
    lent.admission.correct = lambda *given, **how: corrected.append((*given, how["is_shared"]))

    async def work():
        state = await decided(lent=lent)
        state.record, state.tpm, state.is_rate_shared = KeyRecord(id="k"), tpm, is_shared
        return state

    return run(work), corrected


def guess(seen=0, **fields):
    return attempt(usage=Usage(900, 900, 0), is_guess=True, seen=seen, **fields)


def asked(*attempts, prompt=7):
    return ModelCall(
        id="r.1",
        model="small",
        purpose="draft",
        began_s=0.0,
        prompt_tokens=prompt,
        report=Report(attempts=list(attempts)),
    )


def test_a_rate_is_corrected_by_what_was_used_and_not_by_what_may_have_been():
    state, corrected = rated()
    state.report = Report(attempts=[attempt(usage=Usage(10, 5, 0)), guess(seen=2)])
    ending.correct_rate(state)
    assert corrected == [("k", 15 + 2, 100, True)]
    # Nothing more has become known.
    ending.correct_rate(state)
    assert len(corrected) == 1
    for state, corrected in (rated(), rated(tpm=None)):
        state.report = Report() if state.tpm else Report(attempts=[attempt()])
        ending.correct_rate(state)
        assert corrected == []


def test_a_rate_is_corrected_by_what_was_asked_on_the_way_whatever_came_of_it():
    """A client that went away before a program's first word paid for one prompt, however many calls there were."""
    state, corrected = rated(is_shared=False)
    prompt = state.count.tokens
    state.calls.made = [asked(attempt(usage=Usage(2500, 4, 0))), asked(guess(), prompt=2500), asked(prompt=9)]
    ending.correct_rate(state)
    assert corrected == [("k", 2504 + 2500 - prompt, 100, False)]
    # An answer beside what its strategy asked.
    state.report = Report(attempts=[attempt(usage=Usage(10, 5, 0))])
    ending.correct_rate(state)
    assert corrected[1:] == [("k", 15, 100, False)]


def test_a_rate_is_corrected_again_once_it_is_known_what_a_lost_call_used():
    """Who went away just before an answer came used its prompt alone."""
    state, corrected = rated()
    prompt, late = state.count.tokens, guess(status="cancelled", is_late=True)
    state.report = Report(attempts=[late])

    async def work():
        ending.conclude(state, "cancelled", 499, "", "", 0.1)
        assert corrected == []
        late.is_late, late.is_guess, late.usage = False, False, Usage(prompt + 1, 4000, 0)
        state.report.now_known()

    run(work)
    assert corrected == [("k", 4001, 100, True)]


def test_a_strategy_learns_only_of_what_it_decided():
    async def work(body):
        state = await decided(body)
        nothing = ending.outcome_of(state, Report(), "refused", 0.5)
        state.report = Report(attempts=[attempt(status="server")])
        return ending.outcome_of(state, state.report, "error", 0.5), nothing

    outcome, nothing = run(work, {"model": "auto/cheapest"})
    assert (outcome.model, outcome.succeeded, outcome.latency_s, outcome.answer) == ("small", False, 0.5, None)
    assert nothing is None
    assert run(work, {"model": "small"}) == (None, None)
