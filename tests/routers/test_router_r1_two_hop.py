"""The two-hop world: facts, who knows them how well, what they cost, and those who need not be trained."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import InputError
from anabranch.routers.router_r1.two_hop import BASELINES, FILLER, PAIRS, VERSION, Grade, Shape, TwoHop, query_of

SMALL = Shape(entities=60, relations=4, experts=4)
WORLD = TwoHop(SMALL, seed=3)


def test_questions_are_answered_by_following_facts():
    for split in ("train", "test"):
        for number in range(WORLD.num_questions(split)):
            question = WORLD.question(number, split)
            assert question.hops == 1 + number % 2
            answer = question.entity
            for relation in reversed(question.relations):
                answer = int(WORLD.fact_RE[relation, answer])
            assert question.answer == answer
    one, two = WORLD.question(0), WORLD.question(1)
    assert one.text == f"r{one.relations[0]} of e{one.entity} ?"
    assert two.text == f"r{two.relations[0]} of r{two.relations[1]} of e{two.entity} ?"


def test_a_version_of_the_world_stays_what_it_is():
    """Where this fails the world is another one: runs of the former would go on in it, so it is of the next version."""
    digest = hashlib.sha256()
    for world in (TwoHop(seed=0), TwoHop(Shape(entities=40, relations=6, experts=6), seed=2), WORLD):
        relations, models = range(world.shape.relations), range(world.num_models)
        asked = [world.question(number, split) for split in ("train", "test") for number in range(60)]
        told = [
            world.vocabulary,
            [(world.about(model), world.cost(model), world.reply(model, "r0 of e1").text) for model in models],
            [[[world.says(model, r, e) for e in range(30)] for r in relations] for model in models],
            asked,
            [world.baseline(name, one, seed=3) for name in BASELINES for one in asked],
        ]
        digest.update(repr(told).encode())
    assert (VERSION, digest.hexdigest()[:16]) == (2, "8897c64e52d5c187")


def test_no_question_of_a_test_begins_where_one_to_learn_from_does():
    found = {
        split: {WORLD.question(number, split).entity for number in range(WORLD.num_questions(split))}
        for split in ("train", "test")
    }
    assert not found["train"] & found["test"]
    assert len(found["test"]) == 12
    assert len(found["train"]) == 48
    with pytest.raises(InputError, match="question 96 is not there"):
        WORLD.question(96, "test")


def test_models_know_as_much_as_is_said():
    world = TwoHop(Shape(entities=2000, relations=3, experts=3), seed=0)
    # A pair that is good at two of the three relations, and one without a partner.
    assert [len(good) for good in world.good] == [2, 2, 1, 0]
    assert world.good[0] == world.good[1]
    assert {*world.good[0], *world.good[2]} == {0, 1, 2}
    right = np.array(
        [
            [
                np.mean([world.says(model, relation, e) == world.fact_RE[relation, e] for e in range(2000)])
                for relation in range(3)
            ]
            for model in range(4)
        ]
    )
    known = [PAIRS[0][0].known, PAIRS[0][1].known, PAIRS[1][0].known]
    expected = np.array(
        [
            [share if relation in good else 0.02 for relation in range(3)]
            for share, good in zip(known, world.good, strict=False)
        ]
        + [[0.75] * 3]
    )
    assert [[world.knows(model, relation) for relation in range(3)] for model in range(4)] == expected.tolist()
    # Three deviations of 2,000 draws.
    assert np.abs(right - expected).max() < 3 * 0.5 / np.sqrt(2000)


def test_a_world_is_its_seed():
    again, other = TwoHop(SMALL, seed=3), TwoHop(SMALL, seed=4)
    assert (again.fact_RE == WORLD.fact_RE).all()
    assert again.prices == WORLD.prices
    said = [world.answer(1, "r2 of r0 of e7") for world in (WORLD, again)]
    assert said[0] == said[1] is not None
    assert (other.fact_RE != WORLD.fact_RE).any()


def test_the_better_of_a_pair_is_dearer_says_more_and_is_right_more_often():
    world = TwoHop(Shape(), seed=1)
    assert [len(good) for good in world.good] == [3, 3, 3, 3, 1, 1, 1, 0]
    for model in range(0, 6, 2):
        assert world.good[model] == world.good[model + 1]
        better, lesser = world.grades[model : model + 2]
        assert better.known > lesser.known
        assert (better.price, better.words) > (lesser.price, lesser.words)
        # In words that a router reads.
        assert world.about(model) != world.about(model + 1)
    assert sorted(relation for good in world.good[::2] for relation in good) == list(range(8))


def test_replies_are_as_long_as_a_model_usually_answers():
    for model in range(WORLD.num_models):
        reply = WORLD.reply(model, "r1 of e5")
        words = reply.text.split()
        assert len(words) == reply.completion_tokens == WORLD.lengths[model]
        assert words[0] == f"e{WORLD.says(model, 1, 5)}"
        assert set(words[1:]) <= set(FILLER)
        assert reply.prompt_tokens == 3
        assert WORLD.cost(model) == pytest.approx(WORLD.prices[model] * len(words))
    names = {"a": 1, "b": 4}
    pool = WORLD.pool(names)
    assert pool.reply("b", "r1 of e5").text == WORLD.reply(4, "r1 of e5").text
    assert {name: price.completion for name, price in pool.prices.items()} == {"a": 0.5, "b": 1.8}


@settings(max_examples=25)
@given(
    st.text(max_size=30) | st.sampled_from(["r0 of e999999", "r99 of e1", "r0 of r1 of r2 of e1", "r0of e1", "e1", ""])
)
def test_no_question_is_too_odd_to_be_answered(text):
    for model in range(WORLD.num_models):
        answer = WORLD.answer(model, text)
        assert answer is None or 0 <= answer < 60
        assert WORLD.reply(model, text).text.startswith("unknown" if answer is None else f"e{answer}")


def test_a_model_goes_from_fact_to_fact_as_it_knows_them():
    for model in range(WORLD.num_models):
        between = WORLD.says(model, 1, 9)
        assert WORLD.answer(model, "r3 of r1 of e9 ?") == WORLD.says(model, 3, between)


def test_baselines_by_definition():
    for number in range(60):
        question = WORLD.question(number)
        query = query_of(question.relations, question.entity)
        oracle = WORLD.baseline("single_oracle", question)
        right = [model for model in range(WORLD.num_models) if WORLD.answer(model, query) == question.answer]
        assert (oracle.answer == question.answer) == bool(right)
        assert not right or oracle.models[0] == min(right, key=lambda model: WORLD.prices[model] * WORLD.lengths[model])
        general = WORLD.baseline("generalist", question)
        assert general.models == (4,)
        assert general.cost == pytest.approx(1.8 * 30)
        for name in ("random", "informed"):
            found = WORLD.baseline(name, question, seed=number)
            assert len(found.models) == question.hops
            entity = question.entity
            for model, relation in zip(found.models, reversed(question.relations), strict=True):
                entity = WORLD.says(model, relation, entity)
                assert name == "random" or relation in WORLD.good[model]
            assert found.answer == entity
    with pytest.raises(InputError, match="no baseline is called 'best'"):
        WORLD.baseline("best", WORLD.question(0))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"entities": 4}, "entities is 4"),
        ({"relations": 0}, "relations is 0"),
        ({"experts": 2.0}, "experts is 2.0"),
        ({"unknown": 1.5}, "unknown is 1.5"),
        ({"pairs": ()}, "pairs is empty"),
        ({"held_out": 0.0}, "held_out is 0.0"),
    ],
)
def test_worlds_that_cannot_be(fields, why):
    with pytest.raises(InputError, match=why):
        Shape(**fields)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ((1.5, 1.0, 3), "known is 1.5"),
        ((0.5, -1.0, 3), "price is -1.0"),
        ((0.5, float("nan"), 3), "price is nan"),
        ((0.5, 1.0, 0), "0 words"),
    ],
)
def test_grades_that_cannot_be(fields, why):
    with pytest.raises(InputError, match=why):
        Grade(*fields)
