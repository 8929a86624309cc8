"""What a sender may set of a strategy: every one says what it reads, does as told, and takes nothing else."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from anabranch.errors import InputError
from anabranch.routers.contract.ask import Answered
from anabranch.routers.contract.knobs import check_knobs, knob_of
from anabranch.routers.contract.program import Done, ProgramRequest
from anabranch.routers.contract.query import Pool
from anabranch.routers.made_outcomes import made_outcomes, made_pool
from anabranch.routers.strategies import make, names

POOL = made_pool()
PRICE = {model.name: model.price.input + model.price.output for model in POOL.models}


def fitted(name, **fields):
    return make(name, **fields).fit(made_outcomes(200))


def choices(strategy, pool=POOL, **knobs):
    knobs = {"lambda" if name == "weight" else name: str(value) for name, value in knobs.items()}
    return [strategy.route(replace(query, knobs=knobs), pool) for query in made_outcomes(40, seed=1).queries()]


@pytest.mark.parametrize("name", ["ridge", "knn", "mf", "linucb", "cascade"])
def test_lambda_is_the_trade_off_of_one_query(name):
    """With any strategy that has one it is the same: the score that a dollar is worth."""
    strategy = fitted(name)
    for weight in (0.0, 1.0, 10.0, 1e6):
        as_set = [decision.model for decision in choices(strategy, weight=weight)]
        assert as_set == [decision.model for decision in choices(strategy.with_knob(weight))]
    # The strategy itself stays as it was.
    assert [one.model for one in choices(strategy)] == [one.model for one in choices(strategy.with_knob(0.0))]


def test_lambda_makes_a_cascade_another_chain_with_thresholds_of_its_own():
    strategy = fitted("cascade")
    assert len(strategy.frontier) > 2
    query = next(made_outcomes(1, seed=1).queries())
    for weight in strategy.knobs(made_outcomes()):
        own, other = replace(query, knobs={"lambda": repr(weight)}), strategy.with_knob(weight)
        assert strategy.route(own, POOL).details == other.route(query, POOL).details
        for model in other.chain.models:
            assert strategy.threshold_of(model, own) == other.threshold_of(model, query)


def test_a_senders_lambda_stays_within_the_budget_of_the_operator():
    free = fitted("cascade")
    budget = float(np.median([chain.cost for chain in free.frontier]))
    limited = fitted("cascade", budget=budget)
    for weight in (None, 0.0, 1.0, 1e6):
        assert limited.chain_at(weight).cost <= budget
    assert limited.chain_at(1e9) == limited.frontier[0]


@pytest.mark.parametrize("name", ["mf", "sw_elo"])
def test_a_threshold_is_routellms(name):
    """Of two models the dear one is asked where it wins at least so often: all at 0, none at 1, and the published rule between."""
    strategy = fitted(name)
    ends = sorted(POOL.models, key=lambda model: PRICE[model.name])
    cheap, dear = ends[0], ends[-1]
    assert {one.model for one in choices(strategy, threshold=0)} == {dear.name}
    assert {one.model for one in choices(strategy, threshold=1)} == {cheap.name}
    two = Pool((dear, cheap), POOL.now_s)
    columns = [strategy.predictor.models.index(model.name) for model in (dear, cheap)]
    seen = []
    for query in made_outcomes(40, seed=1).queries():
        strength_M = strategy.predictor.strengths(query)
        wins = 1 / (1 + np.exp(strength_M[columns[1]] - strength_M[columns[0]]))
        for pool in (two, POOL):
            decision = strategy.route(replace(query, knobs={"threshold": "0.5"}), pool)
            assert decision.model == (dear.name if wins >= 0.5 else cheap.name)
            assert "threshold 0.5" in decision.reason
            assert sorted(one.model for one in decision.candidates) == sorted(pool.names)
            assert [one.score for one in decision.candidates] == sorted(
                (one.score for one in decision.candidates), reverse=True
            )
        seen.append(wins)
    shares = [
        np.mean([one.model == dear.name for one in choices(strategy, threshold=at)])
        for at in np.quantile(seen, [0, 0.3, 0.7])
    ]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[-1]


def test_a_threshold_of_a_cascade_says_which_answers_will_do():
    strategy = fitted("cascade").with_knob(0.0)
    query = next(made_outcomes(1, seed=1).queries())
    judged = strategy.chain.models[0]
    strategy.confidence = lambda query, model, answer, details: 0.6

    class Models:
        """Each says its name."""

        async def __call__(self, arm, messages, **how):
            return Answered.saying(arm.model, model=arm.model)

        async def stream(self, arm, messages, **how):
            yield await self(arm, messages)

    async def given_by(knobs):
        told = replace(query, knobs=knobs)
        request = ProgramRequest(query=told, pool=POOL, decision=strategy.route(told, POOL))
        [done] = [event async for event in strategy.run(request, Models()) if isinstance(event, Done)]
        return done.model

    for threshold, will_do in (("0", True), ("0.6", True), ("0.61", False), ("1", False)):
        # The last one's is given whatever it is.
        assert asyncio.run(given_by({"threshold": threshold})) == (judged if will_do else strategy.chain.models[-1])


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"threshold": "1.5"}, "threshold is '1.5'; it must be a number from 0 to 1"),
        ({"threshold": "0.5", "lambda": "1"}, "one of them"),
        ({"lambda": "inf"}, "at least 0"),
        ({"lambda": "-1"}, r"score given up to save a dollar"),
    ],
)
def test_odd_values_are_refused(knobs, message):
    query = next(made_outcomes(1, seed=1).queries())
    with pytest.raises(InputError, match=message):
        fitted("mf").route(replace(query, knobs=knobs), POOL)


def test_what_costs_the_same_has_no_threshold():
    query = next(made_outcomes(1, seed=1).queries())
    same = Pool(tuple(replace(model, price=POOL.models[0].price) for model in POOL.models), POOL.now_s)
    with pytest.raises(InputError, match="cost the same"):
        fitted("mf").route(replace(query, knobs={"threshold": "0.5"}), same)


def test_a_knob_that_is_not_known_is_named_with_those_that_are():
    check_knobs({"lambda": "1"}, ("lambda", "threshold"), "auto/x")
    with pytest.raises(InputError, match=r"auto/x has no knob 'lamda'; it has lambda, threshold"):
        check_knobs({"lamda": "1"}, ("lambda", "threshold"), "auto/x")
    with pytest.raises(InputError, match=r"auto/x has no knob 'lambda'; it has none"):
        check_knobs({"lambda": "1"}, (), "auto/x")
    assert knob_of({}, "lambda") is None


def test_every_strategy_says_what_it_reads():
    """Whoever weighs a dollar reads lambda; who does not, refuses it."""
    declared = {}
    for name in names():
        try:
            declared[name] = make(name).sender_knobs
        except InputError:
            # It cannot be made without more.
            continue
    assert (
        declared["rules"]
        == declared["semantic"]
        == declared["cheapest"]
        == declared["ic_cache"]
        == declared["automix"]
        == ()
    )
    assert declared["logprob"] == declared["consistency"] == ("lambda", "threshold")
    assert declared["linucb"] == declared["thompson"] == declared["eps_greedy"] == declared["ridge"] == ("lambda",)
    assert declared["coe"] == ("lambda", "budget_params", "trade_off_params", "min_confidence")
