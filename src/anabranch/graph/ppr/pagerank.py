"""`PageRank`: one object for global and personalised PageRank by whichever method is quickest."""
# Shapes: N nodes, Q queries

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Generic, Literal, TypeVar, get_args

import numpy as np

from anabranch.errors import InputError
from anabranch.graph.coerce import as_graph
from anabranch.graph.estimator import Estimator
from anabranch.graph.ppr.power import BLOCK, power_iteration, power_rows
from anabranch.graph.ppr.push import PushBuffers, forward_push
from anabranch.graph.ppr.rules import (
    GOES_ON,
    Dangling,
    Transition,
    answer,
    check_alpha,
    check_dangling,
    check_tol,
    parse_seeds,
    seed_nodes,
)
from anabranch.graph.ppr.solve import FEW, Factor, Workspace, prepare, solve
from anabranch.graph.ppr.walks import check_count, check_seed, monte_carlo
from anabranch.graph.rows import SparseRows, check_top_k, top_of_dense
from anabranch.graph.store import Graph

T = TypeVar("T")
Method = Literal["auto", "solve", "power", "push", "monte_carlo"]

# Stored edges above which `prepare` leaves the graph as it is: elimination would take seconds and gigabytes.
LARGE = 5_000_000


class PageRank(Estimator):
    """PageRank and personalised PageRank. Scores are probabilities and sum to 1 within ``tol``.

    Args:
        alpha: probability that a walk ends (teleports) before each step; 1 - alpha is what other libraries call damping.
        method: ``solve`` (elimination once per graph, then conjugate gradients), ``power`` (power iteration), ``push`` (forward push,
            which looks at no more of the graph than the tolerance needs), ``monte_carlo`` (``walks`` random walks, no bound), or
            ``auto``: ``solve``.
        tol: L1 error allowed; proven for every method but ``monte_carlo``.
        dangling: what walks do at nodes without out-edges, see `anabranch.graph.ppr.rules`. The default is networkx's rule; ``source``
            was that of earlier releases, and differs for several seeds.
        walks: of ``monte_carlo``, per query.
        seed: of its randomness.

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
        if method not in get_args(Method):
            raise InputError(f"method is {method!r}; it must be one of {', '.join(get_args(Method))}")
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
        # A walk that starts anywhere goes back to anywhere.
        if transition.dangling in GOES_ON:
            transition = Transition(transition.graph, self.alpha, "uniform")
        return power_iteration(transition, np.arange(transition.num_nodes), tol=self.tol)

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
        return top_of_dense(self._vector(prepared, seeds), top_k)

    def vector(self, graph: Any, seeds: Any) -> np.ndarray:
        """Scores from one node or a set, dense float64 [N] in the order of nodes of ``as_graph(graph)``. Raises as `personalized`."""
        prepared = self._prepared(graph)
        by_id = prepared.by_id(seeds)
        if self.method not in ("push", "monte_carlo"):
            return self._vector(prepared, by_id)
        ids, scores = self._ranked(prepared, by_id, None)
        found_N = np.zeros(prepared.graph.num_nodes)
        found_N[ids] = scores
        return found_N

    def _vector(self, prepared: "_Prepared", seeds: Any) -> np.ndarray:
        transition = prepared.transition
        if self.method == "power":
            return power_iteration(transition, seeds, tol=self.tol)
        ids, share = parse_seeds(transition.graph, seeds)
        workspace = prepared.workspaces.take()
        scores_N, _, _ = solve(transition, prepared.factor, ids, transition.start(ids, share), self.tol, workspace)
        prepared.workspaces.give(workspace)
        return transition.finish(scores_N, ids, share)

    def batch(self, graph: Any, seeds_list: Sequence[Any], top_k: int | None = None) -> SparseRows:
        """`personalized` of many queries: one row each, in their order, float64, by ids; ``names`` of the rows has the graph's names.

        Raises as `personalized`.
        """
        check_top_k(top_k)
        prepared = self._prepared(graph)
        asked, names = [prepared.by_id(seeds) for seeds in seeds_list], prepared.graph.names
        if self.method == "power":
            found = power_rows(prepared.transition, asked, tol=self.tol, top_k=top_k, block=BLOCK)
            return replace(found, names=names)
        rows = [self._ranked(prepared, seeds, top_k) for seeds in asked]
        return SparseRows.from_rows(rows, prepared.graph.num_nodes, dtype=np.float64, names=names)

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


class _Prepared:
    """A graph's transition, its factor once one is needed, and arrays that queries hand on. Names end here: the transition knows ids."""

    def __init__(self, graph: Graph, alpha: float, dangling: Dangling) -> None:
        self.graph = graph
        self.transition = transition = Transition(graph.numbered(), alpha, dangling)
        self.rules = (alpha, dangling)
        self.buffers = _Spare(lambda: PushBuffers(transition.num_nodes))
        self.workspaces = _Spare(lambda: Workspace(self.factor))

    def is_of(self, graph: Graph) -> bool:
        """Whether this is the same graph, called the same."""
        return self.graph.by_name == graph.by_name and self.graph.equals(graph)

    def by_id(self, seeds: Any) -> Any:
        """Seeds whose nodes are ids. Raises InputError for a name that no node has."""
        is_named = self.graph.names is not None and self.graph.are_names(seed_nodes(self.graph, seeds)[0])
        return parse_seeds(self.graph, seeds) if is_named else seeds

    @cached_property
    def factor(self) -> Factor:
        large = len(self.transition.graph.indices) > LARGE
        return prepare(self.transition, few=0 if large else FEW)


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
