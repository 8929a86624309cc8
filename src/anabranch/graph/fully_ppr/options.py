"""Arguments of `FullyPPR`, checked; and which engine, method and plan "auto" means, by bytes and by estimated work."""
# Shapes: N nodes, M stored edges, S sources

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from anabranch import machine
from anabranch.bounds import LARGEST_INT, is_whole, shown
from anabranch.errors import CapacityError, InputError
from anabranch.graph.arguments import check_one_of, is_number, plain
from anabranch.graph.fully_ppr.devices import num_walks
from anabranch.graph.fully_ppr.estimates import is_exact_quicker
from anabranch.graph.fully_ppr.local import scratch_bytes
from anabranch.graph.ppr.blocks import MOST_NODES
from anabranch.graph.ppr.rules import Dangling, Transition, check_alpha, check_dangling, check_tol
from anabranch.graph.ppr.walks import check_count
from anabranch.graph.projection import BLOCK
from anabranch.graph.rows import check_top_k, id_type
from anabranch.graph.store import Graph
from anabranch.graph.workers import num_workers

Engine = Literal["auto", "local", "spark"]
Method = Literal["auto", "walks", "decompose", "exact"]
Estimate = Literal["endpoint", "fullpath"]
Plan = Literal["auto", "broadcast", "partitioned"]
WALKS, INDEX_WALKS = 1000, 100  # defaults; ours
LOCAL_METHODS = ("walks", "decompose", "exact")

# Of a run, about: how often progress is told and how much is lost when it is stopped.
CHUNKS = 64
LARGEST_CHUNK = 4096  # sources
MOST_BYTES = 2**63


