"""Schedules of FTP: projection, the grid, crossing and changing, and the search with either router."""

import math
import random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from anabranch.depth.ftp import (
    ScheduleConfig,
    TokenRouter,
    TokenSkipper,
    calibration_loss,
    finetune_schedule,
    kl_loss,
    project,
    search_schedule,
    uniform_schedule,
)
from anabranch.depth.ftp.schedule import ScheduleSpace, key_of
from anabranch.depth.genetic import GeneticConfig
from anabranch.depth.stack import stack_of
from anabranch.errors import ConfigError, DataError, InputError
from skipped_models import BLOCKS, decoder, items

SMALL = ScheduleConfig(genetic=GeneticConfig(population=6, generations=2, elitism=1))


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.tuples(st.floats(-3, 3), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=40),
    share=st.floats(0, 1),
)
def test_projection_keeps_mean_and_bounds(rows, share):
    values, low, high = [a for a, _, _ in rows], [min(b, c) for _, b, c in rows], [max(b, c) for _, b, c in rows]
    mean = (math.fsum(low) * (1 - share) + math.fsum(high) * share) / len(rows)
    made = project(values, mean, low, high)
    assert abs(math.fsum(made) / len(made) - mean) <= 1e-9
    assert all(a <= value <= b for value, a, b in zip(made, low, high, strict=True))
    # What is not at a bound was shifted alike.
    shifts = [m - v for m, v, a, b in zip(made, values, low, high, strict=True) if a + 1e-9 < m < b - 1e-9]
    assert not shifts or max(shifts) - min(shifts) < 1e-6


def test_projection_by_hand():
    assert project([0.0, 0.5, 1.0], 0.5, [0] * 3, [1] * 3) == (0.0, 0.5, 1.0)
    assert project([0.2, 0.4, 0.9], 0.6, [0] * 3, [0.9] * 3) == pytest.approx((0.35, 0.55, 0.9))
    with pytest.raises(ConfigError, match=r"a mean sparsity of 0\.8 over 2 blocks cannot be; .* allows 0 to 0\.5"):
        project([0.5, 0.5], 0.8, [0, 0], [0.0, 1.0])


@settings(max_examples=40, deadline=None)
@given(
    sparsity=st.floats(0, 0.8),
    blocks=st.integers(2, 30),
    seed=st.integers(0, 2**31),
    last=st.booleans(),
    first=st.booleans(),
)
def test_all_schedules_of_a_space_have_its_mean(sparsity, blocks, seed, last, first):
    config, draw = ScheduleConfig(first_dense=first, last_dense=last), random.Random(seed)
    assume(sparsity * blocks <= 0.9 * (blocks - first - last))
    space = ScheduleSpace.of(sparsity, blocks, config)
    members = list(space.initial([draw.random() for _ in range(blocks)], draw, 8).values())
    for _ in range(5):
        members.append(space.mutate(space.cross(draw.choice(members), draw.choice(members), draw), draw))
    for member in members:
        assert abs(math.fsum(member) / blocks - sparsity) <= 1e-9
        assert all(0 <= value <= 0.9 + 1e-12 for value in member)
        assert not (first and member[0])
        assert not (last and member[-1])


def test_schedules_are_on_the_grid_where_the_mean_is():
    space, draw = ScheduleSpace.of(0.3, 30, ScheduleConfig()), random.Random(0)
    members = list(space.initial([i / 30 for i in range(30)], draw, 12).values())
    for _ in range(40):
        members.append(space.mutate(space.cross(*draw.sample(members, 2), draw), draw))
    for member in members:
        assert all(abs(value / 0.05 - round(value / 0.05)) < 1e-8 for value in member)
    assert space.on_grid(members[3]) == members[3]
    assert {key_of(member) for member in members if member != members[0]}
    named = space.initial([i / 30 for i in range(30)], draw, 5)
    assert list(named) == ["uniform", "influence", "rising", "falling", "random 0"]
    assert named["influence"][1] > named["influence"][20], "blocks of little influence pass over more"
    assert named["rising"][1] < named["rising"][29]
    assert named["falling"][1] > named["falling"][29]


def test_a_change_moves_mass_between_two_blocks():
    space, draw = ScheduleSpace.of(0.4, 10, ScheduleConfig(mutation=1.0)), random.Random(1)
    begun = space.on_grid([0.4] * 10)
    changed = [space.mutate(begun, draw) for _ in range(60)]
    moved = [[block for block in range(10) if abs(one[block] - begun[block]) > 1e-9] for one in changed]
    assert {len(blocks) for blocks in moved} <= {0, 2}
    assert any(moved)
    most = max(abs(a - b) for one in changed for a, b in zip(one, begun, strict=True))
    halved = [space.mutate(begun, draw, 0.5) for _ in range(60)]
    assert 0.1 < most <= 0.15 + 1e-9
    assert max(abs(a - b) for one in halved for a, b in zip(one, begun, strict=True)) <= 0.1 + 1e-9


