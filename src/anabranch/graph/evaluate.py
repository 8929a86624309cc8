"""How good are vectors of nodes? Labels by logistic regression, links by AUC, by the protocols that papers on embeddings report.

Node classification, as in "DeepWalk" (Perozzi, Al-Rfou and Skiena, KDD 2014, arXiv 1403.6652) and nearly all papers after it:

1. shuffle the labelled nodes, train on the first share of them, test on the rest; repeat with other shuffles and take means
2. one logistic regression per label against the rest: min_w 1/2 |w|^2 + C sum_i log(1 + exp(-y_i w.x_i)), the intercept a weight too
3. a test node with k true labels is given the k labels of the largest scores
4. micro F1 (of all decisions) and macro F1 (mean over labels)

The papers used liblinear. Here scikit-learn's Newton steps solve the same problem, label by label, to a gradient that is looked at
afterwards: the distance to the solution is at most its length. Of fewer nodes than dimensions only the span of their vectors is solved
in, which changes no solution (the penalty is the same in every direction).

Link prediction: hide some edges, embed the rest, and count how often a hidden edge scores above a pair that is no edge.
"""
# Shapes: N nodes, D dim, C labels, E edges, S shuffles

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from anabranch.errors import AnabranchError, InputError
from anabranch.extras import require
from anabranch.graph.coerce import as_graph
from anabranch.graph.masks import unmasked
from anabranch.graph.sparse import is_sparse, wide_rows
from anabranch.graph.store import Graph

Operator = Literal["dot", "cosine", "l2"]
_NEWTON_STEPS = 200


@dataclass(frozen=True)
class NodeScores:
    """F1 on the test nodes of each shuffle.

    Attributes:
        micro_S: float64, over all decisions.
        macro_S: float64, mean over the labels; a label that neither is true nor was given counts 0, as in the papers.
        num_train: nodes trained on. ``num_test``: nodes tested on.
    """

    micro_S: np.ndarray
    macro_S: np.ndarray
    num_train: int
    num_test: int

    @property
    def micro(self) -> float:
        """Mean over the shuffles."""
        return float(self.micro_S.mean())

    @property
    def macro(self) -> float:
        """Mean over the shuffles."""
        return float(self.macro_S.mean())


@dataclass(frozen=True)
class OneVsRest:
    """Logistic regressions of C labels.

    Attributes:
        weight_DC: the logit of label c is ``x @ weight_DC[:, c] + bias_C[c]``.
        bias_C: -inf or inf where none or all of the nodes trained on had the label.
    """

    weight_DC: np.ndarray
    bias_C: np.ndarray

    def decide(self, x_ND: np.ndarray) -> np.ndarray:
        """Logits [N, C]."""
        return x_ND @ self.weight_DC + self.bias_C


@dataclass(frozen=True)
class HeldOut:
    """A graph with some edges hidden.

    Attributes:
        graph: without the hidden edges; the same nodes.
        positive_E2: int64, the hidden edges.
        negative_E2: int64, as many distinct pairs of different nodes that are no edges of the whole graph.
    """

    graph: Graph
    positive_E2: np.ndarray
    negative_E2: np.ndarray


def classify_nodes(
    embedding_ND: ArrayLike,
    labels: Any,
    *,
    train_fraction: float = 0.1,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    C: float = 1.0,
    solver: Literal["newton", "liblinear"] = "newton",
) -> NodeScores:
    """Multi-label node classification by DeepWalk's protocol (see the module).

    Args:
        embedding_ND: vectors of the nodes.
        labels: whose node has which label: bool [N, C], dense or scipy sparse; or one label per node, integers [N], -1 for none.
            Nodes without a label are left out.
        train_fraction: share of the labelled nodes that is trained on, rounded down.
        seeds: one shuffle each.
        C: weight of the loss against the penalty; papers use 1, FastRP's BlogCatalog run 0.1.
        solver: scikit-learn's ``newton`` steps, or its ``liblinear``, to compare with.

    Raises:
        InputError: shapes do not fit, values are not finite, or a share leaves no node to train on or to test on.
        BackendError: without scikit-learn.
    """
    x_ND = _vectors(embedding_ND)
    label_NC = _label_matrix(labels, len(x_ND))
    labelled = np.flatnonzero(label_NC.any(1))
    count = int(train_fraction * len(labelled)) if 0 < train_fraction < 1 else 0
    if not 0 < count < len(labelled):
        raise InputError(
            f"train_fraction is {train_fraction}; of {len(labelled):,} labelled nodes some must be trained on and some tested on"
        )
    if not len(seeds):
        raise InputError("seeds is empty; give one per shuffle")
    fit = {"newton": fit_one_vs_rest, "liblinear": _fit_liblinear}.get(solver)
    if fit is None:
        raise InputError(f"solver is {solver!r}; it must be 'newton' or 'liblinear'")
    found = []
    for seed in seeds:
        order = np.random.default_rng(seed).permutation(labelled)
        train, test = order[:count], order[count:]
        model = fit(x_ND[train], label_NC[train], C)
        given_NC = top_labels(model.decide(x_ND[test]), label_NC[test].sum(1))
        found.append(f1(label_NC[test], given_NC))
    micro_S, macro_S = np.array(found).T
    return NodeScores(micro_S, macro_S, count, len(labelled) - count)


