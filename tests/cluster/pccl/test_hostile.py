"""What others send and say they are: whatever it is, the master lives, and neighbours go on."""

import contextlib
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

from anabranch.cluster.pccl import Communicator, Kicked, Refused, SharedState, TopologyFailed, bandwidth
from anabranch.cluster.pccl.addresses import is_host, parse_address
from anabranch.cluster.pccl.handshake import Called, call, proof
from anabranch.cluster.pccl.journal import to_dict
from anabranch.cluster.pccl.links import LinkError, Listener, Place, call_peer
from anabranch.cluster.pccl.state import MasterState
from anabranch.cluster.pccl.wire import HEADER, VERSION, Kind, Reader, WireError, packed
from anabranch.errors import InputError
from pccl_peers import Peer, a_master, together
from pccl_votes import a_vote, said


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


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


@pytest.mark.parametrize("depth", [9, 700, 5000])
@pytest.mark.parametrize("what", ["join", "initiate"])
def test_a_vote_of_lists_within_lists_ends_its_peer_alone(tmp_path, depth, what):
    """The journal once copied what peers had put into their votes, and ran out of stack."""
    with a_master(journal=tmp_path / "j") as master, Communicator(master.address) as honest:
        sock = socket.create_connection(parse_address(master.address, 0), timeout=60)
        with sock:
            hello = {"purpose": "join", "group": 1, "pool": 1, "host": "", "port": 1}
            call(sock, b"", hello, time.monotonic() + 60)
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
            call_peer(Place(3, text, 1, 1), b"", "run", {"purpose": "link"}, time.monotonic() + 60)
        assert told.value.accused == 3


@pytest.mark.parametrize("port", [-1, 65_536, 2**40])
def test_a_port_that_is_none_is_told_as_a_link(port):
    with pytest.raises(LinkError):
        call_peer(Place(3, "127.0.0.1", port, 1), b"", "run", {"purpose": "link"}, time.monotonic() + 60)


def test_a_newcomer_whose_host_is_none_is_not_let_in_and_nobody_else_notices():
    """Who called it once ended with what `socket` raises of a name that is none."""
    with a_master() as master, Communicator(master.address, connect_s=0.5) as honest:
        for host in ("a..b", "x" * 64, "a\0b", "a b", "ü" * 70):
            sock = socket.create_connection(parse_address(master.address, 0), timeout=60)
            hello = {"purpose": "join", "group": 0, "pool": 1, "host": host, "port": 1}
            with sock, pytest.raises(Refused, match="no host"):
                call(sock, b"", hello, time.monotonic() + 60)
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


def test_who_calls_takes_four_kibibytes_before_a_proof_as_well():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            # Who called ends it with what it has not read.
            with contextlib.suppress(OSError), server.accept()[0] as sock:
                sock.recv(4096)
                sock.sendall(packed(Kind.CHALLENGE, {"nonce": "x" * 32, "proof": "y", "more": "z" * 5000}))
                sock.recv(4096)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with socket.create_connection(server.getsockname(), timeout=60) as sock, pytest.raises(WireError, match="4096"):
            call(sock, b"s", {"purpose": "join"}, time.monotonic() + 60)
        thread.join(60)


def test_before_a_caller_has_proved_itself_a_peer_takes_four_kibibytes():
    """And as many names as a state has come after it."""
    listener = Listener("127.0.0.1", 0, b"s", {})
    try:
        sock = socket.create_connection(("127.0.0.1", listener.port), timeout=60)
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
        (fewer, first), (more, second) = together(master.address, 2, work)
    assert first == second
    # Whichever was elected, the other fetches it.
    assert sorted([fewer, more]) == [0, 2400]


@pytest.mark.parametrize("idle_s", [0.4, 7200.0])
def test_a_state_is_fetched_however_long_a_peer_would_wait(idle_s):
    def work(number, peers):
        state = SharedState({"w": torch.full((3,), 1.0 + number)}, 1)
        return peers.sync_shared_state(state).received_bytes

    with a_master() as master:
        # Who came first has what counts.
        assert sorted(together(master.address, 2, work, idle_s=idle_s)) == [0, 12]


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
            Place(7, "127.0.0.1", served.getsockname()[1], 1),
            secret=b"",
            run="run",
            me=1,
            seconds=0.02,
            streams=1,
            deadline=time.monotonic() + 60,
            congestion=None,
        )
    assert error.value.accused == 7
    liar.join(60)


def test_a_journal_is_read_by_nobody_else(tmp_path):
    """The tokens by which peers come back are in it."""
    with a_master(journal=tmp_path / "j") as master, Communicator(master.address):
        assert stat.S_IMODE((tmp_path / "j").stat().st_mode) == 0o600
