"""Peers on real sockets: the same rows as in memory, and nothing a stranger sends does harm."""

import asyncio
import contextlib
import json
import random
import socket

import pytest

from anabranch.errors import DataError, InputError
from anabranch.graph.rank import NONE, Defences, GossipServer, Peer, Row, run_swarm
from anabranch.graph.rank.rows import Ranges
from anabranch.graph.rank.transport import _ending
from paced_time import run_paced
from waiting import until_async


def peer(name, clicks=(), **others):
    made = Peer((), name, **{"explore": 0.0, "F": 1.0, **others})
    for term, item in clicks:
        made.record(term, item)
    return made


def rows(found):
    return {row.key: row for row in found.log.all_rows()}


async def raw(address, data, *, end=True):
    """Send bytes, and read whatever comes until the other side closes."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        writer.write(data)
        if end:
            writer.write_eof()
        return await asyncio.wait_for(reader.read(), 60)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def frame(value):
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return len(body).to_bytes(4, "big") + body


def test_pull_bootstrap_and_push():
    async def run():
        first, second, third = peer("a", [("t", 1), ("t", 2)]), peer("b", [("t", 3)]), peer("c", defences=NONE)
        async with GossipServer(first) as one, GossipServer(second) as two, GossipServer(third) as three:
            assert (await two.pull(one.address)).added == 2
            assert (await two.pull(one.address)).added == 0
            assert first.peers() == ["b"]  # the answerer learns the asker, and where it listens
            assert one.addresses == {"b": two.address}
            assert (await one.pull(one.addresses["b"])).added == 1
            assert rows(first) == rows(second)
            assert (await three.bootstrap(two.address, 0.5)).added == 2
            assert three.addresses == {"b": two.address, "a": one.address}  # told of others
            assert (await three.pull(two.address)).added == 1
            assert rows(third) == rows(first)
            assert await two.push(three.address) == 0
            second.record("t", 9)
            assert await two.push(three.address, third.vector()) == 1
            with pytest.raises(DataError, match="did not ask for"):
                await three.push(one.address)
            assert one.sent_bytes > 100
            assert one.received_bytes > 100

    run_paced(run())


BAD = {
    "no json": frame(b"{"),
    "no text": frame(b"\xff\xfe{}"),
    "deep": frame(b"[" * 100_000),
    "a list": frame([1]),
    "no sender": frame({"type": "pull"}),
    "a bad sender": frame({"type": "pull", "from": "x" * 1000}),
    "a bad vector": frame({"type": "pull", "from": "x", "since": {"a": [3, 1]}}),
    "a vector that is none": frame({"type": "pull", "from": "x", "since": None}),
    "a bad share": frame({"type": "bootstrap", "from": "x", "share": 7}),
    "no share": frame({"type": "bootstrap", "from": "x"}),
    "a part that is none": frame({"type": "pull", "from": "x", "since": {}, "part": 3}),
    "a part of no places": frame({"type": "pull", "from": "x", "since": {}, "part": [["a", 1.5], None]}),
    "a part that ends before it starts": frame(
        {"type": "pull", "from": "x", "since": {}, "part": [["b", 1], ["a", 2]]}
    ),
    "unknown": frame({"type": "delete", "from": "x"}),
    "no type": frame({"from": "x"}),
    "unsolicited": frame({"type": "push", "from": "x", "rows": [["a", 9, "t", 1, "", "", [], [], None, ""]]}),
    "push of nothing": frame({"type": "push", "from": "x", "rows": 3}),
    "too long": (1 << 30).to_bytes(4, "big"),
    "cut off": frame({"type": "pull", "from": "x"})[:-3],
    "half a length": b"\0\0",
    "nothing": b"",
    "another protocol": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
}


def test_strangers_do_no_harm():
    """Each gets an error or is hung up on; the next good request is answered as ever."""

    async def run():
        mine = peer("a", [("t", 1)])
        async with GossipServer(mine, timeout=2.0) as server:
            before = rows(mine)
            for name, data in BAD.items():
                answer = await raw(server.address, data)
                if answer:
                    assert json.loads(answer[4:])["type"] == "error", name
            assert rows(mine) == before
            assert mine.peers() == []
            assert sum(server.errors.values()) == len(BAD)
            async with GossipServer(peer("b")) as other:
                assert (await other.pull(server.address)).added == 1

    run_paced(run())


def test_random_bytes_do_no_harm():
    async def run():
        generator = random.Random(0)
        mine = peer("a", [("t", 1)])
        good = frame({"type": "pull", "from": "x", "at": ["127.0.0.1", 9], "since": {"a": [0, 1]}})
        async with GossipServer(mine, timeout=1.0) as server:
            for _ in range(60):
                data = bytearray(good)
                for _ in range(generator.randrange(1, 5)):
                    data[generator.randrange(4, len(data))] = generator.randrange(256)
                await raw(server.address, bytes(data))
            async with GossipServer(peer("b")) as other:
                assert (await other.pull(server.address)).added == 1

    run_paced(run())


def test_slow_and_many_strangers_are_dropped():
    async def run():
        mine = peer("a", [("t", 1)])
        async with GossipServer(mine, timeout=0.3, max_connections=2) as server:
            idle = [await asyncio.open_connection(*server.address) for _ in range(2)]
            await until_async(lambda: len(server._open) == 2)
            answer = await raw(server.address, frame({"type": "pull", "from": "x", "since": {}}))
            assert "busy" in json.loads(answer[4:])["message"]
            for reader, writer in idle:
                assert await asyncio.wait_for(reader.read(), 60) == b""  # hung up on after the timeout
                writer.close()
            async with GossipServer(peer("b")) as other:
                assert (await other.pull(server.address)).added == 1

    run_paced(run())


LARGE = Defences(max_message_bytes=16 << 20, reply_rows_per_origin=10_000)


def narrow(made):
    """A socket that takes little that is not read."""
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    return made


def test_answers_that_nobody_reads_are_let_go_of():
    async def run():
        mine = peer("a", defences=LARGE)
        for number in range(800):
            mine.record("t", number, ["x" * 120] * 100)
        async with GossipServer(mine, timeout=0.4) as server:
            with narrow(socket.socket()) as stranger:
                stranger.connect(server.address)
                stranger.sendall(frame({"type": "pull", "from": "x", "since": {}}))
                (task,) = await until_async(lambda: server._open)
                await asyncio.wait_for(asyncio.wait([task]), 60)
                assert not server._open
                assert server.errors == {"TimeoutError": 1}
                # Hung up on, with bytes left.
                stranger.settimeout(60)
                heard = 0
                with contextlib.suppress(ConnectionResetError):
                    while part := stranger.recv(1 << 20):
                        heard += len(part)
                assert heard < server.sent_bytes
            async with GossipServer(peer("b", defences=LARGE)) as other:
                assert (await other.pull(server.address)).added == 800

    run_paced(run())


def test_the_last_bytes_are_waited_for_too():
    """A transport asks to pause from 64 KiB on only; what is closed with less left would stay for ever."""

    async def run():
        ours, theirs = socket.socketpair()
        with theirs:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            _, writer = await asyncio.open_connection(sock=ours)

            async def say():
                async with asyncio.timeout(0.2), _ending(writer):
                    writer.write(b"x" * 60_000)
                    await writer.drain()

            with pytest.raises(TimeoutError):
                await say()
            assert writer.transport.get_write_buffer_size() == 0

    run_paced(asyncio.wait_for(run(), 60))


def test_a_question_that_nobody_reads_ends_in_time():
    async def run():
        mine = peer("a", defences=LARGE)
        mine.merge({"from": "x", "rows": [Row("x", 0, "t", 1).to_json()]})
        mine.log.held["x"] = Ranges([0, 1, *range(10**15, 10**15 + 600_000)])
        with narrow(socket.socket()) as deaf:
            deaf.bind(("127.0.0.1", 0))
            deaf.listen(4)
            asker = GossipServer(mine, timeout=0.5)
            with pytest.raises(DataError, match="did not answer within"):
                await asyncio.wait_for(asker.pull(deaf.getsockname()), 60)

    run_paced(run())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (frame({"type": "error", "message": "go away"}), "go away"),
        (frame({"type": "rows", "rows": 3, "from": "x"}), "message has"),
        (frame({"type": "rows", "rows": []}), "message has"),
        (frame(b"nonsense"), "no JSON"),
        ((1 << 30).to_bytes(4, "big"), "too long"),
        (b"", "cannot reach"),
    ],
)
def test_bad_answers_are_errors(answer, message):
    async def run():
        async def serve(reader, writer):
            await reader.read(1)
            writer.write(answer)
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server, GossipServer(peer("a")) as asker:
            with pytest.raises(DataError, match=message):
                await asker.pull(server.sockets[0].getsockname()[:2])
        assert rows(asker.peer) == {}

    run_paced(run())


def test_bad_rows_of_an_answer_are_left_out():
    good = Row("b", 0, "t", 1).to_json()

    async def run():
        async def serve(reader, writer):
            await reader.read(1)
            peers = {
                "c": ["127.0.0.1", 7],
                "d": ["", 7],
                "e": [1, 2],
                "f": ["x", 0],
                "g": None,
                "": ["x", 5],
                "a": ["x", 5],
            }
            writer.write(frame({"type": "rows", "from": "b", "rows": [good, [1], None], "more": False, "peers": peers}))
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        address = server.sockets[0].getsockname()[:2]
        async with server, GossipServer(peer("a")) as asker:
            found = await asker.pull(address)
        assert (found.added, found.refused) == (1, {"malformed": 2})
        assert asker.addresses == {"b": address, "c": ("127.0.0.1", 7)}

    run_paced(run())


def test_nobody_there_and_no_answer():
    async def run():
        async def silent(reader, writer):
            await reader.read()
            writer.close()

        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        address = server.sockets[0].getsockname()[:2]
        asker = GossipServer(peer("a"), timeout=0.2)
        with pytest.raises(DataError, match="did not answer within"):
            await asker.pull(address)
        server.close()
        await server.wait_closed()
        await asyncio.sleep(0.05)
        with pytest.raises(DataError, match="cannot reach"):
            await asker.pull(("127.0.0.1", 1))
        async with GossipServer(peer("b")) as busy:
            with pytest.raises(InputError, match="cannot listen"):
                await GossipServer(peer("c"), port=busy.address[1]).start()

    run_paced(run())
    with pytest.raises(InputError, match="timeout is 0"):
        GossipServer(peer("a"), timeout=0)


def test_a_long_log_comes_in_several_messages():
    async def run():
        limits = Defences(max_message_bytes=1 << 18)
        giver, taker = peer("a", defences=limits), peer("b", defences=limits)
        for number in range(900):
            giver.record("t" * 500, number)
        async with GossipServer(giver) as one, GossipServer(taker) as two:
            added = []
            while not added or added[-1]:
                added.append((await two.pull(one.address)).added)
        assert len(added) > 2
        assert rows(taker) == rows(giver)

    run_paced(run())


def test_a_log_full_of_gaps_is_still_asked_with():
    """Numbers that are left out make a vector longer than a message: it is asked with in parts, and all rows come."""
    limits = Defences(max_message_bytes=1 << 18)

    async def run():
        asker, giver = peer("a", [("t", 1)], defences=limits), peer("b", defences=limits)
        for origin in range(1, 9):
            made = [Row(f"o{origin}", 10**15 + 2 * number, "t", 1).to_json() for number in range(1000)]
            asker.merge({"from": "x", "rows": made})
            giver.merge({"from": "x", "rows": made})
        for name in ("a-first", "o5", "z-last"):
            giver.merge({"from": "x", "rows": [Row(name, 10**15 + 1, "t", 1).to_json()]})
        assert len(json.dumps(asker.vector())) > limits.max_message_bytes
        async with GossipServer(giver) as one, GossipServer(asker) as two:
            assert [(await two.pull(one.address)).added for _ in range(3)] == [2, 1, 0]
            assert rows(asker) == rows(giver) | {("a", 0): asker.log.rows["a"][0]}
            assert [(await one.pull(two.address)).added for _ in range(2)] == [1, 0]
            assert one.errors == two.errors == {}
        pushed = peer("c", defences=Defences(max_message_bytes=1 << 18, pull_only=False))
        for row in asker.log.all_rows():
            pushed.log.add(row)
        async with GossipServer(pushed) as one, GossipServer(peer("d")) as two:
            # The answer holds a vector.
            assert await two.push(one.address) == 0

    run_paced(run())


def test_long_names_of_others_leave_room_for_rows():
    async def run():
        limits = Defences(max_message_bytes=1 << 18)
        giver, taker = peer("a", defences=limits), peer("b")
        for number in range(900):
            giver.record("t" * 500, number)
        async with GossipServer(giver) as one, GossipServer(taker) as two:
            for number in range(64):
                one._note(f"{number}".ljust(128, "\0"), ["\0" * 255, 7])
            one._note("short", ["x", 8])
            assert (await two.pull(one.address)).added > 300
            # The newest first.
            assert two.addresses["short"] == ("x", 8)

    run_paced(run())


def test_sockets_and_memory_end_in_the_same_state():
    """The same exchanges over TCP and by calls give every peer the same rankings."""
    generator = random.Random(3)
    plan = [
        (generator.randrange(5), generator.randrange(5), f"t{generator.randrange(3)}", generator.randrange(6))
        for _ in range(80)
    ]
    here, there = ([peer(f"n{number}") for number in range(5)] for _ in range(2))
    for i, j, term, item in plan:
        here[i].record(term, item)
        if i != j:
            here[i].merge(here[j].make_reply(here[i].vector(), here[i].node_id))

    async def run():
        servers = [await GossipServer(one).start() for one in there]
        for i, j, term, item in plan:
            there[i].record(term, item)
            if i != j:
                await servers[i].pull(servers[j].address)
        for server in servers:
            await server.close()

    run_paced(run())
    for one, other in zip(here, there, strict=True):
        assert rows(one) == rows(other)
        assert [one.rank(f"t{number}") for number in range(3)] == [other.rank(f"t{number}") for number in range(3)]
        assert set(one.peers()) == set(other.peers())


@pytest.mark.slow
def test_several_processes_agree():
    found = run_swarm(6, 5, seed=1)
    assert found["agreed"]
    assert (found["peers"], found["rows"], found["errors"]) == (6, 30, 0)
    assert 30 * 50 < found["largest_log_bytes"] < 30 * 600
    assert found["bytes"] > found["largest_log_bytes"]


def test_a_swarm_needs_peers():
    with pytest.raises(InputError, match="num_peers is 1"):
        run_swarm(1)
