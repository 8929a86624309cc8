"""`PowerWalk`: an index of fingerprints of a graph, and personalised PageRank of any node or set from it in well under a millisecond."""
# Shapes: N nodes, R indexed nodes, Z entries, Q queries

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import ArrayLike

from anabranch.errors import DataError, InputError
from anabranch.graph.coerce import as_graph
from anabranch.graph.delta import with_changes
from anabranch.graph.estimator import Estimator
from anabranch.graph.powerwalk.batch import backward_rows, forward_rows, prefers_backward
from anabranch.graph.powerwalk.index import Moves, Plan, adopted, make_chunks
from anabranch.graph.powerwalk.query import decompose, take
from anabranch.graph.powerwalk.stored import (
    KIND,
    Gathered,
    Index,
    changed_nodes,
    check_mark,
    check_successor,
    mark,
    read,
    read_folder,
)
from anabranch.graph.ppr.pagerank import PageRank
from anabranch.graph.ppr.rules import GOES_ON, Dangling, Transition, answer, check_alpha, check_dangling, parse_seeds
from anabranch.graph.ppr.walks import Mode, check_count, check_mode, check_seed
from anabranch.graph.rows import SparseRows, check_top_k, order_top, row_file
from anabranch.graph.spark.edges import EdgeFiles
from anabranch.graph.store import Graph
from anabranch.graph.workers import num_workers

# Entries that a query of rounds="auto" reads at most, about a millisecond.
BUDGET = 300_000

# Queries from which a batch is worth a look at what it costs.
MANY = 64

# Passes over the edges that an exact solution is reckoned to cost.
EXACT_ROUNDS = 12

# Of rounds="auto".
MOST_ROUNDS = 8

# Beyond any share of visits: rows that are not there at all come first.
NEW = 1e-6
# Arguments that say how the index is made, not what it is.
HOW = ("workers", "engine", "spark", "partitions")
DTYPES = {"f16": np.float16, "f32": np.float32}


