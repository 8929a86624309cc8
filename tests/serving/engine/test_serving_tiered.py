"""The second place for keys and values: its policy without tensors, its memory and file, and whole engines that use it."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import CapacityError, InputError
from anabranch.lm import Decoder
from anabranch.nn.attention import SelfAttention
from anabranch.serving import LLM
from anabranch.serving.core.offload import LruTier, PeakMemory
from anabranch.serving.core.request import Request, Sampling
from anabranch.serving.core.scheduler import SchedulerConfig
from anabranch.serving.engine.paged import PagedPool, PagedShape
from anabranch.serving.engine.runner import ModelRunner
from anabranch.serving.engine.tiered import TieredPool

SHAPE = PagedShape(layers=2, heads=1, width=4, streams=2)


def key(number):
    return bytes([number]) * 4


# Policy


def test_least_recently_used_makes_way():
    tier = LruTier(2)
    assert [tier.evicted(key(1), 10), tier.evicted(key(2), 11)] == [0, 1]
    assert tier.load(key(1)) == 0  # used: 2 is the oldest now
    tier.formed()
    assert tier.evicted(key(3), 12) == 1
    assert (tier.holds(key(1)), tier.holds(key(2)), tier.holds(key(3))) == (True, False, True)
    assert tier.evicted(key(1), 10) is None  # saved already
    assert (tier.saved, tier.loaded, tier.dropped) == (3, 1, 1)


def test_what_is_read_is_not_overwritten_before_the_batch_is_formed():
    tier = LruTier(1)
    tier.evicted(key(1), 0)
    assert tier.load(key(1)) == 0
    assert tier.evicted(key(2), 1) is None
    assert tier.refused == 1
    tier.formed()
    assert tier.evicted(key(2), 1) == 0
    with pytest.raises(InputError, match="ask `holds` first"):
        tier.load(key(1))


def test_eager_tiers_save_full_blocks_once():
    assert LruTier(2).filled(key(1), 0) is None
    tier = LruTier(2, is_eager=True)
    assert tier.filled(key(1), 0) == 0
    assert tier.evicted(key(1), 0) is None
    tier.reset()
    assert len(tier) == 0
    assert tier.filled(key(1), 0) == 0
    with pytest.raises(InputError, match="at least 1"):
        LruTier(0)


@given(
    st.integers(1, 4), st.lists(st.tuples(st.sampled_from(["evict", "load", "formed"]), st.integers(0, 6)), max_size=60)
)
def test_slots_hold_one_key_each_and_pinned_ones_stay(num_slots, moves):
    tier, slots, pinned = LruTier(num_slots), {}, {}
    for move, number in moves:
        if move == "formed":
            tier.formed()
            pinned.clear()
        elif move == "load":
            assert tier.holds(key(number)) == (number in slots.values())
            if number in slots.values():
                slot = tier.load(key(number))
                assert slots[slot] == number
                pinned[slot] = number
        else:
            slot = tier.evicted(key(number), 0)
            if slot is not None:
                assert number not in slots.values()
                assert slot not in pinned
                slots[slot] = number
    assert len(tier) == len(slots) <= num_slots
    assert set(slots) <= set(range(num_slots))


# Admission


def test_peak_by_hand():
    """10 tokens and 5 to come, 20 and 1: in one step 32, and then the first alone grows to 15; the peak is 32."""
    assert PeakMemory.peak([(10, 5), (20, 1)]) == 10 + 20 + 2
    assert PeakMemory.peak([(10, 50), (20, 1)]) == 60
    assert PeakMemory.peak([]) == 0


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 30)), max_size=8))
def test_peak_is_that_of_all_steps(requests):
    every = [sum(tokens + step for tokens, left in requests if left >= step) for step in range(1, 31)]
    assert PeakMemory.peak(requests) == max(every, default=0)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 30)), max_size=8), st.integers(1, 60))
def test_peak_of_what_windows_keep_is_that_of_all_steps(requests, keeps):
    every = [sum(min(tokens + step, keeps) for tokens, left in requests if left >= step) for step in range(1, 31)]
    assert PeakMemory.peak(requests, keeps) == max(every, default=0)


def test_windows_count_as_what_they_keep_and_not_as_whole_sequences(tiny_model):
    model = tiny_model(attention=SelfAttention.Config(num_heads=4, num_kv_heads=2, window=8), max_positions=200)
    steps = []
    for by_peak in (False, True):
        llm = LLM(
            model, admit_by_peak=by_peak, block_tokens=4, num_blocks=40, max_batched_tokens=16, prefix_cache=False
        )
        llm.generate([[at] * 60 for at in range(3)], Sampling(temperature=0.0, max_tokens=20, ignore_eos=True))
        steps.append(llm.engine.scheduler.stats().counters["steps"])
        llm.close()
    assert steps[0] == steps[1]


def test_admission_learns_lengths_and_never_starves():
    memory = PeakMemory(100, mean_output=20)
    assert memory.admits([], (500, 500))  # alone: whether it can run at all is not asked here
    assert memory.admits([(30, 10)], (40, 5))  # 30 + 40 + 2 * 5 = 80
    assert not memory.admits([(30, 10)], (61, 5))
    assert (memory.remaining(5, 1000), memory.remaining(5, 8), memory.remaining(20, 1000), memory.remaining(8, 8)) == (
        15,
        3,
        10,
        1,
    )
    for _ in range(500):
        memory.saw(60)
    assert memory.mean_output == pytest.approx(60, abs=0.1)
    with pytest.raises(InputError, match="capacity"):
        PeakMemory(0)


# Memory and file


def filled(pool):
    generator = torch.Generator().manual_seed(0)
    for part in (pool.key, pool.value):
        part.copy_(torch.randn(part.shape, generator=generator))
    return pool


@pytest.mark.parametrize(("host", "disk"), [(8, 0), (3, 5), (1, 7)])
def test_blocks_come_back_as_they_were(host, disk, tmp_path):
    pool = filled(TieredPool(SHAPE, 10, block_tokens=4, host_blocks=host, disk_blocks=disk, folder=tmp_path))
    plain = filled(PagedPool(SHAPE, 10, block_tokens=4, host_blocks=8))
    draw = random.Random(3)
    saved = []
    for _ in range(30):
        slots = draw.sample(range(8), draw.randint(1, 5))
        out = list(zip(draw.sample(range(10), len(slots)), slots, strict=True))
        saved = sorted({*saved, *slots})
        for each in (pool, plain):
            each.swap_out(out)
        back = list(
            zip(draw.sample(saved, min(len(saved), 4)), draw.sample(range(10), min(len(saved), 4)), strict=True)
        )
        for each in (pool, plain):
            each.swap_in(back)
        assert torch.equal(pool.key, plain.key)
        assert torch.equal(pool.value, plain.value)
    assert (pool.spilled > 0) == (disk > 0)
    assert (pool.fetched > 0) == (disk > 0)
    pool.close()
    assert list(tmp_path.iterdir()) == []


def test_what_the_tier_cannot_do_is_told():
    pool = filled(TieredPool(SHAPE, 4, block_tokens=4, host_blocks=1, disk_blocks=1))
    for move, message in (
        (lambda: pool.swap_out([(0, 2)]), "outside the tier's 2"),
        (lambda: pool.swap_in([(1, 0)]), "never saved"),
    ):
        with pytest.raises(InputError, match=message):
            move()
    with pytest.raises(InputError, match="at least 1"):
        TieredPool(SHAPE, 4, host_blocks=0)
    small = filled(TieredPool(SHAPE, 4, block_tokens=4, host_blocks=1))
    small.num_slots = 2  # a scheduler that counts on more than there is
    small.swap_out([(0, 0)])
    with pytest.raises(CapacityError, match="disk_blocks"):
        small.swap_out([(1, 1)])


# Whole engines


def run(model, requests, *, num_blocks, tier=None, pool=None, is_async=False, max_batched_tokens=24):
    """Token streams of all requests, the scheduler and the runner."""
    config = SchedulerConfig(
        max_batched_tokens=max_batched_tokens,
        max_seqs=4,
        num_blocks=num_blocks,
        block_tokens=4,
        max_positions=96,
        is_async=is_async,
    )
    scheduler = config.build(tier=tier)
    runner = ModelRunner(model, num_blocks=num_blocks, block_tokens=4, pool=pool)
    for request in requests:
        scheduler.add(request)
    streams = {request.id: [] for request in requests}
    for _ in range(5000):
        if not scheduler.has_work:
            break
        batch = scheduler.schedule()
        for output in scheduler.update(batch, runner.run(batch)):
            streams[output.id] += output.tokens
    assert not scheduler.has_work
    return streams, scheduler


def small_model():
    attention = SelfAttention.Config(num_heads=2, num_kv_heads=1)
    return Decoder.Config(vocab_size=61, dim=16, num_layers=2, attention=attention, max_positions=96).build(seed=4)


def rounds(count=8):
    """Requests that share beginnings, so that blocks are evicted and wanted again."""
    draw = random.Random(1)
    starts = [tuple(draw.randrange(61) for _ in range(20)) for _ in range(3)]
    return [
        Request(
            id=str(number),
            prompt=starts[number % 3] + tuple(draw.randrange(61) for _ in range(number)),
            sampling=Sampling(max_tokens=14, temperature=0, ignore_eos=True),
            arrival=float(number),
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("is_eager", [False, True])
@pytest.mark.parametrize("host", [40, 4])
def test_streams_are_the_same_with_offload_and_less_is_computed(host, is_eager):
    model, requests = small_model(), rounds()
    plain, without = run(model, requests, num_blocks=14)
    alone = {}
    for request in requests:
        alone |= run(model, [request], num_blocks=24)[0]
    assert plain == alone
    pool = TieredPool(PagedShape.of(model), 14, block_tokens=4, host_blocks=host, disk_blocks=40 - host)
    tier = LruTier(40, is_eager=is_eager)
    streams, scheduler = run(model, requests, num_blocks=14, tier=tier, pool=pool)
    assert streams == alone
    assert tier.loaded > 0
    assert (pool.fetched > 0) == (host == 4)
    counters = scheduler.stats().counters
    assert counters["swapped_in_blocks"] == tier.loaded
    assert counters["swapped_out_blocks"] == tier.saved
    assert counters["cached_prompt_tokens"] >= without.stats().counters["cached_prompt_tokens"]
