"""What others send and say they are: whatever it is, the master lives, and neighbours go on."""

import json
import math
import random
import socket
import stat
import struct
import threading
import time

import pytest
import torch

from anabranch.cluster.pccl import Communicator, Kicked, Refused, SharedState, TopologyFailed, addresses, bandwidth
from anabranch.cluster.pccl.addresses import is_host, parse_address
from anabranch.cluster.pccl.handshake import Called, call, proof
from anabranch.cluster.pccl.journal import to_dict
from anabranch.cluster.pccl.links import LinkError, Listener, Place, call_peer
from anabranch.cluster.pccl.state import MasterState
from anabranch.cluster.pccl.wire import HEADER, VERSION, Kind, Reader, WireError, packed
from anabranch.errors import InputError
from pccl_peers import Peer, a_master, together

NAMES = ("join", "pending", "accept", "optimize", "measured", "established", "sync", "synced", "initiate", "complete")
FIELDS = {
    "low": (0, 1, 2, 3),
    "tag": (0, 1, 2, 9),
    "seq": (0, 1),
    "descriptor": ({}, {"count": 1}, {"count": [1]}, {"count": 1, "world": 3}, {"count": 1, "world": 99}),
    "revision": (0, 1, 2),
    "strategy": ("enforce_popular", "receive_only", "send_only"),
    "keys": (
        [["w", "float32", [1], "h"]], [["w", "float32", [1], "h"]] * 2, [], [["w", "x", [-1], "h"]], [["\ud800", "x", [1], "h"]],
    ),
    "rates": ({}, {"0": 1.0}, {"1": math.inf}, {"\u0661": 1}, {"9" * 30: 1}),
    "ok": (True, False),
    "why": ("no", "x" * 1000),
    "accused": (0, 1, 2, 3),
    "aborted": (True, False),
    "awaits": (0, 1, 5, 2**20),
    "progress": (0, 1, 2**60),
    "is_default": (True, False),
    "more": ("anything",),
}  # fmt: skip
WORDS = ("", "w", "\ud800", "\0", "0", "\u0661", "x" * 300)
NUMBERS = (0, 1, 2, -1, 2**62, 2**70, 0.5, math.nan, math.inf, None, True, False)


def drawn(generator, depth=4):
    """Any value of JSON."""
    kind = generator.randrange(4 if depth else 2)
    if kind == 0:
        return generator.choice(NUMBERS)
    if kind == 1:
        return generator.choice(WORDS)
    inner = [drawn(generator, depth - 1) for _ in range(generator.randrange(4))]
    return inner if kind == 2 else {generator.choice(WORDS): value for value in inner}


def a_vote(generator):
    """Of what peers say in most of its parts, so that it gets past the first that is looked at."""
    vote = {"what": generator.choice(NAMES), "req": generator.randrange(1, 7)}
    for name, values in FIELDS.items():
        if generator.random() < 0.8:
            vote[name] = generator.choice(values) if generator.random() < 0.9 else drawn(generator)
    return vote


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def written(body):
    """As a hostile one writes it, who is not bound by what `packed` refuses."""
    text = json.dumps(body).encode()
    return HEADER.pack(len(text), Kind.VOTE, 0) + text


def said(state, peer, body, *, withdraws=False, hear=None):
    """As the master takes it; its journal is written after it, and every answer goes over a wire."""
    try:
        frames = Reader().feed(written(body))
    except WireError as error:
        state.lost(peer, str(error), 0.0)
        frames = []
    for frame in frames:
        state.vote(peer, frame.body, 0.0)
        if withdraws:
            state.withdraw(peer, frame.body, 0.0)
    for rings in state.jobs():
        state.solved(rings, is_late=False, now=0.0)
    if hear is not None:
        hear()
    return state.take(), json.dumps(to_dict(state)), state.dropped()


@pytest.mark.parametrize("seed", range(4))
def test_whatever_one_peer_votes_the_others_go_on(seed):
    for one in range(40):
        generator = random.Random(1000 * seed + one)
        votes = [a_vote(generator) for _ in range(6)]
        check_one_hostile_peer(votes, *(generator.random() < chance for chance in (0.7, 0.5, 0.3)))


