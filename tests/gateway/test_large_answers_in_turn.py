"""Large answers wait for room, each sender in its part, and never for the upstream of another; also in a real gateway."""

import asyncio
import json
import threading

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.config import DeploymentConfig, GatewayConfig, ModelConfig
from anabranch.gateway.core.incoming import KnownKey
from anabranch.gateway.dispatch.dispatcher import Dispatcher
from anabranch.gateway.dispatch.large_answers import PATIENCE_S, LargeAnswers
from anabranch.gateway.dispatch.virtual_time import run_virtual
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.providers.openai import OpenAI
from anabranch.gateway.store import KeyRecord
from anabranch.web.api_error import ApiError
from anabranch.web.large_json import LARGE
from paced_time import pace, run_paced
from waiting import until_async


async def goes_on(awaited):
    """Whether it has what it asked for by now; else it is given up."""
    task = asyncio.ensure_future(awaited)
    await asyncio.sleep(0)
    if not task.done():
        task.cancel()
        await asyncio.wait((task,))
        return False
    return True


def test_what_has_come_counts_and_nobody_waits_for_another_s_upstream():
    async def main():
        room = LargeAnswers(100)
        # They have stopped in the middle.
        stalled = [room.enter("a") for _ in range(5)]
        for each in stalled:
            await each.more(8)
        other = room.enter("b")
        assert await goes_on(other.more(30))
        assert (room.num_bytes, other.num_bytes, room._beyond) == (70, 30, {})
        for each in [*stalled, other]:
            each.close()
            each.close()
        assert (room.num_bytes, dict(room._of_source)) == (0, {})

    run_virtual(main)


def test_a_sender_waits_for_its_own_part_and_the_oldest_goes_on_first():
    async def main():
        room, order = LargeAnswers(100), []

        async def read(number, *pieces):
            with room.enter("a") as held:
                for each in pieces:
                    await held.more(each)
                    order.append(number)
                await asyncio.sleep(0.1)

        tasks = [asyncio.ensure_future(read(number, 25, 25)) for number in range(4)]
        await asyncio.sleep(0.01)
        # The first has half of the room; of the next there is more than that, so that all of it comes.
        assert order == [0, 0, 1, 1]
        assert (room.num_bytes, room._going.num_beyond) == (50, 50)
        await asyncio.gather(*tasks)
        assert order == [0, 0, 1, 1, 2, 2, 3, 3]
        assert (room.num_bytes, room._beyond, room._waiting, room._going) == (0, {}, {}, None)

    run_virtual(main)


def test_one_that_is_larger_than_all_comes_too_and_holds_up_no_other():
    async def main():
        room = LargeAnswers(100)
        huge, small = room.enter("a"), room.enter("b")
        for _ in range(30):
            assert await goes_on(huge.more(10))
        assert (huge.num_bytes, huge.num_beyond) == (50, 250)
        assert await goes_on(small.more(25))
        assert not await goes_on(small.more(1))
        huge.close()
        assert await goes_on(small.more(25))

    run_virtual(main)


def test_whoever_goes_on_beyond_the_room_gives_way_to_who_waits_when_it_has_been_slow():
    async def main():
        room, loop = LargeAnswers(100), asyncio.get_running_loop()
        stalled, again, other = room.enter("a"), room.enter("a"), room.enter("b")
        await stalled.more(80)
        assert (stalled.num_bytes, stalled.num_beyond) == (0, 80)
        waits = asyncio.ensure_future(again.more(90))
        await other.more(60)
        # All the time that it had.
        assert loop.time() == pytest.approx(PATIENCE_S)
        # Its other answers do not go on: of each sender there is one such.
        await asyncio.sleep(100)
        assert not waits.done()
        # What is slow, and not stopped, has its turn again.
        mine = asyncio.ensure_future(stalled.more(60))
        await asyncio.sleep(0)
        assert (mine.done(), stalled.num_beyond) == (True, 140)
        stalled.close()
        await waits
        assert again.num_beyond == 90

    run_virtual(main)


