"""Devices that come or fall idle, before real ranks: they are given what waits in another, and all tokens are those of each alone."""

import asyncio

import pytest

from anabranch.serving.core.request import Finish, Request, Sampling
from anabranch.serving.elasticmoe.config import ElasticConfig
from anabranch.serving.elasticmoe.coordinator import Coordinator
from waiting import until_async

LONG, SHORT = 90, 5


@pytest.fixture
def run(folder, fork_server):
    def run(work, **changes):
        async def main():
            settings = {"model": str(folder), "num_blocks": 64, "max_seqs": 2, "ahead": False, "pace_s": 0.01}
            engine = Coordinator(ElasticConfig(**(settings | changes)), fork_server=fork_server)
            await engine.start()
            try:
                async with asyncio.timeout(200):
                    return await work(engine)
            finally:
                await engine.close()

        return asyncio.run(main())

    return run


async def answer(engine, id, tokens=LONG):
    """Of the key that the id begins with."""
    sampling = Sampling(temperature=0.0 if id.endswith("0") else 1.0, seed=7, max_tokens=tokens, ignore_eos=True)
    request = Request(id=id, prompt=(1, 2, ord(id[0]) % 50, int(id[-1])), key=id[0], sampling=sampling)
    outputs = [output async for output in engine.submit(request)]
    assert outputs[-1].finish is Finish.LENGTH
    return [token for output in outputs for token in output.tokens]


def on(engine, device):
    return [live.request.id for live in engine.group.ledger.live.values() if live.device == device]


async def started(engine, asks):
    """Tasks of answers, when ranks have all that they get."""
    tasks = {}
    for id, tokens in asks.items():
        tasks[id] = asyncio.create_task(answer(engine, id, tokens))
        await until_async(lambda id=id: id in engine.group.ledger.live)
    return tasks


async def same_as_alone(engine, asks, tasks):
    together = {id: await task for id, task in tasks.items()}
    counters = engine.stats().counters
    assert counters["generation_tokens"] == sum(asks.values())
    assert counters["finished_abort"] == counters["elastic_requests_rerun"] == 0
    assert engine.group.ledger._queue._charged == {}
    assert together == {id: await answer(engine, id, tokens) for id, tokens in asks.items()}


@pytest.mark.slow
def test_a_device_that_comes_is_given_what_waits_in_another(run):
    async def work(engine):
        asks = dict.fromkeys(("a0", "a1", "b0"), LONG)
        tasks = await started(engine, asks)
        assert len(on(engine, 0)) == 3
        await engine.control("scale", devices=(0, 1))
        await until_async(lambda: len(on(engine, 1)) == 1)
        assert len(on(engine, 0)) == 2
        await same_as_alone(engine, asks, tasks)

    run(work)


def test_a_device_that_falls_idle_is_given_what_waits_in_another(run):
    async def work(engine):
        # One after the other to each of the two.
        asks = {"a0": LONG, "a1": SHORT, "a2": LONG, "a3": SHORT, "b0": LONG, "b1": SHORT}
        tasks = await started(engine, asks)
        for id in ("a1", "a3", "b1"):
            await tasks[id]
        await until_async(lambda: len(on(engine, 1)) == 1)
        assert len(on(engine, 0)) == 2
        await same_as_alone(engine, asks, tasks)

    run(work, devices=2)
