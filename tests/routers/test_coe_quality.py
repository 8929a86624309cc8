import math

import numpy as np
import pytest

from anabranch.errors import InputError
from anabranch.routers.coe import CategoryRouter, Judgement, QualityTable
from anabranch.routers.coe.expert_map import solve_map
from anabranch.routers.coe.quality import (
    confusion_aware,
    table_of_feedback,
    table_of_judgements,
    table_of_scores,
)

NAN = math.nan


def test_scores_by_hand():
    table = table_of_scores(
        ["m", "m", "m", "c"], np.array([[1.0, 0.0], [0.0, NAN], [0.5, 1.0], [1.0, 0.25]]), ["a", "b"]
    )
    assert table.categories == ("c", "m")
    np.testing.assert_allclose(table.quality_CE, [[1.0, 0.25], [0.5, 0.5]])
    np.testing.assert_allclose(table.count_CE, [[1, 1], [3, 2]])
    np.testing.assert_allclose(table.variance_CE, [[0, 0], [0.25, 0.5]])  # (0.25 + 0.25 + 0) / 2; (0.25 + 0.25) / 1
    np.testing.assert_allclose(table.share_C, [0.25, 0.75])
    np.testing.assert_allclose(table.mean_E, [2.5 / 4, 1.25 / 3])


def test_shrinkage_by_hand():
    """m = 2 toward the means 2.5 / 4 and 1.25 / 3."""
    table = table_of_scores(
        ["m", "m", "m", "c"], np.array([[1.0, 0.0], [0.0, NAN], [0.5, 1.0], [1.0, 0.25]]), ["a", "b"]
    )
    drawn = table.shrunk(2).quality_CE
    np.testing.assert_allclose(drawn[0], [(1 + 2 * 0.625) / 3, (0.25 + 2 * 1.25 / 3) / 3])
    np.testing.assert_allclose(drawn[1], [(1.5 + 2 * 0.625) / 5, (1 + 2 * 1.25 / 3) / 4])
    np.testing.assert_allclose(table.shrunk(0).quality_CE, table.quality_CE)
    np.testing.assert_allclose(table.shrunk(np.inf).quality_CE, np.tile(table.mean_E, (2, 1)))


def test_unseen_cells_stay_unknown_and_empty_rows_can_be_filled():
    table = table_of_scores(["m"], np.array([[1.0, NAN]]), ["a", "b"], categories=["m", "empty"])
    assert np.isnan(table.shrunk(20).quality_CE).tolist() == [[False, True], [True, True]]
    filled = table.shrunk(20, fill=True).quality_CE
    assert filled[1, 0] == 1.0
    assert np.isnan(filled[:, 1]).all()  # b was never seen


def judged(question, first, won, expert="a", category="m"):
    return Judgement(question=question, category=category, expert=expert, won=won, expert_first=first)


def test_win_rates_count_ties_half_and_both_orders():
    table = table_of_judgements(
        [
            judged("1", True, "yes"),
            judged("1", False, "yes"),  # 1
            judged("2", True, "yes"),
            judged("2", False, "no"),  # 0.5: the judge favoured the first
            judged("3", True, "tie"),
            judged("3", False, "no"),  # 0.25
            judged("4", True, "yes"),  # one order only: left out
            judged("1", True, "no", "b"),
            judged("1", False, "no", "b"),
        ]
    )
    assert table.quality_CE[0].tolist() == [pytest.approx(1.75 / 3), 0.0]
    assert table.count_CE[0].tolist() == [3, 1]
    every = table_of_judgements([judged("1", True, "tie"), judged("4", True, "yes")], one_order=True)
    assert every.quality_CE[0, 0] == 0.75


def test_judgements_that_may_not_be():
    with pytest.raises(InputError, match="question '1' and expert 'a' are judged twice in the same order"):
        table_of_judgements([judged("1", True, "yes"), judged("1", True, "no")])
    with pytest.raises(InputError, match="no pair was judged in both orders"):
        table_of_judgements([judged("1", True, "yes")])


def test_feedback_adds_to_scores():
    scores = table_of_scores(["m", "m"], np.array([[1.0, 0.0], [0.0, 0.5]]), ["a", "b"])
    heard = table_of_feedback([("m", "a", 1.0), ("m", "a", 0.5), ("new", "c", 0.3)])
    both = scores.merged(heard)
    assert (both.categories, both.experts) == (("m", "new"), ("a", "b", "c"))
    together = np.array([1.0, 0.0, 1.0, 0.5])
    assert both.quality_CE[0, 0] == pytest.approx(together.mean())
    assert both.variance_CE[0, 0] == pytest.approx(together.var(ddof=1))
    assert both.count_CE[0].tolist() == [4, 2, 0]
    assert both.quality_CE[1, 2] == pytest.approx(0.3)
    assert np.isnan(both.quality_CE[1, 0])
    with pytest.raises(InputError, match=r"the score of 'a' in 'm'.*nan"):
        table_of_feedback([("m", "a", NAN)])
    with pytest.raises(InputError, match="no feedback"):
        table_of_feedback([])


