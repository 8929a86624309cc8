"""Rules that every form of personalised PageRank here shares: the walk, its restart, dead ends, and sets of seeds.

A walk from node u ends where it stands with probability alpha, else steps to an out-neighbour by weight; pi_u(v) is the probability that
it ends at v. With P0 the transition matrix whose rows of dangling nodes (no out-edge) are empty, and c = 1 - alpha, all algorithms solve
one *leaky* system, in which walks that reach a dead end vanish unless they end there,

    g_s = alpha sum_k c^k s P0^k,        G = alpha (I - c P0)^-1,

and a policy says what a walk at a dead end does instead:

    restart   it starts over at a seed drawn anew: pi_s = g_s / h_s with h = G 1, the chance not to vanish, and h_s = sum_u s(u) h_u
    source    it goes back to the seed that it started from: pi_s = sum_u s(u) g_u / h_u, the mixture of the vectors of its members
    absorb    it stays: pi(v) = g(v) / alpha at dangling v
    uniform   it goes anywhere: pi = g + (1 - h_s) / h_1/n * g_1/n

``restart`` is the rule of networkx and most other libraries (what stands at dead ends goes to the personalization vector), and the
default. For one seed, and where no walk meets a dead end, it is ``source``. For the global PageRank, whose walks start anywhere, both
send them anywhere, as elsewhere.

Every algorithm keeps an estimate x and a residual f with g_s = x + G f. Columns sums of G are at most 1, so the L1 error is at most |f|_1,
signed or not, also after the policy (``absorb`` counts what arrives at dead ends as ended).
"""
# Shapes: N nodes, M stored edges, S seeds

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numba as nb
import numpy as np

from anabranch.bounds import LARGEST_FLOAT, shown
from anabranch.errors import InputError
from anabranch.graph.arguments import check_one_of, is_number, plain
from anabranch.graph.coerce import as_graph
from anabranch.graph.counters import ABSORB, SOURCE, UNIFORM
from anabranch.graph.masks import unmasked
from anabranch.graph.ppr.leaky import from_anywhere
from anabranch.graph.store import Graph

Dangling = Literal["restart", "source", "absorb", "uniform"]

# What one walk does. Those that start over are given a seed by `Transition.finished`.
CODES = {"restart": SOURCE, "source": SOURCE, "absorb": ABSORB, "uniform": UNIFORM}

# Policies that only scale what the leaky system starts from.
GOES_ON = ("restart", "source")

# A walk takes 1 / alpha steps, in compiled code that nothing breaks off; of the smallest numbers 1 - alpha is 1.
LEAST_ALPHA = 1e-9
NO_WEIGHTS = np.empty(0, np.float32)


def check_alpha(alpha: float) -> float:
    """Raises InputError unless 0 < alpha < 1, and alpha is at least `LEAST_ALPHA`."""
    if not is_number(alpha) or not LEAST_ALPHA <= plain(alpha) < 1:
        raise InputError(
            f"alpha is {shown(alpha)}; the probability to end a walk must lie between 0 and 1, both excluded, and be at least "
            f"{LEAST_ALPHA:g}"
        )
    return float(alpha)


def check_dangling(dangling: str) -> Dangling:
    """Raises InputError for an unknown policy."""
    check_one_of("dangling", dangling, CODES)
    return dangling  # type: ignore[return-value]


def check_tol(tol: float) -> float:
    """Raises InputError unless tol is positive and finite."""
    # Integers have no end.
    if not is_number(tol) or not 0 < plain(tol) <= LARGEST_FLOAT:
        raise InputError(
            f"tol is {shown(tol)}; the L1 error allowed must be a positive number, and at most {LARGEST_FLOAT:g}"
        )
    return float(tol)


def seed_nodes(graph: Graph, seeds: Any) -> tuple[Any, Any]:
    """Nodes and weights (None: equal) of seeds, as `parse_seeds` takes them."""
    if isinstance(seeds, Mapping):
        return list(seeds.keys()), list(seeds.values())
    if isinstance(seeds, tuple) and len(seeds) == 2 and all(_is_list(part) for part in seeds):
        return seeds
    return seeds, None


