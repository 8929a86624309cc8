"""Which files are served, and what is made of them: at most one index of vectors, and at most one source of PageRank."""

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from anabranch.errors import AnabranchError, CapacityError, DataError, InputError
from anabranch.graph.array_file import MAGIC, kind_of
from anabranch.graph.names import Names, names_path
from anabranch.graph.serve.reach import reachable

if TYPE_CHECKING:
    from anabranch.graph.disk import DiskIndex
    from anabranch.graph.hnsw import HNSW
    from anabranch.graph.live import LiveIndex
    from anabranch.graph.serve.limits import Writes
    from anabranch.graph.store import Graph

# To read files that change while they are read.
TRIES = 5

# Elements of an index that is made to compile what changes need: enough to be inserted side by side.
TRIED = 1200


class Scores(Protocol):
    """What answers PageRank requests. Safe for several threads at once."""

    names: Names | None
    num_nodes: int
    about: dict[str, Any]

    def top(self, ids: np.ndarray, weights: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and scores of the k most related nodes of a weighted set."""

    def most(self, ids: np.ndarray, k: int) -> int:
        """How many of k scores there may be, by a short look at the graph (`anabranch.graph.serve.reach`)."""


@dataclass(frozen=True)
class Vectors:
    """An index of vectors; what takes its changes, or why nothing does, and then the names of its elements."""

    index: Any
    fixed_names: Names | None
    about: dict[str, Any]
    live: "LiveIndex | None" = None
    why_read_only: str = "it was started so"

    @property
    def names(self) -> Names | None:
        """Of elements; None where they have none. The first that come into an empty index may bring some."""
        return self.fixed_names if self.live is None else self.live.names

    def to_dict(self) -> dict[str, Any]:
        """What is served, as it is now."""
        found = {**self.about, "vectors": len(self.index), "named": self.names is not None}
        if self.live is not None:
            found["writes"] = {
                "fsync": self.live.fsync,
                "number": self.live.number,
                "log_bytes": self.live.log_bytes,
                "failure": self.live.failure,
            }
        return found


@dataclass(frozen=True)
class Loaded:
    """What a server answers from. Never changed: new files make a new one, and requests keep the one they began with.

    Attributes:
        vectors: for searches, or None.
        scores: for PageRank, or None.
        generation: 1 for the first, then one more each time.
        loaded_at: seconds since 1970.
    """

    vectors: Vectors | None
    scores: Scores | None
    generation: int = 1
    loaded_at: float = field(default_factory=time.time)

    def to_dict(self) -> dict[str, Any]:
        """What is served, JSON-ready."""
        return {
            "generation": self.generation,
            "loaded_at": self.loaded_at,
            "search": None if self.vectors is None else self.vectors.to_dict(),
            "ppr": None if self.scores is None else self.scores.about,
        }


class Sources:
    """Files to serve.

    Args:
        paths: an index of vectors (`HNSW.save`), a graph in any form that `read_graph` takes, or both; with a graph also an index of
            its walks (`PowerWalk.save`), which answers PageRank then.
        mmap: leave our own files on disk until they are used. Replace them by renaming then, never by writing into them.
        alpha: of PageRank, the probability that a walk ends before each step.
        method: of `PageRank`.
        tol: of `PageRank`.
        rounds: of `PowerWalk`, a number or "auto".
        directed: how a list of edges is read, as in `read_graph`.
        writes: how changes of the index of vectors are taken; None for not at all.
        why_read_only: what who sends one is told then.

    Raises InputError without a path.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        mmap: bool = False,
        alpha: float = 0.15,
        method: str = "auto",
        tol: float = 1e-6,
        rounds: Any = 2,
        directed: bool | None = None,
        writes: "Writes | None" = None,
        why_read_only: str = "it was started so",
    ) -> None:
        if not paths:
            raise InputError("there is nothing to serve; name an index or a graph")
        self.paths = [Path(path) for path in paths]
        self.mmap, self.directed = mmap, directed
        self.alpha, self.method, self.tol, self.rounds = alpha, method, tol, rounds
        self.writes, self.why_read_only = writes, why_read_only
        # What takes changes now, over all loadings of one file.
        self._live: LiveIndex | None = None

    def signature(self) -> tuple[Any, ...]:
        """Changes when a file does: inode, size and time of each, and of the names beside it."""
        return tuple(_stat(path) for own in self.paths for path in (own, names_path(own)))

    def load(self, generation: int = 1) -> Loaded:
        """Read all files, and answer one request of each kind, so that kernels are compiled and pages are there.

        An index that took changes stays; one that took some cannot be replaced by a new file, which would lose them.

        Raises DataError for a file that is missing, foreign or damaged, InputError where two files answer the same requests.
        """
        for _ in range(TRIES):
            before, opened = self.signature(), ExitStack()
            with opened:
                try:
                    found = self._load(generation, opened)
                except AnabranchError:
                    if self.signature() == before:
                        raise
                    continue
                except MemoryError as error:
                    raise CapacityError(f"no memory for {', '.join(map(str, self.paths))} ({error})") from error
                if self.signature() == before:
                    self._replace(None if found.vectors is None else found.vectors.live)
                    opened.pop_all()
                    return found
        raise DataError(f"files change faster than they can be read: {', '.join(map(str, self.paths))}")

    def close(self) -> None:
        """Take no changes any more; what was taken is on the disk."""
        if self._live is not None:
            self._live.close()

    def _replace(self, live: "LiveIndex | None") -> None:
        """Let changes go to another index from now on. Raises DataError if the one before took some meanwhile."""
        old = self._live
        if old is live:
            return
        if old is not None and not old.retire():
            raise DataError(_taken(old))
        if old is not None:
            old.close()
        self._live = live

    def _load(self, generation: int, opened: ExitStack) -> Loaded:
        by_role: dict[str, list[tuple[Path, str | None]]] = {}
        for path in self.paths:
            kind = _kind(path)
            if kind not in _ROLES:
                raise DataError(f"{path} holds a {kind}; what can be served is an index of vectors, a graph, or both")
            by_role.setdefault(_ROLES[kind], []).append((path, kind))
        for role, found in by_role.items():
            if len(found) > 1:
                raise InputError(f"{found[1][0]} is a second {role}; a server has one")
        index, graph, walks = (
            by_role.get(role, [(None, None)])[0][0] for role in ("index of vectors", "graph", "index of walks")
        )
        if walks is not None and graph is None:
            raise InputError(f"{walks} is an index of walks; name its graph too, which queries walk on")
        scores: Scores | None = None
        if graph is not None:
            scores = GraphScores(graph, self) if walks is None else WalkScores(walks, graph, self)
        return Loaded(None if index is None else self._vectors(index, opened), scores, generation)

    def _vectors(self, path: Path, opened: ExitStack) -> Vectors:
        from anabranch.graph.disk import is_on_disk
        from anabranch.graph.live import open_named
        from anabranch.graph.live.folder import row_of

        live, why = None, self.why_read_only
        if is_on_disk(path):
            why = "it is on disk, and made anew when its vectors change"
        elif self.writes is not None:
            live = self._live_of(path, opened)
        index: HNSW | DiskIndex
        index, names = open_named(path, mmap=self.mmap) if live is None else (live.index, live.names)
        if len(index):
            # Not an element's own vector: a change may just be moving it.
            query = np.ones((1, index.row_size), row_of(index)[1])
            # One is measured, many are walked among.
            for ids in (index.ids[:1], index.ids[: max(3, len(index) // 50)]):
                index.search(query, 1, 1, index.prepare_filter(ids), workers=1)
            for queries in (query, query.repeat(2, 0)):
                index.search(queries, 1, workers=1)
        about = {
            "file": str(path),
            "vectors": len(index),
            "dim": index.dim,
            "metric": index.metric,
            "dtype": index.dtype,
        }
        return Vectors(index, names, about, live, why)

    def _live_of(self, path: Path, opened: ExitStack) -> "LiveIndex":
        """What takes changes of a file: the one that does already, unless the file was replaced or another process took changes."""
        from anabranch.graph.live import LiveIndex

        assert self.writes is not None
        if self._live is not None and self._live.path == path and self._live.is_current():
            return self._live
        if self._live is not None and self._live.has_changes:
            raise DataError(_taken(self._live))
        live = LiveIndex.open(
            path,
            fsync=self.writes.fsync,
            snapshot_bytes=self.writes.snapshot_bytes,
            most=self.writes.vectors,
            mmap=self.mmap,
        )
        opened.callback(live.close)
        _try_changes(live.index)
        return live


def _try_changes(index: Any) -> None:
    """Make changes of all kinds to a small index of the same kind, and search it, so that no request waits for kernels to be compiled."""
    from anabranch.graph import HNSW

    options = ("metric", "dtype", "quantization", "rerank", "heuristic", "extend_candidates", "keep_pruned", "flat")
    made = HNSW(8, M=2, ef_construction=2, **{name: getattr(index, name) for name in options})
    ids = np.arange(TRIED)
    drawn = np.random.default_rng(0).normal(size=(TRIED, 8)).astype(np.float32)
    rows: np.ndarray = drawn > 0 if index.metric == "hamming" else drawn
    made.add(rows, ids)
    if index.quantization is not None:
        # There are too few for it to learn codes by itself.
        made.train()
    # So many that it compacts.
    made.remove(ids[: TRIED // 2])
    made.add(rows[: TRIED // 2], ids[: TRIED // 2])
    # Into the place of one that went.
    made.remove(ids[:1])
    made.add(rows[:1], ids[:1])
    # What is served may be empty still, and have nothing to be searched for.
    for filter in (None, ids[:1], ids[::2]):
        prepared = None if filter is None else made.prepare_filter(filter)
        for queries in (rows[:1], rows[:2]):
            made.search(queries, 1, filter=prepared)
    # One that went may not be found.
    made.remove(ids[:1])
    made.search(rows[:1], 1)


def _taken(live: "LiveIndex") -> str:
    return (
        f"{live.path} was replaced, and {live.number:,} changes were taken of the old one; stop the server, and move the folder with "
        "the changes away to begin with the new file"
    )


class GraphScores:
    """PageRank computed from a graph, by `PageRank`."""

    def __init__(self, path: Path, sources: Sources) -> None:
        from anabranch.graph.ppr import PageRank

        self._graph = _read_graph(path, sources)
        self._engine = PageRank(alpha=sources.alpha, method=sources.method, tol=sources.tol)  # type: ignore[arg-type]
        self.num_nodes = self._graph.num_nodes
        self.names = None if self._graph.names is None else Names(self._graph.names)
        self.about: dict[str, Any] = {
            "file": str(path),
            "engine": "graph",
            **_facts(self._graph),
            "alpha": sources.alpha,
            "method": sources.method,
        }
        if self.num_nodes:
            # Now, not within a request.
            self._engine.prepare(self._graph)
            self.top(np.zeros(1, np.int64), np.ones(1), 1)

    def top(self, ids: np.ndarray, weights: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Scores`."""
        return self._engine.personalized(self._graph, (ids, weights), k)

    def most(self, ids: np.ndarray, k: int) -> int:
        """See `Scores`."""
        return reachable(self._graph, ids, min(k, self.num_nodes))


class WalkScores:
    """PageRank estimated from an index of walks, by `PowerWalk`."""

    def __init__(self, path: Path, graph_path: Path, sources: Sources) -> None:
        from anabranch.graph.powerwalk import PowerWalk

        graph = _read_graph(graph_path, sources)
        self._engine = PowerWalk.load(path, graph, mmap=sources.mmap)
        self._graph = graph
        self._rounds = sources.rounds
        self.num_nodes = graph.num_nodes
        self.names = None if graph.names is None else Names(graph.names)
        self.about: dict[str, Any] = {
            "file": str(path),
            "engine": "powerwalk",
            "graph": str(graph_path),
            **_facts(graph),
            "alpha": self._engine.alpha,
            "walks": self._engine.walks,
            "rounds": sources.rounds,
        }
        self.top(np.zeros(1, np.int64), np.ones(1), 1)

    def top(self, ids: np.ndarray, weights: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Scores`."""
        return self._engine.query((ids, weights), k, self._rounds)

    def most(self, ids: np.ndarray, k: int) -> int:
        """See `Scores`."""
        # From a node without out-edges walks may go on anywhere.
        if self._engine.dangling == "uniform":
            return min(k, self.num_nodes)
        return reachable(self._graph, ids, min(k, self.num_nodes))


_ROLES = {
    "hnsw index": "index of vectors",
    "disk vector index": "index of vectors",
    "powerwalk-index": "index of walks",
    "graph": "graph",
    None: "graph",
}


def _read_graph(path: Path, sources: Sources) -> "Graph":
    from anabranch.graph.formats import read_graph
    from anabranch.graph.store import Graph

    if _kind(path) == "graph" and sources.mmap:
        return Graph.load(path, mmap=True)
    return read_graph(path, directed=sources.directed)


def _facts(graph: "Graph") -> dict[str, Any]:
    return {
        "nodes": graph.num_nodes,
        "edges": graph.num_edges,
        "directed": graph.is_directed,
        "named": graph.names is not None,
    }


def _kind(path: Path) -> str | None:
    """What one of our own files holds; None for another kind of file."""
    try:
        with open(path, "rb") as file:
            own = file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise DataError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from error
    return kind_of(path) if own else None


def _stat(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
