"""What the store keeps of a request beside its row."""

from dataclasses import replace

import pytest

from anabranch.gateway.config import LogConfig
from anabranch.gateway.core import beginning
from anabranch.gateway.core.decision_log import (
    LONGEST_TEXT,
    Collecting,
    collected_of,
    explained,
    keeps_texts,
    texts_of,
)
from anabranch.gateway.decide import Decided
from anabranch.gateway.dispatch import Attempt, Report
from anabranch.gateway.store import LedgerRow
from anabranch.routers.contract.query import Candidate, Decision, Query
from gateway_states import config, state_of


def attempt(model):
    return Attempt(model=model, deployment=model, start_s=0.0)


def test_a_decision_is_kept_with_the_models_that_were_asked():
    candidates = (Candidate(model="a", score=1.0, quality=0.5, cost=0.1), Candidate(model="b", score=0))
    decision = Decision(candidates=candidates, strategy="s", reason="so", details={"why": 1}, probability=0.25)
    kept = explained(Decided(decision, "", Query(text="x")), [attempt("b"), attempt("a"), attempt("b")])
    assert kept["asked"] == ["b", "a"]
    assert kept["candidates"][0] == {"model": "a", "score": 1.0, "quality": 0.5, "cost": 0.1}
    assert (kept["strategy"], kept["probability"], kept["details"], "ab" in kept) == ("s", 0.25, {"why": 1}, False)


@pytest.mark.parametrize(
    ("prompts", "store", "keeps"), [(True, None, True), (True, True, True), (True, False, False), (False, None, False)]
)
def test_texts_are_kept_where_the_config_and_the_sender_let_it(prompts, store, keeps):
    assert keeps_texts(config(log=LogConfig(prompts=prompts)), {"store": store}) == keeps


def read(body=None, **fields):
    state = state_of(body, **fields)
    beginning.read(state)
    return state


def test_one_text_is_its_own_conversation():
    state = read(headers={"x-task": "sums"})
    state.answer_text, state.finish_reason = "yes", "stop"
    assert texts_of(state) == {
        "endpoint": "chat",
        "query": "hello there",
        "task": "sums",
        "answer": "yes",
        "finish_reason": "stop",
    }


def test_of_settings_what_is_short_and_of_others_that_they_were_there():
    tools = [{"type": "function", "function": {"name": "f"}}]
    state = read({"temperature": 0.5, "tools": tools, "response_format": {"type": "json_object"}, "user": "ann"})
    found = texts_of(state)
    assert found["settings"] == {"temperature": 0.5, "response_format": True}
    assert found["has_tools"]
    # What the model was sent in truth were other messages.
    state.prepared, state.report = {"small": []}, Report(model="small")
    assert texts_of(state)["settings"]["messages"] is True


@pytest.mark.parametrize("tier", ["priority", "flex", "default", "auto"])
def test_a_tier_is_a_setting_and_notes_for_the_books_are_none(tier):
    assert texts_of(read({"service_tier": tier}))["settings"] == {"service_tier": tier}
    notes = {"user": "ann", "metadata": {"a": "b"}, "stream": False, "store": True, "prompt_cache_key": "k"}
    assert "settings" not in texts_of(read(notes))


def test_a_text_with_a_name_beside_it_is_a_conversation():
    named = [{"role": "user", "content": "hello", "name": "ann"}]
    assert texts_of(read({"messages": named}))["messages"] == named
    assert "messages" not in texts_of(read({"messages": [{"content": "hello", "role": "user"}]}))


def test_a_conversation_is_kept_unless_it_is_too_long():
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    assert texts_of(read({"messages": messages}))["messages"] == messages
    long = [{"role": "system", "content": "x" * LONGEST_TEXT}, {"role": "user", "content": "y" * (LONGEST_TEXT + 1)}]
    found = texts_of(read({"messages": long}))
    assert found["messages"] is None
    assert len(found["query"]) == LONGEST_TEXT


def test_what_is_collected_is_an_answer_and_what_it_took():
    state = read(collecting=Collecting("key", 7))
    row = LedgerRow(request_id="r", cost_nano=5, prompt_tokens=2, completion_tokens=3, latency_us=9)
    assert collected_of(state, row) is None
    state.answer_text, state.finish_reason = "yes", "stop"
    found = collected_of(state, row)
    assert (found.key, found.ts_us) == ("key", 7)
    assert found.body == {
        "answer": "yes",
        "finish_reason": "stop",
        "cost_nano": 5,
        "tokens": [2, 3],
        "latency_us": 9,
        "request_id": "r",
    }
    assert collected_of(state, replace(row, status="error")) is None
    state.collecting = None
    assert collected_of(state, row) is None