def _is_list(part: Any) -> bool:
    if isinstance(part, list | np.ndarray):
        return True
    try:
        return not isinstance(part, str) and np.ndim(part) == 1
    except ValueError:
        # Lists of different lengths.
        return False


def as_queries(seeds_list: Any) -> list[Any]:
    """Seeds of many queries. Raises InputError for what is no list of them."""
    seeds_list = unmasked(seeds_list, "seeds_list")
    is_list = not isinstance(seeds_list, str | bytes | Mapping) and np.iterable(seeds_list)
    if not is_list:
        raise InputError(f"seeds_list is {shown(seeds_list)}; it must be a list, of the seeds of one query each")
    return list(seeds_list)


def answer(graph: Graph, ids: np.ndarray, seeds: Any) -> np.ndarray:
    """Nodes of an answer: by name where the seeds were given so, else by id."""
    if graph.names is None:
        return ids
    return graph.answer(ids, seed_nodes(graph, seeds)[0])


def parse_seeds(graph: Any, seeds: Any) -> tuple[np.ndarray, np.ndarray]:
    """Seeds as distinct int64 ids [S], rising, and float64 weights [S] that sum to 1.

    Args:
        graph: they are nodes of, whatever `as_graph` takes.
        seeds: one node; a list or array of nodes (of equal weight); a mapping node -> weight; or a tuple of two lists or arrays
            ``(nodes, weights)``. Nodes are ids or names, see `Graph.resolve`.

    Raises:
        InputError: no seed, an unknown node, a weight that is negative or not finite, or weights that are all 0.
    """
    if not isinstance(graph, Graph):
        graph = as_graph(graph, allow_negative=True)
    # The common case, quickly.
    if isinstance(seeds, int | np.integer) and not isinstance(seeds, bool) and not graph.by_name:
        if not 0 <= seeds < graph.num_nodes:
            graph.check_nodes(seeds)
        return np.array([seeds], np.int64), np.ones(1)
    nodes, weights = seed_nodes(graph, seeds)
    ids = graph.resolve(nodes)
    if ids.ndim != 1 or not ids.size:
        raise InputError(f"seeds have the shape {ids.shape}; give one node or a list of at least one")
    if weights is None:
        share = np.ones(len(ids))
    else:
        try:
            share = np.asarray(unmasked(weights, "weights of seeds"), np.float64)
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"weights of seeds are numbers: {error}") from None
        if share.shape != ids.shape:
            raise InputError(f"there are {len(ids):,} seeds and weights of the shape {share.shape}; give one per seed")
        bad = np.flatnonzero(~np.isfinite(share) | (share < 0))
        if bad.size:
            raise InputError(
                f"seed {ids[bad[0]]} has the weight {share[bad[0]]}; weights must be finite and not negative"
            )
    kept = share > 0
    if not kept.any():
        raise InputError("all seeds have the weight 0; at least one must be positive")
    # So that the sum of huge or tiny weights stays in range.
    largest = share.max()
    ids, place = np.unique(ids[kept], return_inverse=True)
    total = np.bincount(place.reshape(-1), share[kept] / largest, len(ids))
    return ids, total / total.sum()


