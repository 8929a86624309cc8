"""`PageRank`: one object for global and personalised PageRank by whichever method is quickest."""
# Shapes: N nodes, Q queries

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Generic, Literal, Self, TypeVar, get_args

import numpy as np

from anabranch.bounds import whole
from anabranch.graph.arguments import check_flag, check_one_of
from anabranch.graph.coerce import as_graph
from anabranch.graph.estimator import Estimator
from anabranch.graph.ppr.blocks import Blocks
from anabranch.graph.ppr.factor import Factor, as_it_is, prepare
from anabranch.graph.ppr.leaky import from_anywhere
from anabranch.graph.ppr.once import solve_once
from anabranch.graph.ppr.power import BLOCK, power_iteration, power_rows
from anabranch.graph.ppr.push import PushBuffers, forward_push
from anabranch.graph.ppr.rules import (
    Dangling,
    Transition,
    answer,
    as_queries,
    check_alpha,
    check_dangling,
    check_tol,
    parse_seeds,
    seed_nodes,
)
from anabranch.graph.ppr.solve import Workspace, solve
from anabranch.graph.ppr.walks import check_count, check_seed, monte_carlo
from anabranch.graph.rows import SparseRows, check_top_k, order_top, top_of_dense
from anabranch.graph.store import Graph

T = TypeVar("T")
Method = Literal["auto", "solve", "power", "push", "monte_carlo"]

# Stored edges above which nothing is eliminated: it would take seconds and gigabytes.
LARGE = 5_000_000

# Passes over the edges that eliminating is reckoned to cost; so much is spent on queries before it is thought worth it.
WORTH = 100

# A batch of fewer is answered one by one.
FEW_QUERIES = 8

# That one query of a graph that is not prepared is reckoned to cost.
PASSES = 12


