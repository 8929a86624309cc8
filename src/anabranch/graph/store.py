"""`Graph`: one immutable graph in compressed sparse rows, what every algorithm of this package takes.

    graph = Graph.from_edges(source, target, weight, directed=True)
    graph.neighbors(0), graph.degree_N, graph.save("g.anb"), Graph.load("g.anb", mmap=True)

Rules, the same for every way a graph comes in (`anabranch.graph.formats` reads files and other libraries' graphs):

- nodes are 0 ... N - 1; names of an outside kind are kept as ``names`` and translated by `ids_of` and `names_of`
- neighbours of a node stand in rising order, each once; ids are int32 where N and the edges fit, int64 otherwise
- an undirected edge is stored in both rows, a self-loop once; it may be given in either direction or in both
- duplicates of an edge: their weights are added (in float64, in the order given); without weights they are one edge
- weights are positive and finite; a zero is an error, or dropped where that is asked for; isolated and dangling nodes stay
- arrays are read-only, of a graph in memory as of a mapped one
"""
# Shapes: N nodes, M stored edges (an undirected edge is two of them), E edges as given

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike

from anabranch.bounds import near_name, shown, whole
from anabranch.errors import InputError
from anabranch.graph import csr, graph_file, transform
from anabranch.graph.alias import AliasTable, build_alias
from anabranch.graph.arguments import as_number_type, check_flag, check_one_of
from anabranch.graph.checks import checked_ends, checked_names, checked_weights, has_text, is_known
from anabranch.graph.csr import DUPLICATES, NO_WEIGHTS
from anabranch.graph.masks import unmasked


class GraphBytes(NamedTuple):
    """What `Graph.estimate_bytes` gives.

    Attributes:
        stored: bytes of the graph's arrays, what `Graph.nbytes` will say where no edge is given twice.
        build: most bytes that building holds at once, those of ``stored`` among them, the edges given not.
    """

    stored: int
    build: int


