"""Readers that are slow, before real ranks: their requests stand still through changes and deaths, and all others run as if alone."""

import asyncio
import os
import random

import pytest

from anabranch.serving.core import stream as streams
from anabranch.serving.core.request import Finish, Request, Sampling
from anabranch.serving.elasticmoe.config import ElasticConfig
from anabranch.serving.elasticmoe.coordinator import Coordinator
from waiting import until_async

BUFFER = 4
COUNT = 120  # tokens of the slow one: more than a second of steps, so that it is paused long before it ends
OTHERS = 20
PACE_S = 0.01
PROMPTS = {"slow": (1, 2, 3), "b": (9, 8, 7, 6), "c": tuple(range(20, 41))}


@pytest.fixture
def run(folder, fork_server, monkeypatch):
    monkeypatch.setattr(streams, "BUFFER", BUFFER)

    def run(work, limit_s=200, **changes):
        async def main():
            settings = {"model": str(folder), "num_blocks": 24, "max_seqs": 1, "ahead": False, "pace_s": PACE_S}
            engine = Coordinator(ElasticConfig(**(settings | changes)), fork_server=fork_server)
            await engine.start()
            try:
                async with asyncio.timeout(limit_s):
                    return await work(engine)
            finally:
                await engine.close()

        return asyncio.run(main())

    return run


@pytest.fixture(scope="module")
def alone(folder, fork_server):
    """What each request gives in a group where it is alone and nothing happens."""

    async def main():
        engine = Coordinator(ElasticConfig(model=str(folder), num_blocks=24, ahead=False), fork_server=fork_server)
        await engine.start()
        try:
            return {id: (await answer(engine, id))[0] for id in PROMPTS}
        finally:
            await engine.close()

    return asyncio.run(main())


def submit(engine, id):
    sampling = Sampling(temperature=0.0, max_tokens=COUNT if id == "slow" else OTHERS, ignore_eos=True)
    return engine.submit(Request(id=id, prompt=PROMPTS[id], sampling=sampling))


async def read(stream):
    """Everything that is left: tokens, and why it ended."""
    outputs = [output async for output in stream]
    return [token for output in outputs for token in output.tokens], outputs[-1].finish


async def answer(engine, id):
    return await read(submit(engine, id))


def given(engine, id="slow"):
    return len(engine.group.ledger.live[id].output)


async def settled(engine):
    """Until ranks have done what they were told, and all they gave has come: answers stand behind both in the channels."""
    await engine.control("probe", tokens=[1])


async def paused(engine, id="slow"):
    """Until a request stands still; how many tokens it has given by then."""
    await until_async(lambda: engine.group.ledger.live[id].paused is not None)
    await settled(engine)
    return given(engine, id)


async def begin(engine):
    """A slow reader that has read one output; its stream, the tokens read, and the tokens given when it was paused."""
    stream = submit(engine, "slow")
    first = await anext(stream)
    count = await paused(engine)
    assert BUFFER < count < COUNT
    return stream, list(first.tokens), count


def is_still(engine, count):
    return engine.group.ledger.live["slow"].paused is not None and given(engine) == count


async def others(engine, alone):
    """Two requests, one after the other in the place of the one that is paused: they are given what they are given alone."""
    answers = await asyncio.gather(answer(engine, "b"), answer(engine, "c"))
    assert answers == [(alone["b"], Finish.LENGTH), (alone["c"], Finish.LENGTH)]
    await settled(engine)


def test_a_slow_reader_pauses_its_request_and_no_other(run, alone):
    async def work(engine):
        stream, tokens, count = await begin(engine)
        await others(engine, alone)
        assert is_still(engine, count)
        gauges = engine.stats().gauges
        assert (gauges["running"], gauges["waiting"], gauges["paused"]) == (0, 0, 1)
        while engine.group.ledger.live["slow"].paused is not None:  # it reads as far as that, and stands again
            tokens += (await anext(stream)).tokens
        later = await paused(engine)
        assert count < later < COUNT
        await settled(engine)
        assert is_still(engine, later)
        rest, finish = await read(stream)
        assert (tokens + rest, finish) == (alone["slow"], Finish.LENGTH)
        assert engine.stats().counters["generation_tokens"] == COUNT + 2 * OTHERS

    run(work)


@pytest.mark.parametrize("mode", ["migrate", "drain"])
def test_it_stays_paused_through_changes_of_devices(run, alone, mode):
    async def work(engine):
        stream, tokens, count = await begin(engine)
        live = engine.group.ledger.live["slow"]
        running = asyncio.create_task(answer(engine, "b"))
        await until_async(lambda: "b" in engine.group.ledger.live)
        # The change ends while the reader does not read: its device stays, leaves, and comes back.
        for devices, device in (((0, 1), 0), ((1,), 1), ((1, 0), 1)):
            await engine.control("scale", devices=devices, mode=mode)
            await settled(engine)
            assert is_still(engine, count)
            assert live.device == (device if mode == "migrate" else None)
        assert await running == (alone["b"], Finish.LENGTH)
        await others(engine, alone)
        assert is_still(engine, count)
        rest, finish = await read(stream)
        assert (tokens + rest, finish) == (alone["slow"], Finish.LENGTH)
        counters = engine.stats().counters
        assert counters["elastic_requests_rerun"] == 0
        assert counters["generation_tokens"] == COUNT + 3 * OTHERS  # none was given twice

    run(work)


