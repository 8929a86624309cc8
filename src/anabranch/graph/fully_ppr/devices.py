"""What lets walks from all nodes run as rounds on a cluster: pieces of bounded size, big moves, pipelines and their budget.

Four devices of "Distributed Algorithms for Fully Personalized PageRank on Large Graphs" (Lin, WWW 2019, arXiv 1903.11749), whose details
are ours where the paper's are not known to us:

- *alias tree*: a node of more than theta neighbours becomes ceil(d / theta) leaves, each a record with its own alias table; inner records
  hold tables over the weights of at most theta children, up to the root. P(neighbour) = product of shares = its weight share.
- *big move*: for a small node, the exact distribution of what a walk does in its next l steps: it ended at v (after j < l steps), or it
  is alive at v after l. One table, one draw, one round instead of l. Ends are distributed as before, nothing is used twice.
- *pipelines*: omega walks of a node start gamma at a time, one pipeline a round, and all advance together:
  rounds = ceil(omega / gamma) - 1 + L, where the last of the n gamma / alpha walks alive then ends after about
  L = ln(n gamma / alpha) / -ln(1 - alpha) rounds.
- *gamma*: in steady state about n gamma (1 + (1 - alpha) + ...) = n gamma / alpha walks are alive, so M bytes at b bytes a row allow
  gamma* = M alpha / (n b). Between rounds gamma grows by half while less than 0.7 M is used and a round's fixed cost is more than
  20% of it, and is halved when M is passed. Costs are counted, not timed, so that a run can be repeated.
"""
# Shapes: N nodes, M edges, R records, E entries of records, O outcomes of big moves

import math
from dataclasses import dataclass

import numba as nb
import numpy as np

from anabranch.bounds import LARGEST_FLOAT, shown
from anabranch.errors import InputError
from anabranch.graph.alias import build_alias
from anabranch.graph.arguments import is_number, plain
from anabranch.graph.store import Graph

# Entries of a record at most; ours.
THETA = 1 << 16

# Outcomes of a big move at most; ours.
CAP = 256

# Kinds of records.
NODE, INNER, MOVE = 0, 1, 2

# Of a record: id, kind, lengths; of an entry: code, keep, other.
HEADER_BYTES, ENTRY_BYTES = 24, 16

# Source, record, count.
ROW_BYTES = 24

# Of the rule for gamma.
USED, OVERHEAD, GROWTH = 0.7, 0.2, 1.5


@dataclass(frozen=True)
class Moves:
    """Outcomes of big moves.

    Attributes:
        indptr: int64 [N + 1], where each node's outcomes start; an empty row where a node has none.
        code: int64 [O], ``2 v`` for alive at v, ``2 v + 1`` for ended at v; rising within a row.
        probability: float64 [O], sums to 1 in a row.
        steps_N: int8, l of each node; 0 without a move.
    """

    indptr: np.ndarray
    code: np.ndarray
    probability: np.ndarray
    steps_N: np.ndarray


@dataclass(frozen=True)
class Records:
    """A graph cut into records that can lie anywhere. Record v < N is where a walk at node v looks; others are pieces of hubs.

    Attributes:
        indptr: int64 [R + 1].
        kind: int8 [R]: `NODE` (end with alpha, else draw), `INNER` (draw: the walk is on its way through a hub), `MOVE` (draw an outcome).
        code: int64 [E], ``2 r``: go to record r; ``2 v + 1``: the walk ended at v.
        keep: float32 [E], other: int32 [E]: the alias table of each record.
        share: float64 [E], probability of each entry of moves (0 elsewhere), for expected visits; None where ends are counted.
        num_nodes: N.
    """

    indptr: np.ndarray
    kind: np.ndarray
    code: np.ndarray
    keep: np.ndarray
    other: np.ndarray
    share: np.ndarray | None
    num_nodes: int

    def __len__(self) -> int:
        return len(self.kind)

    @property
    def largest(self) -> int:
        """Entries of the largest record."""
        return int(np.diff(self.indptr).max(initial=0))

    @property
    def largest_bytes(self) -> int:
        """Bytes of the largest record: what one machine must hold at once."""
        return HEADER_BYTES + ENTRY_BYTES * self.largest


def make_records(graph: Graph, *, theta: int = THETA, moves: Moves | None = None, visits: bool = False) -> Records:
    """Cut a graph into records of at most ``theta`` entries.

    Args:
        graph: the graph; its neighbours are drawn by weight.
        theta: entries of a record at most, at least 2.
        moves: big moves, which replace the records of their nodes (they may be larger than theta, up to their own cap; pieces of a
            hub that has one are empty records).
        visits: keep the probabilities of outcomes, for counting visits on the way.

    Raises InputError for a theta below 2.
    """
    first_N = first_pieces(graph.indptr, theta)
    return records_of(graph, 0, graph.num_nodes, first_N, theta=theta, moves=moves, visits=visits)[1]


