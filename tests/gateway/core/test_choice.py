"""Where a request goes, and which models it may not go to."""

import pytest

from anabranch.gateway.core import choice
from anabranch.gateway.store import KeyRecord
from anabranch.routers.contract.query import Candidate
from anabranch.web.api_error import ApiError
from gateway_states import begun, config, model, run, state_of


def read(body=None, record=None, **fields):
    state = state_of(body, **fields)
    state.record = record
    begun(state)
    return state


def candidates(*names):
    return tuple(Candidate(model=name, score=0) for name in names)


def test_a_model_by_its_name_is_first_and_its_fallbacks_come_after():
    async def work():
        state = read(of=config(fallbacks={"small": ("large",)}))
        await choice.decide(state)
        return state.decided

    decided = run(work)
    assert [one.model for one in decided.decision.candidates] == ["small", "large"]
    assert (decided.decision.strategy, decided.bypassed, decided.decision.probability) == ("", "", None)


def test_a_strategy_is_shown_the_request_without_its_secrets():
    state = read(
        {"model": "auto/cheapest", "max_tokens": 9, "tools": [{"type": "function", "function": {"name": "f"}}]},
        KeyRecord(id="k1", user="ann"),
        headers={"Authorization": "Bearer x", "X-Task": "sums", "cookie": "c", "x-api-key": "x"},
    )
    query = choice.query_of(state)
    assert (query.text, query.task, query.max_tokens, query.has_tools) == ("hello there", "sums", 9, True)
    assert (query.tenant, query.user, query.request_id) == ("k1", "ann", state.id)
    assert dict(query.headers) == {"x-task": "sums"}


def test_a_strategy_is_told_of_pictures():
    parts = [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]
    found = [
        choice.query_of(read({"model": "auto/cheapest", "messages": [{"role": "user", "content": content}]})).has_images
        for content in (parts, "?")
    ]
    assert found == [True, False]


def test_a_strategy_decides_and_what_it_asked_is_stopped():
    async def work():
        state = read({"model": "auto/cheapest"})
        await choice.decide(state)
        return state

    state = run(work)
    assert state.decided.decision.candidates[0].model == "small"
    assert state.prepared == {}


def test_models_that_the_key_may_not_use_or_that_are_too_small_are_not_there_to_choose():
    of = config(model("tiny", context=2), model("small"), model("large"))
    state = read(
        {"messages": [{"role": "user", "content": "word " * 40}]}, KeyRecord(id="k", models=("tiny", "small")), of=of
    )
    pool = choice.pool_of(state)
    assert {one.name: one.is_available for one in pool.models} == {"tiny": False, "small": True, "large": False}
    assert {one.name: one.is_allowed for one in pool.models} == {"tiny": True, "small": True, "large": False}
    # Where the prompt is too long for all that it may use, those are tried all the same.
    state.record = KeyRecord(id="k", models=("tiny",))
    pool = choice.pool_of(state)
    assert {one.name: one.is_available for one in pool.models} == {"tiny": True, "small": False, "large": False}
    state.record = None
    assert not choice.fits(state, "tiny")
    assert choice.fits(state, "small")


def test_candidates_are_those_that_the_key_may_use():
    state = read(record=KeyRecord(id="k", models=("small",)))
    assert choice.allowed(state, candidates("large", "small")) == candidates("small")
    with pytest.raises(ApiError, match="this key may use small"):
        choice.allowed(state, candidates("large"))
    named = read({"model": "large"}, KeyRecord(id="k", models=("small",)))
    with pytest.raises(ApiError) as caught:
        # Another one, in its place, would be no fallback but a surprise.
        choice.allowed(named, candidates("large", "small"))
    assert (caught.value.status, caught.value.code) == (403, "model_not_allowed")
    assert choice.allowed(read(), candidates("large", "small")) == candidates("large", "small")


def test_candidates_with_room_go_before_those_without():
    of = config(model("tiny", context=2), model("small"))
    state = read({"messages": [{"role": "user", "content": "word " * 40}]}, of=of)
    assert choice.allowed(state, candidates("tiny", "small")) == candidates("small")
    assert choice.allowed(state, candidates("tiny")) == candidates("tiny")
