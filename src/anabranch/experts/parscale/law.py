"""The parallel scaling law: how much P streams are worth in parameters, fitted to losses.

    L(N, P) = (A / (N (k ln P + 1)))^alpha + E                          N non-embedding parameters, L in nats per token

so P streams do what k ln P + 1 times the parameters do. Fitted as the paper does: Huber loss (delta 1e-3) of the difference of log
losses, L-BFGS-B from a grid of starts. Needs scipy.
"""
# Shapes: S points, G parameters of the law (log A, alpha, log E, k)

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anabranch.errors import ConfigError
from anabranch.extras import require

__all__ = ["PAPER_LOSSES", "Law", "diversity", "fit_parallel_law"]

DELTA = 1e-3
GRID = {"log_a": (5.0, 15.0, 25.0), "alpha": (0.1, 0.3), "log_e": (-0.5, 0.5), "k": (0.1, 0.5)}
_BOUNDS = ((0.0, 60.0), (1e-3, 5.0), (-10.0, 5.0), (0.0, 20.0))

# Final losses after 42B tokens, published with the paper's code, of models that have this many non-embedding parameters at P = 1, by
# width; all have 36 layers, 16 heads, 2 key-value heads, and prefixes of 48 ...
_SIZES = {
    896: 535_813_376,
    1024: 693_753_856,
    1280: 1_088_376_320,
    1536: 1_571_472_384,
    2048: 2_774_773_760,
    2560: 4_353_203_200,
}
_LOSSES: dict[str, dict[int, tuple[float, ...]]] = {
    "stack": {
        1: (1.1722, 1.1496, 1.1131, 1.0817, 1.0451, 1.0213),
        2: (1.1507, 1.1262, 1.0940, 1.0623, 1.0244, 1.0025),
        4: (1.1354, 1.1124, 1.0808, 1.0490, 1.0126, 0.9906),
        8: (1.1231, 1.0997, 1.0688, 1.0383, 1.0016, 0.9794),
    },
    "pile": {
        1: (2.1113, 2.0671, 2.0027, 1.9539, 1.8876, 1.8451),
        2: (2.0772, 2.0363, 1.9730, 1.9266, 1.8610, 1.8137),
        4: (2.0544, 2.0128, 1.9509, 1.9040, 1.8394, 1.7938),
        8: (2.0364, 1.9933, 1.9318, 1.8856, 1.8218, 1.7772),
    },
}


