"""Statistics of SRP (see `anabranch.routing.consistency`): intervals over sequences, and how alike domains are.

The paper (arXiv 2505.16056) gives basic bootstrap intervals over sequences, and correlates the SRP of experts between domains.
"""
# Shapes: L layers, E destinations, M domains, S sequences (pieces), R resamples, W window + 1

from collections.abc import Iterable
from typing import Literal

import numpy as np

from anabranch.errors import DataError
from anabranch.routing.consistency import CELLS, Routes, Source, layers_of, srp_of_counts, window_counts, window_sums

RESAMPLES = 1000
# Of draws held at once.
DRAWS = 1 << 22


def srp_interval(
    source: Source | Iterable[Routes],
    window: int,
    group: Literal["layer", "model"] = "layer",
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> np.ndarray:
    """``[L, 2]``, or ``[2]`` of the model: basic bootstrap interval of 95% of `srp`, [2 est - q97.5, 2 est - q2.5], over sequences.

    Sequences (pieces) are drawn with replacement, whole; of a model the same in all layers. Sequences shorter than ``window`` count for
    nothing. Intervals are nan where there is a single sequence, or none.

    Raises DataError where layers of a model routed different sequences, and as `routes`.
    """
    counts = [sequence_counts(of, window) for of in layers_of(source)]
    if not counts:
        raise DataError("there are no routed layers to measure")
    if group == "layer":
        return np.array([_interval(count_SW, resamples, seed) for count_SW in counts])
    if len({len(count_SW) for count_SW in counts}) != 1:
        raise DataError("layers routed different sequences, so no sequences can be drawn for all of them")
    return _interval(np.sum(counts, 0), resamples, seed)


def sequence_counts(of: Routes, window: int) -> np.ndarray:
    """int64 ``[S, window + 1]``: of each sequence, how many (destination, window) pairs have 0, 1, ... ``window`` activations."""
    num_sequences, num_tokens, _ = of.index_STK.shape
    num_starts = max(num_tokens - window + 1, 0)
    count_SW = np.zeros((num_sequences, window + 1), np.int64)
    step = max(1, CELLS // max(num_tokens * of.num_destinations, 1))
    for first in range(0, num_sequences if num_starts else 0, step):
        part = slice(first, first + step)
        sum_PSE = window_sums(of.index_STK[part], of.num_destinations, window)
        place_PS = np.broadcast_to(np.arange(sum_PSE.shape[1]), sum_PSE.shape[:2])
        whole_PS = np.arange(num_starts)[:, None] + window <= of.length_S[part]
        cell_XE = sum_PSE[whole_PS] + place_PS[whole_PS][:, None] * (window + 1)
        count = np.bincount(cell_XE.reshape(-1), minlength=sum_PSE.shape[1] * (window + 1))
        count_SW[part] = count.reshape(-1, window + 1)
    return count_SW


def _interval(count_SW: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    count_SW = count_SW[count_SW.any(1)]
    num_sequences = len(count_SW)
    if num_sequences < 2:
        return np.full(2, np.nan)
    generator = np.random.default_rng(seed)
    values: list[np.ndarray] = []
    step = max(1, DRAWS // num_sequences)
    for first in range(0, resamples, step):
        size = min(step, resamples - first)
        times_RS = generator.multinomial(num_sequences, np.full(num_sequences, 1 / num_sequences), size=size)
        values.append(srp_of_counts(times_RS @ count_SW).value)
    estimate = float(srp_of_counts(count_SW.sum(0)).value)
    return 2 * estimate - np.quantile(np.concatenate(values), [0.975, 0.025])


def domain_correlation(source: Source | Iterable[Routes], window: int) -> tuple[list[str], np.ndarray]:
    """Names of the domains, sorted, and ``[M, M]``: Pearson correlation between two domains of the SRP of all experts of all layers.

    Near 1, what is consistent in one domain is so in the other. An expert that one of the two never chooses has an SRP of 0 there. nan
    where all experts of a domain have the same SRP, as where no sequence of it has ``window`` tokens.
    """
    layers = list(layers_of(source))
    names = sorted({name for of in layers for name in of.domain_S if name is not None})
    value_MX = np.zeros((len(names), sum(of.num_destinations for of in layers)))
    start = 0
    for of in layers:
        here = [names.index(name) for name in sorted({name for name in of.domain_S if name is not None})]
        value_ME = srp_of_counts(window_counts(of, window, by="domain")).value
        value_MX[here, start : start + of.num_destinations] = value_ME
        start += of.num_destinations
    centred_MX = value_MX - value_MX.mean(1, keepdims=True)
    length_M = np.sqrt(np.square(centred_MX).sum(1))
    scale_MM = np.outer(length_M, length_M)
    product_MM = centred_MX @ centred_MX.T
    return names, np.divide(product_MM, scale_MM, out=np.full_like(product_MM, np.nan), where=scale_MM > 1e-12)
