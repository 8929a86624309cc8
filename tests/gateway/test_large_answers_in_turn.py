"""Large answers wait for one another, sender by sender; and a real gateway reads no more at once than it has places for."""

import asyncio
import json

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.config import DeploymentConfig, GatewayConfig, ModelConfig
from anabranch.gateway.dispatch.large_answers import LargeAnswers
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.providers.openai import OpenAI


def test_who_asks_for_many_waits_for_himself():
    async def main():
        places, order, gates = LargeAnswers(100), [], []

        async def read(sender, size):
            async with places.place(sender, size):
                order.append(sender)
                gate = asyncio.Event()
                gates.append(gate)
                await gate.wait()

        tasks = [asyncio.ensure_future(read("a", 50)) for _ in range(6)]
        await asyncio.sleep(0)
        tasks.append(asyncio.ensure_future(read("b", 50)))
        await asyncio.sleep(0)
        assert order == ["a", "a"]
        gates[0].set()
        await asyncio.sleep(0.01)
        gates[1].set()
        await asyncio.sleep(0.01)
        # Third is one that waited before b came; then it is b's turn, however many a has.
        assert order == ["a", "a", "a", "b"]
        while any(not task.done() for task in tasks):
            for gate in gates:
                gate.set()
            await asyncio.sleep(0)
        assert places._held == 0
        assert not places._waiting

    asyncio.run(main())


def test_one_that_is_larger_than_all_goes_alone_and_one_who_leaves_gives_way():
    async def main():
        places = LargeAnswers(100)
        async with places.place("a", 60):
            huge = asyncio.ensure_future(places.place("b", 500).__aenter__())
            small = asyncio.ensure_future(places.place("c", 10).__aenter__())
            await asyncio.sleep(0)
            # Nobody overtakes it: it would wait for ever.
            assert not huge.done()
            assert not small.done()
            huge.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert small.done()
        assert places._held == 10

    asyncio.run(main())


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 150), st.booleans()), max_size=20))
def test_it_never_holds_more_and_everybody_comes_to_an_end(asked):
    async def main():
        places, held, most = LargeAnswers(100), [], []

        async def read(sender, size, _):
            async with places.place(sender, size):
                held.append(size)
                most.append((sum(held), len(held)))
                try:
                    await asyncio.sleep(0)
                finally:
                    held.remove(size)

        tasks = [asyncio.ensure_future(read(*one)) for one in asked]
        await asyncio.sleep(0)
        for task, (_, _, leaves) in zip(tasks, asked, strict=True):
            if leaves:
                task.cancel()
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
        assert all(size <= 100 or count == 1 for size, count in most)
        assert places._held == 0
        assert not places._waiting

    asyncio.run(main())


@pytest.mark.parametrize("says", [True, False])
def test_a_gateway_reads_so_many_at_once(tmp_path, monkeypatch, says):
    """Four requests of 10 kB took 500 MiB: 32 of them 4 GB."""
    monkeypatch.setenv("LARGE_TEST_KEY", "k")
    vector = [0.125] * 1024
    data = [{"object": "embedding", "index": number, "embedding": vector} for number in range(60)]
    raw = json.dumps(
        {"object": "list", "model": "e", "data": data, "usage": {"prompt_tokens": 60, "total_tokens": 60}}
    ).encode()
    read = []

    async def answer(request):
        await request.read()
        if says:
            return web.Response(body=raw, content_type="application/json")
        response = web.StreamResponse(headers={"content-type": "application/json"})
        await response.prepare(request)
        await response.write(raw)
        return response

    async def main():
        upstream = web.Application()
        upstream.router.add_post("/v1/embeddings", answer)
        runner = web.AppRunner(upstream)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/v1"
        made = OpenAI.Config(model="e", key_env="LARGE_TEST_KEY", base_url=url)
        config = GatewayConfig(
            models=(ModelConfig(name="e", deployments=(DeploymentConfig(provider=made),)),),
            store=str(tmp_path / "g.db"),
            require_key=False,
        )
        async with Gateway(config) as gateway:
            places = gateway.runtime.dispatcher.places
            places._limit = 2 * len(raw) + 10 if says else 40 << 20
            real = places._let_in

            def noted():
                real()
                read.append(places._held)

            monkeypatch.setattr(places, "_let_in", noted)
            body = {"model": "e", "input": ["a"] * 60}
            found = await asyncio.gather(*(gateway.handle("embeddings", dict(body)) for _ in range(6)))
            assert all(reply.body == raw for reply in found)
            assert places._held == 0
            assert 0 < max(read) <= places._limit
            # By how long it says that it is, or as long as it may be.
            assert {size % (len(raw) if says else 32 << 20) for size in read} == {0}
        await runner.cleanup()

    asyncio.run(main())
