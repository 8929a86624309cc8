"""What a store of experts holds, under its lock: who waits, who is leased, who went, and what is told of it."""

from concurrent.futures import Future
from pathlib import Path

import pytest

from anabranch.errors import InputError
from anabranch.routers.coe.lease import Expert, Job
from anabranch.routers.coe.shelf import Shelf
from anabranch.routers.coe.tier import Tier, Usage


class Clock:
    now = 5.0

    def __call__(self):
        return self.now


def shelf(*names, on_evict=None):
    made = Shelf({"host": Tier("host", 100, "lru"), "gpu": Tier("gpu", 50, "lru")}, on_evict, Clock())
    for name in names:
        made._experts[name] = Expert(Path(name), (), {"host": 10, "gpu": 10}, Usage(300.0))
    return made


def resident(made, name, tier="gpu"):
    found = made._tiers[tier].begin(name, 10)
    found.is_ready, found.value = True, name.upper()
    return found


def job(made, name, waits=False):
    made._jobs[name] = Job(name)
    if waits:
        made._jobs[name].waiting.append((Future(), 0.0))
    with made._changed:
        made._enqueue(name)


def test_who_is_not_there_is_told_who_is():
    with pytest.raises(InputError, match="no expert 'z' in the store; it has a, b"):
        shelf("a", "b")._begin("z")
    with pytest.raises(InputError, match="it has none"):
        shelf()._expert("z")


def test_a_request_begins_now_unless_the_store_is_closed():
    made = shelf("a")
    assert made._begin("a") == 5.0
    made._is_open = False
    with pytest.raises(InputError, match="closed"):
        made._begin("a")


def test_jobs_that_somebody_waits_for_go_first_each_in_the_order_they_came():
    made = shelf(*"abcd")
    for name, waits in (("a", False), ("b", True), ("c", False), ("d", True)):
        job(made, name, waits)
    assert list(made._queue) == ["b", "d", "a", "c"]
    job(made, "c", waits=True)
    assert list(made._queue) == ["b", "d", "c", "a"]
    # One that has begun stays where it is.
    made._queue.remove("b")
    made._jobs["b"].has_begun = True
    with made._changed:
        made._enqueue("b")
    assert list(made._queue) == ["d", "c", "a"]


def test_a_lease_holds_an_expert_and_uses_up_what_was_fetched_ahead():
    made = shelf("a")
    found = resident(made, "a")
    found.spare_until_s = 99.0
    first, second = (made._leased("a", found) for _ in range(2))
    assert (found.pins, first.expert) == (2, "A")
    assert (made.stats()["prefetch_used"], found.spare_until_s) == (1, -float("inf"))
    first.release()
    first.release()
    assert found.pins == 1
    with second:
        pass
    assert found.pins == 0


def test_who_is_evicted_is_told_of_and_leaves_nothing():
    told = []
    made = shelf("a", on_evict=lambda *said: told.append(said))
    found = resident(made, "a")
    made._evict(made._tiers["gpu"], "a")
    assert told == [("gpu", "a", "A")]
    assert (found.value, made._tiers["gpu"].used_bytes) == (None, 0)
    tiers = made.stats()["tiers"]
    assert (tiers["gpu"]["evictions"], tiers["gpu"]["peak_bytes"], tiers["host"]["evictions"]) == (1, 10, 0)


def test_what_is_told_before_anything_happened_and_after():
    made = shelf("a")
    stats = made.stats()
    assert (stats["hit_rate"], stats["switch_s_mean"], stats["switch_s_p95"]) == (None, None, None)
    made._counts.update(requests=4, hits=3)
    made._switch_s.extend([1.0, 2.0, 3.0])
    stats = made.stats()
    assert (stats["hit_rate"], stats["switch_s_mean"], stats["switch_s_p50"], stats["switch_s_p95"]) == (
        0.75,
        2.0,
        2.0,
        3.0,
    )
    assert stats["tiers"]["host"]["capacity_bytes"] == 100
    assert made._usage()["a"].count == 0
