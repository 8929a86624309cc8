"""Turns: whose work is done next, and what becomes of work that fails or is given up. And that a key without room has no body read."""

import asyncio
import contextvars
import gc
import inspect
import json
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise

import aiohttp
import pytest

from anabranch.errors import RateError
from anabranch.gateway.config import DeploymentConfig, GatewayConfig, ModelConfig
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.http import exchange
from anabranch.gateway.http.app import App
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.store.limits import RateLimits
from anabranch.web import turns as turns_module
from anabranch.web.turns import Turns, UnusualError, in_task, plainly_awaited
from odd_errors import LEFT_CANCELLED, UNUSUAL, PanicError


def test_senders_take_turns_and_each_keeps_its_order():
    done, gate = [], threading.Event()

    async def main():
        with ThreadPoolExecutor(1) as executor:
            turns = Turns(executor)
            first = asyncio.create_task(turns.run("a", gate.wait))
            await asyncio.sleep(0)
            rest = [
                asyncio.create_task(turns.run(whose, lambda name=(whose, at): done.append(name) or name))
                for at, whose in enumerate("aaaabbc")
            ]
            await asyncio.sleep(0)
            rest[1].cancel()
            gate.set()
            assert await first
            found = await asyncio.gather(*rest, return_exceptions=True)
            assert isinstance(found.pop(1), asyncio.CancelledError)
            assert sorted(found) == sorted(done)
            # It goes on after work that fails, and after who began it has gone.
            with pytest.raises(ZeroDivisionError):
                await turns.run("a", lambda: 1 / 0)
            gate.clear()
            gone = asyncio.create_task(turns.run("a", lambda: gate.wait() and 1 / 0))
            await asyncio.sleep(0)
            gone.cancel()
            gate.set()
            assert await turns.run("b", lambda: 7) == 7

    asyncio.run(main())
    assert done == [("a", 0), ("b", 4), ("c", 6), ("a", 2), ("b", 5), ("a", 3)]


def test_the_loop_itself_does_one_piece_at_a_time_and_whatever_else_there_is_between():
    done = []

    async def main():
        turns, is_over = Turns(), False

        async def other():
            while not is_over:
                done.append("turn")
                await asyncio.sleep(0)

        turning = asyncio.create_task(other())
        tasks = [asyncio.create_task(turns.run(whose, lambda name=whose: done.append(name))) for whose in "aaabc"]
        failing = asyncio.create_task(turns.run("a", lambda: 1 / 0))
        await asyncio.gather(*tasks)
        with pytest.raises(ZeroDivisionError):
            await failing
        assert await turns.run("b", lambda: 7) == 7
        is_over = True
        await turning

    asyncio.run(main())
    assert [name for name in done if name != "turn"] == list("aabca")
    assert all("turn" in (before, later) for before, later in pairwise(done))


def test_nothing_stays_of_work_that_was_given_up_before_its_turn():
    class Body:
        pass

    gate = threading.Event()

    async def main():
        with ThreadPoolExecutor(1) as executor:
            turns = Turns(executor)
            first = asyncio.create_task(turns.run("a", gate.wait))
            await asyncio.sleep(0)
            bodies = [Body() for _ in range(3)]
            seen = [weakref.ref(body) for body in bodies]
            # Of one who has more that waits, and of one who has not.
            tasks = [
                asyncio.create_task(turns.run(whose, lambda body=body: body))
                for whose, body in zip("aab", bodies, strict=True)
            ]
            del bodies
            await asyncio.sleep(0)
            tasks[0].cancel()
            tasks[2].cancel()
            await asyncio.wait([tasks[0], tasks[2]])
            kept = tasks[1]
            del tasks
            gc.collect()
            assert [body() is not None for body in seen] == [False, True, False]
            gate.set()
            await first
            assert isinstance(await kept, Body)

    try:
        asyncio.run(main())
    finally:
        gate.set()


def test_whoever_waits_for_what_was_given_up_is_told_and_a_sender_keeps_its_turn():
    gate, done = threading.Event(), []

    async def main():
        with ThreadPoolExecutor(1) as executor:
            turns = Turns(executor)
            try:
                running = turns.put("x", lambda: gate.wait() and 1 / 0)
                pieces = [turns.put(whose, partial(done.append, at)) for at, whose in enumerate("aab")]
                waits = asyncio.ensure_future(asyncio.wait_for(asyncio.shield(pieces[0]), 60))
                await asyncio.sleep(0)
                for whose, future in (("a", pieces[0]), ("x", running), ("nobody", running)):
                    turns.drop(whose, future)
                with pytest.raises(asyncio.CancelledError):
                    await waits
                # Also of one that is under way, whose result is nobody's.
                assert [one.cancelled() for one in (running, *pieces)] == [True, True, False, False]
            finally:
                gate.set()
            await asyncio.gather(*pieces[1:])

    asyncio.run(main())
    assert done == [1, 2]


