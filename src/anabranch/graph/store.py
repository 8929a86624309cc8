"""`Graph`: one immutable graph in compressed sparse rows, what every algorithm of this package takes.

    graph = Graph.from_edges(source, target, weight, directed=True)
    graph.neighbors(0), graph.degree_N, graph.save("g.anb"), Graph.load("g.anb", mmap=True)

Rules, the same for every way a graph comes in (`anabranch.graph.formats` reads files and other libraries' graphs):

- nodes are 0 ... N - 1; names of an outside kind are kept as ``names`` and translated by `ids_of` and `names_of`
- neighbours of a node stand in rising order, each once; ids are int32 where N and the edges fit, int64 otherwise
- an undirected edge is stored in both rows, a self-loop once; it may be given in either direction or in both
- duplicates of an edge: their weights are added; without weights they are one edge
- weights are positive and finite; a zero is an error, or dropped where that is asked for; isolated and dangling nodes stay
"""
# Shapes: N nodes, M stored edges (an undirected edge is two of them), E edges as given

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from anabranch.errors import InputError
from anabranch.graph.alias import AliasTable, build_alias
from anabranch.graph.array_file import read_arrays, write_arrays

KIND = "graph"
INT32 = np.iinfo(np.int32).max


@dataclass(frozen=True, eq=False)
class Graph:
    """A graph in compressed sparse rows. Make one with `from_edges`, `from_scipy`, `load` or a reader of `anabranch.graph.formats`.

    Attributes:
        indptr: int64 [N + 1], where each node's edges start.
        indices: int32 or int64 [M], their targets, rising within a row.
        weights: float32 [M], or None where all edges count the same.
        is_directed: whether an edge has a direction; without, the matrix is symmetric.
        names: what nodes are called outside, [N] of integers or text; None where they are numbers 0 ... N - 1.
    """

    indptr: np.ndarray
    indices: np.ndarray
    weights: np.ndarray | None = None
    is_directed: bool = False
    names: np.ndarray | None = None
    _index: dict[Any, int] = field(default_factory=dict, repr=False)

    # Making one

    @classmethod
    def from_edges(
        cls,
        source: ArrayLike,
        target: ArrayLike,
        weight: ArrayLike | None = None,
        directed: bool = False,
        num_nodes: int | None = None,
        *,
        names: Sequence[Any] | np.ndarray | None = None,
        drop_zero: bool = False,
        allow_negative: bool = False,
    ) -> Self:
        """A graph of these edges.

        Args:
            source: integers [E], where each edge starts.
            target: integers [E], where it ends.
            weight: [E], finite and positive; None for a graph without weights.
            directed: whether (u, v) differs from (v, u).
            num_nodes: nodes, those without edges included. Default: the largest id + 1.
            names: what nodes are called outside, distinct, [num_nodes].
            drop_zero: leave out edges of weight 0 instead of refusing them.
            allow_negative: take negative weights, which only algebraic methods (FastRP) can use.

        Raises:
            InputError: arrays of different length or kind, an id out of range, a weight that is not finite or not positive (with
                the number of the edge), names that do not fit.
        """
        source_E, target_E, count = _checked_ends(source, target, num_nodes)
        weight_E = None if weight is None else _checked_weights(weight, len(source_E), drop_zero, allow_negative)
        if weight_E is not None and drop_zero and not weight_E.all():
            kept = weight_E != 0
            source_E, target_E, weight_E = source_E[kept], target_E[kept], weight_E[kept]
        indptr, indices, weights = _rows(source_E, target_E, weight_E, directed, count)
        return cls(indptr, indices, weights, directed, _checked_names(names, count))

    @classmethod
    def from_scipy(
        cls,
        matrix: Any,
        directed: bool | None = None,
        *,
        names: Any = None,
        drop_zero: bool = True,
        allow_negative: bool = False,
    ) -> Self:
        """The graph of a sparse adjacency matrix; entry (u, v) is the weight of u -> v, and equal entries make a graph without weights.

        Args:
            matrix: a scipy sparse matrix or array, square.
            directed: None looks whether the matrix is symmetric; False demands it.
            names: as in `from_edges`.
            drop_zero: stored zeros are left out.
            allow_negative: as in `from_edges`.

        Raises:
            InputError: the matrix is not square, or not symmetric where ``directed`` is False; and as in `from_edges`.
        """
        if len(matrix.shape) != 2 or matrix.shape[0] != matrix.shape[1]:
            raise InputError(f"an adjacency matrix is square, this one has the shape {tuple(matrix.shape)}")
        coo = matrix.tocoo()
        if directed is not True:
            difference = (matrix != matrix.T) if coo.nnz else coo
            if directed is False and difference.nnz:
                raise InputError(f"the matrix is not symmetric ({difference.nnz} entries differ); pass directed=True")
            directed = bool(difference.nnz)
        even = coo.nnz == 0 or (coo.data == coo.data[0]).all()
        plain = even and (coo.nnz == 0 or coo.data[0] in (1, True))
        kept = slice(None) if directed else coo.row <= coo.col  # each undirected edge once: duplicates would be added
        weight = None if plain else coo.data[kept]
        return cls.from_edges(
            coo.row[kept], coo.col[kept], weight, directed, matrix.shape[0],
            names=names, drop_zero=drop_zero, allow_negative=allow_negative,
        )  # fmt: skip

    # Looking at it

    @property
    def num_nodes(self) -> int:
        """N."""
        return len(self.indptr) - 1

    @cached_property
    def num_edges(self) -> int:
        """Edges, an undirected one counted once."""
        return len(self.indices) if self.is_directed else (len(self.indices) + self.num_self_loops) // 2

    @cached_property
    def num_self_loops(self) -> int:
        """Edges from a node to itself."""
        return int((self.indices == self._sources()).sum())

    @cached_property
    def degree_N(self) -> np.ndarray:
        """int64 [N], stored edges of each node (its out-edges where directed)."""
        return np.diff(self.indptr)

    @cached_property
    def strength_N(self) -> np.ndarray:
        """float64 [N], the sum of each node's weights; its degree without weights."""
        if self.weights is None:
            return self.degree_N.astype(np.float64)
        padded = np.append(self.weights, np.float32(0)).astype(np.float64)  # reduceat needs a place behind the last row
        sums = np.add.reduceat(padded, self.indptr[:-1]) if self.num_nodes else np.empty(0)
        return np.where(self.degree_N > 0, sums, 0.0)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, names left out."""
        return self.indptr.nbytes + self.indices.nbytes + (0 if self.weights is None else self.weights.nbytes)

    @cached_property
    def alias(self) -> AliasTable | None:
        """Tables to draw a neighbour by weight, 8 bytes an edge; None without weights (draw evenly). Made once.

        Raises InputError for negative weights.
        """
        if self.weights is None:
            return None
        if len(self.weights) and self.weights.min() < 0:
            raise InputError("walks need weights that are not negative; this graph has some that are")
        return build_alias(self.indptr, self.weights)

    @cached_property
    def reversed(self) -> "Graph":
        """The graph with every edge turned around; itself where undirected. Made once."""
        if not self.is_directed:
            return self
        indptr, indices, weights = _rows(self.indices, self._sources(), self.weights, True, self.num_nodes)
        return Graph(indptr, indices, weights, True, self.names)

    def neighbors(self, node: int) -> np.ndarray:
        """Ids of the targets of a node's edges. Raises InputError for a node that is not there."""
        place = self.check_nodes([node])[0]
        return self.indices[self.indptr[place] : self.indptr[place + 1]]

    def edges(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Source, target and weight [E] of every edge, an undirected one once (source <= target)."""
        source_M = self._sources()
        if self.is_directed:
            return source_M, self.indices, self.weights
        kept = source_M <= self.indices
        return source_M[kept], self.indices[kept], None if self.weights is None else self.weights[kept]

    def to_scipy(self, dtype: Any = np.float32) -> Any:
        """The adjacency matrix as `scipy.sparse.csr_array` [N, N]; ones where there are no weights."""
        from scipy.sparse import csr_array

        weights = np.ones(len(self.indices), dtype) if self.weights is None else self.weights.astype(dtype, copy=False)
        indptr = self.indptr.astype(self.indices.dtype, copy=False)
        return csr_array((weights, self.indices, indptr), shape=(self.num_nodes, self.num_nodes))

    def check_nodes(self, nodes: ArrayLike) -> np.ndarray:
        """``nodes`` as int64 ids. Raises InputError naming the first that is not an id of this graph."""
        found = np.atleast_1d(np.asarray(nodes))
        if found.size and found.dtype.kind not in "iu":
            raise InputError(f"node ids are integers, not {found.dtype}; `ids_of` translates names")
        bad = np.flatnonzero((found < 0) | (found >= self.num_nodes))
        if bad.size:
            raise InputError(
                f"node {found.flat[bad[0]]} is not one of the {self.num_nodes:,} nodes of the graph (0 to {self.num_nodes - 1})"
            )
        return found.astype(np.int64, copy=False)

    def ids_of(self, names: Iterable[Any]) -> np.ndarray:
        """Ids, int64, of nodes by their outside names. Raises InputError naming the first unknown one."""
        if self.names is None:
            return self.check_nodes(list(names))
        if not self._index:
            self._index.update((name, number) for number, name in enumerate(self.names.tolist()))
        try:
            return np.array([self._index[name] for name in names], np.int64)
        except KeyError as error:
            raise InputError(f"the graph has no node {error.args[0]!r}") from None

    def names_of(self, nodes: ArrayLike) -> np.ndarray:
        """Outside names of nodes by id; the ids themselves where there are none."""
        found = self.check_nodes(nodes)
        return found if self.names is None else self.names[found]

    # On disk

    def save(self, path: str | Path) -> None:
        """Write the graph into one checked file (`anabranch.graph.array_file`), all or nothing."""
        arrays = {"indptr": self.indptr, "indices": self.indices}
        meta: dict[str, Any] = {"is_directed": self.is_directed}
        if self.weights is not None:
            arrays["weights"] = self.weights
        if self.names is not None and self.names.dtype.kind in "iu":
            arrays["names"] = self.names
        elif self.names is not None:
            encoded = [str(name).encode() for name in self.names.tolist()]
            arrays["name_ends"] = np.cumsum([len(name) for name in encoded], dtype=np.int64)
            arrays["name_bytes"] = np.frombuffer(b"".join(encoded), np.uint8)
        write_arrays(path, KIND, arrays, meta)

    @classmethod
    def load(cls, path: str | Path, *, mmap: bool = False) -> Self:
        """Read what `save` wrote; with ``mmap`` arrays stay on disk until they are used.

        Raises DataError for a file that is missing, foreign, truncated or damaged.
        """
        found = read_arrays(path, KIND, mmap=mmap)
        arrays, names = found.arrays, found.arrays.get("names")
        if "name_ends" in arrays:
            text, ends = arrays["name_bytes"].tobytes(), arrays["name_ends"].tolist()
            names = np.array([text[a:b].decode() for a, b in zip([0, *ends], ends, strict=False)], object)
        return cls(arrays["indptr"], arrays["indices"], arrays.get("weights"), found.meta["is_directed"], names)

    def __repr__(self) -> str:
        kind = "directed" if self.is_directed else "undirected"
        weighted = "weighted" if self.weights is not None else "unweighted"
        return f"Graph({self.num_nodes:,} nodes, {self.num_edges:,} edges, {kind}, {weighted})"

    def _sources(self) -> np.ndarray:
        """The source of every stored edge, [M]."""
        return np.repeat(np.arange(self.num_nodes, dtype=self.indices.dtype), self.degree_N)


def _rows(
    source_E: np.ndarray, target_E: np.ndarray, weight_E: np.ndarray | None, directed: bool, num_nodes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Compressed rows: sorted, both directions of undirected edges, duplicates added up (or taken once)."""
    from scipy.sparse import coo_array

    fits = max(num_nodes, 2 * len(source_E)) <= INT32
    ids = np.int32 if fits else np.int64

    def compressed(source: np.ndarray, target: np.ndarray, data: np.ndarray) -> Any:
        ends = (source.astype(ids, copy=False), target.astype(ids, copy=False))
        return coo_array((data, ends), shape=(num_nodes, num_nodes)).tocsr()  # sorts, and adds up what is given twice

    data = np.ones(len(source_E), bool) if weight_E is None else weight_E  # true + true is true
    if directed:
        matrix = compressed(source_E, target_E, data)
    else:  # an undirected edge may be given as (u, v), (v, u) or both: bring all to u <= v, add up, then mirror
        upper = compressed(np.minimum(source_E, target_E), np.maximum(source_E, target_E), data).tocoo()
        off = upper.row != upper.col
        rows, columns = np.append(upper.row, upper.col[off]), np.append(upper.col, upper.row[off])
        matrix = compressed(rows, columns, np.append(upper.data, upper.data[off]))
    indices = matrix.indices.astype(ids, copy=False)
    weights = None if weight_E is None else matrix.data.astype(np.float32, copy=False)
    return matrix.indptr.astype(np.int64, copy=False), indices, weights


def _checked_ends(source: ArrayLike, target: ArrayLike, num_nodes: int | None) -> tuple[np.ndarray, np.ndarray, int]:
    ends = {"source": np.asarray(source), "target": np.asarray(target)}
    for name, array in ends.items():
        if array.ndim != 1:
            raise InputError(f"{name} has the shape {array.shape}; it must be a list of node ids")
        if array.size and array.dtype.kind not in "iu":
            raise InputError(f"{name} is of type {array.dtype}; node ids are integers (pass names as `names`)")
    source_E, target_E = (array.astype(np.int64) if not array.size else array for array in ends.values())
    if len(source_E) != len(target_E):
        raise InputError(f"source has {len(source_E):,} ends and target {len(target_E):,}; they must be as many")
    largest = max((int(array.max()) for array in (source_E, target_E) if array.size), default=-1)
    count = largest + 1 if num_nodes is None else int(num_nodes)
    if count < 0:
        raise InputError(f"num_nodes is {num_nodes}; it must not be negative")
    for name, array in (("source", source_E), ("target", target_E)):
        bad = np.flatnonzero((array < 0) | (array >= count))
        if len(bad):
            raise InputError(f"edge {bad[0]} has the {name} {array[bad[0]]}; nodes are 0 to {count - 1}")
    return source_E, target_E, count


def _checked_weights(weight: ArrayLike, count: int, drop_zero: bool, allow_negative: bool) -> np.ndarray:
    try:
        weight_E = np.asarray(weight).astype(np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"weights are numbers: {error}") from None
    if weight_E.shape != (count,):
        raise InputError(f"weight has the shape {weight_E.shape}; there are {count:,} edges")
    for bad, what in (
        (~np.isfinite(weight_E), "finite (as 32-bit numbers)"),
        ((weight_E < 0) & (not allow_negative), "not negative"),
        ((weight_E == 0) & (not drop_zero), "not 0 (drop_zero=True leaves such edges out)"),
    ):
        place = np.flatnonzero(bad)
        if place.size:
            raise InputError(f"edge {place[0]} has the weight {np.asarray(weight)[place[0]]}; weights must be {what}")
    return weight_E


def _checked_names(names: Any, count: int) -> np.ndarray | None:
    if names is None:
        return None
    found = np.asarray(names)
    found = found if found.dtype.kind in "iu" else np.asarray(names, dtype=object)
    if found.shape != (count,):
        raise InputError(f"there are {count:,} nodes and names of the shape {found.shape}; give one name per node")
    if len(set(found.tolist())) != count:
        raise InputError("names must be distinct; at least two nodes have the same one")
    return found