def fit_one_vs_rest(x_ND: np.ndarray, label_NC: np.ndarray, C: float = 1.0, *, tol: float = 1e-6) -> OneVsRest:
    """A logistic regression of each label, penalised as liblinear does it (the intercept too).

    Args:
        x_ND: finite.
        label_NC: bool.
        C: weight of the loss, positive.
        tol: the gradient's length at the result over its length at 0. The error of each weight vector (with intercept) is at
            most the former.

    Raises InputError for a C that is not positive, AnabranchError if rounding keeps ``tol`` from being reached, BackendError without
    scikit-learn.
    """
    if not (C > 0 and np.isfinite(C)):
        raise InputError(f"C is {C}; it must be positive")
    require("scikit-learn", by="classifying nodes", of="graph")
    num_labels = label_NC.shape[1]
    weight_FC = np.zeros((x_ND.shape[1] + 1, num_labels))
    positive_C = label_NC.sum(0)
    mixed = np.flatnonzero((positive_C > 0) & (positive_C < len(label_NC)))
    if mixed.size:
        augmented = np.column_stack([x_ND.astype(np.float64), np.ones(len(x_ND))])
        # At most as many axes as nodes.
        axes = np.linalg.qr(augmented.T)[0] if len(augmented) < augmented.shape[1] else None
        spanned = augmented if axes is None else augmented @ axes
        for label in mixed:
            weight = _newton(spanned, label_NC[:, label], C, tol)
            weight_FC[:, label] = weight if axes is None else axes @ weight
    weight_FC[-1, positive_C == 0] = -np.inf
    weight_FC[-1, (positive_C == len(label_NC)) & (positive_C > 0)] = np.inf
    return OneVsRest(weight_FC[:-1], weight_FC[-1])


def _newton(x_NF: np.ndarray, has_N: np.ndarray, C: float, tol: float) -> np.ndarray:
    """Minimise 1/2 |w|^2 + C sum_i log(1 + exp(-y_i x_i.w)), the intercept a column of x, until the gradient has fallen by ``tol``."""
    from sklearn.linear_model import LogisticRegression

    def length(weight_F: np.ndarray) -> float:
        # The logistic function, without overflow.
        p_N = 0.5 + 0.5 * np.tanh(0.5 * (x_NF @ weight_F))
        return float(np.linalg.norm(weight_F + C * (x_NF.T @ (p_N - has_N))))

    first = max(length(np.zeros(x_NF.shape[1])), 1e-300)
    # There it is the largest entry of the gradient, over the weight of all losses.
    least = 0.5 * tol * first / (np.sqrt(x_NF.shape[1]) * C * len(x_NF))
    model = LogisticRegression(C=C, solver="newton-cholesky", fit_intercept=False, tol=least, max_iter=_NEWTON_STEPS)
    with warnings.catch_warnings():
        # Whether it got there is seen below.
        warnings.simplefilter("ignore")
        weight_F = model.fit(x_NF, has_N).coef_[0]
    if not length(weight_F) <= tol * first + 1e-9:
        raise AnabranchError(
            f"logistic regression did not reach tol = {tol:.1e} in {_NEWTON_STEPS} steps; raise tol or scale the vectors"
        )
    return weight_F


def _fit_liblinear(x_ND: np.ndarray, label_NC: np.ndarray, C: float) -> OneVsRest:
    require("scikit-learn", by="solver='liblinear'", of="graph")
    from sklearn.linear_model import LogisticRegression

    weight_DC, bias_C = np.zeros((x_ND.shape[1], label_NC.shape[1])), np.empty(label_NC.shape[1])
    for label, has_N in enumerate(label_NC.T):
        if has_N.all() or not has_N.any():
            bias_C[label] = np.inf if has_N.all() else -np.inf
            continue
        model = LogisticRegression(C=C, solver="liblinear").fit(x_ND, has_N)
        weight_DC[:, label], bias_C[label] = model.coef_[0], model.intercept_[0]
    return OneVsRest(weight_DC, bias_C)


def top_labels(score_NC: np.ndarray, count_N: np.ndarray) -> np.ndarray:
    """bool [N, C]: the ``count_N[i]`` labels of the largest scores of each node, ties to the lowest label."""
    order_NC = np.argsort(-score_NC, axis=1, kind="stable")
    rank_NC = np.empty_like(order_NC)
    np.put_along_axis(rank_NC, order_NC, np.arange(score_NC.shape[1])[None], axis=1)
    return rank_NC < np.asarray(count_N)[:, None]


