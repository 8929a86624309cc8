import random
from collections import Counter

import pytest

from scheduler_runs import RandomTier, random_run

# Random lives


@pytest.mark.parametrize("part", range(4))
def test_random_lives_give_what_each_request_gives_alone(part):
    for seed in range(60 * part, 60 * part + 60):
        random_run(seed)


def test_random_lives_with_pauses():
    preemptions = 0
    for seed in range(20_000, 20_150):
        driven = random_run(seed, pauses=0.1, tier=RandomTier(random.Random(seed)) if seed % 3 == 0 else None)
        preemptions += driven.scheduler.stats().counters["preemptions"]
    assert preemptions > 100


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_thousands_of_random_lives(part):
    for seed in range(1000 * (part + 1), 1000 * (part + 2)):
        rng = random.Random(seed)
        random_run(seed, pauses=0.1 * (seed % 2), tier=RandomTier(rng) if seed % 3 == 0 else None)


def test_random_lives_with_a_second_tier():
    moved = 0
    for seed in range(10_000, 10_080):
        tier = RandomTier(random.Random(seed), num_slots=24)
        driven = random_run(seed, tier=tier)
        counters = driven.scheduler.stats().counters
        moved += counters["swapped_in_blocks"]
        assert counters["swapped_out_blocks"] <= tier.saved
    assert moved > 50


def windowed_lives(first, count):
    """Counters of random lives of models with windows, in all."""
    total = Counter()
    for seed in range(first, first + count):
        driven = random_run(seed, pauses=0.1 * (seed % 2), has_drafts=seed % 3 == 0, has_windows=True)
        total.update(driven.scheduler.stats().counters)
    return total


@pytest.mark.parametrize("part", range(4))
def test_random_lives_of_models_with_windows(part):
    total = windowed_lives(30_000 + 60 * part, 60)
    assert total["preemptions"] > 20
    assert total["cached_prompt_tokens"] > 200
    assert total["accepted_draft_tokens"] > 20


@pytest.mark.slow
@pytest.mark.parametrize("part", range(5))
def test_thousands_of_random_lives_of_models_with_windows(part):
    windowed_lives(40_000 + 1000 * part, 1000)
