"""How the share of solved questions grows with samples or rounds, and from where on it hardly does.

Source: Wang, Zhu, Leong, Li, Li 2025, "Scaling over Scaling: Exploring Test-Time Scaling Plateau in Large Reasoning Models"
(arXiv 2505.20522). N samples in parallel, each right with p_s, and N rounds of rethinking, each of which puts a wrong answer right
with p_r, have one form:

    F(N)  = f_max (1 - (1 - p)^N)                     gain(N) = F(N + 1) - F(N) = f_max p (1 - p)^N
    N*    = the smallest N with gain(N) <= eps        = ceil(ln(eps / (f_max p)) / ln(1 - p)),  0 where f_max p <= eps

`BetaTTSPM` is an extension of ours and not of the paper: questions differ, p ~ Beta(a, b), and the tail falls as N^-a:

    F(N)  = f_max (1 - B(a, b + N) / B(a, b))         gain(N) = f_max B(a + 1, b + N) / B(a, b)

With a, b -> infinity and a / (a + b) = p it is the paper's. Departures: the paper's own statement of N* was not at hand; ours goes by the
gain from N to N + 1 (one that goes by the gain from N - 1 to N has an N* larger by one at most). f_max < 1 in rounds is our reading.
"""
# Shapes: Q questions, M samples of each, C curves, N points of a curve

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Self, TypeVar, get_args

import numpy as np

from anabranch.bounds import LARGEST_INT, finite, shown, whole
from anabranch.errors import InputError
from anabranch.test_time.alike import Alike, Unknown
from anabranch.test_time.figures import (
    LEAST,
    count,
    given_back,
    log_unsolved,
    log_unsolved_mixed,
    positive,
    share,
    whole_back,
)
from anabranch.test_time.fitting import (
    MIXED,
    SINGLE,
    Family,
    Observed,
    fit_family,
    observed,
    unknown_questions,
)

Kind = Literal["parallel", "sequential"]

# Of fewer questions a bootstrap tells next to nothing of others, and of one that it is as sure as can be.
LEAST_QUESTIONS = 10

# Of a and b: there the mixture is one p to the last digit.
MOST_SHAPE = 1e15

C = TypeVar("C", bound="Curve")


class _Fit:
    """``fit`` of a curve, called on one (which then has what was found) or on its class (which makes one)."""

    def __get__(self, curve: C | None, owner: type[C]) -> Callable[..., C]:
        made: Any = owner
        return (made() if curve is None else curve)._fit


