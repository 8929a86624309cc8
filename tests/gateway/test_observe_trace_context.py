"""`traceparent` and `tracestate`: what is taken, what is dropped, and what upstreams are sent."""

import asyncio
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from anabranch.gateway.config import DeploymentConfig, GatewayConfig, ModelConfig, RetryConfig
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.observe.trace_context import CHARACTERS, MEMBERS, new_trace, trace_of
from anabranch.gateway.providers.openai import OpenAI
from anabranch.routers.money import Price
from gateway_upstream import noting

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GOOD = f"00-{TRACE}-{SPAN}-01"


def test_a_trace_is_taken_and_told_on_with_a_span_of_its_own():
    trace = trace_of({"traceparent": GOOD, "tracestate": "rojo=00f067aa0ba902b7 , congo=t61rcWkgMzE"})
    assert trace is not None
    assert (trace.trace_id, trace.parent_id, trace.is_sampled) == (TRACE, SPAN, True)
    assert trace.span_id not in (SPAN, "0" * 16)
    assert trace.headers("b7ad6b7169203331") == {
        "traceparent": f"00-{TRACE}-b7ad6b7169203331-01",
        "tracestate": "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE",
    }


def test_flags_that_this_version_does_not_know_are_not_told_on():
    trace = trace_of({"traceparent": f"00-{TRACE}-{SPAN}-fe"})
    assert trace is not None
    assert not trace.is_sampled
    assert trace.headers(SPAN) == {"traceparent": f"00-{TRACE}-{SPAN}-00"}


@pytest.mark.parametrize(
    "value",
    [
        "",
        "x",
        GOOD.upper(),
        f"{GOOD}-",
        f"{GOOD}-more",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[:-1]}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}{SPAN}-01",
        f"{GOOD}\r\nx-evil: 1",
        f"{GOOD}\n",
        "00-" + "a" * 20_000,
        f"{GOOD},{GOOD}",
        f"00-{TRACE[:-1]}g-{SPAN}-01",
        f"cc-{TRACE}-{SPAN}-01.more",
        f"00-{TRACE[:-1]}\u0661-{SPAN}-01",
    ],
)
def test_a_traceparent_that_breaks_the_rules_is_dropped_with_its_state(value):
    assert trace_of({"traceparent": value, "tracestate": "a=1"}) is None


@pytest.mark.parametrize(
    "value", [f"cc-{TRACE}-{SPAN}-01", f"cc-{TRACE}-{SPAN}-01-what-the-future-will-be-like", f" {GOOD}\t"]
)
def test_later_versions_are_read_as_far_as_they_are_known(value):
    trace = trace_of({"traceparent": value})
    assert trace is not None
    assert trace.headers(SPAN)["traceparent"] == GOOD


def test_two_traceparents_are_none_and_two_tracestates_are_one():
    assert trace_of(CIMultiDict([("traceparent", GOOD), ("Traceparent", GOOD)])) is None
    trace = trace_of(
        CIMultiDict([("Traceparent", GOOD), ("tracestate", "a=1"), ("TraceState", "b=2,"), ("tracestate", "")])
    )
    assert trace is not None
    assert trace.state == "a=1,b=2"


@pytest.mark.parametrize(
    "state",
    [
        "a=1,a=2",
        "A=1",
        "a",
        "a=",
        "=1",
        "a=1;b\n",
        "a=b=c",
        "a=\u00e9",
        "a@b@c=1",
        "@b=1",
        "a@=1",
        f"{'a' * 257}=1",
        f"a={'x' * 257}",
        "a= ",
        ",".join(f"k{at}=1" for at in range(MEMBERS + 1)),
    ],
)
def test_a_state_that_breaks_the_rules_is_dropped_and_the_trace_stays(state):
    trace = trace_of({"traceparent": GOOD, "tracestate": state})
    assert trace is not None
    assert trace.state == ""


def test_a_state_that_is_too_long_loses_its_long_entries_first_and_then_the_last():
    long, short = f"l={'x' * 200}", [f"k{at}={'y' * 20}" for at in range(30)]
    trace = trace_of({"traceparent": GOOD, "tracestate": ",".join([long, *short])})
    assert trace is not None
    kept = trace.state.split(",")
    assert kept == short[: len(kept)]
    assert len(kept) == 20
    assert len(trace.state) <= CHARACTERS < len(trace.state) + 1 + len(short[len(kept)])


@given(
    st.text(max_size=80) | st.from_regex(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-[a-z]*)?"),
    st.text(max_size=200),
)
def test_whatever_comes_in_only_what_keeps_the_rules_goes_out(parent, state):
    trace = trace_of({"traceparent": parent, "tracestate": state})
    if trace is None:
        return
    sent = trace.headers(trace.span_id)
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-0[01]", sent["traceparent"])
    assert trace_of(sent) is not None
    assert trace_of(sent).state == trace.state
    assert sent.get("tracestate", "a").isascii()
    assert sent.get("tracestate", "a").isprintable()


def test_a_trace_that_begins_here_is_one_that_others_take():
    made = new_trace(is_sampled=True)
    again = trace_of(made.headers(made.span_id))
    assert again is not None
    assert (again.trace_id, again.parent_id, again.is_sampled) == (
        made.trace_id,
        made.span_id,
        True,
    )


def _asked(headers, failing=()):
    """What an upstream was sent of the trace, by each attempt."""
    with noting() as upstream:
        upstream.failing = list(failing)
        provider = OpenAI.Config(base_url=f"{upstream.url}/v1", model="m", key_env=None)
        one = ModelConfig(name="m", price=Price(), deployments=(DeploymentConfig(provider=provider),))
        config = GatewayConfig(models=(one,), require_key=False, store="g.db", retries=RetryConfig(base_s=0))

        async def main():
            async with Gateway(config) as gateway:
                body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
                await gateway.handle("chat", body, headers=headers)

        asyncio.run(main())
        return [
            {name: sent[name] for name in ("traceparent", "tracestate") if name in sent} for sent, _ in upstream.seen
        ]


def test_each_attempt_tells_the_upstream_of_a_span_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = _asked({"traceparent": GOOD, "tracestate": "a=1"}, failing=[500])
    assert first["tracestate"] == second["tracestate"] == "a=1"
    spans = [one["traceparent"].split("-") for one in (first, second)]
    assert [span[1] for span in spans] == [TRACE, TRACE]
    assert [span[3] for span in spans] == ["01", "01"]
    assert len({SPAN, spans[0][2], spans[1][2]}) == 3


def test_nothing_hostile_is_told_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert _asked({"traceparent": "00-evil", "tracestate": "a=1"}) == [{}]
    assert _asked({}) == [{}]
