"""A name that nobody answers for takes a thread of its own, and none in which others are looked up."""

import asyncio
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from aiohttp import ThreadedResolver, web

from anabranch.gateway.dispatch.upstream_beside import BESIDE_BYTES, UpstreamBeside
from anabranch.gateway.name_resolver import NameResolver
from anabranch.gateway.providers.provider import HttpCall, UpstreamError, read_all
from waiting import until, until_async


class Names:
    """A system that knows no name which begins with "dead", and takes until `gate` to say so."""

    def __init__(self, monkeypatch):
        self.gate, self.looked_up, real = threading.Event(), [], socket.getaddrinfo

        def found(host, *given, **named):
            self.looked_up.append(host)
            if host.startswith("dead"):
                self.gate.wait()
                raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
            return real("127.0.0.1" if host == "live.test" else host, *given, **named)

        monkeypatch.setattr(socket, "getaddrinfo", found)


@pytest.fixture
def names(monkeypatch):
    made = Names(monkeypatch)
    yield made
    made.gate.set()
    # None of the threads outlives the test.
    until(lambda: not any(one.name.startswith("look up") for one in threading.enumerate()))


@pytest.mark.parametrize("num_bytes", [2, BESIDE_BYTES + 1])
def test_upstreams_whose_names_nobody_answers_for_hold_up_no_other(names, num_bytes):
    """A gateway with six such could reach no other that it was not connected to, for half a minute again and again."""

    async def answer(request):
        return web.Response(text=str(len(await request.read())))

    async def main():
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        app = web.Application(client_max_size=1 << 30)
        app.router.add_post("/{rest:.*}", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port, transport = site._server.sockets[0].getsockname()[1], UpstreamBeside()

        def call(host):
            return transport.open(HttpCall(f"http://{host}:{port}/v1", {}, b"x" * num_bytes))

        dead = [asyncio.ensure_future(call(f"dead{number}.test")) for number in range(40)]
        again = [asyncio.ensure_future(call("dead1.test")) for _ in range(8)]
        try:
            await until_async(lambda: len(names.looked_up) == 40)
            reply = await asyncio.wait_for(call("live.test"), 60)
            assert await read_all(reply) == str(num_bytes).encode()
            # Nor do they keep threads from what takes long in this process.
            assert await asyncio.wait_for(asyncio.to_thread(lambda: "goes on"), 60) == "goes on"
            dead[0].cancel()
            names.gate.set()
            _, *ended = await asyncio.gather(*dead, *again, return_exceptions=True)
            assert all(isinstance(one, UpstreamError) and one.failure.kind == "connect" for one in ended)
            # Those who asked for the same name waited for the same answer.
            assert names.looked_up.count("dead1.test") == 1
        finally:
            names.gate.set()
            await transport.close()
            await runner.cleanup()

    asyncio.run(main())


def test_a_name_is_looked_up_once_at_a_time_whoever_gives_up_meanwhile(names):
    async def main():
        resolver = NameResolver()
        first, second, other = (
            asyncio.ensure_future(resolver.resolve(host, 80)) for host in ("dead.test", "dead.test", "dead2.test")
        )
        await until_async(lambda: len(names.looked_up) == 2)
        first.cancel()
        await asyncio.wait((first,))
        names.gate.set()
        for each in (second, other):
            with pytest.raises(socket.gaierror, match="Temporary failure"):
                await each
        assert (first.cancelled(), names.looked_up, resolver._looking) == (True, ["dead.test", "dead2.test"], {})
        # What failed is asked anew.
        with pytest.raises(socket.gaierror):
            await resolver.resolve("dead.test", 80)
        assert names.looked_up.count("dead.test") == 2

    asyncio.run(main())


def test_what_was_found_is_good_for_a_while_also_what_nobody_waited_for(monkeypatch, names):
    now = [0.0]

    async def main():
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now[0])
        resolver = NameResolver(keep_s=30.0)
        first = asyncio.ensure_future(resolver.resolve("live.test", 80))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait((first,))
        while resolver._looking:
            await asyncio.sleep(0)
        for now[0], looked_up in ((29.9, 1), (30.0, 2), (59.9, 2), (60.0, 3)):
            assert [one["host"] for one in await resolver.resolve("live.test", 80)] == ["127.0.0.1"]
            assert len(names.looked_up) == looked_up
        # Each asked for by itself, and those that are too old are gone.
        await resolver.resolve("live.test", 81)
        now[0] = 90.0
        await resolver.resolve("live.test", 82)
        assert [asked[1] for asked in resolver._found] == [82]
        # What is handed out is nobody else's.
        (await resolver.resolve("live.test", 82)).clear()
        assert len(await resolver.resolve("live.test", 82)) == 1
        # What failed is not kept.
        names.gate.set()
        for count in (1, 2):
            with pytest.raises(socket.gaierror):
                await resolver.resolve("dead.test", 80)
            assert names.looked_up.count("dead.test") == count
        # Who keeps it himself has it looked up each time.
        await NameResolver().resolve("live.test", 82)
        assert names.looked_up.count("live.test") == 6

    asyncio.run(main())


def test_one_that_nobody_waits_for_any_more_keeps_no_loop_from_its_end(names):
    async def main():
        looking = asyncio.ensure_future(NameResolver().resolve("dead.test"))
        await until_async(lambda: names.looked_up)
        assert not looking.done()

    asyncio.run(main())
    assert not names.gate.is_set()


@pytest.mark.parametrize("family", [socket.AF_UNSPEC, socket.AF_INET, socket.AF_INET6])
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1", "fe80::1%lo", "nowhere.invalid"])
def test_it_finds_what_the_client_s_own_finds(host, family):
    async def main():
        found = []
        for resolver in (NameResolver(), ThreadedResolver()):
            try:
                found.append(await resolver.resolve(host, 8080, family))
            except OSError as error:
                found.append((type(error), error.errno))
        assert found[0] == found[1]

    asyncio.run(main())
