import asyncio
import itertools
import math
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import CapacityError, CheckpointError, InputError
from anabranch.routers.coe import ExpertQueue, ExpertStore
from anabranch.routers.coe.lease import signature_of
from anabranch.routers.coe.tier import Tier, Usage, quantile
from waiting import until

PATIENCE_S = 20.0  # nothing here takes this long; a test that hangs fails


def files(folder, sizes):
    """Checkpoints of so many bytes, each of one repeated letter."""
    for number, (name, size) in enumerate(sizes.items()):
        (folder / name).write_bytes(bytes([97 + number % 26]) * size)
    return folder


def opened(folder, sizes, host_bytes, **options):
    store = ExpertStore(options.pop("load", lambda path: path.read_bytes()), host_bytes=host_bytes, **options)
    for name in files(folder, sizes) and sizes:
        store.add(name, folder / name)
    return store


ABC = {"a": 10, "b": 10, "c": 10}


class Gate:
    """A loader that waits to be let through, and counts."""

    def __init__(self):
        self.calls, self.go, self.begun = [], threading.Event(), threading.Event()

    def __call__(self, path):
        self.calls.append(path.name)
        self.begun.set()
        assert self.go.wait(PATIENCE_S)
        return path.read_bytes()


# Who goes


def tier_of(eviction, *, loads=(1.0, 1.0, 1.0), sizes=(10, 10, 10)):
    tier = Tier("host", 30, eviction)
    for name, load_s, size in zip("abc", loads, sizes, strict=True):
        resident = tier.begin(name, size)
        resident.is_ready, resident.load_s, resident.since_s = True, load_s, 0.0
    return tier


def usages(**times):
    found = {}
    for name, at in times.items():
        found[name] = Usage(100.0)
        for moment in at:
            found[name].touch(moment)
    return found


def test_eviction_by_hand():
    usage = usages(a=[1, 2, 9], b=[3, 4], c=[8])
    assert tier_of("lru").victims(10, usage, 10) == ["b"]  # asked for at 4, before 8 and 9
    assert tier_of("lfu").victims(10, usage, 10) == ["c"]  # once
    assert tier_of("lru").victims(20, usage, 10) == ["b", "c"]
    assert tier_of("lru").victims(0, usage, 10) == []
    assert tier_of("lru").victims(31, usage, 10) is None


def test_rate_aware_eviction_weighs_load_time_and_bytes():
    usage = usages(a=[5], b=[5], c=[5])
    assert tier_of("rate", loads=(3, 1, 2)).victims(10, usage, 5) == ["b"]  # the quickest to have again
    assert tier_of("rate", sizes=(5, 20, 5)).victims(5, usage, 5) == ["b"]  # the one that holds most
    assert tier_of("rate").victims(10, usages(a=[1, 5], b=[5], c=[2, 3]), 5) == ["b"]
    assert tier_of("rate").victims(10, usages(a=[4], b=[3], c=[4]), 5) == ["b"]


def test_pinned_and_loading_experts_stay():
    tier, usage = tier_of("lru"), usages(a=[1], b=[2], c=[3])
    tier.residents["a"].pins = 1
    tier.residents["b"].is_ready = False
    assert tier.victims(10, usage, 5) == ["c"]
    assert tier.victims(20, usage, 5) is None


def test_rate_halves_and_settles():
    usage = Usage(10.0)
    usage.touch(0.0)
    assert usage.rate_at(10.0) == pytest.approx(usage.rate_at(0.0) / 2)
    assert usage.rate_at(0.0) == pytest.approx(math.log(2) / 10)
    for moment in np.arange(0, 200, 0.5):  # twice a second
        usage.touch(float(moment))
    assert usage.rate == pytest.approx(2.0, rel=0.03)


def test_experts_fetched_ahead_go_last_for_a_while():
    tier, usage = tier_of("lru"), usages(a=[1], b=[2], c=[3])
    tier.residents["a"].spare_until_s = 6.0
    assert tier.victims(10, usage, 5.0) == ["b"]
    assert tier.victims(10, usage, 6.0) == ["a"]


def test_quantiles():
    assert quantile([3, 1, 2], 0.5) == 2
    assert quantile([3, 1, 2], 1.0) == 3
    assert quantile(range(100), 0.95) == 94
    assert quantile([], 0.5) is None


