"""Scores on a scale that is said, from 0 to 1 otherwise: no odd score moves it."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import DataError, InputError
from anabranch.extras import is_installed
from anabranch.routers.contract.query import Query
from anabranch.routers.data import load_outcomes, pooled
from anabranch.routers.embed.hashed import Hashed
from anabranch.routers.ic_cache import Arm, ICCache
from anabranch.routers.ic_cache.features import NAMES, Pairs
from anabranch.routers.ic_cache.proxy import Logistic
from anabranch.routers.made_outcomes import made_outcomes, made_pool
from anabranch.routers.referee.evaluate import evaluate
from anabranch.routers.samples import drawn
from anabranch.routers.scale import Probe
from anabranch.routers.scale.steps import Steps
from anabranch.routers.score_scale import ScoreScale, range_of, unit_score
from anabranch.routers.strategies import make

DATA = made_outcomes(80, seed=1)
# What takes scores for shares of a scale; settings that make it quick.
LEARNERS = {
    "mlp": {"epochs": 2},
    "irt": {"epochs": 2},
    "automix": {},
    "encoder": {"epochs": 1, "dim": 8, "vocab_size": 64},
}
# The numbers of float32 next to 1 and, of their size, below 0; and what is more than rounding makes.
OVER, UNDER = float(np.nextafter(np.float32(1), np.float32(2))), -float(np.finfo(np.float32).eps)
BEYOND, BELOW = 1 + 2e-6, -2e-6
needs_torch = pytest.mark.skipif(not is_installed("torch"), reason="needs torch")
kinds = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=needs_torch if kind == "encoder" else ()) for kind in LEARNERS]
)


def fitted(kind, data, **fields):
    return make(kind, **LEARNERS[kind], **fields).fit(data, seed=3)


def with_score(score, row=5, column=1):
    odd_NM = DATA.score_NM.copy()
    odd_NM[row, column] = score
    return replace(DATA, score_NM=odd_NM)


def same(one, other):
    first, second = one.state()[0], other.state()[0]
    return all(np.array_equal(first[name], second[name], equal_nan=True) for name in first)


def same_arrays(one, other):
    if isinstance(one, dict):
        assert one.keys() == other.keys()
    for name in one if isinstance(one, dict) else (...,):
        np.testing.assert_allclose(one[name], other[name], rtol=1e-6, atol=1e-6)


def test_a_scale_by_hand():
    scale = ScoreScale.of((-10.0, 30.0))
    np.testing.assert_allclose(scale.shares(np.array([-10.0, 0.0, 30.0, np.nan])), [0, 0.25, 1, np.nan])
    np.testing.assert_allclose(scale.scores(np.array([0, 0.25, 1])), [-10, 0, 30])
    assert scale.is_beyond(np.array([-10.1, -10.0, 30.0, 30.1, np.nan])).tolist() == [True, False, False, True, False]
    for wrong in ((1.0, 0.0), (1.0, 1.0), (0.0, np.inf), (np.nan, 1.0), (0.0,)):
        with pytest.raises(InputError, match=r"scale is .* it must be the scores of the worst and the best answer"):
            ScoreScale.of(wrong)


@given(low=st.floats(-1e6, 1e6), width=st.floats(1e-3, 1e6), share=st.floats(0, 1))
def test_shares_and_scores_are_each_others_opposite(low, width, share):
    scale = ScoreScale.of((low, low + width))
    score = scale.scores(np.array([share]))
    assert not scale.is_beyond(score).any()
    np.testing.assert_allclose(scale.shares(score), share, atol=1e-6)


def test_the_range_that_there_can_be():
    assert range_of(np.array([[0.2, np.nan, 1.0]])) == (0.0, 1.0)
    assert range_of(np.array([[-10.0, np.nan, 30.0]])) == (-10.0, 30.0)
    # One that is rounded does not make another scale of it.
    assert range_of(np.array([[0.3, OVER, UNDER]])) == (0.0, 1.0)
    assert range_of(np.array([[0.3, BEYOND]])) == (0.3, BEYOND)


def test_a_scale_takes_what_rounding_makes_of_its_ends():
    """A mean of three, and the next numbers that float32 has; of a wider scale as much more."""
    for score, share in ((1 + 1e-12, 1.0), (OVER, 1.0), (UNDER, 0.0)):
        assert not ScoreScale().is_beyond(np.array([score])).any()
        assert ScoreScale().shares_of(with_score(score))[5, 1] == unit_score(score) == share
    wide = ScoreScale(-10.0, 30.0)
    assert not wide.is_beyond(-10 + 40 * np.array([UNDER, OVER])).any()
    assert wide.is_beyond(-10 + 40 * np.array([BELOW, BEYOND])).all()
    assert [unit_score(one) for one in (BELOW, BEYOND, np.nan, np.inf, 10**400)] == [None] * 5
    # What is right from 0.7 on is so where float32 has 0.7 a little below it.
    assert ScoreScale().are_right(np.array([np.float32(0.7), 0.7 - 1e-5, np.nan]), 0.7).tolist() == [True, False, False]


def _drawn(score):
    return drawn(with_score(score), DATA.models[1]).correct_Q


def _joined(score):
    learned = fitted("irt", DATA).predictor
    return learned.add_model("new", replace(with_score(score).only([DATA.models[1]]), models=("new",))).theta_MF


def _probe(score):
    texts = DATA.query[:20]
    labels = [score, *DATA.score_NM[1:20, 0]]
    return Probe.Config(embedder=Hashed.Config(dim=8)).build().fit(texts, labels).theta1_D


def _steps(score, tmp_path):
    (tmp_path / "steps.jsonl").write_text(json.dumps({"step": "a", "right1": score}))
    return Steps.read(tmp_path / "steps.jsonl").right1_N


def _proxy(score):
    pairs = Pairs(np.linspace(0, 1, 4 * len(NAMES)).reshape(4, -1), (("a", "b", "c"),) * 4)
    return Logistic(Logistic.Config()).fit(pairs, np.array([score, 0.0, 1.0, 0.5])).weight_F1


def _told(score):
    cache = ICCache(ICCache.Config(), arms=[Arm(name="s", cost=0.1), Arm(name="l", cost=1.0)], dim=8)
    id = cache.route(Query(text="a", vector_D=np.eye(8)[0])).id
    if not cache.feedback(id, score=score):
        raise DataError("ignored")
    return cache.router.critic.buffer.target_N[:1]


TAKERS = {
    "mlp": lambda score, _: fitted("mlp", with_score(score)).state()[0]["V_HD"],
    "irt": lambda score, _: fitted("irt", with_score(score)).state()[0]["theta_MF"],
    "automix": lambda score, _: fitted("automix", with_score(score)).prior_S,
    "ic_cache": lambda score, _: make("ic_cache").fit(with_score(score), seed=0).state()[0],
    "samples": lambda score, _: _drawn(score),
    "joining": lambda score, _: _joined(score),
    "probe": lambda score, _: _probe(score),
    "steps": lambda score, tmp_path: _steps(score, tmp_path),
    "steps of outcomes": lambda score, _: Steps.of_outcomes(with_score(score), *DATA.models[:2]).right2_N,
    "proxy": lambda score, _: _proxy(score),
    "feedback": lambda score, _: _told(score),
}


@pytest.mark.parametrize("taker", TAKERS)
def test_whatever_takes_scores_takes_rounded_ones_alike_and_none_beyond(taker, tmp_path):
    """As arrays of float32 give them: a score of 1.0000001 was refused by each, or by some."""
    take = TAKERS[taker]
    for rounded, exact in ((OVER, 1.0), (UNDER, 0.0)):
        same_arrays(take(rounded, tmp_path), take(exact, tmp_path))
    for odd in (BELOW, BEYOND):
        with pytest.raises((DataError, InputError)):
            take(odd, tmp_path)


def test_a_score_beyond_is_told_so_that_it_is_seen_to_be():
    """`1` must lie from 0 to 1 was said of one that is a little more."""
    for score, told in ((1.0000021, "1.0000021"), (-2e-6, "-2e-06"), (7.0, "7"), (1 + 2**-18, "1.000003814697265625")):
        with pytest.raises(DataError, match=rf"is {re.escape(told[:16])}\d*; scores must lie from 0 to 1:"):
            ScoreScale().check(with_score(score))
    with pytest.raises(DataError, match=r"is 123457\.25; scores must lie from 0 to 123456\.789:"):
        ScoreScale(0.0, 123456.789).check(with_score(123457.25))


@kinds
@pytest.mark.parametrize("odd", [-1.0, 100.0, 1.001])
def test_one_odd_score_is_refused_and_turns_no_other_over(kind, odd):
    """The scale went from the least score to the largest: one of 100 made every other answer of AutoMix wrong, one of -1 right."""
    with pytest.raises(DataError) as caught:
        fitted(kind, with_score(odd))
    assert str(caught.value) == (
        f"a score of {DATA.models[1]} for the question {DATA.query[5]!r} is {odd:g}; scores must lie from 0 to 1: mend it, or say "
        "the scale of all (scale, the worst and the best score)"
    )


@kinds
def test_scores_on_a_scale_that_is_said_teach_what_their_shares_do(kind):
    there = replace(DATA, score_NM=1 + 4 * DATA.score_NM)
    on_five, on_one = fitted(kind, there, scale=(1.0, 5.0)), fitted(kind, DATA)
    pool = made_pool(DATA.models)
    if kind == "automix":
        np.testing.assert_array_equal(on_five.prior_S, on_one.prior_S)
        np.testing.assert_allclose(on_five.quality_SK, 1 + 4 * on_one.quality_SK)
    else:
        one, other = on_one.predictor.predict(DATA).quality_NM, on_five.predictor.predict(DATA).quality_NM
        np.testing.assert_allclose(other, 1 + 4 * one)
    assert on_five.play(there, pool).model_N.shape == (80,)
    assert not same(on_five, fitted(kind, there, scale=(1.0, 12.0)))


@kinds
def test_a_scale_that_is_none_is_refused_when_it_is_made(kind):
    with pytest.raises(InputError, match="the lower one first"):
        make(kind, scale=(1.0, 0.0))


def test_a_model_that_joins_irt_has_scores_of_the_same_scale():
    learned = fitted("irt", DATA).predictor
    advice = r"bring all to that scale, or fit irt again with one that has it \(scale\)"
    with pytest.raises(DataError, match=rf"is 7; scores must lie from 0 to 1: {advice}"):
        learned.add_model("new", replace(with_score(7.0).only([DATA.models[1]]), models=("new",)))


def test_a_model_joins_an_irt_of_before_there_were_scales_whatever_its_scores():
    """Its span is of the scores it saw: a right answer beside ones of 0.9 was refused, with the advice to set what was not there."""

    def placed(score_NM):
        learned = fitted("irt", DATA).predictor
        learned.span_2 = np.array([0.2, 0.9])
        one = replace(DATA.only([DATA.models[1]]), models=("new",), score_NM=score_NM)
        return learned.add_model("new", one).theta_MF[-1]

    score_NM = np.random.default_rng(3).uniform(0, 1, (len(DATA), 1))
    np.testing.assert_array_equal(placed(score_NM), placed(np.clip(score_NM, 0.2, 0.9)))


def test_ic_cache_takes_no_score_for_another():
    """It clipped them: 7 of 10 was as good as could be, and so was 1 of 10."""
    with pytest.raises(DataError, match=r"is 7; scores must lie from 0 to 1: bring all to that scale"):
        make("ic_cache").fit(with_score(7.0), seed=0)


def test_an_evaluation_says_which_range_of_scores_it_takes():
    def sentences(data):
        report = evaluate({"knn": make("knn").fit(DATA)}, train=None, test=data, pool=made_pool(DATA.models), draws=20)
        return report.verdict, " ".join(report.verdict.sentences())

    verdict, told = sentences(DATA)
    assert verdict.score_range == (0.0, 1.0)
    assert "Scores are taken" not in told
    verdict, told = sentences(with_score(100.0))
    assert verdict.score_range == (0.0, 100.0)
    assert (
        f"Scores are taken to lie from 0 to 100, as those seen do; qualities within {verdict.margin:g} count as equal."
        in told
    )


def test_a_score_beyond_is_told_with_its_line_of_the_file_whatever_part_it_is_in(tmp_path):
    """Blank lines and the header count; of copies of a question it is where that stands first."""
    table = ["question,small", "", *(f"q {at}?,{9 if at == 11 else at % 2}" for at in range(12)), "q 3?,1"]
    (tmp_path / "a.csv").write_text("\n".join(table))
    rows = [json.dumps({"query": f"q {at}?", "scores": {"small": 9 if at == 11 else at % 2}}) for at in range(12)]
    (tmp_path / "a.jsonl").write_text("\n".join(["", *rows]))
    for name, line in (("a.csv", 14), ("a.jsonl", 13)):
        data = pooled(load_outcomes(tmp_path / name)).take([3, 11])
        assert data.line == (line - 8, line)
        with pytest.raises(
            DataError, match=rf"for the question 'q 11\?' \(line {line} of the file\) is 9; scores must lie"
        ):
            ScoreScale().shares_of(data)
