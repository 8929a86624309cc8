"""The contract check finds what it is for: each broken strategy here fails the check that should catch it."""

import dataclasses

import numpy as np
import pytest

from anabranch.errors import InputError
from anabranch.routers.contract.predictor import Prediction, Predictor
from anabranch.routers.contract.query import Candidate, Decision
from anabranch.routers.contract.strategy import Strategy, ordered
from anabranch.routers.strategies.fixed import Static
from anabranch.routers.strategies.task import TaskBest
from anabranch.testing import check_strategy


class Right(Strategy):
    """First model of the pool."""

    def route(self, query, pool):
        return Decision(candidates=ordered(pool, -np.arange(len(pool), dtype=float)), strategy="right", reason="first")


def test_strategies_that_are_right():
    check_strategy(Right.Config())
    check_strategy(Static.Config())
    check_strategy(TaskBest.Config())


class Doubled(Right):
    def route(self, query, pool):
        decision = super().route(query, pool)
        return dataclasses.replace(decision, candidates=decision.candidates[:1] * 2)


class Outside(Right):
    def route(self, query, pool):
        return Decision(candidates=(Candidate(model="small", score=0.0),), strategy="x", reason="always small")


class Blind(Right):
    """Prefers models that are down."""

    def route(self, query, pool):
        candidates = tuple(Candidate(model=model.name, score=-float(at)) for at, model in enumerate(pool.models))
        return Decision(candidates=candidates, strategy="x", reason="as they come")


class Restless(Right):
    def route(self, query, pool):
        return Decision(candidates=ordered(pool, np.random.default_rng().random(len(pool))), strategy="x", reason="any")


class Wordy(Right):
    def route(self, query, pool):
        return dataclasses.replace(super().route(query, pool), details={"score": float("nan")})


class Rising(Right):
    def route(self, query, pool):
        decision = super().route(query, pool)
        return dataclasses.replace(decision, candidates=decision.candidates[::-1])


class Forgetful(Right):
    """Saves nothing of what it learned."""

    def __init__(self, config):
        super().__init__(config)
        self.best = None

    def fit(self, data, *, seed=0):
        self.best = "large" if "large" in data.models else data.models[0]
        return self

    def route(self, query, pool):
        score = np.array([1.0 if name == self.best else 0.0 for name in pool.names])
        return Decision(candidates=ordered(pool, score), strategy="x", reason="best")


class Sharing(Right):
    """Reads its state back without copying, then learns in place."""

    def __init__(self, config):
        super().__init__(config)
        self.count = np.zeros(1)

    def observe(self, outcome):
        self.count += 1

    def state(self):
        return {"count": self.count}, {}

    def load_state(self, arrays, facts):
        self.count = arrays["count"]


class SharedByAll(Sharing):
    everyone = np.zeros(1)

    def __init__(self, config):
        super().__init__(config)
        self.count = self.everyone

    def load_state(self, arrays, facts):
        self.count[:] = arrays["count"]


class Careless(Right):
    """Raises what is nobody's error."""

    def fit(self, data, *, seed=0):
        data.task[0].upper()
        return self


class Unready(Right):
    needs_fit = True


class Handless(Right):
    needs_vector = True


class Silent(Right):
    reads_answers = True

    def accept(self, query, model, answer, details):
        return None


class Uncounted(Right):
    def play(self, data, pool):
        played = super().play(data, pool)
        return dataclasses.replace(played, cost_N=played.cost_N * 0.5)


class Peeking(Right):
    """Plays the best outcome but says another's quality."""

    def play(self, data, pool):
        return dataclasses.replace(super().play(data, pool), quality_N=data.score_NM.max(1))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Doubled, "names a model twice"),
        (Outside, "of a pool of 'large' alone it chose 'small'"),
        (Blind, "not available"),
        (Restless, "decides differently"),
        (Wordy, "Out of range float values|not ready for JSON"),
        (Rising, "not finite and falling"),
        (Forgetful, "read back"),
        (SharedByAll, "changes"),
        (Careless, "no tasks: AttributeError"),
        (Unready, "route before fit is not refused"),
        (Handless, "a missing vector is not refused"),
        (Silent, "accept says None"),
        (Uncounted, "a call is not counted"),
        (Peeking, "qualities are not those of the chosen models"),
    ],
)
def test_strategies_that_are_broken(broken, message):
    with pytest.raises((AssertionError, ValueError), match=message):
        check_strategy(broken.Config())


class Constant(Predictor):
    """Half for all."""

    needs_vector = False

    def fit(self, data, *, seed=0):
        self.models = data.models
        if not len(data):
            raise InputError("no rows to learn from at all")
        return self

    def predict(self, data):
        return Prediction(quality_NM=np.full((len(data), len(self.models)), 0.5))

    def state(self):
        return {}, {}

    def load_state(self, arrays, facts):
        pass


class RowByRow(Constant):
    """Says something else of one row than of many."""

    def predict(self, data):
        row = np.arange(len(self.models), dtype=float)
        return Prediction(quality_NM=np.tile(row if len(data) > 1 else row[::-1], (len(data), 1)))


class Shapeless(Constant):
    def predict(self, data):
        return Prediction(quality_NM=np.full((len(data), len(self.models)), np.nan))


def test_predictors():
    check_strategy(Constant.Config())
    with pytest.raises(AssertionError, match="routed otherwise than it is played"):
        check_strategy(RowByRow.Config())
    with pytest.raises((AssertionError, InputError)):
        check_strategy(Shapeless.Config())
