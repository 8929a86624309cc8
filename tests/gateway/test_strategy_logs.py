"""Logs in which each query was answered by one model: what learns from them, and what says that it cannot."""

from dataclasses import replace

import numpy as np
import pytest

from anabranch.errors import DataError
from anabranch.routers import strategies
from anabranch.routers.made_outcomes import made_outcomes, made_pool


def one_answer_each(data, seed=0):
    known_NM = (
        np.arange(len(data.models)) == np.random.default_rng(seed).integers(0, len(data.models), len(data))[:, None]
    )
    part = {name: np.where(known_NM, getattr(data, name), np.nan) for name in ("score_NM", "cost_NM", "latency_NM")}
    return replace(
        data,
        **part,
        tokens_NM2=np.where(known_NM[..., None], data.tokens_NM2, np.nan),
        answers=tuple(
            {name: text for name, text in answers.items() if known_NM[row, data.models.index(name)]}
            for row, answers in enumerate(data.answers)
        ),
        signals={name: np.where(known_NM, value_NM, np.nan) for name, value_NM in data.signals.items()},
    )


LOG, TEST = one_answer_each(made_outcomes(300)), made_outcomes(300, seed=5)
ALONE = TEST.score_NM.mean(0).max()


@pytest.mark.parametrize("kind", ["knn", "cluster", "ridge", "irt", "linucb", "thompson", "eps_greedy"])
def test_it_learns_from_one_answer_per_query(kind):
    learned = strategies.make(kind).fit(LOG)
    assert learned.play(TEST, made_pool()).quality_N.mean() > ALONE + 0.08


@pytest.mark.parametrize("kind", ["mf", "sw_elo", "hybrid", "cascade", "consistency", "logprob"])
def test_what_compares_models_says_what_is_missing(kind):
    """Cascades and hybrid took such a log without a word, and then chose one model always."""
    with pytest.raises(DataError, match="compares models; no query has scores of two") as error:
        strategies.make(kind).fit(LOG)
    assert "anabranch gateway collect" in str(error.value)
    # One pair among many is no comparison either.
    score_NM = LOG.score_NM.copy()
    score_NM[7] = (0.0, 1.0, 0.0, np.nan)
    with pytest.raises(DataError, match="only 1 of 300 queries have scores of two, and 10 must"):
        strategies.make(kind).fit(replace(LOG, score_NM=score_NM))
    strategies.make(kind).fit(made_outcomes(60))