def test_senders_take_turns_at_going_on_beyond_the_room():
    """One whose answers wait all the time comes after those who have had no turn since its own."""

    async def main():
        room, loop, turns = LargeAnswers(10), asyncio.get_running_loop(), []

        async def goes_on(held, num_bytes):
            await held.more(num_bytes)
            turns.append((held.number, round(loop.time() / PATIENCE_S, 3)))

        slow = room.enter("x")
        await slow.more(20)
        first, second, other, last = (room.enter(sender) for sender in "aabc")
        tasks = [asyncio.ensure_future(goes_on(held, 20)) for held in (first, second, other, last)]
        await asyncio.sleep(2.5 * PATIENCE_S)
        # The first of a's has had its turn, and b's has it.
        assert turns == [(first.number, 1), (other.number, 2)]
        tasks.append(asyncio.ensure_future(goes_on(first, 20)))
        await asyncio.sleep(2 * PATIENCE_S)
        assert turns[2:] == [(last.number, 3), (first.number, 4)]
        for held in (slow, first, other, last):
            held.close()
        await asyncio.gather(*tasks)
        second.close()
        assert (room.num_bytes, room._beyond, room._waiting, room._going) == (0, {}, {}, None)

    run_virtual(main)


def test_one_who_leaves_while_it_waits_takes_nothing():
    async def main():
        room = LargeAnswers(100)
        first, second, third = (room.enter("a") for _ in range(3))
        await first.more(50)
        await second.more(20)
        waits = asyncio.ensure_future(third.more(40))
        await asyncio.sleep(0)
        waits.cancel()
        await asyncio.wait((waits,))
        third.close()
        assert (room._waiting, third.num_bytes) == ({}, 0)
        # And one that is let in and gives up at this moment gives all of it back.
        waits = asyncio.ensure_future(third.more(40))
        await asyncio.sleep(0)
        first.close()
        waits.cancel()
        await asyncio.wait((waits,))
        third.close()
        second.close()
        assert (room.num_bytes, room._beyond, room._going) == (0, {}, None)

    run_virtual(main)


ANSWERS = st.lists(
    st.tuples(
        st.sampled_from("abcd"),
        st.lists(st.integers(1, 40), min_size=1, max_size=6),
        st.sampled_from((0.0, 0.0, 0.5, 3.0)),
        st.sampled_from((None, None, None, 0, 1, 2)),
    ),
    max_size=14,
)


@given(ANSWERS)
def test_everybody_whose_upstream_goes_on_comes_to_an_end_and_little_is_held_beyond_the_room(answers):
    """Whatever stops in the middle, for ever: nobody waits for it but those of its own sender."""

    async def main():
        room, all_held = LargeAnswers(100), []
        is_quick = all(pause_s == 0 and stops_at is None for _, _, pause_s, stops_at in answers)

        async def read(sender, pieces, pause_s, stops_at):
            with room.enter(sender) as held:
                all_held.append(held)
                for number, each in enumerate(pieces):
                    await asyncio.sleep(1e9 if number == stops_at else pause_s)
                    await held.more(each)
                    beyond = [one.source for one in all_held if one.num_beyond]
                    assert room.num_bytes == sum(one.num_bytes for one in all_held) <= 100
                    assert len(set(beyond)) == len(beyond)
                    assert len(beyond) <= 1 or not is_quick

        tasks = [asyncio.ensure_future(read(*each)) for each in answers]
        stopping = {sender for sender, pieces, _, stop in answers if stop is not None and stop < len(pieces)}
        done, _ = await asyncio.wait(tasks, timeout=1e6) if tasks else ((), ())
        for task, (sender, *_) in zip(tasks, answers, strict=True):
            assert task in done or sender in stopping
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()
        assert (room.num_bytes, room._waiting, room._beyond, room._going) == (0, {}, {}, None)

    run_virtual(main)


def test_the_room_is_that_of_all_configs():
    made = Dispatcher([])
    assert made.room.limit == 128 << 20
    assert Dispatcher([], previous=made).room is made.room


# In a gateway