# The queue


def test_queue_prefers_residents_then_large_groups_then_old_requests():
    queue = ExpertQueue()
    for expert, request in (("a", 0), ("b", 1), ("b", 2), ("c", 3)):
        queue.push(expert, request)
    assert queue.peek() == ["b", "a", "c"]
    assert queue.peek({"c"}) == ["c", "b", "a"]
    assert queue.pop({"c"}) == ("c", [3])
    assert queue.pop() == ("b", [1, 2])
    assert len(queue) == 1
    assert queue.pop() == ("a", [0])
    assert queue.pop() is None


def test_queue_serves_in_batches():
    queue = ExpertQueue(batch=2)
    for number in range(5):
        queue.push("a", number)
    assert [queue.pop()[1] for _ in range(3)] == [[0, 1], [2, 3], [4]]


def test_queue_lets_nobody_starve_by_hand():
    """b is resident and keeps coming; after two batches of it, a is urgent."""
    queue = ExpertQueue(max_passes=2)
    queue.push("a", "old")
    served = []
    for number in range(3):
        queue.push("b", number)
        served.append(queue.pop({"b"})[0])
    assert served == ["b", "b", "a"]


@given(st.data(), st.integers(0, 5), st.integers(2, 5))
def test_queue_bounds_waiting(data, max_passes, experts):
    queue, popped, came = ExpertQueue(max_passes=max_passes), 0, {}
    for _ in range(60):
        for _ in range(data.draw(st.integers(0, 3), label="arrivals")):
            request = len(came)
            came[request] = popped
            queue.push(f"e{data.draw(st.integers(0, experts - 1))}", request)
        resident = {f"e{data.draw(st.integers(0, experts - 1))}"}
        found = queue.pop(resident)
        if found is not None:
            for request in found[1]:
                assert popped - came[request] <= max_passes + experts - 1
            assert found[1] == sorted(found[1])
            popped += 1


# The store


def test_hits_misses_and_bytes_by_hand(tmp_path):
    with opened(tmp_path, ABC, 20, eviction="lru") as store:
        for name in "abacb":  # a and b load, a hits, c evicts b, b evicts a
            with store.use(name, PATIENCE_S) as expert:
                assert expert == (tmp_path / name).read_bytes()
        assert sorted(store.resident()) == ["b", "c"]
        stats = store.stats()
    assert (stats["requests"], stats["hits"], stats["switches"], stats["hit_rate"]) == (5, 1, 4, 0.2)
    host = stats["tiers"]["host"]
    assert (host["bytes_moved"], host["loads"], host["evictions"]) == (40, 4, 2)
    assert (host["used_bytes"], host["peak_bytes"]) == (20, 20)
    assert stats["switch_s_p50"] <= stats["switch_s_p95"]


def test_three_tiers(tmp_path):
    """All three fit the host, two the device: the third time around nothing is read from disk."""
    reads, copies, gone = [], [], []
    with opened(
        tmp_path,
        ABC,
        30,
        eviction="lru",
        device_bytes=20,
        load=lambda path: (reads.append(path.name), path.read_bytes())[1],
        to_device=lambda value: (copies.append(value[:1]), memoryview(value))[1],
        on_evict=lambda tier, name, value: gone.append((tier, name)),
    ) as store:
        for name in "abcabc":
            with store.use(name, PATIENCE_S) as expert:
                assert isinstance(expert, memoryview)
        assert (reads, len(copies)) == (["a", "b", "c"], 6)
        assert sorted(store.resident("host")) == ["a", "b", "c"]
        assert sorted(store.resident()) == ["b", "c"]
        assert gone == [("device", name) for name in "abca"]
        assert store.stats()["tiers"]["device"]["bytes_moved"] == 60


def test_device_sizes_may_differ(tmp_path):
    files(tmp_path, ABC)
    store = ExpertStore(lambda path: path.read_bytes(), host_bytes=30, to_device=bytes, device_bytes=5)
    with store:
        store.add("a", tmp_path / "a", device_bytes=5)
        with store.use("a", PATIENCE_S):
            assert [tier["used_bytes"] for tier in store.stats()["tiers"].values()] == [10, 5]
        with pytest.raises(
            CapacityError, match=r"'b' takes 10 bytes of device memory, which has 5; raise device_bytes to 10"
        ):
            store.add("b", tmp_path / "b")


