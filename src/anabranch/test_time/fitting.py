"""Weighted least squares of curves, many at once: a ceiling, which is linear, times a form with one parameter or two.

The ceiling is solved for in closed form at every point that is looked at (variable projection), so only the form's parameters are
searched: over a grid of starts, and from the best of them by damped Gauss-Newton steps. All curves go together, in numpy.
"""
# Shapes: C curves, N points of each, G starts, T parameters of a form, Q questions, M samples, R resamples

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from anabranch.bounds import shown, whole
from anabranch.errors import InputError
from anabranch.test_time.figures import LEAST, numbers, refuse, share, sigmoid
from anabranch.test_time.hits import hit_curve, outcomes_of
from anabranch.test_time.likeliest import likeliest

# Questions that shares are taken to be of, for their weights, where nobody says.
USUAL_QUESTIONS = 100.0

_STEPS, _DIFFERENCE = 60, 1e-6

# Curves that are fitted at a time: what is between is a few arrays of [curves, starts].
_AT_ONCE = 4096


@dataclass(frozen=True)
class Family:
    """A form of curves.

    Attributes:
        start_GT: where searches begin.
        bound_T2: least and most of each parameter.
        form: from parameters ``[..., T]`` and N to shares ``[..., N]`` below a ceiling of 1.
        natural: from parameters ``[C, T]`` to those that users know, ``[C, K]``.
        of_zeros, of_ones: those of nothing but zeros, and of nothing but ones.
    """

    start_GT: np.ndarray
    bound_T2: np.ndarray
    form: Callable[[np.ndarray, int], np.ndarray]
    natural: Callable[[np.ndarray], np.ndarray]
    of_zeros: tuple[float, ...]
    of_ones: tuple[float, ...]


def _single_form(theta: np.ndarray, num_points: int) -> np.ndarray:
    """1 - (1 - p)^n with p = sigmoid(theta)."""
    return -np.expm1(-np.logaddexp(0, theta) * np.arange(1, num_points + 1))


def _mixed_form(theta: np.ndarray, num_points: int) -> np.ndarray:
    """1 - B(a, b + n) / B(a, b) with a + b = exp(theta_1) and mean sigmoid(theta_0)."""
    a, b = _shapes(theta)
    return -np.expm1(-np.cumsum(np.log1p(a[..., None] / (b[..., None] + np.arange(num_points))), axis=-1))


