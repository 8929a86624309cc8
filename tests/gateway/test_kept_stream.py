"""What is kept of streams has one bound over all of them, and one sender has a part of it."""

import asyncio
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.config import DeploymentConfig, GatewayConfig, ModelConfig
from anabranch.gateway.dispatch import Deployment, Dispatcher, Group, Plan
from anabranch.gateway.dispatch import kept_stream as kept
from anabranch.gateway.dispatch.kept_stream import BODY_BYTES, STEP, KeptStream
from anabranch.gateway.dispatch.virtual_time import run_virtual, virtual_clock
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.providers.provider import UpstreamError, UpstreamRequest
from anabranch.web.answer_room import AnswerRoom


def room(num_bytes):
    return AnswerRoom(num_bytes, 0.5, 503)


def test_what_is_kept_is_all_of_it_until_it_is_let_go_of():
    all_of = room(1 << 20)
    one = KeptStream(all_of, "a")
    assert (one.blocks(), all_of.num_bytes) == ([], 0)
    one.add(b"x" * 10)
    one.add(b"y" * 20)
    assert (one.blocks(), one.size, all_of.num_bytes) == ([b"x" * 10, b"y" * 20], 30, STEP)
    one.add(b"z" * STEP)
    assert all_of.num_bytes == 2 * STEP
    for _ in range(2):
        one.close()
        assert all_of.num_bytes == 0


def test_what_is_too_long_or_has_no_room_is_let_go_of_and_says_why():
    all_of = room(4 * BODY_BYTES)
    long = KeptStream(all_of, "a")
    long.add(b"x" * BODY_BYTES)
    long.add(b"x")
    with pytest.raises(UpstreamError, match="too long to be kept") as caught:
        long.blocks()
    assert (caught.value.failure.kind, long.size, all_of.num_bytes) == ("excess", BODY_BYTES + 1, 0)

    small = room(8 * STEP)
    streams = [KeptStream(small, "hostile") for _ in range(20)]
    for _ in range(3):
        for one in streams:
            one.add(b"x" * STEP)
    assert small.num_bytes <= 6 * STEP
    with pytest.raises(UpstreamError, match="no room now") as caught:
        streams[-1].blocks()
    assert (caught.value.failure.kind, caught.value.status, caught.value.is_for_room) == ("busy", 503, True)
    other = KeptStream(small, "b")
    other.add(b"y" * STEP)
    assert other.blocks() == [b"y" * STEP]
    # What begins anew is kept again, where there is room by then.
    for one in streams[:-1]:
        one.close()
    streams[-1].begin_anew()
    streams[-1].add(b"z")
    assert streams[-1].blocks() == [b"z"]


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.sampled_from(["add", "add", "add", "close"]), st.integers(1, 3 * STEP)),
        max_size=60,
    )
)
def test_never_more_is_kept_than_there_is_room_for_and_a_first_stream_finds_some(steps):
    limit = 16 * STEP
    all_of = room(limit)
    streams = {at: KeptStream(all_of, "ab"[at % 2]) for at in range(6)}
    for at, what, size in steps:
        if what == "close":
            streams[at].close()
            streams[at] = KeptStream(all_of, "ab"[at % 2])
        else:
            streams[at].add(b"x" * size)
        held = sum(len(block) for one in streams.values() for block in one._blocks)
        assert held <= all_of.num_bytes <= limit
        new = KeptStream(all_of, "new")
        is_there = new.has_room(STEP)
        new.close()
        assert is_there
    for one in streams.values():
        one.close()
    assert all_of.num_bytes == 0


def dispatcher(**fields):
    deployment = Deployment(name="m", provider=Mock.Config(model="m", tokens=40, **fields))
    return Dispatcher([Group(name="m", deployments=(deployment,))], clock=virtual_clock)


def chat():
    return UpstreamRequest("chat", {"model": "m", "messages": [{"role": "user", "content": "hello"}], "stream": True})


def plan(made, sender, **fields):
    return Plan(**{"candidates": ("m",), "deadline": made.now() + 60, "sender": sender, "keep": True, **fields})


async def read(stream):
    return b"".join([block async for block in stream])


