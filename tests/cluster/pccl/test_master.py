"""The master as a process that others talk to: restarted, full, attacked, and what it writes down."""

import json
import logging
import select
import socket
import threading
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from anabranch.cluster.pccl import Communicator, Kicked, Master, MasterLost, PeerLost, Refused, SharedState
from anabranch.cluster.pccl import master as module_of_master
from anabranch.cluster.pccl.addresses import parse_address
from anabranch.cluster.pccl.handshake import Called, call
from anabranch.cluster.pccl.records import waits_for
from anabranch.cluster.pccl.wire import HEADER, VERSION, Kind, Reader, WireError, packed, receive_frame
from anabranch.errors import DataError, InputError
from pccl_peers import Killed, Peer, a_master, together
from waiting import until

QUICK = {"heartbeat_s": 0.1, "dead_s": 30.0, "connect_s": 30.0}


@pytest.fixture(scope="module")
def master():
    with a_master() as found:
        yield found


def connected(address):
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=60)


def joined(address, secret=b"", **hello):
    """A connection that has joined by hand."""
    sock = connected(address)
    said = {"purpose": "join", "group": 0, "pool": 1, "host": "", "port": 1, **hello}
    return sock, call(sock, secret, said, time.monotonic() + 60)


def until_closed(sock):
    """What comes until the other end closes the connection."""
    data = bytearray()
    sock.settimeout(60)
    while True:
        try:
            got = sock.recv(65536)
        except ConnectionError:
            break
        if not got:
            break
        data += got
    return Reader().feed(bytes(data))


def works(address):
    """Whether two peers can still do something there."""
    return together(address, 2, lambda number, peers: peers.all_reduce(torch.ones(2)).world) == [2, 2]


# Hostile ones


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\xff" * 64,
        HEADER.pack(2**31, Kind.HELLO, 0),
        HEADER.pack(5000, Kind.HELLO, 0) + b"x" * 5000,
        packed(Kind.HELLO, {"version": VERSION + 1, "purpose": "join", "nonce": "0" * 32}),
        packed(Kind.HELLO, {"version": VERSION, "purpose": "join", "nonce": ""}),
        packed(Kind.HELLO, {"version": VERSION, "purpose": ["join"], "nonce": "0" * 32}),
        packed(Kind.VOTE, {"req": 1, "what": "join"}),
        HEADER.pack(3, 999, 0) + b"{}x",
        HEADER.pack(2, Kind.HELLO, 2**63) + b"{}",
        HEADER.pack(2000, Kind.HELLO, 0) + b"[" * 2000,
        HEADER.pack(4, Kind.HELLO, 0) + b"null",
        packed(Kind.HELLO, {"version": VERSION, "purpose": "join", "nonce": "0" * 32}) * 2,
    ],
)
def test_strangers_that_talk_nonsense_are_sent_away(master, sent):
    with connected(master.address) as sock:
        sock.sendall(sent)
        assert [frame.kind for frame in until_closed(sock)][-1:] in ([Kind.REFUSED], [])
    assert works(master.address)


@pytest.mark.parametrize(
    "vote",
    [
        {},
        {"req": -1, "what": "pending"},
        {"req": 1, "what": "destroy"},
        {"req": 1, "what": "pending"},
        {"req": 1, "what": "established", "ok": True},
        {"req": 1, "what": "synced", "ok": True},
        {"req": 1, "what": "measured", "rates": {}},
        {"req": 1, "what": "initiate", "tag": 0, "descriptor": {}},
        {"req": 1, "what": "complete", "tag": 0, "seq": 0},
        {"req": 2**70, "what": "join"},
        {"req": 1, "what": ["join"]},
    ],
    ids=str,
)
def test_a_peer_that_votes_for_what_it_may_not_is_dropped_alone(master, vote):
    with Communicator(master.address) as honest:
        sock, _ = joined(master.address)
        with sock:
            sock.sendall(packed(Kind.VOTE, vote))
            frames = until_closed(sock)
        assert frames[-1].kind == Kind.KICK
        assert "illegal vote" in frames[-1].body["why"]
        assert honest.all_reduce(torch.ones(1)).alone