class PageRank(Estimator):
    """PageRank and personalised PageRank. Scores are probabilities and sum to 1 within ``tol``.

    Args:
        alpha: probability that a walk ends (teleports) before each step; 1 - alpha is what other libraries call damping.
        method: ``solve`` (elimination once per graph, then conjugate gradients), ``power`` (power iteration), ``push`` (forward push,
            which looks at no more of the graph than the tolerance needs), ``monte_carlo`` (``walks`` random walks, no bound), or
            ``auto``: while the graph is not prepared, push, and where that would read much of the graph conjugate gradients for what it
            leaves (`anabranch.graph.ppr.once`); ``solve`` once queries have cost what preparing does, a batch is large enough, or
            after `prepare`. Answers before and after agree within ``tol``, not to the bit.
        tol: L1 error allowed; proven for every method but ``monte_carlo``.
        dangling: what walks do at nodes without out-edges, see `anabranch.graph.ppr.rules`. The default is networkx's rule; ``source``
            was that of earlier releases, and differs for several seeds.
        walks: of ``monte_carlo``, per query.
        seed: of its randomness.

    Memory beside the graph, in bytes, for N nodes and M stored edges (w is 4 for weighted graphs, else 0; `peak_bytes` adds them up):

        scores           16 N, and 24 N for degrees, their inverses and sums of weights, which stay with the graph
        a query          180 N; directed graphs and those with self-loops 215 N + (4 + w) M: edges by target
        prepared         at most 30 (M + N) more while nodes are eliminated, of which a factor of 12 bytes an entry stays; above 5 million
                         stored edges nothing is eliminated, and no edge of an undirected graph without loops is copied

    Raises:
        InputError: an argument out of range.

    Example:
        >>> PageRank(alpha=0.15).personalized(graph, 7, top_k=10)  # doctest: +SKIP
        (array([...]), array([...]))
    """

    def __init__(
        self,
        alpha: float = 0.15,
        method: Method = "auto",
        tol: float = 1e-6,
        dangling: Dangling = "restart",
        walks: int = 10_000,
        seed: int = 0,
    ) -> None:
        check_one_of("method", method, get_args(Method))
        self.alpha = check_alpha(alpha)
        self.method = method
        self.tol = check_tol(tol)
        self.dangling = check_dangling(dangling)
        self.walks = check_count("walks", walks)
        self.seed = check_seed(seed)
        self._last: _Prepared | None = None

    def scores(self, graph: Any) -> np.ndarray:
        """The global PageRank, float64 [N], in the order of nodes of ``as_graph(graph)``: walks start anywhere.

        Equals that of other libraries at damping 1 - alpha.
        """
        transition = self._prepared(graph).transition
        dead, is_absorbing = transition.dangling_nodes, self.dangling == "absorb"
        parts = (transition.out, transition.graph.strength_N, self.alpha, is_absorbing)
        if not len(dead) or is_absorbing:
            leaky_N, _ = from_anywhere(*parts, self.tol)
            leaky_N[dead] /= self.alpha
            return leaky_N
        # A walk that starts anywhere goes back to anywhere: each lost one starts over. To scale twice the error at most.
        leaky_N, _ = from_anywhere(*parts, self.tol / 2)
        leaky_N /= leaky_N.sum()
        return leaky_N

    def prepare(self, graph: Any) -> Self:
        """Do now what queries of this graph share (for ``auto`` and ``solve``: elimination), so that the first is as quick as others.

        Raises InputError for a graph without nodes or with negative weights.
        """
        prepared = self._prepared(graph)
        if self.method in ("auto", "solve"):
            prepared.make_factor()
        return self

    @staticmethod
    def peak_bytes(
        num_nodes: int,
        num_stored_edges: int,
        is_weighted: bool = False,
        is_directed: bool = False,
        *,
        prepared: bool = False,
    ) -> int:
        """Bytes of arrays that a query by ``auto`` holds at most beside the graph, before it is prepared or after (formula: see the class).

        The system may count more: up to 1.14 times as much in ``benchmarks/ppr.py``, at the first query of a directed graph.
        """
        num_nodes = whole("num_nodes", num_nodes, 0)
        num_stored_edges = whole("num_stored_edges", num_stored_edges, 0)
        is_directed, prepared = check_flag("is_directed", is_directed), check_flag("prepared", prepared)
        entries, width = num_stored_edges + num_nodes, 4 + 4 * check_flag("is_weighted", is_weighted)
        once = 215 * num_nodes + width * num_stored_edges if is_directed else 180 * num_nodes
        return once + 30 * entries if prepared and num_stored_edges <= LARGE else once

    def personalized(self, graph: Any, seeds: Any, top_k: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Scores from one node or a set: nodes and scores float64 of all positive or the ``top_k`` largest, by falling score.

        Args:
            graph: whatever `as_graph` takes; for many queries of what is no `Graph`, turn it into one once.
            seeds: a node; a list of nodes; a mapping node -> weight; or ``(nodes, weights)``. By id or by name (`Graph.resolve`).
            top_k: how many to return; None for all.

        Returns:
            Nodes as the seeds were given (int64 ids, or names), and their scores.

        Raises:
            InputError: an unknown node, bad weights, ``top_k`` below 1, a graph without nodes or with negative weights.
        """
        prepared = self._prepared(graph)
        ids, scores = self._ranked(prepared, prepared.by_id(seeds), top_k)
        return answer(prepared.graph, ids, seeds), scores

    def _ranked(self, prepared: "_Prepared", seeds: Any, top_k: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Ids and scores of seeds given by id."""
        check_top_k(top_k)
        transition = prepared.transition
        if self.method == "monte_carlo":
            return monte_carlo(transition, seeds, walks=self.walks, seed=self.seed, top_k=top_k)
        if self.method == "push":
            buffers = prepared.buffers.take()
            found = forward_push(transition, seeds, tol=self.tol, top_k=top_k, buffers=buffers)
            prepared.buffers.give(buffers)
            return found.ids, found.scores
        if self.method == "auto" and not prepared.is_worth():
            ids, value = self._once(prepared, seeds)
            if ids is None:
                return top_of_dense(value, top_k)
            count = order_top(ids, value, len(ids), check_top_k(top_k))
            return ids[:count], value[:count]
        return top_of_dense(self._vector(prepared, seeds), top_k)

    def vector(self, graph: Any, seeds: Any) -> np.ndarray:
        """Scores from one node or a set, dense float64 [N] in the order of nodes of ``as_graph(graph)``. Raises as `personalized`."""
        prepared = self._prepared(graph)
        by_id = prepared.by_id(seeds)
        if self.method not in ("push", "monte_carlo"):
            return self._vector(prepared, by_id)
        return _dense(*self._ranked(prepared, by_id, None), prepared.graph.num_nodes)

    def _vector(self, prepared: "_Prepared", seeds: Any) -> np.ndarray:
        transition = prepared.transition
        if self.method == "power":
            return power_iteration(transition, seeds, tol=self.tol)
        if self.method == "auto" and not prepared.is_worth():
            found, value = self._once(prepared, seeds)
            return value if found is None else _dense(found, value, transition.num_nodes)
        ids, share = parse_seeds(transition.graph, seeds)
        factor, workspaces = prepared.make_factor()
        workspace = workspaces.take()
        scores_N, _, _ = solve(transition, factor, ids, transition.start(ids, share), self.tol, workspace)
        workspaces.give(workspace)
        return transition.finish(scores_N, ids, share)

    def batch(self, graph: Any, seeds_list: Sequence[Any], top_k: int | None = None) -> SparseRows:
        """`personalized` of many queries: one row each, in their order, float64, by ids; ``names`` of the rows has the graph's names.

        On graphs of which nothing can be eliminated, ``auto`` and ``solve`` take them in blocks (`anabranch.graph.ppr.blocks`). Raises as
        `personalized`.
        """
        check_top_k(top_k)
        prepared = self._prepared(graph)
        asked, names = [prepared.by_id(seeds) for seeds in as_queries(seeds_list)], prepared.graph.names
        if self.method == "power":
            found = power_rows(prepared.transition, asked, tol=self.tol, top_k=top_k, block=BLOCK)
            return replace(found, names=names)
        if self.method == "auto":
            prepared.expect(len(asked))
        blocks = None
        if len(asked) >= FEW_QUERIES and (self.method == "solve" or (self.method == "auto" and prepared.is_worth())):
            blocks = prepared.make_blocks(self.tol)
        if blocks is not None:
            rows = blocks.rows([parse_seeds(prepared.transition.graph, seeds) for seeds in asked], top_k)
        else:
            rows = [self._ranked(prepared, seeds, top_k) for seeds in asked]
        return SparseRows.from_rows(rows, prepared.graph.num_nodes, dtype=np.float64, names=names)

    def blocks(self, graph: Any) -> Blocks | None:
        """What answers many queries of the graph quickest, by ``auto`` and ``solve``; None where that is one after another."""
        return self._prepared(graph).make_blocks(self.tol) if self.method in ("auto", "solve") else None

    def _once(self, prepared: "_Prepared", seeds: Any) -> tuple[np.ndarray | None, np.ndarray]:
        """Scores without preparing: of the nodes that are given, or of all."""
        transition = prepared.transition
        ids, share = parse_seeds(transition.graph, seeds)
        buffers = prepared.buffers.take()
        taken: list[tuple[_Spare[Workspace], Workspace]] = []

        def fall_back() -> tuple[Factor, Workspace]:
            factor, workspaces = prepared.make_plain()
            taken.append((workspaces, workspaces.take()))
            return factor, taken[0][1]

        found = solve_once(transition, ids, transition.start(ids, share), self.tol, buffers, fall_back)
        for workspaces, workspace in taken:
            workspaces.give(workspace)
        prepared.buffers.give(buffers)
        prepared.reads += found.reads
        if found.ids is None:
            return None, transition.finish(found.value, ids, share)
        return transition.finish_sparse(found.ids, found.value, ids, share)

    def _prepared(self, given: Any) -> "_Prepared":
        """What queries of the graph share. That of the last graph is kept, since making it costs passes over the edges."""
        last, rules = self._last, (self.alpha, self.dangling)
        graph = given if isinstance(given, Graph) else as_graph(given, allow_negative=True)
        # What was converted is another object each time, and the same graph if nobody changed it.
        if (
            last is None
            or last.rules != rules
            or not (last.graph is graph or (given is not graph and last.is_of(graph)))
        ):
            self._last = last = _Prepared(graph, self.alpha, self.dangling)
        return last


def _dense(ids: np.ndarray, value: np.ndarray, num_nodes: int) -> np.ndarray:
    found_N = np.zeros(num_nodes)
    found_N[ids] = value
    return found_N


class _Prepared:
    """A graph's transition, its factors once they are needed, and arrays that queries hand on. Names end here: the transition knows ids.

    Attributes:
        reads: edges that queries have read so far, while the graph was not prepared.
    """

    def __init__(self, graph: Graph, alpha: float, dangling: Dangling) -> None:
        self.graph = graph
        self.transition = transition = Transition(graph.numbered(), alpha, dangling)
        self.rules = (alpha, dangling)
        self.buffers = _Spare(lambda: PushBuffers(transition.num_nodes))
        self.reads = 0
        self._plain: tuple[Factor, _Spare[Workspace]] | None = None
        self._factor: tuple[Factor, _Spare[Workspace]] | None = None
        self._blocks: Blocks | None = None
        self._lock = threading.RLock()

    def is_of(self, graph: Graph) -> bool:
        """Whether this is the same graph, called the same."""
        return self.graph.by_name == graph.by_name and self.graph.equals(graph)

    def by_id(self, seeds: Any) -> Any:
        """Seeds whose nodes are ids. Raises InputError for a name that no node has."""
        is_named = self.graph.names is not None and self.graph.are_names(seed_nodes(self.graph, seeds)[0])
        return parse_seeds(self.graph, seeds) if is_named else seeds

    def is_worth(self) -> bool:
        """Whether queries go by the factor: it is there, or they have cost as much as making it does."""
        graph = self.transition.graph
        return self._factor is not None or self.reads >= WORTH * (len(graph.indices) + graph.num_nodes)

    def expect(self, queries: int) -> None:
        """That many will come."""
        if queries * PASSES >= WORTH:
            self.make_factor()

    def make_factor(self) -> "tuple[Factor, _Spare[Workspace]]":
        """The factor, eliminated where the graph is not too large for it, made once, and scratch for it."""
        with self._lock:
            if self._factor is None:
                is_large = len(self.transition.graph.indices) > LARGE
                self._factor = self.make_plain() if is_large else _with_scratch(prepare(self.transition))
                # Its rows of a directed graph are not needed any more.
                self._plain = None
            return self._factor

    def make_blocks(self, tol: float) -> Blocks | None:
        """Of a graph that stays whole, made once for a tolerance."""
        factor, _ = self.make_factor()
        if len(factor.diagonal_P) or not Blocks.suits(self.transition, tol):
            return None
        with self._lock:
            if self._blocks is None or self._blocks.tol != tol:
                self._blocks = Blocks(self.transition, tol)
            return self._blocks

    def make_plain(self) -> "tuple[Factor, _Spare[Workspace]]":
        """The graph as it is, made once, and scratch for it."""
        with self._lock:
            if self._plain is None:
                self._plain = _with_scratch(as_it_is(self.transition))
            return self._plain


def _with_scratch(factor: Factor) -> "tuple[Factor, _Spare[Workspace]]":
    return factor, _Spare(lambda: Workspace(factor))


class _Spare(Generic[T]):
    """Arrays for one query at a time each: taken by a thread, given back, made where none is left."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make, self._left = make, list[T]()

    def take(self) -> T:
        try:
            return self._left.pop()
        except IndexError:
            return self._make()

    def give(self, used: T) -> None:
        self._left.append(used)
