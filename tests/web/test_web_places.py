"""Connections that are open: as many as may be, of one address its part of what others leave, and those beyond for a moment."""

import resource
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.web.places import NUM_BEYOND, Places, host_of


class Connection:
    def __init__(self, *, is_idle=False):
        self.is_idle, self.is_closed = is_idle, False

    def force_close(self):
        self.is_closed = True


def test_as_many_as_there_are_places_and_one_that_is_idle_makes_place():
    places = Places(2)
    first, second = Connection(), Connection()
    assert places.enter(first, "a")
    assert places.enter(second, "b")
    assert not places.enter(Connection(), "c")
    second.is_idle = True
    third = Connection()
    assert places.enter(third, "c")
    assert (first.is_closed, second.is_closed, third.is_closed) == (False, True, False)
    places.leave(first)
    places.leave(first)
    assert len(places) == 1
    assert places.enter(Connection(), "c")


def test_a_host_of_ipv6_has_one_part_however_many_addresses_it_takes():
    places = Places(16, 0.5)
    assert sum(places.enter(Connection(), f"2001:db8::{number:x}") for number in range(100)) == 8
    of_next = Connection()
    assert places.enter(of_next, "2001:db8:0:1::1")
    places.leave(of_next)
    assert places.enter(Connection(), "192.0.2.1")


def test_a_site_leaves_room_however_many_networks_it_has():
    places, of_site = Places(16, 0.5), [Connection() for _ in range(16)]
    entered = [places.enter(one, f"2001:db8:1:{number:x}::1") for number, one in enumerate(of_site)]
    assert sum(entered) == 12
    assert places.enter(Connection(), "203.0.113.5")
    assert places.enter(Connection(), "2001:db8:2::1")
    # One more makes place of its own site.
    of_site[3].is_idle = True
    assert places.enter(Connection(), "2001:db8:1:ff::1") or of_site[3].is_closed
    for one in of_site:
        places.leave(one)
    assert places._num["2001:db8:1::/48"] <= 1


def test_a_provider_leaves_room_however_many_sites_it_has():
    places = Places(16, 0.5)
    assert sum(places.enter(Connection(), f"2001:db8:{number:x}::1") for number in range(16)) == 14
    assert places.enter(Connection(), "203.0.113.5")
    # Another provider's.
    assert places.enter(Connection(), "2001:db9::1")


def test_a_provider_that_has_too_many_makes_place_of_its_own():
    places, idle, other = Places(16, 0.5), Connection(is_idle=True), Connection(is_idle=True)
    assert places.enter(other, "203.0.113.5")
    assert places.enter(idle, "2001:db8:fff::1")
    for number in range(20):
        places.enter(Connection(), f"2001:db8:{number:x}::1")
    assert (idle.is_closed, other.is_closed) == (True, False)


def test_hosts_behind_a_translator_are_hosts_of_their_own():
    places = Places(16, 0.5)
    assert sum(places.enter(Connection(), f"64:ff9b::cb00:71{number:02x}") for number in range(16)) == 16
    places = Places(16, 0.5)
    assert sum(places.enter(Connection(), f"64:ff9b:1:fffe::cb00:71{number + 1:02x}") for number in range(16)) == 16
    places = Places(16, 0.5)
    assert sum(places.enter(Connection(), f"64:ff9b:1:cb00:71:{number + 1:02x}00::") for number in range(16)) == 16


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("64:ff9b::203.0.113.5", "203.0.113.5"),
        ("64:ff9b:0:0:0:1::1", "64:ff9b::/64"),
        ("64:ff9b:1::203.0.113.5", "203.0.113.5"),
        ("64:ff9b:1:cb00:71:500::", "64:ff9b:1:cb00:71:500::"),
        ("64:ff9b:2::203.0.113.5", "64:ff9b:2::/64"),
        ("2002:cb00:7105:1::1", "203.0.113.5"),
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
        ("a", "a"),
    ],
)
def test_whose_an_address_is(address, host):
    assert host_of(address) == host


def test_an_address_has_its_part_and_makes_place_for_itself_alone():
    places = Places(8, 0.5)
    of_a = [Connection() for _ in range(4)]
    assert all(places.enter(each, "a") for each in of_a)
    other = Connection(is_idle=True)
    assert places.enter(other, "b")
    # The fifth of eight would be more than half, and of what b leaves it is even less.
    assert not places.enter(Connection(), "a")
    assert not other.is_closed
    of_a[2].is_idle = of_a[3].is_idle = True
    assert not places.enter(Connection(), "a") or of_a[2].is_closed


def test_those_beyond_are_few_and_the_first_makes_place_for_the_next():
    places = Places(1)
    assert places.enter(Connection(), "a")
    beyond = [Connection() for _ in range(NUM_BEYOND + 3)]
    assert not any(places.enter(each, "b") for each in beyond)
    assert [each.is_closed for each in beyond] == [True] * 3 + [False] * NUM_BEYOND


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=60), st.floats(0.05, 1), st.integers(1, 12))
def test_never_more_than_may_be_and_room_for_an_address_that_has_none(steps, share, limit):
    places, open_ = Places(limit, share), []
    for address, is_leaving in steps:
        if is_leaving and open_:
            places.leave(open_.pop(0)[0])
            continue
        connection, before = Connection(), len(places)
        own = sum(whose == address for _, whose in open_)
        entered = places.enter(connection, address)
        if entered:
            open_.append((connection, address))
        elif not own:
            assert before == limit
        assert len(places) == len(open_) <= limit
        if entered and own:
            assert own + 1 <= share * (limit - (len(open_) - own - 1))


def test_a_process_may_open_as_many_files_as_its_connections_need():
    program = (
        "import resource; from anabranch.web.places import room_for_files;"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (400, 900));"
        "print(room_for_files(100), resource.getrlimit(resource.RLIMIT_NOFILE)[0]);"
        "print(room_for_files(5000), resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 900:
        program = program.replace("900", "420")
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    hard = 900 if "900" in program else 420
    assert said.split() == ["100", str(min(hard, 420)), str(hard - NUM_BEYOND - 256), str(hard)]