@pytest.mark.parametrize(
    "state",
    [
        {"revision": 1, "strategy": "mine", "keys": []},
        {"revision": -1, "strategy": "send_only", "keys": []},
        {"revision": 1, "strategy": "send_only", "keys": [["w"]]},
        {"revision": 1, "strategy": "send_only", "keys": [["w", "float32", [-1], "x"]]},
        {"revision": 1, "strategy": "send_only", "keys": [["w", 3, [1], "x"]]},
        {"revision": 1, "strategy": "send_only", "keys": "all"},
    ],
    ids=str,
)
def test_a_member_that_shares_what_is_no_state_is_dropped(state):
    with a_master() as alone, Communicator(alone.address) as peers, pytest.raises(Kicked, match="illegal vote"):
        peers._vote({"what": "sync", **state})


def test_who_does_not_know_the_secret_is_not_let_in_and_learns_nothing():
    with a_master(secret="river") as closed:
        for wrong in ("delta", ""):
            with pytest.raises(Refused, match="does not know the secret"):
                Communicator(closed.address, secret=wrong).connect()
        # One that does not check the master is refused by it.
        with connected(closed.address) as sock:
            sock.sendall(packed(Kind.HELLO, {"version": VERSION, "purpose": "join", "nonce": "0" * 32}))
            challenge = receive_frame(sock, time.monotonic() + 60)
            # What the master has shown cannot be shown to it.
            sock.sendall(packed(Kind.PROOF, {"proof": challenge.body["proof"]}))
            assert until_closed(sock)[-1].body == {"why": "another secret"}
        assert not closed.state.members
        found = together(closed.address, 2, lambda number, peers: peers.all_reduce(torch.ones(1)).world, secret="river")
        assert found == [2, 2]