def first_pieces(indptr: np.ndarray, theta: int) -> np.ndarray:
    """int64 [N + 1]: the number of the first piece of each node, were it a hub; the last is R. It depends on degrees alone."""
    if theta < 2:
        raise InputError(f"theta is {theta}; a record holds at least 2 entries")
    left_N, pieces_N = np.diff(indptr), np.zeros(len(indptr) - 1, np.int64)
    while (left_N > theta).any():
        left_N = np.where(left_N > theta, -(-left_N // theta), 0)
        pieces_N += left_N
    return len(pieces_N) + np.append(0, np.cumsum(pieces_N))


def records_of(
    graph: Graph,
    first: int,
    end: int,
    first_N: np.ndarray,
    *,
    theta: int,
    moves: Moves | None = None,
    visits: bool = False,
) -> tuple[np.ndarray, Records]:
    """Records of the nodes ``first`` ... ``end`` - 1 and of their pieces, and their numbers, rising.

    ``moves`` has rows of these nodes alone. Nothing else of the graph is looked at, so that it may be a mapped file.
    """
    count = end - first
    here = slice(int(graph.indptr[first]), int(graph.indptr[end]))
    degree = np.diff(graph.indptr[first : end + 1])
    target = 2 * graph.indices[here].astype(np.int64)
    weight = np.ones(len(target)) if graph.weights is None else graph.weights[here].astype(np.float64)
    if len(weight) and weight.min() < 0:
        raise InputError("walks need weights that are not negative; this graph has some that are")
    moved = np.zeros(count, bool) if moves is None else np.diff(moves.indptr) > 0
    hubs = np.flatnonzero((degree > theta) & ~moved)
    start = np.append(0, np.cumsum(degree))
    tree = _Tree(theta)
    for hub in hubs.tolist():
        row = slice(start[hub], start[hub + 1])
        tree.add(hub, count + int(first_N[first + hub] - first_N[first]), target[row], weight[row])
    # Parts one after another: edges of plain nodes, outcomes of moves, roots and pieces of hubs.
    plain = np.where(moved, 0, degree)
    plain[hubs] = 0
    kept = np.repeat(plain > 0, degree)
    parts = [(np.arange(count), plain, target[kept], weight[kept])]
    if moves is not None:
        parts.append((np.arange(count), np.diff(moves.indptr), moves.code, moves.probability))
    if len(hubs):
        parts.append(tree.parts(count, int(first_N[first])))
    length_R = np.zeros(count + int(first_N[end] - first_N[first]), np.int64)
    for place, length, _, _ in parts:
        # Of the parts of a record at most one is not empty.
        length_R[place] += length
    indptr = np.append(0, np.cumsum(length_R))
    code, weight = np.empty(indptr[-1], np.int64), np.empty(indptr[-1])
    for place, length, part_code, part_weight in parts:
        to = np.repeat(indptr[place] - (np.cumsum(length) - length), length) + np.arange(len(part_code))
        code[to], weight[to] = part_code, part_weight
    kind = np.full(len(length_R), INNER, np.int8)
    kind[:count] = np.where(moved, MOVE, NODE)
    table = build_alias(indptr, weight)
    share = np.where(np.repeat(kind == MOVE, length_R), weight, 0.0) if visits else None
    records = Records(indptr, kind, code, table.keep_M, table.other_M, share, graph.num_nodes)
    return np.append(np.arange(first, end), np.arange(first_N[first], first_N[end])), records


class _Tree:
    """Pieces of hubs. Places count from the nodes of the slice on; the root keeps the hub's own place."""

    def __init__(self, theta: int) -> None:
        self.theta = theta
        self._rows: list[tuple[int, np.ndarray, np.ndarray, bool]] = []

    def add(self, hub: int, first: int, code: np.ndarray, weight: np.ndarray) -> None:
        """A hub whose pieces stand from the place ``first`` on."""
        is_inner = False
        # One level of the tree: even parts, none larger than theta.
        while len(code) > self.theta:
            edges = np.linspace(0, len(code), -(-len(code) // self.theta) + 1).astype(np.int64)
            children = first + np.arange(len(edges) - 1)
            first += len(children)
            for child, start, end in zip(children.tolist(), edges[:-1], edges[1:], strict=True):
                self._rows.append((child, code[start:end], weight[start:end], is_inner))
            code, weight, is_inner = children, np.add.reduceat(weight, edges[:-1]), True
        self._rows.append((hub, code, weight, is_inner))

    def parts(self, count: int, first_piece: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Places, lengths, codes and weights; places of pieces become their numbers."""
        codes = [2 * (code - count + first_piece) if is_inner else code for _, code, _, is_inner in self._rows]
        return (
            np.array([place for place, _, _, _ in self._rows]),
            np.array([len(code) for code in codes]),
            np.concatenate(codes),
            np.concatenate([weight for _, _, weight, _ in self._rows]),
        )


def slot_shares(records: Records, record: int) -> np.ndarray:
    """What the alias table of a record makes of its entries: the probability of each, by summing over slots."""
    start, end = records.indptr[record], records.indptr[record + 1]
    keep = records.keep[start:end].astype(np.float64)
    share = keep.copy()
    np.add.at(share, records.other[start:end], 1 - keep)
    return share / max(len(share), 1)


def big_moves(
    graph: Graph, alpha: float, steps: int = 2, cap: int = CAP, *, nodes: tuple[int, int] | None = None
) -> Moves:
    """The exact outcomes of the next ``steps`` steps of a walk, for every node where they are at most ``cap``.

    A walk that comes to a node without edges, or of more than ``cap``, stays alive there: what happens next is up to the record of that
    node. Where the outcomes of ``steps`` steps are too many, fewer steps are tried, down to 2. ``nodes`` = (first, end) makes them for
    these alone, and rows count from the first. Scratch is 32 bytes a node of the graph.

    Raises InputError for steps other than 2 or 3, or a cap below 2.
    """
    if steps not in (2, 3):
        raise InputError(f"a big move takes 2 or 3 steps, not {steps}")
    if cap < 2:
        raise InputError(f"cap is {cap}; a big move has at least 2 outcomes")
    first, end = (0, graph.num_nodes) if nodes is None else nodes
    weight_M = np.empty(0, np.float32) if graph.weights is None else graph.weights
    indptr, code, probability, steps_N = _moves(first, end, graph.indptr, graph.indices, weight_M, alpha, steps, cap)
    order = np.lexsort((code, np.repeat(np.arange(end - first), np.diff(indptr))))
    return Moves(indptr, code[order], probability[order], steps_N)


@nb.njit(cache=True, nogil=True)
def _moves(first, end, indptr, indices, weight_M, alpha, steps, cap):
    count = len(indptr) - 1
    first_O = np.zeros(end - first + 1, np.int64)
    steps_N = np.zeros(end - first, np.int8)
    code_O, share_O = np.empty(1024, np.int64), np.empty(1024, np.float64)
    # By code, of the node under way.
    mass = np.zeros(2 * count, np.float64)
    seen = np.empty(cap, np.int64)
    # Alive now and after the step.
    here, ahead = np.zeros(count, np.float64), np.zeros(count, np.float64)
    now, then = np.empty(cap + 1, np.int64), np.empty(cap + 1, np.int64)
    used = 0
    for node in range(first, end):
        depth = steps
        found = 0
        while depth >= 2:
            found = _outcomes(node, depth, cap, alpha, indptr, indices, weight_M, mass, seen, here, ahead, now, then)
            if found > 0:
                break
            depth -= 1
        if found > 0:
            while used + found > len(code_O):
                code_O, share_O = np.append(code_O, np.empty_like(code_O)), np.append(share_O, np.empty_like(share_O))
            for place in range(found):
                code_O[used + place] = seen[place]
                share_O[used + place] = mass[seen[place]]
                mass[seen[place]] = 0.0
            used += found
            steps_N[node - first] = depth
        first_O[node - first + 1] = used
    return first_O, code_O[:used].copy(), share_O[:used].copy(), steps_N


@nb.njit(cache=True, nogil=True)
def _outcomes(node, depth, cap, alpha, indptr, indices, weight_M, mass, seen, here, ahead, now, then):
    """Outcomes of ``depth`` steps from ``node`` in ``seen`` and ``mass``; 0, and nothing left behind, where there are more than ``cap``."""
    degree = indptr[node + 1] - indptr[node]
    if degree == 0 or degree > cap:
        return 0
    found, standing = 0, 1
    now[0] = node
    here[node] = 1.0
    fits = True
    for depth_now in range(depth + 1):
        walking = 0
        for place in range(standing):
            at = now[place]
            share = here[at]
            here[at] = 0.0
            degree = indptr[at + 1] - indptr[at]
            goes_on = depth_now < depth and 0 < degree <= cap
            code = 2 * at + 1 if goes_on else 2 * at
            amount = alpha * share if goes_on else share
            if fits and mass[code] == 0.0 and amount > 0.0:
                fits = found < cap
                if fits:
                    seen[found] = code
                    found += 1
            if not fits:
                # Only to set `here` back.
                continue
            mass[code] += amount
            if not goes_on:
                continue
            strength = 0.0
            for edge in range(indptr[at], indptr[at + 1]):
                strength += 1.0 if len(weight_M) == 0 else weight_M[edge]
            for edge in range(indptr[at], indptr[at + 1]):
                weight = 1.0 if len(weight_M) == 0 else weight_M[edge]
                to = indices[edge]
                gain = (1.0 - alpha) * share * weight / strength
                if gain == 0.0:
                    continue
                if ahead[to] == 0.0:
                    if walking > cap:
                        fits = False
                        break
                    then[walking] = to
                    walking += 1
                ahead[to] += gain
        now, then = then, now
        here, ahead = ahead, here
        standing = walking
        if not fits:
            for place in range(standing):
                here[now[place]] = 0.0
            break
    if fits:
        return found
    for place in range(found):
        mass[seen[place]] = 0.0
    return 0


# Pipelines


def num_walks(eps: float, delta: float, p_f: float) -> int:
    """Walks per node with which every score of at least ``delta`` has a relative error of at most ``eps`` with probability 1 - ``p_f``.

    omega >= (2 + 2 eps / 3) ln(2 / p_f) / (eps^2 delta). Raises InputError for values outside (0, 1), or an eps that is not positive.
    """
    for name, value in (("delta", delta), ("p_f", p_f)):
        if not is_number(value) or not 0 < value < 1:
            raise InputError(f"{name} is {shown(value)}; it must lie between 0 and 1")
    if not is_number(eps) or not 0 < plain(eps) <= LARGEST_FLOAT:
        raise InputError(f"eps is {shown(eps)}; it must be positive, and at most {LARGEST_FLOAT:g}")
    eps, delta, p_f = float(eps), float(delta), float(p_f)
    # Of the smallest numbers there are products are 0, and quotients have no end.
    walks = (2 + 2 * eps / 3) * math.log(2 / p_f) / max(eps**2 * delta, 1e-300)
    return math.ceil(min(walks, LARGEST_FLOAT))


def pipelines(walks: int, gamma: int) -> int:
    """ceil(omega / gamma)."""
    return -(-walks // gamma)


def last_round(walks: float, alpha: float) -> float:
    """L: rounds until the last of so many walks has ended, about ln(walks) / -ln(1 - alpha), and one to see its end."""
    return math.log(max(walks, 1)) / -math.log1p(-alpha) + 1


def rounds_formula(num_sources: int, walks: int, gamma: int, alpha: float, *, pipelined: bool = True) -> float:
    """Rounds that are most likely: with pipelines each starts a round after the one before, without it waits for that one's last walk.

    When the last pipeline starts, walks of those before it are alive too, n gamma (1 - (1 - alpha)^pipelines) / alpha in all, and the
    longest of these is the last to end; what comes on top is a Gumbel variable of scale 1 / -ln(1 - alpha).
    """
    started = pipelines(walks, gamma)
    if not pipelined:
        return started * last_round(num_sources * gamma, alpha)
    alive = num_sources * gamma * (1 - (1 - alpha) ** started) / alpha
    return started - 1 + last_round(alive, alpha)


def walkers_bound(num_sources: int, gamma: int, alpha: float, deviations: float = 5.0) -> float:
    """Walks alive at once at most: n gamma / alpha, and chance on top (each walk is alive or not, so the variance is below the mean)."""
    mean = num_sources * gamma / alpha
    return mean + deviations * math.sqrt(mean)


def choose_gamma(num_sources: int, walks: int, alpha: float, memory: float, row_bytes: int = ROW_BYTES) -> int:
    """gamma* = max(1, floor(M alpha / (n b))), and no more than there are walks."""
    return max(1, min(walks, int(memory * alpha / (max(num_sources, 1) * row_bytes))))


def adapt_gamma(gamma: int, rows: int, walkers: int, memory: float, overhead: float, row_bytes: int = ROW_BYTES) -> int:
    """Gamma of the next round.

    Args:
        gamma: of this round.
        rows: rows of walks that were in it.
        walkers: walks it moved.
        memory: bytes for rows, M.
        overhead: the fixed cost of a round, in walks moved in the same time.
        row_bytes: b.
    """
    if rows * row_bytes > memory:
        return max(1, gamma // 2)
    if rows * row_bytes < USED * memory and overhead > OVERHEAD * (overhead + walkers):
        return max(gamma + 1, int(gamma * GROWTH))
    return gamma