def test_what_was_cancelled_and_never_dropped_is_not_begun():
    gate, done = threading.Event(), []

    async def main():
        with ThreadPoolExecutor(1) as executor:
            turns = Turns(executor)
            try:
                turns.put("x", gate.wait)
                pieces = [turns.put(whose, partial(done.append, at)) for at, whose in enumerate("aab")]
                pieces[0].cancel()
            finally:
                gate.set()
            await asyncio.gather(*pieces[1:])

    asyncio.run(main())
    assert sorted(done) == [1, 2]


def test_a_look_takes_nothing_and_sees_what_is_gone():
    now = [0.0]
    limits = RateLimits(lambda: now[0])
    for _ in range(5):
        limits.look("a", rpm=1, tpm=10)
    limits.admit("a", 10, rpm=1, tpm=10)
    with pytest.raises(RateError, match="1 requests"):
        limits.look("a", rpm=1, tpm=10)
    limits.look("b", rpm=1, tpm=10)
    now[0] = 60.0
    limits.look("a", rpm=1, tpm=10)
    limits.correct("a", 20, tpm=10)
    with pytest.raises(RateError, match="10 tokens"):
        limits.look("a", rpm=1, tpm=10)


def test_a_large_body_of_a_key_without_room_is_not_read(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(exchange, "_parsed", lambda raw, parsed=exchange._parsed: read.append(len(raw)) or parsed(raw))
    made = ModelConfig(
        name="m", max_tokens=9, deployments=(DeploymentConfig(provider=Mock.Config(model="m", tokens=2)),)
    )
    config = GatewayConfig(models=(made,), store=str(tmp_path / "g.db"))
    body = {"model": "m", "messages": [{"role": "user", "content": "x" * 400_000}]}

    async def main():
        async with Gateway(config) as gateway:
            server = App(gateway).server()
            listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
            url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1/chat/completions"
            keys = [(await gateway.store.create_key(name, rpm=1))[0] for name in ("one", "other")]
            said = []
            try:
                async with aiohttp.ClientSession() as session:
                    for key in (keys[0], keys[0], keys[1]):
                        head = {"authorization": f"Bearer {key}", "content-type": "application/json"}
                        async with session.post(url, data=json.dumps(body), headers=head) as reply:
                            said.append((reply.status, reply.headers.get("retry-after") is not None))
            finally:
                listener.close()
                await server.shutdown(0.1)
            return said

    assert asyncio.run(main()) == [(200, False), (429, True), (200, False)]
    assert len(read) == 2


def test_what_waits_for_an_executor_that_is_shut_down_ends():
    """As what the executor had taken and not begun: nobody waits for it for ever."""

    async def main():
        began, released, executor = threading.Event(), threading.Event(), ThreadPoolExecutor(1)
        turns = Turns(executor)

        def work():
            began.set()
            released.wait(60)

        pieces = [turns.put(whose, work) for whose in "abc"]
        assert await asyncio.to_thread(began.wait, 60)
        executor.shutdown(wait=False, cancel_futures=True)
        released.set()
        async with asyncio.timeout(60):
            await asyncio.wait(pieces)
        return [piece.cancelled() for piece in pieces]

    assert asyncio.run(main()) == [False, True, True]


@pytest.mark.parametrize("is_thread", [False, True])
@pytest.mark.parametrize("error", UNUSUAL)
def test_what_would_end_or_steer_whoever_waits_is_an_error_of_the_work(is_thread, error):
    """StopIteration cannot be in a future: its thread did nothing any more, for good. SystemExit ended the loop."""
    if error is KeyboardInterrupt and not is_thread:
        pytest.skip("that is Ctrl-C")

    def work():
        raise error("by the work")

    async def main():
        with ThreadPoolExecutor(1) as executor:
            turns = Turns(executor if is_thread else None)
            async with asyncio.timeout(60):
                with pytest.raises(UnusualError, match=f"{error.__name__} was raised") as raised:
                    await turns.run("a", work)
                assert isinstance(raised.value.__cause__, error)
                return await turns.run("b", lambda: "goes on")

    assert asyncio.run(main()) == "goes on"


@pytest.mark.parametrize("error", [SystemExit, GeneratorExit, asyncio.CancelledError, StopAsyncIteration, PanicError])
def test_what_is_awaited_cancels_and_ends_nobody(error):
    async def work():
        raise error

    with pytest.raises(UnusualError):
        asyncio.run(plainly_awaited(work))


def test_whoever_awaits_may_be_cancelled_as_ever():
    async def main():
        task = asyncio.ensure_future(plainly_awaited(lambda: asyncio.sleep(60)))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled()

    assert asyncio.run(main())


class Waits:
    """Is awaited, on no loop."""

    def __await__(self):
        yield


def test_what_is_closed_after_its_loop_has_ended_ends_as_ever():
    awaited = plainly_awaited(Waits)
    awaited.send(None)
    # What it is told by is no error of the work.
    awaited.close()
    assert inspect.getcoroutinestate(awaited) == inspect.CORO_CLOSED


@pytest.mark.parametrize(
    "error", [ValueError, *(one for one in UNUSUAL if one not in (KeyboardInterrupt, GeneratorExit))]
)
def test_whatever_is_raised_while_it_is_cancelled_is_that_cancel(error):
    async def turned():
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise error("of its own") from None

    async def main():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await in_task(turned)
        waiting = asyncio.ensure_future(in_task(turned))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled()

    asyncio.run(main())


@pytest.mark.parametrize("left", LEFT_CANCELLED)
def test_what_leaves_its_task_cancelled_has_cancelled_nobody(left):
    async def fails():
        await LEFT_CANCELLED[left]()
        raise ValueError("of its own")

    async def ends():
        await LEFT_CANCELLED[left]()
        return 7

    async def main():
        assert await in_task(ends) == 7
        with pytest.raises(ValueError, match="of its own"):
            await in_task(fails)
        task = asyncio.current_task()
        assert task is not None
        assert not task.cancelling()

    asyncio.run(main())


def test_variables_of_the_context_are_set_for_whoever_waits():
    variable, other = contextvars.ContextVar("variable"), contextvars.ContextVar("other", default=0)

    async def sets():
        assert variable.get() == "before"
        variable.set("within")

    async def fails():
        variable.set("failed")
        raise ValueError("of its own")

    async def main():
        variable.set("before")
        await in_task(sets)
        assert variable.get() == "within"
        with pytest.raises(ValueError, match="of its own"):
            await in_task(fails)
        assert (variable.get(), other.get()) == ("failed", 0)
        assert other not in contextvars.copy_context()

    asyncio.run(main())


def test_an_error_after_a_cancel_that_was_taken_back_is_told_as_ever():
    """One's own time that is over is no cancel."""

    async def late():
        async with asyncio.timeout(0.001):
            await asyncio.Event().wait()

    async def main():
        with pytest.raises(TimeoutError):
            await plainly_awaited(late)

    asyncio.run(main())


def test_what_is_cancelled_is_told_once_and_may_tidy_up():
    done = []

    async def tidies_up():
        try:
            await asyncio.sleep(60)
        finally:
            # Longer than it takes to lose patience, and within its time.
            await asyncio.sleep(0.7)
            done.append(asyncio.current_task().cancelling())

    async def main():
        with pytest.raises(TimeoutError):
            await in_task(tidies_up, 0.01)
        waiting = asyncio.ensure_future(in_task(tidies_up))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.wait([waiting])

    asyncio.run(main())
    assert done == [1, 1]


def test_work_in_a_task_of_its_own_neither_cancels_nor_holds_up_whoever_waits(monkeypatch):
    monkeypatch.setattr(turns_module, "GRACE_S", 0.01)
    released = []

    async def cancels_itself():
        asyncio.current_task().cancel()
        await asyncio.sleep(0)

    async def stubborn():
        while not released:
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue

    async def main():
        with pytest.raises(UnusualError):
            await in_task(cancels_itself)
        with pytest.raises(TimeoutError):
            await in_task(stubborn, 0.01)
        waiting = asyncio.ensure_future(in_task(stubborn))
        await asyncio.sleep(0)
        waiting.cancel()
        async with asyncio.timeout(60):
            await asyncio.wait([waiting])
        assert waiting.cancelled()
        released.append(True)
        async with asyncio.timeout(60):
            while turns_module._lingering:
                await asyncio.sleep(0.01)
        return await in_task(lambda: asyncio.sleep(0, "goes on"), 60)

    assert asyncio.run(main()) == "goes on"