@dataclass(frozen=True, eq=False)
class Transition:
    """The walk on one graph: what all algorithms take. Make it once per graph; parts are made when they are first used.

    Attributes:
        graph: the graph, of whatever `as_graph` takes; its weights are not negative.
        alpha: probability to end before each step.
        dangling: policy.
    """

    graph: Graph
    alpha: float = 0.15
    dangling: Dangling = "restart"

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        check_dangling(self.dangling)
        object.__setattr__(self, "graph", as_graph(self.graph, allow_negative=True))
        weights = self.graph.weights
        if weights is not None and len(weights) and not weights.min() >= 0:
            raise InputError(f"walks need weights that are not negative; the least of this graph is {weights.min()}")
        if not self.graph.num_nodes:
            raise InputError("the graph has no nodes, so there is no walk on it")

    @property
    def num_nodes(self) -> int:
        """N."""
        return self.graph.num_nodes

    @cached_property
    def inverse_N(self) -> np.ndarray:
        """float64 [N], 1 over the sum of each node's weights; 0 at dangling nodes."""
        strength_N = self.graph.strength_N
        return np.divide(1.0, strength_N, out=np.zeros(len(strength_N)), where=strength_N > 0)

    @cached_property
    def dangling_nodes(self) -> np.ndarray:
        """Ids of nodes that no step leaves."""
        return np.flatnonzero(self.inverse_N == 0)

    @cached_property
    def out(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """indptr, indices and weights (empty: all 1) of out-edges."""
        return _arrays(self.graph)

    @cached_property
    def into(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same of in-edges."""
        return _arrays(self.graph.reversed)

    @cached_property
    def stay_N(self) -> np.ndarray:
        """h, float64 [N]: the chance of a walk from each node to end before it vanishes at a dead end. Ones without dead ends."""
        stay_N = np.ones(self.num_nodes)
        if len(self.dangling_nodes):
            _sweep_stay(*self.out, self.inverse_N, self.alpha, stay_N)
        return stay_N

    @cached_property
    def _anywhere(self) -> tuple[np.ndarray, float]:
        """Leaky PageRank of the uniform start, to 1e-14, and its sum."""
        found_N, _ = from_anywhere(self.out, self.graph.strength_N, self.alpha, False, 1e-14)
        return found_N, float(found_N.sum())

    def start(self, ids: np.ndarray, share: np.ndarray) -> np.ndarray:
        """What the leaky system starts from at the seeds, [S]."""
        if self.dangling not in GOES_ON or not len(self.dangling_nodes):
            return share
        stay = self.stay_N[ids]
        return share / stay if self.dangling == "source" else share / float(stay @ share)

    def finished(self, ids: np.ndarray, share: np.ndarray) -> np.ndarray:
        """Where walks that end started, [S], sums to 1: other than ``share`` where those that fail start over at a seed drawn anew."""
        if self.dangling != "restart" or not len(self.dangling_nodes):
            return share
        ended = share * self.stay_N[ids]
        return ended / ended.sum()

    def finish(self, leaky_N: np.ndarray, ids: np.ndarray, share: np.ndarray) -> np.ndarray:
        """The policy applied to a dense leaky solution, in place where that is possible."""
        if not len(self.dangling_nodes) or self.dangling in GOES_ON:
            return leaky_N
        if self.dangling == "absorb":
            leaky_N[self.dangling_nodes] /= self.alpha
            return leaky_N
        anywhere_N, total = self._anywhere
        lost = 1.0 - float(self.stay_N[ids] @ share)
        return leaky_N + (lost / total) * anywhere_N

    def finish_sparse(
        self, found: np.ndarray, value: np.ndarray, ids: np.ndarray, share: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The same for a solution of few entries; it becomes dense where walks go anywhere and any is lost."""
        if not len(self.dangling_nodes) or self.dangling in GOES_ON:
            return found, value
        if self.dangling == "absorb":
            return found, np.where(self.inverse_N[found] == 0, value / self.alpha, value)
        if float(self.stay_N[ids] @ share) >= 1.0:
            return found, value
        leaky_N = np.zeros(self.num_nodes)
        leaky_N[found] = value
        leaky_N = self.finish(leaky_N, ids, share)
        dense = np.flatnonzero(leaky_N)
        return dense, leaky_N[dense]


def _arrays(graph: Graph) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return graph.indptr, graph.indices, NO_WEIGHTS if graph.weights is None else graph.weights


@nb.njit(cache=True, nogil=True)
def _sweep_stay(indptr, indices, weight_M, inverse_N, alpha, stay_N):
    """h = alpha + c P0 h from h = 1, node after node until nothing moves; a sweep contracts the error by c at least."""
    for _ in range(int(np.log(1e-16) / np.log1p(-alpha)) + 2):
        moved = 0.0
        for node in range(len(stay_N)):
            total = 0.0
            for edge in range(indptr[node], indptr[node + 1]):
                weight = weight_M[edge] if len(weight_M) else 1.0
                total += weight * stay_N[indices[edge]]
            new = alpha + (1.0 - alpha) * total * inverse_N[node]
            moved = max(moved, abs(new - stay_N[node]))
            stay_N[node] = new
        if moved <= 2e-16:
            break
