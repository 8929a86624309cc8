"""`fully_ppr` and `FullyPPR`: one call for the most related nodes of every node, on this machine or on Spark."""
# Shapes: N nodes, S sources

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, get_args

import numpy as np
from numpy.typing import ArrayLike

from anabranch.bounds import MOST_SIZE, is_whole, shown
from anabranch.errors import InputError
from anabranch.graph.arguments import check_one_of
from anabranch.graph.coerce import as_graph
from anabranch.graph.estimator import Estimator
from anabranch.graph.fully_ppr import chunks
from anabranch.graph.fully_ppr.devices import THETA
from anabranch.graph.fully_ppr.local import WalkWork, decompose_work, exact_work
from anabranch.graph.fully_ppr.options import (
    INDEX_WALKS,
    Engine,
    Estimate,
    Method,
    Options,
    Plan,
    check_room,
    choose_chunk,
    score_type,
    walk_bytes,
)
from anabranch.graph.fully_ppr.result import FullyPPRResult
from anabranch.graph.fully_ppr.rounds import Round
from anabranch.graph.fully_ppr.stored import StoredScores
from anabranch.graph.powerwalk import PowerWalk
from anabranch.graph.ppr import Dangling, Transition
from anabranch.graph.ppr.rules import CODES
from anabranch.graph.ppr.walks import check_count
from anabranch.graph.spark.edges import EdgeFiles, is_parquet
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
        engine: ``local`` (this machine, no services), ``spark`` (extra ``spark``, Java 17), or ``auto``: local unless memory does not
            suffice.
        method: ``walks``; ``decompose``: rounds of exact decomposition on an index of few walks, the most accurate for its time, local;
            ``exact``: within ``tol`` of the truth in L1, local; ``auto``: walks where their number, an accuracy or Spark is asked for,
            else exact where that is less work for so many sources, as on small and on dense graphs, else decompose; of these, one whose
            bytes fit into ``memory_limit``, and walks where neither does. A run that goes on keeps the method that it began with.
        estimator: of ``walks``: count the ``endpoint`` of each (as the paper does), or every visit (``fullpath``), which is more accurate.
        sources: nodes to start from, distinct, by id or name; None for all.
        dangling: what walks do at nodes without out-edges, see `anabranch.graph.ppr.rules`.
        index_walks, rounds: of ``decompose``.
        tol: of ``exact``.
        out: file to write (``.parquet``: Parquet; else a checked array file), or on Spark a folder of Parquet files, which may be a URI
            (``s3a://...``) where edges come from files. A run that was stopped
            goes on where it was when it is started again with the same ``out``. None keeps the result in memory.
        memory_limit: bytes to use at most. Default: what the machine has; on Spark, what an executor has.
        seed: of the walks. Results depend on it alone, not on threads, chunks or partitions, nor on what memory is free.
        workers: threads at most; fewer where memory does not suffice for so many. Default: one per core.
        progress: called with the numbers of sources done and of all (on Spark's partitioned plan: of walks).
        cancel: set this event to stop at the next chunk or round.
        plan: on Spark: ``broadcast`` (every worker maps the whole graph), ``partitioned`` (rounds of joins), or ``auto``: broadcast where
            the graph fits into an executor.
        partitions: of Spark's work. Default: two per core.
        spark: a session to use. Default: the active one, else one on all cores of this machine.
        gamma: of the partitioned plan: walks of a source that start in a round. Default: chosen for the memory, and adapted.
        theta: of the partitioned plan: most entries of a record of a hub.
        big_moves: of the partitioned plan: steps that one draw takes at small nodes, 2 or 3; 0 for none.

    Attributes:
        result_: `FullyPPRResult` of the last `fit`; read from ``out`` when it is first asked for, where that was given.
        rounds_: log of the partitioned plan's rounds, a list of `anabranch.graph.fully_ppr.rounds.Round`.

    Raises:
        InputError: an argument out of range.
    """

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
        gamma: int | None = None,
        theta: int = THETA,
        big_moves: int = 2,
    ) -> None:
        self.alpha, self.walks, self.eps, self.delta, self.p_f = alpha, walks, eps, delta, p_f
        self.top_k, self.min_score = top_k, min_score
        self.engine, self.method, self.estimator = engine, method, estimator
        self.sources, self.dangling = sources, dangling
        self.index_walks, self.rounds, self.tol = index_walks, rounds, tol
        self.out, self.memory_limit, self.seed, self.workers = out, memory_limit, seed, workers
        self.progress, self.cancel = progress, cancel
        self.plan, self.partitions, self.spark = plan, partitions, spark
        self.gamma, self.theta, self.big_moves = gamma, theta, big_moves
        self.rounds_: list[Round] = []
        self._found: FullyPPRResult | StoredScores | Path | None = None
        self._by_name = False
        self._options().check()
        check_one_of("plan", plan, get_args(Plan))
        for name, value in (("partitions", partitions), ("gamma", gamma)):
            if value is not None:
                check_count(name, value)
        if not is_whole(theta) or not 2 <= theta <= MOST_SIZE:
            raise InputError(f"theta is {shown(theta)}; a record holds at least 2 entries, and at most {MOST_SIZE:,}")
        if not is_whole(big_moves) or big_moves not in (0, 2, 3):
            raise InputError(f"big_moves is {shown(big_moves)}; it must be 0, 2 or 3")
        if progress is not None and not callable(progress):
            raise InputError(f"progress is {shown(progress)}; it must be a function of two numbers, or None")
        if cancel is not None and not callable(getattr(cancel, "is_set", None)):
            raise InputError(f"cancel is {shown(cancel)}; it must be an event (threading.Event), or None")
        self._make_plain()

    def fit(self, graph: Any) -> Self:
        """Scores from every source of the graph (whatever `as_graph` takes); they are in ``result_``.

        Engine ``spark`` also takes edges in Parquet, by a path that Spark can read or as `EdgeFiles`: the graph is then never whole in
        one process, ``out`` is needed, ``sources`` are ids as in the edges, ``result_`` is a `StoredScores`, walks make no big moves,
        and ``method`` may be ``decompose`` too.

        Raises:
            InputError: an unknown or repeated source, a graph without nodes or with negative weights.
            CapacityError: memory does not suffice; says how much would.
            DataError: ``out`` cannot be written, or parts of another run lie there.
            BackendError: Spark is asked for, and pyspark or Java is not there.
            AnabranchError: the run was cancelled.
        """
        options = self._options()
        if isinstance(graph, EdgeFiles) or (self.engine == "spark" and is_parquet(graph)):
            return self._fit_files(options, EdgeFiles.of(graph))
        given = as_graph(graph, allow_negative=True)
        graph = given.numbered()
        # Refuses graphs without nodes, or of negative weights.
        Transition(graph, self.alpha, self.dangling)
        source_S, is_all = check_sources(given, self.sources)
        begun = None if self.out is None else chunks.begun(self.out)
        engine = self._choose_engine(graph, options, begun)
        if engine == "spark":
            from anabranch.graph.fully_ppr.spark import run_spark

            found = run_spark(self, options, graph, source_S, is_all)
        else:
            found = self._fit_local(options, graph, source_S, is_all, begun)
        self._found, self._by_name = found, given.by_name
        return self

    def _fit_files(self, options: Options, given: EdgeFiles) -> Self:
        if self.engine != "spark":
            raise InputError(f"engine {self.engine!r} takes a graph or its path; EdgeFiles are for engine='spark'")
        from anabranch.graph.fully_ppr.from_edges import run_from_edges

        self._found = run_from_edges(self, options, given)
        return self

    def top(self, node: Any, k: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Nodes and scores of the ``k`` best of a source. Raises InputError before `fit`, and as `FullyPPRResult.top`."""
        return self.result_.top(node, k)

    def save(self, path: str | Path) -> None:
        """As `FullyPPRResult.save`."""
        self.result_.save(path)

    @staticmethod
    def load(path: str | Path, *, mmap: bool = False, verify: bool | None = None) -> FullyPPRResult:
        """As `FullyPPRResult.load`."""
        return FullyPPRResult.load(path, mmap=mmap, verify=verify)

    @property
    def result_(self) -> FullyPPRResult | StoredScores:
        """Scores of the last `fit`; of files of edges, where they lie. Raises InputError before it."""
        if self._found is None:
            raise InputError("there are no scores yet; call fit(graph) first")
        if isinstance(self._found, Path):
            self._found = FullyPPRResult.load(self._found, mmap=True)
        if isinstance(self._found, FullyPPRResult) and self._found.by_name != self._by_name:
            self._found = replace(self._found, by_name=self._by_name)
        return self._found

    def _options(self) -> Options:
        return Options(**{name: getattr(self, name) for name in Options.__dataclass_fields__})

    def _choose_engine(self, graph: Graph, options: Options, begun: Mapping[str, Any] | None = None) -> str:
        if self.engine != "auto":
            return self.engine
        if begun is not None:
            return "spark" if begun.get("engine") == "spark" else "local"
        return "local" if walk_bytes(graph) <= options.most() else "spark"

    def _fit_local(
        self,
        options: Options,
        graph: Graph,
        source_S: np.ndarray,
        is_all: bool,
        begun: Mapping[str, Any] | None,
    ) -> FullyPPRResult | Path:
        number, is_kept = len(source_S), self.out is None
        method, room = options.choose_method(graph, "local", number, is_kept=is_kept, begun=begun), options.room()
        workers = options.fitting_workers(graph, method, number, is_kept=is_kept)
        needed = options.needed(graph, method, workers, number, is_kept=is_kept)
        hint = "use out=FILE or a smaller top_k" if is_kept else "use a smaller top_k"
        if self.memory_limit is None and self.method == "auto":
            hint += ", or a memory_limit that is free now, for a method that fits into it"
        check_room(needed, room, f"method {method!r} on this machine", f"{hint}, or engine='spark'")
        per_row = options.row_bytes(graph, method)
        chunk = choose_chunk(number, workers, per_row, room - needed)
        facts = options.facts(method)
        job = chunks.Job(graph, source_S, is_all, facts, score_type(method), chunk, workers, self.progress, self.cancel)
        return chunks.run(job, lambda: self._work(options, graph, method, workers), self.out)

    def _work(self, options: Options, graph: Graph, method: str, workers: int) -> chunks.Work:
        """What makes rows of sources."""
        if method == "exact":
            return exact_work(graph, self.alpha, self.dangling, self.tol, self.top_k, self.min_score)
        if method == "decompose":
            index = PowerWalk(
                self.alpha, self.index_walks, dangling=self.dangling, seed=int(self.seed) % 2**63, workers=workers
            ).build(graph)
            # Chunks are what runs side by side.
            index.workers = 1
            return decompose_work(index, self.rounds, self.top_k, self.min_score)
        return WalkWork(
            walk_arrays(graph),
            options.num_walks,
            self.alpha,
            CODES[self.dangling],
            self.estimator == "fullpath",
            self.top_k or 0,
            self.min_score,
            self.seed,
        )


def fully_ppr(
    graph: Any, alpha: float = 0.15, walks: int | None = None, **options: Any
) -> FullyPPRResult | StoredScores:
    """Personalised PageRank from every node of ``graph``; arguments and errors are those of `FullyPPR`.

    ``fully_ppr("s3a://bucket/edges", engine="spark", out="s3a://bucket/scores")`` runs from edges in Parquet to scores in Parquet.

    Example:
        >>> fully_ppr(graph, top_k=10).top(7)  # doctest: +SKIP
        (array([...]), array([...]))
    """
    return FullyPPR(alpha, walks, **options).fit(graph).result_


def check_sources(graph: Graph, sources: ArrayLike | None) -> tuple[np.ndarray, bool]:
    """Sources as int64 ids, and whether they are all nodes in order. Raises InputError for an unknown or repeated one."""
    if sources is None:
        return np.arange(graph.num_nodes), True
    found = graph.resolve(sources)
    if found.ndim != 1:
        raise InputError(f"sources have the shape {found.shape}; give a list of nodes")
    values, counts = np.unique(found, return_counts=True)
    if (counts > 1).any():
        raise InputError(f"source {values[counts > 1][0]} is given {counts.max()} times; sources are distinct")
    return found, len(found) == graph.num_nodes and bool((np.diff(found) == 1).all())