def test_beyond_the_room_a_stream_is_passed_on_whole_and_not_kept(monkeypatch):
    monkeypatch.setattr(kept, "STEP", 100)
    monkeypatch.setattr(kept, "KEPT_BYTES", 20_000)

    async def work():
        made = dispatcher()
        streams = [await made.stream(plan(made, "key:a"), chat()) for _ in range(9)]
        raw = [await read(stream) for stream in streams]
        assert all(one.endswith(b"data: [DONE]\n\n") for one in raw)
        assert made.kept.num_bytes <= 15_000
        assert streams[0].answer().text
        with pytest.raises(UpstreamError, match="no room now"):
            streams[-1].answer()
        # Whoever else comes is kept.
        other = await made.stream(plan(made, "key:b"), chat())
        await read(other)
        assert other.answer().text
        for stream in (*streams, other):
            await stream.aclose()
            stream.forget()
        assert made.kept.num_bytes == 0
        assert Dispatcher([], previous=made).kept is made.kept

    run_virtual(work)


@pytest.mark.parametrize("num_bytes", [20_000, 200])
def test_one_that_breaks_and_was_not_kept_is_told_what_broke_it(monkeypatch, num_bytes):
    """Its client was told that there was no room, which was nothing to it."""
    monkeypatch.setattr(kept, "STEP", 100)
    monkeypatch.setattr(kept, "KEPT_BYTES", num_bytes)

    async def work():
        made = dispatcher(script=("cut:20",))
        stream = await made.stream(plan(made, "key:a", mid_stream="continue"), chat())
        raw = (await read(stream)).decode()
        stream.forget()
        assert (stream.report.is_stitched, stream.failure is None) == (num_bytes > 200, num_bytes > 200)
        if num_bytes == 200:
            assert stream.failure.kind == "cut"
            assert "broke" in stream.failure.message
            assert stream.failure.message in raw
            assert "no room" not in raw

    run_virtual(work)


def test_a_stream_that_is_not_kept_takes_no_room_and_one_that_fails_gives_it_back():
    async def work():
        made = dispatcher()
        stream = await made.stream(plan(made, "key:a", keep=False), chat())
        await read(stream)
        assert (made.kept.num_bytes, stream.num_kept) == (0, 0)
        failing = dispatcher(script=("cut:3",) * 9)
        with pytest.raises(UpstreamError):
            await failing.stream(
                plan(failing, "key:a", accept=lambda model, answer: False, candidates=("m",) * 3), chat()
            )
        assert failing.kept.num_bytes == 0

    run_virtual(work)


def test_what_is_judged_is_held_within_the_room_too(monkeypatch):
    monkeypatch.setattr(kept, "STEP", 100)
    monkeypatch.setattr(kept, "KEPT_BYTES", 2_000)
    seen = []

    async def work():
        groups = [
            Group(name=name, deployments=(Deployment(name=name, provider=Mock.Config(model=name, tokens=tokens)),))
            for name, tokens in (("long", 400), ("short", 4))
        ]
        made = Dispatcher(groups, clock=virtual_clock)
        judged = plan(made, "key:a", candidates=("long", "short"), accept=lambda model, answer: seen.append(model))
        stream = await made.stream(judged, chat())
        await read(stream)
        assert [(one.model, one.status) for one in stream.report.attempts] == [("long", "busy"), ("short", "ok")]
        stream.forget()
        assert (seen, made.kept.num_bytes) == ([], 0)

    run_virtual(work)


@pytest.mark.parametrize("how", ["whole", "left", "never read"])
def test_a_request_gives_back_what_was_kept_of_its_stream(tmp_path, how, caplog):
    async def main():
        made = GatewayConfig(
            models=(
                ModelConfig(name="m", deployments=(DeploymentConfig(provider=Mock.Config(model="m", tokens=40)),)),
            ),
            require_key=False,
            store=str(tmp_path / "g.db"),
        )
        body = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "stream": True, "temperature": 0}
        async with Gateway(made) as gateway:
            room = gateway.runtime.dispatcher.kept
            reply = await gateway.handle("chat", body)
            if how != "never read":
                async for _ in reply.stream:
                    assert room.num_bytes > 0
                    if how == "left":
                        break
                await reply.stream.aclose()
            del reply
            await gateway.settled()
            assert room.num_bytes == 0

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())
    assert not caplog.records
