import json

import numpy as np
import pytest

from anabranch.errors import DataError
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.predictor import Ranked
from anabranch.routers.contract.strategy import Strategy, played
from anabranch.routers.data import load_outcomes, pool_of
from anabranch.routers.referee import replay
from made_outcomes import MODELS, SKILL, WordMeans, made_outcomes

POOL = pool_of(MODELS)


class Told(Strategy, kind=None):
    """Chooses as it was told."""

    def __init__(self, choice):
        super().__init__(self.Config())
        self.choice = np.array(choice)

    def play(self, data, pool):
        return played(data, self.choice)


def logged(chance_of, num=3000, seed=0):
    """Traffic of which each row was answered by one model, drawn by the chances of its topic."""
    data = made_outcomes(num, seed)
    generator = np.random.default_rng(seed + 1)
    chance_NM = np.array([chance_of[task] for task in data.task])
    chosen_N = np.array([generator.choice(3, p=chance) for chance in chance_NM])
    is_chosen = np.arange(3) == chosen_N[:, None]
    log = Recorded(
        query=data.query,
        models=MODELS,
        task=data.task,
        score_NM=np.where(is_chosen, data.score_NM, np.nan),
        cost_NM=np.where(is_chosen, data.cost_NM, np.nan),
        signals={"probability": np.where(is_chosen, chance_NM, np.nan)},
    )
    return data, log


def test_estimates_by_hand():
    nan = np.nan
    log = Recorded(
        query=("a", "b", "c", "d"),
        models=("m", "n"),
        score_NM=np.array([[1, nan], [nan, 0.5], [0, nan], [nan, 1.0]]),
        cost_NM=np.array([[1, nan], [nan, 2], [3, nan], [nan, 4.0]]),
        signals={"probability": np.array([[0.5, nan], [nan, 0.25], [0.2, nan], [nan, 1.0]])},
    )
    found = replay({"told": Told([0, 1, 1, 0])}, log, pool_of(("m", "n")))
    one = found.strategies[0]
    # rows a and b match, weighing 2 and 4
    assert (one.matched, one.score, one.cost) == (
        2,
        pytest.approx((2 * 1 + 4 * 0.5) / 6),
        pytest.approx((2 * 1 + 4 * 2) / 6),
    )
    assert one.effective == pytest.approx(36 / 20)
    assert (found.rows, found.score, found.cost) == (4, 0.625, 2.5)
    # row d was not drawn, and is nothing to gain on
    assert one.gain == pytest.approx(4 / 6 - 0.5)
    bare = Recorded(query=log.query, models=log.models, score_NM=log.score_NM)
    plain = replay({"told": Told([0, 1, 1, 0])}, bare, pool_of(("m", "n")))
    assert (plain.strategies[0].score, plain.strategies[0].cost, plain.has_probabilities) == (0.75, None, False)


def test_weights_undo_a_log_that_looked_at_the_query():
    skewed = {"maths": [0.8, 0.1, 0.1], "poetry": [0.1, 0.8, 0.1], "code": [0.1, 0.1, 0.8]}
    data, log = logged(skewed)
    choice = np.full(len(log), 2)
    truth = data.score_NM[:, 2].mean()
    weighed = replay({"large": Told(choice)}, log, POOL).strategies[0]
    bare = Recorded(query=log.query, models=MODELS, score_NM=log.score_NM)
    plain = replay({"large": Told(choice)}, bare, POOL).strategies[0]
    assert weighed.interval[0] < truth < weighed.interval[1]
    assert not plain.interval[0] < truth < plain.interval[1]  # mostly code, at which it is best
    assert weighed.effective < weighed.matched


def test_a_fitted_router_is_estimated_near_its_true_worth():
    data, log = logged({name: [1 / 3] * 3 for name in ("maths", "poetry", "code")}, seed=3)
    strategy = Ranked(Ranked.Config(predictor=WordMeans.Config())).fit(made_outcomes(400, 9))
    truth = strategy.play(data, POOL).quality_N.mean()
    one = replay({"word_means": strategy}, log, POOL).strategies[0]
    assert one.score == pytest.approx(truth, abs=0.05)
    assert one.interval[0] < truth < one.interval[1]
    assert one.gain_interval[0] > 0
    assert one.score == pytest.approx(SKILL.max(1).mean(), abs=0.06)