def _added(dim: int, streams: int) -> int:
    """Parameters of prefixes and gate of a model of the table."""
    prefix = 2 * 36 * 2 * 48 * (dim // 16) * streams
    return 0 if streams == 1 else prefix + (streams * dim + 1) * dim + (dim + 1) * streams


# ... as points (N with prefixes and gate, P, loss): "stack" is Stack-V2 Python.
PAPER_LOSSES: dict[str, list[tuple[float, int, float]]] = {
    corpus: [
        (float(size + _added(dim, streams)), streams, loss)
        for streams, losses in rows.items()
        for (dim, size), loss in zip(_SIZES.items(), losses, strict=True)
    ]
    for corpus, rows in _LOSSES.items()
}


@dataclass(frozen=True)
class Law:
    """A fitted law.

    Attributes:
        e: E, the loss that remains, in nats.
        a: A.
        alpha: exponent.
        k: gain per ln P.
        r2: share of the variance of losses that it explains.
        intervals: 95% bootstrap interval of each, by name; empty if none was asked for.
    """

    e: float
    a: float
    alpha: float
    k: float
    r2: float
    intervals: dict[str, tuple[float, float]]

    def loss(self, parameters: float, num_streams: int) -> float:
        """L(N, P) in nats per token."""
        return (self.a / self.equivalent_params(parameters, num_streams)) ** self.alpha + self.e

    def equivalent_params(self, parameters: float, num_streams: int) -> float:
        """Parameters of the plain model of the same loss: N (k ln P + 1)."""
        return parameters * (self.k * math.log(num_streams) + 1)


def fit_parallel_law(
    points: Sequence[tuple[float, int, float]], *, bootstrap: int = 0, delta: float = DELTA, seed: int = 0
) -> Law:
    """Fit the law to points ``(N, P, loss in nats)``.

    Args:
        points: at least five different ones, of at least two sizes and two numbers of streams.
        bootstrap: how often to fit resampled points, for intervals.
        delta: of the Huber loss, in log loss.
        seed: of the resampling.

    Raises:
        ConfigError: too few points, or a number that is not positive.
        BackendError: scipy is not installed.
    """
    data_S3 = np.asarray(points, dtype=np.float64).reshape(-1, 3)
    _check(data_S3, bootstrap)
    starts = [np.array(start) for start in itertools.product(*GRID.values())]
    best_G = min((_minimise(data_S3, start_G, delta) for start_G in starts), key=lambda found: found[0])[1]
    intervals = {}
    if bootstrap:
        drawn = _resample(data_S3, bootstrap, np.random.default_rng(seed))
        fits = np.array([_readable(_minimise(sample_S3, best_G, delta)[1]) for sample_S3 in drawn])
        low, high = np.quantile(fits, [0.025, 0.975], axis=0)
        names = ("e", "a", "alpha", "k")
        intervals = {name: (float(low[i]), float(high[i])) for i, name in enumerate(names)}
    loss_S = data_S3[:, 2]
    residual_S = loss_S - np.exp(_log_loss(best_G, data_S3))
    r2 = 1 - float((residual_S**2).sum() / ((loss_S - loss_S.mean()) ** 2).sum())
    e, a, alpha, k = _readable(best_G)
    return Law(e, a, alpha, k, r2, intervals)


def diversity(num_streams: int, correlation: float, alpha: float) -> float:
    """DIVERSITY = ((P - 1) rho + 1)^(-1 / alpha) of streams whose residuals correlate by rho.

    In theory P streams are worth N P^(1 / alpha) DIVERSITY parameters: N with rho = 1, and with rho = 0 N P^(1 / alpha).
    """
    return ((num_streams - 1) * correlation + 1) ** (-1 / alpha)


def _check(data_S3: np.ndarray, bootstrap: int) -> None:
    if bootstrap < 0:
        raise ConfigError(f"bootstrap is {bootstrap}; it must be at least 0")
    if not (np.isfinite(data_S3).all() and (data_S3 > 0).all() and (data_S3[:, 1] >= 1).all()):
        raise ConfigError("every point must have N > 0, P >= 1 and a loss > 0, all finite")
    sizes, streams = len(np.unique(data_S3[:, 0])), len(np.unique(data_S3[:, 1]))
    different = len(np.unique(data_S3[:, :2], axis=0))
    if different < 5 or sizes < 2 or streams < 2:
        raise ConfigError(
            f"there are {different} different points of {sizes} sizes and {streams} numbers of streams; the law has four parameters "
            "and needs 5 points, 2 sizes and 2 numbers of streams"
        )


def _resample(data_S3: np.ndarray, count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Bootstrap samples, without those of too few different points to fit the law to."""
    samples: list[np.ndarray] = []
    while len(samples) < count:
        sample_S3 = data_S3[rng.integers(len(data_S3), size=len(data_S3))]
        sizes, streams = len(np.unique(sample_S3[:, 0])), len(np.unique(sample_S3[:, 1]))
        if sizes >= 2 and streams >= 2 and len(np.unique(sample_S3[:, :2], axis=0)) >= 4:
            samples.append(sample_S3)
    return samples


def _log_loss(value_G: np.ndarray, data_S3: np.ndarray) -> np.ndarray:
    log_a, alpha, log_e, k = value_G
    log_size_S = np.log(data_S3[:, 0]) + np.log(k * np.log(data_S3[:, 1]) + 1)
    return np.logaddexp(alpha * (log_a - log_size_S), log_e)


def _objective(value_G: np.ndarray, data_S3: np.ndarray, delta: float) -> tuple[float, np.ndarray]:
    """Summed Huber loss over delta^2 (so that L-BFGS-B's tolerances suit it), and its gradient."""
    log_a, alpha, log_e, k = value_G
    gain_S = k * np.log(data_S3[:, 1]) + 1
    distance_S = log_a - np.log(data_S3[:, 0]) - np.log(gain_S)
    log_loss_S = np.logaddexp(alpha * distance_S, log_e)
    # Of the reducible part in the loss.
    share_S = np.exp(alpha * distance_S - log_loss_S)
    residual_S = (log_loss_S - np.log(data_S3[:, 2])) / delta
    clipped_S = residual_S.clip(-1.0, 1.0)
    value = (np.where(np.abs(residual_S) <= 1, residual_S**2 / 2, np.abs(residual_S) - 0.5)).sum()
    slope_S = clipped_S / delta
    gradient_G = np.array(
        [
            (slope_S * share_S * alpha).sum(),
            (slope_S * share_S * distance_S).sum(),
            (slope_S * (1 - share_S)).sum(),
            (-slope_S * share_S * alpha * np.log(data_S3[:, 1]) / gain_S).sum(),
        ]
    )
    return float(value), gradient_G


def _minimise(data_S3: np.ndarray, start_G: np.ndarray, delta: float) -> tuple[float, np.ndarray]:
    optimize = _scipy()
    options = {"maxiter": 5000, "maxfun": 20000, "ftol": 1e-12, "gtol": 1e-8}
    found = optimize.minimize(
        _objective, start_G, args=(data_S3, delta), jac=True, method="L-BFGS-B", bounds=_BOUNDS, options=options
    )
    return float(found.fun), found.x


def _readable(value_G: np.ndarray) -> tuple[float, float, float, float]:
    """(E, A, alpha, k)."""
    log_a, alpha, log_e, k = (float(value) for value in value_G)
    return math.exp(log_e), math.exp(log_a), alpha, k


def _scipy() -> Any:
    require("laws", by="fitting a law")
    from scipy import optimize

    return optimize
