"""Hosts of one machine and links of a rate: namespaces where they can be made, connections that the kernel paces elsewhere."""

import pipes
import subprocess
import sys

import pytest

from anabranch.cluster import hosts as module
from anabranch.errors import InputError
from anabranch.testing import NoHostsError, Ranks, can_make_hosts, hosts, run_ranks

needs_hosts = pytest.mark.skipif(not can_make_hosts(), reason="needs root, ip and tc")
NUMBERS, MBIT = 500_000, 40.0
# No machine is so slow that this is reached, and none so quick that a link lets it through sooner: without one it is a hundredth.
LEAST_S = 0.5 * 32 * NUMBERS / (MBIT * 1e6)


@pytest.mark.parametrize("kind", [pytest.param("namespaces", marks=needs_hosts), "paced"])
def test_no_more_goes_through_than_a_link_bears(kind):
    with Ranks(2, pipes.sent_in, NUMBERS, mbit=MBIT, links=kind) as ranks:
        found = ranks.wait()
        assert ranks.links == kind
        sent = ranks.sent_bytes()
    assert found[1] - found[0] >= LEAST_S
    assert sent is None or sent[0, 1] > 0


@needs_hosts
def test_each_rank_is_a_host_by_itself():
    before = subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout.count(": ab")
    found = run_ranks(pipes.addresses, 3, mbit=1000, links="namespaces")
    assert [len(row) for row in found] == [2, 2, 2]
    assert len({tuple(row) for row in found}) == 3
    after = subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout.count(": ab")
    assert after == before


@needs_hosts
def test_a_cable_is_cut_and_mended():
    listen = (
        "import socket\nserver = socket.create_server(('', 9000)); print(1, flush=True)\nwhile True: server.accept()"
    )
    call = f"import socket, sys\nsocket.create_connection((sys.argv[1], 9000), {1})"
    with hosts(2, mbit=100) as made:
        server = made.start(0, [sys.executable, "-c", listen], stdout=subprocess.PIPE)
        try:
            server.stdout.readline()
            words = [sys.executable, "-c", call, made.addresses[0]]
            assert made.start(1, words).wait(60) == 0
            made.cut(0)
            assert made.start(1, words, stderr=subprocess.DEVNULL).wait(60) == 1
            made.mend(0)
            # Learning where a host is takes a moment.
            assert any(made.start(1, words, stderr=subprocess.DEVNULL).wait(60) == 0 for _ in range(20))
            with hosts(1) as others:
                assert others.addresses[0] not in made.addresses
        finally:
            server.kill()
            server.communicate()
    assert (
        made.names[0] not in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    )


def test_where_hosts_cannot_be_made_connections_are_paced(monkeypatch):
    monkeypatch.setattr(module, "_TOOLS", ("a-tool-that-nobody-has",))
    with pytest.raises(NoHostsError, match="there is no a-tool-that-nobody-has here"), hosts(2):
        pass
    assert not can_make_hosts()
    with pytest.raises(NoHostsError):
        Ranks(1, pipes.total, mbit=100, links="namespaces")
    with Ranks(2, pipes.total, mbit=1000) as ranks:
        assert ranks.links == "paced"
        assert ranks.wait() == [2.0, 2.0]


@needs_hosts
def test_what_was_made_is_taken_away_where_the_rest_fails(monkeypatch):
    do, done = module._do, []

    def fails(*words):
        if "tbf" in words and len(done) > 10:
            raise NoHostsError("no such qdisc")
        done.append(words)
        do(*words)

    monkeypatch.setattr(module, "_do", fails)
    before = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    with pytest.raises(NoHostsError, match="no such qdisc"), hosts(3, mbit=10):
        pass
    names = {words[-1] for words in done if words[:3] == ("ip", "netns", "add")}
    after = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert names
    assert not any(name in after and name not in before for name in names)


@pytest.mark.parametrize("count", [0, 201, 2.0])
def test_hosts_that_are_none(count):
    with pytest.raises(InputError, match="count is"), hosts(count):
        pass


@pytest.mark.parametrize("mbit", [0, -1, float("nan"), 1e9])
def test_rates_that_are_none(mbit):
    with pytest.raises(InputError, match="mbit is"), hosts(1, mbit=mbit):
        pass
    with pytest.raises(InputError, match="mbit is"):
        Ranks(1, pipes.total, mbit=mbit)


def test_links_that_are_none():
    with pytest.raises(ValueError, match="links is 'fast'"):
        Ranks(1, pipes.total, links="fast")
