"""What routers are worth: measures on paths, and baselines at the same number of layers."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.depth.dr_llm import (
    Question,
    baselines_at,
    compare,
    early_exit,
    influence_of,
    measure,
    measure_paths,
    random_skip,
    reference_of,
    shortgpt,
    spread,
)
from anabranch.depth.stack import run_path
from anabranch.errors import ConfigError, DataError, NotFiniteError
from dr_llm_made import asked, bank_of, stack, transformers_stack

WHOLE = (0, 1, 2, 3, 4)


def questions(count=6):
    return asked(count, answer=3)


@pytest.mark.parametrize("make", [stack, transformers_stack])
def test_the_whole_model_agrees_with_itself(make):
    model = make()
    whole = tuple(range(model.num_blocks))
    found = measure_paths(model, questions(), [whole] * 6)
    assert (found.agreement, found.layers_per_token, found.tokens) == (1.0, model.num_blocks, 18)
    assert found.uses == [1.0] * model.num_blocks
    assert found.decisions == [0, 6 * model.num_blocks, 0]
    nats = right = 0.0
    for question in questions():
        with torch.no_grad():
            logits_LV = run_path(model, torch.tensor([question.prompt + question.answer]))[
                0, len(question.prompt) - 1 : -1
            ]
        answer_L = torch.tensor(question.answer)
        nats += float(F.cross_entropy(logits_LV, answer_L, reduction="sum"))
        right += int((logits_LV.argmax(-1) == answer_L).sum())
    assert found.nats_per_token == found.full_nats_per_token == pytest.approx(nats / 18, rel=1e-5)
    assert found.accuracy == found.full_accuracy == pytest.approx(right / 18)


def test_layers_are_counted_by_token():
    long, short = questions(2)
    found = measure_paths(stack(), [long, short], [(0, 0, 1), (4,)])
    tokens = [len(one.prompt) + 2 for one in (long, short)]
    assert tokens[0] != tokens[1]
    assert found.layers_per_token == pytest.approx((3 * tokens[0] + tokens[1]) / sum(tokens))
    assert found.uses[0] == pytest.approx(2 * tokens[0] / sum(tokens))
    assert found.decisions == [3 + 4, 1 + 1, 1]
    assert "paths" not in found.to_dict()


def test_routers_are_measured_on_the_paths_they_choose():
    model = stack()
    bank, asked_for = bank_of(model, seed=3), questions()
    reference = reference_of(model, asked_for)
    found = measure(model, asked_for, bank, reference=reference)
    same = measure_paths(model, asked_for, found.paths, reference=reference)
    assert len(set(found.paths)) > 1
    assert (found.agreement, found.nats_per_token, found.layers_per_token) == (
        same.agreement,
        same.nats_per_token,
        same.layers_per_token,
    )
    assert found.router_seconds > 0
    plain = measure(model, asked_for, bank, control=0.5)
    assert (plain.agreement, plain.layers_per_token) == (1.0, 5.0)
    assert measure(model, asked_for, bank, control=1.0).layers_per_token == 10.0
    assert measure(model, asked_for, bank, control=-1.0).layers_per_token == 0.0


def test_decisions_for_every_token_are_measured():
    model = stack()
    bank, asked_for = bank_of(model, seed=3), questions()
    plain = measure(model, asked_for, bank, control=0.5, decide="step")
    assert (plain.agreement, plain.layers_per_token) == (1.0, 5.0)
    assert plain.nats_per_token == pytest.approx(plain.full_nats_per_token, abs=1e-5)
    found = measure(model, asked_for, bank, decide="step")
    assert sum(found.decisions) == 6 * 3 * 5
    assert found.layers_per_token != measure(model, asked_for, bank).layers_per_token
    with pytest.raises(ConfigError, match="decide is 'token'"):
        measure(model, asked_for, bank, decide="token")


def test_what_cannot_be_measured():
    model = stack()
    with pytest.raises(DataError, match="no questions"):
        reference_of(model, [])
    with pytest.raises(ConfigError, match="1 paths for 6 questions"):
        measure_paths(model, questions(), [WHOLE])
    with pytest.raises(ConfigError, match="block 9"):
        measure_paths(model, questions(), [(9,)] * 6)
    with torch.no_grad():
        model.module.norm.weight.fill_(float("nan"))
    with pytest.raises(NotFiniteError, match="'q0'"):
        reference_of(model, questions())


# Baselines


@pytest.mark.parametrize("mean", [0.0, 2.0, 3.25, 4.9, 5.0])
def test_baselines_have_as_many_layers(mean):
    numbers = spread(mean, 40, 5)
    assert sum(numbers) == round(40 * mean)
    assert max(numbers) - min(numbers) <= 1
    for paths in (random_skip(5, mean, 40), early_exit(5, mean, 40), shortgpt([0.5, 0.1, 0.9, 0.2, 0.3], mean, 40)):
        assert [len(path) for path in paths] == numbers
        assert all(list(path) == sorted(set(path)) for path in paths)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=12, max_size=40), st.floats(0, 5), st.integers(0, 3))
def test_baselines_have_as_many_layers_over_tokens(tokens, mean, seed):
    numbers = spread(mean, len(tokens), 5, seed, tokens=tokens)
    assert min(numbers) >= 0
    assert max(numbers) - min(numbers) <= 1
    assert max(numbers) <= 5
    error = sum(number * length for number, length in zip(numbers, tokens, strict=True)) - mean * sum(tokens)
    # No sequence and no exchange of two would come nearer.
    more = [length for number, length in zip(numbers, tokens, strict=True) if number > math.floor(mean)]
    less = [length for number, length in zip(numbers, tokens, strict=True) if number == math.floor(mean)]
    if len(set(tokens)) > 1 and mean < 5:
        changes = [b - a for a in (0, *more) for b in (0, *less)]
        assert abs(error) <= min(abs(error + change) for change in changes) + 1e-5
    assert numbers == spread(mean, len(tokens), 5, seed, tokens=tokens)


def test_baselines_take_as_many_layers_as_routers_where_lengths_differ():
    """Five long prompts would shift a mean over questions by half a layer."""
    model = stack()
    generator = torch.Generator().manual_seed(2)
    asked_for = [
        Question(
            f"q{number}", tuple(torch.randint(23, (40 if number % 4 == 0 else 5,), generator=generator).tolist()), (7,)
        )
        for number in range(20)
    ]
    for seed in range(2):
        for name, found in baselines_at(model, asked_for, 3.4, [0.1, 0.2, 0.3, 0.4, 0.5], seed=seed).items():
            assert found.layers_per_token == pytest.approx(3.4, abs=0.0092), name
    with pytest.raises(ConfigError, match=r"tokens is \[1, 0\]; it must be a number from 1 for each of 2"):
        spread(1.5, 2, 5, tokens=[1, 0])
    with pytest.raises(ConfigError, match="for each of 3"):
        spread(1.5, 3, 5, tokens=[1, 2])


def test_baselines_by_hand():
    assert shortgpt([0.5, 0.1, 0.9, 0.2, 0.3], 3, 2) == [(0, 2, 4)] * 2
    assert early_exit(5, 2, 2) == [(0, 1)] * 2
    drawn = random_skip(5, 3, 50)
    assert len(set(drawn)) > 5
    assert drawn == random_skip(5, 3, 50) != random_skip(5, 3, 50, seed=1)
    for mean in (-0.1, 5.1):
        with pytest.raises(ConfigError, match="mean_layers"):
            spread(mean, 3, 5)


def test_a_comparison_has_all_ways_at_each_control():
    model, asked_for = stack(), questions()
    found = compare(model, asked_for, bank_of(model, seed=3), asked_for, controls=(0.5,))
    assert [row["control"] for row in found["curve"]] == [-0.5, 0.5]
    assert found["influence"] == influence_of(model, asked_for)
    for row in found["curve"]:
        assert row.keys() == {"control", "routed", "random", "shortgpt", "early_exit"}
        for name in ("random", "shortgpt", "early_exit"):
            assert row[name]["layers_per_token"] == pytest.approx(min(row["routed"]["layers_per_token"], 5), abs=0.5)
    assert found["curve"][1]["shortgpt"]["agreement"] == 1.0
    # A router that repeats has more layers than any of them can have.
    assert baselines_at(model, asked_for, 7.0, found["influence"])["random"].layers_per_token == 5.0
