"""Which rows of an origin are kept where there are too many: signed the newest, unsigned so many of each who told them."""

import asyncio
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import DataError
from anabranch.graph.array_file import read_arrays, write_arrays
from anabranch.graph.rank import Defences, GossipServer, Peer, Row, SigningKey
from anabranch.graph.rank.log import MORE_ENDS, STALE_TIMES, ClickLog
from anabranch.graph.rank.rows import NUMBER_LIMIT
from anabranch.graph.rank.window import STALE, Window

WINDOW = 20


def message(origin, numbers, sender):
    return {"from": sender, "rows": [Row(origin, number, "t", "i").to_json() for number in numbers]}


def numbers_of(peer, origin="h"):
    return sorted(peer.log.rows[origin])


def listener(**defences):
    return Peer((), "me", defences=Defences(rows_per_origin=WINDOW, **defences))


FLOODS = {
    "from the top": [NUMBER_LIMIT - 1 - number for number in range(200)],
    "next ones": list(range(10, 210)),
    "with gaps": list(range(1000, 3000, 10)),
    "in pairs": [first + second for first in range(1000, 2000, 10) for second in (0, 1)],
    "in disorder": random.Random(0).sample(range(100, 10_000), 200),
}


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS.keys())
@pytest.mark.parametrize("is_first", [False, True])
def test_one_who_floods_an_origin_pushes_out_what_they_told_themselves(flood, is_first):
    peer, honest = listener(), message("h", range(10), "b")
    if not is_first:
        peer.merge(honest)
    for first in range(0, len(flood), 25):
        peer.merge(message("h", flood[first : first + 25], "evil"))
    if is_first:
        # Not so where they took these very numbers.
        assert peer.merge(honest).added == 10
    assert numbers_of(peer)[:10] == list(range(10))
    assert len(numbers_of(peer)) == WINDOW
    if flood[0] != 10:
        assert peer.merge(message("h", [10], "b")).added == 1
        assert 10 in numbers_of(peer)
    # What a flood leaves of itself is bounded.
    assert len(peer.vector()["h"]) <= 4 * WINDOW + MORE_ENDS


