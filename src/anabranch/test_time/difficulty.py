"""A prior for one question: the curve of its task, moved by what somebody predicts of the question, as far as that was seen to hold.

With M and f_max of the task's curve (what one sample solves, and its ceiling) and x by which the prediction moves the question's logit:

    logit mu = logit M + x                              chance mu that one sample is right
    f = mu + (1 - mu) g                                 ceiling: chance that the question can be solved at all
    logit g = logit g0 + level + slope x                g0 = (f_max - M) / (1 - M): of what one sample leaves, what more can solve
    p = 0 with chance 1 - f, else p ~ Beta(m s, (1 - m) s)          m = mu / f

Whoever predicts (an encoder of the question's text) knows more or less: s says how well, and level and slope say of what it tells, of
questions that are harder, or of those that cannot be solved. After n failures the next sample's chance falls by Bayes' rule: the surer the
prediction and the higher the ceiling, the slower. All three are learned from questions with several samples, whose likelihood is the same
whatever ended them, so that it does not matter whether they were drawn until one was right (`likeliest_shape`). A question of which nothing
is predicted (x = 0), before anything is learned (level = slope = 0, s = a + b of the task), has the curve of its task.
"""
# Shapes: Q questions, G parameters that are looked at

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from anabranch.bounds import finite
from anabranch.test_time.curves import MOST_SHAPE, BetaTTSPM
from anabranch.test_time.figures import LEAST as ROUNDING
from anabranch.test_time.figures import count, numbers, refuse, share, sigmoid
from anabranch.test_time.likeliest import likeliest

__all__ = ["ROUNDING", "TASK", "Shape", "likeliest_shape", "moved", "odds_left", "williams_weights"]

# Whoever only says that a question is surely solved, or surely not, is believed up to here; and no task tells that of what one sample
# leaves none more can be solved, or all. What was counted is held off 0 and 1 by `ROUNDING` alone: a model may well solve one sample in a
# million.
EDGE = 1e-3
LARGEST_SHIFT = 1e6
# Where s is looked for: below, a question is all right or all wrong; above, the prediction is as good as exact.
LEAST, MOST = 1e-2, 1e4
# Questions that three numbers are learned from: more would take time, and tell no more.
MOST_QUESTIONS = 1000

_BOUND_32 = np.array([[math.log(LEAST), math.log(MOST)], [-8.0, 8.0], [0.0, 4.0]])
_STARTS = np.stack(
    np.meshgrid(np.log([0.1, 0.6, 3.0, 15.0, 100.0, 1e3]), [-5.0, -1.5, 0.0, 1.5, 5.0], [0.0, 1.0, 2.0], indexing="ij"),
    -1,
).reshape(-1, 3)
_log_gamma = np.frompyfunc(math.lgamma, 1, 1)


@dataclass(frozen=True)
class Shape:
    """Of the priors of all questions of a model; see the module.

    Attributes:
        total: s, as how many samples a prediction counts on a question that can be solved; None for a + b of the task's curve.
        level, slope: of the odds that what one sample leaves can be solved.
    """

    total: float | None = None
    level: float = 0.0
    slope: float = 0.0

    def correlation(self, mean_Q: Any, odds_Q: Any, shift_Q: Any) -> np.ndarray:
        """How much samples of one question go together beyond what is predicted of it; float64 ``[Q]``. Arguments as `likeliest_shape`.

        (E p^2 - mu^2) / (mu (1 - mu)) = (m (1 - g) s + 1) / (s + 1), which is 1 / (s + 1) without a ceiling; 1 for s of the task.
        """
        if self.total is None:
            return np.ones(np.shape(mean_Q))
        mean_Q = np.asarray(mean_Q, np.float64)
        left_Q, ceiling_Q = _ceiling(mean_Q, 1 - mean_Q, odds_Q + self.level + self.slope * shift_Q)
        return (mean_Q / ceiling_Q * (1 - left_Q) * self.total + 1) / (self.total + 1)


# Before anything is learned.
TASK = Shape()


def logit(chance: Any, edge: Any = EDGE) -> np.ndarray:
    """ln p / (1 - p), of chances that are held off 0 and 1: by `EDGE` what somebody says, by `ROUNDING` what was counted."""
    held = np.clip(chance, edge, 1 - edge)
    return np.log(held) - np.log1p(-held)


def odds_left(curve: BetaTTSPM) -> float:
    """logit g0: ln of the odds that a question that one sample leaves unsolved can be solved, by the curve of its task."""
    solved = float(curve.value(1))
    left = max(float(curve.unsolved(1)), np.finfo(float).tiny)
    # Of a model that solves hardly any, more samples need not solve a thousandth of the others: as many as the first did will do.
    least = float(np.clip(solved, ROUNDING, EDGE))
    share_left = float(np.clip(max(0.0, float(curve.f_max) - solved) / left, least, 1 - EDGE))
    return float(logit(share_left, ROUNDING))