def test_a_false_master_learns_nothing():
    """A peer proves itself only to who has proved that it knows the secret."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        heard = []

        def play():
            sock, _ = server.accept()
            with sock:
                heard.append(receive_frame(sock, time.monotonic() + 60))
                sock.sendall(packed(Kind.CHALLENGE, {"nonce": "0" * 32, "proof": "0" * 64}))
                heard.extend(until_closed(sock))

        thread = threading.Thread(target=play)
        thread.start()
        with pytest.raises(Refused):
            Communicator(f"127.0.0.1:{server.getsockname()[1]}", secret="river").connect()
        thread.join(60)
    assert [frame.kind for frame in heard] == [Kind.HELLO]
    assert "river" not in str(heard)


def test_peers_let_in_only_those_of_their_run(master):
    with Communicator(master.address) as peers:
        for key in (b"", b"|", b"|" + b"0" * 32):
            with connected(f"127.0.0.1:{peers._listener.port}") as sock, pytest.raises((Refused, WireError, OSError)):
                call(sock, key, {"purpose": "state", "names": [], "revision": 0, "idle_s": 1}, time.monotonic() + 60)
        key = b"|" + peers.run.encode()
        for hello in (
            {"purpose": "link", "epoch": "x", "from": 0, "index": 0},
            {"purpose": "link", "epoch": 10**9, "from": 0, "index": 64},
            {"purpose": "rate", "ms": 10**9},
            {"purpose": "format", "disk": "c"},
        ):
            with connected(f"127.0.0.1:{peers._listener.port}") as sock, pytest.raises((Refused, WireError, OSError)):
                call(sock, key, {"run": peers.run, **hello}, time.monotonic() + 60)
        assert peers.all_reduce(torch.ones(1)).alone


def test_half_a_message_and_silence_hold_nobody_up(monkeypatch):
    monkeypatch.setattr(module_of_master, "HANDSHAKE_S", 0.5)
    with a_master(**QUICK) as quick:
        # Half open: it joins, and then nothing is heard of it.
        silent, _ = joined(quick.address)
        half = connected(quick.address)
        half.sendall(HEADER.pack(100, Kind.HELLO, 0) + b"{")
        with silent, half, Communicator(quick.address) as peers:
            for line in list(quick._lines.values()):
                # For longer than anybody may be silent.
                line.heard -= 100.0 * (line.peer not in (None, peers.peer))
            assert until_closed(silent)[-1].kind == Kind.KICK
            assert until_closed(half) == []
            assert peers.all_reduce(torch.ones(1)).alone
        assert works(quick.address)


def test_a_master_that_stands_still_in_the_midst_of_a_turn_misses_nobody(monkeypatch):
    """It looked for what peers had sent, stood still, as its machine or a slow disk may, and took its own silence for theirs."""
    stood = [0.0]
    with a_master() as slow, Communicator(slow.address) as peers:
        monkeypatch.setattr(module_of_master, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + stood[0]))
        served, has_stood = slow._serve, threading.Event()

        def serve(key, events):
            served(key, events)
            if not has_stood.is_set():
                stood[0] += 1000.0
                # Meanwhile signs of life have come, which are not read yet.
                for line in list(slow._lines.values()):
                    assert select.select([line.sock], [], [], 60)[0]
                has_stood.set()

        monkeypatch.setattr(slow, "_serve", serve)
        assert has_stood.wait(60)
        assert peers.all_reduce(torch.ones(1)).alone


def test_more_peers_than_it_takes():
    with a_master(most_peers=1) as small, Communicator(small.address), pytest.raises(Refused, match="no more go"):
        Communicator(small.address).connect()


def test_more_strangers_than_it_takes(master):
    socks = [connected(master.address) for _ in range(80)]
    # The rest are closed at once.
    assert until_closed(socks[-1]) == []
    for sock in socks:
        sock.close()
    assert works(master.address)


def test_a_peer_that_takes_nothing_is_dropped(master, monkeypatch):
    monkeypatch.setattr(module_of_master, "_MOST_UNSENT", 1 << 16)
    sock, _ = joined(master.address)
    with sock, Communicator(master.address) as peers:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        beat = packed(Kind.BEAT) * 20_000
        with pytest.raises(ConnectionError):
            deque((sock.sendall(beat) for _ in range(1000)), maxlen=0)
        assert peers.all_reduce(torch.ones(1)).alone


# Restarts


def restarted(old, journal):
    """Another master in the place of one that was killed."""
    address = old.address
    old.stop()
    return Master(address, journal=journal, **QUICK).start()


@pytest.mark.parametrize("moment", ["initiate", "complete", "ring", "sync", "synced", "pending", "accept"])
def test_the_master_is_killed_at_any_moment_and_another_goes_on(moment, tmp_path):
    journal = tmp_path / "run.journal"
    masters = [Master("127.0.0.1:0", journal=journal, **QUICK).start()]
    once = threading.Lock()

    def kill(name):
        if name == moment and number_of_kills and once.acquire(blocking=False):
            masters.append(restarted(masters[-1], journal))

    number_of_kills = []

    def work(number, peers):
        state = SharedState({"w": torch.zeros(5)})
        number_of_kills.append(1)
        for _ in range(4):
            peers.are_peers_pending()
            peers.update_topology()
            state.revision += 1
            peers.sync_shared_state(state)
            value = torch.ones(5)
            assert peers.all_reduce(value).world == 3
            state.tensors["w"] += value
        return state.digest(), peers.peer

    try:
        peers = [Peer(masters[0].address, work, number, 3, before=kill) for number in range(3)]
        for peer in peers:
            peer.wait()
        assert [peer.error for peer in peers] == [None] * 3
        assert len({peer.value[0] for peer in peers}) == 1
        assert len(masters) == 2
    finally:
        masters[-1].stop()


def test_a_peer_that_dies_while_there_is_no_master_is_missed_by_the_next(tmp_path):
    journal = tmp_path / "run.journal"
    # It is waited for twice as long as one may be silent.
    times = QUICK | {"dead_s": 10.0}
    first = Master("127.0.0.1:0", journal=journal, **times).start()
    masters, gone = [first], threading.Event()

    def work(number, peers):
        peers.all_reduce(torch.ones(1))
        if number == 1:
            address = masters[0].address
            masters[0].stop()
            gone.set()
            peers._die()
            masters.append(Master(address, journal=journal, **times).start())
            raise Killed
        assert gone.wait(60)
        value = torch.full((3,), 2.0)
        return peers.all_reduce(value).world, value.tolist()

    try:
        peers = [Peer(first.address, work, number, 3) for number in range(3)]
        found = [peer.wait() for peer in peers]
        assert [found[number].value for number in (0, 2)] == [(2, [4.0] * 3)] * 2, [peer.error for peer in found]
    finally:
        masters[-1].stop()


def test_without_a_journal_the_run_is_over_and_peers_are_told():
    first = Master("127.0.0.1:0", **QUICK).start()
    address = first.address
    with Communicator(address, master_wait_s=60.0) as peers:
        first.stop()
        with Master(address, **QUICK), pytest.raises(Kicked, match="not in this run"):
            peers.all_reduce(torch.ones(1))


def test_a_master_that_serves_already_is_begun_once():
    """``with Master(...).start()`` had two threads answer its peers: one wrote what the other was sending."""
    with Master("127.0.0.1:0", **QUICK).start() as master:
        thread = master._thread
        assert master.start()._thread is thread


@pytest.mark.parametrize("how", ["wait_s", "gives_up"])
def test_who_gives_up_while_the_master_is_away_is_told_when_it_is_back(tmp_path, how):
    """What it withdraws then goes to no connection."""
    is_over = threading.Event()
    limits = {} if how == "wait_s" else {"gives_up": is_over.is_set}
    journal, told, limit_s = tmp_path / "j", [], 2.0 if how == "wait_s" else None
    old = Master("127.0.0.1:0", journal=journal, heartbeat_s=0.1, dead_s=30.0).start()
    with Communicator(old.address) as first:
        late = Peer(old.address, lambda _, mine: told.append(waits(mine, limit_s)), 1, master_wait_s=60.0, **limits)

        def is_in():
            if first.world_size < 2:
                first.update_topology()
            return first.world_size == 2

        until(is_in)
        until(lambda: any(waits_for(member, "sync") for member in old.state.members.values()))
        old.stop()
        is_over.set()
        # It has taken back what it asked for.
        until(lambda: [vote for vote in list(late.communicator._line._open.values()) if vote.is_withdrawn])
        with restarted(old, journal):
            late.wait()
            assert told == [False]


def waits(peers, limit_s):
    """Whether what ended this peer's wait for others may be tried again."""
    peers._wait_s = limit_s
    with pytest.raises(PeerLost) as told:
        peers.sync_shared_state(SharedState({"x": torch.ones(1)}, revision=1))
    return told.value.retryable