VECTOR = [0.125] * 1024
DATA = [{"object": "embedding", "index": number, "embedding": VECTOR} for number in range(60)]
EMBEDDED = {"object": "list", "model": "e", "data": DATA, "usage": {"prompt_tokens": 60, "total_tokens": 60}}
SAID = {
    "id": "x",
    "model": "m",
    "usage": {"prompt_tokens": 1, "completion_tokens": 100},
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "word " * 80_000}, "finish_reason": "stop"}],
}
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}


def against(tmp_path, answer, work, *names, **fields):
    """What ``work(gateway)`` gives: the models of these names, each of one deployment, are asked of ``answer(request, model)``."""

    async def upstream(request):
        return await answer(request, (await request.json())["model"])

    async def main():
        app = web.Application()
        app.router.add_post("/v1/{rest:.*}", upstream)
        async with TestServer(app) as server:
            made = {"key_env": None, "base_url": str(server.make_url("/v1"))}
            config = GatewayConfig(
                models=tuple(
                    ModelConfig(
                        name=name, deployments=(DeploymentConfig(provider=OpenAI.Config(model=name, **made), **fields),)
                    )
                    for name in names
                ),
                store=str(tmp_path / "g.db"),
                require_key=False,
            )
            async with Gateway(config) as gateway:
                pace(gateway)
                return await work(gateway)

    return run_paced(main())


