"""What FastRP multiplies: a graph's matrix with its diagonals, and the columns of L R that the first product takes."""
# Shapes: N nodes, M stored edges, C columns of a chunk, F features

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from anabranch.errors import InputError
from anabranch.graph.masks import unmasked
from anabranch.graph.products import Operator
from anabranch.graph.projection import SparseProjection, gaussian_rows, keys_of, sparse_rows
from anabranch.graph.sparse import is_sparse, wide_rows
from anabranch.graph.store import Graph

# S at which rows are so full that a product with them made dense is quicker.
DENSE_BELOW = 4.0


@dataclass(frozen=True)
class Projection:
    """R: random columns by keys of nodes, then columns from features.

    Attributes:
        key_N: uint64.
        kind: ``sparse`` or ``gaussian``.
        s: of sparse ones.
        seed: of all.
        num_random: columns that are random.
        features: the rest; None where there are none.
        scale_N: the diagonal of L over sqrt(D), of the working type.
    """

    key_N: np.ndarray
    kind: str
    s: float
    seed: int
    num_random: int
    features: "Features | None"
    scale_N: np.ndarray

    def random(self, key_N: np.ndarray, first: int, last: int) -> np.ndarray:
        """Random columns, dense, entries of variance 1."""
        if self.kind == "gaussian":
            return gaussian_rows(key_N, first, last, self.seed, self.scale_N.dtype)
        return sparse_rows(key_N, first, last, self.s, self.seed).to_scipy(self.scale_N.dtype).toarray()

    def columns(self, first: int, last: int) -> np.ndarray:
        """Columns of L R, dense."""
        parts = []
        if first < self.num_random:
            parts.append(self.random(self.key_N, first, min(last, self.num_random)))
        if last > self.num_random and self.features is not None:
            parts.append(self.features.column_NC[:, max(first - self.num_random, 0) : last - self.num_random])
        found = np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
        return found * self.scale_N[:, None]

    def of_new(self, key_R: np.ndarray, features: Any) -> np.ndarray:
        """All columns of R of nodes that were not there, [R, D], entries of variance 1. Raises InputError for features that do not fit."""
        if self.features is None:
            if features is not None:
                raise InputError("features of new nodes are given, and the model was fitted without features")
            return self.random(key_R, 0, self.num_random)
        if features is None:
            raise InputError(
                f"the model was fitted with features; give those of the new nodes, {self.features.num} each"
            )
        found = self.features.of(features, len(key_R))
        return np.concatenate([self.random(key_R, 0, self.num_random), found], axis=1) if self.num_random else found

    def sparse_columns(self, first: int, last: int) -> SparseProjection | None:
        """Columns of R where they are worth keeping sparse, not yet scaled; None where not."""
        if self.kind != "sparse" or self.s < DENSE_BELOW or last > self.num_random:
            return None
        return sparse_rows(self.key_N, first, last, self.s, self.seed)


@dataclass(frozen=True)
class Setup:
    """A graph made ready.

    Attributes:
        operator: the matrix, its diagonals in it; None where it was read from a file.
        right_N: the diagonal on the right; None for ones.
        start: R and L.
        is_directed: whether rows differ from columns.
    """

    operator: Operator | None
    right_N: np.ndarray | None
    start: Projection
    is_directed: bool

    @property
    def num_nodes(self) -> int:
        """N."""
        return len(self.start.key_N)


def sparsity(num_nodes: int) -> float:
    """sqrt(N), rounded to a power of 2."""
    return 2.0 ** round(math.log2(max(num_nodes, 1)) / 2)


def turned(graph: Graph, direction: str) -> Graph:
    """The graph whose rows sum over what ``direction`` says."""
    if not graph.is_directed or direction == "out":
        return graph
    if direction == "in":
        return graph.reversed
    matrix = graph.to_scipy(np.float64)
    return Graph.from_scipy(matrix + matrix.T, False, names=graph.names, allow_negative=True)


def strengths(graph: Graph) -> np.ndarray:
    """float64 [N]: sums of the absolute weights of each node's edges."""
    if graph.weights is None or not len(graph.weights) or graph.weights.min() >= 0:
        return graph.strength_N
    return Graph(graph.indptr, graph.indices, np.abs(graph.weights), graph.is_directed).strength_N


def sides(graph: Graph, matrix: str) -> tuple[np.ndarray, np.ndarray | None]:
    """float64 diagonals on the left and the right of A; None for ones on the right."""
    if matrix == "adjacency":
        return np.ones(graph.num_nodes), None
    if matrix == "transition":
        return inverse_power(strengths(graph), 1.0), None
    return inverse_power(strengths(graph), 0.5), inverse_power(strengths(graph.reversed), 0.5)