def test_it_stays_paused_when_its_rank_dies(run, alone):
    async def work(engine):
        stream, tokens, count = await begin(engine)
        old = engine.group.ledger.active
        old.kill(0)
        await until_async(lambda: engine.group.ledger.active is not old)
        await others(engine, alone)
        assert is_still(engine, count)
        live = engine.group.ledger.live["slow"]
        assert live.instance is None  # it takes nothing of the new rank
        while live.paused is not None:
            tokens += (await anext(stream)).tokens
        again = await paused(engine)  # run again, and too fast again
        assert count < again < COUNT
        assert live.reruns == 1
        rest, finish = await read(stream)
        assert (tokens + rest, finish) == (alone["slow"], Finish.LENGTH)

    run(work)


@pytest.mark.parametrize("where", ["in its rank", "with none"])
def test_an_abort_while_it_is_paused(run, alone, where):
    async def work(engine):
        stream, tokens, count = await begin(engine)
        if where == "with none":
            old = engine.group.ledger.active
            old.kill(0)
            await until_async(lambda: engine.group.ledger.active is not old)
        await engine.abort("slow")
        rest, finish = await read(stream)
        assert (tokens + rest, finish) == (alone["slow"][:count], Finish.ABORT)
        assert engine.group.ledger.live == {}
        await others(engine, alone)
        again = await answer(engine, "slow")  # nothing is left of it where its id is used again
        assert again == (alone["slow"], Finish.LENGTH)

    run(work)


def test_a_reader_that_does_not_come_has_its_request_ended(run, alone, monkeypatch):
    async def work(engine):
        monkeypatch.setattr(streams, "STALL_S", 0.05)
        stream = submit(engine, "slow")
        tokens = list((await anext(stream)).tokens)
        await until_async(lambda: "slow" not in engine.group.ledger.live)
        monkeypatch.setattr(streams, "STALL_S", 30.0)
        await others(engine, alone)
        rest, finish = await read(stream)
        assert finish is Finish.ABORT
        assert tokens + rest == alone["slow"][: len(tokens + rest)]
        assert len(tokens + rest) < COUNT

    run(work)


def test_a_close_while_it_is_paused(run, alone):
    async def work(engine):
        stream, tokens, count = await begin(engine)
        await engine.close()
        rest, finish = await read(stream)
        assert (tokens + rest, finish) == (alone["slow"][:count], Finish.ABORT)

    run(work)


def test_a_close_that_lets_requests_end_waits_for_no_reader_longer_than_the_rule(run, monkeypatch):
    async def work(engine):
        monkeypatch.setattr(streams, "STALL_S", 0.05)
        stream = submit(engine, "slow")
        await anext(stream)
        await engine.close(drain_s=10_000)
        assert (await read(stream))[1] is Finish.ABORT

    run(work)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_random_readers_changes_and_deaths(run):
    """Readers of every slowness; ``ANABRANCH_SCALE_EVENTS=1000`` for many events. All get what they get when nothing happens."""
    events, draw = int(os.environ.get("ANABRANCH_SCALE_EVENTS", "40")), random.Random(0)
    sampling = Sampling(temperature=1.0, seed=7, max_tokens=40, ignore_eos=True)

    async def reader(engine, number, slowness):
        tokens = []
        prompt = tuple((7 * number + 3 * place) % 61 for place in range(5 + number))
        async for output in engine.submit(Request(id=f"r{number}", prompt=prompt, sampling=sampling)):
            tokens += output.tokens
            if draw.random() < slowness:
                await asyncio.sleep(0.2 * draw.random())
        assert output.finish is Finish.LENGTH
        return tokens

    async def work(engine):
        expected = [await reader(engine, number, 0.0) for number in range(8)]
        paused = 0
        for event in range(events):
            readers = [asyncio.create_task(reader(engine, number, draw.choice((0.0, 0.1, 0.5)))) for number in range(8)]
            await asyncio.sleep(0.2 * draw.random())
            paused += engine.group.ledger.num_paused
            if event % 8 == 7:
                active = engine.group.ledger.active
                active.kill(draw.choice(active.devices))
            else:
                mode = draw.choice(("migrate", "drain"))
                await engine.control("scale", devices=draw.randint(1, 3), mode=mode)
            assert await asyncio.gather(*readers) == expected, event
            assert engine.group.ledger.live == {}
        assert paused > 0
        stats = engine.stats()
        assert stats.counters["generation_tokens"] == (events + 1) * 8 * sampling.max_tokens
        assert stats.counters["elastic_scale_failures"] == 0

    run(work, pace_s=0.002, max_seqs=2, num_blocks=12, limit_s=3600)
