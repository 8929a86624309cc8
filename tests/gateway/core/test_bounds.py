"""The most that a call may be billed for: what a request asks for, else what the model or the config says, and never less than may come."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.asked import asked_of
from anabranch.gateway.config import LimitsConfig
from anabranch.gateway.core.bounds import CONTINUED, Bounds
from anabranch.gateway.dispatch import Attempt, Report
from anabranch.gateway.prompt_tokens import BYTES_PER_TOKEN, count_prompt
from anabranch.gateway.providers.openai import OpenAI
from anabranch.gateway.runtime import Runtime
from gateway_states import config, model

RUNTIME = Runtime(
    config(
        model("small"),
        model("open", max_tokens=None),
        model("wide", max_tokens=None, context=300),
        limits=LimitsConfig(max_tokens=70),
    )
)
MESSAGES = [{"role": "user", "content": "hello there"}]


def bounds(endpoint="chat", runtime=RUNTIME, **body):
    body = {"model": "small", **({"messages": MESSAGES} if endpoint == "chat" else {}), **body}
    return Bounds(endpoint, body, runtime, count_prompt(body), asked_of(body))


@pytest.mark.parametrize(
    ("name", "body", "most"),
    [
        ("small", {}, 50),
        ("open", {}, 70),
        ("small", {"max_tokens": 9}, 9),
        # An upstream may know only one of them.
        ("small", {"max_tokens": 9, "max_completion_tokens": 12}, 12),
        ("small", {"max_tokens": 9, "n": 3}, 27),
        ("small", {"n": 2}, 100),
    ],
)
def test_completion_tokens_of_a_chat(name, body, most):
    assert bounds(**body).most_tokens(name) == most


def test_completion_tokens_of_other_endpoints():
    assert bounds("embeddings", input="a").most_tokens("small") == 0
    assert bounds("completions", prompt=["a", "b", "c"], max_tokens=5, best_of=2).most_tokens("small") == 30


FORESEEN = Runtime(
    config(
        model("openai", provider=OpenAI.Config(model="m", key_env=None)),
        model("drops", provider=OpenAI.Config(model="m", key_env=None, drops=("prediction",))),
        model("mock"),
    )
)


@pytest.mark.parametrize(
    "content", ["x" * 30, [{"type": "text", "text": "x" * 20}, {"type": "text", "text": "x" * 10}]]
)
def test_what_the_sender_predicts_may_be_billed_as_the_answer_is(content):
    """R20's F3: it counted as prompt alone. A model that is not sent it bills nothing of it."""
    held = bounds(
        runtime=FORESEEN, model="openai", n=2, max_tokens=50, prediction={"type": "content", "content": content}
    )
    most = held.most("openai", None)
    assert (most.completion, most.predicted) == (2 * (50 + 30), 2 * 30)
    for name in ("drops", "mock"):
        assert (held.most(name, None).completion, held.most(name, None).predicted) == (2 * 50, 0)


def test_thoughts_are_part_of_an_answer_and_leave_some():
    assert bounds(thinking={"type": "enabled", "budget_tokens": 40}).bound("small") == 50
    assert bounds(thinking={"type": "enabled", "budget_tokens": 60}).bound("small") == 110


def test_what_a_strategy_sends_in_place_of_the_messages_is_counted():
    held = bounds()
    plain = held.most("small", None)
    held.prepared = {"small": [{"role": "user", "content": "x" * 1000}]}
    longer = held.most("small", None)
    assert longer.prompt >= plain.prompt + 900
    assert held.most("open", None).prompt == plain.prompt
    assert held.worst_nano("small", None) > bounds().worst_nano("small", None)


def test_one_that_goes_on_where_another_broke_off_is_sent_what_was_said():
    report = Report(attempts=[Attempt(model="small", deployment="small", start_s=0.0, seen=11)])
    going_on = Runtime(config(mid_stream="continue"))
    first, second = bounds(runtime=going_on).most("small", None), bounds(runtime=going_on).most("small", report)
    assert second.prompt - first.prompt == CONTINUED + 11 * BYTES_PER_TOKEN
    assert bounds().most("small", report).prompt == first.prompt


@given(st.integers(1, 500), st.integers(1, 4))
def test_more_asked_is_never_less_reserved(tokens, n):
    held, more = bounds(max_tokens=tokens, n=n), bounds(max_tokens=tokens + 1, n=n)
    assert held.most_tokens("small") == tokens * n
    assert held.worst_nano("small", None) < more.worst_nano("small", None)