def test_what_the_flood_took_from_others_is_at_most_their_older_half():
    peer = listener()
    peer.merge(message("h", range(WINDOW), "b"))
    for _ in range(3):
        peer.merge(message("h", [NUMBER_LIMIT - 1 - number for number in range(100)], "evil"))
    assert numbers_of(peer)[: WINDOW // 2] == list(range(WINDOW // 2, WINDOW))
    # A third has as much as each of the two.
    peer.merge(message("h", range(100, 140), "c"))
    told = [peer.log.teller_of(peer.log.rows["h"][number]) for number in numbers_of(peer)]
    assert sorted(map(told.count, ("b", "c", "evil"))) == [6, 7, 7]


def test_of_one_neighbour_the_newest_are_kept_and_older_ones_are_not_asked_for_again():
    peer = listener()
    for first in range(0, 100, 10):
        peer.merge(message("h", range(first, first + 10), "b"))
    assert numbers_of(peer) == list(range(80, 100))
    assert peer.vector() == {"h": [0, 100]}
    assert peer.merge(message("h", range(80), "c")).known == 80


def test_signed_numbers_are_the_origins_own():
    """What is older than its newest rows is not asked for, whoever tells it."""
    pytest.importorskip("cryptography")
    defences = Defences(signed=True, rows_per_origin=3)
    keys = [SigningKey.generate() for _ in range(2)]
    giver, taker = (Peer((), defences=defences, key=key) for key in keys)
    rows = [giver.record("t", number).to_json() for number in range(9)]
    assert taker.merge({"from": "b", "rows": rows[4:7]}).added == 3
    assert taker.vector()[giver.node_id] == [0, 7]
    assert taker.merge({"from": "c", "rows": rows[7:]}).added == 2
    assert numbers_of(taker, giver.node_id) == [6, 7, 8]
    assert taker.merge({"from": "c", "rows": rows[:4]}).known == 4


@pytest.mark.parametrize("signed", [False, True])
def test_one_who_fills_the_log_makes_place_for_others(signed):
    """With rows of made-up origins, which signatures do not stop."""
    peer = Peer((), "me", defences=Defences(max_rows=100))
    if signed:
        peer.log.defences = Defences(max_rows=100, signed=True)
        peer.log._is_signed = lambda row: True
    for first in range(0, 200, 10):
        peer.merge({"from": "evil", "rows": [Row(f"o{first + n}", 0, "t", "x").to_json() for n in range(10)]})
    assert peer.log.num_rows == 100
    assert peer.similarity("o1") == 0.0
    assert peer.merge(message("h", range(70), "b")).added == 50
    assert peer.log.num_rows == 100
    assert len(numbers_of(peer)) == 50
    # Both have as much: nobody gives way, and what was refused may come again.
    assert peer.merge(message("h", range(50, 60), "b")).refused == {"full": 10}
    assert peer.merge(message("o1000", [0], "evil")).refused == {"full": 1}
    assert peer.merge(message("c", range(3), "c")).added == 3
    # What went is not taken for held, nor counted.
    assert sum(len(ranges) for ranges in peer.vector().values()) == 2 * sum(map(bool, peer.log.rows.values()))
    assert sum(row[0] == "h" for row in peer.make_reply({})["rows"]) == len(numbers_of(peer))
    assert peer.log.popularity["x"] == sum(row.item == "x" for row in peer.log.all_rows())
    assert peer.rank("t")
    assert peer.record("t", "i").number == 0


@pytest.mark.parametrize("how", ["file", "store"])
def test_who_told_what_is_kept(tmp_path, how):
    """Or who floods would only have to wait for a restart."""
    defences = Defences(rows_per_origin=WINDOW)
    store = {"store": tmp_path / "log.db"} if how == "store" else {}
    peer = Peer((), "me", defences=defences, **store)
    peer.merge(message("h", range(10), "b"))
    peer.merge(message("h", range(1000, 1100), "evil"))
    if how == "file":
        peer.save(tmp_path / "peer")
        again = Peer.load(tmp_path / "peer")
    else:
        peer.close()
        again = Peer((), "me", defences=defences, **store)
    assert numbers_of(again) == numbers_of(peer)
    again.merge(message("h", range(2000, 2100), "evil"))
    assert numbers_of(again)[:10] == list(range(10))
    again.close()


def test_files_of_before_are_read(tmp_path):
    peer = listener()
    peer.merge(message("h", range(5), "b"))
    peer.save(tmp_path / "peer")
    file = read_arrays(tmp_path / "peer", "rank peer")
    arrays = {name: np.array(array) for name, array in file.arrays.items() if name != "teller"}
    meta = {name: value for name, value in file.meta.items() if name != "tellers"}
    write_arrays(tmp_path / "old", "rank peer", arrays, meta)
    assert numbers_of(Peer.load(tmp_path / "old")) == list(range(5))
    for wrong in ([0, 0, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, -1]):
        write_arrays(tmp_path / "new", "rank peer", {**arrays, "teller": np.array(wrong)}, {**meta, "tellers": ["b"]})
        with pytest.raises(DataError, match="told"):
            Peer.load(tmp_path / "new")


def test_names_that_utf8_has_not_are_stored(tmp_path):
    peer = Peer((), "me", store=tmp_path / "log.db")
    assert peer.merge(message("h\ud800", [0, 1], "b\udfff")).added == 2
    peer.close()
    again = Peer((), "me", store=tmp_path / "log.db")
    (row, _) = again.log.all_rows()
    assert (row.origin, again.log.teller_of(row)) == ("h\ud800", "b\udfff")
    again.close()


def log_of(**defences):
    return ClickLog("me", Defences(**defences), lambda term: term, lambda row: True)


def test_rows_that_expire_leave_nothing_behind():
    log = log_of(ttl=10.0)
    for number in range(3000):
        log.add(Row("h", number, "t", "i", time=float(number)), now=float(number))
        log.expire(float(number))
    assert log.num_rows == 11
    assert sum(map(len, log._windows["h"]._lowest.values())) <= 2 * 11 + STALE + 1
    log.expire(1e9)
    assert log.num_rows == len(log._windows) == len(log._by_time) == 0


def test_times_of_rows_that_are_pushed_out_leave_nothing_behind():
    log = log_of(ttl=1e6, rows_per_origin=5)
    for number in range(2 * STALE_TIMES):
        log.add(Row("h", number, "t", "i", time=100.0), now=100.0)
    assert (log.num_rows, len(log._by_time) <= STALE_TIMES + 11) == (5, True)
    log.expire(1e9)
    assert log.num_rows == 0


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from("abc"), st.booleans()), max_size=120))
def test_a_window_is_what_a_plain_one_is(steps):
    window, plain = Window(), {}
    for number, teller, is_removed in steps:
        if number in plain and is_removed:
            window.remove(number)
            del plain[number]
        elif number not in plain:
            window.add(number, teller)
            plain[number] = teller
        if not plain:
            assert not window
            continue
        told = list(plain.values())
        most = max(map(told.count, told))
        assert window.next_to_go() == min(number for number, whose in plain.items() if told.count(whose) == most)
        assert window.lowest() == min(plain)
        assert {number: window.teller_of(number) for number in plain} == plain
        assert len(window) == len(plain)


def test_over_the_network_who_told_is_the_address_that_was_asked():
    """One who answers under ever other names is one."""

    async def run():
        me = listener()
        liar, giver = Peer((), "evil"), Peer((), "h")
        for number in range(10):
            giver.record("t", number)
        async with GossipServer(giver) as honest, GossipServer(liar) as evil, GossipServer(me) as server:
            assert (await server.pull(honest.address)).added == 10
            for turn in range(8):
                liar.node_id = f"name {turn}"
                liar.merge(message("h", range(1000 + 100 * turn, 1100 + 100 * turn), "evil"))
                await server.pull(evil.address)
        return me

    assert numbers_of(asyncio.run(run()))[:10] == list(range(10))
