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
from pathlib import Path
from typing import Any, Literal, Self, cast

import numpy as np

from anabranch.bounds import MOST_REPEATS, shown, whole
from anabranch.errors import DataError, InputError
from anabranch.graph.arguments import check_flag, params_of_file, within
from anabranch.graph.coerce import as_graph
from anabranch.graph.evaluate import HeldOut
from anabranch.graph.fastrp import storage
from anabranch.graph.fastrp.check import FLAGS, LIMITS, as_weights, check, check_weights, num_parts
from anabranch.graph.fastrp.start import DENSE_BELOW, Setup, sparsity
from anabranch.graph.fastrp.steps import Powers, Steps
from anabranch.graph.fastrp.stored import StoredVectors
from anabranch.graph.fastrp.tuning import Tuning, tune
from anabranch.graph.fastrp.unseen import edges_of_new, new_rows, powers_of_new, start_of_new
from anabranch.graph.header import described
from anabranch.graph.spark.edges import EdgeFiles
from anabranch.graph.store import Graph
from anabranch.graph.vectors import shift_columns
from anabranch.graph.workers import Workers


class FastRP(Steps):
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
        workers: threads; None for the default (`anabranch.graph.workers`). Changes no bit of the result.
        threads: the former name of ``workers``, which counts where that is None.
        keep_powers: let `fit` keep N_1 ... N_q, which `transform` needs.
        engine: ``local`` (this machine), or ``spark``: `fit` takes edges in Parquet, by a path that Spark can read or as `EdgeFiles`,
            and the graph is never whole in one process (extra ``spark``, Java 17).
        out: of ``spark``: the folder of Parquet files to write, a path or URI. A run that was stopped goes on with the same ``out``.
        spark: a session to use. Default: the active one, else one on all cores of this machine.
        partitions: of Spark's work. Default: so many that a part of it takes about 64 MB.

    Attributes:
        embedding_: [N, D], after `fit`; of ``spark`` a `StoredVectors`, which says where they lie.
        powers_: `Powers`, after `fit` with ``keep_powers``.

    Raises InputError for a value that is not allowed.
    """

    embedding_: Any
    powers_: Powers
    _nodes: Graph
    _setup: Setup | None
    _mean_D: np.ndarray
    _factor_D: np.ndarray

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
        workers: int | None = None,
        engine: Literal["local", "spark"] = "local",
        out: str | Path | None = None,
        spark: Any = None,
        partitions: int | None = None,
    ) -> None:
        self.dim, self.weights, self.beta, self.normalize = dim, weights, beta, normalize
        self.projection, self.s, self.matrix, self.standardize = projection, s, matrix, standardize
        self.concatenate, self.features, self.feature_ratio = concatenate, features, feature_ratio
        self.self_weight, self.direction, self.allow_negative = self_weight, direction, allow_negative
        self.seed, self.dtype, self.backend, self.device = seed, dtype, backend, device
        self.chunk, self.threads, self.keep_powers, self.workers = chunk, threads, keep_powers, workers
        self.engine, self.out, self.spark, self.partitions = engine, out, spark, partitions
        check(self)
        self._make_plain()

    # What it is for

    def fit(self, graph: Any, y: Any = None) -> Self:
        """Embed the nodes of a graph (whatever `as_graph` takes; of ``spark`` edges in Parquet) into `embedding_`. ``y`` is not used.

        Raises InputError for a graph or features that do not fit; of ``spark`` DataError for files that cannot be read, BackendError
        where Spark is missing or fails.
        """
        # A file of before may hold what may not be fitted with today.
        check(self)
        if self.engine == "spark":
            return self._fit_files(graph)
        given = as_graph(graph, allow_negative=self.allow_negative)
        setup = self._prepare(given)
        kept: dict[str, Any] = {"_setup": None}
        with Workers(self._num_workers) as pool:
            if self.keep_powers:
                powers = self._powers(setup, pool, len(self.weights))
                found = self._combine(powers, tuple(self.weights), self.self_weight, pool)
                kept = {"_setup": setup, "powers_": powers}
            else:
                found = self._embed(setup, pool)
            mean_D, factor_D = self._standardize(found, pool)
        self._become(embedding_=found, _nodes=given.bare(), _mean_D=mean_D, _factor_D=factor_D, **kept)
        return self

    def _fit_files(self, edges: Any) -> Self:
        if not isinstance(edges, str | Path | EdgeFiles):
            raise InputError(
                f"engine 'spark' takes the path of edges in Parquet, not a {type(edges).__name__}; engine='local' takes graphs"
            )
        from anabranch.graph.fastrp.from_edges import run_from_edges

        self._become(embedding_=run_from_edges(self, EdgeFiles.of(edges)), _setup=None)
        return self

    def fit_transform(self, graph: Any, y: Any = None) -> np.ndarray:
        """`fit`, and the vectors [N, D]."""
        return self.fit(graph).embedding_

    def transform(self, rows: Any, *, features: Any = None, names: Iterable[Any] | None = None) -> np.ndarray:
        """Vectors of new nodes from their edges and features; the fitted graph stays as it is.

        They are those that fitting the larger graph would give, up to the columns' means and deviations and the scale of features, if no
        old node has an edge to a new one and ``s`` is given; otherwise an approximation of them.

        Args:
            rows: weights of edges from new nodes to old ones [R, N], or to old and new ones [R, N + R] (in the direction that rows sum
                over), scipy sparse or dense. `edges_of_new` makes them of edges by name.
            features: [R, F] of the new nodes, where the model was fitted with features; they count with ``self_weight``, and through edges
                between new nodes.
            names: of the new nodes, which key what is random of them; without, they are numbers N, N + 1, ...

        Raises InputError if `fit` has not kept the powers, arguments that they depend on were changed since, or rows, features or names do
        not fit.
        """
        if getattr(self, "_setup", None) is None or not hasattr(self, "powers_"):
            raise InputError("transform needs what fit keeps with keep_powers=True; set it and fit again")
        self._check_as_fitted()
        setup, known = cast(Setup, self._setup), self.powers_
        new = new_rows(rows, setup, self.matrix, self.dtype, self.allow_negative)
        start = np.zeros((len(new.degree_R), self.dim), self.dtype)
        is_asked = features is not None or (names is not None and setup.start.features is None)
        if self.self_weight or new.among_RR is not None or is_asked:
            start = start_of_new(new, setup, self.beta, features, names)
        powers = powers_of_new(new, start, (known.start_ND, *known.power_KND[:-1]))
        with Workers(1) as pool:
            found = self._combine(Powers(start, tuple(powers)), tuple(self.weights), self.self_weight, pool)
            if self.standardize:
                shift_columns(found, self._mean_D, self._factor_D, pool)
        return found

    def vectors(self, nodes: Any) -> np.ndarray:
        """Vectors of nodes by id or name (`Graph.resolve`), [len(nodes), D]. Raises InputError before `fit`, or for unknown nodes."""
        return self._fitted()[self._nodes.resolve(nodes)]

    def edges_of_new(self, source: Any, target: Any, weight: Any = None) -> tuple[Any, list[Any]]:
        """Rows for `transform` from edges: new nodes by name, what they lead to by name, and weights (None: 1).

        Targets are nodes that were fitted, or new ones. Of an undirected graph an edge between two new nodes stands in both rows, and is
        given once. Returns the rows, scipy sparse [R, N + R], and the names of the new nodes in the order they came.

        Raises InputError for lists of different length, or a source that was fitted.
        """
        self._fitted()
        return edges_of_new(self._nodes, source, target, weight)

    @property
    def nodes(self) -> Graph:
        """The nodes that were fitted, a graph without edges that knows their names. Raises InputError before `fit`."""
        self._fitted()
        return self._nodes

    def _fitted(self) -> np.ndarray:
        if not hasattr(self, "embedding_"):
            raise InputError("this FastRP is not fitted yet; call fit first")
        if isinstance(self.embedding_, StoredVectors):
            raise InputError(f"the vectors lie in {self.embedding_.path}; embedding_.load() reads them")
        return self.embedding_

    # On disk

    def save(self, path: str | Path) -> None:
        """Write the fitted model into one checked file, all or nothing.

        Raises InputError before `fit`, and where arguments that it depends on were changed since; and as `atomic_file`.
        """
        self._check_as_fitted()
        arrays = {"embedding": self._fitted(), "mean": self._mean_D, "factor": self._factor_D}
        if self._setup is not None:
            kept = (self.powers_.start_ND, *self.powers_.power_KND)
            arrays |= {f"power{number}": power for number, power in enumerate(kept)}
        params = {name: _plain(value) for name, value in self.get_params().items() if name != "features"}
        storage.write(path, params, arrays, self._nodes, self._setup)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote; `fit` of it needs ``features`` again, if it had some.

        Raises DataError for a file that is missing, foreign, truncated or damaged.
        """
        params, arrays, nodes, setup = storage.read(path)
        with described(path, "a FastRP of this release"):
            params = params_of_file(params, FLAGS)
            made = cls._of_file(params)
            storage.check_widths(arrays, setup, made.dim, num_parts(made))
        kept = {}
        if setup is not None:
            powers = [arrays[f"power{number}"] for number in range(len(made.weights) + 1) if f"power{number}" in arrays]
            if len(powers) != len(made.weights) + 1:
                raise DataError(f"{path} is damaged: it does not hold the powers of its {len(made.weights)} weights")
            kept = {"powers_": Powers(powers[0], tuple(powers[1:]))}
        made._become(
            embedding_=arrays["embedding"],
            _nodes=nodes,
            _setup=setup,
            _mean_D=arrays["mean"],
            _factor_D=arrays["factor"],
            **kept,
        )
        return made

    @classmethod
    def _lawful(cls, params: dict[str, Any]) -> dict[str, Any]:
        return within(params, LIMITS)

    def powers(self, graph: Any, order: int | None = None) -> Powers:
        """L R and N_1 ... N_q of a graph, for `combine`; they do not depend on weights. ``order`` is q, by default that of ``weights``."""
        count = len(self.weights) if order is None else whole("order", order, 1, MOST_REPEATS)
        with Workers(self._num_workers) as pool:
            return self._powers(self._prepare(graph), pool, count)

    def combine(self, powers: Powers, weights: Sequence[float] | None = None) -> np.ndarray:
        """Vectors of these powers with other weights (default: its own), which must not be more than there are powers."""
        if not isinstance(powers, Powers):
            raise InputError(f"powers is {shown(powers)}; it must be what powers(graph) gave")
        chosen = as_weights(self.weights if weights is None else weights)
        check_weights(chosen, self.self_weight)
        if len(chosen) > len(powers.power_KND):
            raise InputError(
                f"there are {len(chosen)} weights and {len(powers.power_KND)} powers; call powers(graph, order=...)"
            )
        with Workers(self._num_workers) as pool:
            found = self._combine(powers, chosen, self.self_weight, pool)
            self._standardize(found, pool)
        return found

    def mixed(self, start_ND: np.ndarray, power_KND: tuple[np.ndarray, ...]) -> np.ndarray:
        """As `combine` of some rows, on one thread and before columns are standardised: what Spark's workers do. Arrays may change."""
        with Workers(1) as pool:
            return self._combine(Powers(start_ND, power_KND), tuple(self.weights), self.self_weight, pool)

    def peak_bytes(self, num_nodes: int, num_stored_edges: int, is_weighted: bool = False) -> int:
        """Bytes that `fit` holds at once beside the graph, its result included.

        b N (D Z + 2 C) for numbers of b bytes, Z arrays of vectors and two chunks of C columns; Z is the number of weights that are not 0
        (and ``self_weight``) if rows are normalised or kept side by side, 1 otherwise, q + 2 with ``keep_powers``. Then R's entries of a
        chunk, weights of edges in the working type, and per node 40 bytes.
        """
        num_nodes = whole("num_nodes", num_nodes, 0)
        num_stored_edges = whole("num_stored_edges", num_stored_edges, 0)
        is_weighted = check_flag("is_weighted", is_weighted)
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

    def tune(
        self, graph: Any, labels: Any = None, *, edges: HeldOut | None = None, trials: int = 20, **options: Any
    ) -> Tuning:
        """Search weights and beta for this graph; see `anabranch.graph.fastrp.tuning.tune`."""
        return tune(self, graph, labels, edges=edges, trials=trials, **options)


def _plain(value: Any) -> Any:
    """What JSON can hold."""
    if isinstance(value, np.generic):
        return value.item()
    return [_plain(one) for one in value] if isinstance(value, (tuple, list, np.ndarray)) else value
