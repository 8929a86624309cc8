"""`fully_ppr` and `FullyPPR`: one call for the most related nodes of every node, on this machine or on Spark."""
# Shapes: N nodes, S sources

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from anabranch.errors import InputError
from anabranch.graph.estimator import Estimator
from anabranch.graph.fully_ppr import chunks
from anabranch.graph.fully_ppr.local import WalkWork, exact_work
from anabranch.graph.fully_ppr.options import (
    INDEX_WALKS,
    Engine,
    Estimate,
    Method,
    Options,
    Plan,
    check_room,
    choose_chunk,
    row_bytes,
    walk_bytes,
)
from anabranch.graph.fully_ppr.result import FullyPPRResult
from anabranch.graph.ppr import Dangling, Transition
from anabranch.graph.ppr.power import BLOCK
from anabranch.graph.ppr.rules import CODES
from anabranch.graph.store import Graph
from anabranch.graph.walk import walk_arrays

Progress = Callable[[int, int], None]


class FullyPPR(Estimator):
    """Personalised PageRank from every node: rows of the ``top_k`` best, by falling score.

    Args:
        alpha: probability that a walk ends before each step.
        walks: per source, for method ``walks`` (default 1,000).
        eps, delta, p_f: an accuracy instead of ``walks``: scores of at least ``delta`` have a relative error of at most ``eps`` with
            probability 1 - ``p_f``. All three, or none.
        top_k: entries kept of each source; None for all.
        min_score: smallest score that is kept.
        engine: ``local`` (this machine, no services), ``spark`` (extra ``spark``, Java 17), or ``auto``: local unless memory does not suffice.
        method: ``walks``; ``decompose``: rounds of exact decomposition on an index of few walks, the most accurate for its time, local;
            ``exact``: within ``tol`` of the truth in L1, local; ``auto``: exact where that is the least work, ``walks`` where a number, an
            accuracy or Spark is asked for, else decompose.
        estimator: of ``walks``: count the ``endpoint`` of each (as the paper does), or every visit (``fullpath``), which is more accurate.
        sources: nodes to start from, distinct; None for all.
        dangling: what walks do at nodes without out-edges, see `anabranch.graph.ppr.rules`.
        index_walks, rounds: of ``decompose``.
        tol: of ``exact``.
        out: file to write (``.parquet``: Parquet; else a checked array file), or on Spark a folder of Parquet files. A run that was stopped
            goes on where it was when it is started again with the same ``out``. None keeps the result in memory.
        memory_limit: bytes to use at most. Default: what the machine has; on Spark, what an executor has.
        seed: of the walks. Results depend on it alone, not on threads, chunks or partitions.
        workers: threads. Default: one per core.
        progress: called with the numbers of sources done and of all (on Spark's partitioned plan: of walks).
        cancel: set this event to stop at the next chunk or round.
        plan: on Spark: ``broadcast`` (every worker maps the whole graph), ``partitioned`` (rounds of joins), or ``auto``: broadcast where
            the graph fits into an executor.
        partitions: of Spark's work. Default: four per core.
        spark: a session to use. Default: one on all cores of this machine.

    Attributes:
        result_: `FullyPPRResult` of the last `fit`.

    Raises:
        InputError: an argument out of range.
    """

    result_: FullyPPRResult

    def __init__(
        self,
        alpha: float = 0.15,
        walks: int | None = None,
        eps: float | None = None,
        delta: float | None = None,
        p_f: float | None = None,
        top_k: int | None = 100,
        min_score: float = 0.0,
        engine: Engine = "auto",
        method: Method = "auto",
        estimator: Estimate = "endpoint",
        sources: ArrayLike | None = None,
        dangling: Dangling = "source",
        index_walks: int = INDEX_WALKS,
        rounds: int = 2,
        tol: float = 1e-8,
        out: str | Path | None = None,
        memory_limit: int | None = None,
        seed: int = 0,
        workers: int | None = None,
        progress: Progress | None = None,
        cancel: threading.Event | None = None,
        plan: Plan = "auto",
        partitions: int | None = None,
        spark: Any = None,
    ) -> None:
        self.alpha, self.walks, self.eps, self.delta, self.p_f = alpha, walks, eps, delta, p_f
        self.top_k, self.min_score = top_k, min_score
        self.engine, self.method, self.estimator = engine, method, estimator
        self.sources, self.dangling = sources, dangling
        self.index_walks, self.rounds, self.tol = index_walks, rounds, tol
        self.out, self.memory_limit, self.seed, self.workers = out, memory_limit, seed, workers
        self.progress, self.cancel = progress, cancel
        self.plan, self.partitions, self.spark = plan, partitions, spark
        self._options().check()
        if plan not in ("auto", "broadcast", "partitioned"):
            raise InputError(f"plan is {plan!r}; it must be one of auto, broadcast, partitioned")
        if partitions is not None and not partitions >= 1:
            raise InputError(f"partitions is {partitions!r}; it must be at least 1")

    def fit(self, graph: Graph) -> Self:
        """Scores from every source of the graph; they are in ``result_``.

        Raises:
            InputError: an unknown or repeated source, a graph without nodes or with negative weights.
            CapacityError: memory does not suffice; says how much would.
            DataError: ``out`` cannot be written, or parts of another run lie there.
            BackendError: Spark is asked for, and pyspark or Java is not there.
            AnabranchError: the run was cancelled.
        """
        options = self._options()
        transition = Transition(graph, self.alpha, self.dangling)
        source_S, is_all = check_sources(graph, self.sources)
        engine = self._choose_engine(graph, options)
        if engine == "spark":
            from anabranch.graph.fully_ppr.spark import run_spark

            self.result_ = run_spark(self, options, graph, source_S, is_all)
        else:
            self.result_ = self._fit_local(options, transition, source_S, is_all)
        return self

    def top(self, node: int, k: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Ids and scores of the ``k`` best of a source. Raises InputError before `fit`, and as `FullyPPRResult.top`."""
        return self._fitted().top(node, k)

    def save(self, path: str | Path) -> None:
        """As `FullyPPRResult.save`."""
        self._fitted().save(path)

    @staticmethod
    def load(path: str | Path, *, mmap: bool = False) -> FullyPPRResult:
        """As `FullyPPRResult.load`."""
        return FullyPPRResult.load(path, mmap=mmap)

    def _fitted(self) -> FullyPPRResult:
        if not hasattr(self, "result_"):
            raise InputError("there are no scores yet; call fit(graph) first")
        return self.result_

    def _options(self) -> Options:
        return Options(**{name: getattr(self, name) for name in Options.__dataclass_fields__})

    def _choose_engine(self, graph: Graph, options: Options) -> str:
        if self.engine != "auto":
            return self.engine
        return "local" if walk_bytes(graph) <= options.room() else "spark"

    def _fit_local(
        self, options: Options, transition: Transition, source_S: np.ndarray, is_all: bool
    ) -> FullyPPRResult:
        graph = transition.graph
        method = options.choose_method(graph, "local")
        workers = min(options.num_workers, max(len(source_S), 1))
        work, held, dtype, multiple = self._work(options, transition, method, workers)
        most = graph.num_nodes if method != "walks" or self.estimator == "fullpath" else options.num_walks
        per_row = row_bytes(graph, self.top_k, most, np.dtype(dtype).itemsize)
        needed = held + (0 if self.out is not None else per_row * len(source_S)) + 2 * (workers + 1) * per_row
        room = options.room()
        hint = (
            "use out=FILE, fewer workers, a smaller top_k"
            if self.out is None
            else "use fewer workers or a smaller top_k"
        )
        check_room(needed, room, f"method {method!r} on this machine", f"{hint}, or engine='spark'")
        chunk = choose_chunk(len(source_S), workers, per_row, room - needed, multiple)
        facts = options.facts(method, "local")
        job = chunks.Job(graph, source_S, is_all, facts, dtype, chunk, workers, self.progress, self.cancel)
        return chunks.run(job, work, self.out)

    def _work(
        self, options: Options, transition: Transition, method: str, workers: int
    ) -> tuple[chunks.Work, float, Any, int]:
        """What makes rows, the bytes that it holds, the type of scores, and how many sources go best together."""
        graph = transition.graph
        if method == "exact":
            held = graph.nbytes * (2 if graph.is_directed else 1) + workers * 24 * graph.num_nodes * BLOCK
            check_room(held, options.room(), "method 'exact'", "use method='walks' or fewer workers")
            return exact_work(transition, self.tol, self.top_k, self.min_score), held, np.float64, BLOCK
        walks = WalkWork(
            walk_arrays(graph), options.num_walks, self.alpha, CODES[self.dangling], self.estimator == "fullpath",
            self.top_k or 0, self.min_score, self.seed,
        )  # fmt: skip
        return walks, walk_bytes(graph) + workers * walks.scratch_bytes(), np.float32, 1


def fully_ppr(graph: Graph, alpha: float = 0.15, walks: int | None = None, **options: Any) -> FullyPPRResult:
    """Personalised PageRank from every node of ``graph``; arguments and errors are those of `FullyPPR`.

    Example:
        >>> fully_ppr(graph, top_k=10).top(7)  # doctest: +SKIP
        (array([...]), array([...]))
    """
    return FullyPPR(alpha, walks, **options).fit(graph).result_


def check_sources(graph: Graph, sources: ArrayLike | None) -> tuple[np.ndarray, bool]:
    """Sources as int64 ids, and whether they are all nodes in order. Raises InputError for an unknown or repeated one."""
    if sources is None:
        return np.arange(graph.num_nodes), True
    found = graph.check_nodes(sources)
    if found.ndim != 1:
        raise InputError(f"sources have the shape {found.shape}; give a list of nodes")
    values, counts = np.unique(found, return_counts=True)
    if (counts > 1).any():
        raise InputError(f"source {values[counts > 1][0]} is given {counts.max()} times; sources are distinct")
    return found, len(found) == graph.num_nodes and bool((np.diff(found) == 1).all())