@dataclass(frozen=True, eq=False)
class Graph:
    """A graph in compressed sparse csr. Make one with `from_edges`, `from_scipy`, `load` or a reader of `anabranch.graph.formats`.

    Attributes:
        indptr: int64 [N + 1], where each node's edges start.
        indices: int32 or int64 [M], their targets, rising within a row.
        weights: float32 [M], or None where all edges count the same.
        is_directed: whether an edge has a direction; without, the matrix is symmetric.
        names: what nodes are called outside, [N] of integers or text; None where they are numbers 0 ... N - 1.
        by_name: whether integers that callers give for nodes are names too. Text always is a name, and integers are ids unless this is
            so: `anabranch.graph.coerce.as_graph` says it of what comes from elsewhere, whose nodes are called 10, 20 and 30 there.
    """

    indptr: np.ndarray
    indices: np.ndarray
    weights: np.ndarray | None = None
    is_directed: bool = False
    names: np.ndarray | None = None
    by_name: bool = False
    _index: dict[Any, int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name in ("indptr", "indices", "weights", "names"):
            array = getattr(self, name)
            # A plain read-only view, also of a mapped array, so that kernels see one type.
            if array is not None:
                view = np.asarray(array).view()
                view.flags.writeable = False
                object.__setattr__(self, name, view)

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
        duplicates: str = "add",
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
            duplicates: the weight of an edge that is given several times (also (u, v) and (v, u) of an undirected graph): their sum
                ("add"), the largest ("max"), that of the "first"; "error" refuses them.
            drop_zero: leave out edges of weight 0 instead of refusing them.
            allow_negative: take negative weights, which only algebraic methods (FastRP) can use.

        Raises:
            InputError: arrays of different length or kind, an id out of range, a weight that is not finite or not positive (with
                the number of the edge), sums of duplicates that are 0 or beyond float32, names that do not fit.
        """
        check_one_of("duplicates", duplicates, DUPLICATES)
        directed, drop_zero = check_flag("directed", directed), check_flag("drop_zero", drop_zero)
        allow_negative = check_flag("allow_negative", allow_negative)
        source_E, target_E, count = checked_ends(source, target, num_nodes)
        weight_E = None if weight is None else checked_weights(weight, len(source_E), drop_zero, allow_negative)
        if weight_E is not None and drop_zero and not weight_E.all():
            kept = weight_E != 0
            source_E, target_E, weight_E = source_E[kept], target_E[kept], weight_E[kept]
        found_names = checked_names(names, count)
        chunk = (source_E, target_E, weight_E)
        indptr, indices, weights = csr.compress(
            lambda: [chunk],
            count,
            directed=directed,
            is_weighted=weight_E is not None,
            duplicates=duplicates,
            drop_zero=drop_zero,
        )
        return cls(indptr, indices, weights, directed, found_names)

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
        """The graph of a sparse adjacency matrix; entry (u, v) is the weight of u -> v, and a matrix of ones is a graph without weights.

        Args:
            matrix: a scipy sparse matrix or array, or a numpy array, square. Entries given twice are added, as scipy does.
            directed: None looks whether the matrix is symmetric; False demands it.
            names: as in `from_edges`.
            drop_zero: stored zeros are left out.
            allow_negative: as in `from_edges`.

        Raises:
            InputError: the matrix is not square, or not symmetric where ``directed`` is False; and as in `from_edges`.
        """
        from scipy.sparse import coo_array

        directed = None if directed is None else check_flag("directed", directed)
        matrix = unmasked(matrix, "an adjacency matrix")
        if not hasattr(matrix, "shape"):
            raise InputError(f"an adjacency matrix is a scipy or numpy matrix, not {type(matrix).__name__}")
        if len(matrix.shape) != 2 or matrix.shape[0] != matrix.shape[1]:
            raise InputError(f"an adjacency matrix is square, this one has the shape {tuple(matrix.shape)}")
        matrix = matrix if hasattr(matrix, "tocoo") else np.asarray(matrix)
        if matrix.dtype.kind not in "biuf":
            raise InputError(f"entries of an adjacency matrix are real numbers, not {matrix.dtype}")
        coo = matrix.tocoo() if hasattr(matrix, "tocoo") else coo_array(matrix)
        graph = cls.from_edges(
            coo.row,
            coo.col,
            coo.data,
            True,
            matrix.shape[0],
            names=names,
            drop_zero=drop_zero,
            allow_negative=allow_negative,
        )
        if graph.weights is not None and (graph.weights == 1).all():
            graph = cls(graph.indptr, graph.indices, None, True, graph.names)
        return graph if directed else graph._as_undirected(demanded=directed is False)

    @staticmethod
    def estimate_bytes(num_nodes: int, num_edges: int, weighted: bool = False, directed: bool = False) -> GraphBytes:
        """Bytes of a graph and of building it, before there is one.

            S      = num_edges if directed else 2 * num_edges        edges stored, self-loops of undirected graphs once
            id     = 4 where N and S are below 2**31, else 8
            stored = 8 (N + 1) + S (id + 4 if weighted)
            build  = stored + 8 N + (4 num_edges if weighted)        the place of each row, and the weights as float32

        The edges given (16 bytes each as two int64 arrays), names and alias tables (8 S) are not part of it.
        """
        num_nodes, num_edges = whole("num_nodes", num_nodes, 0), whole("num_edges", num_edges, 0)
        weighted, directed = check_flag("weighted", weighted), check_flag("directed", directed)
        stored = num_edges if directed else 2 * num_edges
        width = np.dtype(csr.id_type(num_nodes, stored)).itemsize + (4 if weighted else 0)
        final = 8 * (num_nodes + 1) + stored * width
        return GraphBytes(final, final + 8 * num_nodes + (4 * num_edges if weighted else 0))

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
        return csr.count_loops(self.indptr, self.indices)

    @cached_property
    def degree_N(self) -> np.ndarray:
        """int64 [N], stored edges of each node (its out-edges where directed)."""
        return np.diff(self.indptr)

    @cached_property
    def strength_N(self) -> np.ndarray:
        """float64 [N], the sum of each node's weights; its degree without weights."""
        if self.weights is None:
            return self.degree_N.astype(np.float64)
        sum_N = np.empty(self.num_nodes)
        csr.sum_rows(self.indptr, self.weights, sum_N)
        return sum_N

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
        indptr, indices = np.zeros(self.num_nodes + 1, np.int64), np.empty_like(self.indices)
        weights = None if self.weights is None else np.empty_like(self.weights)
        none = NO_WEIGHTS if weights is None else weights
        csr.transpose(self.indptr, self.indices, self._plain_weights, indptr, indices, none)
        return Graph(indptr, indices, weights, True, self.names, self.by_name)

    def neighbors(self, node: Any) -> np.ndarray:
        """Targets of the edges of a node, given by id or name, as ids. Raises InputError for a node that is not there."""
        place = self.place_of(node)
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

        dtype = as_number_type(dtype)
        weights = np.ones(len(self.indices), dtype) if self.weights is None else self.weights.astype(dtype, copy=False)
        indptr = self.indptr.astype(self.indices.dtype, copy=False)
        try:
            return csr_array((weights, self.indices, indptr), shape=(self.num_nodes, self.num_nodes))
        except ValueError:
            raise InputError(f"dtype is {dtype}, of which scipy has no sparse matrices") from None

    def check_nodes(self, nodes: ArrayLike) -> np.ndarray:
        """``nodes`` as int64 ids. Raises InputError naming the first that is not an id of this graph."""
        try:
            found = np.atleast_1d(np.asarray(unmasked(nodes, "nodes")))
        except ValueError as error:
            raise InputError(f"nodes are one, or a list of them: {error}") from None
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
        if not np.iterable(names):
            raise InputError(f"names is {shown(names)}; it must be a list of names")
        given = list(names)
        if self.names is None:
            return self.check_nodes(given)
        self._fill_index()
        try:
            return np.array([self._index[name] for name in given], np.int64)
        except (KeyError, TypeError):
            # TypeError: a name that cannot be hashed is no name either.
            unknown = next(name for name in given if not is_known(name, self._index))
        raise InputError(f"the graph has no node {shown(unknown)}{near_name(unknown, self._index)}")

    def names_of(self, nodes: ArrayLike) -> np.ndarray:
        """Outside names of nodes by id; the ids themselves where there are none."""
        found = self.check_nodes(nodes)
        return found if self.names is None else self.names[found]

    def resolve(self, nodes: Any) -> np.ndarray:
        """Ids, int64, of a node or of several, given by id or by name: text is a name, integers are ids unless `by_name`.

        Raises InputError naming the first that is neither.
        """
        nodes = unmasked(nodes, "nodes")
        if isinstance(nodes, np.ndarray) and nodes.ndim == 0:
            # One node, which cannot be gone through.
            nodes = nodes.item()
        if not self.are_names(nodes):
            return self.check_nodes(nodes)
        if self.names is None:
            first = nodes if isinstance(nodes, str) else next((node for node in nodes if isinstance(node, str)), nodes)
            raise InputError(f"the graph has no node {shown(first)}: its nodes have no names, only numbers from 0")
        # A tuple may be the name of one node, as in networkx.
        is_one = isinstance(nodes, str) or not hasattr(nodes, "__iter__") or self._has(nodes)
        return self.ids_of([nodes] if is_one else nodes.tolist() if isinstance(nodes, np.ndarray) else list(nodes))

    def place_of(self, node: Any) -> int:
        """The id of one node, given by id or name. Raises InputError as `resolve`, and for none or several."""
        found = self.resolve(node)
        if found.size != 1:
            raise InputError(f"node is {shown(node)}, which are {found.size:,} nodes; give one")
        return int(found.reshape(-1)[0])

    def numbered(self) -> "Graph":
        """The same graph whose integers are ids: itself unless `by_name`. What algorithms work on, which call nodes by number."""
        return replace(self, by_name=False) if self.by_name else self

    def are_names(self, nodes: Any) -> bool:
        """Whether nodes that a caller gave are names, and an answer about them should be."""
        return (self.by_name and self.names is not None) or has_text(nodes)

    def answer(self, ids: np.ndarray, asked: Any) -> np.ndarray:
        """Nodes of an answer, in the words of the question: names where the nodes that were ``asked`` about are, else the ids."""
        if self.names is None or not self.are_names(asked):
            return ids
        return self.names[ids]

    def _has(self, name: Any) -> bool:
        """Whether a node is called that."""
        if self.names is None:
            return False
        self._fill_index()
        return is_known(name, self._index)

    def _fill_index(self) -> None:
        if not self._index and self.names is not None:
            self._index.update((name, number) for number, name in enumerate(self.names.tolist()))

    def bare(self) -> "Graph":
        """The nodes without edges and without the memory for them: what an estimator keeps to be asked by name."""
        nothing = np.broadcast_to(np.int64(0), self.num_nodes + 1)
        return Graph(nothing, np.empty(0, self.indices.dtype), None, self.is_directed, self.names, self.by_name)

    # Other graphs of it

    def subgraph(self, nodes: ArrayLike) -> "Graph":
        """The graph of these nodes and the edges between them; node i is ``nodes[i]``, given by id or name.

        Its names are those of this graph, or this graph's ids where it has none. Raises InputError for a node that is not there or
        given twice.
        """
        kept = self.resolve(nodes)
        if kept.ndim != 1:
            raise InputError(f"nodes have the shape {kept.shape}; give one list of nodes")
        indptr, indices, weights = transform.subgraph(self, kept)
        return Graph(indptr, indices, weights, self.is_directed, self.names_of(kept), self.by_name)

    def components(self) -> np.ndarray:
        """int32 [N], the (weakly) connected component of each node; the largest is 0, equals by their smallest node."""
        return transform.components(self)

    def largest_component(self) -> "Graph":
        """`subgraph` of the largest component, nodes in rising order."""
        return self.subgraph(np.flatnonzero(self.components() == 0))

    def with_weights(self, weights: ArrayLike | None) -> "Graph":
        """The same edges with other weights.

        Args:
            weights: positive and finite, [M] in the order of ``indices`` or [E] in that of `edges`; None for none.

        Raises:
            InputError: another number of weights, a bad weight, or two directions of an undirected edge that differ.
        """
        checked = None if weights is None else transform.aligned_weights(self, weights)
        return replace(self, weights=checked, _index={})

    def to_undirected(self) -> "Graph":
        """The graph without directions: u - v where there is u -> v or v -> u; the weights of both are added. Itself if it is one."""
        if not self.is_directed:
            return self
        source_M, target_M, weight_M = self.edges()
        found = Graph.from_edges(source_M, target_M, weight_M, False, self.num_nodes, names=self.names)
        return replace(found, by_name=self.by_name)

    def to_directed(self) -> "Graph":
        """The graph with every undirected edge as two directed ones; arrays are shared."""
        return Graph(self.indptr, self.indices, self.weights, True, self.names, self.by_name)

    def _as_undirected(self, demanded: bool) -> Self:
        """This directed graph as an undirected one if it is symmetric; else itself, or an InputError if it had to be."""
        differ = csr.count_asymmetric(self.indptr, self.indices, self._plain_weights)
        if differ and demanded:
            raise InputError(f"the matrix is not symmetric ({differ:,} entries differ); pass directed=True")
        return self if differ else type(self)(self.indptr, self.indices, self.weights, False, self.names, self.by_name)

    def describe(self) -> dict[str, Any]:
        """Facts for people, all plain numbers: sizes, degrees, weights, what is isolated, dangling or apart. See `transform.describe`."""
        return transform.describe(self)

    def difference(self, other: "Graph") -> str | None:
        """The first thing in which two graphs differ, in words; None if they are equal to the byte."""
        return transform.difference(self, other)

    def equals(self, other: "Graph") -> bool:
        """Whether two graphs are equal to the byte, names included."""
        return transform.difference(self, other) is None

    # On disk

    def save(self, path: str | Path) -> None:
        """Write the graph into one checked file (`anabranch.graph.array_file`), all or nothing.

        Raises InputError for names that are neither integers nor all text, and as `anabranch.graph.beside.new_file`.
        """
        graph_file.write(path, self.indptr, self.indices, self.weights, self.names, self.is_directed)

    @classmethod
    def load(cls, path: str | Path, *, mmap: bool = False, verify: bool | None = None) -> Self:
        """Read what `save` wrote.

        Args:
            path: the file.
            mmap: leave arrays on disk until they are used.
            verify: check the sums of all arrays. Default: unless it is mapped. Rows are always read once and checked, since what works on
                a graph follows them without looking.

        Raises:
            DataError: the file is missing, foreign, truncated or damaged.
        """
        return cls(*graph_file.read(path, mmap=mmap, verify=verify))

    def __repr__(self) -> str:
        kind = "directed" if self.is_directed else "undirected"
        weighted = "weighted" if self.weights is not None else "unweighted"
        return f"Graph({self.num_nodes:,} nodes, {self.num_edges:,} edges, {kind}, {weighted})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled without what can be made again (alias tables, the reversed graph)."""
        return type(self), (self.indptr, self.indices, self.weights, self.is_directed, self.names, self.by_name)

    @property
    def _plain_weights(self) -> np.ndarray:
        """Weights for kernels, which know none by an empty array."""
        return NO_WEIGHTS if self.weights is None else self.weights

    def _sources(self) -> np.ndarray:
        """The source of every stored edge, [M]."""
        return np.repeat(np.arange(self.num_nodes, dtype=self.indices.dtype), self.degree_N)
