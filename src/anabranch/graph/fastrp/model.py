"""FastRP: vectors of nodes by iterated sparse random projection, without training.

"Fast and Accurate Network Embeddings via Very Sparse Random Projection", Chen, Sultan, Tian, Chen and Skiena, CIKM 2019, arXiv 1908.11512.
Written from the published code's behaviour and the paper's abstract.

    P = D^-1 A                           the transition matrix (D: degrees; rows of nodes without edges are 0)
    L = diag(d_j^beta)                   beta <= 0 damps hubs
    R [N, D], very sparse, keyed         `anabranch.graph.projection`, scaled by 1 / sqrt(dim)
    N_1 = P (L R), N_k = P N_(k-1)       right to left: the similarity P^k L of all pairs is projected, never formed
    N = sum_k w_k N_k / |N_k|            each row to length 1 first, if ``normalize``
    N = (N - mean) / deviation           by columns, if ``standardize``

q products with M edges and dim columns. Columns do not know of each other before rows are normalised, so they are computed in chunks.

Departures: s is sqrt(N) rounded to a power of 2, so that a growing graph keeps its vectors (pass s to fix it for good). L uses d, not
d / sum d, a constant factor. A degree of 0, which L sees in directed graphs alone, counts as the smallest that is not. ``direction``
chooses which edges of a directed graph count. With negative weights degrees are sums of absolute values. From Neo4j's variant:
``self_weight`` adds w_0 L R / |L R|, ``feature_ratio`` gives a share of R's columns to random combinations of the nodes' features.
"""
# Shapes: N nodes, M stored edges, D dim, C columns of a chunk, F features

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import numba as nb
import numpy as np

from anabranch.errors import InputError
from anabranch.graph.coerce import as_graph
from anabranch.graph.estimator import Estimator
from anabranch.graph.evaluate import HeldOut
from anabranch.graph.fastrp.check import check, check_weights
from anabranch.graph.fastrp.start import (
    DENSE_BELOW,
    Projection,
    inverse_power,
    operator_of,
    projection_of,
    sparsity,
    turned,
)
from anabranch.graph.products import NumbaProducts, Operator, Products, ScipyProducts, Threads, TorchProducts, threads
from anabranch.graph.projection import BLOCK, keys_of
from anabranch.graph.vectors import add_rows, column_moments, scale_rows, shift_columns
from anabranch.machine import usable_cores

if TYPE_CHECKING:
    from anabranch.graph.fastrp.tuning import Tuning

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


@dataclass(frozen=True)
class _Setup:
    """A graph made ready: the matrix, its diagonal on the right (in its values already), and L R."""

    operator: Operator
    right_N: np.ndarray | None
    start: Projection


