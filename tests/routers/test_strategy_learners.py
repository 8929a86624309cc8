"""Learned predictors: gradients by finite differences, closed forms by brute force, small cases by hand."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import ConfigError, DataError, InputError
from anabranch.routers import strategies
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.logistic import cross_entropy, fit_logistic, sigmoid
from anabranch.routers.made_outcomes import made_outcomes, made_pool
from anabranch.routers.strategies import irt, mf, mlp
from anabranch.routers.strategies.adam import Adam, descend, held_back
from anabranch.routers.strategies.battles import battles_of, win_rates
from anabranch.routers.strategies.elo import bradley_terry, tiers
from anabranch.routers.strategies.hybrid import best_shift, mean_difference
from anabranch.routers.strategies.ridge import Ridge, ridge, ridge_left_out
from anabranch.routers.strategies.training import folds, means, share, shrunk

RNG = np.random.default_rng(0)


def outcomes(score, vector=None, task=()):
    score = np.array(score, float)
    vector = np.eye(len(score), 3) if vector is None else np.array(vector)
    return Recorded(
        query=tuple(f"q{row}" for row in range(len(score))),
        models=("a", "b", "c", "d")[: score.shape[1]],
        score_NM=score,
        vector_ND=vector.astype(np.float32),
        task=task,
    )


def check_gradients(function, parameters):
    """Against central differences of every number."""
    _, gradients = function(parameters)
    for name, value in parameters.items():
        numeric = np.zeros_like(value)
        for place in np.ndindex(value.shape):
            kept = value[place]
            value[place] = kept + 1e-6
            above = function(parameters)[0]
            value[place] = kept - 1e-6
            numeric[place] = (above - function(parameters)[0]) / 2e-6
            value[place] = kept
        np.testing.assert_allclose(gradients[name], numeric, atol=1e-7, rtol=1e-5, err_msg=name)


# -- tools


def test_adam_by_hand():
    """Two steps of one number, bias corrected: the first step is the rate, whatever the gradient."""
    parameters = {"x": np.array([1.0])}
    adam = Adam(parameters, rate=0.1, penalty=0.5)
    adam.step({"x": np.array([2.0])})  # with the penalty 2.5; m / (1 - 0.9) = 2.5, v / (1 - 0.999) = 6.25
    assert parameters["x"][0] == pytest.approx(0.9, abs=1e-7)
    adam.step(
        {"x": np.array([-1.0])}
    )  # -1 + 0.45 = -0.55; m = 0.9 * 0.25 - 0.055 = 0.17, v = 0.999 * 0.00625 + 0.0003025
    assert parameters["x"][0] == pytest.approx(0.9 - 0.1 * (0.17 / 0.19) / np.sqrt(0.00654625 / 0.001999), abs=1e-7)


def test_adam_equals_torch():
    torch = pytest.importorskip("torch")
    ours, theirs = {"x": np.array([1.0, -2.0])}, torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    adam, reference = Adam(ours, rate=0.01, penalty=0.1), torch.optim.Adam([theirs], lr=0.01, weight_decay=0.1)
    for step in range(20):
        gradient = np.array([np.sin(step), 1.0 + step])
        adam.step({"x": gradient})
        theirs.grad = torch.tensor(gradient)
        reference.step()
    np.testing.assert_allclose(ours["x"], theirs.detach().numpy(), rtol=1e-9)


def test_descend_keeps_the_best_by_the_check_and_stops():
    parameters, losses = {"x": np.array([0.0])}, iter([3.0, 1.0, 2.0, 2.0, 0.0])
    seen = []
    kept = descend(
        parameters,
        lambda at: {"x": np.array([-1.0])},
        np.arange(4),
        rate=1.0,
        penalty=0.0,
        batch=4,
        epochs=9,
        rng=np.random.default_rng(0),
        check=lambda: seen.append(parameters["x"][0]) or next(losses),
        patience=2,
    )
    assert len(seen) == 4
    assert kept["x"][0] == seen[1]


def test_held_back_rows():
    learn, check = held_back(10, 0.3, np.random.default_rng(0))
    assert sorted([*learn, *check]) == list(range(10))
    assert len(check) == 3
    learn, check = held_back(3, 0.1, np.random.default_rng(0))
    assert sorted(learn) == sorted(check) == [0, 1, 2]


def test_folds_check_every_row_once():
    parts = list(folds(11, 3, 0))
    assert sorted(np.concatenate([check for _, check in parts])) == list(range(11))
    assert all(sorted([*learn, *check]) == list(range(11)) for learn, check in parts)


def test_means_and_shrinking_by_hand():
    np.testing.assert_array_equal(means(np.array([[1.0, np.nan], [3.0, np.nan]])), [2.0, np.nan])
    np.testing.assert_allclose(
        shrunk(np.array([[3.0], [0.0]]), np.array([[2.0], [0.0]]), 4.0, np.array([0.5])), [[5 / 6], [0.5]]
    )
    np.testing.assert_allclose(shrunk(np.array([[0.0]]), np.array([[0.0]]), 0.0, np.array([0.5])), [[0.5]])


def test_share_is_even_and_stays():
    values = np.array([share(0, text) for text in range(2000)])
    assert values.mean() == pytest.approx(0.5, abs=0.03)
    assert share(0, "x") == 0.0 or share(0, "x") == share(0, "x") != share(1, "x")
    assert share("a", "b") != share("ab", "")


def test_logistic_regression_against_a_fine_grid():
    x = np.column_stack((np.ones(6), [-2.0, -1, 0, 1, 2, 3]))
    label, weight = np.array([0, 0.2, 0, 1, 0.7, 1]), np.array([1.0, 2, 1, 1, 3, 1])
    theta = fit_logistic(x, label, weight_N=weight, penalty=0.5)
    gradient = x.T @ (weight * (sigmoid(x @ theta) - label)) + 0.5 * theta
    np.testing.assert_allclose(gradient, 0, atol=1e-5)
    best = min(
        itertools.product(
            np.linspace(theta[0] - 0.2, theta[0] + 0.2, 41), np.linspace(theta[1] - 0.2, theta[1] + 0.2, 41)
        ),
        key=lambda t: weight @ cross_entropy(x @ np.array(t), label) + 0.25 * np.array(t) @ np.array(t),
    )
    np.testing.assert_allclose(theta, best, atol=0.006)


@pytest.mark.parametrize("penalty", [0.1, 1.0, 30.0])
def test_logistic_regression_is_what_scikit_learn_finds(penalty):
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(200, 6)), rng.uniform(0.5, 2, 200)
    label = (x @ rng.normal(size=6) + rng.normal(size=200) > 0.3).astype(float)
    theirs = LogisticRegression(C=1 / penalty, solver="newton-cholesky", tol=1e-10).fit(x, label, weight)
    theta = fit_logistic(np.column_stack((np.ones(200), x)), label, weight_N=weight, penalty=penalty, free=1)
    # The constant of theirs has no penalty at all.
    np.testing.assert_allclose(theta, [*theirs.intercept_, *theirs.coef_[0]], rtol=1e-4, atol=1e-5)
    theirs = LogisticRegression(C=1 / penalty, solver="newton-cholesky", tol=1e-10, fit_intercept=False).fit(x, label)
    np.testing.assert_allclose(fit_logistic(x, label, penalty=penalty), theirs.coef_[0], rtol=1e-5, atol=1e-7)


def test_logistic_regression_from_offsets_and_a_prior():
    rng = np.random.default_rng(1)
    x, offset, prior, label = rng.normal(size=(40, 3)), rng.normal(size=40), rng.normal(size=3), rng.random(40)
    theta = fit_logistic(x, label, offset_N=offset, prior_D=prior, penalty=2.0)
    gradient = x.T @ (sigmoid(x @ theta + offset) - label) + 2.0 * (theta - prior)
    np.testing.assert_allclose(gradient, 0, atol=1e-5)
    np.testing.assert_allclose(fit_logistic(x, label, prior_D=prior, penalty=1e9), prior, atol=1e-6)
    np.testing.assert_array_equal(fit_logistic(x, label, prior_D=prior, steps=0), prior)


def test_logistic_regression_of_classes_that_are_told_apart():
    theta = fit_logistic(np.array([[-1.0], [1.0]]), np.array([0.0, 1.0]), penalty=1e-3)
    assert np.isfinite(theta).all()
    assert theta[0] > 5


# -- ridge


def test_leave_one_out_equals_leaving_one_out():
    x, y = RNG.standard_normal((12, 3)), RNG.standard_normal(12)
    _, _, left_out = ridge_left_out(x, y, (0.7,))
    for row in range(12):
        rest = np.arange(12) != row
        mean_x, mean_y = x[rest].mean(0), y[rest].mean()
        # the hat matrix keeps the centring of all rows as a free constant: leaving one out refits mean and slope together
        design = np.column_stack((np.ones(11), x[rest] - x.mean(0)))
        penalty = np.diag([0, 0.7, 0.7, 0.7])
        theta = np.linalg.solve(design.T @ design + penalty, design.T @ y[rest])
        assert left_out[row] == pytest.approx(theta[0] + (x[row] - x.mean(0)) @ theta[1:], abs=1e-9)
        assert np.isfinite([*mean_x, mean_y]).all()


def test_ridge_equals_the_normal_equations_and_picks_the_best_alpha():
    x = RNG.standard_normal((40, 5))
    y = np.column_stack((x @ [1, 0, 0, 0, 0] + 0.01 * RNG.standard_normal(40), RNG.standard_normal(40)))
    beta, offset, alpha = ridge(x, y, (0.01, 1.0, 1000.0))
    assert alpha.tolist() == [0.01, 1000.0]  # signal, noise
    centred = x - x.mean(0)
    for model in range(2):
        expected = np.linalg.solve(centred.T @ centred + alpha[model] * np.eye(5), centred.T @ y[:, model])
        np.testing.assert_allclose(beta[model], expected, atol=1e-9)
        assert offset[model] == pytest.approx(y[:, model].mean() - x.mean(0) @ expected)


def test_ridge_over_holes_uses_each_models_own_rows():
    x, y = RNG.standard_normal((30, 4)), RNG.standard_normal((30, 2))
    y[:10, 1] = np.nan
    beta, offset, _ = ridge(x, y, (1.0,))
    own_beta, own_offset, _ = ridge(x[10:], y[10:, 1:], (1.0,))
    np.testing.assert_allclose(beta[1], own_beta[0])
    assert offset[1] == pytest.approx(own_offset[0])


def test_ridge_of_wide_data_and_of_equal_rows():
    beta, offset, _ = ridge(RNG.standard_normal((3, 8)), np.ones((3, 1)), (1.0,))
    np.testing.assert_allclose(beta, 0, atol=1e-12)
    np.testing.assert_allclose(offset, 1)
    beta, offset, _ = ridge(np.ones((20, 4)), RNG.standard_normal((20, 1)), (1.0,))
    np.testing.assert_allclose(beta, 0, atol=1e-12)


def test_predicted_costs_stay_above_what_a_call_can_cost():
    data = made_outcomes()
    fitted = Ridge.Config().build().fit(data)
    test = made_outcomes(50, seed=5)
    cost = fitted.predict(test.with_vectors(test.vector_ND * 100)).cost_NM
    assert (cost >= data.cost_NM.min(0) * (1 - 1e-12)).all()


def test_ridge_refuses():
    with pytest.raises(ConfigError, match="at least one penalty above 0"):
        Ridge.Config(alphas=(0.0,))


# -- Bradley-Terry, tiers, win rates


def test_bradley_terry_of_two_by_hand():
    """3 wins against 1: log odds log 3, 400 log10(3) = 190.8 Elo points."""
    strength = bradley_terry(np.array([[[0, 3.0], [1.0, 0]]]), 1e-9)[0]
    assert strength[0] - strength[1] == pytest.approx(np.log(3), abs=1e-6)
    assert (strength[0] - strength[1]) * 400 / np.log(10) == pytest.approx(400 * np.log10(3), abs=1e-3)


def test_bradley_terry_of_three_by_hand():
    """a beats b 2:1, b beats c 2:1, and nobody else meets: log odds add up, a over c log 4."""
    wins = np.zeros((1, 3, 3))
    wins[0, 0, 1], wins[0, 1, 0], wins[0, 1, 2], wins[0, 2, 1] = 2, 1, 2, 1
    strength = bradley_terry(wins, 1e-9)[0]
    np.testing.assert_allclose(strength, [np.log(2), 0, -np.log(2)], atol=1e-6)


@given(st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_bradley_terry_gradient_vanishes_and_weights_have_no_scale(num_models, seed):
    wins = np.random.default_rng(seed).random((2, num_models, num_models)) + 0.01
    wins[:, np.arange(num_models), np.arange(num_models)] = 0
    strength = bradley_terry(wins, 1e-9)
    for one, won in zip(strength, wins, strict=True):
        expected = (won + won.T) * sigmoid(one[:, None] - one)
        np.testing.assert_allclose(expected.sum(1), won.sum(1), rtol=1e-5)  # wins are as many as expected
    np.testing.assert_allclose(bradley_terry(wins * 1e6, 1e-9), strength, atol=1e-6)


def test_bradley_terry_of_who_never_loses_is_finite():
    strength = bradley_terry(np.array([[[0, 5.0], [0, 0]]]))
    assert np.isfinite(strength).all()
    assert strength[0, 0] > 3
    np.testing.assert_array_equal(bradley_terry(np.zeros((1, 3, 3))), np.zeros((1, 3)))


def splits(count, parts):
    for cuts in itertools.combinations(range(1, count), parts - 1):
        yield list(itertools.pairwise((0, *cuts, count)))


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(1, 5))
def test_tiers_are_the_best_split_by_brute_force(values, num_tiers):
    values = np.array(values, float)
    tier = tiers(values, num_tiers)
    parts = min(num_tiers, len(values))
    assert np.array_equal(np.unique(tier), np.arange(parts))
    order = np.argsort(values, kind="stable")
    assert (np.diff(tier[order]) >= 0).all()
    ours = sum(values[tier == part].var() for part in range(parts))
    ordered = values[order]
    best = min(sum(ordered[begin:end].var() for begin, end in split) for split in splits(len(values), parts))
    assert ours == pytest.approx(best, abs=1e-9)


def test_sw_elo_of_two_models_is_the_weighted_share_of_wins():
    """The published win probability: with weights 10 * 10^(s / max s), and a tie half a win each."""
    vector = np.array([[1, 0, 0], [0.6, 0.8, 0], [0, 1, 0], [0, 0, 1]])
    data = outcomes([[1, 0], [0, 1], [1, 1], [0, 1]], vector)
    one = strategies.make("sw_elo", penalty=1e-9).fit(data).predictor
    query = np.array([0.8, 0.6, 0])
    similarity = vector @ query  # 0.8, 0.96, 0.6, 0
    weight = 10 * 10 ** (similarity / similarity.max())
    expected = (weight[0] + 0.5 * weight[2]) / weight.sum()
    found = one.predict(outcomes([[np.nan, np.nan]], query[None])).quality_NM[0]
    np.testing.assert_allclose(found, [expected, 1 - expected], atol=1e-5)


def test_sw_elo_tiers_share_ratings():
    data = outcomes([[1, 1, 0, 0.1], [1, 0.9, 0, 0], [0, 1, 0.2, 0], [1, 0, 0, 0]], np.eye(4))
    one = strategies.make("sw_elo", num_tiers=2).fit(data).predictor
    assert one.tier_M[0] == one.tier_M[1] != one.tier_M[2] == one.tier_M[3]
    rating = one.ratings(np.ones((1, 4), np.float32) / 2)[0]
    assert rating[0] == rating[1] > rating[2] == rating[3]


def test_battles_by_hand():
    battles = battles_of(np.array([[1.0, 0.0, np.nan], [0.5, 0.5, 0.7]]), "x")
    assert list(zip(battles.row_B, battles.winner_B, battles.loser_B, battles.tie_B, strict=True)) == [
        (0, 0, 1, False),
        (1, 0, 1, True),
        (1, 2, 0, False),
        (1, 2, 1, False),
    ]
    assert len(battles.decided()) == 3
    with pytest.raises(DataError, match="no query has scores of two"):
        battles_of(np.array([[1.0, np.nan]]), "x")


def test_win_rates_by_hand():
    rate = win_rates(np.array([[np.log(3), 0.0, 0.0]]), np.array([True, True, False]))[0]
    np.testing.assert_allclose(rate, [0.75, 0.25, -np.inf])
    assert win_rates(np.zeros((1, 1)), np.array([True]))[0, 0] == 0.5


# -- matrix factorisation, network, abilities


def test_gradients_of_matrix_factorisation():
    rng = np.random.default_rng(1)
    parameters = mf.initial(3, 4, 5, rng)
    x, winner, loser = rng.standard_normal((6, 4)), np.array([0, 1, 2, 0, 1, 1]), np.array([1, 2, 0, 2, 0, 0])
    check_gradients(lambda p: mf.loss_and_gradients(p, x, winner, loser), parameters)


def test_matrix_factorisation_equals_the_papers_formula():
    """sigma(w^T ((v_a - v_b) o W x)), v of length 1, is what is predicted after learning, for every pair."""
    data = outcomes(RNG.random((30, 2)), RNG.standard_normal((30, 3)))
    one = mf.MatrixFactorisation.Config(dim=6, epochs=2).build()
    learned = {}
    plain = one._learned
    one._learned = lambda *args: learned.setdefault("p", plain(*args))
    one.fit(data, seed=3)
    p, x = learned["p"], np.array([0.6, 0.8, 0.0])
    unit = p["v_MF"] / np.linalg.norm(p["v_MF"], axis=1, keepdims=True)
    expected = sigmoid(p["w_F"] @ ((unit[0] - unit[1]) * (p["W_FD"] @ x)))
    found = one.predict(outcomes([[np.nan, np.nan]], x[None])).quality_NM[0]
    np.testing.assert_allclose(found, [expected, 1 - expected], rtol=1e-6)


def test_epochs_draw_battles_of_every_query():
    row = np.repeat([0, 3, 5], [1, 4, 2])
    drawn = mf._drawn(row, 1, np.random.default_rng(0))
    assert sorted(row[drawn]) == [0, 3, 5]
    assert sorted(row[mf._drawn(row, 2, np.random.default_rng(0))]) == [0, 3, 3, 5, 5]
    assert sorted(mf._drawn(row, None, np.random.default_rng(0))) == list(range(7))
    assert len({tuple(sorted(mf._drawn(row, 1, np.random.default_rng(seed)))) for seed in range(20)}) > 1


@pytest.mark.parametrize("module", [mlp, irt])
def test_gradients_of_networks_over_holes(module):
    rng = np.random.default_rng(2)
    shapes = {
        mlp: {"V_HD": (4, 3), "a_H": (4,), "U_MH": (2, 4), "b_M": (2,)},
        irt: {"A_FD": (4, 3), "a_F": (4,), "beta_D": (3,), "beta_1": (1,), "theta_MF": (2, 4)},
    }
    parameters = {name: rng.standard_normal(shape) for name, shape in shapes[module].items()}
    x, y = rng.standard_normal((6, 3)), rng.random((6, 2))
    y[0, 1] = y[3] = np.nan
    check_gradients(lambda p: module.loss_and_gradients(p, x, y), parameters)


@pytest.mark.parametrize("name", ["mlp", "irt", "mf", "ridge", "hybrid", "knn"])
def test_learners_beat_the_best_single_model(name):
    train, test = made_outcomes(600), made_outcomes(300, seed=1)
    fitted = strategies.make(name, **({"k": 15} if name == "knn" else {})).fit(train)
    gain = fitted.play(test, made_pool()).quality_N.mean() - test.score_NM.mean(0).max()
    assert gain > 0.03


def test_a_new_model_is_placed_from_few_scores():
    """Learned on three models; the fourth, from 60 scores, predicts better than its mean and better than the mean of the others."""
    train, test = made_outcomes(600), made_outcomes(400, seed=1)
    one = irt.ItemResponse.Config(dim=8).build().fit(train.only(["small", "middle", "odd"]))
    known = one.predict(test).quality_NM.copy()
    one.add_model("large", train.take(np.arange(60)))
    assert one.models == ("small", "middle", "odd", "large")
    predicted = one.predict(test).quality_NM
    np.testing.assert_array_equal(predicted[:, :3], known)
    label = test.score_NM[:, 2]
    error = ((predicted[:, 3] - label) ** 2).mean()
    assert error < ((train.score_NM[:60, 2].mean() - label) ** 2).mean()
    assert error < ((known.mean(1) - label) ** 2).mean()
    one.add_model("large", train.take(np.arange(200)))  # anew
    assert len(one.models) == 4
    with pytest.raises(InputError, match="fit it before"):
        irt.ItemResponse.Config().build().add_model("large", train)
    with pytest.raises(DataError):
        one.add_model("large", dataclasses.replace(train, score_NM=np.full(train.score_NM.shape, np.nan)))


# -- hybrid, task


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_mean_difference_equals_all_pairs(values):
    values = np.array(values)
    assert mean_difference(values) == pytest.approx(np.abs(values[:, None] - values).mean(), abs=1e-12)


def test_shift_that_tells_queries_apart():
    """Gaps -0.9 and -0.1: without a shift all labels are near 0; half-way between them they part."""
    gap = np.array([-0.9, -0.9, -0.1, -0.1])
    shift = best_shift(gap, 0.05)
    assert 0.1 < shift < 0.9
    tried = [mean_difference(sigmoid((gap + one) / 0.05)) for one in np.linspace(0, 2, 201)]
    assert mean_difference(sigmoid((gap + shift) / 0.05)) >= max(tried) - 1e-6


def test_hybrid_learns_where_the_small_model_is_good_enough():
    rng = np.random.default_rng(0)
    vector = rng.standard_normal((300, 3))
    score = np.column_stack((vector[:, 0] > 0, np.ones(300))).astype(float)  # a is right on one side, b always
    fitted = strategies.make("hybrid").fit(outcomes(score, vector))
    assert fitted.predictor.explain(next(outcomes(score, vector).queries()))["large"] == "b"
    played = fitted.play(outcomes(score, vector), made_pool(("a", "b")))
    assert ((played.model_N == 0) == (vector[:, 0] > 0)).mean() > 0.95
    with pytest.raises(InputError, match=r"hybrid\.large is 'z', which is not among the models: a, b"):
        strategies.make("hybrid", large="z").fit(outcomes(score, vector))


def test_task_means_by_hand():
    data = outcomes([[1, 0], [1, 0.5], [0, 1], [0.2, np.nan]], task=("x", "x", "y", None))
    one = strategies.make("task", prior=2.0).fit(data).predictor
    test = outcomes([[np.nan] * 2] * 3, task=("x", "never", None))
    quality = one.predict(test).quality_NM
    # overall: a 2.2 / 4 = 0.55, b 1.5 / 3 = 0.5; task x: a (2 + 2 * 0.55) / 4, b (0.5 + 2 * 0.5) / 4
    np.testing.assert_allclose(quality, [[3.1 / 4, 1.5 / 4], [0.55, 0.5], [0.55, 0.5]])