def test_what_never_matches_has_no_estimate():
    _, log = logged({name: [1, 0, 0] for name in ("maths", "poetry", "code")}, num=20)
    one = replay({"large": Told(np.full(20, 2))}, log, POOL).strategies[0]
    assert (one.matched, one.score, one.interval, one.gain) == (0, None, None, None)


def test_rows_without_a_score_are_left_out_and_logs_without_any_refused():
    _, log = logged({name: [1 / 3] * 3 for name in ("maths", "poetry", "code")}, num=30)
    score_NM = log.score_NM.copy()
    score_NM[:10] = np.nan
    part = Recorded(query=log.query, models=MODELS, score_NM=score_NM)
    assert replay({"large": Told(np.full(20, 2))}, part, POOL).rows == 20
    with pytest.raises(DataError, match="no scored answer"):
        replay({}, Recorded(query=("q",), models=MODELS, score_NM=np.full((1, 3), np.nan)), POOL)


@pytest.mark.parametrize("chance", [0.0, -0.5, 1.5])
def test_chances_that_cannot_be_are_named(chance):
    _, log = logged({name: [1 / 3] * 3 for name in ("maths", "poetry", "code")}, num=5)
    log.signals["probability"][3, np.isfinite(log.score_NM[3])] = chance
    with pytest.raises(DataError, match="row 4 of the log has no probability"):
        replay({"large": Told(np.full(5, 2))}, log, POOL)


def test_probabilities_are_read_from_a_file(tmp_path):
    row = {"query": "q", "scores": {"m": 1}, "probability": {"m": 0.25}}
    (tmp_path / "log.jsonl").write_text(json.dumps(row) + "\n")
    np.testing.assert_array_equal(load_outcomes(tmp_path / "log.jsonl").signals["probability"], [[0.25]])


def test_a_log_with_one_chance_missing_is_read_without_that_row():
    _, log = logged({name: [1 / 3] * 3 for name in ("maths", "poetry", "code")}, num=50)
    log.signals["probability"][3] = np.nan
    whole = replay({"large": Told(np.full(50, 2))}, log, POOL)
    assert (whole.drawn, whole.rows) == (49, 50)


def test_the_three_estimates_by_hand():
    nan = np.nan
    log = Recorded(
        query=("a", "b", "c", "d"),
        models=("m", "n"),
        score_NM=np.array([[1, nan], [nan, 0.5], [0, nan], [nan, 1.0]]),
        signals={"probability": np.array([[0.5, nan], [nan, 0.25], [0.2, nan], [nan, 0.5]])},
    )
    one = replay({"told": Told([0, 1, 1, 0])}, log, pool_of(("m", "n")), seed=0).strategies[0]
    # Rows a and b match, weighing 2 and 4; four rows were drawn. Each row is expected from the other three.
    assert one.ips == pytest.approx((2 * 1 + 4 * 0.5) / 4)
    assert one.support == pytest.approx(6 / 4)
    expected = [0.0, 1.0, (0.5 + 1.0) / 2, 0.5]
    corrected = [0.0 + 2 * (1 - 0.0), 1.0 + 4 * (0.5 - 1.0), expected[2], expected[3]]
    assert one.doubly_robust == pytest.approx(np.mean(corrected))


def test_traffic_that_was_not_drawn_is_no_evidence_beside_traffic_that_was():
    """Half the log is a rule's, which sends each query where it does best; alone, random choices say what a model is worth."""
    data, log = logged({name: [1 / 3] * 3 for name in ("maths", "poetry", "code")}, num=3000)
    best_N = data.score_NM.argmax(1)
    ruled_N = np.arange(3000) % 2 == 0
    is_best = np.arange(3) == best_N[:, None]
    score_NM = np.where(ruled_N[:, None], np.where(is_best, data.score_NM, np.nan), log.score_NM)
    chance_NM = np.where(ruled_N[:, None], np.where(is_best, 1.0, np.nan), log.signals["probability"])
    mixed = type(log)(
        query=log.query, models=log.models, task=log.task, score_NM=score_NM, signals={"probability": chance_NM}
    )
    one = replay({"large": Told(np.full(3000, 2))}, mixed, POOL).strategies[0]
    truth = data.score_NM[:, 2].mean()
    assert one.interval[0] < truth < one.interval[1]
    assert one.doubly_robust_interval[0] < truth < one.doubly_robust_interval[1]