def check_one_hostile_peer(votes, is_member, others_wait, withdraws):
    state = MasterState()
    honest = [state.join(group=0, host="h", port=1, pool=1) for _ in range(2)]
    hostile = state.join(group=0, host="h", port=1, pool=1)
    reqs = dict.fromkeys(honest, 0)

    def ask(peer, what, **more):
        reqs[peer] += 1
        told, _, _ = said(state, peer, {"what": what, "req": reqs[peer], "low": reqs[peer], **more})
        return told

    in_it = [*honest, hostile] if is_member else honest
    ask(honest[0], "join")
    for peer in in_it[1:]:
        state.vote(peer, {"what": "join", "req": 0}, 0.0)
    ask(honest[0], "established", ok=True)
    ask(honest[0], "accept")
    for peer in in_it:
        state.vote(peer, {"what": "established", "ok": True, "req": 10}, 0.0)
        reqs[peer] = 10
    assert [member.id for member in state.accepted] == in_it
    state.take()
    if others_wait:
        ask(honest[0], "pending")
    for vote in votes:
        said(state, hostile, vote, withdraws=withdraws)
    state.lost(hostile, "it left", 0.0)
    state.tick(1e9)
    assert set(honest) <= set(state.members)
    state.take()
    # Whatever it was told of the hostile one's votes, what is asked now is answered.
    for peer in honest:
        if state.members[peer].vote is None:
            ask(peer, "pending")
    assert all(state.members[peer].vote is None for peer in honest)
    for peer in honest:
        told = ask(peer, "initiate", tag=9, descriptor={"count": 1})
    assert len(told) == 2
    seq = told[0][2]["seq"]
    for peer in honest:
        told = ask(peer, "complete", tag=9, seq=seq, aborted=False)
    assert [body["aborted"] for _, _, body in told] == [False, False]


def rounds(count):
    """What a peer of ours does, as votes and their answers; the same on all."""
    done = 0
    while done < count:
        reply = yield {"what": "pending"}
        if reply["pending"]:
            reply = yield {"what": "accept"}
            if reply.get("establish"):
                reply = yield {"what": "established", "ok": True}
            if reply.get("error") == "topology":
                continue
        keys = [["w", "float32", [1], f"{done}"]]
        strategy = "enforce_popular" if done else "receive_only"
        yield {"what": "sync", "revision": done + 1, "strategy": strategy, "is_default": True, "keys": keys}
        reply = yield {"what": "synced", "ok": True}
        if "error" in reply:
            continue
        aborted = True
        while aborted:
            reply = yield {"what": "initiate", "tag": 1, "descriptor": {"count": 1}}
            aborted = (yield {"what": "complete", "tag": 1, "seq": reply["seq"], "aborted": False})["aborted"]
        done += 1


class Run:
    """Peers of ours, who vote when it is their turn, and the answers that they were given."""

    def __init__(self, count):
        self.state = MasterState()
        self.peers = [self.state.join(group=0, host="h", port=1, pool=1) for _ in range(2)]
        for peer in self.peers:
            self.state.vote(peer, {"what": "join", "req": 1}, 0.0)
        self.state.vote(self.peers[0], {"what": "established", "ok": True, "req": 2}, 0.0)
        self.state.vote(self.peers[0], {"what": "accept", "req": 3}, 0.0)
        for peer in self.peers:
            self.state.vote(peer, {"what": "established", "ok": True, "req": 4}, 0.0)
        self.programs = {peer: rounds(count) for peer in self.peers}
        self.reqs = dict.fromkeys(self.peers, 10)
        self.turns = dict.fromkeys(self.peers)
        self.heard = set()
        self.hear()

    def hear(self):
        for peer, kind, body in self.state.take():
            assert kind != "kick" or peer not in self.peers, body
            if peer in self.reqs and kind == "reply" and body["req"] == self.reqs[peer]:
                self.turns[peer] = body
                self.heard.add(body.get("error"))
                assert body.get("error") in (None, "lost", "topology"), body

    def go(self, peer):
        """Vote, if it is this peer's turn. False where it waits or is done."""
        if peer not in self.turns:
            return False
        reply = self.turns.pop(peer)
        try:
            vote = self.programs[peer].send(reply)
        except StopIteration:
            del self.programs[peer]
            return False
        self.reqs[peer] += 1
        self.state.vote(peer, {**vote, "req": self.reqs[peer], "low": self.reqs[peer]}, 0.0)
        for found in self.state.jobs():
            self.state.solved(found, is_late=False, now=0.0)
        self.hear()
        return True

    def go_on(self, until=lambda: False):
        """Until all wait for somebody else."""
        while not until() and sum(self.go(peer) for peer in self.peers):
            pass


