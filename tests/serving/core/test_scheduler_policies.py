import pickle
import random
import time

import pytest

from anabranch.errors import InputError
from anabranch.serving.core import prefix
from anabranch.serving.core.batch import PENDING, Sampled
from anabranch.serving.core.prefix import child_key
from anabranch.serving.core.request import Finish, Request
from anabranch.serving.core.scheduler import Scheduler, SchedulerConfig
from scheduler_runs import RandomTier, drive, request, to_end

# Steps formed ahead


def test_a_step_formed_ahead_has_pending_tokens_and_an_end_is_seen_one_late():
    scheduler = Scheduler(SchedulerConfig(num_blocks=8, max_positions=40, is_async=True, stop_tokens=(9,)))
    scheduler.add(Request(id="a", prompt=(1, 2)))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert scheduler.schedule() is None
    assert first.chunks[0].tokens == (1, 2)
    assert (second.chunks[0].tokens, second.chunks[0].start, second.chunks[0].samples) == ((PENDING,), 2, True)
    scheduler.update(first, [Sampled(id="a", token=4)])
    third = scheduler.schedule()
    (output,) = scheduler.update(second, [Sampled(id="a", token=9)])
    assert output.finish is Finish.STOP
    assert scheduler.schedule() is None
    assert scheduler.has_work
    assert scheduler.pool.num_free == 7, "a step that uses the block is under way"
    assert scheduler.update(third, [Sampled(id="a", token=1)]) == []
    assert scheduler.pool.num_free == 8
    assert not scheduler.has_work
    assert scheduler.stats().counters["discarded_tokens"] == 1


def test_an_end_by_length_wastes_nothing_when_formed_ahead():
    driven = drive(is_async=True)
    for name in "abc":
        driven.add(request(name, 5, max_tokens=7))
    to_end(driven)
    assert driven.scheduler.stats().counters["discarded_tokens"] == 0
    assert driven.runner.computed == 3 * (5 + 6)


def test_one_sent_back_with_a_token_pending_waits_for_it():
    driven = drive(is_async=True, num_blocks=5, max_positions=20, prefix_cache=False, max_decodes=1)
    driven.add(request("a", 11, max_tokens=8))
    driven.add(request("b", 7, max_tokens=8))
    for _ in range(2):  # the prompts, and a's turn
        driven.form()
        driven.finish_step()
    driven.form()  # b's turn
    assert not driven.form()  # a needs a block of b's, which are free when the step has run
    assert driven.scheduler.stats().counters["preemptions"] == 1
    driven.abort("a")  # now there is room
    assert not driven.form()
    to_end(driven)


def test_without_is_async_a_step_waits_for_the_one_before():
    driven = drive()
    driven.add(request("a"))
    assert driven.form()
    assert not driven.form()
    to_end(driven)


# Policies


def test_decodes_take_turns_of_two_steps():
    calls = []

    def order(ids, size):
        calls.append((tuple(ids), size))
        return sorted(ids, key=lambda id: (ids.index(id) % 2, id))

    driven = drive(max_decodes=2, order=order)
    for name in "abcd":
        driven.add(request(name, 4, max_tokens=5))
    driven.step()
    groups = []
    for _ in range(4):
        driven.form()
        groups.append("".join(chunk.id for chunk in driven.formed[0].chunks))
        driven.finish_step()
    assert groups == ["ac", "bd", "ac", "bd"]
    assert calls[0] == (tuple("abcd"), 2)
    to_end(driven)


def test_with_more_than_two_steps_of_decodes_those_who_waited_longest_come_first():
    driven = drive(max_decodes=1, max_seqs=5)
    for name in "abcde":
        driven.add(request(name, 4, max_tokens=4))
    driven.step()
    groups = []
    while driven.form():
        groups.append("".join(chunk.id for chunk in driven.formed[0].chunks))
        driven.finish_step()
    assert all(sorted(groups[i : i + 5]) == list("abcde") for i in range(0, 15, 5))


def test_an_order_must_give_back_what_it_got():
    driven = drive(max_decodes=1, order=lambda ids, size: [*ids[1:], *ids[1:]])
    driven.add(request("a"))
    driven.add(request("b"))
    driven.step()
    with pytest.raises(InputError, match="order must give back"):
        driven.form()


def test_a_memory_policy_keeps_the_peak_within_the_cache():
    class Worst:
        """Every request writes all that it may."""

        seen: list = []  # noqa: RUF012

        def saw(self, num_output):
            self.seen.append(num_output)

        def remaining(self, num_output, max_tokens):
            return max_tokens - num_output

        def admits(self, running, candidate):
            return sum(map(sum, [*running, candidate])) <= 10 * 4

    lives = {}
    for memory in (None, Worst()):
        driven = drive(num_blocks=12, memory=memory, max_positions=48, prefix_cache=False)
        for number in range(6):
            driven.add(request(f"r{number}", 4, max_tokens=16))
        to_end(driven)
        lives[memory is None] = driven.scheduler.stats().counters["preemptions"]
    assert lives[True] > 0
    assert lives[False] == 0
    assert Worst.seen == [16] * 6


def test_a_preempted_request_loads_from_the_tier_instead_of_computing():
    runs = {}
    for name, tier in (("none", None), ("tier", RandomTier(random.Random(1), num_slots=64, refusals=0.0))):
        driven = drive(num_blocks=8, max_positions=32, tier=tier)
        for number in range(4):
            driven.add(request(f"r{number}", 7, max_tokens=20))
        to_end(driven)
        runs[name] = driven.runner.computed
        if tier is not None:
            assert driven.scheduler.stats().counters["swapped_in_blocks"] > 0
    assert runs["tier"] < runs["none"]


def test_a_reset_forgets_what_was_to_be_saved():
    class Eager(RandomTier):
        def filled(self, key, block):
            return self._save(key)

    driven = drive(tier=Eager(random.Random(0), refusals=0.0))
    driven.add(request("a", 9))
    driven.step()
    driven.scheduler.reset_prefixes()
    driven.form()
    assert driven.formed[0].swaps_out == ()
    driven.finish_step()
    driven.add(request("b", 9))
    driven.step()
    driven.form()
    assert len(driven.formed[0].swaps_out) == 2
    to_end(driven)


def test_a_scheduler_between_two_steps_can_be_pickled():
    driven = drive()
    driven.scheduler._clock = time.monotonic
    driven.add(request("a", 9, max_tokens=9))
    driven.form()
    driven.finish_step()
    driven.scheduler = pickle.loads(pickle.dumps(driven.scheduler))
    to_end(driven)


def test_a_step_costs_no_more_for_what_was_there_before(monkeypatch):
    hashed = []
    monkeypatch.setattr(prefix, "child_key", lambda parent, tokens: hashed.append(1) or child_key(parent, tokens))
    driven = drive(num_blocks=20, max_positions=80, block_tokens=4)
    driven.add(request("a", 9, max_tokens=60))
    driven.add(request("b", 9, max_tokens=60))
    tables = []
    while driven.form():
        chunks = driven.formed[0].chunks
        tables += [chunk.blocks for chunk in chunks if chunk.id == "a"]
        driven.finish_step()
    driven.check_end()
    assert driven.scheduler.stats().counters["preemptions"] > 0
    assert len(hashed) == 2 * ((9 + 60 - 1) // 4), "each block once, however often it was computed"
    assert len({id(table) for table in tables}) == 15, (
        "of 3 to 17 blocks: the table is made anew only when a block is added"
    )