async def in_pieces(request, raw, gate=None):
    """An answer that says no length; its second half comes once the gate is open."""
    response = web.StreamResponse(headers={"content-type": "application/json"})
    response.enable_chunked_encoding()
    await response.prepare(request)
    half = max(len(raw) // 2, LARGE + 1)
    await response.write(raw[:half])
    if gate is not None:
        await gate.wait()
    await response.write(raw[half:])
    return response


@pytest.mark.parametrize("says", [True, False])
def test_a_gateway_holds_so_many_at_once(tmp_path, monkeypatch, says):
    """Four requests of 10 kB took 500 MiB: 32 of them 4 GB."""
    raw, seen = json.dumps(EMBEDDED).encode(), []

    async def answer(request, model):
        return web.Response(body=raw, content_type="application/json") if says else await in_pieces(request, raw)

    async def work(gateway):
        room = gateway.runtime.dispatcher.room
        room.limit = 3 * len(raw)
        real = room._has_taken

        def noted(held, num_bytes):
            taken = real(held, num_bytes)
            beyond = {id(one): one for one in [*room._beyond.values(), held]}
            seen.append((room.num_bytes, sum(one.num_beyond for one in beyond.values())))
            return taken

        monkeypatch.setattr(room, "_has_taken", noted)
        asked = [{"model": "e", "input": [f"{number}"] * 60} for number in range(8)]
        found = await asyncio.gather(*(gateway.handle("embeddings", body) for body in asked))
        assert all(reply.body == raw for reply in found)
        assert (room.num_bytes, room._beyond) == (0, {})

    against(tmp_path, answer, work, "e")
    # Half of the room is one sender's, and one answer may go beyond that.
    assert 0 < max(held for held, _ in seen) <= 1.5 * len(raw)
    assert max(beyond for _, beyond in seen) <= len(raw)


@pytest.mark.parametrize("stream", [False, True])
def test_answers_that_stop_in_the_middle_hold_up_nobody_else(tmp_path, stream):
    """Four of a key took all places of all deployments, 32 MiB each, as it might come to, for as long as they were waited for."""
    raw = json.dumps(SAID).encode()

    async def work(gateway):
        gate, begun = asyncio.Event(), []
        gates["stalls"] = gate, begun
        keys = [KnownKey(KeyRecord(id=name)) for name in "ab"]
        ask = {**CHAT, "stream": stream}
        slow = [
            asyncio.ensure_future(gateway.handle("chat", {"model": "stalls", **ask}, key=keys[0])) for _ in range(6)
        ]
        await until_async(lambda: len(begun) == 6 and gateway.runtime.dispatcher.room.num_bytes >= 6 * LARGE)
        reply = await asyncio.wait_for(gateway.handle("chat", {"model": "works", **ask}, key=keys[1]), 60)
        if reply.stream is not None:
            assert b"".join([piece async for piece in reply.stream]).endswith(b"data: [DONE]\n\n")
        # They come, too.
        gate.set()
        for reply in await asyncio.gather(*slow):
            if reply.stream is not None:
                await reply.stream.aclose()
        assert gateway.runtime.dispatcher.room.num_bytes == 0

    gates = {}

    async def answer(request, model):
        gate, begun = gates.get(model, (None, []))
        begun.append(1)
        return await in_pieces(request, raw, gate)

    against(tmp_path, answer, work, "stalls", "works")


@pytest.mark.parametrize("stream", [False, True])
def test_to_wait_for_room_is_no_time_of_the_deployment(tmp_path, stream):
    """It was: what waited was asked again elsewhere, and the breaker of a deployment that is well opened for all."""
    raw, asked = json.dumps(SAID).encode(), []

    async def answer(request, model):
        asked.append(model)
        return await in_pieces(request, raw)

    async def work(gateway):
        room = gateway.runtime.dispatcher.room
        full, beyond = room.enter(""), room.enter("")
        room.limit = 2 * LARGE
        await full.more(LARGE)
        # It has its turn, and others of its sender wait.
        await beyond.more(1)
        waiting = [
            asyncio.ensure_future(gateway.handle("chat", {"model": "m", **CHAT, "stream": stream})) for _ in range(6)
        ]
        await until_async(lambda: len(room._waiting.get("", ())) == 6)
        await asyncio.sleep(1.5)
        assert not any(one.done() for one in waiting)
        beyond.close()
        full.close()
        for reply in await asyncio.gather(*waiting):
            assert reply.status == 200
            if reply.stream is not None:
                assert [piece async for piece in reply.stream]
        [live] = gateway.runtime.dispatcher.lives()
        assert (live.breaker.phase, live.failing, len(asked)) == ("closed", 0.0, 6)
        # What it is learned to take is its own, too.
        assert (live.first_token_s if stream else live.latency_s) < 1.0

    against(tmp_path, answer, work, "m", timeout_s=1.0, first_token_timeout_s=1.0)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_waits_to_be_read_holds_no_place_at_its_deployment(tmp_path, stream):
    """A deployment that had nothing to do was full, and seemed not to answer."""
    raw = json.dumps(SAID).encode()

    async def answer(request, model):
        small = {**SAID, "choices": [{**SAID["choices"][0], "message": {"role": "assistant", "content": "hi"}}]}
        return web.json_response(small) if request.headers.get("x-small") else await in_pieces(request, raw)

    async def work(gateway):
        dispatcher, gate = gateway.runtime.dispatcher, threading.Event()
        [live] = dispatcher.lives()
        try:
            busy = dispatcher.turns.put("somebody", gate.wait)
            slow = [
                asyncio.ensure_future(gateway.handle("chat", {"model": "m", **CHAT, "stream": stream}))
                for _ in range(2)
            ]
            await until_async(lambda: len(dispatcher.turns._waiting.get("", ())) == 2)
            # One after the other, in the one place.
            await until_async(lambda: (live.in_flight, live.waiting) == (0, 0))
            assert not any(one.done() for one in slow)
        finally:
            gate.set()
        await busy
        for reply in await asyncio.gather(*slow):
            assert reply.status == 200
            if reply.stream is not None:
                assert [piece async for piece in reply.stream]
        assert (live.in_flight, live.waiting, live._parts._counts) == (0, 0, {})

    against(tmp_path, answer, work, "m", max_in_flight=2)


def test_of_a_long_answer_that_says_what_went_wrong_the_beginning_is_read(tmp_path):
    """Up to 32 MiB of each were held, without a place."""
    sent = []

    async def answer(request, model):
        response = web.StreamResponse(status=400, headers={"content-type": "text/plain"})
        await response.prepare(request)
        try:
            for _ in range(400):
                await response.write(b"no" * 50_000)
                sent.append(1)
        except ConnectionError:
            pass
        return response

    async def work(gateway):
        with pytest.raises(ApiError) as caught:
            await gateway.handle("chat", {"model": "m", **CHAT})
        return caught.value

    error = against(tmp_path, answer, work, "m")
    assert error.status == 400
    assert len(sent) < 400