def as_others(state, peer):
    """What fits to what another waits for; None where none does."""
    for other in state.accepted:
        if other.id != peer and other.initiates:
            return {"what": "initiate", "tag": 1, "descriptor": {"count": 1}}
        if other.id != peer and other.vote is not None and other.vote["what"] == "sync":
            strategy = {"strategy": "receive_only", "is_default": True}
            return {"what": "sync", "revision": 0, **strategy, "keys": [["w", "float32", [1], "x"]]}
        if other.id != peer and other.vote is not None:
            return {"what": other.vote["what"]}
    return None


def that_goes(state, peer, generator):
    """What a peer may vote as it stands, of any program and with any fault; None where it waits."""
    member = state.members[peer]
    running = next((one for one in state.running.values() if peer in one.participants), None)
    fault = {"ok": generator.random() < 0.5, "aborted": generator.random() < 0.7, "accused": generator.randrange(4)}
    if generator.random() < 0.3:
        del fault["accused"]
    if member.vote is not None:
        return None
    if state.forming is not None and peer in state.forming.participants:
        return {"what": "established", **fault, **({} if member.is_accepted else {"ok": generator.random() < 0.9})}
    if 0 in state.syncing and peer in state.syncing[0].participants:
        return {"what": "synced", **fault}
    if running is not None and peer not in running.votes:
        return {"what": "complete", "tag": running.tag, "seq": running.seq, **fault}
    if not member.is_accepted or running is not None or member.initiates:
        return None
    if generator.random() < 0.7:
        return as_others(state, peer)
    counts, tag = ({"count": 1}, {"count": 2}, {"count": 1, "world": 5}), generator.choice((1, 1, 2))
    form, digest = generator.choice(([1], [1], [2])), str(generator.randrange(6))
    last = state.revision.get(0, 0)
    return generator.choice(
        (
            {"what": "pending", "awaits": generator.choice((0, 9))},
            {"what": "accept", "awaits": generator.choice((0, 9))},
            {"what": "optimize"},
            {"what": "initiate", "tag": tag, "descriptor": generator.choice(counts)},
            {
                "what": "sync",
                "revision": generator.choice((0, 1, last, last + 2)),
                "strategy": generator.choice(FIELDS["strategy"]),
                "is_default": generator.random() < 0.5,
                "keys": [["w", "float32", form, digest]],
            },
        )
    )


@pytest.mark.parametrize("seed", range(4))
def test_whatever_a_newcomer_votes_those_who_are_known_hear_of_no_fault_of_theirs(seed):
    """It may be lost to them, or the way to it; they agree with each other, and go on."""
    came = 0
    for one in range(40):
        generator = random.Random(1000 * seed + one)
        run = Run(8)
        run.go_on(lambda run=run: run.state.revision.get(0, 0) == 2)
        assert all(run.state.members[peer].proof for peer in run.peers)
        hostile = run.state.join(group=0, host="h", port=1, pool=1)
        run.state.vote(hostile, {"what": "join", "req": 1}, 0.0)
        run.hear()
        for req in range(2, 80):
            if hostile in run.state.members and run.state.members[hostile].proof == 2:
                # It is one of them now.
                break
            if generator.random() < 0.5 and hostile in run.state.members:
                vote = a_vote(generator) if generator.random() < 0.02 else that_goes(run.state, hostile, generator)
                came += run.state.members[hostile].is_accepted and vote is not None
                if vote is not None:
                    said(run.state, hostile, vote | {"req": req, "low": req}, hear=run.hear)
            else:
                run.go(generator.choice(run.peers))
        run.state.lost(hostile, "it left", 0.0)
        run.hear()
        run.go_on()
        assert not run.programs, run.programs
        assert run.heard <= {None, "lost", "topology"}
        assert [member.id for member in run.state.accepted] == run.peers
    assert came > 40