class FastRP(Estimator):
    """Vectors of nodes by FastRP, in the form of a scikit-learn estimator.

    Args:
        dim: D. The published code's default is 128, its experiments use 512.
        weights: w_1 ... w_q; q is their number. The default is near the published optimum of BlogCatalog.
        beta: exponent of degrees in L; searched in [-1, 0] by the authors.
        normalize: rows of each N_k to length 1 before they are added.
        projection: ``sparse`` or ``gaussian``.
        s: a sparse entry is not 0 with probability 1 / s; None for sqrt(N), rounded to a power of 2. At least 1.
        matrix: ``transition`` D^-1 A, ``adjacency`` A, or ``symmetric`` D^-1/2 A D^-1/2.
        standardize: columns to mean 0 and variance 1; one that is constant becomes 0.
        concatenate: N_k (of weights that are not 0, times them) side by side instead of added: [N, D q].
        features: [N, F] numbers, dense or scipy sparse, known of the nodes; needs ``feature_ratio``.
        feature_ratio: share of the D columns that come from features, 0 to 1.
        self_weight: w_0, of each node's own row of L R (normalised); it lets nodes without edges differ.
        direction: of directed graphs: a row sums over the targets of a node's edges (``out``), their sources (``in``), or ``both``.
        allow_negative: take negative edge weights.
        seed: of R. Row i depends on it and on the node's outside name (number i without names).
        dtype: ``float32`` or ``float64``.
        backend: ``numba``, ``scipy`` (one thread) or ``torch``; the same numbers up to rounding.
        device: of torch.
        chunk: columns computed at a time, rounded up to a multiple of 32; None for about 64 MB of scratch. Changes no bit of the result.
        threads: None for the usable cores, or fewer where NUMBA_NUM_THREADS says so. Changes no bit of the result.
        keep_powers: let `fit` keep N_1 ... N_q, which `transform` needs.

    Attributes:
        embedding_: [N, D], after `fit`.
        powers_: `Powers`, after `fit` with ``keep_powers``.

    Raises InputError for a value that is not allowed.
    """

    def __init__(
        self,
        dim: int = 256,
        weights: Sequence[float] = (0, 0, 1, 6),
        beta: float = -0.65,
        normalize: bool = True,
        *,
        projection: Literal["sparse", "gaussian"] = "sparse",
        s: float | None = None,
        matrix: Literal["transition", "adjacency", "symmetric"] = "transition",
        standardize: bool = True,
        concatenate: bool = False,
        features: Any = None,
        feature_ratio: float = 0.0,
        self_weight: float = 0.0,
        direction: Literal["out", "in", "both"] = "out",
        allow_negative: bool = False,
        seed: int = 0,
        dtype: Literal["float32", "float64"] = "float32",
        backend: Literal["numba", "scipy", "torch"] = "numba",
        device: str = "cpu",
        chunk: int | None = None,
        threads: int | None = None,
        keep_powers: bool = False,
    ) -> None:
        self.dim, self.weights, self.beta, self.normalize = dim, weights, beta, normalize
        self.projection, self.s, self.matrix, self.standardize = projection, s, matrix, standardize
        self.concatenate, self.features, self.feature_ratio = concatenate, features, feature_ratio
        self.self_weight, self.direction, self.allow_negative = self_weight, direction, allow_negative
        self.seed, self.dtype, self.backend, self.device = seed, dtype, backend, device
        self.chunk, self.threads, self.keep_powers = chunk, threads, keep_powers
        check(self)

    # What it is for

    def fit(self, graph: Any, y: Any = None) -> Self:
        """Embed the nodes of a graph (whatever `as_graph` takes) into `embedding_`. ``y`` is not used.

        Raises InputError for a graph or features that do not fit.
        """
        setup = self._prepare(graph)
        with threads(self._num_threads) as pool:
            if self.keep_powers:
                self.powers_ = self._powers(setup, pool, len(self.weights))
                found = self._combine(self.powers_, tuple(self.weights), self.self_weight, pool)
            else:
                found = self._embed(setup, pool)
            self._mean_D, self._factor_D = self._standardize(found, pool)
        self.embedding_, self._setup = found, setup if self.keep_powers else None
        return self

    def fit_transform(self, graph: Any, y: Any = None) -> np.ndarray:
        """`fit`, and the vectors [N, D]."""
        return self.fit(graph).embedding_

    def transform(self, rows: Any, *, names: Iterable[Any] | None = None) -> np.ndarray:
        """Vectors of new nodes from their edges to the nodes of the fitted graph, which stay as they are.

        They are those that fitting the larger graph would give, up to the columns' means and deviations, if no old node has an edge
        to a new one and ``s`` is given; otherwise an approximation of them.

        Args:
            rows: [R, N] weights of edges from new nodes to old ones (in the direction that rows sum over), scipy sparse or dense.
            names: of the new nodes, for ``self_weight``; without, they are numbers N, N + 1, ...

        Raises InputError if `fit` has not kept the powers, features are used, or rows do not fit.
        """
        if getattr(self, "_setup", None) is None or not hasattr(self, "powers_"):
            raise InputError("transform needs what fit keeps with keep_powers=True; set it and fit again")
        setup = cast(_Setup, self._setup)
        if self.feature_ratio:
            raise InputError("transform knows no features of new nodes; fit with feature_ratio=0")
        matrix, left_R = self._new_rows(rows, setup)
        powers = [
            left_R[:, None] * (matrix @ before) for before in (self.powers_.start_ND, *self.powers_.power_KND[:-1])
        ]
        start = np.zeros_like(powers[0])
        if self.self_weight:
            old = len(setup.start.key_N)
            key_R = np.arange(old, old + len(start), dtype=np.uint64) if names is None else keys_of(names)
            if len(key_R) != len(start):
                raise InputError(f"there are {len(start):,} rows and {len(key_R):,} names; give one per row")
            start = setup.start.random(key_R, 0, self.dim)
        with threads(1) as pool:
            found = self._combine(Powers(start, tuple(powers)), tuple(self.weights), self.self_weight, pool)
            if self.standardize:
                shift_columns(found, self._mean_D, self._factor_D, pool)
        return found

    def powers(self, graph: Any, order: int | None = None) -> Powers:
        """L R and N_1 ... N_q of a graph, for `combine`; they do not depend on weights. ``order`` is q, by default that of ``weights``."""
        count = len(self.weights) if order is None else order
        if count < 1:
            raise InputError(f"order is {order}; it must be at least 1")
        with threads(self._num_threads) as pool:
            return self._powers(self._prepare(graph), pool, count)

    def combine(self, powers: Powers, weights: Sequence[float] | None = None) -> np.ndarray:
        """Vectors of these powers with other weights (default: its own), which must not be more than there are powers."""
        chosen = tuple(self.weights if weights is None else weights)
        check_weights(chosen, self.self_weight)
        if len(chosen) > len(powers.power_KND):
            raise InputError(
                f"there are {len(chosen)} weights and {len(powers.power_KND)} powers; call powers(graph, order=...)"
            )
        with threads(self._num_threads) as pool:
            found = self._combine(powers, chosen, self.self_weight, pool)
            self._standardize(found, pool)
        return found

    def peak_bytes(self, num_nodes: int, num_stored_edges: int, is_weighted: bool = False) -> int:
        """Bytes that `fit` holds at once beside the graph, its result included.

        b N (D Z + 2 C) for numbers of b bytes, Z arrays of vectors and two chunks of C columns; Z is the number of weights that are not 0
        (and ``self_weight``) if rows are normalised or kept side by side, 1 otherwise, q + 2 with ``keep_powers``. Then R's entries of a
        chunk, weights of edges in the working type, and per node 40 bytes.
        """
        b = np.dtype(self.dtype).itemsize
        parts = sum(weight != 0 for weight in self.weights)
        vectors = (parts if self.normalize or self.concatenate else min(parts, 1)) + (self.self_weight != 0)
        vectors = len(self.weights) + 1 + (parts if self.concatenate else 1) + 1 if self.keep_powers else vectors
        chunk = self._chunk_columns(num_nodes)
        s = sparsity(num_nodes) if self.s is None else self.s
        random = num_nodes * chunk * (2 / s if self.projection == "sparse" and s >= DENSE_BELOW else b)
        copied = (is_weighted and b != 4) or self.matrix == "symmetric"
        edges = num_stored_edges * b if copied else 0
        return int(b * num_nodes * (self.dim * vectors + 2 * chunk) + random + edges + 40 * num_nodes)

    # Steps

    def _prepare(self, graph: Any) -> _Setup:
        found = as_graph(graph, allow_negative=self.allow_negative)
        rows = turned(found, self.direction)
        start = projection_of(
            rows, found.names, self.projection, self.s, self.seed, self.dim,
            self.beta, self.features, self._num_feature_columns, self.dtype,
        )  # fmt: skip
        return _Setup(*operator_of(rows, self.matrix, self.dtype), start)

    def _run(self, setup: _Setup, pool: Threads, targets: dict[int, tuple[np.ndarray, float, bool]]) -> None:
        """Add w_k N_k to targets[k] = (array, w_k, whether it is the first there), chunk by chunk of columns."""
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

    def _embed(self, setup: _Setup, pool: Threads) -> np.ndarray:
        """Vectors before columns are standardised, without keeping powers."""
        count, orders = setup.operator.num_rows, [k for k, weight in enumerate(self.weights, 1) if weight]
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
        self, parts: dict[int, np.ndarray], weights: Sequence[float], own: float, pool: Threads, summed: bool = False
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

    def _powers(self, setup: _Setup, pool: Threads, count: int) -> Powers:
        arrays = [np.empty((setup.operator.num_rows, self.dim), self.dtype) for _ in range(count + 1)]
        self._run(setup, pool, {k: (array, 1.0, True) for k, array in enumerate(arrays)})
        return Powers(arrays[0], tuple(arrays[1:]))

    def _combine(self, powers: Powers, weights: Sequence[float], own: float, pool: Threads) -> np.ndarray:
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

    def _standardize(self, out_ND: np.ndarray, pool: Threads) -> tuple[np.ndarray, np.ndarray]:
        """In place; mean and factor of columns. Raises InputError if values have left the range of the type."""
        mean_D, factor_D = column_moments(out_ND, pool)
        if not np.isfinite(mean_D).all():
            raise InputError(
                f"vectors leave the range of {self.dtype}; use matrix='transition', dtype='float64', or smaller edge weights"
            )
        if self.standardize:
            shift_columns(out_ND, mean_D, factor_D, pool)
        return mean_D, factor_D

    def _products(self, operator: Operator, pool: Threads) -> Products:
        if self.backend == "numba":
            return NumbaProducts(operator, pool)
        return ScipyProducts(operator) if self.backend == "scipy" else TorchProducts(operator, self.device)

    def _new_rows(self, rows: Any, setup: _Setup) -> tuple[Any, np.ndarray]:
        """diag(left) and A diag(right) of new nodes."""
        from scipy.sparse import csr_array

        try:
            matrix = csr_array(rows, dtype=np.float64, copy=True)
        except (TypeError, ValueError) as error:
            raise InputError(f"rows are numbers, [new nodes, {len(setup.start.key_N)}]: {error}") from None
        if matrix.ndim != 2 or matrix.shape[1] != len(setup.start.key_N):
            raise InputError(f"rows have the shape {matrix.shape}; it must be [new nodes, {len(setup.start.key_N)}]")
        matrix.sum_duplicates()
        if not np.isfinite(matrix.data).all() or (not self.allow_negative and (matrix.data < 0).any()):
            raise InputError("weights of new edges must be finite and not negative (allow_negative takes those)")
        degree_R = abs(matrix).sum(1)
        power = {"transition": 1.0, "symmetric": 0.5, "adjacency": 0.0}[self.matrix]
        left_R = np.ones(len(degree_R)) if not power else inverse_power(degree_R, power)
        if setup.right_N is not None:
            matrix.data *= setup.right_N[matrix.indices]
        return matrix.astype(self.dtype), left_R.astype(self.dtype)

    def tune(
        self, graph: Any, labels: Any = None, *, edges: HeldOut | None = None, trials: int = 20, **options: Any
    ) -> "Tuning":
        """Search weights and beta for this graph; see `anabranch.graph.fastrp.tuning.tune`."""
        from anabranch.graph.fastrp.tuning import tune

        return tune(self, graph, labels, edges=edges, trials=trials, **options)

    # Sizes and checks

    @property
    def _num_feature_columns(self) -> int:
        return round(self.feature_ratio * self.dim)

    @property
    def _num_threads(self) -> int:
        # Asking numba would start its own threads, and with them set how many torch uses in this process.
        return self.threads or min(usable_cores(), nb.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]

    def _weight(self, order: int) -> float:
        return self.self_weight if order == 0 else self.weights[order - 1]

    def _chunk_columns(self, num_nodes: int) -> int:
        """Columns of a chunk, a multiple of `BLOCK`, no more than there are."""
        wanted = self.chunk
        if wanted is None:
            fits = SCRATCH_BYTES // (2 * np.dtype(self.dtype).itemsize * max(num_nodes, 1))
            wanted = max(fits // BLOCK, self._num_threads) * BLOCK
        return min(-(-wanted // BLOCK), -(-self.dim // BLOCK)) * BLOCK
