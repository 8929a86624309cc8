"""Observed curves: shares of questions that at least one of n samples solved, without bias; and what a vote of n would have given."""
# Shapes: Q questions, M samples of each, N points of a curve

from collections.abc import Sequence
from typing import Any

import numpy as np

from anabranch.bounds import whole
from anabranch.errors import InputError
from anabranch.test_time.figures import count, given_back, numbers, refuse


def hit_at(correct: Any, samples: Any, n: Any) -> Any:
    """Hit@n without bias: chance that n of the samples, drawn without putting back, hold a correct one.

        1 - C(samples - correct, n) / C(samples, n)

    As a product, so that nothing overflows (Chen et al. 2021, arXiv 2107.03374, section 2.1).

    Args:
        correct: how many of the samples are right; numbers or arrays, which broadcast.
        samples: how many there are.
        n: how many are looked at.

    Raises InputError for n above ``samples``, and for more correct ones than samples.
    """
    k, m, n = np.broadcast_arrays(count("correct", correct), count("samples", samples, 1), count("n", n))
    refuse("correct", k, k > m, "at most the number of samples")
    refuse("n", n, n > m, "at most the number of samples: of more, these samples say nothing without a model")
    at = np.arange(int(n.max(initial=0)))
    left = np.maximum((m - k)[..., None] - at, 0.0)
    factor = np.where(at < n[..., None], left / np.maximum(m[..., None] - at, 1.0), 1.0)
    return given_back(1 - factor.prod(-1))


def hit_curve(correct_Q: Any, samples: int, most: int | None = None) -> np.ndarray:
    """Hit@1 to Hit@``most`` of each question, float64 ``[Q, N]``; ``most`` is ``samples`` by default. Raises InputError as `hit_at`."""
    correct_Q = count("correct_Q", correct_Q)
    samples = whole("samples", samples, 1)
    most = samples if most is None else whole("most", most, 1)
    if most > samples:
        raise InputError(f"most is {most}; it must be at most the {samples} samples that there are")
    refuse("correct_Q", correct_Q, correct_Q > samples, f"at most {samples}, the number of samples")
    at = np.arange(most)
    factor_QN = np.maximum((samples - correct_Q)[..., None] - at, 0.0) / (samples - at)
    return 1 - np.cumprod(factor_QN, axis=-1)


def outcomes_of(name: str, data: Any) -> np.ndarray:
    """Outcomes of 0 and 1 as bool ``[Q, M]``. Raises InputError."""
    array = numbers(name, data)
    if array.ndim != 2 or 0 in array.shape:
        raise InputError(
            f"{name} has shape {list(array.shape)}; it must be [questions, samples], with at least one of each"
        )
    refuse(name, array, (array != 0) & (array != 1), "0 or 1")
    return array == 1


def first_counts(correct_Q: Any, samples_Q: Any, most: int) -> np.ndarray:
    """At which sample questions are solved first, on average over all orders of their samples, float64 ``[2, N]``: solved, tried.

    Of a question with k right ones of m, an n-th sample is looked at where n - 1 without putting back hold none,
    C(m - k, n - 1) / C(m, n - 1), and then solves it with k / (m - n + 1). What one order says is that in one draw.

    Args:
        correct_Q, samples_Q: of each question; numbers of samples may differ.
        most: N.
    """
    k_Q, m_Q = np.broadcast_arrays(count("correct_Q", correct_Q), count("samples_Q", samples_Q, 1))
    refuse("correct_Q", k_Q, k_Q > m_Q, "at most the number of samples")
    at = np.arange(whole("most", most, 1))
    left_QN = np.maximum(m_Q[..., None] - at, 0.0)
    failed_QN = np.cumprod(np.maximum(left_QN - k_Q[..., None], 0.0) / np.maximum(left_QN, 1.0), axis=-1)
    tried_QN = np.where(left_QN > 0, np.concatenate([np.ones((*m_Q.shape, 1)), failed_QN[..., :-1]], axis=-1), 0.0)
    solved_QN = tried_QN * np.minimum(k_Q[..., None] / np.maximum(left_QN, 1.0), 1.0)
    return np.stack([solved_QN.sum(0), tried_QN.sum(0)])


def ends_at_first(rows: Sequence[Sequence[bool]]) -> bool:
    """Whether questions were drawn for until a sample was right: numbers differ, and none has a sample behind its first right one.

    Then the order of samples tells something, and how many there are does too.
    """
    return len({len(row) for row in rows}) > 1 and not any(any(row[:-1]) for row in rows)