@pytest.mark.parametrize("depth", [9, 700, 5000])
@pytest.mark.parametrize("what", ["join", "initiate"])
def test_a_vote_of_lists_within_lists_ends_its_peer_alone(tmp_path, depth, what):
    """The journal once copied what peers had put into their votes, and ran out of stack."""
    with a_master(journal=tmp_path / "j") as master, Communicator(master.address) as honest:
        sock = socket.create_connection(parse_address(master.address, 0), timeout=10)
        with sock:
            hello = {"purpose": "join", "group": 1, "pool": 1, "host": "", "port": 1}
            call(sock, b"", hello, time.monotonic() + 10)
            deep = f'{{"what": "{what}", "req": 1, "tag": 1, "descriptor": {{}}, "why": {"[" * depth}{"]" * depth}}}'.encode()
            sock.sendall(HEADER.pack(len(deep), Kind.VOTE, 0) + deep)
            data = bytearray()
            while got := sock.recv(65536):
                data += got
        assert Reader().feed(bytes(data))[-1].kind == Kind.KICK
        assert honest.all_reduce(torch.ones(1)).alone
        assert not honest.are_peers_pending()


def test_what_a_vote_says_beside_what_is_asked_is_not_held():
    state = MasterState()
    peer = state.join(group=0, host="h", port=1, pool=1)
    # Not over a wire, which refuses it.
    state.vote(peer, {"what": "join", "req": 1, "more": nested(5000)}, 0.0)
    state.vote(peer, {"what": "established", "ok": True, "req": 2, "why": nested(5000), "more": nested(5000)}, 0.0)
    assert json.dumps(to_dict(state))
    assert [member.id for member in state.accepted] == [peer]


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("fe80::1%eth0", True),
        ("node-3.example.org.", True),
        ("münchen.example", True),
        ("a..b", False),
        (".a", False),
        ("x" * 64, False),
        ("ü" * 64, False),
        ("a\0b", False),
        ("a b", False),
        ("a\nb", False),
        ("\ud800", False),
        (".".join(["abc"] * 80), False),
        ("", False),
    ],
)
def test_what_is_a_host(text, is_one):
    assert is_host(text) == is_one
    if not is_one and text:
        for made in (
            lambda: parse_address(f"{text}:5", 1),
            lambda: Communicator(f"{text}:1"),
            lambda: Communicator(advertise=text),
        ):
            with pytest.raises(InputError, match="address"):
                made()
    if not is_one:
        with pytest.raises(LinkError) as told:
            call_peer(Place(3, text, 1, 1), b"", "run", {"purpose": "link"}, time.monotonic() + 1.0)
        assert told.value.accused == 3


@pytest.mark.parametrize("port", [-1, 65_536, 2**40])
def test_a_port_that_is_none_is_told_as_a_link(port):
    with pytest.raises(LinkError):
        call_peer(Place(3, "127.0.0.1", port, 1), b"", "run", {"purpose": "link"}, time.monotonic() + 1.0)