def test_a_master_that_does_not_come_back_is_given_up():
    first = Master("127.0.0.1:0", **QUICK).start()
    with Communicator(first.address, master_wait_s=0.5) as peers:
        first.stop()
        value = torch.ones(3)
        with pytest.raises(MasterLost, match="is gone"):
            peers.all_reduce(value)
        with pytest.raises(MasterLost):
            peers.update_topology()
        assert value.tolist() == [1.0] * 3
    with pytest.raises(MasterLost, match="no master at"):
        Communicator(first.address, master_wait_s=0.3).connect()


def test_a_disk_that_is_full_ends_no_run(tmp_path, monkeypatch, caplog):
    journal = tmp_path / "run.journal"
    with a_master(journal=journal) as full, Communicator(full.address) as peers:
        peers.all_reduce(torch.ones(1))
        assert journal.exists()
        written = Path.write_text

        def fails(path, text, *rest, **more):
            if "journal" in path.name:
                raise OSError(28, "No space left on device")
            return written(path, text, *rest, **more)

        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            patch.setattr(Path, "write_text", fails)
            assert peers.all_reduce(torch.ones(1)).alone
            assert peers.all_reduce(torch.ones(1)).alone
            assert not journal.exists()
        # What is no longer so is not told to a later master; and it is said once.
        assert caplog.text.count("No space left") == 1
        peers.all_reduce(torch.ones(1))
        assert json.loads(journal.read_text())["run"] == peers.run


def test_a_journal_of_another_version_is_called_so(tmp_path):
    (tmp_path / "j").write_text('{"schema": 2}')
    with pytest.raises(DataError, match="has schema 2, and this version reads 3"):
        Master("127.0.0.1:0", journal=tmp_path / "j")


@pytest.mark.parametrize("text", ["", "no", "[1]", "{}", '{"schema": "1"}', '{"schema": 3}', "[" * 100_000])
def test_a_journal_that_is_none_is_told(tmp_path, text):
    (tmp_path / "j").write_text(text)
    with pytest.raises(DataError, match="journal"):
        Master("127.0.0.1:0", journal=tmp_path / "j")


def test_one_journal_has_one_master(tmp_path):
    with a_master(journal=tmp_path / "j"), pytest.raises(DataError, match="another master"):
        Master("127.0.0.1:0", journal=tmp_path / "j")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("10.0.0.1:5", ("10.0.0.1", 5)),
        ("host", ("host", 7)),
        (":5", ("", 5)),
        ("[::1]:5", ("::1", 5)),
        ("[::1]", ("::1", 7)),
        ("::1", None),
        ("host:", None),
        ("host:x", None),
        ("host:99999", None),
        ("", None),
        ("a b:5", None),
        ("x" * 300 + ":5", None),
    ],
)
def test_addresses(text, found):
    if found is None:
        with pytest.raises(InputError, match="address"):
            parse_address(text, 7)
    else:
        assert parse_address(text, 7) == found