def test_merging_equals_counting_at_once():
    generator = np.random.default_rng(0)
    score_NE = np.where(generator.random((60, 3)) < 0.2, np.nan, generator.random((60, 3)))
    names = [f"c{at}" for at in generator.integers(0, 4, 60)]
    whole = table_of_scores(names, score_NE, "xyz")
    parts = table_of_scores(names[:25], score_NE[:25], "xyz").merged(table_of_scores(names[25:], score_NE[25:], "xyz"))
    parts_rows = [parts.row(name) for name in whole.categories]
    for name in ("quality_CE", "count_CE", "variance_CE"):
        np.testing.assert_allclose(getattr(parts, name)[parts_rows], getattr(whole, name), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(parts.mean_E, whole.mean_E)


# Incumbents


def of_counts(count, quality, variance=0.25):
    shape = np.array(quality, float)[None].shape
    return QualityTable(
        categories=("m",),
        experts=("old", "new"),
        quality_CE=np.array([quality], float),
        count_CE=np.full(shape, float(count)),
        variance_CE=np.full(shape, variance),
        share_C=np.ones(1),
        mean_E=np.array(quality, float),
    )


def test_gain_by_hand():
    """Every spread is 0.25, so the pooled one is too: 1.6449 * sqrt(2 * 0.25 / 100) around 0.1."""
    low, high = of_counts(100, [0.5, 0.6]).gain("m", "new", "old", confidence=0.9)
    assert (low, high) == (pytest.approx(0.1 - 0.116309, abs=1e-5), pytest.approx(0.1 + 0.116309, abs=1e-5))
    assert of_counts(0, [0.5, 0.6]).gain("m", "new", "old") == (-np.inf, np.inf)


def test_lucky_streak_is_no_certainty():
    """Three right answers of three have no spread of their own; the table's counts for it."""
    table = table_of_scores(
        ["m"] * 3 + ["x"] * 40,
        np.concatenate((np.array([[0.0, 1.0], [1.0, 1.0], [1.0, 1.0]]), np.tile([[0.0, 1.0], [1.0, 0.0]], (20, 1)))),
        ["old", "new"],
    )
    assert table.variance_CE[0, 1] == 0
    assert table.gain("m", "new", "old")[1] > 2 / 3  # and the interval is no shorter upward
    assert table.gain("m", "new", "old")[0] < 0


@pytest.mark.parametrize(("count", "keeps"), [(100, "old"), (200, "new")])
def test_incumbents_give_way_to_sure_gains_only(count, keeps):
    """The interval of 0.1 ends at 0.1 - 0.082 with 200 answers each, below 0 with 100."""
    table = of_counts(count, [0.5, 0.6])
    steady = table.steady({"m": "old"}, table)
    assert solve_map(steady, {})["m"] == keeps
    assert solve_map(steady, {"old": 70, "new": 7})["m"] == keeps  # size settles ties only
    free = table.steady({"gone": "old", "m": "nobody"}, table)  # categories and experts that are no more
    assert solve_map(free, {})["m"] == "new"


def test_incumbents_give_way_to_budgets():
    from anabranch.routers.coe import Limits

    table = of_counts(10, [0.5, 0.6])
    found = solve_map(table.steady({"m": "old"}, table), {"old": 70, "new": 7}, limits=Limits(budget=10))
    assert found["m"] == "new"


# By predicted category


def test_confusion_aware_table_counts_by_what_rows_are_taken_for():
    """Two clouds; a fifth of the labels are swapped, so rows are taken for the cloud they lie in."""
    generator = np.random.default_rng(0)
    side_N = np.arange(60) % 2
    vector_ND = np.eye(2)[side_N] + generator.normal(0, 0.05, (60, 2))
    vector_ND = (vector_ND / np.linalg.norm(vector_ND, axis=1, keepdims=True)).astype(np.float32)
    label = [("left", "right")[side if row % 5 else 1 - side] for row, side in enumerate(side_N)]
    score_NE = np.stack((side_N, 1 - side_N), axis=1).astype(float)  # expert 0 is right on the right side
    router = CategoryRouter(head="knn", k=9).fit(vector_ND, label)
    aware = confusion_aware(router, score_NE, ["r", "l"])
    np.testing.assert_allclose(aware.quality_CE, [[0, 1], [1, 0]])
    plain = table_of_scores(label, score_NE, ["r", "l"])
    np.testing.assert_allclose(plain.quality_CE, [[0.2, 0.8], [0.8, 0.2]])


# Bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QualityTable.of({"m": {"a": 1.0}}, share={"m": -1.0}), "finite weight of at least 0; 'm' has -1.0"),
        (lambda: QualityTable.of({"m": {"a": 1.0}}, share={"m": 0.0}), "all weights of categories are 0"),
        (
            lambda: QualityTable.of({"m": {"a": 1.0}}, share={"law": 1.0}),
            "no category 'law' in the quality table; it has m",
        ),
        (lambda: QualityTable.of({"m": {"a": math.inf}}), "must be finite"),
        (lambda: QualityTable.of({}), "at least one category"),
        (lambda: table_of_scores(["m"], np.ones((1, 1)), ["a"], categories=["x"]), "no category 'm'"),
        (lambda: table_of_scores(["m"], np.ones((1, 2)), ["a"]), r"score_NE has shape \[1, 2\]; it must be \[1, 1\]"),
        (lambda: QualityTable.of({"m": {"a": 1.0}}).only(["b"]), "no expert 'b'"),
        (lambda: QualityTable.of({"m": {"a": 1.0}}).shrunk(-1), "m is -1"),
    ],
)
def test_tables_that_may_not_be(make, message):
    with pytest.raises(InputError, match=message):
        make()
