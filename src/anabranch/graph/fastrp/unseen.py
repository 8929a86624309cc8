"""Vectors of nodes that were not there when FastRP was fitted: their edges and features, and what `fit` kept of the others."""
# Shapes: N nodes that were fitted, R new nodes, D dim, F features

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from anabranch.bounds import shown
from anabranch.errors import InputError
from anabranch.graph.fastrp.start import Setup, inverse_power
from anabranch.graph.masks import unmasked
from anabranch.graph.projection import keys_of
from anabranch.graph.sparse import wide_rows
from anabranch.graph.store import Graph


@dataclass(frozen=True)
class NewRows:
    """Rows of the matrix that new nodes bring, ready to be multiplied.

    Attributes:
        known_RN: sparse, to nodes that were fitted, their diagonal on the right in its values.
        among_RR: sparse, between new nodes, likewise; None where there is no such edge.
        left_R: the diagonal on the left.
        degree_R: float64 sums of absolute weights of each new node's edges.
    """

    known_RN: Any
    among_RR: Any
    left_R: np.ndarray
    degree_R: np.ndarray


def new_rows(rows: Any, setup: Setup, matrix: str, dtype: Any, allow_negative: bool) -> NewRows:
    """Check the edges of new nodes. Raises InputError for rows that do not fit, or weights that may not be."""
    from scipy.sparse import csr_array

    old = len(setup.start.key_N)
    found = wide_rows(rows, f"rows [new nodes, {old}]")
    if found.shape[1] not in (old, old + found.shape[0]):
        raise InputError(
            f"rows have the shape {found.shape}; it must be [new nodes, {old}], or [new nodes, {old} + new nodes] with edges between them"
        )
    if not np.isfinite(found.data).all() or (not allow_negative and (found.data < 0).any()):
        raise InputError("weights of new edges must be finite and not negative (allow_negative takes those)")
    degree_R = abs(found).sum(1)
    power = {"transition": 1.0, "symmetric": 0.5, "adjacency": 0.0}[matrix]
    left_R = inverse_power(degree_R, power) if power else np.ones(len(degree_R))
    known, among = csr_array(found[:, :old]), None
    if setup.right_N is not None:
        known.data *= setup.right_N[known.indices]
    if found.shape[1] > old:
        among = csr_array(found[:, old:])
        if setup.right_N is not None:
            # What comes into a new node: of an undirected graph the same as goes out, else from new nodes alone.
            into_R = abs(among).sum(0) if setup.is_directed else degree_R
            among.data *= inverse_power(into_R, 0.5)[among.indices]
        among = among.astype(dtype) if among.nnz else None
    return NewRows(known.astype(dtype), among, left_R.astype(dtype), degree_R)


def start_of_new(rows: NewRows, setup: Setup, beta: float, features: Any, names: Iterable[Any] | None) -> np.ndarray:
    """L R of new nodes, [R, D]. Raises InputError for names or features that do not fit."""
    start, count = setup.start, len(rows.degree_R)
    old = len(start.key_N)
    key_R = np.arange(old, old + count, dtype=np.uint64) if names is None else keys_of(names)
    if key_R.ndim != 1 or len(key_R) != count:
        raise InputError(f"there are {count:,} rows and {key_R.size:,} names; give one per row")
    random_RD = start.of_new(key_R, features)
    with np.errstate(over="ignore", under="ignore", divide="ignore"):
        scale_R = rows.degree_R**beta / math.sqrt(random_RD.shape[1])
    # A degree of 0 counts as the smallest that is not, of old and new nodes, as in the fit.
    known = np.append(start.scale_N.astype(np.float64), scale_R[rows.degree_R > 0])
    least = known.max(initial=0) if beta <= 0 else known.min(initial=np.inf)
    scale_R = np.where(rows.degree_R > 0, scale_R, least)
    if not np.isfinite(scale_R.astype(start.scale_N.dtype)).all():
        raise InputError(f"degrees of new nodes to the power beta = {beta} leave the range of {start.scale_N.dtype}")
    return random_RD * scale_R.astype(start.scale_N.dtype)[:, None]


def powers_of_new(rows: NewRows, start_RD: np.ndarray, old: Iterable[np.ndarray]) -> list[np.ndarray]:
    """N_1, N_2 ... of new nodes from L R, N_1 ... of the ``old`` ones: all but the last that are wanted."""
    found, before_RD = [], start_RD
    for before_ND in old:
        total = rows.known_RN @ before_ND
        if rows.among_RR is not None:
            total = total + rows.among_RR @ before_RD
        before_RD = rows.left_R[:, None] * total
        found.append(before_RD)
    return found


def edges_of_new(nodes: Graph, source: Any, target: Any, weight: Any) -> tuple[Any, list[Any]]:
    """See `anabranch.graph.fastrp.model.FastRP.edges_of_new`. ``nodes`` are those that were fitted."""
    from scipy.sparse import coo_array

    sources, targets = (_names(given, what) for given, what in ((source, "source"), (target, "target")))
    if len(sources) != len(targets):
        raise InputError(f"there are {len(sources):,} sources and {len(targets):,} targets; give as many of both")
    try:
        weight_E = np.ones(len(sources)) if weight is None else np.asarray(unmasked(weight, "weight"), np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"weights are numbers: {error}") from None
    if weight_E.shape != (len(sources),):
        raise InputError(f"weight has the shape {weight_E.shape}; there are {len(sources):,} edges")
    known = {
        name: place
        for place, name in enumerate(range(nodes.num_nodes) if nodes.names is None else nodes.names.tolist())
    }
    for name in sources:
        if name in known:
            raise InputError(f"node {shown(name)} was fitted; new edges start at new nodes")
    new = {
        name: place
        for place, name in enumerate(dict.fromkeys([*sources, *(name for name in targets if name not in known)]))
    }
    row_E = np.array([new[name] for name in sources], np.int64)
    column_E = np.array([known[n] if n in known else nodes.num_nodes + new[n] for n in targets], np.int64)
    if not nodes.is_directed:
        # Once each way between new ones, but for loops.
        both = np.flatnonzero((column_E >= nodes.num_nodes) & (column_E - nodes.num_nodes != row_E))
        back = column_E[both] - nodes.num_nodes, row_E[both] + nodes.num_nodes
        row_E, column_E = np.append(row_E, back[0]), np.append(column_E, back[1])
        weight_E = np.append(weight_E, weight_E[both])
    shape = (len(new), nodes.num_nodes + len(new))
    return coo_array((weight_E, (row_E, column_E)), shape=shape).tocsr(), list(new)


def _names(given: Any, what: str) -> list[Any]:
    """Names of nodes. Raises InputError for what is no list of them."""
    given = unmasked(given, what)
    if isinstance(given, str | bytes) or not np.iterable(given):
        raise InputError(f"{what} is {shown(given)}; it must be a list of names")
    found = list(given)
    try:
        hash(tuple(found))
    except TypeError:
        raise InputError(f"{what} must be a list of names: one of them cannot be hashed") from None
    return found
