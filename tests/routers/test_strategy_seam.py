"""What strategies and recorded data share: signals, what may be played, explanations, the trade-off of `Ranked`."""

import dataclasses

import numpy as np
import pytest

from anabranch.errors import DataError, InputError
from anabranch.routers import strategies
from anabranch.routers.contract.predictor import Prediction, Predictor, Ranked
from anabranch.routers.contract.query import Model, Pool, Query
from anabranch.routers.contract.strategy import playable
from anabranch.routers.made_outcomes import made_outcomes, made_pool


def test_signals_go_with_their_rows_and_models():
    data = made_outcomes(20)
    part = data.take([3, 1]).only(["large", "small"])
    np.testing.assert_array_equal(part.signals["votes"], data.signals["votes"][np.ix_([3, 1], [2, 0])])
    with pytest.raises(DataError, match=r"signal 'votes' has shape \[20, 3\]; it must be \[20, 4\]"):
        dataclasses.replace(data, signals={"votes": data.signals["votes"][:, :3]})


def test_what_may_be_played():
    data = made_outcomes(5)
    assert playable(data, None).tolist() == [0, 1, 2, 3]
    assert playable(data, made_pool(("large", "new", "small"))).tolist() == [2, 0]
    assert playable(data, made_pool(), ["odd", "gone"]).tolist() == [3]
    with pytest.raises(
        InputError, match="none of the recorded models small, middle, large, odd can be chosen and are in the pool"
    ):
        playable(data, made_pool(("new",)))
    with pytest.raises(InputError, match="the strategy learned of gone"):
        playable(data, None, ["gone"])


class Told(Predictor):
    """Says one quality per model, and counts how often it is asked."""

    needs_vector = False

    def __init__(self, config):
        super().__init__(config)
        self.asked = []

    def fit(self, data, *, seed=0):
        self.models = data.models
        return self

    def predict(self, data):
        self.asked.append("predict")
        return Prediction(quality_NM=np.tile([0.5, 0.8, -np.inf, 0.6], (len(data), 1)))

    def explain(self, query):
        self.asked.append("explain")
        return {"from": "explain"}


class ToldOnce(Told):
    def predict_one(self, query):
        return dataclasses.replace(self.predict(made_outcomes(1)), details={"from": "prediction"})


@pytest.mark.parametrize(("kind", "asked"), [(Told, ["predict", "explain"]), (ToldOnce, ["predict"])])
def test_a_prediction_may_carry_its_explanation(kind, asked):
    one = Ranked(Ranked.Config(predictor=kind.Config())).fit(made_outcomes())
    decision = one.route(Query(text=""), made_pool())
    assert one.predictor.asked == asked
    assert decision.details["from"] == asked[-1].replace("predict", "prediction")
    assert [c.model for c in decision.candidates] == ["middle", "odd", "small"]  # large must not be asked


def test_ranked_over_the_whole_range_of_trade_offs():
    data = dataclasses.replace(made_outcomes(30), cost_NM=np.tile([1.0, 4.0, 2.0, 1.5], (30, 1)))
    one = Ranked(Ranked.Config(predictor=Told.Config())).fit(data)
    # 0.5 - 1 t, 0.8 - 4 t, 0.6 - 1.5 t: middle up to 0.2 / 2.5 = 0.08, then odd up to 0.1 / 0.5 = 0.2, then small
    for trade_off, model in ((0.0, 1), (0.079, 1), (0.081, 3), (0.199, 3), (0.201, 0), (1e9, 0)):
        assert set(one.with_knob(trade_off).play(data, made_pool()).model_N) == {model}
        assert (
            one.route(Query(text="", knobs={"lambda": str(trade_off)}), made_pool_unpriced()).model
            == data.models[model]
        )
    spent = [played.cost_N.mean() for played in one.play_knobs(data, list(one.knobs(data)))]
    assert spent == sorted(spent, reverse=True)
    assert (spent[0], spent[-1]) == (4.0, 1.0)


def made_pool_unpriced():
    return Pool(tuple(Model(name=name) for name in made_pool().names))


def test_survey_rows_are_made_by_name():
    assert strategies.make("knn").config.predictor.k == 40
    mf = strategies.make("mf").config.predictor
    assert (mf.dim, mf.rate, mf.weight_decay, mf.batch, mf.epochs, mf.noise) == (128, 3e-4, 1e-5, 64, 100, 0.05)
    elo = strategies.make("sw_elo").config.predictor
    assert (elo.num_tiers, elo.gamma) == (10, 10.0)
    assert strategies.make("cluster").config.predictor.nearest == 3
    assert strategies.make("cascade").config.max_length == 3
