"""What an idle group says of itself is so: a rank with nothing to do tells how it is after whatever it was asked, and is counted once."""

import pytest

from anabranch.serving.core.request import Request, Sampling
from anabranch.serving.elasticmoe.rank_boot import Limits
from paper_ranks import PaperGroup, PaperRank

LIMITS = Limits(num_blocks=16, block_tokens=4, max_positions=64, max_seqs=2)


def asked(id, tokens=30):
    sampling = Sampling(max_tokens=tokens, ignore_eos=True)
    return Request(id=id, prompt=(1, 2, 3, ord(id) % 7, 5, 6), sampling=sampling)


# Of a rank that runs one of two requests and has a third that waits: what it is asked until it has nothing to do, and how full it is then.
ASKED = {
    "cancelled": ([("abort", {"id": id}) for id in "abc"], 0.0),
    "given back": ([("give_back", {"count": 3}), *(("abort", {"id": id}) for id in "ab")], 0.0),
    "no prefixes": ([*(("abort", {"id": id}) for id in "abc"), ("reset_prefix_cache", {})], 0.0),
    "paused": ([("abort", {"id": "a"}), ("abort", {"id": "c"}), ("pause_request", {"id": "b"})], 0.25),
    "blocks of another": ([*(("abort", {"id": id}) for id in "abc"), ("give", {"blocks": (7, 8, 9)})], 0.0),
}


@pytest.mark.parametrize(("asks", "usage"), ASKED.values(), ids=ASKED)
def test_the_last_picture_of_a_rank_is_of_how_it_is_when_it_falls_idle(asks, usage):
    pictures = []
    rank = PaperRank(LIMITS, lambda event: event[0] == "outputs" and event[2] and pictures.append(event[2].gauges))
    if any(name == "give" for name, _ in asks):
        rank.scheduler.pool.hold((7, 8, 9))
    for id in "abc":
        rank.channel.come.append((None, "submit", {"request": asked(id)}))
    # The first step is told of, as any is from time to time.
    for _ in range(9):
        rank.step()
    rank.channel.come.extend((None, name, given) for name, given in asks)
    rank.run_until_idle()
    now = rank.scheduler.stats().gauges
    assert pictures[-1] == now
    assert now["kv_usage_ratio"] == usage
    # And once: nothing more is told of what stays as it is.
    count = len(pictures)
    rank.run_until_idle()
    assert len(pictures) == count


def test_a_group_whose_requests_were_all_cancelled_says_that_its_memory_is_free():
    group = PaperGroup(LIMITS, (0,))
    group.submit(asked("a"))
    for _ in range(20):
        group.active.ranks[0].step()
    group.counts.picture(group.active, 0, group.active.ranks[0].scheduler.stats())
    assert group.stats().gauges["kv_usage_ratio"] > 0.2
    group.ledger.abort("a")
    group.active.ranks[0].run_until_idle()
    assert group.stats().gauges["kv_usage_ratio"] == 0.0


def test_what_idle_ranks_have_counted_is_counted_once_however_often_devices_change():
    group = PaperGroup(LIMITS, (0, 1))
    group.submit(asked("a"))
    group.submit(asked("b"))
    while group.ledger.live:
        for device in group.devices:
            group.active.ranks[device].step()
    for devices in ((0, 1, 2), (1, 0), (0,), (0, 2)):
        for device in group.devices:
            group.active.ranks[device].run_until_idle()
        assert group.stats().counters["steps"] == group.steps > 30
        group.change(devices)
    for id in "cd":
        group.submit(asked(id))
    while group.ledger.live:
        for device in group.devices:
            group.active.ranks[device].step()
    assert group.stats().counters["steps"] == group.steps
