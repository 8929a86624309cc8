"""The steps from a graph to vectors: products chunk by chunk of columns, sums of their results, columns standardised."""
# Shapes: N nodes, D dim, C columns of a chunk

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np

from anabranch.errors import InputError
from anabranch.graph.coerce import as_graph
from anabranch.graph.estimator import Estimator
from anabranch.graph.fastrp.start import Setup, operator_of, projection_of, turned
from anabranch.graph.products import NumbaProducts, Operator, Products, ScipyProducts, TorchProducts
from anabranch.graph.projection import BLOCK
from anabranch.graph.vectors import add_rows, column_moments, scale_rows, shift_columns
from anabranch.graph.workers import Workers, num_workers

# Of chunks, where ``chunk`` is not given.
SCRATCH_BYTES = 64 << 20


@dataclass(frozen=True)
class Powers:
    """What `FastRP.combine` makes vectors of, for any weights.

    Attributes:
        start_ND: L R.
        power_KND: N_1, N_2, ..., not normalised, a tuple of [N, D].
    """

    start_ND: np.ndarray
    power_KND: tuple[np.ndarray, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return self.start_ND.nbytes + sum(power.nbytes for power in self.power_KND)


class Steps(Estimator):
    """Base of `FastRP`; its arguments are told there."""

    _OF_FIT = (
        "dim",
        "weights",
        "beta",
        "normalize",
        "projection",
        "s",
        "matrix",
        "standardize",
        "concatenate",
        "feature_ratio",
        "self_weight",
        "direction",
        "allow_negative",
        "seed",
        "dtype",
    )

    dim: int
    weights: Sequence[float]
    beta: float
    normalize: bool
    projection: Literal["sparse", "gaussian"]
    s: float | None
    matrix: Literal["transition", "adjacency", "symmetric"]
    standardize: bool
    concatenate: bool
    features: Any
    feature_ratio: float
    self_weight: float
    direction: Literal["out", "in", "both"]
    allow_negative: bool
    seed: int
    dtype: Literal["float32", "float64"]
    backend: Literal["numba", "scipy", "torch"]
    device: str
    chunk: int | None
    threads: int | None
    workers: int | None

    def _prepare(self, graph: Any) -> Setup:
        found = as_graph(graph, allow_negative=self.allow_negative)
        rows = turned(found, self.direction)
        start = projection_of(
            rows,
            found.names,
            self.projection,
            self.s,
            self.seed,
            self.dim,
            self.beta,
            self.features,
            self._num_feature_columns,
            self.dtype,
        )
        return Setup(*operator_of(rows, self.matrix, self.dtype), start, rows.is_directed)

    def _run(self, setup: Setup, pool: Workers, targets: dict[int, tuple[np.ndarray, float, bool]]) -> None:
        """Add w_k N_k to targets[k] = (array, w_k, whether it is the first there), chunk by chunk of columns."""
        assert setup.operator is not None
        products, step = self._products(setup.operator, pool), self._chunk_columns(setup.operator.num_rows)
        for first in range(0, self.dim, step):
            last = min(first + step, self.dim)
            rows = setup.start.sparse_columns(first, last)
            if 0 in targets:
                targets[0][0][:, first:last] = setup.start.columns(first, last)
            if max(targets) == 0:
                continue
            if rows is None:
                chunk = products.multiply(products.load(setup.start.columns(first, last)))
            else:
                chunk = products.first(rows, setup.start.scale_N)
            # Its memory is needed.
            rows = None
            for order in range(1, max(targets) + 1):
                if order > 1:
                    chunk = products.multiply(chunk)
                if order in targets:
                    out_ND, weight, is_new = targets[order]
                    products.add_to(chunk, out_ND, first, weight, is_new)

    def _embed(self, setup: Setup, pool: Workers) -> np.ndarray:
        """Vectors before columns are standardised, without keeping powers."""
        count, orders = setup.num_nodes, [k for k, weight in enumerate(self.weights, 1) if weight]
        if self.concatenate:
            whole = np.empty((count, self.dim * (len(orders) + bool(self.self_weight))), self.dtype)
            every = ([0] if self.self_weight else []) + orders
            parts = {k: whole[:, place * self.dim : (place + 1) * self.dim] for place, k in enumerate(every)}
            self._run(setup, pool, {k: (part, 1.0, True) for k, part in parts.items()})
            for k, part in parts.items():
                scale_rows(part, self._weight(k), self.normalize or k == 0, pool)
            return whole
        if self.normalize:
            found = {k: np.empty((count, self.dim), self.dtype) for k in orders}
            targets = {k: (part, 1.0, True) for k, part in found.items()}
        else:
            total = np.empty((count, self.dim), self.dtype)
            found = {orders[-1]: total} if orders else {}
            targets = {k: (total, float(self.weights[k - 1]), k == orders[0]) for k in orders}
        if self.self_weight:
            found[0] = np.empty((count, self.dim), self.dtype)
            targets[0] = (found[0], 1.0, True)
        self._run(setup, pool, targets)
        return self._sum(found, tuple(self.weights), self.self_weight, pool, summed=not self.normalize)

    def _sum(
        self, parts: dict[int, np.ndarray], weights: Sequence[float], own: float, pool: Workers, summed: bool = False
    ) -> np.ndarray:
        """sum_k w_k N_k (normalised), in the place of the first part; ``summed``: parts but 0 have their weights in them."""
        out = None
        for k in sorted(parts):
            part = parts.pop(k)
            weight = own if k == 0 else 1.0 if summed else weights[k - 1]
            if out is None:
                out = part
                scale_rows(out, weight, self.normalize or k == 0, pool)
            else:
                add_rows(out, part, weight, self.normalize or k == 0, pool)
        return cast(np.ndarray, out)

    def _powers(self, setup: Setup, pool: Workers, count: int) -> Powers:
        arrays = [np.empty((setup.num_nodes, self.dim), self.dtype) for _ in range(count + 1)]
        self._run(setup, pool, {k: (array, 1.0, True) for k, array in enumerate(arrays)})
        return Powers(arrays[0], tuple(arrays[1:]))

    def _combine(self, powers: Powers, weights: Sequence[float], own: float, pool: Workers) -> np.ndarray:
        """Vectors before columns are standardised."""
        parts = {k: powers.power_KND[k - 1] for k, weight in enumerate(weights, 1) if weight}
        if own:
            parts[0] = powers.start_ND
        if self.concatenate:
            out = np.concatenate([parts[k] for k in sorted(parts)], axis=1)
            for place, k in enumerate(sorted(parts)):
                part = out[:, place * self.dim : (place + 1) * self.dim]
                scale_rows(part, own if k == 0 else weights[k - 1], self.normalize or k == 0, pool)
            return out
        # The sum is made there.
        parts[min(parts)] = parts[min(parts)].copy()
        return self._sum(parts, weights, own, pool)

    def _standardize(self, out_ND: np.ndarray, pool: Workers) -> tuple[np.ndarray, np.ndarray]:
        """In place; mean and factor of columns. Raises InputError if values have left the range of the type."""
        mean_D, factor_D = column_moments(out_ND, pool)
        if not np.isfinite(mean_D).all():
            raise InputError(
                f"vectors leave the range of {self.dtype}; use matrix='transition', dtype='float64', or smaller edge weights"
            )
        if self.standardize:
            shift_columns(out_ND, mean_D, factor_D, pool)
        return mean_D, factor_D

    def _products(self, operator: Operator, pool: Workers) -> Products:
        if self.backend == "numba":
            return NumbaProducts(operator, pool)
        return ScipyProducts(operator) if self.backend == "scipy" else TorchProducts(operator, self.device)

    @property
    def _num_feature_columns(self) -> int:
        return round(self.feature_ratio * self.dim)

    @property
    def _num_workers(self) -> int:
        return num_workers(self.threads if self.workers is None else self.workers)

    def _weight(self, order: int) -> float:
        return self.self_weight if order == 0 else self.weights[order - 1]

    def _chunk_columns(self, num_nodes: int) -> int:
        """Columns of a chunk, a multiple of `BLOCK`, no more than there are."""
        wanted = self.chunk
        if wanted is None:
            fits = SCRATCH_BYTES // (2 * np.dtype(self.dtype).itemsize * max(num_nodes, 1))
            wanted = max(fits // BLOCK, self._num_workers) * BLOCK
        return min(-(-wanted // BLOCK), -(-self.dim // BLOCK)) * BLOCK