def survival_curve(solved_N: Any, tried_N: Any) -> np.ndarray:
    """Share solved within n samples where not all questions were given as many: Kaplan and Meier's estimate, float64 ``[N]``.

    Who stops as soon as a sample is right knows of no further ones, so Hit@n cannot be counted; but of all questions that were given
    an n-th sample, none was solved before, and their share that it solved is the hazard at n.

    Args:
        solved_N: questions whose n-th sample was their first right one; counts, which may be weighed.
        tried_N: questions whose n-th sample was looked at.

    Raises InputError where more were solved than tried. Points behind the last that was tried are left out.
    """
    solved_N, tried_N = numbers("solved_N", solved_N), numbers("tried_N", tried_N)
    if solved_N.shape != tried_N.shape or solved_N.ndim != 1:
        raise InputError(
            f"solved_N has shape {list(solved_N.shape)} and tried_N {list(tried_N.shape)}; both must be [N]"
        )
    refuse("tried_N", tried_N, ~((tried_N >= 0) & (tried_N < np.inf)), "a number of at least 0")
    refuse(
        "solved_N", solved_N, ~((solved_N >= 0) & (solved_N <= tried_N)), "at least 0 and at most as many as were tried"
    )
    end = int(np.argmax(tried_N == 0)) if (tried_N == 0).any() else len(tried_N)
    return 1 - np.cumprod(1 - solved_N[:end] / tried_N[:end])


def vote_curve(answer_QM: Any, correct_QM: Any, n_N: Any, *, draws: int = 64, seed: int = 0) -> np.ndarray:
    """Accuracy of the commonest of n answers, float64 ``[N]``: what a vote delivers, where `hit_curve` bounds what any choice can.

    A vote may fall as n grows: where the commonest answer is wrong, more samples find it more surely. Ties go to the answer that came
    first.

    Args:
        answer_QM: a number for each answer, equal where answers are; integers.
        correct_QM: whether it is right.
        n_N: numbers of samples.
        draws: orders of the samples to average over.
        seed: of those.

    Raises InputError for arrays that do not fit, and for n above M.
    """
    answer_QM = count("answer_QM", answer_QM).astype(np.int64)
    correct_QM = outcomes_of("correct_QM", correct_QM)
    if answer_QM.shape != correct_QM.shape:
        raise InputError(
            f"answer_QM has shape {list(answer_QM.shape)}; it must be that of correct_QM, {list(correct_QM.shape)}"
        )
    n_N = np.atleast_1d(count("n_N", n_N, 1)).astype(np.int64)
    refuse(
        "n_N", n_N.astype(float), n_N > answer_QM.shape[1], f"at most the {answer_QM.shape[1]} samples that there are"
    )
    rng = np.random.default_rng(whole("seed", seed, 0))
    right_N = np.zeros(len(n_N))
    draws = whole("draws", draws, 1)
    ballot_QM = _ballots(answer_QM)
    for _ in range(draws):
        order_QM = rng.permuted(np.broadcast_to(np.arange(answer_QM.shape[1]), answer_QM.shape), axis=1)
        drawn_QM = np.take_along_axis(ballot_QM, order_QM, 1)
        is_right_QM = np.take_along_axis(correct_QM, order_QM, 1)
        for place, n in enumerate(n_N):
            # Of each answer how often it is given among the first n; the first of those that are given most often is taken.
            votes = np.bincount(drawn_QM[:, :n].ravel(), minlength=ballot_QM.size)
            best_Q = votes[drawn_QM[:, :n]].argmax(1)
            right_N[place] += is_right_QM[np.arange(len(best_Q)), best_Q].mean()
    return right_N / draws


def _ballots(answer_QM: np.ndarray) -> np.ndarray:
    """Equal numbers for equal answers to one question, from 0 to below Q M, and no number for two questions; int64 ``[Q, M]``."""
    order_QM = answer_QM.argsort(axis=1, kind="stable")
    sorted_QM = np.take_along_axis(answer_QM, order_QM, 1)
    is_new_QM = np.concatenate([np.zeros((len(answer_QM), 1), bool), sorted_QM[:, 1:] != sorted_QM[:, :-1]], axis=1)
    ballot_QM = np.empty_like(answer_QM)
    np.put_along_axis(ballot_QM, order_QM, is_new_QM.cumsum(axis=1), 1)
    return ballot_QM + np.arange(len(answer_QM))[:, None] * answer_QM.shape[1]
