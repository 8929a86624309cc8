"""The coordinator as an engine client: streams, refusals, commands, and an autoscaler that follows the load."""

import asyncio
from dataclasses import replace

import pytest

from anabranch.errors import InputError
from anabranch.serving.core.request import Finish, Request, Sampling
from anabranch.serving.elasticmoe.config import ElasticConfig
from anabranch.serving.elasticmoe.coordinator import Coordinator
from anabranch.serving.elasticmoe.policy import Policy
from waiting import until_async


def run(folder, fork_server, work, **changes):
    async def main():
        settings = {"model": str(folder), "num_blocks": 48, "max_seqs": 2, "ahead": False, "pace_s": 0.003}
        engine = Coordinator(ElasticConfig(**(settings | changes)), fork_server=fork_server)
        assert not engine.is_ready
        info = await engine.start()
        try:
            assert engine.is_ready
            return await work(engine, info)
        finally:
            await engine.close()
            assert not engine.is_ready

    return asyncio.run(main())


def request(id, tokens=12, **sampling):
    return Request(id=id, prompt=(1, 2, 3), sampling=Sampling(temperature=0.0, max_tokens=tokens, **sampling))


async def answer(engine, *arguments, **sampling):
    outputs = [output async for output in engine.submit(request(*arguments, **sampling))]
    return [token for output in outputs for token in output.tokens], outputs[-1].finish


def test_streams_commands_and_refusals(folder, fork_server):
    async def work(engine, info):
        assert info.routed_layers == {0: 6, 1: 6}
        assert set(engine.stats().counters) >= {"prompt_tokens", "elastic_scale_events", "elastic_downtime_s"}
        assert all(value == 0 for value in engine.stats().counters.values())  # there from the start, at zero
        first = asyncio.create_task(answer(engine, "a", 60))
        await asyncio.sleep(0.02)
        assert "6 of 12 stay, 6 move" in await engine.control("plan", devices=2)
        report = await engine.control("scale", devices=2)
        assert report["new"] == (0, 1)
        assert (await first)[1] is Finish.LENGTH
        assert (await first)[0][:12] == (await answer(engine, "b"))[0]
        with pytest.raises(InputError, match="no control 'jump'"):
            await engine.control("jump")
        with pytest.raises(InputError, match="control 'scale'"):
            await engine.control("scale", nothing=1)
        with pytest.raises(InputError, match="the prompt has the token 99"):
            await anext(engine.submit(Request(id="c", prompt=(99,))))
        with pytest.raises(InputError, match="num_streams is 2, but the model has no parallel streams"):
            await anext(engine.submit(Request(id="c", prompt=(1,), num_streams=2)))
        with pytest.raises(InputError, match="path has 3 visits of blocks; the engine keeps keys and values of 2"):
            await anext(engine.submit(Request(id="c", prompt=(1,), path=(0, 0, 1))))
        assert await engine.control("reset_prefix_cache") >= 0
        assert set((await engine.control("usage"))["devices"]) == {0, 1}
        stats = engine.stats()
        assert stats.counters["generation_tokens"] == 72
        assert stats.counters["prompt_tokens"] == 6
        return engine

    engine = run(folder, fork_server, work)
    assert engine.group.ledger.live == {}


def test_a_client_that_leaves_frees_its_place(folder, fork_server):
    async def work(engine, info):
        stream = engine.submit(request("a", 100))
        await anext(stream)
        await stream.aclose()
        assert engine.group.ledger.live == {}
        # Nobody reads it, so that it has not ended by itself when it is to.
        waits = engine.submit(replace(request("b", 100), buffer=2))
        await anext(waits)
        await engine.abort("b")
        assert [output async for output in waits][-1].finish is Finish.ABORT
        assert (await answer(engine, "c"))[1] is Finish.LENGTH

    run(folder, fork_server, work)


def test_the_autoscaler_follows_the_queue(folder, fork_server):
    async def work(engine, info):
        while len(engine.group.devices) < 2:
            await asyncio.gather(*(answer(engine, f"r{number}", 100) for number in range(8)))
        await until_async(lambda: len(engine.group.devices) == 1)

    run(folder, fork_server, work, policy=Policy(by="queue", max_devices=2, cool_down_s=0.2, patience_s=0.2))