def test_a_newcomer_whose_host_is_none_is_not_let_in_and_nobody_else_notices():
    """Who called it once ended with what `socket` raises of a name that is none."""
    with a_master() as master, Communicator(master.address, connect_s=0.5) as honest:
        for host in ("a..b", "x" * 64, "a\0b", "a b", "ü" * 70):
            sock = socket.create_connection(parse_address(master.address, 0), timeout=10)
            hello = {"purpose": "join", "group": 0, "pool": 1, "host": host, "port": 1}
            with sock, pytest.raises(Refused, match="no host"):
                call(sock, b"", hello, time.monotonic() + 10)
        late = Peer(master.address, lambda number, mine: None, advertise="no.such.name.invalid:1", connect_s=0.5)
        lost = 0
        while not late.error:
            try:
                honest.admit()
            except TopologyFailed:
                lost += 1
            assert honest.all_reduce(torch.ones(1)).alone
        assert lost == 2
        assert isinstance(late.wait().error, Kicked)


def held_up(monkeypatch, seconds):
    """Names that end in ``.slow`` are looked up for so long, and then not found."""
    real = socket.getaddrinfo

    def look_up(host, *rest, **more):
        if str(host).endswith(".slow"):
            time.sleep(seconds)
            raise socket.gaierror(-3, "Temporary failure in name resolution")
        return real(host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


def test_a_name_that_is_not_resolved_takes_no_longer_than_there_is_time(monkeypatch):
    held_up(monkeypatch, 5.0)
    began = time.monotonic()
    with pytest.raises(LinkError, match="was not resolved in time") as told:
        call_peer(Place(3, "a.slow", 1, 1), b"", "run", {"purpose": "link"}, began + 0.3)
    assert told.value.accused == 3
    assert time.monotonic() - began < 4.0


def test_names_that_are_looked_up_at_a_time_are_bounded(monkeypatch):
    """Each has a thread until the resolver answers."""
    held_up(monkeypatch, 1.0)
    monkeypatch.setattr(addresses, "_lookups", threading.Semaphore(2))
    for name in ("a.slow", "b.slow"):
        with pytest.raises(TimeoutError):
            addresses.connected(name, 1, time.monotonic() + 0.01)
    with pytest.raises(OSError, match="being looked up"):
        addresses.connected("c.slow", 1, time.monotonic() + 0.01)


def test_a_name_of_many_addresses_takes_no_longer_than_there_is_time(monkeypatch):
    """Each once had five seconds of its own."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", server.getsockname())] * 4
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        tried = []

        def connect(self, address):
            tried.append(self.gettimeout())
            time.sleep(self.gettimeout())
            raise TimeoutError("timed out")

        silent = type("Silent", (socket.socket,), {"connect": connect})
        with monkeypatch.context() as patched:
            patched.setattr(socket, "socket", silent)
            began = time.monotonic()
            with pytest.raises(TimeoutError):
                addresses.connected("many.example", 1, began + 0.4)
            took = time.monotonic() - began
        assert len(tried) == 4
        assert sum(tried) < 0.5 < 4.0 > took
        # And the first that answers is taken.
        addresses.connected("many.example", 1, time.monotonic() + 10.0).close()


def test_a_newcomer_whose_name_is_resolved_slowly_is_sent_away_alone(monkeypatch):
    """Those who called it were once late with their links, and the master dropped them for it."""
    held_up(monkeypatch, 4.0)
    late = []

    def work(number, peers):
        if number == 0:
            late.append(Peer(master.address, lambda _, mine: None, 9, advertise="newcomer.slow:5000", connect_s=0.3))
        rounds = 0
        while late == [] or not late[0].error:
            try:
                peers.admit()
            except TopologyFailed:
                rounds += 1
                continue
            peers.all_reduce(torch.ones(1))
        return rounds, peers.world_size

    # The master would wait for 1.2 s.
    with a_master(connect_s=0.3, dead_s=0.6) as master:
        assert together(master.address, 2, work, connect_s=8.0) == [(2, 2)] * 2
        assert isinstance(late[0].wait().error, Kicked)


def test_who_calls_takes_four_kibibytes_before_a_proof_as_well():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            with server.accept()[0] as sock:
                sock.recv(4096)
                sock.sendall(packed(Kind.CHALLENGE, {"nonce": "x" * 32, "proof": "y", "more": "z" * 5000}))
                sock.recv(4096)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with socket.create_connection(server.getsockname(), timeout=10) as sock, pytest.raises(WireError, match="4096"):
            call(sock, b"s", {"purpose": "join"}, time.monotonic() + 10)
        thread.join(10)


def test_before_a_caller_has_proved_itself_a_peer_takes_four_kibibytes():
    """And as many names as a state has come after it."""
    listener = Listener("127.0.0.1", 0, b"s", {})
    try:
        sock = socket.create_connection(("127.0.0.1", listener.port), timeout=10)
        with sock:
            hello = {"version": VERSION, "purpose": "link", "nonce": "x" * 32, "more": "y" * 5000}
            sock.sendall(packed(Kind.HELLO, hello))
            frames = Reader().feed(sock.recv(65536))
        assert [frame.kind for frame in frames] == [Kind.REFUSED]
        assert "at most 4096" in frames[0].body["why"]
    finally:
        listener.close()


def test_a_state_of_many_names_is_fetched():
    def work(number, peers):
        state = SharedState(
            {f"a tensor of a long name {place:04}": torch.full((1,), 1.0 + number) for place in range(600)}, 1
        )
        return peers.sync_shared_state(state).received_bytes, state.digest()

    with a_master() as master:
        (_, first), (received, second) = together(master.address, 2, work)
    assert first == second
    assert received == 2400


@pytest.mark.parametrize("idle_s", [0.4, 7200.0])
def test_a_state_is_fetched_however_long_a_peer_would_wait(idle_s):
    def work(number, peers):
        state = SharedState({"w": torch.full((3,), 1.0 + number)}, 1)
        return peers.sync_shared_state(state).received_bytes

    with a_master() as master:
        assert together(master.address, 2, work, idle_s=idle_s) == [0, 12]


def test_a_proof_is_of_its_purpose_and_run_alone():
    hello = {"purpose": "join", "run": "r", "nonce": "n" * 32}
    shown = proof(b"secret", "caller", hello, "m" * 32)
    for other in ({"purpose": "resume"}, {"run": "another"}, {"nonce": "o" * 32}):
        assert proof(b"secret", "caller", hello | other, "m" * 32) != shown
    assert proof(b"secret", "called", hello, "m" * 32) != shown
    assert proof(b"other", "caller", hello, "m" * 32) != shown
    assert Called(b"secret").hello is None


@pytest.mark.parametrize(
    "told", [(2**60, 0.05), (10, 0.0), (10, -1.0), (10, math.nan), (10, math.inf), (0, 0.0)], ids=str
)
def test_a_peer_that_counts_what_cannot_be_is_accused_by_who_measures_it(told):
    """The master drops whoever tells it of a rate that is none: that was the honest one."""
    served = socket.create_server(("127.0.0.1", 0))

    def lie():
        with served, served.accept()[0] as sock:
            called = Called(b"|run")
            reader = Reader()
            while called.hello is None:
                for frame in reader.feed(sock.recv(4096)):
                    sock.sendall(called.answer(frame))
            sock.sendall(packed(Kind.WELCOME, {"busy": False}))
            while sock.recv(1 << 20):
                pass
            sock.sendall(struct.pack("!Qd", *told))

    liar = threading.Thread(target=lie, daemon=True)
    liar.start()
    with pytest.raises(LinkError, match="could not be measured") as error:
        bandwidth.measure(
            Place(7, "127.0.0.1", served.getsockname()[1], 1), secret=b"", run="run", me=1, seconds=0.02, streams=1,
            deadline=time.monotonic() + 10, congestion=None,
        )  # fmt: skip
    assert error.value.accused == 7
    liar.join(10)


def test_a_journal_is_read_by_nobody_else(tmp_path):
    """The tokens by which peers come back are in it."""
    with a_master(journal=tmp_path / "j") as master, Communicator(master.address):
        assert stat.S_IMODE((tmp_path / "j").stat().st_mode) == 0o600
