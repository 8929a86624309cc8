"""The genetic search: it finds what is best, measures each chromosome once, and takes the same way again."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.depth.genetic import GeneticConfig, evolve
from anabranch.errors import AnabranchError, ConfigError, NotFiniteError

GOAL = (3, 1, 4, 1, 5)


def fitness(row):
    return -sum(abs(a - b) for a, b in zip(row, GOAL, strict=True))


def cross(mother, father, draw):
    return tuple(draw.choice(pair) for pair in zip(mother, father, strict=True))


def mutate(row, draw):
    place = draw.randrange(len(row))
    return (*row[:place], draw.randrange(6), *row[place + 1 :])


def search(measure=fitness, **options):
    config = GeneticConfig(
        **{"population": 20, "generations": 30, "max_evaluations": 2000, **options.pop("config", {})}
    )
    return evolve([(0,) * 5], measure, cross=cross, mutate=mutate, config=config, **options)


def test_it_finds_the_goal():
    found = search()
    assert (found.best, found.fitness) == (GOAL, 0)
    bests = [one.best for one in found.history]
    assert bests == sorted(bests), "the elite is never lost"
    assert [one.number for one in found.history] == list(range(31))


def test_a_chromosome_is_measured_once_and_a_memo_ends_the_work():
    seen, memo = [], {}

    def measure(row):
        seen.append(row)
        return fitness(row)

    first = search(measure, memo=memo)
    assert len(seen) == len(set(seen)) == first.evaluations == len(memo)
    again = search(measure, memo=memo)
    assert len(seen) == first.evaluations
    assert (again.best, again.evaluations) == (first.best, 0)
    assert [one.best for one in again.history] == [one.best for one in first.history]


def test_a_stopped_search_goes_on_where_it_was():
    whole, memo, left = search(), {}, [25]

    def measure(row):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return fitness(row)

    with pytest.raises(KeyboardInterrupt):
        search(measure, memo=memo)
    assert len(memo) == 25
    rest = search(memo=memo)
    assert (rest.best, rest.evaluations) == (whole.best, whole.evaluations - 25)


@pytest.mark.parametrize("stop", [1, 10, 29])
def test_a_stopped_search_ends_where_the_whole_one_ends_also_by_its_limit(stop):
    limit, memo, left = {"max_evaluations": 30}, {}, [stop]
    whole = search(config=limit)

    def measure(row):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return fitness(row)

    with pytest.raises(KeyboardInterrupt):
        search(measure, memo=memo, config=limit)
    rest = search(memo=memo, config=limit)
    assert (rest.best, rest.fitness, rest.evaluations) == (whole.best, whole.fitness, 30 - stop)
    assert [one.best for one in rest.history] == [one.best for one in whole.history]
    assert len(memo) == 30


def test_evaluations_are_limited():
    calls = []
    found = search(lambda row: calls.append(row) or fitness(row), config={"max_evaluations": 30})
    assert found.evaluations == len(calls) == 30
    assert found.fitness == max(map(fitness, calls))


def test_nan_is_the_worst_and_nothing_finite_an_error():
    found = search(lambda row: math.nan if row[0] == 3 else fitness(row))
    assert found.best[0] in (2, 4)
    assert found.fitness == -1
    with pytest.raises(NotFiniteError, match="no chromosome of the search has a finite fitness"):
        search(lambda row: math.nan)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), population=st.integers(2, 12), elitism=st.integers(0, 1))
def test_one_seed_one_way(seed, population, elitism):
    config = {"population": population, "elitism": elitism, "generations": 4}
    assert search(seed=seed, config=config) == search(seed=seed, config=config)


@pytest.mark.parametrize(
    "wrong", [{"population": 1}, {"elitism": 24}, {"generations": -1}, {"tournament": 0}, {"max_evaluations": 0}]
)
def test_wrong_sizes(wrong):
    with pytest.raises(AnabranchError):
        GeneticConfig(**wrong)


def test_no_members():
    with pytest.raises(ConfigError, match="no initial members"):
        evolve([], fitness, cross=cross, mutate=mutate)
