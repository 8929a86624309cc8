"""The bandit: load bias, softmax, beliefs, critic, replay buffer; the judge; what the log says of other policies."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import DataError, InputError
from anabranch.routers.ic_cache import judge
from anabranch.routers.ic_cache.critic import SMALLEST, Critic, ReplayBuffer
from anabranch.routers.ic_cache.off_policy import DecisionLog, evaluate
from anabranch.routers.ic_cache.router import EXTRAS, Ema, Router, softmax
from anabranch.routers.ic_cache.selector import Selection

SMALL_CRITIC = Critic.Config(hidden=(16,), batch_size=16, learning_rate=3e-3)
HALF_LIFE = 5.0


def make_router(arms=("small", "large"), costs=(1.0, 4.0), dim=4, seed=0, **fields):
    return Router(Router.Config(**{"critic": SMALL_CRITIC, "explore": 0.0, **fields}), arms, costs, dim, seed=seed)


def fix(router, mu):
    """Make the critic say these utilities of any context."""
    router.critic.utilities = lambda x_I: np.array(mu, np.float64)


X = np.zeros(4 + EXTRAS, np.float32)


# Load


def test_ema_by_hand():
    ema = Ema(HALF_LIFE)
    assert ema.observe(3.0, 100.0) == 3.0
    assert ema.observe(1.0, 105.0) == pytest.approx(2.0, abs=1e-12)  # half of 3 and half of 1
    assert ema.observe(1.0, 115.0) == pytest.approx(1.25, abs=1e-12)
    assert ema.observe(9.0, 110.0) == pytest.approx(1.25, abs=1e-12)  # time does not run backwards
    assert ema.observe(9.0, 115.0) == pytest.approx(1.25, abs=1e-12)


@given(st.lists(st.tuples(st.floats(0, 60), st.floats(0, 5)), min_size=1, max_size=12))
def test_ema_equals_its_sum(steps):
    """value = sum over observations of what is left of each, to 1e-12."""
    ema, now, expected = Ema(HALF_LIFE), 0.0, None
    for gap, value in steps:
        now += gap
        keep = 2.0 ** (-gap / HALF_LIFE)
        expected = value if expected is None else keep * expected + (1 - keep) * value
        ema.observe(value, now)
    assert ema.value == pytest.approx(expected, abs=1e-12)


def push_at(load, **fields):
    router = make_router(**fields)
    router.observe_load(load, 0.0)
    return router.push


def test_push_by_hand():
    assert push_at(0.7, load_threshold=0.8) == 0
    assert push_at(0.8, load_threshold=0.8) == 0
    assert push_at(1.0, load_threshold=0.8, lambda0=0.5) == pytest.approx(0.5 * math.tanh(4 / 0.8 * 0.2))
    assert push_at(1.5, gamma=2.0) == pytest.approx(math.tanh(1.0))
    assert push_at(1e9) == 1


@settings(max_examples=50, deadline=None)
@given(loads=st.lists(st.floats(0, 50), min_size=2, max_size=8), lambda0=st.floats(0, 3), threshold=st.floats(0.1, 3))
def test_push_is_monotone_and_bounded_and_zero_below_the_threshold(loads, lambda0, threshold):
    pushes = [push_at(load, lambda0=lambda0, load_threshold=threshold) for load in sorted(loads)]
    assert pushes == sorted(pushes)
    assert all(0 <= push <= lambda0 for push in pushes)
    assert all(push == 0 for load, push in zip(sorted(loads), pushes, strict=True) if load <= threshold)


def test_bias_of_each_arm_is_at_most_lambda0_times_its_cost():
    router = make_router(("a", "b", "c"), (1, 2, 4), lambda0=0.7)
    fix(router, [0.5, 0.6, 0.7])
    for load in (0.0, 0.9, 1.1, 2.0, 99.0):
        router.load.value = load
        choice = router.choose(X)
        bias = choice.mu_M - choice.score_M
        assert (bias <= 0.7 * np.array([0.25, 0.5, 1.0]) + 1e-12).all()
        np.testing.assert_allclose(bias, choice.push * np.array([0.25, 0.5, 1.0]), atol=1e-12)


def test_autoscaling_signal_lasts_where_load_does():
    router = make_router(autoscale_half_life_s=100.0)
    for second in range(400):
        router.observe_load(3.0, float(second))
    assert router.autoscale == pytest.approx(1.0, abs=1e-3)
    for second in range(400, 500):
        router.observe_load(0.0, float(second))
    assert 0.4 < router.autoscale < 0.75
    router.observe_load(math.nan, 500.0)  # a gauge that says nothing
    assert math.isfinite(router.load.value)


# Choosing


def test_softmax_by_hand_and_in_the_limit():
    np.testing.assert_allclose(softmax(np.array([0.0, math.log(3)]), 1.0), [0.25, 0.75], atol=1e-12)
    np.testing.assert_allclose(softmax(np.array([1.0, -np.inf, 1.0]), 0.1), [0.5, 0, 0.5], atol=1e-12)
    assert softmax(np.array([0.2, 0.2, 0.1]), 0.0).tolist() == [1, 0, 0]
    np.testing.assert_allclose(softmax(np.array([1e5, -1e5]), 0.01), [1, 0], atol=1e-12)


def test_load_without_end_gives_softmax_of_mu_minus_lambda0_cost_and_the_cheapest_as_lambda0_grows():
    for lambda0 in (0.3, 1.0, 10.0, 1000.0):
        router = make_router(("a", "b", "c"), (1, 2, 4), lambda0=lambda0, temperature=0.1)
        fix(router, [0.1, 0.5, 0.9])
        router.load.value = 1e12
        found = router.choose(X).probability_M
        score = np.array([0.1, 0.5, 0.9]) - lambda0 * np.array([0.25, 0.5, 1])
        expected = np.exp((score - score.max()) / 0.1)
        np.testing.assert_allclose(found, expected / expected.sum(), atol=1e-12)
    assert found[0] == pytest.approx(1, abs=1e-12)


def test_cheapest_arm_is_chosen_more_often_as_load_grows():
    router = make_router(temperature=0.1)
    fix(router, [0.5, 0.9])
    chances = []
    for load in (0.5, 1.0, 1.05, 1.1, 1.2, 1.5, 3.0):
        router.load.value = load
        chances.append(float(router.choose(X).probability_M[0]))
    assert chances == sorted(chances)
    assert chances[0] < 0.05
    assert chances[-1] > 0.95


def test_draws_follow_the_chances_and_temperature_zero_takes_the_best():
    router = make_router(temperature=0.1)
    fix(router, [0.5, 0.6])
    chance = router.choose(X).probability_M[1]
    arms = [router.choose(X).arm for _ in range(3000)]
    assert np.mean(np.array(arms) == "large") == pytest.approx(chance, abs=0.03)
    best = make_router(temperature=0)
    fix(best, [0.5, 0.6])
    assert {best.choose(X).arm for _ in range(20)} == {"large"}


def test_what_is_unknown_goes_to_the_dear_arm_and_a_share_to_any():
    router = make_router(("a", "b", "c"), (1, 2, 4), explore=0.3, temperature=0.0, prior=0.8)
    choice = router.choose(X)
    np.testing.assert_allclose(choice.mu_M, 1 / (1 + np.exp(-0.8 * np.array([0.25, 0.5, 1.0]))), rtol=1e-6)
    np.testing.assert_allclose(choice.probability_M, [0.1, 0.1, 0.8], atol=1e-12)
    np.testing.assert_allclose(router.choose(X, ["a", "b"]).probability_M, [0.15, 0.85, 0.0], atol=1e-12)
    arms = [router.choose(X).arm for _ in range(3000)]
    assert np.mean(np.array(arms) == "c") == pytest.approx(0.8, abs=0.03)


def test_unavailable_arms_are_not_chosen_unless_all_are():
    router = make_router(temperature=0.5)
    fix(router, [0.1, 0.9])
    assert {router.choose(X, ["small"]).arm for _ in range(50)} == {"small"}
    assert {router.choose(X, []).arm for _ in range(200)} == {"small", "large"}
    assert {router.choose(X, ["unheard of"]).arm for _ in range(200)} == {"small", "large"}


def test_second_arm_only_where_mu_cannot_tell():
    router = make_router(("a", "b", "c"), (1, 2, 3), temperature=0)
    fix(router, [0.2, 0.8, 0.5])
    assert router.choose(X).second is None  # deviation 0.245
    fix(router, [0.5, 0.55, 0.52])
    choice = router.choose(X)
    assert choice.spread == pytest.approx(np.std([0.5, 0.55, 0.52]))
    assert {router.choose(X).second for _ in range(100)} == {"a", "c"}
    assert router.choose(X, ["b"]).second is None  # nobody to compare with
    some = make_router(ask_share=0.2)
    fix(some, [0.5, 0.5])
    assert np.mean([some.choose(X).second is not None for _ in range(1000)]) == pytest.approx(0.2, abs=0.05)


def test_beliefs_by_hand_and_thompson_follows_them():
    router = make_router(("a", "b", "c"), (1, 2, 3), temperature=0)
    router.prefer(X, "a", "b", 1.0)
    router.prefer(X, "a", "b", 1.0)
    router.prefer(X, "a", "c", 0.5)
    assert router.wins_M.tolist() == [3.5, 1, 1.5]
    assert router.losses_M.tolist() == [1.5, 3, 1.5]
    router.wins_M, router.losses_M = np.array([1.0, 60.0, 5.0]), np.array([1.0, 5.0, 60.0])
    fix(router, [0.6, 0.5, 0.5])
    seconds = [router.choose(X).second for _ in range(200)]
    assert seconds.count("b") > 195


# Critic


def test_replay_buffer_by_hand():
    buffer = ReplayBuffer(3, 2, alpha=1.0, beta=1.0)
    for number in range(4):  # the first is overwritten
        buffer.add(np.full(2, number), number, -1, 0.5)
    assert len(buffer) == 3
    assert sorted(buffer.arm_N2[:, 0].tolist()) == [1, 2, 3]
    buffer.update(np.arange(3), np.array([0.1, -0.2, 0.7]))
    np.testing.assert_allclose(buffer.priority_N, np.array([0.1, 0.2, 0.7]) + SMALLEST)
    rows, weight = buffer.draw(20_000, np.random.default_rng(0))
    chance = buffer.priority_N / buffer.priority_N.sum()
    np.testing.assert_allclose(np.bincount(rows) / 20_000, chance, atol=0.02)
    np.testing.assert_allclose(weight, (1 / (3 * chance[rows])) / (1 / (3 * chance.min())), atol=1e-12)
    even = ReplayBuffer(3, 2, alpha=0.0, beta=0.4)
    for number in range(3):
        even.add(np.zeros(2), number, -1, 0.5)
    even.update(np.arange(3), np.array([0.0, 0.5, 9.0]))
    rows, weight = even.draw(6000, np.random.default_rng(0))
    np.testing.assert_allclose(np.bincount(rows) / 6000, 1 / 3, atol=0.03)
    assert (weight == 1).all()


def test_buffer_forgets_by_owner():
    buffer = ReplayBuffer(5, 1, alpha=1.0, beta=1.0)
    for number, owner in enumerate([("a", "x"), ("a", "y"), ("b", "x"), ("a", "x"), ("b", "y"), ("a", "y")]):
        buffer.add(np.full(1, number), 0, -1, 0.5, owner)
    assert buffer.forget("a", "x") == 1  # the other one had been overwritten
    assert len(buffer) == 4
    assert sorted(buffer.x_NI[:4, 0].tolist()) == [1, 2, 4, 5]
    assert buffer.forget("b", None) == 2
    assert sorted(buffer.x_NI[:2, 0].tolist()) == [1, 5]
    assert (buffer.x_NI[2:] == 0).all()
    buffer.add(np.full(1, 9), 0, -1, 0.5)
    assert len(buffer) == 3
    assert buffer.forget("nobody", None) == 0


def test_critic_learns_ratings_and_preferences():
    random = np.random.default_rng(0)
    critic = Critic(SMALL_CRITIC, 3, 3, seed=0)
    for _ in range(600):
        x = random.standard_normal(3).astype(np.float32)
        critic.rate(x, 0, 0.8 if x[0] > 0 else 0.2)
        critic.prefer(x, 1, 0, 1.0 if x[1] > 0 else 0.0)
        critic.train(2)
    right = []
    for _ in range(200):
        x = random.standard_normal(3).astype(np.float32)
        mu = critic.utilities(x)
        right.append([(mu[0] > 0.5) == (x[0] > 0), (mu[1] > mu[0]) == (x[1] > 0)])
        assert mu[2] == pytest.approx(0.5, abs=0.35)  # nothing was said of it
    assert np.mean(right, axis=0).min() > 0.85


def test_bradley_terry_of_many_preferences_is_its_log_odds():
    """One context, a preferred to b three times in four: sigmoid(s_a - s_b) = 3/4."""
    critic = Critic(
        Critic.Config(hidden=(4,), learning_rate=1e-2, alpha=0.0, weight_decay=0.0, batch_size=64), 2, 2, seed=0
    )
    for number in range(40):
        critic.prefer(np.ones(2, np.float32), 0, 1, float(number % 4 > 0))
    critic.train(600)
    scores = critic.network(np.ones((1, 2)))[0]
    assert 1 / (1 + math.exp(-(scores[0] - scores[1]))) == pytest.approx(0.75, abs=0.04)


def test_critic_of_the_default_size():
    critic = Critic(Critic.Config(), 384 + EXTRAS, 2, seed=0)
    assert 300_000 < critic.network.num_parameters < 500_000
    np.testing.assert_array_equal(critic.utilities(np.ones(384 + EXTRAS, np.float32)), 0.5)  # before it has learned
    assert critic.train(5) == 0.0


def test_regret_is_sublinear_on_three_arms():
    """Means cross with the context: which arm is best is to be learned, from preferences of uncertain requests and noisy ratings."""
    best_of = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    random = np.random.default_rng(0)
    router = make_router(("a", "b", "c"), (1, 1, 1), dim=2, temperature=0.05, seed=1)
    regret = []
    for _ in range(2400):
        vector = random.standard_normal(2)
        mean = 1 / (1 + np.exp(-best_of @ vector))
        x = router.context(vector, Selection(), 10)
        choice = router.choose(x)
        at = router.arms.index(choice.arm)
        regret.append(mean.max() - mean[at])
        if choice.second is not None:
            other = router.arms.index(choice.second)
            router.prefer(
                x, choice.arm, choice.second, float(random.random() < 1 / (1 + np.exp(-4 * (mean[at] - mean[other]))))
            )
        elif random.random() < 0.2:
            router.rate(x, choice.arm, float(random.random() < mean[at]))
    total = np.cumsum(regret)
    assert np.mean(regret[-600:]) < 0.35 * np.mean(regret[:200])
    slope = np.polyfit(np.log(np.arange(200, 2400)), np.log(total[200:]), 1)[0]
    assert slope < 0.85
    uniform = np.mean(
        [(m := 1 / (1 + np.exp(-best_of @ random.standard_normal(2)))).max() - m.mean() for _ in range(2000)]
    )
    assert total[-1] / 2400 < 0.5 * uniform


def test_router_state_and_bad_input():
    router = make_router()
    for number in range(20):
        router.rate(X + number, "small", 0.3)
        router.prefer(X, "large", "small", 1.0)
    arrays, facts = router.state()
    other = make_router(seed=9)
    other.load_state({k: v.copy() for k, v in arrays.items()}, json.loads(json.dumps(facts)))
    np.testing.assert_array_equal(other.critic.utilities(X), router.critic.utilities(X))
    assert other.wins_M.tolist() == router.wins_M.tolist()
    assert other.critic.buffer.owner_N == router.critic.buffer.owner_N
    for wrong in (make_router(("a", "b")), make_router(dim=5)):
        with pytest.raises(InputError, match="the stored router is of"):
            wrong.load_state(arrays, facts)
    for arms, costs in (((), ()), (("a", "a"), (1, 1)), (("a",), (1, 2)), (("a",), (-1,)), (("a",), (math.nan,))):
        with pytest.raises(InputError):
            make_router(arms, costs)
    assert make_router(("a", "b"), (0, 0)).cost_M.tolist() == [0, 0]


# Judge


def test_judge_is_asked_in_both_orders_so_that_a_liking_for_the_first_cancels():
    asked = []

    def partial(request, first, second):
        asked.append((first, second))
        return 3.0 if first == "good" else 1.0

    assert judge.compare(partial, "q", "good", "bad") == pytest.approx(1.0)  # (3 - 1) / 2
    assert (asked.count(("good", "bad")), asked.count(("bad", "good"))) == (8, 8)
    assert judge.compare(lambda q, a, b: 2.0, "q", "x", "y") == 0
    assert [judge.outcome(score) for score in (-3, -0.31, -0.3, 0, 0.3, 0.31)] == [0, 0, 0.5, 0.5, 0.5, 1]
    assert judge.win_rate([1, 0.1, -2, 3]) == (2 + 0.5) / 4
    assert math.isnan(judge.win_rate([]))


# Off-policy


def make_log(count=4000, seed=0):
    random = np.random.default_rng(seed)
    log = DecisionLog()
    for number in range(count):
        chance = 0.2 + 0.6 * random.random()
        at = int(random.random() > chance)
        row = {"arm": "ab"[at], "arms": ["a", "b"], "probability": [chance, 1 - chance], "mu": [0.5, 0.5]}
        log.append({"id": str(number), **row})
        log.reward(str(number), float(random.random() < (0.3, 0.7)[at]))
    return log


@pytest.mark.parametrize("method", ["ips", "snips", "dr"])
def test_log_values_other_policies(method):
    rows = make_log().rows
    for policy, truth in (({"a": 1.0}, 0.3), ({"b": 1.0}, 0.7), ({"a": 0.5, "b": 0.5}, 0.5)):
        value = evaluate(rows, lambda row, policy=policy: policy, method=method)
        assert value.mean == pytest.approx(truth, abs=4 * value.error)
        assert 0.005 < value.error < 0.03
        assert value.effective < value.count == 4000


def test_log_estimates_by_hand():
    rows = [
        {"id": "0", "arm": "a", "arms": ["a", "b"], "probability": [0.5, 0.5], "mu": [0.4, 0.6], "reward": 1.0},
        {"id": "1", "arm": "b", "arms": ["a", "b"], "probability": [0.75, 0.25], "mu": [0.4, 0.6], "reward": 0.5},
        {"id": "2", "arm": "a", "arms": ["a", "b"], "probability": [0.5, 0.5], "mu": [0.4, 0.6], "reward": None},
    ]

    def policy(row):
        return {"a": 0.25, "b": 0.75}

    assert evaluate(rows, policy, method="ips").mean == pytest.approx((0.5 * 1 + 3 * 0.5) / 2)
    assert evaluate(rows, policy, method="snips").mean == pytest.approx((0.5 * 1 + 3 * 0.5) / 3.5)
    assert evaluate(rows, policy, method="dr").mean == pytest.approx(0.55 + (0.5 * 0.6 + 3 * -0.1) / 2)
    assert evaluate(rows, policy, method="ips", clip=2.0).mean == pytest.approx((0.5 * 1 + 2 * 0.5) / 2)
    with pytest.raises(DataError, match="method is 'x'"):
        evaluate(rows, policy, method="x")
    with pytest.raises(DataError, match="no decision has a reward"):
        evaluate(rows[2:], policy)
    with pytest.raises(DataError, match="no chance"):
        evaluate([{**rows[0], "probability": [0.0, 1.0]}], policy)


def test_log_is_bounded_forgets_and_reads_back(tmp_path):
    log = DecisionLog(3)
    for number in range(5):
        log.append({"id": str(number), "tenant": "ab"[number % 2]})
    log.reward("0", 1.0)  # gone: passed over
    log.reward("3", 0.5)
    assert [(row["id"], row["reward"]) for row in log.rows] == [("2", None), ("3", 0.5), ("4", None)]
    log.write(tmp_path / "log.jsonl")
    assert DecisionLog.read(tmp_path / "log.jsonl") == log.rows
    assert log.forget(lambda row: row["tenant"] == "a") == 2
    log.append({"id": "9", "tenant": "c"})
    assert [row["id"] for row in log.rows] == ["3", "9"]
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(DataError, match="cannot read decisions"):
        DecisionLog.read(tmp_path / "bad.jsonl")
