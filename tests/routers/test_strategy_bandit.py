"""Bandits: updates against the direct inverse, regret on made arms, drift, costs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import InputError
from anabranch.routers import strategies
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.query import Model, Outcome, Pool, Query
from anabranch.routers.made_outcomes import made_outcomes, made_pool
from anabranch.routers.strategies.bandit import EpsGreedy, LinUCB, Thompson
from anabranch.routers.strategies.normals import normal_of as _normal

POOL = Pool((Model(name="a"), Model(name="b"), Model(name="c")))
KINDS = ["linucb", "thompson", "eps_greedy"]


def query(vector, text=""):
    return Query(text=text, vector_D=np.asarray(vector, np.float32))


def observe(one, vector, model, quality=None, cost=None):
    one.observe(Outcome(query=query(vector), model=model, quality=quality, cost=cost))


@given(st.integers(0, 2**32 - 1), st.sampled_from([1.0, 0.3, 4.0]))
def test_updates_equal_the_direct_inverse(seed, ridge):
    rng = np.random.default_rng(seed)
    one = LinUCB.Config(dim=3, ridge=ridge).build()
    x, quality = rng.standard_normal((15, 5)).astype(np.float32), rng.random(15)
    for vector, value in zip(x, quality, strict=True):
        observe(one, vector, "a", value)
    z = one.features(x)
    inverse = np.linalg.inv(ridge * np.eye(4) + z.T @ z)
    np.testing.assert_allclose(one.inverse_MDD[0], inverse, atol=1e-9)
    np.testing.assert_allclose(one.theta_MD[0], inverse @ (z.T @ quality), atol=1e-9)


def test_linucb_index_by_hand():
    """Ridge 1, one observation z = (1, 1) of quality 0.6: A = [[2, 1], [1, 2]], A^-1 = [[2, -1], [-1, 2]] / 3."""
    one = LinUCB.Config(alpha=0.5, ridge=1.0).build()
    observe(one, [1.0], "a", 0.6)
    decision = one.route(query([2.0]), Pool((Model(name="a"), Model(name="b"))))
    found = {candidate.model: candidate for candidate in decision.candidates}
    # theta = A^-1 (0.6, 0.6) = (0.2, 0.2), so 0.2 + 0.4; z A^-1 z = (2 - 4 + 8) / 3 = 2; the unknown arm: 0 and 1 + 4 = 5
    assert found["a"].quality == pytest.approx(0.6)
    assert found["a"].score == pytest.approx(0.6 + 0.5 * np.sqrt(2))
    assert found["b"].score == pytest.approx(0.5 * np.sqrt(5))


def test_discounted_updates_equal_weighted_regression():
    """Well within the prior's bound, A is sum gamma^(T - t) z z^T + gamma^T ridge I over the arm's own steps."""
    rng = np.random.default_rng(0)
    one = LinUCB.Config(discount=0.9, ridge=0.01).build()
    x, quality = rng.standard_normal((40, 2)).astype(np.float32), rng.random(40)
    for vector, value in zip(x, quality, strict=True):
        observe(one, vector, "a", value)
    z, weight = one.features(x), 0.9 ** np.arange(39, -1, -1)
    matrix = (z * weight[:, None]).T @ z + 0.01 * 0.9**39 * np.eye(
        3
    )  # the first step had nothing to discount but the prior
    np.testing.assert_allclose(np.linalg.inv(one.inverse_MDD[0]), matrix, rtol=0.02, atol=0.02)


def test_an_arm_that_is_not_asked_grows_uncertain_up_to_the_prior():
    one = LinUCB.Config(discount=0.9, ridge=1.0).build()
    widths = []
    for _ in range(60):
        observe(one, [1.0, 0.0], "b", 0.5)
    for _ in range(200):
        observe(one, [1.0, 0.0], "a", 0.5)
        widths.append(one._beliefs(one.features(np.array([[1.0, 0.0]]))[0], ("b",))[1][0])
    assert (np.diff(widths) >= 0).all()
    assert widths[-1] == pytest.approx(2.0)  # |z|^2 / ridge
    assert one._beliefs(one.features(np.array([[1.0, 0.0]]))[0], ("a",))[1][0] < 0.2


def test_forgetting_stays_finite():
    one = LinUCB.Config(discount=0.5, ridge=1.0).build()
    for number in range(300):
        observe(one, [1.0, 0.0], "ab"[number % 2], 1.0)
    assert np.isfinite(one.inverse_MDD).all()
    assert np.trace(one.inverse_MDD[0]) <= 3.0 + 1e-9  # the prior's


def world(num_rows, seed, noise=0.1):
    """Three arms, linear in four dimensions; returns vectors and expected qualities."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((num_rows, 4))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    theta = np.random.default_rng(42).standard_normal((3, 4))
    return x, 0.5 + 0.4 * x @ theta.T, rng.normal(0, noise, (num_rows, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_regret_grows_slower_than_the_rounds(kind):
    """Sublinear: the second half costs well under the first, and all of it a fraction of what choosing blindly costs."""
    fields = {"eps_greedy": {"epsilon": 0.5, "decay": 0.02}}.get(kind, {})
    x, expected, noise = world(1500, 0)
    data = Recorded(
        query=tuple(str(row) for row in range(1500)),
        models=("a", "b", "c"),
        score_NM=expected + noise,
        vector_ND=x.astype(np.float32),
    )
    one = strategies.make(kind, **fields)
    regret = expected.max(1) - expected[np.arange(1500), one.play(data, POOL).model_N]
    assert regret[750:].sum() < 0.5 * regret[:750].sum()
    assert regret[750:].mean() < 0.1 * (expected.max(1) - expected.mean(1)).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_learning_from_one_arm_only_teaches_that_arm(kind):
    one = strategies.make(kind).fit(made_outcomes())
    before = {name: array.copy() for name, array in one.state()[0].items()}
    one.observe(Outcome(query=next(made_outcomes().queries()), model="large", quality=1.0, cost=1e-3))
    changed = np.flatnonzero((one.theta_MD != before["theta_MD"]).any(1))
    assert [one.models[at] for at in changed] == ["large"]


def test_warm_start_equals_observing_everything():
    data = made_outcomes(60)
    warm = LinUCB.Config(dim=5).build().fit(data)
    cold = LinUCB.Config(dim=5).build().fit(data.take([0]))
    cold._start(warm.centre_V, warm.direction_DV)  # the same directions
    for row, one in enumerate(data.queries()):
        for column, name in enumerate(data.models):
            cold.observe(
                Outcome(
                    query=one,
                    model=name,
                    quality=float(data.score_NM[row, column]),
                    cost=float(data.cost_NM[row, column]),
                )
            )
    np.testing.assert_allclose(cold.theta_MD, warm.theta_MD, atol=1e-8)
    np.testing.assert_allclose(cold.inverse_MDD, warm.inverse_MDD, atol=1e-8)
    np.testing.assert_allclose(cold.cost_M, warm.cost_M)


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_change_of_the_world_discounting_recovers(kind):
    """After 800 rounds the best arm becomes the worst: what forgets finds the new best one within 100, what does not stays with the old."""
    x = np.random.default_rng(1).standard_normal((1100, 2)).astype(np.float32)
    score = np.tile([0.9, 0.6, 0.1], (1100, 1))
    score[800:] = [0.4, 0.6, 0.9]
    data = Recorded(query=tuple(str(row) for row in range(1100)), models=("a", "b", "c"), score_NM=score, vector_ND=x)
    late = {
        weight: strategies.make(kind, discount=weight).play(data, POOL).quality_N[900:].mean() for weight in (1.0, 0.98)
    }
    assert late[0.98] > 0.8
    assert late[1.0] < 0.5


def test_costs_are_learned_and_weighed():
    one = LinUCB.Config(trade_off=100.0, alpha=0.0).build()
    for _ in range(20):
        observe(one, [1.0, 0.0], "a", 0.9, cost=0.010)
        observe(one, [1.0, 0.0], "b", 0.7, cost=0.001)
    two = Pool((Model(name="a"), Model(name="b")))
    assert one.route(query([1, 0]), two).model == "b"  # 0.9 - 1.0 against 0.7 - 0.1
    assert one.with_knob(1.0).route(query([1, 0]), two).model == "a"
    assert one.cost_M.tolist() == pytest.approx([0.010, 0.001])
    observe(one, [1.0, 0.0], "b", None, cost=0.003)  # a cost without a quality teaches the cost alone
    assert one.cost_M[1] == pytest.approx(0.001 + 0.002 / 21)
    assert one.steps == 40


def test_directions_are_the_principal_ones_of_the_data():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((200, 6)) * [5, 3, 0.1, 0.1, 0.1, 0.1]).astype(np.float32)
    data = Recorded(query=tuple(map(str, range(200))), models=("a",), score_NM=rng.random((200, 1)), vector_ND=x)
    one = LinUCB.Config(dim=2).build().fit(data)
    assert np.abs(one.direction_DV[:, 2:]).max() < 0.05 * np.abs(one.direction_DV[:, :2]).max()
    z = one.features(x)
    assert (z[:, 1:] ** 2).sum(1).mean() == pytest.approx(1.0, rel=1e-6)


def test_deciding_changes_nothing_and_decides_the_same():
    for kind in (LinUCB, Thompson, EpsGreedy):
        one = kind.Config(dim=4).build().fit(made_outcomes())
        before = {name: array.copy() for name, array in one.state()[0].items()}
        asked = [
            one.route(item, made_pool((*made_pool().names, "new"))) for item in made_outcomes(20, seed=3).queries()
        ]
        again = [
            one.route(item, made_pool((*made_pool().names, "new"))) for item in made_outcomes(20, seed=3).queries()
        ]
        assert asked == again
        assert all(np.array_equal(array, before[name]) for name, array in one.state()[0].items())


def test_thompson_draws_are_standard_normal():
    draws = np.array([_normal(0, step, "a", "text") for step in range(4000)])
    assert draws.mean() == pytest.approx(0, abs=0.06)
    assert draws.std() == pytest.approx(1, abs=0.05)
    assert (draws > 1.96).mean() == pytest.approx(0.025, abs=0.01)


def test_epsilon_draws_each_model_alike():
    one = EpsGreedy.Config(epsilon=1.0).build()
    drawn = [one.route(query([1.0, 0.0], str(number)), POOL).model for number in range(1500)]
    assert all(drawn.count(name) / 1500 == pytest.approx(1 / 3, abs=0.05) for name in "abc")
    down = Pool((Model(name="a", is_available=False), Model(name="b")))
    assert {one.route(query([1.0, 0.0], str(number)), down).model for number in range(50)} == {"b"}


def test_refuses_without_a_vector_or_with_another():
    one = LinUCB.Config().build()
    with pytest.raises(InputError, match="needs the vector"):
        one.route(Query(text=""), POOL)
    observe(one, [1.0, 0.0], "a", 0.5)
    with pytest.raises(InputError, match="2 dimensions and was given 3"):
        one.route(query([1.0, 0.0, 0.0]), POOL)


def test_a_cold_start_settles_on_the_directions_of_what_it_saw():
    """Of 20 dimensions only two vary: once settled, z is those two, and all is as if it had been learned so from the start."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((60, 20)) * ([5, 3] + [0.01] * 18)).astype(np.float32)
    cold = LinUCB.Config(dim=2, settle=40).build()
    for row, vector in enumerate(x):
        observe(cold, vector, "ab"[row % 2], float(vector[0] > 0), cost=1.0)
        assert len(cold.seen_SV) == (row + 1 if row < 39 else 0)
    assert np.abs(cold.direction_DV[:, 2:]).max() < 0.01 * np.abs(cold.direction_DV[:, :2]).max()
    direct = LinUCB.Config(dim=2).build()
    direct._start(cold.centre_V, cold.direction_DV)
    for row, vector in enumerate(x):
        observe(direct, vector, "ab"[row % 2], float(vector[0] > 0), cost=1.0)
    np.testing.assert_allclose(cold.theta_MD, direct.theta_MD, atol=1e-9)
    assert cold.steps == direct.steps == 60
    assert cold.calls_M.tolist() == [30, 30]
    twin = LinUCB.Config(dim=2, settle=40).build()
    for vector in x[:10]:
        observe(twin, vector, "a", 1.0)
    read = LinUCB.Config(dim=2, settle=40).build()
    read.load_state(*twin.state())
    for vector in x[10:50]:
        for one in (twin, read):
            observe(one, vector, "b", 0.5)
    assert np.array_equal(read.theta_MD, twin.theta_MD)


@pytest.mark.parametrize("huge", [1e200, 1e77, 1e20])
def test_sums_that_settle_nothing_leave_that_arm_as_it_was_and_take_in_the_others(huge):
    """Of a store that a huge vector once got into."""
    told = LinUCB.Config().build()
    for vector in ((1.0, 0.0), (0.0, 1.0)):
        observe(told, vector, "a", 1.0)
        observe(told, vector, "b", 0.25)
    told.hear({}, {})
    arrays, facts = told.part()
    at = facts["models"].index("a")
    arrays["gram_MDD"][at] *= huge
    heard = LinUCB.Config().build()
    observe(heard, (1.0, 0.0), "a", 0.5)
    before = heard.theta_MD[0].copy(), heard.inverse_MDD[0].copy()
    heard.hear(arrays, facts)
    assert heard.theta_MD[heard.models.index("b")] == pytest.approx(told.theta_MD[told.models.index("b")])
    np.testing.assert_array_equal(heard.theta_MD[0], before[0])
    np.testing.assert_array_equal(heard.inverse_MDD[0], before[1])