def _shapes(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    total = np.exp(theta[..., 1])
    return total * sigmoid(theta[..., 0]), total * sigmoid(-theta[..., 0])


def _mixed_natural(theta: np.ndarray) -> np.ndarray:
    a, b = _shapes(theta)
    return np.stack([a / (a + b), a, b, 1 / (a + b + 1)], axis=-1)


# A form of one p, and one of p ~ Beta(a, b): mean, a, b, rho.
SINGLE = Family(
    start_GT=np.linspace(-16, 12, 57)[:, None],
    bound_T2=np.array([[-27.6, 30.0]]),
    form=_single_form,
    natural=sigmoid,
    of_zeros=(LEAST,),
    of_ones=(1.0,),
)
MIXED = Family(
    start_GT=np.stack(np.meshgrid(np.linspace(-10, 7, 18), np.linspace(-2, 10, 13), indexing="ij"), -1).reshape(-1, 2),
    bound_T2=np.array([[-20.0, 20.0], [-5.0, 18.0]]),
    form=_mixed_form,
    natural=_mixed_natural,
    of_zeros=(LEAST, 2 * LEAST, 2.0, 1 / 3),
    of_ones=(1 - LEAST, 2.0, 2 * LEAST, 1 / 3),
)


@dataclass(frozen=True)
class Observed:
    """What a curve is fitted to.

    Attributes:
        curve_N: shares.
        row_QN: the curve of each question; None where only shares are known.
        num_questions: None if not known.
        num_draws: outcomes behind it.
        all_same: 0 or 1 where no outcome was another; None otherwise.
    """

    curve_N: np.ndarray
    row_QN: np.ndarray | None
    num_questions: int | None
    num_draws: int
    all_same: int | None

    @property
    def num_points(self) -> int:
        """N."""
        return len(self.curve_N)

    def resampled(self, value: Callable[[Any], Any], resamples: int, rng: np.random.Generator) -> np.ndarray:
        """Curves of as many questions, drawn again: float64 ``[R, N]``.

        ``value`` is the fitted curve, which is drawn from where only shares are known, and where no question differs from another, so
        that to draw these again would tell nothing.
        """
        if self.num_questions is None:
            raise unknown_questions()
        num = self.num_questions
        if self.row_QN is not None and (self.row_QN != self.row_QN[:1]).any():
            return rng.multinomial(num, np.full(num, 1 / num), size=resamples) @ self.row_QN / num
        solved_N = value(np.arange(self.num_points + 1))
        chance = np.append(np.diff(solved_N), 1 - solved_N[-1])
        drawn = rng.multinomial(num, np.maximum(chance, 0) / np.maximum(chance, 0).sum(), size=resamples)
        return np.cumsum(drawn[:, :-1], axis=1) / num


def unknown_questions() -> InputError:
    """The error for an interval of shares alone."""
    return InputError(
        "the curve was fitted to shares of nobody knows how many questions; say num_questions, or fit to outcomes"
    )


def observed(data: Any, kind: str, *, up_to: int | None = None, num_questions: int | None = None) -> Observed:
    """Shares ``[N]``, or outcomes ``[Q, M]``, be M another for each question, as what can be fitted to. Raises InputError."""
    if isinstance(data, list | tuple) and len({len(row) if np.ndim(row) == 1 else None for row in data}) > 1:
        return _of_rows(data, kind, up_to, num_questions)
    array = numbers("data", data)
    if array.ndim == 1:
        return _of_shares(array, up_to, num_questions)
    if num_questions is not None:
        raise InputError("num_questions is for shares; outcomes [questions, samples] tell it themselves")
    return _of_outcomes(outcomes_of("data", array), kind, up_to)


def _of_rows(rows: Sequence[Any], kind: str, up_to: int | None, num_questions: int | None) -> Observed:
    """Of questions with different numbers of samples: each says of as many as the least have, without bias."""
    if num_questions is not None:
        raise InputError("num_questions is for shares; outcomes tell it themselves")
    checked = [outcomes_of(f"data[{place}]", [row]) for place, row in enumerate(rows)]
    most = _points(min(row_1M.shape[1] for row_1M in checked), up_to)
    parts = [_of_outcomes(row_1M, kind, most) for row_1M in checked]
    row_QN = np.stack([one.curve_N for one in parts])
    same = parts[0].all_same if len({one.all_same for one in parts}) == 1 else None
    return Observed(row_QN.mean(0), row_QN, len(row_QN), sum(one.num_draws for one in parts), same)


def _of_outcomes(is_right_QM: np.ndarray, kind: str, up_to: int | None) -> Observed:
    most = _points(is_right_QM.shape[1], up_to)
    if kind == "parallel":
        row_QN = hit_curve(is_right_QM.sum(1), is_right_QM.shape[1], most)
    else:
        row_QN = np.logical_or.accumulate(is_right_QM[:, :most], axis=1).astype(float)
        # Rounds behind the first right one are not looked at.
        is_right_QM = row_QN == 1
    same = 0 if not is_right_QM.any() else 1 if is_right_QM.all() else None
    draws = len(row_QN) if kind == "sequential" and same == 1 else is_right_QM.size
    return Observed(row_QN.mean(0), row_QN, len(row_QN), draws, same)


def _of_shares(curve_N: np.ndarray, up_to: int | None, num_questions: int | None) -> Observed:
    if not len(curve_N):
        raise InputError(
            "the curve is empty; give the share solved with 1, 2, ... samples, or outcomes [questions, samples]"
        )
    refuse("data", curve_N, ~((curve_N >= 0) & (curve_N <= 1)), "a share from 0 to 1")
    curve_N = curve_N[: _points(len(curve_N), up_to)]
    num = None if num_questions is None else whole("num_questions", num_questions, 1)
    same = int(curve_N[0]) if (curve_N == curve_N[0]).all() and curve_N[0] in (0, 1) else None
    return Observed(curve_N, None, num, (num or 1) * (len(curve_N) if same == 0 else 1), same)


def _points(there: int, up_to: int | None) -> int:
    if up_to is None:
        return there
    if whole("up_to", up_to, 1) > there:
        raise InputError(f"up_to is {up_to}; it must be at most {there}, the points that there are")
    return up_to


def fit_many(
    curve_CN: Any,
    model: Literal["single", "mixed"] = "single",
    *,
    num_questions: int | None = None,
    f_max: float | None = None,
) -> dict[str, np.ndarray]:
    """Fit many curves of as many points at once.

    Args:
        curve_CN: shares solved with 1 to N samples.
        model: ``single`` as `TTSPM`, ``mixed`` as `BetaTTSPM`.
        num_questions, f_max: as in their ``fit``, for all alike.

    Returns float64 ``[C]`` by name: ``f_max`` and ``p``, or ``f_max``, ``mean``, ``a``, ``b``, ``rho``.
    Raises InputError.
    """
    families = {"single": (SINGLE, ("p",)), "mixed": (MIXED, ("mean", "a", "b", "rho"))}
    if model not in families:
        raise InputError(f"model is {shown(model)}; it must be one of {', '.join(families)}")
    array = numbers("curve_CN", curve_CN)
    if array.ndim != 2 or 0 in array.shape:
        raise InputError(
            f"curve_CN has shape {list(array.shape)}; it must be [curves, points], with at least one of each"
        )
    refuse("curve_CN", array, ~((array >= 0) & (array <= 1)), "a share from 0 to 1")
    fixed = None if f_max is None else float(share("f_max", f_max))
    if array.shape[1] < 2 and fixed is None:
        raise InputError("curves of one point do not tell p from f_max; give more points, or f_max")
    family, names = families[model]
    found, ceiling = fit_family(array, family, num_questions, fixed)
    return {"f_max": ceiling, **dict(zip(names, found.T, strict=True))}


def fit_family(
    curve_CN: np.ndarray, family: Family, num_questions: float | None, fixed: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Natural parameters ``[C, K]`` and ceilings ``[C]`` of checked curves; ``fixed`` is a ceiling that is known."""
    parts = [
        _fit_some(curve_CN[at : at + _AT_ONCE], family, num_questions or USUAL_QUESTIONS, fixed)
        for at in range(0, len(curve_CN), _AT_ONCE)
    ]
    found, ceiling = (np.concatenate(part) for part in zip(*parts, strict=True))
    for is_same, value in (((curve_CN == 0).all(1), family.of_zeros), ((curve_CN == 1).all(1), family.of_ones)):
        found[is_same] = value
        ceiling[is_same] = 1.0 if fixed is None else fixed
    return found, ceiling


def _fit_some(
    y_CN: np.ndarray, family: Family, num_questions: float, fixed: float | None
) -> tuple[np.ndarray, np.ndarray]:
    num_points = y_CN.shape[1]
    # A share of 0 or 1 has a variance too: with half a question of each outcome more.
    near_CN = (num_questions * y_CN + 0.5) / (num_questions + 1)
    weight_CN = 1 / (near_CN * (1 - near_CN))
    weight_CN /= weight_CN.sum(1, keepdims=True)

    def ceiling(form: np.ndarray, y: np.ndarray, weight: np.ndarray) -> np.ndarray:
        if fixed is not None:
            return np.full(form.shape[:-1], fixed)
        return np.clip((weight * y * form).sum(-1) / np.maximum((weight * form * form).sum(-1), 1e-300), LEAST, 1.0)

    def residual(theta_CT: np.ndarray) -> np.ndarray:
        form_CN = family.form(theta_CT, num_points)
        return np.sqrt(weight_CN) * (y_CN - ceiling(form_CN, y_CN, weight_CN)[:, None] * form_CN)

    theta_CT = _best_start(y_CN, weight_CN, family, fixed)
    theta_CT = _descend(theta_CT, residual, family.bound_T2)
    form_CN = family.form(theta_CT, num_points)
    return family.natural(theta_CT), ceiling(form_CN, y_CN, weight_CN)


def fit_counts(solved_N: np.ndarray, tried_N: np.ndarray) -> tuple[float, float, float]:
    """Ceiling, a and b of the mixture that most likely gave such counts: by the likelihood of each sample's hazard.

    Counts and not their curve, since a curve does not tell that of its later points next to nothing is known: where hundreds of
    questions were given one sample and a few all, those few must not say how the hundreds would have gone on.

    Args:
        solved_N: questions whose n-th sample was their first right one; may be weighed.
        tried_N: questions whose n-th sample was looked at.
    """

    def likelihood(theta_G3: np.ndarray) -> np.ndarray:
        return _likelihood(theta_G3, solved_N, tried_N)

    here = likeliest(likelihood, _COUNT_STARTS, _COUNT_BOUND_32, step_3=np.array([0.05, 0.5, 0.5]))
    a, b = _shapes(here[1:])
    return float(here[0]), float(a), float(b)


def _likelihood(theta: np.ndarray, solved_N: np.ndarray, tried_N: np.ndarray) -> np.ndarray:
    """Of parameters ``[G, 3]``: ceiling, and those of the mixture."""
    a, b = (of[:, None] for of in _shapes(theta[:, 1:]))
    at = np.arange(len(tried_N))
    left = np.exp(-np.cumsum(np.log1p(a / (b + at)), axis=1))
    before = np.concatenate([np.ones((len(theta), 1)), left[:, :-1]], axis=1)
    ceiling = theta[:, :1]
    unsolved, unsolved_before = (1 - ceiling) + ceiling * left, (1 - ceiling) + ceiling * before
    least = 1e-300
    of_solved = np.log(np.maximum(ceiling * before * a / (a + b + at), least)) - np.log(
        np.maximum(unsolved_before, least)
    )
    of_failed = np.log(np.maximum(unsolved, least)) - np.log(np.maximum(unsolved_before, least))
    return of_solved @ solved_N + of_failed @ (tried_N - solved_N)


_COUNT_BOUND_32 = np.array([[1e-3, 1.0], [-20.0, 20.0], [-5.0, 12.0]])
_COUNT_STARTS = np.stack(
    np.meshgrid([0.05, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0], np.linspace(-8, 6, 15), np.linspace(-2, 7, 7), indexing="ij"), -1
).reshape(-1, 3)


def _best_start(y_CN: np.ndarray, weight_CN: np.ndarray, family: Family, fixed: float | None) -> np.ndarray:
    """Of all starts the one with the least weighted squares, for each curve."""
    form_GN = family.form(family.start_GT, y_CN.shape[1])
    of_form_CG, of_both_CG = weight_CN @ (form_GN**2).T, (weight_CN * y_CN) @ form_GN.T
    if fixed is not None:
        ceiling_CG: Any = fixed
    else:
        ceiling_CG = np.clip(of_both_CG / np.maximum(of_form_CG, 1e-300), LEAST, 1.0)
    squares_CG = ceiling_CG * (ceiling_CG * of_form_CG - 2 * of_both_CG)
    return family.start_GT[squares_CG.argmin(1)]


def _descend(theta_CT: np.ndarray, residual: Callable[[np.ndarray], np.ndarray], bound_T2: np.ndarray) -> np.ndarray:
    """Levenberg and Marquardt's steps, each curve with a damping of its own; a step that is no better is not taken."""
    num_curves, num_theta = theta_CT.shape
    here_CN = residual(theta_CT)
    squares_C = (here_CN**2).sum(1)
    damping_C = np.full(num_curves, 1e-3)
    diagonal = np.arange(num_theta)
    for _ in range(_STEPS):
        slope_CTN = np.stack(
            [(residual(theta_CT + _DIFFERENCE * np.eye(num_theta)[at]) - here_CN) / _DIFFERENCE for at in diagonal], 1
        )
        square_CTT = slope_CTN @ slope_CTN.transpose(0, 2, 1)
        square_CTT[:, diagonal, diagonal] += damping_C[:, None] * square_CTT[:, diagonal, diagonal] + 1e-18
        step_CT = -np.linalg.solve(square_CTT, (slope_CTN @ here_CN[:, :, None]))[:, :, 0]
        # Far from the answer the slope says little about how far it is.
        step_CT = np.clip(step_CT, -2.0, 2.0)
        next_CT = np.clip(theta_CT + step_CT, bound_T2[:, 0], bound_T2[:, 1])
        next_CN = residual(next_CT)
        next_C = (next_CN**2).sum(1)
        is_better = next_C < squares_C
        moved = np.abs(next_CT - theta_CT).max(1) > 1e-12
        theta_CT, here_CN = (
            np.where(is_better[:, None], next_CT, theta_CT),
            np.where(is_better[:, None], next_CN, here_CN),
        )
        squares_C = np.where(is_better, next_C, squares_C)
        damping_C = np.clip(np.where(is_better, damping_C / 8, damping_C * 8), 1e-12, 1e8)
        if not (moved & (is_better | (damping_C < 1e6))).any():
            break
    return theta_CT
