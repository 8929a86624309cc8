"""Chances that strategies say of their choices are those with which they choose."""

import asyncio
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.cli.gateway.replay import print_replay
from anabranch.gateway.config import DeploymentConfig, GatewayConfig, LogConfig, ModelConfig, StrategyConfig
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.providers.mock import Mock
from anabranch.routers import strategies
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.query import Model, Outcome, Pool, Query
from anabranch.routers.data import load_outcomes, pool_of
from anabranch.routers.embed.hashed import Hashed
from anabranch.routers.made_outcomes import made_outcomes, made_pool
from anabranch.routers.money import Price
from anabranch.routers.referee import replay
from anabranch.routers.referee.log_verdict import verdict_of_log
from anabranch.routers.strategies.fixed import Static
from anabranch.routers.strategies.normals import largest_of_normals

VECTOR = np.array([0.6, 0.8], np.float32)
DRAWS = {
    "random": {},
    "weighted": {"kind": "random", "weights": {"a": 1.0, "b": 3.0, "c": 0.5}},
    "two": {"kind": "random", "strong": "a", "weak": "c", "share": 0.7},
    "thompson": {"scale": 0.3},
    "eps_greedy": {"epsilon": 0.4, "decay": 0.0},
}


def pool(*closed):
    return Pool(tuple(Model(name=name, is_available=name not in closed) for name in "abcd"))


def made(name):
    fields = dict(DRAWS[name])
    one = strategies.make(fields.pop("kind", name), **fields)
    for model, quality in (("a", 0.5), ("b", 0.6), ("a", 0.4), ("c", 0.55)):
        one.observe(Outcome(query=Query(text="x", vector_D=VECTOR), model=model, quality=quality))
    return one


@pytest.mark.parametrize("closed", [(), ("b",), ("a", "d")])
@pytest.mark.parametrize("name", DRAWS)
def test_models_are_chosen_as_often_as_is_said(name, closed):
    if name == "two" and "a" in closed:
        closed = ("b",)
    one, counts, told, num = made(name), {}, {}, 1200
    for number in range(num):
        decision = one.route(Query(text=f"question {number}", vector_D=VECTOR), pool(*closed))
        counts[decision.model] = counts.get(decision.model, 0) + 1
        told.setdefault(decision.model, set()).add(round(decision.probability, 9))
    for model, count in counts.items():
        [chance] = told[model]
        assert abs(count / num - chance) < 4.5 * math.sqrt(chance * (1 - chance) / num) + 1e-9, (model, count, chance)
    assert sum(chance for [chance] in told.values()) == pytest.approx(1, abs=0.02)  # what was never drawn has little


def test_nobody_available_is_drawn_from_as_if_all_were():
    for name in ("random", "eps_greedy"):
        one = made(name)
        seen = {one.route(Query(text=f"{n}", vector_D=VECTOR), pool(*"abcd")).model for n in range(80)}
        assert seen == set("abcd")


@pytest.mark.parametrize(
    "kind", ["static", "round_robin", "cheapest", "least_latency", "rules", "linucb", "knn", "semantic"]
)
def test_what_leaves_nothing_to_chance_says_so(kind):
    data = made_outcomes(60)
    one = strategies.make(kind).fit(data)
    for query in list(data.queries())[:5]:
        assert one.route(query, made_pool()).probability == 1.0


def test_copies_of_a_question_are_drawn_each_for_itself():
    """A popular question went to one model always, while the log said with chance 1/M: one draw counted as all its copies."""
    for name in ("random", "thompson", "eps_greedy"):
        one, counts, num = made(name), {}, 1200
        for number in range(num):
            query = Query(text="hello", vector_D=VECTOR, request_id=f"r{number}")
            decision = one.route(query, pool())
            assert one.route(query, pool()).model == decision.model  # the same request again
            counts.setdefault(decision.model, []).append(decision.probability)
        for found in counts.values():
            chance = found[0]
            assert abs(len(found) / num - chance) < 4.5 * math.sqrt(chance * (1 - chance) / num) + 1e-9


def test_an_alternating_log_of_turns_is_no_evidence():
    """An agent plans, then acts, and so on: each of two models gets one kind of question, so that the better one cannot be told."""
    one, texts = strategies.make("round_robin"), [f"{('plan', 'act')[n % 2]} {n}" for n in range(600)]
    both = Pool((Model(name="a"), Model(name="b")))
    draw = np.random.default_rng(0)
    score_NM, chance_NM = np.full((600, 2), np.nan), np.full((600, 2), np.nan)
    for row, text in enumerate(texts):
        decision = one.route(Query(text=text), both)
        at = both.names.index(decision.model)
        chance_NM[row, at], score_NM[row, at] = decision.probability, draw.random() < (0.6 if row % 2 else 0.9)
    log = Recorded(query=tuple(texts), models=both.names, score_NM=score_NM, signals={"probability": chance_NM})
    alone = {name: Static(Static.Config(model=name)) for name in "ab"}
    assert "no choice of the log was drawn" in verdict_of_log(alone, log, both).note


@pytest.mark.parametrize("kind", ["cascade", "automix", "consistency", "logprob"])
def test_where_an_answer_decides_there_is_no_chance_to_say(kind):
    data = made_outcomes(60)
    one = strategies.make(kind).fit(data)
    assert one.route(next(data.queries()), made_pool()).probability is None


