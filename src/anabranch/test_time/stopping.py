"""When to stop asking: the vote that is decided, and what each rule would have spent and earned on recorded answers.

Adaptive consistency is Aggarwal et al. 2023 (arXiv 2305.11860): stop when, by a Beta posterior of the two commonest answers, the first is
the likelier one with probability of at least 0.95. A rule never looks at more samples than were recorded.
"""
# Shapes: Q questions, M samples of each

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anabranch.bounds import finite, whole
from anabranch.errors import InputError
from anabranch.test_time.curves import Curve
from anabranch.test_time.figures import count, given_back, positive, refuse, share
from anabranch.test_time.hits import hit_curve, outcomes_of

SURE = 0.95


def vote_probability(first: int, second: int) -> float:
    """Chance that the answer with ``first`` votes is the likelier of two, where the other has ``second``, under a Beta(1, 1) prior.

    P(p > 1/2) with p ~ Beta(first + 1, second + 1), which is P(Binomial(first + second + 1, 1/2) > second). Raises InputError.
    """
    first, second = whole("first", first, 0), whole("second", second, 0)
    if second > first:
        return 1.0 - vote_probability(second, first)
    total = first + second + 1
    # From the largest term down, each from the one before: nothing over- or underflows, and what is too small to count ends it.
    term = math.exp(
        math.lgamma(total + 1) - math.lgamma(second + 1) - math.lgamma(total - second + 1) - total * math.log(2)
    )
    tail, at = 0.0, second
    while at >= 0 and term > tail * 1e-18:
        tail += term
        term *= at / (total - at + 1)
        at -= 1
    return max(0.0, 1.0 - tail)


def is_decided(votes: Sequence[int], confidence: float = SURE) -> bool:
    """Whether more samples would hardly change the commonest answer. No votes decide nothing.

    Args:
        votes: how often each answer came.
        confidence: see `vote_probability`.
    """
    ranked = sorted(votes, reverse=True)[:2]
    if not ranked or ranked[0] == 0:
        return False
    return vote_probability(ranked[0], ranked[1] if len(ranked) > 1 else 0) >= confidence


def effective_samples(n: Any, rho: Any) -> Any:
    """How many independent samples ``n`` of one question are worth: n / (1 + (n - 1) rho).

    Args:
        n: samples.
        rho: how much they go together, from 0 to 1; `BetaTTSPM.rho` is one estimate.
    """
    n = count("n", n)
    rho = np.asarray(rho, float)
    refuse("rho", rho, ~((rho >= 0) & (rho <= 1)), "from 0 to 1")
    return given_back(np.where(n == 0, 0.0, n / (1 + np.maximum(n - 1, 0) * rho)))


