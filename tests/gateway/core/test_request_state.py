"""What is derived of a request's state: whose it is, how long it has, and who may keep what it says."""

from types import SimpleNamespace

import pytest

from anabranch.gateway.config import LogConfig
from anabranch.gateway.core import beginning, choice
from anabranch.gateway.core.decision_log import Collecting
from anabranch.gateway.dispatch import Attempt, Report
from gateway_states import begun, config, model, run, state_of


def attempt(cost):
    return Attempt(model="small", deployment="small", start_s=0.0, cost=cost)


def test_the_deadline_is_that_of_the_model_it_goes_to_first():
    of = config(model("small", deadline_s=7.0), model("large"), deadline_s=60.0)
    state = state_of(of=of)
    beginning.read(state)
    assert state.deadline_s == 7.0
    state.candidates = ("large", "small")
    assert state.deadline_s == 60.0
    chosen = state_of({"model": "auto"}, of=of)
    beginning.read(chosen)
    assert chosen.deadline_s == 60.0


def test_of_a_program_its_calls_are_the_attempts():
    state = state_of()
    assert (state.attempts, state.cost_nano) == ([], 0)
    state.report = Report(attempts=[attempt(3), attempt(4)])
    assert (len(state.attempts), state.cost_nano) == (2, 7)
    state.program, state.calls = (
        SimpleNamespace(),
        SimpleNamespace(made=[SimpleNamespace(report=Report(attempts=[attempt(5)]))]),
    )
    assert (len(state.attempts), state.cost_nano) == (1, 5)


@pytest.mark.parametrize(
    ("fields", "body", "keeps"),
    [
        ({}, {}, True),
        ({}, {"store": False}, False),
        ({"endpoint": "embeddings"}, {"input": "x"}, False),
        ({"collecting": Collecting("k", 0)}, {}, False),
    ],
)
def test_the_store_keeps_texts_that_were_written_for_a_user_who_lets_it(fields, body, keeps):
    state = state_of(body, of=config(log=LogConfig(prompts=True)), **fields)
    assert state.keeps_texts == keeps
    assert not state_of(body, of=config(log=LogConfig(prompts=False)), **fields).keeps_texts


def test_a_strategy_is_told_the_answers_that_it_wants_and_may_have():
    async def decided(body):
        state = state_of({"model": "auto/cheapest", **body})
        begun(state)
        await choice.decide(state)
        state.runtime.decider.lanes["cheapest"].strategy.keeps_answers = True
        return state

    assert run(decided, {}).strategy_keeps
    assert not run(decided, {"store": False}).strategy_keeps
    assert not run(decided, {"model": "small"}).strategy_keeps
    assert not state_of({"model": "auto/cheapest"}).strategy_keeps
    state = run(decided, {})
    state.note(SimpleNamespace(text="yes", finish_reason="stop"))
    assert (state.answer_text, state.finish_reason) == ("yes", "stop")
    nobody = state_of()
    nobody.note(SimpleNamespace(text="yes", finish_reason="stop"))
    assert nobody.answer_text is None


def test_it_is_shown_as_its_endpoint_unless_it_came_in_another_form():
    assert state_of().shown_as == "chat"
    assert state_of(shown_as="messages").shown_as == "messages"
    assert state_of().content_type == "application/json"
