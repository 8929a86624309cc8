"""`PageRank`: one object for global and personalised PageRank by whichever method is quickest."""
# Shapes: N nodes, Q queries

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Generic, Literal, TypeVar, get_args

import numpy as np

from anabranch.errors import InputError
from anabranch.graph.estimator import Estimator
from anabranch.graph.ppr.power import BLOCK, power_iteration, power_rows
from anabranch.graph.ppr.push import PushBuffers, forward_push
from anabranch.graph.ppr.rules import Dangling, Transition, check_alpha, check_dangling, check_tol, parse_seeds
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
        dangling: what walks do at nodes without out-edges, see `anabranch.graph.ppr.rules`.
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
        dangling: Dangling = "source",
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

    def scores(self, graph: Graph) -> np.ndarray:
        """The global PageRank, float64 [N]: walks start anywhere. Equals that of other libraries at damping 1 - alpha."""
        transition = self._prepared(graph).transition
        # A walk that starts anywhere goes back to anywhere.
        if transition.dangling == "source":
            transition = Transition(graph, self.alpha, "uniform")
        return power_iteration(transition, np.arange(graph.num_nodes), tol=self.tol)

    def personalized(self, graph: Graph, seeds: Any, top_k: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Scores from one node or a set: ids int64 and scores float64 of all positive or the ``top_k`` largest, by falling score.

        Args:
            graph: the graph.
            seeds: a node; a list of nodes; a mapping node -> weight; or ``(nodes, weights)``.
            top_k: how many to return; None for all.

        Raises:
            InputError: an unknown node, bad weights, ``top_k`` below 1, a graph without nodes or with negative weights.
        """
        check_top_k(top_k)
        if self.method == "monte_carlo":
            transition = self._prepared(graph).transition
            return monte_carlo(transition, seeds, walks=self.walks, seed=self.seed, top_k=top_k)
        if self.method == "push":
            return self._push(graph, seeds, top_k)
        return top_of_dense(self.vector(graph, seeds), top_k)

    def vector(self, graph: Graph, seeds: Any) -> np.ndarray:
        """Scores from one node or a set, dense float64 [N]. Raises as `personalized`."""
        prepared = self._prepared(graph)
        transition = prepared.transition
        if self.method in ("push", "monte_carlo"):
            ids, scores = self.personalized(graph, seeds)
            found_N = np.zeros(graph.num_nodes)
            found_N[ids] = scores
            return found_N
        if self.method == "power":
            return power_iteration(transition, seeds, tol=self.tol)
        ids, share = parse_seeds(graph, seeds)
        workspace = prepared.workspaces.take()
        scores_N, _, _ = solve(transition, prepared.factor, ids, transition.start(ids, share), self.tol, workspace)
        prepared.workspaces.give(workspace)
        return transition.finish(scores_N, ids, share)

    def batch(self, graph: Graph, seeds_list: Sequence[Any], top_k: int | None = None) -> SparseRows:
        """`personalized` of many queries: one row each, in their order, float64. Raises as `personalized`."""
        check_top_k(top_k)
        if self.method == "power":
            transition = self._prepared(graph).transition
            return power_rows(transition, seeds_list, tol=self.tol, top_k=top_k, block=BLOCK)
        found = [self.personalized(graph, seeds, top_k) for seeds in seeds_list]
        return SparseRows.from_rows(found, graph.num_nodes, dtype=np.float64)

    def _push(self, graph: Graph, seeds: Any, top_k: int | None) -> tuple[np.ndarray, np.ndarray]:
        prepared = self._prepared(graph)
        buffers = prepared.buffers.take()
        found = forward_push(prepared.transition, seeds, tol=self.tol, top_k=top_k, buffers=buffers)
        prepared.buffers.give(buffers)
        return found.ids, found.scores

    def _prepared(self, graph: Graph) -> "_Prepared":
        """What queries of the graph share. That of the last graph is kept, since making it costs passes over the edges."""
        last = self._last
        rules = (self.alpha, self.dangling)
        if last is None or last.transition.graph is not graph or last.rules != rules:
            self._last = last = _Prepared(Transition(graph, self.alpha, self.dangling))
        return last


class _Prepared:
    """A graph's transition, its factor once one is needed, and arrays that queries hand on."""

    def __init__(self, transition: Transition) -> None:
        self.transition = transition
        self.rules = (transition.alpha, transition.dangling)
        self.buffers = _Spare(lambda: PushBuffers(transition.num_nodes))
        self.workspaces = _Spare(lambda: Workspace(self.factor))

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
