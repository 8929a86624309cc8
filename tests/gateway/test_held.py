"""What is kept of many senders: nobody's pushes out what others have."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.cache.entry import Entry
from anabranch.gateway.cache.exact import ExactCache
from anabranch.gateway.cache.held import Held
from anabranch.gateway.cache.named import Named
from anabranch.gateway.cache.semantic import SemanticCache


def vector(number):
    found = np.zeros(4096, np.float32)
    found[number] = 1
    return found


# Of each cache: made with so many bytes, put, and whether it is there.
CACHES = {
    "exact": (
        lambda most: ExactCache(ttl_s=1e6, size_bytes=most),
        lambda cache, who, number, entry: cache.put(who, b"%d" % number, entry),
        lambda cache, who, number: cache.get(who, b"%d" % number) is not None,
    ),
    "named": (
        lambda most: Named(ttl_s=1e6, size=10_000, size_bytes=most),
        lambda cache, who, number, entry: cache.put(who, (str(number), b"m"), entry),
        lambda cache, who, number: cache.get(who, str(number), b"m") is not None,
    ),
    "semantic": (
        lambda most: SemanticCache(threshold=0.9, ttl_s=1e6, size=10_000, size_bytes=most),
        lambda cache, who, number, entry: cache.put(who, b"c", vector(number), entry),
        lambda cache, who, number: cache.get(who, b"c", vector(number)) is not None,
    ),
}


@pytest.mark.parametrize("name", CACHES)
def test_large_answers_of_one_push_out_none_of_another(name):
    """Ten answers of 7 MiB of one key left none of another's thousand in the exact and the semantic cache."""
    make, put, has = CACHES[name]
    cache = make(1_000_000)
    for number in range(100):
        put(cache, "b", number, Entry(body=b"x" * 1_000, model="m"))
    for number in range(20):
        put(cache, "a", number, Entry(body=b"x" * 100_000, model="m"))
    assert all(has(cache, "b", number) for number in range(100))
    # Those of hers that were not used for longest made room.
    kept = [has(cache, "a", number) for number in range(20)]
    assert kept == sorted(kept)
    assert 5 < sum(kept) < 10
    assert cache.size_bytes <= 1_000_000
    cache.clear()
    assert (len(cache), cache.size_bytes) == (0, 0)


@pytest.mark.parametrize("name", CACHES)
def test_who_came_first_makes_room_for_whoever_comes_later(name):
    """Who had nearly all of a cache kept that; another who came was held to its part among all who had anything at all."""
    make, put, has = CACHES[name]
    cache = make(300_000)
    for number in range(20):
        put(cache, f"k{number}", number, Entry(body=b"x", model="m"))
    for who in ("first", "later"):
        for number in range(100):
            put(cache, who, number, Entry(body=b"x" * 4_000, model="m"))
    kept = {who: sum(has(cache, who, number) for number in range(100)) for who in ("first", "later")}
    assert abs(kept["first"] - kept["later"]) <= 1
    assert all(has(cache, f"k{number}", number) for number in range(20))
    # One that is large is kept too, if it is no more than others have.
    put(cache, "k0", 400, Entry(body=b"x" * 80_000, model="m"))
    assert has(cache, "k0", 400)


def test_of_as_many_who_have_one_each_those_of_long_ago_go_first():
    held = Held()
    held.bound(3, 1e9)
    for who in "dcba":
        held.put(who, 0, who, 10)
    assert [held.get(who, 0) for who in "dcba"] == [None, "c", "b", "a"]
    held.put("e", 0, "e", 10)
    assert [held.get(who, 0) for who in "cbae"] == [None, "b", "a", "e"]


def test_what_is_found_of_who_has_most_grows_no_longer_than_there_are_senders():
    held = Held()
    held.bound(10, 1e9)
    for number in range(5_000):
        held.put("ab"[number % 2], number % 7, number, 10)
    for found in (held._counts, held._bytes):
        assert len(found._heap) <= 2 * 2 + 64 + 1
        assert set(found.of) == set(found._entry) == {"a", "b"}


STEPS = st.lists(
    st.tuples(st.sampled_from("ppppgda"), st.sampled_from("xyz"), st.integers(0, 5), st.integers(0, 40)), max_size=60
)


@given(STEPS, st.integers(1, 8), st.integers(1, 100))
def test_it_is_what_a_plain_list_says(steps, most, most_bytes):
    gone = []
    held = Held(lambda *one: gone.append(one))
    held.bound(most, most_bytes)
    # Sender, key, value, bytes; those last that were used last.
    plain = []
    left = []

    def out(one):
        plain.remove(one)
        left.append(one[:3])

    for number, (step, who, key, size) in enumerate(steps):
        found = next((one for one in plain if one[:2] == (who, key)), None)
        if step == "g":
            assert held.get(who, key) == (None if found is None else found[2])
            if found is not None:
                held.use(who, key)
                plain.append(plain.pop(plain.index(found)))
        elif step == "d":
            held.drop(who, key)
            if found is not None:
                out(found)
        elif step == "a":
            own = [one for one in plain if one[0] == who]
            assert held.drop_all(who) == len(own)
            for one in own:
                out(one)
        else:
            assert held.put(who, key, number, size) is (size <= most_bytes)
            if found is not None:
                out(found)
            if size <= most_bytes:
                plain.append((who, key, number, size))
        # Whoever loses anything has most, the newest with what was just put.
        parts = {
            one: max(
                sum(1 for each in plain if each[0] == one) / most,
                sum(each[3] for each in plain if each[0] == one) / most_bytes,
            )
            for one in "xyz"
        }
        for who_lost, _, value in gone[len(left) :]:
            lost = next(one for one in plain if one[2] == value)
            assert parts[who_lost] >= max(parts.values()) - 1e-9
            assert lost is next(one for one in plain if one[0] == who_lost)
            out(lost)
            parts[who_lost] = max(
                sum(1 for each in plain if each[0] == who_lost) / most,
                sum(each[3] for each in plain if each[0] == who_lost) / most_bytes,
            )
        assert gone == left
        assert len(held) == len(plain) <= most
        assert held.size_bytes == sum(one[3] for one in plain) <= most_bytes
        for who_is in "xyz":
            assert held.keys(who_is) == [one[1] for one in plain if one[0] == who_is]