def test_what_is_in_use_stays(tmp_path):
    with opened(tmp_path, ABC, 20, eviction="lru") as store:
        with store.use("a", PATIENCE_S) as kept:
            for name in "bcb":
                with store.use(name, PATIENCE_S):
                    assert "a" in store.resident()
            assert kept == b"a" * 10
        store.pin("c", PATIENCE_S)
        store.pin("c", PATIENCE_S)  # twice is once
        for name in "abab":
            with store.use(name, PATIENCE_S):
                assert "c" in store.resident()
        store.unpin("c")
        for name in "ab":
            with store.use(name, PATIENCE_S):
                pass
        assert "c" not in store.resident()
        with pytest.raises(InputError, match="'c' is not pinned; pinned are: none"):
            store.unpin("c")


def test_requests_wait_for_room_and_may_give_up(tmp_path):
    with opened(tmp_path, ABC, 10) as store:
        with store.use("a", PATIENCE_S):
            with (
                pytest.raises(
                    CapacityError, match=r"'b' was not loaded within 0.05 s; others in use may hold all of host"
                ),
                store.use("b", 0.05),
            ):
                pass
            waiting = store.request("c")
            assert not waiting.done()
        with waiting.result(PATIENCE_S) as expert:  # a was let go
            assert expert == b"c" * 10
        assert "b" not in store.resident()  # nobody waits for it any more


def test_released_leases_are_closed(tmp_path):
    with opened(tmp_path, ABC, 20) as store:
        lease = store.request("a").result(PATIENCE_S)
        lease.release()
        lease.release()
        with pytest.raises(InputError, match="the lease of expert 'a' was released"):
            _ = lease.expert
        with store.use("b", PATIENCE_S), store.use("c", PATIENCE_S):  # a second release did not take a pin from others
            assert sorted(store.resident()) == ["b", "c"]


def test_many_requests_share_one_load(tmp_path):
    gate = Gate()
    with opened(tmp_path, ABC, 20, load=gate) as store:
        futures = [store.request("a") for _ in range(5)]
        assert gate.begun.wait(PATIENCE_S)
        futures += [store.request("a") for _ in range(5)]  # while it loads
        gate.go.set()
        leases = [future.result(PATIENCE_S) for future in futures]
        assert gate.calls == ["a"]
        assert {lease.expert for lease in leases} == {b"a" * 10}
        assert store.stats()["hits"] == 0


def test_prefetch_makes_the_request_a_hit(tmp_path):
    with opened(tmp_path, ABC, 20, eviction="lru") as store:
        for name in "bc":
            with store.use(name, PATIENCE_S):
                pass
        store.prefetch("a").result(PATIENCE_S)
        assert sorted(store.resident()) == ["a", "c"]
        with store.use("a", PATIENCE_S):
            pass
        store.prefetch("a").result(PATIENCE_S)  # it is there
        stats = store.stats()
        assert (stats["hits"], stats["prefetched"], stats["prefetch_used"], stats["prefetch_dropped"]) == (1, 1, 1, 0)


def test_requests_overtake_prefetches_and_prefetches_never_wait_for_room(tmp_path):
    gate = Gate()
    with opened(tmp_path, ABC, 20, load=gate) as store:
        first = store.request("a")
        assert gate.begun.wait(PATIENCE_S)
        ahead, asked = store.prefetch("b"), store.request("c")
        gate.go.set()
        held = [first.result(PATIENCE_S), asked.result(PATIENCE_S)]
        ahead.result(PATIENCE_S)
        assert gate.calls == ["a", "c"]  # b found all room in use
        assert store.stats()["prefetch_dropped"] == 1
        for lease in held:
            lease.release()
        with store.use("b", PATIENCE_S) as expert:
            assert expert == b"b" * 10


def test_prefetch_that_was_given_up_does_not_take_a_request_with_it(tmp_path):
    """A request may come between the moment a prefetch finds no room and the moment it is given up."""
    for _ in range(30):
        with opened(tmp_path, ABC, 10) as store:
            lease = store.request("a").result(PATIENCE_S)
            ahead = store.prefetch("b")
            asked = store.request("b")
            lease.release()
            with asked.result(PATIENCE_S) as expert:
                assert expert == b"b" * 10
            ahead.result(PATIENCE_S)