def test_over_ipv6():
    try:
        alone = Master("[::1]:0", **QUICK)
    except InputError:
        pytest.skip("this machine has no IPv6")
    with alone:
        assert alone.address.startswith("[::1]:")
        assert together(
            alone.address, 2, lambda number, peers: peers.all_reduce(torch.ones(1)).world, listen="[::1]:0"
        ) == [2, 2]


def test_an_address_that_is_taken_is_told(master):
    with pytest.raises(InputError, match="cannot listen"):
        Master(master.address)


def test_a_false_master_s_answers_are_no_way_to_hang():
    """One that answers a vote with what no master says: the peer is told, and does not wait."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def play():
            sock, _ = server.accept()
            called = Called(b"")
            with sock:
                while called.hello is None:
                    sock.sendall(called.answer(receive_frame(sock, time.monotonic() + 60)))
                told = {"peer": 0, "token": "t", "run": "r", "heartbeat_s": 1.0, "dead_s": 60.0, "connect_s": 60.0}
                sock.sendall(packed(Kind.WELCOME, told))
                vote = receive_frame(sock, time.monotonic() + 60)
                # A collective, and nothing of what belongs to one.
                sock.sendall(packed(Kind.REPLY, {"req": vote.body["req"], "seq": "first"}))
                until_closed(sock)

        thread = threading.Thread(target=play)
        thread.start()
        with pytest.raises(MasterLost, match="says what no master does"):
            Communicator(f"127.0.0.1:{server.getsockname()[1]}", secret="", master_wait_s=2.0).connect()
        thread.join(60)


def test_an_answer_that_is_too_long_ends_its_peer_alone():
    def go_on(peers):
        while True:
            peers.all_reduce(torch.ones(1))

    with a_master() as alone:
        with Communicator(alone.address) as peers:
            # What a plan may come to whose votes were just short enough.
            alone.state._outbox.append((peers.peer, "reply", {"req": 1, "fetch": "x" * (1 << 20)}))
            with pytest.raises(Kicked):
                go_on(peers)
        assert works(alone.address)


def test_a_fault_of_ours_costs_one_connection(master, monkeypatch, caplog):
    with Communicator(master.address) as peers:
        meant = master.state.vote

        def faulty(peer, body, now):
            if body.get("what") == "join" and body.get("faulty"):
                raise ZeroDivisionError("a fault")
            meant(peer, body, now)

        monkeypatch.setattr(master.state, "vote", faulty)
        sock, _ = joined(master.address)
        with sock, caplog.at_level(logging.ERROR):
            sock.sendall(packed(Kind.VOTE, {"what": "join", "req": 1, "faulty": True}))
            assert until_closed(sock) == []
        assert "a fault inside of the master" in caplog.text
        assert peers.all_reduce(torch.ones(1)).alone


@pytest.mark.parametrize("name", ["lost", "tick", "solved", "take"])
def test_nor_does_any_other_fault_of_ours_end_the_loop(master, monkeypatch, caplog, name):
    meant, faults = getattr(master.state, name), []

    def faulty(*given, **named):
        if not faults:
            faults.append(name)
            raise ZeroDivisionError("a fault")
        return meant(*given, **named)

    with caplog.at_level(logging.ERROR):
        monkeypatch.setattr(master.state, name, faulty)
        if name == "solved":
            master._done.append(({0: [0]}, True))
            master._poke()
        if name == "lost":
            sock, _ = joined(master.address)
            sock.close()
        until(lambda: faults)
    assert faults
    monkeypatch.undo()
    assert works(master.address)
    assert "a fault inside of the master" in caplog.text


def test_every_address_is_of_both_kinds():
    with Master(":0", secret="") as everywhere:
        port = everywhere.address.rpartition(":")[2]
        kinds = {"127.0.0.1": "127.0.0.1"} | ({"[::1]": "::1"} if everywhere.address.startswith("[") else {})
        for host, told in kinds.items():

            def seen(number, peers):
                assert peers.all_reduce(torch.ones(1)).world == 2
                return everywhere.state.members[peers.peer].host

            # Who calls by IPv4 is told of as such.
            assert together(f"{host}:{port}", 2, seen) == [told] * 2


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"dead_s": 0}, "dead_s is 0"),
        ({"dead_s": float("nan")}, "dead_s is nan"),
        ({"heartbeat_s": -1}, "heartbeat_s is -1"),
        ({"connect_s": "1"}, "connect_s is '1'"),
        ({"most_peers": 0}, "most_peers is 0"),
    ],
)
def test_settings_that_are_none_are_told(given, told):
    with pytest.raises(InputError, match=told):
        Master("127.0.0.1:0", **given)