def f1(true_NC: np.ndarray, given_NC: np.ndarray) -> tuple[float, float]:
    """Micro and macro F1 of labels given to nodes, bool [N, C]; 0 where there is nothing to count."""
    hit_C = (true_NC & given_NC).sum(0)
    size_C = true_NC.sum(0) + given_NC.sum(0)
    macro = float((2 * hit_C / np.maximum(size_C, 1)).mean()) if len(hit_C) else 0.0
    return float(2 * hit_C.sum() / max(size_C.sum(), 1)), macro


def hold_out_edges(graph: Any, fraction: float = 0.1, seed: int = 0, *, keep_connected: bool = False) -> HeldOut:
    """Hide a share of a graph's edges, and draw as many pairs that are no edges.

    Args:
        graph: whatever `as_graph` takes, directed or not; self-loops are never hidden. Pairs that come back are ids in its order of nodes.
        fraction: share of the edges, rounded down, at least one.
        seed: of the draws.
        keep_connected: never hide the edges of a spanning forest, so that nodes connected before stay connected (node2vec's
            protocol; of a directed graph, connected when directions are ignored). By default any edge may go (GraphVite's).

    Raises InputError for a share that asks for no edge, for more than may be hidden, or for more non-edges than half of those there are.
    """
    graph = as_graph(graph, allow_negative=True)
    source_E, target_E, weight_E = graph.edges()
    free = source_E != target_E
    if keep_connected:
        free &= ~_forest(graph, source_E, target_E)
    candidates = np.flatnonzero(free)
    count = int(fraction * len(source_E)) if 0 < fraction < 1 else 0
    if not 0 < count <= len(candidates):
        raise InputError(f"fraction is {fraction}; of {len(source_E):,} edges, 1 to {len(candidates):,} can be hidden")
    generator = np.random.default_rng(seed)
    hidden = np.sort(generator.choice(candidates, count, replace=False))
    kept = np.ones(len(source_E), bool)
    kept[hidden] = False
    rest = Graph.from_edges(
        source_E[kept],
        target_E[kept],
        None if weight_E is None else weight_E[kept],
        graph.is_directed,
        graph.num_nodes,
        names=graph.names,
        allow_negative=True,
    )
    positive_E2 = np.column_stack([source_E[hidden], target_E[hidden]]).astype(np.int64)
    rest = replace(rest, by_name=graph.by_name)
    return HeldOut(rest, positive_E2, _non_edges(graph, source_E, target_E, count, generator))