def test_guesses_can_be_taken_back(tmp_path):
    gate = Gate()
    with opened(tmp_path, ABC, 20, load=gate, eviction="lru", grace_s=1e6) as store:
        first = store.request("a")
        assert gate.begun.wait(PATIENCE_S)
        ahead = store.prefetch("b")
        store.retract("b")  # before it began
        ahead.result(PATIENCE_S)
        gate.go.set()
        first.result(PATIENCE_S).release()
        store.prefetch("b").result(PATIENCE_S)
        with store.use("a", PATIENCE_S):
            pass
        with store.use("c", PATIENCE_S):  # b was spared, so a went, although it was used since
            assert sorted(store.resident()) == ["b", "c"]
        store.retract("b")
        with store.use("a", PATIENCE_S):
            assert sorted(store.resident()) == ["a", "c"]
        assert gate.calls == ["a", "b", "c", "a"]
        with pytest.raises(InputError, match="no expert 'law'"):
            store.retract("law")


def test_works_on_an_event_loop(tmp_path):
    async def one(store, name):
        async with store.use_async(name, PATIENCE_S) as expert:
            return expert[:1]

    async def main(store):
        return await asyncio.gather(*(one(store, name) for name in "abacb"))

    with opened(tmp_path, ABC, 20) as store:
        assert asyncio.run(main(store)) == [b"a", b"b", b"a", b"c", b"b"]
        assert not any(resident.pins for resident in store._top.residents.values())


@pytest.mark.parametrize("device", [False, True])
def test_a_lease_given_back_is_the_last_pin(tmp_path, device):
    """Whoever gives the only lease back may remove the expert at once, even where the loading thread still runs."""
    tiers = {"to_device": bytes.upper, "device_bytes": 20} if device else {}
    removed = []

    def leave(future):
        future.result().release()
        store.remove("a")
        removed.append("a")

    with opened(tmp_path, ABC, 20, **tiers) as store:
        # The callback runs on the loading thread, right where it hands the expert out.
        store.request("a").add_done_callback(leave)
        until(lambda: removed == ["a"])


@pytest.mark.parametrize("comes", ["before", "after"])
def test_cancelled_waiters_leave_no_pin(tmp_path, comes):
    """The expert may be handed out before the loop tells the waiter that it was cancelled."""
    gate = Gate()

    async def main(store):
        async def wait():
            async with store.use_async("a"):
                raise AssertionError("was cancelled")

        task = asyncio.create_task(wait())
        await asyncio.sleep(0)
        assert gate.begun.wait(PATIENCE_S)
        if comes == "before":
            gate.go.set()
            until(lambda: store.resident() == ["a"] and not store._jobs)  # the loop is not let run meanwhile
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.go.set()

    with opened(tmp_path, ABC, 20, load=gate) as store:
        asyncio.run(main(store))
        until(lambda: not store._jobs and not any(resident.pins for resident in store._top.residents.values()))
        store.remove("a")


def test_late_experts_on_an_event_loop(tmp_path):
    async def main(store):
        async with store.use_async("b", 0.05):
            pass

    with (
        opened(tmp_path, ABC, 10) as store,
        store.use("a", PATIENCE_S),
        pytest.raises(CapacityError, match=r"'b' was not loaded within 0.05 s"),
    ):
        asyncio.run(main(store))