def test_what_the_log_never_tries_is_told_by_its_support():
    _, log = logged({"maths": [0.5, 0.5, 0], "poetry": [0.5, 0.5, 0], "code": [0.25, 0.25, 0.5]}, num=2000)
    one = replay({"large": Told(np.full(2000, 2))}, log, POOL).strategies[0]
    assert one.support == pytest.approx(1 / 3, abs=0.08)
    assert one.support_interval[0] < 1 / 3 < one.support_interval[1] < 0.5
    others = log.take(np.flatnonzero(np.isnan(log.score_NM[:, 2])))
    never = replay({"large": Told(np.full(len(others), 2))}, others, POOL).strategies[0]
    assert (never.score, never.support_interval) == (None, [0.0, 0.0])


def drawn_log(value_KM, copies, seed):
    """Each question asked ``copies`` times, answered by one of the models, which a lot by its text draws: copies meet the same one."""
    generator = np.random.default_rng(seed)
    num, models = value_KM.shape
    model_N = np.repeat(generator.integers(0, models, num), copies)
    question_N = np.repeat(np.arange(num), copies)
    is_asked_NM = np.arange(models) == model_N[:, None]
    return Recorded(
        query=tuple(f"question {at}" for at in question_N),
        models=tuple("abc"[:models]),
        score_NM=np.where(is_asked_NM, value_KM[question_N], np.nan),
        signals={"probability": np.where(is_asked_NM, 1 / models, np.nan)},
    )


@pytest.mark.parametrize(("questions", "copies"), [(40, 25), (60, 1), (30, 7)])
def test_intervals_cover_the_truth_however_often_a_question_was_asked(questions, copies):
    """Drawn row by row, they covered it in 42% of runs where 40 questions were asked 25 times."""
    runs, inside = 60, np.zeros(3)
    for run in range(runs):
        value_KM = np.random.default_rng(run).random((questions, 2))
        log = drawn_log(value_KM, copies, 1000 + run)
        one = replay({"a": Told(np.zeros(len(log), int))}, log, pool_of(("a", "b")), draws=200).strategies[0]
        truth, logged = value_KM[:, 0].mean(), np.nanmean(log.score_NM)
        spans = (one.interval, one.doubly_robust_interval, one.gain_interval)
        inside += [
            low <= value <= high for (low, high), value in zip(spans, (truth, truth, truth - logged), strict=True)
        ]
    assert (inside / runs >= 0.85).all()


@pytest.mark.parametrize("seed", range(5))
def test_identical_models_gain_nothing_whatever_else_is_in_the_log(seed):
    """Named requests were easier, or harder: what they scored says nothing of a gain on those that were drawn."""
    generator = np.random.default_rng(seed)
    value_K = generator.random(200)
    log = drawn_log(np.column_stack([value_K, value_K]), 1, seed)
    named = Recorded(
        query=tuple(f"named {at}" for at in range(200)),
        models=("a", "b"),
        score_NM=np.column_stack([np.full(200, float(seed % 2)), np.full(200, np.nan)]),
    )
    both = Recorded(
        query=log.query + named.query,
        models=("a", "b"),
        score_NM=np.concatenate([log.score_NM, named.score_NM]),
        signals={"probability": np.concatenate([log.signals["probability"], np.full((200, 2), np.nan)])},
    )
    for model in (0, 1):
        one = replay({"m": Told(np.full(400, model))}, both, pool_of(("a", "b"))).strategies[0]
        low, high = one.gain_interval
        assert low < one.gain < high
        assert abs(one.gain) < 0.15
        assert low - 0.05 < 0 < high + 0.05, one


def test_a_copy_is_not_expected_from_itself():
    """Ten copies of each question: the regression may learn from none of them what the others scored."""
    value_KM = np.random.default_rng(0).random((12, 2))
    log = drawn_log(value_KM, 10, 0)
    alone = replay({"a": Told(np.zeros(12, int))}, log.take(np.arange(0, 120, 10)), pool_of(("a", "b"))).strategies[0]
    copied = replay({"a": Told(np.zeros(120, int))}, log, pool_of(("a", "b"))).strategies[0]
    assert copied.doubly_robust == pytest.approx(alone.doubly_robust)
    assert copied.doubly_robust_interval == pytest.approx(alone.doubly_robust_interval)
