"""Asking a `PowerWalk`: one query, many at once, and how far an answer may be from the truth."""
# Shapes: N nodes, Q queries

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from anabranch.bounds import is_whole, shown, whole
from anabranch.errors import InputError
from anabranch.graph.arguments import check_flag, check_one_of, is_number
from anabranch.graph.powerwalk.batch import backward_rows, forward_rows, prefers_backward
from anabranch.graph.powerwalk.held import Held
from anabranch.graph.powerwalk.query import Follow, decompose_one, take
from anabranch.graph.powerwalk.stored import Index
from anabranch.graph.ppr.pagerank import PageRank
from anabranch.graph.ppr.rules import GOES_ON, answer, as_queries
from anabranch.graph.ppr.walks import check_seed
from anabranch.graph.rows import SparseRows, check_top_k, order_top
from anabranch.graph.workers import num_workers

# Entries that a query of rounds="auto" reads at most, about a millisecond.
BUDGET = 300_000

# Queries from which a batch is worth a look at what it costs.
MANY = 64

# Passes over the edges that an exact solution is reckoned to cost.
EXACT_ROUNDS = 12

# Of rounds="auto".
MOST_ROUNDS = 8


class Asking(Held):
    """The queries of `PowerWalk`."""

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
        # A kernel takes it, which is compiled anew for each type.
        use_index = check_flag("use_index", use_index)
        transition = index.transition
        ids, share = self._parsed(seeds)
        buffers = index.take_buffers()
        start, follow = transition.start(ids, share), Follow(number, budget, _eps(eps), use_index)
        leaky, rows = tuple(index.leaky), tuple(index.lookup)
        touched, _, _ = decompose_one(leaky, ids, start, tuple(follow), rows, tuple(buffers))
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
        start, follow = transition.start(ids, share), Follow(number, budget, _eps(eps), True)
        leaky, rows = tuple(index.leaky), tuple(index.lookup)
        touched, dropped, reads = decompose_one(leaky, ids, start, tuple(follow), rows, tuple(buffers))
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
        check_one_of("method", method, ("auto", "forward", "backward"))
        number, budget = _rounds(rounds)
        if method == "backward" and budget:
            raise InputError("method='backward' needs a number of rounds, not 'auto'")
        eps = _eps(eps)
        parsed = [self._parsed(seeds) for seeds in as_queries(seeds_list)]
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
        return forward_rows(index, parsed, number, budget, eps, kept, num_workers(self.workers))

    def _probed(self, parsed: list[tuple[np.ndarray, np.ndarray]], rounds: int, budget: int) -> float:
        """Mean entries read by 16 of the queries; of two rounds where the number of rounds is open."""
        probed = parsed[:: len(parsed) // 16][:16]
        return float(np.mean([self._inspected(*seeds, 2 if budget else rounds, 1e-6)["reads"] for seeds in probed]))

    def fingerprint(self, node: Any) -> tuple[np.ndarray, np.ndarray]:
        """Nodes and float64 estimate of the leaky vector of a node, as the index holds it. Raises InputError where there is none."""
        self._built()
        ids, value = self._row(self.graph.place_of(node), node)
        return self.graph.answer(ids, node), value

    def _row(self, place: int, node: Any) -> tuple[np.ndarray, np.ndarray]:
        index = self._built()
        if not index.has_N[place]:
            raise InputError(f"node {shown(node)} has no fingerprint")
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
        worst, seed = 2.0, check_seed(seed)
        if sample := whole("sample", sample, 0):
            worst = max(self._row_errors(sample, seed))
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


def _rounds(rounds: Any) -> tuple[int, int]:
    """A number of rounds, and a budget of entries or 0."""
    # An array compares with a name to an array.
    if isinstance(rounds, str) and rounds == "auto":
        return MOST_ROUNDS, BUDGET
    if not is_whole(rounds) or not 0 <= rounds <= 1000:
        raise InputError(f"rounds is {shown(rounds)}; it must be a whole number from 0 to 1000, or 'auto'")
    return int(rounds), 0


def _eps(eps: Any) -> float:
    if not is_number(eps) or not 0 <= eps < 1:
        raise InputError(f"eps is {shown(eps)}; the flow below which nothing is followed must lie in [0, 1)")
    return float(eps)