@pytest.mark.parametrize("eviction", ["rate", "lru", "lfu"])
def test_ten_thousand_random_requests_keep_the_limits(tmp_path, eviction):
    generator = np.random.default_rng(0)
    sizes = {f"e{number}": int(generator.integers(1, 40)) for number in range(12)}
    most = {"host": 0, "device": 0}
    held = {"host": {}, "device": {}}

    def note(tier, name, size):
        held[tier][name] = size
        most[tier] = max(most[tier], sum(held[tier].values()))

    def load(path):
        note("host", path.name, sizes[path.name])
        return path.name, path.read_bytes()

    def copy(value):
        note("device", value[0], sizes[value[0]])
        return value

    store = opened(
        tmp_path,
        sizes,
        100,
        load=load,
        to_device=copy,
        device_bytes=60,
        eviction=eviction,
        on_evict=lambda tier, name, value: held[tier].pop(name),
    )
    popularity = generator.dirichlet(np.full(12, 0.5))
    names = [f"e{at}" for at in generator.choice(12, 10_000, p=popularity)]
    with store:
        for number, name in enumerate(names):
            if number % 50 == 0:
                store.prefetch(names[(number + 1) % len(names)])
            with store.use(name, PATIENCE_S) as (found, content):
                assert found == name
                assert len(content) == sizes[name]
        stats = store.stats()
    assert stats["requests"] == 10_000
    assert stats["hits"] + stats["switches"] == 10_000
    for tier, capacity in (("host", 100), ("device", 60)):
        assert most[tier] <= capacity  # counted by what was loaded and evicted, not by the store
        assert stats["tiers"][tier]["peak_bytes"] <= capacity
        assert stats["tiers"][tier]["used_bytes"] == sum(held[tier].values())