def moved(curve: BetaTTSPM, shift: float, shape: Shape = TASK) -> BetaTTSPM:
    """The curve of a question whose logit is predicted to be ``shift`` above that of its task. Raises InputError."""
    shift = finite("shift", shift, -LARGEST_SHIFT, LARGEST_SHIFT)
    solved, unsolved = (max(float(of(1)), np.finfo(float).tiny) for of in (curve.value, curve.unsolved))
    own_logit = float(np.clip(math.log(solved) - math.log(unsolved) + shift, *logit([0.0, 1.0], ROUNDING)))
    # Both from the logit: of a chance near 1 a difference would leave no digit of what is left.
    mean, rest = float(sigmoid(own_logit)), float(sigmoid(-own_logit))
    left, ceiling = _ceiling(mean, rest, odds_left(curve) + shape.level + shape.slope * shift)
    total = min(float(curve.a + curve.b), MOST_SHAPE) if shape.total is None else shape.total
    return BetaTTSPM(min(1.0, float(ceiling)), mean / ceiling * total, rest * float(left) / ceiling * total, curve.kind)


def williams_weights(samples_Q: Any, rho: Any) -> np.ndarray:
    """What a question's share of right samples weighs in a regression: n / (1 + (n - 1) rho); float64 ``[Q]``.

    Williams 1982, "Extra-binomial variation in logistic linear models": many samples of one question are not as many questions.

    Args:
        samples_Q: n.
        rho: how much samples of one question go together, above 0 and at most 1; of all, or of each.

    Raises InputError.
    """
    n_Q, rho = count("samples_Q", samples_Q, 1), share("rho", rho)
    return n_Q / (1 + (n_Q - 1) * rho)


def likeliest_shape(
    mean_Q: Any, odds_Q: Any, shift_Q: Any, correct_Q: Any, samples_Q: Any, *, seed: int = 0
) -> Shape | None:
    """What makes outcomes likeliest, k right of m samples; None where no question has two, which tells nothing of it.

        P(k) = (1 - f) [k = 0] + f B(m s + k, (1 - m) s + n - k) / B(m s, (1 - m) s)        of n samples in their order

    Args:
        mean_Q: mu, that was predicted without these outcomes, between 0 and 1.
        odds_Q: logit g0 of the tasks' curves (`odds_left`).
        shift_Q: x.
        correct_Q, samples_Q: k and n. Of questions that were drawn for until one was right, those as well.
        seed: of those that are left out, where there are more than `MOST_QUESTIONS`.

    Raises InputError.
    """
    mean_Q, odds_Q, shift_Q, k_Q, n_Q = np.broadcast_arrays(
        share("mean_Q", mean_Q),
        numbers("odds_Q", odds_Q),
        numbers("shift_Q", shift_Q),
        count("correct_Q", correct_Q),
        count("samples_Q", samples_Q, 1),
    )
    refuse("mean_Q", mean_Q, mean_Q == 1, "above 0 and below 1")
    refuse("correct_Q", k_Q, k_Q > n_Q, "at most the number of samples")
    for name, array in (("odds_Q", odds_Q), ("shift_Q", shift_Q)):
        refuse(name, array, ~np.isfinite(array), "a finite number")
    told = np.flatnonzero(n_Q > 1)
    if not len(told):
        return None
    if len(told) > MOST_QUESTIONS:
        told = np.sort(np.random.default_rng(seed).choice(told, MOST_QUESTIONS, replace=False))
    row_5Q = np.stack([np.clip(mean_Q, ROUNDING, 1 - ROUNDING), odds_Q, shift_Q, k_Q, n_Q])[:, told]
    found = likeliest(
        lambda theta_G3: _likelihood(theta_G3, row_5Q),
        _STARTS,
        _BOUND_32,
        step_3=np.array([0.5, 0.5, 0.25]),
        least=0.02,
    )
    return Shape(math.exp(found[0]), float(found[1]), float(found[2]))


def _likelihood(theta_G3: np.ndarray, row_5Q: np.ndarray) -> np.ndarray:
    """ln P of all outcomes, float64 ``[G]``, by ln s, level and slope."""
    mean_Q, odds_Q, shift_Q, k_Q, n_Q = row_5Q
    log_total, level, slope = (of[:, None] for of in theta_G3.T)
    total, odds = np.exp(log_total), odds_Q + level + slope * shift_Q
    left, ceiling = _ceiling(mean_Q, 1 - mean_Q, odds)
    a, b = mean_Q / ceiling * total, (1 - mean_Q) * left / ceiling * total
    solvable = np.log(ceiling) + sum(
        sign * _log_gamma(x).astype(float)
        for x, sign in ((a + k_Q, 1), (b + n_Q - k_Q, 1), (total, 1), (a, -1), (b, -1), (total + n_Q, -1))
    )
    # ln (1 - f) = ln (1 - mu) (1 - g)
    hopeless = np.where(k_Q > 0, -np.inf, np.log1p(-mean_Q) + np.log1p(-left))
    return np.logaddexp(solvable, hopeless).sum(axis=1)


def _ceiling(mean: Any, rest: Any, odds: Any) -> tuple[Any, Any]:
    """g and f, of mu and 1 - mu; odds of g are held where all chances are above 0 still, and no larger than a hopeless task's may be."""
    left = sigmoid(np.clip(odds, logit(0.0, ROUNDING), 12.0))
    return left, mean + rest * left