def test_the_largest_of_two_normals_by_hand():
    """P(X > Y) = Phi((m - n) / sqrt(s^2 + t^2))."""
    found = largest_of_normals(np.array([0.5, 0.2]), np.array([0.3, 0.4]))
    assert found[0] == pytest.approx((1 + math.erf(0.3 / 0.5 / math.sqrt(2))) / 2, abs=1e-4)
    assert largest_of_normals(np.array([1.0, 1.0, 0.0]), np.zeros(3)) == pytest.approx([0.5, 0.5, 0.0], abs=1e-6)
    assert largest_of_normals(np.array([0.3]), np.array([0.0])) == pytest.approx([1.0])
    # However large or small they are, as far as floats tell them apart.
    for scale in (0.0, 1e-12, 1e12):
        assert largest_of_normals(np.full(2, scale), np.zeros(2)) == pytest.approx([0.5, 0.5], abs=1e-6)
    assert largest_of_normals(np.array([1e12, -1e12]), np.zeros(2)) == pytest.approx([1.0, 0.0], abs=1e-6)


@given(st.lists(st.tuples(st.floats(-1, 1), st.sampled_from([0.0, 1e-3, 0.05, 1.0, 30.0])), min_size=2, max_size=6))
def test_the_largest_of_normals_is_as_often_as_drawn(pairs):
    mean, deviation = np.array(pairs).T
    # Ties of what has no deviation are shared; a draw breaks them by place.
    mean = mean + 1e-6 * np.arange(len(mean))
    found = largest_of_normals(mean, deviation)
    draws = mean + deviation * np.random.default_rng(0).standard_normal((4000, len(mean)))
    share = np.bincount(draws.argmax(1), minlength=len(mean)) / 4000
    assert found.sum() == pytest.approx(1)
    np.testing.assert_allclose(found, share, atol=0.045)


@pytest.mark.parametrize("name", ["thompson", "eps_greedy", "random"])
def test_estimates_from_the_ledger_of_drawn_traffic_are_right(tmp_path, name, monkeypatch):
    """Each model's worth is known; the log is one answer per request of a strategy that goes on learning."""
    # Requests are drawn by their ids.
    ids = map("aa-{}".format, itertools.count())
    monkeypatch.setattr("anabranch.gateway.core.request_state.new_id", lambda: next(ids))
    worth = {"a": {"maths": 0.9, "poetry": 0.3}, "b": {"maths": 0.4, "poetry": 0.8}, "c": {"maths": 0.5, "poetry": 0.4}}
    fields = {"thompson": {"scale": 4.0, "dim": 2}, "eps_greedy": {"epsilon": 0.5, "decay": 0.0, "dim": 2}}.get(
        name, {}
    )
    config = GatewayConfig(
        models=tuple(
            ModelConfig(
                name=one, price=Price.of_dollars(1, 2), deployments=(DeploymentConfig(provider=Mock.Config(model=one)),)
            )
            for one in worth
        ),
        # One that was passed over, since a busy machine kept it waiting, is not drawn.
        strategies={"try": StrategyConfig(use=name, fields=fields, timeout_s=60)},
        embedder=Hashed.Config(),
        require_key=False,
        store=str(tmp_path / "g.db"),
        log=LogConfig(prompts=True),
    )
    draw = np.random.default_rng(1)

    async def work():
        async with Gateway(config) as gateway:
            for number in range(400):
                topic = ("maths", "poetry")[number % 2]
                body = {"model": "auto/try", "messages": [{"role": "user", "content": f"{topic} {number}"}]}
                reply = await gateway.handle("chat", body)
                right = float(draw.random() < worth[reply.headers["x-route-model"]][topic])
                await gateway.feedback({"request_id": reply.headers["x-request-id"], "score": right})
            # What the sender chose says nothing of chances, and is left out: these would say that c is always right.
            for number in range(50):
                body = {"model": "c", "messages": [{"role": "user", "content": f"maths {number}"}]}
                reply = await gateway.handle("chat", body)
                await gateway.feedback({"request_id": reply.headers["x-request-id"], "score": 1.0})

    asyncio.run(work())
    log = load_outcomes(tmp_path / "g.db", by_choice=True)
    chance_NM = log.signals["probability"]
    assert np.isfinite(chance_NM).any(1).sum() == 400
    alone = {model: Static(Static.Config(model=model)) for model in worth}
    found = replay(alone, log, pool_of(log.models))
    assert found.rows == 450
    # Thompson may come to be sure.
    assert 395 <= found.drawn <= 400
    for one in found.strategies:
        truth = np.mean(list(worth[one.name].values()))
        low, high = one.doubly_robust_interval
        margin = 0.04
        assert low - margin < truth < high + margin
        assert abs(one.ips - truth) < 0.2
        assert abs(one.score - truth) < 0.15
        assert one.support == pytest.approx(1, abs=0.3)


def test_who_draws_by_the_lot_of_the_log_is_found_out(capsys):
    """The same kind with the same seed chooses as the log did each time, so that every row matches."""
    data, drawn = made_outcomes(400), strategies.make("random")
    choice_N = drawn.play(data, made_pool()).model_N
    known_NM = np.arange(4) == choice_N[:, None]
    log = replace(
        data,
        score_NM=np.where(known_NM, data.score_NM, np.nan),
        signals={"probability": np.where(known_NM, 0.25, np.nan)},
    )
    found = replay({"same": drawn, "other": strategies.make("random", seed=5)}, log, made_pool())
    same, other = found.strategies
    assert same.support == pytest.approx(4)
    assert other.support_interval[0] < 1 < other.support_interval[1]
    print_replay(found)
    said = capsys.readouterr().out
    assert "same: it draws as the log did" in said
    assert "other:" not in said