def inverse_power(degree_N: np.ndarray, power: float) -> np.ndarray:
    """degree ** -power, 0 where the degree is."""
    return np.where(degree_N > 0, np.where(degree_N > 0, degree_N, 1.0) ** -power, 0.0)


def operator_of(graph: Graph, matrix: str, dtype: Any) -> tuple[Operator, np.ndarray | None]:
    """diag(left) A diag(right), the right side in the values, and that side."""
    if graph.weights is not None and not np.isfinite(graph.weights).all():
        raise InputError(f"edge weight {int(np.isfinite(graph.weights).argmin())} is not finite")
    left_N, right_N = sides(graph, matrix)
    value_M = np.empty(0, dtype) if graph.weights is None else graph.weights.astype(dtype, copy=False)
    if right_N is not None:
        right_N = right_N.astype(dtype)
        value_M = right_N[graph.indices] if graph.weights is None else value_M * right_N[graph.indices]
    return Operator(graph.indptr, graph.indices, value_M, left_N.astype(dtype)), right_N


def degree_scale(graph: Graph, beta: float, dim: int, dtype: Any) -> np.ndarray:
    """The diagonal of L over sqrt(D); a degree of 0 counts as the smallest that is not."""
    degree_N = strengths(graph)
    positive = degree_N[degree_N > 0]
    degree_N = np.where(degree_N > 0, degree_N, positive.min() if positive.size else 1.0)
    with np.errstate(over="ignore", under="ignore"):
        scale_N = (degree_N**beta / math.sqrt(dim)).astype(dtype)
    if not (np.isfinite(scale_N).all() and (scale_N > 0).all()):
        raise InputError(
            f"degrees to the power beta = {beta} leave the range of {np.dtype(dtype)}; scale the edge weights"
        )
    return scale_N


@dataclass(frozen=True)
class Features:
    """Columns made of features: random combinations, of mean square 1 over the nodes that were fitted, as R's entries.

    Attributes:
        column_NC: of the nodes that were fitted.
        random_FC: what features are multiplied with, the scale in it; float64.
    """

    column_NC: np.ndarray
    random_FC: np.ndarray

    @property
    def num(self) -> int:
        """F."""
        return len(self.random_FC)

    @classmethod
    def fitted(cls, features: Any, count: int, num_nodes: int, seed: int, dtype: Any) -> "Features | None":
        """``count`` columns. Raises InputError for features that do not fit, or that have no columns or are missing."""
        if features is None:
            if count:
                raise InputError(
                    f"feature_ratio asks for {count} columns and features is None; give features [nodes, features]"
                )
            return None
        if not count:
            raise InputError("features are given and feature_ratio leaves them no column; raise it")
        values = _feature_rows(features, num_nodes)
        random_FC = gaussian_rows(np.arange(values.shape[1], dtype=np.uint64), 0, count, ~seed, np.float64)
        found = np.asarray(values @ random_FC)
        size = (math.sqrt(float(np.mean(found**2))) if found.size else 0.0) or 1.0
        return cls((found / size).astype(dtype), random_FC / size)

    def of(self, features: Any, num_nodes: int) -> np.ndarray:
        """Columns of other nodes' features. Raises InputError for features that do not fit."""
        values = _feature_rows(features, num_nodes)
        if values.shape[1] != self.num:
            raise InputError(f"features have {values.shape[1]:,} columns, those that were fitted {self.num:,}")
        return np.asarray(values @ self.random_FC).astype(self.column_NC.dtype)


def _feature_rows(features: Any, num_nodes: int) -> Any:
    features = unmasked(features, "features")
    values = wide_rows(features, "features") if is_sparse(features) else np.asarray(features)
    if values.ndim != 2 or values.shape[0] != num_nodes:
        raise InputError(f"features have the shape {values.shape}; it must be [{num_nodes}, features]")
    data = np.asarray(values.data if is_sparse(values) else values)
    if data.dtype.kind not in "fiub" or not np.isfinite(data).all():
        raise InputError("features must be finite numbers")
    return values


def projection_of(
    graph: Graph,
    names: np.ndarray | None,
    kind: str,
    s: float | None,
    seed: int,
    dim: int,
    beta: float,
    features: Any,
    num_features: int,
    dtype: Any,
) -> Projection:
    """L R of a graph (turned already) whose nodes have these outside names."""
    key_N = np.arange(graph.num_nodes, dtype=np.uint64) if names is None else keys_of(names)
    fitted = Features.fitted(features, num_features, graph.num_nodes, seed, dtype)
    s = sparsity(graph.num_nodes) if s is None else float(s)
    scale_N = degree_scale(graph, beta, dim, dtype)
    return Projection(key_N, kind, s, seed, dim - num_features, fitted, scale_N)
