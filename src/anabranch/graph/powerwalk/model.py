"""`PowerWalk`: an index of fingerprints of a graph, and personalised PageRank of any node or set from it in well under a millisecond."""
# Shapes: N nodes, R indexed nodes, Z entries, Q queries

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np

from anabranch.bounds import shown, whole
from anabranch.errors import DataError, InputError
from anabranch.graph.arguments import as_path, check_flag, check_one_of, is_number
from anabranch.graph.array_file import check_how
from anabranch.graph.coerce import as_graph
from anabranch.graph.header import described
from anabranch.graph.powerwalk.asking import Asking
from anabranch.graph.powerwalk.changing import Changing
from anabranch.graph.powerwalk.held import DTYPES
from anabranch.graph.powerwalk.index import Moves, adopted, make_chunks
from anabranch.graph.powerwalk.stored import KIND, Gathered, Index, check_mark, mark, read, read_folder
from anabranch.graph.ppr.rules import Dangling, Transition, check_alpha, check_dangling
from anabranch.graph.ppr.walks import Mode, check_count, check_mode, check_seed
from anabranch.graph.rows import SparseRows, check_rows, row_file
from anabranch.graph.spark.edges import EdgeFiles
from anabranch.graph.workers import num_workers

# Arguments that say how the index is made, not what it is.
HOW = ("workers", "engine", "spark", "partitions")


