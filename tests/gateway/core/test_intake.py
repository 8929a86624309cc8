"""Requests are counted in and out whichever way they end, and one with a name goes on without its client."""

import asyncio
import gc
import threading
from types import SimpleNamespace

import pytest

from anabranch.gateway.config import LimitsConfig
from anabranch.gateway.core.admission import Limits
from anabranch.gateway.core.held_body import HeldBody
from anabranch.gateway.core.incoming import Incoming, KnownKey
from anabranch.gateway.core.intake import Intake
from anabranch.gateway.in_flight import InFlight
from anabranch.gateway.runtime import Runtime
from anabranch.gateway.store import KeyRecord
from anabranch.web.api_error import ApiError
from anabranch.web.body_room import BodyRoom
from anabranch.web.large_json import LARGE
from gateway_states import FakeStore, config, model, run, services
from waiting import until_async

KEY = KnownKey(KeyRecord(id="k"))


def opened(of=None):
    lent, _ = services(FakeStore())
    runtime, seen = Runtime(of or config()), SimpleNamespace(refused=[], tasks=[])

    def spawn(work):
        seen.tasks.append(asyncio.ensure_future(work))

    intake = Intake(
        runtime=lambda: runtime,
        services=lambda: lent,
        metrics=lent.metrics,
        admission=lent.admission,
        spawn=spawn,
        keep=seen.tasks.append,
        on_refused=lambda state, status, code: seen.refused.append((state.shown_as, status, code)),
    )
    return intake, runtime, lent, seen


def incoming(headers=None, held=None, num_bytes=0, **body):
    body = {"model": "small", "messages": [{"role": "user", "content": "hi"}], **body}
    return Incoming(endpoint="chat", body=body, headers=headers or {}, held=held, num_bytes=num_bytes)


def is_empty(intake, runtime, lent):
    return (intake.in_flight, runtime.users, lent.admission._senders._counts) == (0, 0, {})


def slow():
    given = model("small")
    [deployment] = given.deployments
    provider = deployment.provider.replace(latency_s=0.05)
    return config(given.replace(deployments=(deployment.replace(provider=provider),)))


def test_whole_answers_are_counted_out_at_once_and_streams_at_their_end():
    async def work():
        intake, runtime, lent, _ = opened()
        await intake.take(incoming(), KEY)
        assert is_empty(intake, runtime, lent)
        reply = await intake.take(incoming(stream=True), KEY)
        assert (intake.in_flight, runtime.users, lent.admission._senders._counts) == (1, 1, {"k": 1})
        async for _ in reply.stream:
            pass
        assert is_empty(intake, runtime, lent)
        reply = await intake.take(incoming(stream=True), KEY)
        # Whoever had it let go of it, and never read it.
        del reply
        gc.collect()
        await until_async(lambda: is_empty(intake, runtime, lent))

    run(work)


def test_what_has_no_row_is_told_to_whoever_writes_logs():
    async def work():
        intake, runtime, lent, seen = opened()
        for body, code in (({"model": "nobody"}, "model_not_found"), ({"messages": 1}, None)):
            with pytest.raises(ApiError) as caught:
                await intake.take(incoming(**body), KEY)
            assert caught.value.headers["x-request-id"]
            assert code in (None, caught.value.code)
        # One that has a row is told of by that.
        with pytest.raises(ApiError):
            await intake.take(incoming(model="large", max_tokens=5), KnownKey(KeyRecord(id="k", models=("small",))))
        assert is_empty(intake, runtime, lent)
        assert [one[1] for one in seen.refused] == [404, 400]

    run(work)


def test_there_are_so_many_at_a_time():
    async def work():
        intake, runtime, lent, seen = opened(config(limits=LimitsConfig(in_flight=1)))
        reply = await intake.take(incoming(stream=True), KEY)
        with pytest.raises(ApiError, match="1 requests are under way") as caught:
            await intake.take(incoming(), KEY)
        assert (caught.value.status, caught.value.headers["Retry-After"], seen.refused) == (429, "1", [])
        await reply.stream.aclose()
        await intake.take(incoming(), KEY)
        assert is_empty(intake, runtime, lent)

    run(work)


