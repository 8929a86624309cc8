"""`PageRank`: one object for global and personalised PageRank by whichever method is quickest."""
# Shapes: N nodes, Q queries

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from anabranch.errors import InputError
from anabranch.graph.estimator import Estimator
from anabranch.graph.ppr.power import BLOCK, power_iteration, power_rows
from anabranch.graph.ppr.push import PushBuffers, forward_push
from anabranch.graph.ppr.rules import Dangling, Transition, check_alpha, check_dangling, check_tol
from anabranch.graph.ppr.walks import check_count, monte_carlo
from anabranch.graph.rows import SparseRows, check_top_k, top_of_dense
from anabranch.graph.store import Graph

Method = Literal["auto", "power", "push", "monte_carlo"]
LOCAL = 1e-2  # L1 error above which a push stays near its seeds


class PageRank(Estimator):
    """PageRank and personalised PageRank. Scores are probabilities and sum to 1 within ``tol``.

    Args:
        alpha: probability that a walk ends (teleports) before each step; 1 - alpha is what other libraries call damping.
        method: ``power`` (power iteration), ``push`` (forward push), ``monte_carlo`` (``walks`` random walks, no bound), or ``auto``.
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
        self.seed = seed
        self._last: Transition | None = None
        self._spare: list[PushBuffers] = []

    def scores(self, graph: Graph) -> np.ndarray:
        """The global PageRank, float64 [N]: walks start anywhere. Equals that of other libraries at damping 1 - alpha."""
        transition = self._transition(graph)
        if transition.dangling == "source":  # a walk that starts anywhere goes back to anywhere
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
        transition = self._transition(graph)
        if self.method == "monte_carlo":
            return monte_carlo(transition, seeds, walks=self.walks, seed=self.seed, top_k=top_k)
        if self.method == "push" or (self.method == "auto" and self.tol >= LOCAL):
            return self._push(transition, seeds, top_k)
        return top_of_dense(power_iteration(transition, seeds, tol=self.tol), top_k)

    def batch(self, graph: Graph, seeds_list: Sequence[Any], top_k: int | None = None) -> SparseRows:
        """`personalized` of many queries: one row each, in their order, float64. Raises as `personalized`."""
        check_top_k(top_k)
        transition = self._transition(graph)
        if self.method in ("auto", "power"):
            return power_rows(transition, seeds_list, tol=self.tol, top_k=top_k, block=BLOCK)
        found = [self.personalized(graph, seeds, top_k) for seeds in seeds_list]
        return SparseRows.from_rows(found, graph.num_nodes, dtype=np.float64)

    def _push(self, transition: Transition, seeds: Any, top_k: int | None) -> tuple[np.ndarray, np.ndarray]:
        try:
            buffers = self._spare.pop()  # each thread takes its own
        except IndexError:
            buffers = PushBuffers(transition.num_nodes)
        if len(buffers.flow_N) != transition.num_nodes:  # of the graph before
            buffers = PushBuffers(transition.num_nodes)
        found = forward_push(transition, seeds, tol=self.tol, top_k=top_k, buffers=buffers)
        self._spare.append(buffers)
        return found.ids, found.scores

    def _transition(self, graph: Graph) -> Transition:
        """That of the graph; the last one is kept, since making it costs a pass over the edges."""
        last = self._last
        if last is None or last.graph is not graph or (last.alpha, last.dangling) != (self.alpha, self.dangling):
            self._last = last = Transition(graph, self.alpha, self.dangling)
        return last
