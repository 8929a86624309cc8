"""Rows and what is told are read from a request's state, and change nothing of it."""

from types import SimpleNamespace

from anabranch.gateway.core import choice
from anabranch.gateway.core.ledger_row import call_rows, finished, priced, row_of
from anabranch.gateway.core.model_calls import ModelCall
from anabranch.gateway.dispatch import Attempt, Report
from anabranch.gateway.providers.provider import Usage
from anabranch.gateway.store import KeyRecord
from gateway_states import begun, run, state_of


def attempt(**fields):
    given = {
        "model": "small",
        "deployment": "small",
        "start_s": 0.25,
        "status": "ok",
        "first_token_s": 0.5,
        "total_s": 1.0,
        **fields,
    }
    return Attempt(**given)


async def asked(report, **fields):
    state = state_of(fields)
    state.record = KeyRecord(id="k1", name="ann's", user="ann", team="ml", tags=("x",))
    begun(state)
    await choice.decide(state)
    state.report, state.dispatched = report, 0.125
    return state


def test_a_row_says_whose_it_was_who_answered_and_what_it_took():
    used = attempt(usage=Usage(7, 3, 2), cost=11)
    report = Report(
        attempts=[used, attempt(status="cancelled", is_hedge=True, cost=4)],
        model="small",
        deployment="small",
        is_stitched=True,
    )
    state = run(asked, report, stream=True)
    row = row_of(state, report, 2.0, "ok", "", "")
    assert (row.key_id, row.user, row.team, row.tags, row.requested) == ("k1", "ann", "ml", ("x",), "small")
    assert (row.model, row.deployment, row.attempts, row.cost_nano) == ("small", "small", 2, 15)
    assert (row.prompt_tokens, row.completion_tokens, row.cached_tokens) == (7, 3, 2)
    # To the winner's first token: 0.125 s to the call, 0.25 to its beginning, 0.5 from there.
    assert (row.latency_us, row.first_token_us) == (2_000_000, 875_000)
    assert row.flags == ("hedged", "stitched")
    assert row.price == state.runtime.models["small"].price
    told = finished(state, row, report, None, 200)
    assert (told.key, told.first_s, told.prompt_tokens, told.endpoint) == ("ann's", 0.875, 7, "chat")
    # What is told stays as it is, though the attempt is read on.
    used.cost = 0
    assert (told.attempts[0].cost, priced(state, row).cost_nano) == (11, 4)


def test_of_a_request_that_asked_nobody_there_is_nothing_to_tell():
    state = run(asked, None)
    row = row_of(state, Report(), 0.5, "refused", "insufficient_quota", "")
    assert (row.model, row.attempts, row.first_token_us, row.price, row.flags) == ("", 0, None, None, ())
    assert priced(state, row).cost_nano == 0
    assert finished(state, row, Report(), None, 429).prompt_tokens == state.count.tokens


def test_calls_of_a_strategy_have_rows_of_their_own():
    state = run(asked, None)
    report = Report(attempts=[attempt(usage=Usage(1, 2, 0), cost=9)], model="small", deployment="small")
    call = ModelCall(
        id=f"{state.id}.1",
        model="small",
        purpose="judge",
        began_s=0.1,
        report=report,
        status="ok",
        latency_s=0.5,
        held_nano=20,
    )
    state.calls.made.append(call)
    [row] = call_rows(state)
    assert (row.request_id, row.parent_id, row.purpose, row.cost_nano, row.reserved_nano) == (
        call.id,
        state.id,
        "judge",
        9,
        20,
    )
    assert (row.candidates, row.latency_us, row.status, row.key_id) == (("small",), 500_000, "ok", "")


def test_the_first_token_of_a_program_is_its_own():
    state = run(asked, Report())
    state.program = SimpleNamespace(first_s=0.5)
    assert row_of(state, Report(), 1.0, "ok", "", "").first_token_us == 625_000
