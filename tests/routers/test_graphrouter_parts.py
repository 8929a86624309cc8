"""The pieces of GraphRouter that need no training: utility and labels, cost scales, splits, centring, neighbours, placement."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import InputError
from anabranch.routers.graphrouter.centre import centred, kappa_of, means
from anabranch.routers.graphrouter.costs import Ratio, first_ratio
from anabranch.routers.graphrouter.graph import CostScale, best, hold_out, utility
from anabranch.routers.graphrouter.neighbours import Neighbours, nearest
from anabranch.routers.graphrouter.nodes import Tasks, described, of_name
from anabranch.routers.graphrouter.placement import RIDGES, place, unseen
from anabranch.routers.money import Price

NAN = np.nan


def unit(count, dim, seed=0):
    x = np.random.default_rng(seed).normal(size=(count, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


# Utility, labels, scales


@pytest.mark.parametrize(("scenario", "value"), [("performance", 0.8), ("balance", 0.3), ("cost", 0.0)])
def test_utility_of_the_three_scenarios(scenario, value):
    assert utility(np.array([[0.8]]), np.array([[0.2]]), scenario) == pytest.approx(np.array([[value]]))


def test_labels_mark_all_that_tie_and_nothing_unknown():
    label = best(np.array([[0.5, 0.5, 0.1], [NAN, -1.0, -2.0], [NAN, NAN, NAN], [3.0, 2.0, 1.0]]))
    assert label.tolist() == [[True, True, False], [False, True, False], [False] * 3, [True, False, False]]


def test_costs_are_scaled_task_by_task():
    cost = np.array([[1.0, 3.0], [2.0, 5.0], [7.0, 7.0], [NAN, 9.0]])
    scale = CostScale.fit(cost, np.array([0, 0, 1, 2]), 3)
    assert scale.low_T.tolist() == [1, 7, 9, 1]  # the last row is over all
    assert scale.span_T.tolist() == [4, 0, 0, 8]
    scaled = scale.scale(cost, np.array([0, 0, 1, 2]))
    assert scaled[:2].tolist() == [[0, 0.5], [0.25, 1]]
    assert scaled[2].tolist() == [0, 0]  # a constant cost, not NaN
    assert np.isnan(scaled[3, 0])
    assert scaled[3, 1] == 0
    assert scale.scale(np.array([[9.0]]), np.array([-1])).item() == 1  # no known task
    assert scale.dollars(scaled[:2], np.array([0, 0])).tolist() == cost[:2].tolist()


def test_a_cost_beyond_those_seen_scales_beyond_one():
    scale = CostScale.fit(np.array([[1.0, 2.0]]), np.array([0]), 1)
    assert scale.scale(np.array([[3.0]]), np.array([0])).item() == 2


def test_a_task_without_known_costs_takes_the_scale_of_all():
    scale = CostScale.fit(np.array([[1.0, 3.0], [NAN, NAN]]), np.array([0, 1]), 2)
    assert scale.scale(np.array([[2.0]]), np.array([1])).item() == 0.5


def test_duplicates_are_held_out_together_and_each_task_gives_its_share():
    group, task = np.repeat(np.arange(50), 2), np.repeat([0, 1], 50)
    held = hold_out(group, task, 0.2, seed=3)
    assert held.sum() == 20
    assert (held[0::2] == held[1::2]).all()
    assert held[:50].sum() == held[50:].sum() == 10
    assert (hold_out(group, task, 0.2, seed=3) == held).all()
    assert not (hold_out(group, task, 0.2, seed=4) == held).all()


def test_a_question_under_two_tasks_is_on_one_side():
    group, task = np.array([0, 1, 2, 3, 0, 4, 5, 6]), np.array([0, 0, 0, 0, 1, 1, 1, 1])
    for seed in range(20):
        held = hold_out(group, task, 0.5, seed)
        assert held[0] == held[4]


def test_nothing_is_held_out_of_one_query_and_shares_are_checked():
    assert not hold_out(np.array([0]), np.array([0]), 0.9, 0).any()
    with pytest.raises(InputError, match="share held out is 1"):
        hold_out(np.array([0]), np.array([0]), 1.0, 0)


# Nodes


def test_described_takes_vector_before_description_before_name():
    class Lengths:
        def embed(self, texts):
            return np.array([[len(text), 1, 0] for text in texts], np.float32)

    found = described(["a", "b", "c"], {"a": "text", "b": "four"}, {"a": np.array([9, 9, 9])}, Lengths())  # type: ignore[arg-type]
    assert found[0].tolist() == [9, 9, 9]
    assert found[1] == pytest.approx(np.array([4, 1, 0]) / 17**0.5)
    assert found[2] == pytest.approx(of_name("c", 3))
    assert np.linalg.norm(of_name("c", 3)) == pytest.approx(1)
    assert not np.allclose(of_name("c", 3), of_name("d", 3))


def test_descriptions_that_cannot_be_used_are_refused():
    with pytest.raises(InputError, match="'a' has a description and no embedder"):
        described(["a"], {"a": "text"}, {}, None)
    with pytest.raises(InputError, match="2 and 3 dimensions"):
        described(["a", "b"], {}, {"a": np.zeros(2), "b": np.zeros(3)}, None)


def test_tasks_are_told_and_rows_left_out_are_what_refitting_gives():
    rng = np.random.default_rng(0)
    names = ["maths", "code", "poems"] * 20
    x = np.eye(8)[[0, 1, 2] * 20] + 0.3 * rng.normal(size=(60, 8))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    tasks, out = Tasks.fit(x, names)
    assert tasks.names == ("maths", "code", "poems")
    assert (tasks.told(x).argmax(1) == tasks.index(names)).mean() > 0.9
    assert out.sum(1) == pytest.approx(np.ones(60), abs=1e-5)
    others = np.arange(60) != 7  # naive: fit without row 7 at the same ridge and shares
    label = np.eye(3)[tasks.index(names)]
    z = x.astype(float)
    weight = np.linalg.solve(
        z[others].T @ z[others] + tasks.ridge * np.eye(8), z[others].T @ (label - label.mean(0))[others]
    )
    power = np.exp(tasks.sharpness * (z[7] @ weight + label.mean(0)))
    assert out[7] == pytest.approx(power / power.sum(), abs=1e-5)


def test_unknown_and_absent_tasks():
    tasks, _ = Tasks.fit(unit(6, 4), ["a", None, "a", None, "a", "b"])
    assert tasks.names == ("a", "", "b")
    assert tasks.index(["b", "never", None]).tolist() == [2, -1, 1]
    assert tasks.one_hot(np.array([2, -1])).tolist() == [[0, 0, 1], [0, 0, 0]]


# Centring


def test_centring_by_hand():
    # one query, three models, means taken out already: 0.3, -0.1, unseen; kappa 1, guess 0.2
    level, weight, left, left_weight = centred(
        np.array([[0.3, -0.1, 0.0]]), np.array([[1.0, 1.0, 0.0]]), 1.0, np.array([0.2])
    )
    assert level == pytest.approx([(0.3 - 0.1 + 0.2) / 3])
    assert weight == pytest.approx([2 / 3])
    assert left[0] == pytest.approx([0.3 - (-0.1 + 0.2) / 2, -0.1 - (0.3 + 0.2) / 2, 0])
    assert left_weight[0] == pytest.approx([2 / 3, 2 / 3, 0])


def test_an_edge_is_held_against_the_other_edges_alone():
    seen = np.ones((1, 4))
    one, other = (centred(np.array([[value, 0.1, 0.2, 0.3]]), seen, 0.5)[2][0, 0] for value in (0.0, 1.0))
    assert other - one == pytest.approx(1.0)


def test_means_of_models_asked_at_hard_and_easy_queries():
    rng = np.random.default_rng(1)
    level, quality = rng.normal(size=400) * 0.5, np.array([0.1, -0.1, 0.0])
    score = level[:, None] + quality + 0.01 * rng.normal(size=(400, 3))
    score[level > 0, 0] = NAN  # the best model was asked at hard queries alone
    plain = np.nanmean(score, 0)
    fair = means(score, 0.01, rounds=30)
    assert plain[0] < plain[1]
    assert fair[0] - fair[1] == pytest.approx(0.2, abs=0.02)


def test_kappa_is_the_ratio_of_variances():
    rng = np.random.default_rng(2)
    score = rng.normal(size=(3000, 1)) * 0.4 + rng.normal(size=(3000, 6)) * 0.2
    assert kappa_of(score) == pytest.approx(0.25, rel=0.1)
    assert kappa_of(np.array([[1.0, NAN]])) == 1.0
    assert kappa_of(np.tile([[0.2, 0.8]], (5, 1))) >= 0.05  # no level at all: within the bounds


# Neighbours


def test_nearest_is_exact_and_breaks_ties_by_row():
    x = np.array([[1, 0], [0, 1], [1, 0], [-1, 0]], np.float32)
    row, like = nearest(np.array([[1, 0]], np.float32), x, 3)
    assert row.tolist() == [[0, 2, 1]]
    assert like.tolist() == [[1, 1, 0]]
    assert nearest(np.zeros((0, 2), np.float32), x, 2)[0].shape == (0, 2)


def test_an_index_takes_over_and_finds_nearly_the_same():
    x, q = unit(700, 16), unit(40, 16, seed=1)
    exact, index = Neighbours(16, 10_000), Neighbours(16, 500)
    for store in (exact, index):
        store.add(x[:400])
        store.add(x[400:])
    assert exact.is_exact
    assert not index.is_exact
    right = exact.search(q, 10)[0]
    found = np.concatenate([index.search(row[None], 10)[0] for row in q])
    assert np.mean([len(set(a) & set(b)) for a, b in zip(right.tolist(), found.tolist(), strict=True)]) >= 9.8
    assert (index.search(q, 10)[0] == right).all()  # a whole table is searched exactly


@pytest.mark.parametrize(
    "exact_below", [10_000, pytest.param(50, marks=pytest.mark.slow)]
)  # an index is compiled to move rows
def test_a_row_can_be_replaced_and_all_comes_back_from_its_state(exact_below):
    store = Neighbours(8, exact_below)
    store.add(unit(80, 8))
    new = unit(1, 8, seed=9)
    store.replace(3, new[0])
    row, like = store.search(new, 1)
    assert row.item() == 3
    assert like.item() == pytest.approx(1, abs=1e-5)
    other = Neighbours(8, exact_below)
    other.load_state(*store.state())
    for mine, theirs in zip(store.search(unit(3, 8, seed=5), 6), other.search(unit(3, 8, seed=5), 6), strict=True):
        assert (mine == theirs).all()


def test_fewer_rows_than_asked_for():
    store = Neighbours(4, 100)
    assert store.search(unit(2, 4), 5)[0].shape == (2, 0)
    store.add(unit(2, 4))
    assert store.search(unit(1, 4), 5)[0].shape == (1, 2)


# Placement and costs of models that join


def test_placing_is_a_ridge_regression_chosen_by_leaving_one_out():
    rng = np.random.default_rng(3)
    x, weight = rng.normal(size=(40, 5)), rng.uniform(0.5, 1, size=40)
    y = 0.3 * x[:, 1] - 0.2 * x[:, 3] + 0.1 * rng.normal(size=40)
    y -= (weight @ y) / weight.sum()
    placed = place(x, y, weight)
    away = x - (weight @ x) / weight.sum()
    losses = []
    for ridge in RIDGES:  # naive: refit without each shot, mean and all
        loss = 0.0
        for out in range(40):
            keep = np.arange(40) != out
            w = weight[keep]
            ones = np.ones((40, 1))
            design = np.concatenate([ones, away], 1)
            penalty = ridge * np.diag([0, *[1] * 5])
            beta = np.linalg.solve(
                (design[keep] * w[:, None]).T @ design[keep] + penalty, (design[keep] * w[:, None]).T @ y[keep]
            )
            loss += weight[out] * (y[out] - design[out] @ beta) ** 2
        losses.append(loss)
    ridge = RIDGES[int(np.argmin(losses))]
    direct = np.linalg.solve((away * weight[:, None]).T @ away + ridge * np.eye(5), (away * weight[:, None]).T @ y)
    assert placed.weight_X == pytest.approx(direct, abs=1e-9)
    assert placed.inverse_XX == pytest.approx(
        np.linalg.inv((away * weight[:, None]).T @ away + ridge * np.eye(5)), abs=1e-9
    )


def test_learning_one_by_one_is_learning_together():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(30, 3)), rng.normal(size=30)
    placed = unseen(np.zeros(3), 0.2)
    for row in range(30):
        placed.learn(x[row], y[row], 0.7)
    direct = np.linalg.solve(0.7 * x.T @ x + np.eye(3), 0.7 * x.T @ y)
    assert placed.weight_X == pytest.approx(direct, abs=1e-9)
    assert placed.mass == pytest.approx(1 + 30 * 0.7)


def test_errors_shrink_with_shots_and_grow_far_away():
    rng = np.random.default_rng(5)
    x = rng.normal(size=(400, 4))
    y = 0.1 * rng.normal(size=400)
    few, many = (place(x[:n], y[:n] - y[:n].mean(), np.ones(n)) for n in (20, 400))
    near, far = np.zeros((1, 4)), np.full((1, 4), 5.0)
    assert many.error(near) < few.error(near)
    assert few.error(far) > few.error(near)


def test_one_shot_is_enough_to_be_placed():
    placed = place(np.array([[0.2, 0.1]]), np.array([0.0]), np.array([0.5]))
    assert np.isfinite(placed.left(np.array([[0.0, 0.0]]))).all()
    assert placed.error(np.array([[0.2, 0.1]])).item() > 0.3


def test_what_a_new_model_costs_before_it_was_called():
    price, models = Price.of_dollars(0.5, 1.5), ("a", "b")
    by_tokens = first_ratio(price, {}, models, (1000.0, 200.0), usual=0.0004)
    assert by_tokens.value * 0.0004 == pytest.approx(1000 * 0.5e-6 + 200 * 1.5e-6)
    known = {"a": Price.of_dollars(0.1, 0.3), "b": Price.of_dollars(0.3, 0.9)}
    assert first_ratio(price, known, models, (NAN, NAN), usual=0.0004).value == pytest.approx(2.0 / 0.8)
    assert (
        first_ratio(price, {"a": known["a"]}, models, (NAN, NAN), usual=0.0004).value == 1
    )  # one price says nothing of the mean
    assert first_ratio(Price(), known, models, (NAN, NAN), usual=0.0004).value == 1


def test_paid_calls_move_the_ratio():
    ratio = Ratio(1.0, 1.0)
    for _ in range(99):
        ratio.learn(3.0, 1.0)
    assert ratio.value == pytest.approx(2.98)


# Properties


TABLES = st.tuples(st.integers(1, 12), st.integers(1, 4), st.integers(0, 2**32 - 1))


def drawn(shape, share_missing=0.3):
    rows, columns, seed = shape
    rng = np.random.default_rng(seed)
    value = rng.uniform(0, 2, size=(rows, columns)).round(2)
    value[rng.uniform(size=value.shape) < share_missing] = NAN
    return value, rng


@given(TABLES)
def test_what_a_scale_was_fitted_on_lies_between_0_and_1_and_comes_back(shape):
    cost, rng = drawn(shape)
    task = rng.integers(0, 3, len(cost))
    scale = CostScale.fit(cost, task, 3)
    scaled = scale.scale(cost, task)
    known = np.isfinite(cost)
    assert (np.isfinite(scaled) == known).all()
    assert (scaled[known] >= 0).all()
    assert (scaled[known] <= 1).all()
    assert scale.dollars(scaled, task)[known] == pytest.approx(cost[known])


@given(TABLES)
def test_every_query_with_edges_has_a_best_one(shape):
    value, _ = drawn(shape)
    label = best(value)
    assert (label.any(1) == np.isfinite(value).any(1)).all()
    assert not label[~np.isfinite(value)].any()


@given(TABLES, st.floats(0.05, 20), st.floats(-3, 3))
def test_centring_takes_out_what_all_edges_of_a_query_share(shape, kappa, shift):
    """Shifted edges and a guess shifted alike leave the same, and a level that is shifted."""
    value, rng = drawn(shape)
    seen, guess = np.isfinite(value).astype(float), rng.normal(size=len(value))
    excess = np.where(seen > 0, value, 0.0)
    before = centred(excess, seen, kappa, guess)
    after = centred((excess + shift) * seen, seen, kappa, guess + shift)
    assert after[2] == pytest.approx(before[2], abs=1e-8)
    assert after[0] == pytest.approx(before[0] + shift, abs=1e-8)
    assert ((before[3] > 0) == (seen > 0)).all()
    assert (before[3] < 1).all()


@given(st.integers(1, 60), st.integers(1, 5), st.floats(0, 0.99), st.integers(0, 1000))
def test_a_split_parts_no_group_and_leaves_something(count, num_tasks, share, seed):
    rng = np.random.default_rng(seed)
    group = rng.integers(0, count, count)
    held = hold_out(group, rng.integers(0, num_tasks, count), share, seed)
    assert not held.all()
    for number in np.unique(group):
        assert len(set(held[group == number].tolist())) == 1