class PowerWalk(Asking, Changing):
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
        check_one_of("estimate", estimate, ("ratio", "unbiased"))
        check_one_of("moves", moves, get_args(Moves))
        check_one_of("dtype", dtype, tuple(DTYPES))
        self.long_path, self.track = check_flag("long_path", long_path), check_flag("track", track)
        if self.long_path and (moves != "walkers" or max_steps is not None or estimate != "ratio"):
            raise InputError(
                "long_path goes with moves='walkers', estimate='ratio' and no max_steps: its walks have no number"
            )
        if mass is not None and (not is_number(mass) or not 0 < mass <= 1):
            raise InputError(f"mass is {shown(mass)}; the share of a fingerprint that is kept must lie in (0, 1]")
        self.estimate, self.moves, self.dtype = estimate, moves, dtype
        self.max_steps = None if max_steps is None else check_count("max_steps", max_steps)
        self.keep = None if keep is None else check_count("keep", keep)
        self.mass = None if mass is None else float(mass)
        self.min_in_degree = whole("min_in_degree", min_in_degree, 0)
        self.seed = check_seed(seed)
        self.workers = None if workers is None else check_count("workers", workers)
        check_one_of("engine", engine, ("local", "spark"))
        self.engine, self.spark = engine, spark
        self.partitions = None if partitions is None else check_count("partitions", partitions)

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
        if progress is not None and not callable(progress):
            raise InputError(f"progress is {shown(progress)}; it must be a function of one number, or None")
        out = None if out is None else out if self.engine == "spark" else as_path(out, "out")
        if self.engine == "spark":
            return self._build_files(graph, nodes, out, progress)
        given = as_graph(graph, allow_negative=True)
        graph = given.numbered()
        transition = Transition(graph, self.alpha, self.dangling)
        sources = self._sources(graph, None if nodes is None else given.resolve(nodes))
        is_chosen = self._differs(graph, sources)
        chunks = make_chunks(graph, self._plan(), sources, num_workers(self.workers), progress)
        gathered = Gathered(graph.num_nodes, sources, DTYPES[self.dtype], self.track)
        if out is None:
            for chunk in chunks:
                gathered.append(chunk)
            self._take(gathered.index(transition, self._unit()), given, is_chosen=is_chosen)
            return self
        facts: dict[str, np.ndarray] = {}
        meta = {**self._meta(is_chosen), "graph": mark(graph)}
        with row_file(out, graph.num_nodes, DTYPES[self.dtype], kind=KIND, extra=facts, meta=meta) as file:
            for chunk in chunks:
                gathered.append(chunk, file)
            facts |= gathered.facts()
        arrays, _ = read(out, mmap=True)
        self._take(Index(transition, arrays, self._unit()), given, is_chosen=is_chosen)
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
        if not isinstance(rows, SparseRows):
            raise InputError(f"rows is {shown(rows)}; it must be SparseRows")
        whole("rows.num_columns", rows.num_columns, 0)
        try:
            check_rows(rows.indptr, rows.ids, rows.values, rows.num_columns, None, "rows", "scores")
        except DataError as error:
            why = str(error).partition(": ")[2].partition(";")[0]
            raise InputError(f"rows are no scores of {rows.num_columns} nodes: {why}") from None
        if not (np.isfinite(rows.values).all() and (rows.values >= 0).all()):
            raise InputError("rows are no scores: some are negative, or not finite")
        # Float32 of as many rounds otherwise in each.
        if len(rows) and (largest := float(rows.sums().max())) > 1.001:
            raise InputError(f"rows are no scores: those of one sum to {largest:g}, and they sum to 1 at most")
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
        made._take(gathered.index(transition, 0.0), given, is_chosen=made._differs(graph, nodes[order]))
        return made

    def _unit(self) -> float:
        """What one count of an unbiased estimate is worth; 0 stands for the ratio."""
        if self.estimate == "ratio":
            return 0.0
        return (self.alpha if self.mode == "fullpath" else 1.0) / self.walks

    def _meta(self, is_chosen: bool) -> dict[str, Any]:
        return {"params": self.stored_params(), "chosen": is_chosen}

    def stored_params(self) -> dict[str, Any]:
        """Arguments that decide the index, as JSON."""
        return {name: value for name, value in self.get_params().items() if name not in HOW}

    # Keeping it

    def save(self, path: str | Path) -> None:
        """Write the index into one checked file, all or nothing. Raises InputError for one with stale rows."""
        index = self._built()
        if len(self.stale):
            raise InputError(f"{len(self.stale):,} rows are stale; refresh() before saving")
        index.save(path, self._meta(self._is_chosen))

    @classmethod
    def load(
        cls,
        path: str | Path,
        graph: Any,
        *,
        mmap: bool = False,
        workers: int | None = None,
        verify: bool | None = None,
    ) -> Self:
        """Read what `save` or ``build(out=...)`` wrote; with ``mmap`` rows stay on disk until they are looked up.

        That all rows are of the graph's nodes is always checked. ``verify``: the sums of all arrays too, which reads all of them (default:
        unless the file is mapped), so that a bit that the disk has turned gives no other answer.

        Of a folder that engine ``spark`` wrote, ``graph`` is what its edges make here, and rows are read into memory.

        Raises DataError for a file that is missing, foreign, truncated or damaged, or that was made of another graph.
        """
        check_how(mmap, verify)
        path, workers = as_path(path), None if workers is None else check_count("workers", workers)
        given = as_graph(graph, allow_negative=True)
        graph = given.numbered()
        if path.is_dir():
            gathered, params = read_folder(path, given, DTYPES.__getitem__)
            made = cls._of(path, params, workers)
            index, is_chosen = gathered.index(Transition(graph, made.alpha, made.dangling), made._unit()), False
        else:
            arrays, meta = read(path, mmap=mmap, verify=verify)
            check_mark(path, meta["graph"], graph)
            made = cls._of(path, meta.get("params", {}), workers)
            # Rows that are walked again would be counted in another.
            if arrays["values"].dtype != DTYPES[made.dtype]:
                raise DataError(f"{path} is damaged: its counts are {arrays['values'].dtype}, and it says {made.dtype}")
            index = Index(Transition(graph, made.alpha, made.dangling), arrays, made._unit())
            # Of an older release the rows say it.
            chosen = meta.get("chosen")
            is_chosen = made._differs(graph, np.flatnonzero(index.has_N)) if chosen is None else bool(chosen)
        made._take(index, given, is_chosen=is_chosen)
        return made

    @classmethod
    def _of(cls, path: str | Path, params: dict[str, Any], workers: int | None) -> Self:
        with described(path, "walks of parameters that this release knows"):
            return cls(**params, workers=workers)