@pytest.mark.parametrize("stream", [False, True])
def test_one_with_a_name_goes_on_without_its_client(stream):
    async def work():
        intake, runtime, lent, seen = opened(slow())
        named = {"idempotency-key": "n"}
        task = asyncio.ensure_future(intake.take(incoming(named, stream=stream), KEY))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert intake.in_flight == 1
        while seen.tasks and not all(one.done() for one in seen.tasks):
            await asyncio.gather(*seen.tasks, return_exceptions=True)
        # What it said is put together in a task of its own.
        await until_async(lambda: is_empty(intake, runtime, lent))
        again = await intake.take(incoming(named), KEY)
        assert again.headers["x-cache"] == "exact"

    run(work)


@pytest.mark.parametrize("body", [{}, {"stream": True}, {"model": "nobody"}], ids=["whole", "stream", "refused"])
@pytest.mark.parametrize("is_named", [False, True])
def test_a_body_is_held_until_its_request_ends_and_has_one_place(body, is_named):
    """Also where its client, who held it too, has gone."""

    async def work():
        intake, runtime, lent, seen = opened(config(limits=LimitsConfig(max_in_flight=1)) if not is_named else slow())
        room, senders = BodyRoom(100, 0.5, 429), lent.admission._senders
        held = HeldBody(room.enter("k", 10), await lent.admission.hold("k", Limits(None, None, 1)))
        held.more(10, None)
        task = asyncio.ensure_future(
            intake.take(incoming({"idempotency-key": "n"} if is_named else {}, held, **body), KEY)
        )
        await asyncio.sleep(0)
        # One that was refused at once has none any more.
        assert (room.num_bytes, senders._counts) == (10, {} if task.done() else {"k": 1})
        if is_named:
            task.cancel()
        else:
            await asyncio.wait([task])
        held.close()
        if body.get("stream") and not is_named:
            assert (room.num_bytes, senders._counts) == (10, {"k": 1})
            await task.result().stream.aclose()
        await asyncio.gather(task, *seen.tasks, return_exceptions=True)
        await until_async(lambda: is_empty(intake, runtime, lent) and room.num_bytes == 0)

    run(work)


@pytest.mark.parametrize("ends", ["read", "wrong", "gone"])
def test_what_waits_to_be_read_is_of_its_sender_s_part(ends):
    """A key without a budget had 1,024 bodies of many messages waiting to be read, and nobody else was let in."""

    async def work():
        intake, runtime, lent, _ = opened(config(limits=LimitsConfig(in_flight=8)))
        senders = lent.admission._senders = InFlight(lambda: (8, 0.75))
        gate, long = threading.Event(), {"num_bytes": LARGE + 1}
        blocked = lent.turns.put("else", gate.wait)
        body = {"messages": 1} if ends == "wrong" else {}
        tasks = [asyncio.ensure_future(intake.take(incoming(**long, **body), KEY)) for _ in range(20)]
        try:
            await asyncio.sleep(0)
            assert (intake.in_flight, senders._counts) == (6, {"k": 6})
            for key in ("other", "third"):
                reply = await intake.take(incoming(stream=True), KnownKey(KeyRecord(id=key)))
                assert senders._counts == {"k": 6, key: 1}
                await reply.stream.aclose()
            if ends == "gone":
                for task in tasks:
                    task.cancel()
        finally:
            gate.set()
        found = await asyncio.gather(*tasks, blocked, return_exceptions=True)
        refused = [one for one in found if isinstance(one, ApiError) and one.status == 429]
        assert len(refused) == 14
        assert all("6 of the 8" in str(one) for one in refused)
        wrong = [one for one in found if isinstance(one, ApiError) and one.status == 400]
        assert len(wrong) == (6 if ends == "wrong" else 0)
        assert is_empty(intake, runtime, lent)

    run(work)
