"""What a `PowerWalk` holds: the index, the graph as it was given, and which rows wait to be walked again."""
# Shapes: N nodes

from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from anabranch.errors import InputError
from anabranch.graph.estimator import Estimator
from anabranch.graph.powerwalk.index import Moves, Plan
from anabranch.graph.powerwalk.stored import Index
from anabranch.graph.ppr.rules import Dangling, parse_seeds
from anabranch.graph.ppr.walks import Mode
from anabranch.graph.rows import SparseRows
from anabranch.graph.store import Graph

DTYPES = {"f16": np.float16, "f32": np.float32}


class Held(Estimator):
    """Base of `PowerWalk`; its arguments are told there."""

    _OF_FIT = (
        "alpha",
        "walks",
        "mode",
        "dangling",
        "estimate",
        "moves",
        "long_path",
        "max_steps",
        "keep",
        "mass",
        "min_in_degree",
        "track",
        "dtype",
        "seed",
    )

    alpha: float
    walks: int
    mode: Mode
    dangling: Dangling
    long_path: bool
    keep: int | None
    mass: float | None
    track: bool
    dtype: Literal["f16", "f32"]
    seed: int
    moves: Moves
    max_steps: int | None
    min_in_degree: int
    workers: int | None

    _index: Index | None = None
    # The graph as it was given, which knows what callers call its nodes; the index knows ids.
    _asked: Graph | None = None
    _stale_N: np.ndarray = np.empty(0)
    # Whether it has rows of nodes that were chosen, so that new ones get none.
    _is_chosen: bool = False

    def _parsed(self, seeds: Any) -> tuple[np.ndarray, np.ndarray]:
        """Ids and weights of seeds. Raises InputError for bad ones, or where there is no index."""
        self._built()
        return parse_seeds(self.graph, seeds)

    def _built(self) -> Index:
        if self._index is None:
            raise InputError("there is no index yet; call build(graph) or PowerWalk.load(path, graph) first")
        self._check_as_fitted()
        return self._index

    def _take(self, index: Index, given: Graph | None, *, is_chosen: bool) -> None:
        """An index of the arguments that there are now, of which no row is stale."""
        stale_N = np.zeros(index.transition.num_nodes)
        self._become(_index=index, _asked=given, _is_chosen=is_chosen, _stale_N=stale_N)

    def _sources(self, graph: Graph, nodes: ArrayLike | None) -> np.ndarray:
        """Nodes that get a row: ``nodes``, or all of ``min_in_degree``."""
        if nodes is not None:
            return np.unique(nodes)
        if not self.min_in_degree:
            return np.arange(graph.num_nodes, dtype=np.int64)
        return np.flatnonzero(graph.reversed.degree_N >= self.min_in_degree)

    def _differs(self, graph: Graph, nodes: np.ndarray) -> bool:
        """Whether these nodes were chosen: whoever chose those that all get a row chose none."""
        return not np.array_equal(nodes, self._sources(graph, None))

    def _plan(self) -> Plan:
        """How walks are made."""
        moves = "long_path" if self.long_path else self.moves
        return Plan(
            self.alpha,
            self.walks,
            self.seed,
            self.mode == "fullpath",
            moves,
            self.max_steps or 0,
            self.keep or 0,
            1.0 if self.mass is None else float(self.mass),
            self.track,
        )

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