class Curve:
    """What the two models share. Arguments and parameters may be arrays, which broadcast; numbers give numbers.

    Attributes:
        kind: ``parallel`` samples or ``sequential`` rounds. The form is the same; what is fitted to is read differently.
        f_max: share of questions that any number of samples can solve, above 0 and at most 1.
    """

    names: ClassVar[tuple[str, ...]] = ()
    given: ClassVar[tuple[str, ...]] = ()
    family: ClassVar[Family]

    def __init__(self, kind: Kind, f_max: Any, parameters: Mapping[str, Any]) -> None:
        if kind not in get_args(Kind):
            raise InputError(f"kind is {shown(kind)}; it must be one of {', '.join(get_args(Kind))}")
        self.kind: Kind = kind
        told = [name for name, value in parameters.items() if value is not None]
        if told and len(told) < len(parameters):
            missing = next(name for name in parameters if name not in told)
            raise InputError(f"{missing} is missing: give {' and '.join(parameters)}, or none of them and fit")
        self.is_fitted = bool(told)
        # A ceiling without the rest is one that a fit keeps.
        self._fixed = None if f_max is None or told else float(share("f_max", f_max))
        self._f_max = share("f_max", 1.0 if f_max is None else f_max)
        self._seen: Observed | None = None
        self._fitted_fixed: float | None = None

    @property
    def f_max(self) -> Any:
        """See the class."""
        return given_back(self._f_max)

    @property
    def observed(self) -> np.ndarray | None:
        """Shares with 1 to N samples that it was fitted to, float64 ``[N]``; None for parameters that were given."""
        return None if self._seen is None else self._seen.curve_N

    @property
    def all_same(self) -> int | None:
        """0 or 1 where no outcome that it was fitted to was another, so that they tell bounds and no curve; None otherwise."""
        return None if self._seen is None else self._seen.all_same

    @property
    def too_few(self) -> bool:
        """Whether it was fitted to fewer than `LEAST_QUESTIONS`, so that it is of these alone and `interval` holds all that can be."""
        seen = self._seen
        return seen is not None and seen.num_questions is not None and seen.num_questions < LEAST_QUESTIONS

    def __repr__(self) -> str:
        if not self.is_fitted:
            return f"{type(self).__name__}(kind={self.kind!r}, not fitted)"
        told = ", ".join(f"{name}={getattr(self, name)!r}" for name in ("f_max", *self.given))
        return f"{type(self).__name__}(kind={self.kind!r}, {told})"

    # What a model says

    def _log_left(self, n: np.ndarray) -> np.ndarray:
        """ln of the share of solvable questions that n samples leave unsolved."""
        raise NotImplementedError

    def _next(self, n: np.ndarray) -> np.ndarray:
        """Chance that the next sample solves one of those."""
        raise NotImplementedError

    def _take(self, parameters: np.ndarray) -> None:
        """Take what was fitted: natural parameters of the family, in the order of ``names``."""
        raise NotImplementedError

    # The curve

    def value(self, n: Any) -> Any:
        """Share of questions solved by at least one of ``n`` samples, or within ``n`` rounds. Raises InputError."""
        self._check()
        return given_back(self._f_max * -np.expm1(self._log_left(count("n", n))))

    def gain(self, n: Any) -> Any:
        """What one more sample after ``n`` adds: ``value(n + 1) - value(n)``. Raises InputError."""
        self._check()
        return given_back(self._gain(count("n", n)))

    def saturation(self, eps: Any) -> Any:
        """The smallest number of samples after which one more gains at most ``eps``.

        Raises InputError unless eps is a finite number above 0, and for one so small that more than 2^53 samples gain more.
        """
        self._check()
        eps = positive("eps", eps)
        n = self._first_guess(eps)
        # Rounding may have moved the guess across a whole number.
        for _ in range(3):
            n = np.where((n > 0) & (self._gain(np.maximum(n - 1, 0)) <= eps), n - 1, n)
        for _ in range(3):
            n = np.where(self._gain(n) > eps, n + 1, n)
        return whole_back(n)

    def budget(self, v: Any, c: Any) -> Any:
        """Samples that pay: the smallest number after which one more costs at least what it brings.

        Args:
            v: what a solved question is worth.
            c: what a sample costs, in the same money.

        Raises InputError unless both are finite numbers above 0 (samples that cost nothing never stop to pay; cap them instead).
        """
        v, c = positive("v", v), positive("c", c)
        with np.errstate(over="ignore", under="ignore"):
            ratio = np.clip(c / v, np.finfo(float).tiny, np.finfo(float).max)
        return self.saturation(ratio)

    def hazard(self, n: Any) -> Any:
        """Chance that the next sample solves a question that ``n`` samples left unsolved, whether it can be solved or not."""
        self._check()
        n = count("n", n)
        return given_back(self._gain(n) / np.maximum(self._unsolved(n), np.finfo(float).tiny))

    def unsolved(self, n: Any) -> Any:
        """Share that ``n`` samples leave unsolved, `value` less than 1; right where that is close to 1 too. Raises InputError."""
        self._check()
        return given_back(self._unsolved(count("n", n)))

    def gains(self, after: int, most: int, *, failed: bool = False) -> np.ndarray:
        """What each of the next ``most`` samples after so many adds, in one look: float64 ``[most]``. Parameters must be numbers.

        Args:
            after: samples before them; a whole number, which is not checked again.
            most: samples.
            failed: on one question that those before did not solve, in place of all questions.
        """
        self._check()
        n = np.arange(float(after), after + most)
        left = np.exp(self._log_left(n))
        gain = self._f_max * self._next(n) * left
        return gain / max((1 - self._f_max) + self._f_max * left[0], 1e-300) if failed and most else gain

    def _gain(self, n: np.ndarray) -> np.ndarray:
        return self._f_max * self._next(n) * np.exp(self._log_left(n))

    def _unsolved(self, n: np.ndarray) -> np.ndarray:
        """1 - F(n), where F is close to 1 too."""
        return (1 - self._f_max) + self._f_max * np.exp(self._log_left(n))

    def _first_guess(self, eps: np.ndarray) -> np.ndarray:
        """N* by doubling and halving, for gains that fall."""
        eps = np.broadcast_to(eps, np.broadcast_shapes(np.shape(eps), np.shape(self._gain(np.zeros(())))))
        low, high = np.zeros(eps.shape), np.ones(eps.shape)
        while (is_low := self._gain(high) > eps).any():
            low, high = np.where(is_low, high, low), np.where(is_low, 2 * high, high)
            if high.max() > LARGEST_INT:
                raise too_many(eps)
        while (high - low > 1).any():
            middle = np.floor((low + high) / 2)
            is_low = (self._gain(middle) > eps) & (high - low > 1)
            is_high = ~is_low & (high - low > 1)
            low, high = np.where(is_low, middle, low), np.where(is_high, middle, high)
        return np.where(self._gain(np.zeros(eps.shape)) <= eps, 0.0, high)

    def _check(self) -> None:
        if not self.is_fitted:
            raise InputError(f"{type(self).__name__} has no parameters yet: give {' and '.join(self.given)}, or fit")

    # Learning

    fit = _Fit()

    def _fit(
        self, data: Any, *, f_max: float | None = None, up_to: int | None = None, num_questions: int | None = None
    ) -> Self:
        """Find the parameters by weighted least squares, from many starts, and give back the curve itself.

        Weights are one over the variance of a share, F (1 - F) / Q. Nothing but zeros has no maximum that could be told: it is given
        p = 1e-12 (a mean of 1e-12) below a ceiling of 1. Nothing but ones is p = 1 (a mean within 1e-12 of it), f_max = 1. `all_same` says
        of both that these stand for bounds alone.

        Args:
            data: shares ``[N]`` solved with 1 to N samples, or outcomes ``[Q, M]`` of 0 and 1: samples in any order, or rounds in theirs.
                Of samples the curve is the unbiased Hit@n; of rounds, the share that was right in one of the first n. A list of rows of
                different lengths is read up to the shortest.
            f_max: ceiling that is known; None to find it too, unless the curve was made with one and nothing else.
            up_to: points to fit to; None for all.
            num_questions: behind shares, for their weights and for `interval`; None if not known.

        Raises InputError for data that are none, and for a single point where the ceiling is to be found.
        """
        seen = observed(data, self.kind, up_to=up_to, num_questions=num_questions)
        fixed = self._fixed if f_max is None else float(share("f_max", f_max))
        if seen.num_points < 2 and fixed is None:
            raise InputError(
                "the curve has one point, which does not tell p from f_max; give more samples, or f_max (f_max=1 for no ceiling)"
            )
        found, ceiling = fit_family(seen.curve_N[None], self.family, seen.num_questions, fixed)
        self._take(found[0])
        self._f_max, self.is_fitted = np.asarray(ceiling[0]), True
        self._seen, self._fitted_fixed = seen, fixed
        return self

    def interval(
        self, level: float = 0.95, *, resamples: int = 400, seed: int = 0, eps: float | None = None
    ) -> dict[str, tuple[float, float]]:
        """From where to where each parameter may lie, by a bootstrap over questions.

        Where all outcomes are the same a bootstrap tells nothing: then the exact bounds of that many draws or questions without an
        exception are given (`anabranch.test_time.alike`), from 0 to 1 or to infinity for what they do not bound. Of shares whose number of
        questions is known, and of questions that all had as many right samples, the questions are drawn from the fitted curve. Of fewer
        than `LEAST_QUESTIONS` (10) it is not known where a parameter lies: then it is from where to where any curve's may.

        Args:
            level: share of such intervals that hold the truth.
            resamples: of the bootstrap.
            seed: likewise.
            eps: also give where `saturation` lies.

        Raises InputError for a curve that was not fitted, or to shares of nobody knows how many questions.
        """
        level = finite("level", level, 0.0, 1.0)
        eps = None if eps is None else float(positive("eps", eps))
        if (bounds := self._bounds(1 - level)) is not None:
            return bounds.parameters(self.names) | ({} if eps is None else {"saturation": bounds.stop(eps)})
        found, ceiling = self._resampled(resamples, seed)
        assert self._seen is not None
        tail = 100 * (1 - level) / 2
        columns = {"f_max": ceiling, **dict(zip(self.names, found.T, strict=True))}
        told = {name: tuple(map(float, np.percentile(of, [tail, 100 - tail]))) for name, of in columns.items()}
        if eps is not None:
            many = self._with(ceiling, found)
            told["saturation"] = tuple(map(float, np.percentile(many.saturation(eps), [tail, 100 - tail])))
        return told  # type: ignore[return-value]

    def band(
        self, n: Any, level: float = 0.95, *, resamples: int = 400, seed: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """From where to where the share solved with ``n`` samples may lie: float64 ``[N]`` each. Arguments and errors as `interval`."""
        level, n_N = finite("level", level, 0.0, 1.0), np.atleast_1d(count("n", n))
        if (bounds := self._bounds(1 - level)) is not None:
            return bounds.band(n_N)
        found, ceiling = self._resampled(resamples, seed)
        tail = 100 * (1 - level) / 2
        low_N, high_N = np.percentile(
            self._with(ceiling[:, None], found[:, None]).value(n_N), [tail, 100 - tail], axis=0
        )
        return low_N, high_N

    def _resampled(self, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Parameters ``[R, K]`` and ceilings ``[R]`` of what was seen, drawn again."""
        resamples, seed = whole("resamples", resamples, 10, 100_000), whole("seed", seed, 0)
        if self._seen is None:
            raise InputError("an interval needs a curve that was fitted; call fit first")
        drawn = self._seen.resampled(self.value, resamples, np.random.default_rng(seed))
        return fit_family(drawn, self.family, self._seen.num_questions, self._fitted_fixed)

    def _bounds(self, tail: float) -> Alike | Unknown | None:
        """Of outcomes that are all the same, or that are of too few questions; None of others."""
        seen = self._seen
        if seen is None or seen.all_same is None:
            return Unknown(self._fitted_fixed) if self.too_few else None
        if seen.num_questions is None:
            raise unknown_questions()
        return Alike(seen.all_same, seen.num_questions, seen.num_points, seen.num_draws, self._fitted_fixed, tail)

    def _with(self, f_max: np.ndarray, parameters: np.ndarray) -> Self:
        """Many curves in one."""
        raise NotImplementedError


def too_many(eps: np.ndarray) -> InputError:
    """The error for a threshold that is not reached within what can be counted."""
    return InputError(
        f"eps is {float(np.min(eps)):g}, and more than 2^53 samples gain more than that; set a larger eps"
    )


class TTSPM(Curve):
    """The paper's: one p for all questions. See the module.

    Attributes:
        p: chance that a sample is right, or that a round puts a wrong answer right.

    Args:
        kind: see `Curve`.
        f_max: None for 1, and for what `fit` is to find; alone, without p, it is the ceiling that `fit` keeps.
        p: None for one that is yet to be fitted.

    Raises InputError for a share that is not above 0 and at most 1.
    """

    names = given = ("p",)
    family = SINGLE

    def __init__(self, kind: Kind = "parallel", f_max: Any = None, p: Any = None) -> None:
        super().__init__(kind, f_max, {"p": p})
        self._p = share("p", LEAST if p is None else p)

    @property
    def p(self) -> Any:
        """See the class."""
        return given_back(self._p)

    def _log_left(self, n: np.ndarray) -> np.ndarray:
        return log_unsolved(self._p, n)

    def _next(self, n: np.ndarray) -> np.ndarray:
        return self._p

    def _first_guess(self, eps: np.ndarray) -> np.ndarray:
        first = self._f_max * self._p
        with np.errstate(divide="ignore", invalid="ignore"):
            # Where p is 1, whatever is left is solved by the first sample.
            wanted = np.where(self._p == 1, 1.0, np.ceil((np.log(eps) - np.log(first)) / np.log1p(-self._p)))
        n = np.where(first <= eps, 0.0, np.maximum(wanted, 1.0))
        if n.max(initial=0.0) > LARGEST_INT:
            raise too_many(eps)
        return n

    def _take(self, parameters: np.ndarray) -> None:
        self._p = np.asarray(parameters[0])

    def _with(self, f_max: np.ndarray, parameters: np.ndarray) -> Self:
        return type(self)(self.kind, f_max, parameters[..., 0])


class BetaTTSPM(Curve):
    """Questions that differ: p ~ Beta(a, b). An extension of ours; see the module.

    Attributes:
        a: exponent of the tail.
        b: the larger, the more of the questions are hard.
        mean: a / (a + b), of p over the questions that can be solved.
        rho: 1 / (a + b + 1), how much samples of one question go together (see `effective_samples`).

    Args:
        f_max: see `TTSPM`.
        a, b: both, or neither for one that is yet to be fitted; above 0 and at most 1e15.
        kind: see `Curve`.

    Raises InputError for values that they may not have.
    """

    names, given = ("mean", "a", "b", "rho"), ("a", "b")
    family = MIXED

    def __init__(self, f_max: Any = None, a: Any = None, b: Any = None, kind: Kind = "parallel") -> None:
        super().__init__(kind, f_max, {"a": a, "b": b})
        self._a = positive("a", 1.0 if a is None else a, MOST_SHAPE)
        self._b = positive("b", 1.0 if b is None else b, MOST_SHAPE)

    @property
    def a(self) -> Any:
        """See the class."""
        return given_back(self._a)

    @property
    def b(self) -> Any:
        """See the class."""
        return given_back(self._b)

    @property
    def mean(self) -> Any:
        """See the class."""
        return given_back(self._a / (self._a + self._b))

    @property
    def rho(self) -> Any:
        """See the class."""
        return given_back(1 / (self._a + self._b + 1))

    def after(self, failures: Any) -> "BetaTTSPM":
        """The curve of a question that so many samples did not solve: by Bayes, b has grown, and the ceiling has come down."""
        self._check()
        failures = count("failures", failures)
        left = self._f_max * np.exp(self._log_left(failures))
        return BetaTTSPM(np.maximum(left / ((1 - self._f_max) + left), LEAST), self._a, self._b + failures, self.kind)

    def _log_left(self, n: np.ndarray) -> np.ndarray:
        return log_unsolved_mixed(self._a, self._b, n)

    def _next(self, n: np.ndarray) -> np.ndarray:
        return self._a / (self._a + self._b + n)

    def _take(self, parameters: np.ndarray) -> None:
        self._a, self._b = np.asarray(parameters[1]), np.asarray(parameters[2])

    def _with(self, f_max: np.ndarray, parameters: np.ndarray) -> Self:
        return type(self)(f_max, parameters[..., 1], parameters[..., 2], self.kind)
