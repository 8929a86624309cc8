"""The table of times: what is a sum of others outlasts what it must, whatever the others are."""

import re
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import anabranch
from anabranch.cluster.pccl import Communicator, Master
from anabranch.cluster.pccl import times as module_of_times
from anabranch.cluster.pccl.line import Line
from anabranch.cluster.pccl.times import (
    AGAIN_S,
    COUNT_S,
    CUT_OFF_S,
    DRAIN_S,
    HANDSHAKE_S,
    LOOK_S,
    REACH_S,
    RULES,
    Times,
)
from anabranch.errors import InputError
from pccl_peers import a_master, together

PAGE = Path(anabranch.__file__).parents[2] / "docs" / "systems" / "pccl.md"
SECONDS = st.floats(0.01, 3600)


def test_the_usual_ones_fit_together():
    times = Times()
    times.check()
    assert times.advice() == []
    # By hand: 5 and 1 and 30 and the last call's 5; another 5; twice 10 and 5; twice 5 and two pauses.
    assert (times.gone_s, times.withdrawn_s, times.report_s) == (41.0, 46.0, 25.0)
    assert times.absence_s == pytest.approx(10.4)


@given(SECONDS, SECONDS, SECONDS, SECONDS)
def test_sums_outlast_what_they_are_for(heartbeat_s, dead_s, connect_s, master_wait_s):
    times = Times(heartbeat_s=heartbeat_s, dead_s=dead_s, connect_s=connect_s, master_wait_s=master_wait_s)
    try:
        times.check()
    except InputError:
        assert heartbeat_s * 2 > dead_s or dead_s < 2 * LOOK_S
        return
    # A peer beats after its last look, which is half of one late; two of its beats are in time.
    assert 1.5 * heartbeat_s < dead_s
    # One that begins its links when its neighbour has given up says how they fared before it is dropped.
    assert 2 * connect_s + LOOK_S <= times.report_s
    # It sees that the master is gone, calls until the end, and once more.
    seen = dead_s + 0.5 * heartbeat_s
    assert seen + master_wait_s + HANDSHAKE_S <= times.gone_s < times.withdrawn_s
    assert dead_s + 2 * AGAIN_S < times.absence_s
    # Who hangs is found by the master first.
    assert dead_s < times.idle_limit_s
    assert times.advice() == []


@given(SECONDS, SECONDS)
def test_an_idle_time_of_ones_own_is_taken_as_it_is_and_told_of_where_it_is_short(idle_s, dead_s):
    times = Times(idle_s=idle_s, dead_s=dead_s)
    assert times.idle_limit_s == idle_s
    assert any("given up before the master has found it" in told for told in times.advice()) == (idle_s < dead_s)


def test_floods_are_waited_for_as_long_as_they_are_drained():
    # Drained to the end, then told of.
    assert DRAIN_S + HANDSHAKE_S < COUNT_S
    # A name's first server that is dead takes a handshake's time.
    assert HANDSHAKE_S < REACH_S


def test_every_rule_can_be_broken_or_holds_by_the_sums_alone():
    """A rule that nothing breaks is a statement about sums: it must then hold in drawn times, above."""
    broken = {
        rule.name
        for rule in RULES
        for times in (Times(heartbeat_s=4.0), Times(heartbeat_s=0.01, dead_s=0.05), Times(idle_s=1.0))
        if not rule.holds(times)
    }
    assert broken == {"beats", "aborts", "idle neighbours"}
    assert {rule.name for rule in RULES} - broken == {"links", "absence", "withdrawn votes"}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"heartbeat_s": 4.0}, "twice heartbeat_s is 8 s, and dead_s 5 s: peers that live would be dropped"),
        ({"heartbeat_s": 0.01, "dead_s": 0.05}, "two looks for an abort is 0.1 s"),
    ],
)
def test_a_master_with_times_that_do_not_fit_is_refused(given, told):
    with pytest.raises(InputError, match=told):
        Master("127.0.0.1:0", **given)


def test_the_page_has_the_table():
    """Each time by its name, with its default."""
    rows = dict(re.findall(r"^\| `([a-z_]+|[A-Z_]+)`[^|]*\| ([^|]+) \|", PAGE.read_text(), re.MULTILINE))
    times = Times()
    for name in ("heartbeat_s", "dead_s", "connect_s", "master_wait_s"):
        assert rows[name].split()[0] == f"{getattr(times, name):g}"
    assert rows["idle_s"].split()[0] == f"{times.idle_limit_s:g}"
    for name in (
        "HANDSHAKE_S",
        "ADDRESS_S",
        "REACH_S",
        "AGAIN_S",
        "ASK_S",
        "LOOK_S",
        "DRAIN_S",
        "COUNT_S",
        "CUT_OFF_S",
    ):
        assert rows[name].split()[0] == f"{getattr(module_of_times, name):g}"
    for name in ("report_s", "absence_s", "gone_s", "withdrawn_s", "fetch_s"):
        assert rows[name].split()[0] == f"{getattr(times, name):g}"


def test_links_have_the_time_of_the_master_where_a_peer_says_none():
    """A master that gives more is enough: peers need not be told."""
    with a_master(connect_s=47.0) as master:

        def work(number, peers):
            return peers._links.connect_s, peers._times.fetch_s

        assert together(master.address, 2, work, connect_s=None) == [(47.0, 52.0)] * 2
        assert together(master.address, 2, work, connect_s=3.0) == [(3.0, 8.0)] * 2
        assert together(master.address, 2, work, connect_s=90.0) == [(47.0, 52.0)] * 2


def test_who_calls_a_master_that_takes_and_says_nothing_gives_up_in_time(monkeypatch):
    """The last call, begun just before the end, takes a handshake's time, and none that of a slow resolver behind the end."""
    reached = []

    def connected(host, port, deadline):
        reached.append(deadline)
        raise OSError("nobody")

    monkeypatch.setattr("anabranch.cluster.pccl.line.connected", connected)
    monkeypatch.setattr("anabranch.cluster.pccl.line.time.monotonic", lambda: 100.0)
    line = Line(("127.0.0.1", 1), b"", times=Times(), on_reply=print, on_abort=print, before=print)
    for end in (99.0, 107.0, 1000.0):
        with pytest.raises(OSError, match="nobody"):
            line._called({"purpose": "join"}, end)
    assert reached == [100.0 + HANDSHAKE_S, 107.0, 100.0 + REACH_S]


def test_both_ends_of_a_line_ask_whether_the_other_machine_is_there():
    """``test_cut_off.py`` cuts a cable; what they ask is the system's."""
    with a_master() as master, Communicator(master.address) as peers:
        (theirs,) = [line.sock for line in master._lines.values()]
        for sock in (peers._line._sock, theirs):
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 1000 * CUT_OFF_S