def verified_accuracy(p: Any, false_accepts: Any, n: Any) -> Any:
    """Share of questions whose first accepted sample of ``n`` is right, where a verifier lets wrong ones pass.

    In the limit p / (p + f (1 - p)): what a verifier is worth, which no number of samples mends.

    Args:
        p: chance that a sample is right.
        false_accepts: chance f that a wrong one is accepted, from 0 to 1; right ones always are.
        n: samples.
    """
    p, n = share("p", p), count("n", n)
    f = np.asarray(false_accepts, float)
    refuse("false_accepts", f, ~((f >= 0) & (f <= 1)), "from 0 to 1")
    accepted = np.minimum(p + f * (1 - p), 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        some = np.where(n == 0, 0.0, -np.expm1(n * np.log1p(-accepted)))
    return given_back(p / accepted * some)


# Rules on recorded answers


@dataclass(frozen=True)
class Spent:
    """What a rule did with recorded samples.

    Attributes:
        samples_Q: int64, looked at.
        right_Q: bool, it gave a right answer.
    """

    samples_Q: np.ndarray
    right_Q: np.ndarray

    @property
    def accuracy(self) -> float:
        """Share right."""
        return float(self.right_Q.mean())

    @property
    def mean_samples(self) -> float:
        """Samples a question."""
        return float(self.samples_Q.mean())

    def worth(self, v: float, c: float) -> float:
        """Mean of v for each right answer less c for each sample."""
        return v * self.accuracy - c * self.mean_samples


def play_fixed(correct_QM: Any, n: int) -> Spent:
    """Always ``n`` samples, and a verifier that finds a right one among them. Raises InputError for more than there are."""
    correct_QM = outcomes_of("correct_QM", correct_QM)
    n = whole("n", n, 0, correct_QM.shape[1])
    return Spent(np.full(len(correct_QM), n), correct_QM[:, :n].any(1))


def play_global(correct_QM: Any, curve: Curve, eps: float) -> Spent:
    """The curve's N* of all questions, or as many as there are."""
    correct_QM = outcomes_of("correct_QM", correct_QM)
    return play_fixed(correct_QM, min(int(curve.saturation(eps)), correct_QM.shape[1]))


def play_question(correct_QM: Any, curve: Curve, eps: float, *, batch: int = 1) -> Spent:
    """Until one is verified, or the next one's chance, given that all before failed, is at most ``eps``.

    What is known of one question after so many failures is `Curve.hazard`: of a `BetaTTSPM` it falls by Bayes' rule.

    Args:
        correct_QM: outcomes.
        curve: of all questions.
        eps: price of a sample over the worth of a right answer.
        batch: samples drawn at a time; a batch that is begun is paid.
    """
    correct_QM = outcomes_of("correct_QM", correct_QM)
    eps, batch = float(positive("eps", eps)), whole("batch", batch, 1)
    num = correct_QM.shape[1]
    chance_M = np.asarray(curve.hazard(np.arange(num)))
    is_worth_M = chance_M > eps
    # A curve whose hazard falls never becomes worth it again.
    most = num if is_worth_M.all() else int(is_worth_M.argmin())
    ends = [*range(batch, most, batch), most] if most else [0]
    solved_Q = correct_QM[:, :most].any(1)
    first_Q = np.where(solved_Q, correct_QM[:, :most].argmax(1) + 1 if most else 0, most)
    return Spent(np.asarray(ends)[np.searchsorted(ends, first_Q)], solved_Q)


def play_votes(answer_QM: Any, correct_QM: Any, *, confidence: float = SURE, least: int = 1) -> Spent:
    """Adaptive consistency: sample by sample until the vote `is_decided`; the commonest answer is given, the earlier of two.

    Args:
        answer_QM: a number for each answer, equal where answers are.
        correct_QM: whether it is right.
        confidence: see `is_decided`.
        least: samples before the first look.
    """
    correct_QM = outcomes_of("correct_QM", correct_QM)
    answer_QM = count("answer_QM", answer_QM).astype(np.int64)
    if answer_QM.shape != correct_QM.shape:
        raise InputError(
            f"answer_QM has shape {list(answer_QM.shape)}; it must be that of correct_QM, {list(correct_QM.shape)}"
        )
    confidence, least = finite("confidence", confidence, 0.0, 1.0), whole("least", least, 1)
    samples, right = [], []
    for answers, correct in zip(answer_QM.tolist(), correct_QM, strict=True):
        votes: dict[int, int] = {}
        used = 0
        for used, answer in enumerate(answers, 1):
            votes[answer] = votes.get(answer, 0) + 1
            if used >= least and is_decided(list(votes.values()), confidence):
                break
        samples.append(used)
        right.append(bool(correct[answers.index(max(votes, key=lambda one: votes[one]))]))
    return Spent(np.asarray(samples, np.int64), np.asarray(right))


def regret(spent: Spent, correct_QM: Any, v: float, c: float) -> float:
    """What a rule earned less than whoever knew beforehand how many samples each question is worth, on average over questions.

    Args:
        spent: what the rule did with these outcomes.
        correct_QM: outcomes.
        v: worth of a right answer.
        c: price of a sample.
    """
    correct_QM = outcomes_of("correct_QM", correct_QM)
    if len(spent.samples_Q) != len(correct_QM):
        raise InputError(f"spent is of {len(spent.samples_Q)} questions; correct_QM has {len(correct_QM)}")
    best_Q = play_oracle(correct_QM, v, c)
    curve_QN = np.hstack([np.zeros((len(best_Q), 1)), hit_curve(correct_QM.sum(1), correct_QM.shape[1])])
    worth_Q = v * curve_QN[np.arange(len(best_Q)), best_Q] - c * best_Q
    return float(worth_Q.mean()) - spent.worth(v, c)


def play_oracle(correct_QM: Any, v: float, c: float) -> np.ndarray:
    """For each question the number of samples that is worth most, v Hit@n - c n, by whoever knows all of them: int64 ``[Q]``."""
    correct_QM = outcomes_of("correct_QM", correct_QM)
    v, c = float(positive("v", v)), float(positive("c", c))
    num = correct_QM.shape[1]
    worth_QN = v * hit_curve(correct_QM.sum(1), num) - c * np.arange(1, num + 1)
    return np.where(worth_QN.max(1) > 0, worth_QN.argmax(1) + 1, 0)