def test_many_threads(tmp_path):
    sizes = {f"e{number}": 10 for number in range(6)}
    failures = []

    def work(store, seed):
        try:
            for at in np.random.default_rng(seed).integers(0, 6, 150):
                with store.use(f"e{at}", PATIENCE_S) as expert:
                    assert expert == bytes([97 + at]) * 10
                    if at % 2:
                        store.prefetch(f"e{(at + 1) % 6}")
        except BaseException as error:
            failures.append(error)

    with opened(tmp_path, sizes, 30, workers=2) as store:
        threads = [threading.Thread(target=work, args=(store, seed)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert not failures
        assert store.stats()["tiers"]["host"]["peak_bytes"] <= 30
        assert store.stats()["requests"] == 450


# What fails


def test_failed_load_leaves_no_trace_and_the_next_request_tries_again(tmp_path):
    broken = [True]

    def load(path):
        if broken[0]:
            raise OSError("disk on fire")
        return path.read_bytes()

    with opened(tmp_path, ABC, 10, load=load) as store:
        with pytest.raises(OSError, match="disk on fire"):
            store.request("a").result(PATIENCE_S)
        store.prefetch("a").result(PATIENCE_S)
        stats = store.stats()
        assert (store.resident(), stats["failed"], stats["tiers"]["host"]["used_bytes"]) == ([], 2, 0)
        broken[0] = False
        with store.use("a", PATIENCE_S) as expert:
            assert expert == b"a" * 10


def test_failed_copy_keeps_the_host_copy(tmp_path):
    def copy(value):
        raise MemoryError

    with opened(tmp_path, ABC, 30, to_device=copy, device_bytes=10) as store:
        with pytest.raises(MemoryError):
            store.request("a").result(PATIENCE_S)
        assert (store.resident(), store.resident("host")) == ([], ["a"])
        store.remove("a")  # nothing holds on to it


def test_half_written_checkpoint_is_never_served(tmp_path):
    with opened(tmp_path, ABC, 20) as store:
        (tmp_path / "a").write_bytes(b"x" * 4)  # somebody writes over it
        with pytest.raises(
            CheckpointError, match=r"the files of expert 'a' .* are not those that were added; add it again"
        ):
            store.request("a").result(PATIENCE_S)
        (tmp_path / "a").write_bytes(b"y" * 10)
        store.add("a", tmp_path / "a")
        with store.use("a", PATIENCE_S) as expert:
            assert expert == b"y" * 10


def test_checkpoint_that_changes_while_it_is_read_is_not_served(tmp_path):
    def load(path):
        found = path.read_bytes()
        path.write_bytes(b"z" * 11)
        return found

    with (
        opened(tmp_path, ABC, 20, load=load) as store,
        pytest.raises(CheckpointError, match="are not those that were added"),
    ):
        store.request("a").result(PATIENCE_S)


def test_removed_checkpoint(tmp_path):
    with opened(tmp_path, ABC, 20) as store:
        (tmp_path / "a").unlink()
        with pytest.raises(CheckpointError, match=r"no expert in .*a; it must be a file"):
            store.request("a").result(PATIENCE_S)


def test_loading_thread_that_dies_with_its_expert_does_not_serve_it(tmp_path):
    """An expert that is on its way is not resident, whatever becomes of the load."""
    gate = Gate()
    store = opened(tmp_path, ABC, 20, load=gate)
    future = store.request("a")
    assert gate.begun.wait(PATIENCE_S)
    assert store.resident() == []
    assert store.stats()["tiers"]["host"]["used_bytes"] == 10  # its room is taken
    gate.go.set()
    future.result(PATIENCE_S).release()
    store.close()


def test_adding_again_takes_the_new_files(tmp_path):
    with opened(tmp_path, ABC, 20) as store:
        with store.use("a", PATIENCE_S):
            (tmp_path / "new").write_bytes(b"n" * 7)
            with pytest.raises(InputError, match="'a' is in use"):
                store.add("a", tmp_path / "new")
        store.add("a", tmp_path / "new")
        with store.use("a", PATIENCE_S) as expert:
            assert expert == b"n" * 7
        store.remove("a")
        assert "a" not in store
        assert store.stats()["tiers"]["host"]["used_bytes"] == 0


def test_folders_are_checkpoints_too(tmp_path):
    folder = tmp_path / "expert"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "weights").write_bytes(b"w" * 5)
    assert [(name, size) for name, size, _ in signature_of(folder)] == [("config.json", 2), ("sub/weights", 5)]
    with ExpertStore(lambda path: sorted(path.rglob("*")), host_bytes=7) as store:
        store.add("e", folder)
        with store.use("e", PATIENCE_S) as found:
            assert folder / "config.json" in found


def test_closing_cancels_what_waits(tmp_path):
    gate = Gate()
    store = opened(tmp_path, ABC, 10, load=gate)
    begun = store.request("a")
    assert gate.begun.wait(PATIENCE_S)
    waiting = store.request("b")
    closing = threading.Thread(target=store.close)
    closing.start()
    until(waiting.cancelled)
    gate.go.set()
    closing.join(PATIENCE_S)
    assert begun.cancelled()
    with pytest.raises(InputError, match="the expert store is closed"):
        store.request("a")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExpertStore(bytes, host_bytes=0), "capacity of host is 0 bytes"),
        (lambda: ExpertStore(bytes, host_bytes=1, to_device=bytes), "belong together"),
        (
            lambda: ExpertStore(bytes, host_bytes=1, eviction="fifo"),
            "eviction is 'fifo'; it must be one of rate, lru, lfu",
        ),
        (lambda: ExpertStore(bytes, host_bytes=1, workers=0), "workers is 0"),
        (lambda: ExpertQueue(max_passes=-1), "max_passes is -1"),
        (lambda: ExpertQueue(batch=0), "batch 0"),
    ],
)
def test_arguments_that_may_not_be(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_unknown_experts_and_missing_files(tmp_path):
    with opened(tmp_path, ABC, 20) as store:
        for call in (store.request, store.prefetch, store.remove):
            with pytest.raises(InputError, match="no expert 'law' in the store; it has a, b, c"):
                call("law")
        with pytest.raises(CheckpointError, match="no expert in"):
            store.add("law", tmp_path / "law")
        (tmp_path / "empty").mkdir()
        with pytest.raises(CheckpointError, match="no expert in"):
            store.add("law", tmp_path / "empty")
        with pytest.raises(CapacityError, match=r"'big' takes 21 bytes of host memory, which has 20"):
            store.add("big", tmp_path / "a", host_bytes=21)


def test_rate_aware_moves_fewer_bytes_than_lru_where_loads_differ():
    """Loops over more experts than fit are what LRU is worst at; the rate keeps some of them. By simulation of the decisions alone."""
    moved = {}
    for eviction in ("rate", "lru"):
        tier, usage, moved[eviction] = Tier("host", 30, eviction), {name: Usage(50.0) for name in "abcd"}, 0
        for now, name in enumerate(itertools.islice(itertools.cycle("aabacad"), 200)):
            usage[name].touch(float(now))
            if tier.ready(name) is None:
                for gone in tier.victims(10, usage, float(now)):
                    tier.drop(gone)
                resident = tier.begin(name, 10)
                resident.is_ready, resident.load_s, resident.since_s = True, 1.0, float(now)
                moved[eviction] += 10
        assert tier.peak_bytes <= 30
    assert moved["rate"] <= moved["lru"]