@dataclass(frozen=True)
class Options:
    """Arguments of `FullyPPR` as given; `check` refuses bad ones."""

    alpha: float
    walks: int | None
    eps: float | None
    delta: float | None
    p_f: float | None
    top_k: int | None
    min_score: float
    engine: Engine
    method: Method
    estimator: Estimate
    dangling: Dangling
    index_walks: int
    rounds: int
    tol: float
    memory_limit: int | None
    seed: int
    workers: int | None

    def check(self) -> None:
        """Raises InputError for the first argument that is out of range."""
        check_alpha(self.alpha)
        check_dangling(self.dangling)
        check_top_k(self.top_k)
        if self.top_k is not None and self.top_k > LARGEST_INT:
            raise InputError(f"top_k is {shown(self.top_k)}; it must be at most {LARGEST_INT:,}, or None for all")
        check_tol(self.tol)
        check_count("index_walks", self.index_walks)
        for name, value, allowed in (
            ("engine", self.engine, get_args(Engine)),
            ("method", self.method, get_args(Method)),
            ("estimator", self.estimator, get_args(Estimate)),
        ):
            check_one_of(name, value, allowed)
        if self.walks is not None:
            check_count("walks", self.walks)
        self._check_accuracy()
        if self.estimator == "fullpath" and self.num_walks * 40 / self.alpha >= 2**31:
            raise InputError(
                f"walks is {self.num_walks} at alpha = {self.alpha}; counts of visits would not fit 32 bits"
            )
        if not is_whole(self.rounds) or not 0 <= self.rounds <= 100:
            raise InputError(f"rounds is {shown(self.rounds)}; decomposition takes 0 to 100 rounds")
        if not is_number(self.min_score) or not 0 <= self.min_score < 1:
            raise InputError(f"min_score is {shown(self.min_score)}; scores lie between 0 and 1")
        if not is_whole(self.seed):
            raise InputError(f"seed is {shown(self.seed)}; it must be a whole number")
        if self.workers is not None:
            check_count("workers", self.workers)
        limit = self.memory_limit
        if limit is not None and not (is_number(limit) and 1 <= plain(limit) <= MOST_BYTES):
            raise InputError(
                f"memory_limit is {shown(limit)}; it must be a positive number of bytes, or None, and at most 2^63"
            )

    def _check_accuracy(self) -> None:
        accuracy = {"eps": self.eps, "delta": self.delta, "p_f": self.p_f}
        given = [name for name, value in accuracy.items() if value is not None]
        if given and self.walks is not None:
            raise InputError(f"walks and {given[0]} are both given; an accuracy decides the number of walks by itself")
        if given and len(given) < 3:
            missing = next(name for name in accuracy if name not in given)
            raise InputError(f"{given[0]} is given without {missing}; an accuracy is eps, delta and p_f")
        if given:
            if self.estimator == "fullpath":
                raise InputError(
                    "the bound of eps, delta and p_f is for estimator 'endpoint'; visits of one walk are not independent"
                )
            check_count("the number of walks for this eps, delta and p_f", self._bound())

    def _bound(self) -> int:
        assert self.eps is not None
        assert self.delta is not None
        assert self.p_f is not None
        return num_walks(self.eps, self.delta, self.p_f)

    @property
    def num_walks(self) -> int:
        """omega."""
        if self.eps is not None:
            return self._bound()
        return WALKS if self.walks is None else int(self.walks)

    @property
    def num_workers(self) -> int:
        """Threads."""
        return num_workers(self.workers)

    def choose_method(
        self,
        graph: Graph,
        engine: str,
        num_sources: int | None = None,
        *,
        is_kept: bool = False,
        begun: Mapping[str, Any] | None = None,
    ) -> str:
        """What "auto" is: walks where they are asked for or on Spark, else exact or decompose, whichever fits and is less work by
        `is_exact_quicker`; walks where neither fits. Threads and what memory is free now have no part in it.

        Args:
            num_sources: None for all nodes.
            is_kept: whether rows of all sources are kept in memory.
            begun: facts of the run that lies at ``out``, which goes on as it began.
        """
        if engine == "spark":
            return self.spark_method()
        if self.method != "auto":
            return self.method
        if self.walks is not None or self.eps is not None:
            return "walks"
        if begun is not None and begun.get("method") in LOCAL_METHODS:
            return str(begun["method"])
        most, sources = self.most(), graph.num_nodes if num_sources is None else num_sources
        fitting = [
            name for name in ("exact", "decompose") if self.needed(graph, name, 1, sources, is_kept=is_kept) <= most
        ]
        if len(fitting) == 2:
            transition = Transition(graph, self.alpha, self.dangling)
            is_quicker = is_exact_quicker(transition, self.tol, self.index_walks, self.rounds, sources)
            return "exact" if is_quicker else "decompose"
        return fitting[0] if fitting else "walks"

    def row_bytes(self, graph: Graph, method: str) -> int:
        """Bytes of a source's row at most."""
        most = graph.num_nodes if method != "walks" or self.estimator == "fullpath" else self.num_walks
        return row_bytes(graph, self.top_k, most, np.dtype(score_type(method)).itemsize)

    def needed(self, graph: Graph, method: str, workers: int, num_sources: int, *, is_kept: bool) -> float:
        """Bytes of a run on this machine: what it makes once, scratch and rows of each thread, and all rows where they are kept.

        Those are there twice in the end: small parts that are given back as they are put together lie in a heap that keeps them.
        """
        if method == "exact":
            held = exact_bytes(graph, workers)
        elif method == "decompose":
            held = walk_bytes(graph) + index_bytes(graph, self.index_walks, self.alpha) + 24 * graph.num_nodes * workers
        else:
            held = walk_bytes(graph) + workers * scratch_bytes(graph.num_nodes, self.num_walks)
        each = self.row_bytes(graph, method)
        return held + (2 * each * num_sources if is_kept else 0) + 2 * (workers + 1) * each

    def fitting_workers(self, graph: Graph, method: str, num_sources: int, *, is_kept: bool) -> int:
        """Threads: as many as are asked for and there are sources, fewer where so many do not fit into `room`; at least 1."""
        wished = min(self.num_workers, max(num_sources, 1))
        one, two = (self.needed(graph, method, workers, num_sources, is_kept=is_kept) for workers in (1, 2))
        return max(1, min(wished, 1 + int(max(self.room() - one, 0.0) / (two - one))))

    def spark_method(self) -> str:
        """What "auto" is on Spark. Raises InputError for methods of one machine."""
        if self.method not in ("auto", "walks"):
            raise InputError(f"method {self.method!r} runs on this machine alone; on Spark it is 'walks'")
        return "walks"

    def files_method(self) -> str:
        """What "auto" is on Spark from files of edges. Raises InputError for methods of one machine."""
        if self.method == "exact":
            raise InputError(
                "method 'exact' runs on this machine alone; from files of edges it is 'walks' or 'decompose'"
            )
        return "decompose" if self.method == "decompose" else "walks"

    def facts(self, method: str) -> dict[str, Any]:
        """What decides the scores, as JSON."""
        found: dict[str, Any] = {
            "method": method,
            "alpha": self.alpha,
            "dangling": self.dangling,
            "top_k": self.top_k,
            "min_score": self.min_score,
        }
        if method == "exact":
            return {**found, "tol": self.tol}
        found |= {"seed": int(self.seed)}
        if method == "decompose":
            return {**found, "index_walks": self.index_walks, "rounds": self.rounds}
        return {**found, "walks": self.num_walks, "estimator": self.estimator}

    def room(self) -> int:
        """Bytes that may be used now."""
        return int(self.memory_limit) if self.memory_limit is not None else machine.room_bytes()

    def most(self) -> int:
        """Bytes that may be used at most: of the machine, all of it, whatever others take of it now."""
        return int(self.memory_limit) if self.memory_limit is not None else machine.whole_bytes()