class PowerWalk(Estimator):
    """Personalised PageRank from an index of short walks, refined per query by decomposition (Liu et al., CIKM 2016).

    Args:
        alpha: probability that a walk ends before each step.
        walks: R, walks from each node.
        mode: ``fullpath`` counts every visit, ``endpoint`` the end of each walk, which takes about 1 / alpha as many walks.
        dangling: what walks do at nodes without out-edges (`anabranch.graph.ppr.rules`); the index serves every policy.
        estimate: ``ratio`` divides counts by their sum, so that scores sum to 1; ``unbiased`` by what is expected.
        moves: ``walkers`` one by one; ``counts`` of walkers, binomial and multinomial; ``rounding``, the reference's (see `moves`).
        long_path: one walk that starts over until R / alpha nodes are visited, instead of R walks.
        max_steps: cut walks there (the reference: 10); None for no limit. The share cut is (1 - alpha)^max_steps.
        keep: entries kept of a fingerprint; None for all.
        mass: or the share of its counts that is kept at least.
        min_in_degree: only nodes with at least so many in-edges get a fingerprint; flows to others go on until they meet one.
        track: also keep which nodes walks visited, so that `update` finds what a change touches in an index of end points or cut
            rows too.
        dtype: of counts, ``f16`` (exact up to 2048) or ``f32``.
        seed: of the walks. The index does not depend on the number of threads.
        workers: threads; None for the usable cores.
        engine: ``local`` (this machine), or ``spark``: `build` takes edges in Parquet, by a path that Spark can read or as `EdgeFiles`,
            and writes an index that no process holds whole (extra ``spark``, Java 17); one machine then answers from it by `load`.
        spark: a session to use. Default: the active one, else one on all cores of this machine.
        partitions: of Spark's work. Default: so many that each has about 500,000 edges.

    Raises:
        InputError: an argument out of range.
    """

    def __init__(
        self,
        alpha: float = 0.15,
        walks: int = 100,
        mode: Mode = "fullpath",
        dangling: Dangling = "restart",
        estimate: Literal["ratio", "unbiased"] = "ratio",
        moves: Moves = "walkers",
        long_path: bool = False,
        max_steps: int | None = None,
        keep: int | None = None,
        mass: float | None = None,
        min_in_degree: int = 0,
        track: bool = False,
        dtype: Literal["f16", "f32"] = "f16",
        seed: int = 0,
        workers: int | None = None,
        engine: Literal["local", "spark"] = "local",
        spark: Any = None,
        partitions: int | None = None,
    ) -> None:
        self.alpha = check_alpha(alpha)
        self.walks = check_count("walks", walks)
        self.mode = check_mode(mode)
        self.dangling = check_dangling(dangling)
        # Counts are 32-bit; a source's are this many at most, in all likelihood.
        if self.walks * 40 / self.alpha >= 2**31:
            raise InputError(f"walks is {walks} at alpha = {alpha}; counts would not fit 32 bits")
        _one_of("estimate", estimate, ("ratio", "unbiased"))
        _one_of("moves", moves, get_args(Moves))
        _one_of("dtype", dtype, tuple(DTYPES))
        if long_path and (moves != "walkers" or max_steps is not None or estimate != "ratio"):
            raise InputError(
                "long_path goes with moves='walkers', estimate='ratio' and no max_steps: its walks have no number"
            )
        if mass is not None and not 0 < mass <= 1:
            raise InputError(f"mass is {mass!r}; the share of a fingerprint that is kept must lie in (0, 1]")
        self.estimate, self.moves, self.long_path, self.dtype = estimate, moves, bool(long_path), dtype
        self.max_steps = None if max_steps is None else check_count("max_steps", max_steps)
        self.keep = None if keep is None else check_count("keep", keep)
        self.mass = mass
        if isinstance(min_in_degree, bool) or not isinstance(min_in_degree, int | np.integer) or min_in_degree < 0:
            raise InputError(f"min_in_degree is {min_in_degree!r}; it must be a whole number of at least 0")
        self.min_in_degree, self.track = int(min_in_degree), bool(track)
        self.seed = check_seed(seed)
        self.workers = None if workers is None else check_count("workers", workers)
        _one_of("engine", engine, ("local", "spark"))
        self.engine, self.spark = engine, spark
        self.partitions = None if partitions is None else check_count("partitions", partitions)
        self._index: Index | None = None
        # The graph as it was given, which knows what callers call its nodes; the index knows ids.
        self._asked: Graph | None = None
        self._stale_N = np.empty(0)

    # Making the index

    def build(
        self,
        graph: Any,
        nodes: Any = None,
        *,
        out: str | Path | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Self:
        """Walk from every node, from ``nodes``, or from those of ``min_in_degree``, and keep the counts.

        Memory beside graph and index: 8 N bytes a thread (24 N where counts move) and a few chunks of 1,024 rows. With ``out`` rows
        go to that file as they are made, and the index stays on disk, mapped. Of ``spark`` a folder of Parquet files, which `load` reads.

        Args:
            graph: whatever `as_graph` takes; of ``spark`` the path of edges in Parquet, or `EdgeFiles`.
            nodes: nodes, by id or name, that get a fingerprint; None for all (of ``min_in_degree``).
            out: file to build in, as `save` writes it.
            progress: called with the number of finished nodes.

        Raises:
            InputError: an unknown node, a graph without nodes or with negative weights. DataError, CapacityError: ``out`` cannot be
                written. BackendError: Spark is asked for, and is missing or fails.
        """
        if self.engine == "spark":
            return self._build_files(graph, nodes, out, progress)
        given = as_graph(graph, allow_negative=True)
        graph = given.numbered()
        transition = Transition(graph, self.alpha, self.dangling)
        sources = self._sources(graph, None if nodes is None else given.resolve(nodes))
        chunks = make_chunks(graph, self._plan(), sources, num_workers(self.workers), progress)
        gathered = Gathered(graph.num_nodes, sources, DTYPES[self.dtype], self.track)
        if out is None:
            for chunk in chunks:
                gathered.append(chunk)
            self._index, self._asked = gathered.index(transition, self._unit()), given
            self._reset_stale()
            return self
        facts: dict[str, np.ndarray] = {}
        meta = {**self._meta(), "graph": mark(graph)}
        with row_file(out, graph.num_nodes, DTYPES[self.dtype], kind=KIND, extra=facts, meta=meta) as file:
            for chunk in chunks:
                gathered.append(chunk, file)
            facts |= gathered.facts()
        arrays, _ = read(out, mmap=True)
        self._index, self._asked = Index(transition, arrays, self._unit()), given
        self._reset_stale()
        return self

    fit = build

    def _build_files(self, edges: Any, nodes: Any, out: str | Path | None, progress: Any) -> Self:
        if not isinstance(edges, str | Path | EdgeFiles):
            raise InputError("engine 'spark' takes the path of edges in Parquet; engine='local' takes graphs")
        if nodes is not None:
            raise InputError("engine 'spark' walks from every node; leave out nodes")
        # By name: walks from all nodes on a cluster are Fully PPR's, which stands above this package.
        build_index = import_module("anabranch.graph.fully_ppr.walk_index").build_index
        build_index(self, EdgeFiles.of(edges), out, progress)
        return self

    @classmethod
    def from_rows(cls, graph: Any, rows: SparseRows, **params: Any) -> Self:
        """An index of scores that come from elsewhere, say of all nodes from a cluster (`anabranch.graph.fully_ppr`, full paths).

        Args:
            graph: that the scores are of.
            rows: estimates of personalised PageRank that sum to 1, or to less where they were cut; ``rows.nodes`` says of which nodes.
            params: of the constructor; alpha must be that of the scores. ``walks`` and the like count for rows that `update` makes again.

        Raises:
            InputError: rows that do not fit the graph, or a graph whose walks can reach dead ends: scores then depend on where walks came
                from, and cannot stand for each other.
        """
        made = cls(**{"dtype": "f32", **params})
        given = as_graph(graph, allow_negative=True)
        graph = given.numbered()
        transition = Transition(graph, made.alpha, made.dangling)
        dead = transition.dangling_nodes
        if (graph.reversed.degree_N[dead] > 0).any():
            raise InputError(
                "walks on this graph reach nodes without out-edges; build the index here, from walks that vanish there"
            )
        nodes = np.arange(len(rows)) if rows.nodes is None else graph.check_nodes(rows.nodes)
        if rows.num_columns != graph.num_nodes or len(nodes) > graph.num_nodes or len(np.unique(nodes)) != len(nodes):
            raise InputError(
                f"{len(rows):,} rows of {rows.num_columns:,} columns are not of different nodes of a graph of {graph.num_nodes:,}"
            )
        order = np.argsort(nodes)
        gathered = Gathered(graph.num_nodes, nodes[order], DTYPES[made.dtype], track=False)
        gathered.append(adopted(rows.take(order), graph.num_nodes))
        made._index, made._asked = gathered.index(transition, 0.0), given
        made._reset_stale()
        return made

    def _sources(self, graph: Graph, nodes: ArrayLike | None) -> np.ndarray:
        if nodes is not None:
            return np.unique(nodes)
        if not self.min_in_degree:
            return np.arange(graph.num_nodes, dtype=np.int64)
        return np.flatnonzero(graph.reversed.degree_N >= self.min_in_degree)

    def _plan(self) -> Plan:
        moves = "long_path" if self.long_path else self.moves
        return Plan(
            self.alpha, self.walks, self.seed, self.mode == "fullpath", moves, self.max_steps or 0, self.keep or 0,
            1.0 if self.mass is None else float(self.mass), self.track,
        )  # fmt: skip

    def _unit(self) -> float:
        """What one count of an unbiased estimate is worth; 0 stands for the ratio."""
        if self.estimate == "ratio":
            return 0.0
        return (self.alpha if self.mode == "fullpath" else 1.0) / self.walks

    def _meta(self) -> dict[str, Any]:
        return {"params": self.stored_params()}

    def stored_params(self) -> dict[str, Any]:
        """Arguments that decide the index, as JSON."""
        return {name: value for name, value in self.get_params().items() if name not in HOW}

    def _reset_stale(self) -> None:
        self._stale_N = np.zeros(self._built().transition.num_nodes)

    def _parsed(self, seeds: Any) -> tuple[np.ndarray, np.ndarray]:
        """Ids and weights of seeds. Raises InputError for bad ones, or where there is no index."""
        self._built()
        return parse_seeds(self.graph, seeds)

    def _built(self) -> Index:
        if self._index is None:
            raise InputError("there is no index yet; call build(graph) or PowerWalk.load(path, graph) first")
        return self._index

    # Asking it

    def query(
        self,
        seeds: Any,
        top_k: int | None = None,
        rounds: int | Literal["auto"] = 2,
        eps: float = 1e-6,
        *,
        use_index: bool = True,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores from one node or a set: nodes and scores float64, all or the ``top_k`` largest, by falling score.

        Args:
            seeds: a node; a list of nodes; a mapping node -> weight; or ``(nodes, weights)``. By id or by name (`Graph.resolve`), and
                so are the nodes that come back.
            top_k: how many to return; None for all that are not 0.
            rounds: T of decomposition; 0 gives the fingerprint itself. ``auto``: as many as fit a budget of entries read, at most 8.
            eps: flows below it are not followed; 0 follows all.
            use_index: False returns the decomposed part alone, short of (1 - alpha)^T.

        Raises:
            InputError: a bad argument, or there is no index.
        """
        index, kept = self._built(), check_top_k(top_k)
        number, budget = _rounds(rounds)
        transition = index.transition
        ids, share = self._parsed(seeds)
        buffers = index.take_buffers()
        touched, _, _ = decompose(
            *transition.out, transition.inverse_N, self.alpha, ids, transition.start(ids, share), number, budget, _eps(eps),
            use_index, *index.lookup.arrays, *buffers.arrays,
        )  # fmt: skip
        plain = transition.dangling in GOES_ON or not len(transition.dangling_nodes)
        found, score = take(buffers.result_N, buffers.touched_N, touched, kept if plain else 0)
        index.spare.append(buffers)
        if not plain:
            found, score = transition.finish_sparse(found, score, ids, share)
            length = order_top(found, score, len(found), kept)
            found, score = found[:length], score[:length]
        return answer(self.graph, found, seeds), score

    def inspect(self, seeds: Any, rounds: int | Literal["auto"] = 2, eps: float = 1e-6) -> dict[str, float]:
        """What a query does: ``dropped`` flow, entries ``reads``, and ``bound``, see `error_bound`, with what was dropped added."""
        return self._inspected(*self._parsed(seeds), rounds, eps)

    def _inspected(self, ids: np.ndarray, share: np.ndarray, rounds: Any, eps: float) -> dict[str, float]:
        index = self._built()
        number, budget = _rounds(rounds)
        transition = index.transition
        buffers = index.take_buffers()
        touched, dropped, reads = decompose(
            *transition.out, transition.inverse_N, self.alpha, ids, transition.start(ids, share), number, budget, _eps(eps),
            True, *index.lookup.arrays, *buffers.arrays,
        )  # fmt: skip
        take(buffers.result_N, buffers.touched_N, touched, 1)
        index.spare.append(buffers)
        bound = 2.0 if budget else min(2.0, self.error_bound(number) + dropped)
        return {"dropped": float(dropped), "reads": int(reads), "bound": bound}

    def query_batch(
        self,
        seeds_list: Sequence[Any],
        top_k: int | None = None,
        rounds: int | Literal["auto"] = 2,
        eps: float = 1e-6,
        *,
        method: Literal["auto", "forward", "backward"] = "auto",
    ) -> SparseRows:
        """Many queries at once: one row each, in their order, float32, by ids; ``names`` of the rows has the graph's names.

        ``forward`` decomposes one query after another in compiled code, equal queries once. ``backward`` propagates demand from the
        queries, then pulls fingerprints back level by level, so that what several queries need is computed once; it follows every flow
        (``eps`` does not count). ``auto`` takes the quicker one, by an estimate; with ``rounds="auto"``, where two rounds would read
        more than exact solutions do, as on dense, well-mixed graphs, it gives those (to an L1 error of 1e-4).

        Raises:
            InputError: a bad argument, there is no index, or ``backward`` needs a fingerprint that is not there.
        """
        index, kept = self._built(), check_top_k(top_k)
        if method not in ("auto", "forward", "backward"):
            raise InputError(f"method is {method!r}; it must be 'auto', 'forward' or 'backward'")
        number, budget = _rounds(rounds)
        if method == "backward" and budget:
            raise InputError("method='backward' needs a number of rounds, not 'auto'")
        parsed = [self._parsed(seeds) for seeds in seeds_list]
        found = self._batch(index, parsed, number, budget, eps, kept, method)
        return replace(found, names=self.graph.names)

    def _batch(
        self, index: Index, parsed: list[Any], number: int, budget: int, eps: float, kept: int, method: str
    ) -> SparseRows:
        if method == "backward":
            return backward_rows(index, parsed, number, kept, num_workers(self.workers))
        reads = self._probed(parsed, number, budget) if method == "auto" and len(parsed) >= MANY else 0.0
        if method == "auto" and not budget and prefers_backward(index, parsed, number, reads):
            return backward_rows(index, parsed, number, kept, num_workers(self.workers))
        if budget and reads > EXACT_ROUNDS * len(index.transition.graph.indices):
            exact = PageRank(self.alpha, tol=1e-4, dangling=self.dangling)
            found = exact.batch(index.transition.graph, parsed, kept or None)
            return SparseRows(found.indptr, found.ids, found.values.astype(np.float32), found.num_columns)
        return forward_rows(index, parsed, number, budget, _eps(eps), kept, num_workers(self.workers))

    def _probed(self, parsed: list[tuple[np.ndarray, np.ndarray]], rounds: int, budget: int) -> float:
        """Mean entries read by 16 of the queries; of two rounds where the number of rounds is open."""
        probed = parsed[:: len(parsed) // 16][:16]
        return float(np.mean([self._inspected(*seeds, 2 if budget else rounds, 1e-6)["reads"] for seeds in probed]))

    def fingerprint(self, node: Any) -> tuple[np.ndarray, np.ndarray]:
        """Nodes and float64 estimate of the leaky vector of a node, as the index holds it. Raises InputError where there is none."""
        self._built()
        ids, value = self._row(int(self.graph.resolve(node)[0]), node)
        return self.graph.answer(ids, node), value

    def _row(self, place: int, node: Any) -> tuple[np.ndarray, np.ndarray]:
        index = self._built()
        if not index.has_N[place]:
            raise InputError(f"node {node} has no fingerprint")
        row = slice(index.indptr[place], index.indptr[place + 1])
        return index.ids[row].astype(np.int64), index.counts[row].astype(np.float64) * index.lookup.scale_N[place]

    def error_bound(self, rounds: int = 2, sample: int = 0, seed: int = 0) -> float:
        """Bound on the L1 error of a query of ``rounds`` rounds that drops nothing (``eps=0``, every node indexed).

        (1 - alpha)^T times the largest error of a fingerprint: certain with 2 for that, the most that two distributions differ by (a
        row that was cut lacks mass, and differs by less); or, with a ``sample``, an estimate with the largest of so many random rows,
        each compared with the exact one.
        """
        index = self._built()
        number, budget = _rounds(rounds)
        if budget:
            raise InputError("rounds is 'auto'; a bound needs a number of rounds")
        worst = 2.0
        if sample:
            worst = max(self._row_errors(check_count("sample", sample), seed))
        alive = (1.0 - self.alpha) ** number
        # Given that walks end at all, more of them are still under way.
        if self.dangling in GOES_ON:
            alive = min(1.0, alive / float(index.transition.stay_N.min()))
        return min(2.0, alive * worst)

    def _row_errors(self, sample: int, seed: int) -> list[float]:
        """L1 distance of fingerprints from the truth, relative to the sum of the true row."""
        index = self._built()
        graph = index.transition.graph
        nodes = np.flatnonzero(index.has_N)
        chosen = np.random.default_rng(seed).permutation(nodes)[:sample]
        exact, stay_N = PageRank(self.alpha, tol=1e-10, dangling="source"), index.transition.stay_N
        found = []
        for node in chosen:
            score_N = exact.vector(graph, int(node))
            ids, value = self._row(int(node), node)
            score_N[ids] -= value / stay_N[node]
            found.append(float(np.abs(score_N).sum()))
        return found or [2.0]

    # Keeping it

    def update(
        self,
        graph: Any = None,
        *,
        edges_added: Any = None,
        edges_removed: Any = None,
        num_nodes: int | None = None,
        refresh: bool = True,
    ) -> np.ndarray:
        """Go over to a changed graph, given whole or by its edges that are new and gone; only rows that a change touches are walked.

        The result is what `build` makes of the new graph, row by row. Rows are found by what the index holds (full paths, not cut),
        or by what was tracked. New nodes get rows where `build` would give them some, in an index of chosen ``nodes`` none; a node
        whose in-edges fall below ``min_in_degree`` keeps its row. The new graph is `graph` afterwards.

        Args:
            graph: the new graph, whatever `as_graph` takes: the old nodes in their order, new ones after them.
            edges_added: edges instead, rows ``(u, v)`` or ``(u, v, weight)`` or a tuple of columns; ends that are not known are new
                nodes. See `anabranch.graph.delta.with_changes`.
            edges_removed: likewise, without weights.
            num_nodes: nodes afterwards, where some new ones have no edge.
            refresh: walk at once; otherwise rows wait as stale until `refresh`, and new nodes answer without a row of their own.

        Returns:
            Ids of the stale rows: those of new nodes, then those with the largest share of visits at changed nodes.

        Raises:
            InputError: a graph and edges, or neither; edges as in `with_changes`; a graph of fewer nodes or other names; or the index
                cannot say where walks passed.
        """
        index = self._built()
        old = index.transition.graph
        changes = (edges_added, edges_removed, num_nodes)
        if (graph is None) == all(change is None for change in changes):
            raise InputError("give the changed graph, or the edges that were added and removed")
        cut = self.keep is not None or (self.mass is not None and self.mass < 1)
        if (self.mode == "endpoint" or cut) and not self.track:
            raise InputError(
                "this index does not say where walks passed (end points, or cut rows); build it with track=True"
            )
        if graph is None:
            given = with_changes(self.graph, edges_added, edges_removed, num_nodes=num_nodes)
        else:
            given = as_graph(graph, allow_negative=True)
        graph = given.numbered()
        check_successor(old, graph)
        share_N = np.zeros(graph.num_nodes)
        share_N[: old.num_nodes] = np.maximum(index.stale(changed_nodes(old, graph)), self._stale_N)
        grown = index.grown(Transition(graph, self.alpha, self.dangling))
        # Whoever chose nodes chose them all.
        if np.array_equal(np.flatnonzero(index.has_N), self._sources(old, None)):
            wanted = self._sources(graph, None)
            share_N[wanted[~grown.has_N[wanted]]] = 1.0 + NEW
        self._index, self._asked, self._stale_N = grown, given, share_N
        stale = self.stale
        if refresh:
            self.refresh()
        return stale

    @property
    def stale(self) -> np.ndarray:
        """Ids of rows that a change of the graph has made stale, the most affected first."""
        stale = np.flatnonzero(self._stale_N > 0)
        return stale[np.argsort(-self._stale_N[stale], kind="stable")]

    def refresh(self, fraction: float = 1.0) -> int:
        """Walk again for ``fraction`` of the stale rows, the most affected first. Returns how many."""
        if not 0 < fraction <= 1:
            raise InputError(f"fraction is {fraction!r}; the share of stale rows to refresh must lie in (0, 1]")
        index, stale = self._built(), self.stale
        nodes = np.sort(stale[: int(np.ceil(fraction * len(stale)))])
        if len(nodes):
            graph = index.transition.graph
            made = Gathered(graph.num_nodes, nodes, DTYPES[self.dtype], self.track)
            for chunk in make_chunks(graph, self._plan(), nodes, num_workers(self.workers), None):
                made.append(chunk)
            self._index = index.replaced(index.transition, nodes, made)
            self._stale_N = self._stale_N.copy()
            self._stale_N[nodes] = 0.0
        return len(nodes)

    def save(self, path: str | Path) -> None:
        """Write the index into one checked file, all or nothing. Raises InputError for one with stale rows."""
        index = self._built()
        if len(self.stale):
            raise InputError(f"{len(self.stale):,} rows are stale; refresh() before saving")
        index.save(path, self._meta())

    @classmethod
    def load(cls, path: str | Path, graph: Any, *, mmap: bool = False, workers: int | None = None) -> Self:
        """Read what `save` or ``build(out=...)`` wrote; with ``mmap`` rows stay on disk until they are looked up.

        Of a folder that engine ``spark`` wrote, ``graph`` is what its edges make here, and rows are read into memory.

        Raises DataError for a file that is missing, foreign, truncated or damaged, or that was made of another graph.
        """
        given = as_graph(graph, allow_negative=True)
        graph = given.numbered()
        if Path(path).is_dir():
            gathered, params = read_folder(Path(path), given, DTYPES.__getitem__)
            made = cls._of(path, params, workers)
            made._index = gathered.index(Transition(graph, made.alpha, made.dangling), made._unit())
        else:
            arrays, meta = read(path, mmap=mmap)
            check_mark(path, meta["graph"], graph)
            made = cls._of(path, meta["params"], workers)
            made._index = Index(Transition(graph, made.alpha, made.dangling), arrays, made._unit())
        made._asked = given
        made._reset_stale()
        return made

    @classmethod
    def _of(cls, path: str | Path, params: dict[str, Any], workers: int | None) -> Self:
        try:
            return cls(**params, workers=workers)
        except (TypeError, InputError) as error:
            raise DataError(f"{path} holds an index of parameters that this release does not know: {error}") from error

    @property
    def graph(self) -> Graph:
        """The graph of the index."""
        index = self._built()
        return index.transition.graph if self._asked is None else self._asked

    @property
    def rows(self) -> SparseRows:
        """The index: counts of every node's walks (views)."""
        index = self._built()
        return SparseRows(index.indptr, index.ids, index.counts, index.transition.num_nodes)

    @property
    def nbytes(self) -> int:
        """Bytes of the index."""
        return self._built().nbytes

    @property
    def lost_mass(self) -> float:
        """The largest share that a fingerprint lost by being cut (``keep``, ``mass``), or by walks cut at ``max_steps``."""
        index = self._built()
        cut = float((index.cut_N / self.walks).max(initial=0.0)) if not self.long_path else 0.0
        return max(float(1.0 - index.kept_N.min()), cut)


def _rounds(rounds: Any) -> tuple[int, int]:
    """A number of rounds, and a budget of entries or 0."""
    if rounds == "auto":
        return MOST_ROUNDS, BUDGET
    if isinstance(rounds, bool) or not isinstance(rounds, int | np.integer) or not 0 <= rounds <= 1000:
        raise InputError(f"rounds is {rounds!r}; it must be a whole number from 0 to 1000, or 'auto'")
    return int(rounds), 0


def _eps(eps: Any) -> float:
    if isinstance(eps, bool) or not isinstance(eps, int | float | np.floating) or not 0 <= eps < 1:
        raise InputError(f"eps is {eps!r}; the flow below which nothing is followed must lie in [0, 1)")
    return float(eps)


def _one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InputError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
