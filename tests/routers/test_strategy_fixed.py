"""Strategies that look at no text."""

import numpy as np
import pytest

from anabranch.errors import ConfigError, InputError
from anabranch.routers import strategies
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.query import Model, Pool, Query
from anabranch.routers.money import Price

POOL = Pool((Model(name="a"), Model(name="b"), Model(name="c")))
QUERY = Query(text="hello")


def names(decision):
    return [candidate.model for candidate in decision.candidates]


def recorded(score, cost=None, **fields):
    score = np.array(score, float)
    return Recorded(
        query=tuple(f"q{row}" for row in range(len(score))),
        models=("a", "b", "c")[: score.shape[1]],
        score_NM=score,
        cost_NM=None if cost is None else np.broadcast_to(np.array(cost, float), score.shape),
        **fields,
    )


def test_static():
    assert names(strategies.make("static", model="b").route(QUERY, POOL)) == ["b", "a", "c"]
    assert strategies.make("static").route(QUERY, POOL).model == "a"
    with pytest.raises(InputError, match=r"static\.model is 'z', which is not in the pool: a, b, c"):
        strategies.make("static", model="z").route(QUERY, POOL)


def test_round_robin_takes_turns_and_explaining_takes_none():
    one = strategies.make("round_robin")
    first = [names(one.route(QUERY, POOL)) for _ in range(4)]
    assert first == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]
    assert one.explain(QUERY, POOL)["candidates"][0]["model"] == "b"
    assert one.route(QUERY, POOL).model == "b"
    assert one.play(recorded(np.eye(3)), POOL).model_N.tolist() == [2, 0, 1]
    assert one.route(QUERY, POOL).model == "c"


def test_random_draws_in_proportion_and_the_same_again():
    one = strategies.make("random", weights={"a": 1.0, "b": 3.0})
    drawn = [one.route(Query(text=str(number)), POOL).model for number in range(2000)]
    assert drawn == [one.route(Query(text=str(number)), POOL).model for number in range(2000)]
    assert drawn.count("b") / 2000 == pytest.approx(0.75, abs=0.04)  # 4 standard errors
    assert "c" not in drawn
    other = strategies.make("random", weights={"a": 1.0, "b": 3.0}, seed=1)
    assert drawn != [other.route(Query(text=str(number)), POOL).model for number in range(2000)]


def test_random_orders_all_six_ways_alike():
    one = strategies.make("random")
    orders = [tuple(names(one.route(Query(text=str(number)), POOL))) for number in range(3000)]
    assert len(set(orders)) == 6
    assert all(orders.count(order) / 3000 == pytest.approx(1 / 6, abs=0.03) for order in set(orders))


def test_random_share_of_strong():
    one = strategies.make("random", strong="a", weak="c", share=0.2)
    assert one.knobs(recorded(np.eye(3)))[0] == 1
    drawn = [one.route(Query(text=str(number)), POOL).model for number in range(2000)]
    assert drawn.count("a") / 2000 == pytest.approx(0.2, abs=0.04)
    assert {one.with_knob(0.0).route(Query(text=str(number)), POOL).model for number in range(50)} == {"c"}


@pytest.mark.parametrize(
    "fields",
    [
        {"strong": "a"},
        {"strong": "a", "weak": "a"},
        {"weights": {"a": -1.0}},
        {"weights": {"a": 0.0}},
        {"weights": {"a": 1.0}, "strong": "a", "weak": "b"},
        {"share": 1.5},
    ],
)
def test_random_refuses(fields):
    with pytest.raises(ConfigError):
        strategies.make("random", **fields)


def test_random_refuses_a_pool_it_cannot_draw_from():
    with pytest.raises(InputError, match="none of the pool's models: a, b, c"):
        strategies.make("random", weights={"z": 1.0}).route(QUERY, POOL)


def test_least_latency_asks_the_unknown_first_then_the_quickest():
    pool = Pool((Model(name="a", latency_s=2.0), Model(name="b"), Model(name="c", latency_s=1.0)))
    assert names(strategies.make("least_latency").route(QUERY, pool)) == ["b", "c", "a"]
    data = recorded(np.eye(3), latency_NM=np.tile([5.0, 1.5, 9.0], (3, 1)))
    fitted = strategies.make("least_latency").fit(data)
    assert names(fitted.route(QUERY, pool)) == ["c", "b", "a"]  # live 1.0 and 2.0 before recorded; b as recorded
    busy = Pool((Model(name="a", latency_s=2.0), Model(name="c", latency_s=1.0, load=3.0)))
    assert names(fitted.route(QUERY, busy)) == ["a", "c"]


def test_cheapest_by_price_of_this_prompt():
    # a: 10,000 tokens at 1 and 250 at 1 = 10,250; b: 10,000 at 0.1 and 250 at 20 = 6,000; 100 tokens: a 350, b 5,010 (millionths)
    pool = Pool((Model(name="a", price=Price.of_dollars(1, 1)), Model(name="b", price=Price.of_dollars(0.1, 20))))
    one = strategies.make("cheapest")
    decision = one.route(Query(text="", prompt_tokens=10_000), pool)
    assert names(decision) == ["b", "a"]
    assert decision.candidates[0].cost == pytest.approx(6000e-6)
    assert names(one.route(Query(text="", prompt_tokens=100), pool)) == ["a", "b"]


def test_cheapest_by_recorded_cost_and_ties_in_the_order_of_the_pool():
    fitted = strategies.make("cheapest").fit(recorded(np.eye(3), [3e-3, 1e-3, 1e-3]))
    assert names(fitted.route(QUERY, POOL)) == ["b", "c", "a"]


def test_oracle_plays_the_best_and_of_equals_the_cheapest():
    data = recorded([[1, 1, 0], [0, 0, 0], [0.2, np.nan, 0.9], [np.nan] * 3], [3.0, 2.0, 1.0])
    one = strategies.make("oracle")
    assert one.play(data, POOL).model_N.tolist() == [1, 2, 2, 2]
    assert one.with_knob(10.0).play(data, POOL).model_N[:3].tolist() == [2, 2, 2]
    # 0.6 * 3 dollars = 1.8 more than b's 1.2: 1 - 1.8 < 1 - 1.2 < 0 - 0.6 is false, so c: -0.6 is the least bad
    assert one.with_knob(0.6).play(data, POOL).model_N[0] == 1
    with pytest.raises(InputError, match="only plays recorded outcomes"):
        one.route(QUERY, POOL)


def test_oracle_beats_every_strategy():
    rng = np.random.default_rng(0)
    data = recorded(rng.random((50, 3)), [1.0, 2.0, 3.0])
    best = strategies.make("oracle").play(data, POOL).quality_N.mean()
    for name in ("static", "random", "round_robin", "cheapest", "rules"):
        assert strategies.make(name).fit(data).play(data, POOL).quality_N.mean() <= best