def score_type(method: str) -> type[np.floating]:
    """Of scores of a method on this machine."""
    return np.float64 if method == "exact" else np.float32


def walk_bytes(graph: Graph) -> int:
    """Bytes of what walks read: the graph, and alias tables of 8 bytes an edge where it has weights."""
    weights = 0 if graph.weights is None else graph.weights.nbytes
    return graph.nbytes - weights + (0 if graph.weights is None else 8 * len(graph.indices))


def index_bytes(graph: Graph, walks: int, alpha: float) -> float:
    """Bytes of a full-path index at most: a visit is an id and a 16-bit count at worst, and a walk makes 1 / alpha of them."""
    return graph.num_nodes * min(graph.num_nodes, walks / alpha) * (np.dtype(id_type(graph.num_nodes)).itemsize + 2)


def exact_bytes(graph: Graph, workers: int) -> float:
    """Bytes of exact solutions, about: eliminating, and ten vectors of N or four blocks of `BLOCK` vectors per thread."""
    size = graph.num_nodes
    in_blocks = 32 * BLOCK * workers * size if not graph.is_directed and size <= MOST_NODES else 0
    return graph.nbytes + 30 * (len(graph.indices) + size) + 80 * size * (workers + 1) + in_blocks


def row_bytes(graph: Graph, top_k: int | None, most: int, score_bytes: int = 4) -> int:
    """Bytes of a row of the result at most."""
    entries = min(graph.num_nodes, most, top_k or graph.num_nodes)
    return entries * (np.dtype(id_type(graph.num_nodes)).itemsize + score_bytes) + 8


def choose_chunk(num_sources: int, workers: int, per_row: int, room: float) -> int:
    """Sources of a chunk: about `CHUNKS` chunks, no larger than memory and `LARGEST_CHUNK` allow.

    A worker holds the rows of a chunk twice, while it makes them and while they are written.
    """
    wished = min(-(-num_sources // max(CHUNKS, workers)), LARGEST_CHUNK)
    fits = max(int(room / (2 * (workers + 1) * per_row)), 1)
    return max(1, min(wished, fits))


def check_room(needed: float, room: float, what: str, hint: str) -> None:
    """Raises CapacityError where more is needed than there is."""
    if needed > room:
        raise CapacityError(
            f"{what} needs about {needed / 2**20:,.1f} MiB, {room / 2**20:,.1f} MiB are allowed; {hint}"
        )