def _forest(graph: Graph, source_E: np.ndarray, target_E: np.ndarray) -> np.ndarray:
    """bool [E]: edges of a spanning forest."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import minimum_spanning_tree

    shape = (graph.num_nodes, graph.num_nodes)
    low, high = np.minimum(source_E, target_E).astype(np.int64), np.maximum(source_E, target_E).astype(np.int64)
    # Of u -> v and v -> u one is enough.
    once, place = np.unique(low * graph.num_nodes + high, return_index=True)
    tree = minimum_spanning_tree(
        coo_array((np.ones(len(once)), (low[place], high[place])), shape=shape).tocsr()
    ).tocoo()
    chosen = np.zeros(len(source_E), bool)
    chosen[place[np.isin(once, tree.row.astype(np.int64) * graph.num_nodes + tree.col)]] = True
    return chosen


def _non_edges(
    graph: Graph, source_E: np.ndarray, target_E: np.ndarray, count: int, generator: np.random.Generator
) -> np.ndarray:
    """``count`` distinct pairs of different nodes without an edge, evenly among all of them."""
    nodes = graph.num_nodes
    loops = int((source_E == target_E).sum())
    room = nodes * (nodes - 1) // (1 if graph.is_directed else 2) - (len(source_E) - loops)
    if 2 * count > room:
        raise InputError(f"{count:,} pairs without an edge are asked for and the graph has {room:,}; hide fewer edges")
    # Undirected: source <= target, as below.
    taken = np.sort(source_E.astype(np.int64) * nodes + target_E)
    found = np.empty(0, np.int64)
    while len(found) < count:
        source, target = generator.integers(0, nodes, (2, 2 * count))
        if not graph.is_directed:
            source, target = np.minimum(source, target), np.maximum(source, target)
        key = (source * nodes + target)[source != target]
        place = np.minimum(np.searchsorted(taken, key), max(len(taken) - 1, 0))
        key = key[taken[place] != key] if len(taken) else key
        both = np.append(found, key)
        # The first drawn of each.
        found = both[np.sort(np.unique(both, return_index=True)[1])][:count]
    return np.column_stack(np.divmod(found, nodes))


def link_auc(
    embedding_ND: ArrayLike,
    positive_E2: ArrayLike,
    negative_E2: ArrayLike,
    *,
    operator: Operator = "dot",
    target_ND: ArrayLike | None = None,
) -> float:
    """Area under the ROC curve of telling edges from non-edges by the vectors of their ends.

    Args:
        embedding_ND: vectors.
        positive_E2: pairs that are edges.
        negative_E2: pairs that are not.
        operator: ``dot`` product, ``cosine`` (0 with a zero vector), or ``l2``, the negative distance.
        target_ND: vectors of the second ends, where they have their own (contexts of GraphVite).

    Raises InputError for shapes that do not fit, values that are not finite, ids out of range, or no pair on one side.
    """
    head = _vectors(embedding_ND)
    tail = head if target_ND is None else _vectors(target_ND)
    if tail.shape != head.shape:
        raise InputError(f"target_ND has the shape {tail.shape} and embedding_ND {head.shape}; they must be the same")
    if operator not in ("dot", "cosine", "l2"):
        raise InputError(f"operator is {operator!r}; it must be 'dot', 'cosine' or 'l2'")
    scores = [
        _pair_scores(head, tail, _pairs(name, pairs, len(head)), operator)
        for name, pairs in (("positive_E2", positive_E2), ("negative_E2", negative_E2))
    ]
    return auc(*scores)


def auc(positive: ArrayLike, negative: ArrayLike) -> float:
    """The probability that a positive scores above a negative, ties counted half; exact. Raises InputError for NaN or an empty side."""
    above = np.asarray(unmasked(positive, "positive")).ravel()
    below = np.asarray(unmasked(negative, "negative")).ravel()
    for name, scores in (("positive", above), ("negative", below)):
        if not scores.size:
            raise InputError(f"there are no {name} scores; AUC needs both sides")
        if np.isnan(scores).any():
            raise InputError(f"{name} score {int(np.isnan(scores).argmax())} is NaN")
    order = np.sort(below)
    twice = np.searchsorted(order, above, "left").sum() + np.searchsorted(order, above, "right").sum()
    return int(twice) / (2 * above.size * below.size)


def _pair_scores(head: np.ndarray, tail: np.ndarray, pairs_E2: np.ndarray, operator: str) -> np.ndarray:
    found = np.empty(len(pairs_E2))
    # Vectors of a part of the pairs at a time.
    for start in range(0, len(pairs_E2), 1 << 16):
        part = slice(start, start + (1 << 16))
        left, right = head[pairs_E2[part, 0]].astype(np.float64), tail[pairs_E2[part, 1]].astype(np.float64)
        if operator == "l2":
            found[part] = -np.linalg.norm(left - right, axis=1)
            continue
        found[part] = (left * right).sum(1)
        if operator == "cosine":
            found[part] /= np.maximum(np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1), 1e-300)
    return found


def _vectors(embedding_ND: ArrayLike) -> np.ndarray:
    found = np.asarray(unmasked(embedding_ND, "an embedding"))
    if found.ndim != 2 or found.dtype.kind not in "fiu":
        raise InputError(f"an embedding is numbers of the shape [nodes, dim], this one is {found.dtype} {found.shape}")
    finite_N = np.isfinite(found).all(1)
    if not finite_N.all():
        raise InputError(f"the vector of node {int(finite_N.argmin())} has values that are not finite")
    return found


def _label_matrix(labels: Any, count: int) -> np.ndarray:
    """bool [N, C]."""
    found = (
        (wide_rows(labels, "labels") != 0).toarray() if is_sparse(labels) else np.asarray(unmasked(labels, "labels"))
    )
    if found.ndim == 1 and found.dtype.kind in "iu" and found.size:
        if found.min() < -1:
            raise InputError(
                f"node {int(found.argmin())} has the label {found.min()}; labels are 0, 1, ..., and -1 for none"
            )
        found = found[:, None] == np.arange(max(int(found.max()) + 1, 1))
    if found.ndim != 2 or len(found) != count:
        raise InputError(
            f"labels have the shape {found.shape} and there are {count:,} vectors; give [nodes, labels] or [nodes]"
        )
    return found.astype(bool)


def _pairs(name: str, pairs: ArrayLike, count: int) -> np.ndarray:
    found = np.asarray(unmasked(pairs, name))
    if found.ndim != 2 or found.shape[1] != 2 or (found.size and found.dtype.kind not in "iu"):
        raise InputError(f"{name} is {found.dtype} {found.shape}; it must be integers of the shape [pairs, 2]")
    bad = np.flatnonzero(((found < 0) | (found >= count)).any(1))
    if bad.size:
        raise InputError(f"{name} {bad[0]} is {tuple(found[bad[0]].tolist())}; nodes are 0 to {count - 1}")
    return found.astype(np.int64)