def test_no_more_mass_moves_than_there_is_and_has_room():
    space, draw = ScheduleSpace.of(0.3, 6, ScheduleConfig(mutation=1.0)), random.Random(2)
    begun = space.exact([0.0, 0.0, 0.9, 0.05, 0.85, 0.0])
    for _ in range(80):
        changed = [
            block
            for block, (a, b) in enumerate(zip(space.mutate(begun, draw), begun, strict=True))
            if abs(a - b) > 1e-9
        ]
        assert len(changed) in (0, 2)


@pytest.mark.parametrize("wrong", [-0.1, 0.9, 1.0, 2, float("nan"), float("inf"), True, "0.3", None])
def test_wrong_sparsities(wrong):
    with pytest.raises(ValueError, match=r"sparsity is .*; it must be at least 0 and below s_max=0\.9"):
        search_schedule(decoder(), items(), wrong)


def test_a_sparsity_that_the_free_blocks_do_not_allow():
    with pytest.raises(ConfigError, match=r"0\.8 over 2 blocks cannot be; .* allows 0 to 0\.45"):
        uniform_schedule(0.8, 2)
    assert uniform_schedule(0.3, 4) == pytest.approx((0.0, 0.4, 0.4, 0.4))
    assert uniform_schedule(0.3, 4, ScheduleConfig(first_dense=False)) == pytest.approx((0.3,) * 4)


@pytest.mark.parametrize("objective", ["nll", "kl"])
def test_the_search_finds_what_it_measured(objective):
    model, data, told = decoder(), items(), []
    found = search_schedule(model, data, 0.3, config=SMALL, objective=objective, on_generation=told.append)
    assert sum(found.schedule) / BLOCKS == pytest.approx(0.3, abs=1e-9)
    assert found.schedule[0] == 0
    loss = kl_loss(stack_of(model), data) if objective == "kl" else lambda skipper: calibration_loss(skipper, data)
    assert loss(TokenSkipper(model, found.schedule)) == pytest.approx(found.loss)
    assert found.loss <= min(found.initial.values())
    assert found.loss == min(one["loss"] for one in found.history)
    assert len(told) == len(found.history) == 3
    assert found == search_schedule(model, data, 0.3, config=SMALL, objective=objective)
    assert found.evaluations <= 18


def test_the_search_is_within_500_evaluations_by_default():
    genetic = ScheduleConfig().genetic
    assert genetic.population + genetic.generations * (genetic.population - genetic.elitism) <= 500
    assert (genetic.population, genetic.generations, genetic.tournament, genetic.elitism) == (24, 20, 3, 2)


def test_kl_of_nothing_skipped_is_zero():
    model, data = decoder(), items()
    assert kl_loss(stack_of(model), data)(TokenSkipper(model, [0.0] * BLOCKS)) == pytest.approx(0, abs=1e-5)
    assert kl_loss(stack_of(model), data)(TokenSkipper(model, [0.0, *[0.5] * 4])) > 0.01


def test_tuning_goes_on_from_the_schedule_with_the_router():
    model, data = decoder(), items()
    skipper = TokenSkipper(model, (0.0, 0.5, 0.25, 0.5, 0.25), TokenRouter(seed=3))
    found = finetune_schedule(skipper, data, config=SMALL.replace(mutation=1.0))
    assert found.initial == {"searched": pytest.approx(calibration_loss(skipper, data))}
    assert found.loss <= found.initial["searched"]
    assert sum(found.schedule) / BLOCKS == pytest.approx(0.3, abs=1e-9)
    assert calibration_loss(skipper.with_schedule(found.schedule), data) == pytest.approx(found.loss)


@pytest.mark.parametrize(
    ("data", "error", "told"),
    [
        ([], DataError, "there are no items"),
        ([([], [1])], DataError, "item 0 has no prompt"),
        ([([1], [2]), ([1], [])], DataError, "item 1 has no continuation"),
        ([([1] * 2048, [1])], DataError, "item 0 has 2049 tokens; the model takes at most 2048"),
        ([([1], [99])], InputError, "token id 99 is none of the model's; it has 0 to 30"),
        ([([-1], [2])], InputError, "token id -1"),
    ],
)
def test_wrong_items(data, error, told):
    with pytest.raises(error, match=told):
        search_schedule(decoder(), data, 0.3, config=SMALL)


@pytest.mark.parametrize(
    "wrong", [{"s_max": 1.0}, {"s_max": 0}, {"grid": 0}, {"mutation": 2}, {"crossover": -1}, {"most_moved": 0}]
)
def test_wrong_configs(wrong):
    with pytest.raises(ConfigError):
        ScheduleConfig(**wrong)
