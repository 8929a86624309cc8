"""Graphs whose edges are of several kinds: one set of nodes, a graph of each relation, and what each relation counts.

    typed = TypedGraph.from_edges({"cites": (papers, cited), "wrote": (authors, papers)}, weights={"cites": 2})
    PageRank().personalized(typed, "ann")                      # every estimator takes it, as `as_graph` does
    FastRP().fit_transform(typed.with_weights(wrote=0.5))

With A_r the matrix of relation r, D_r its sums of rows and w_r its weight, what algorithms work on is

    edges        A = sum_r w_r A_r                   a relation counts by its edges, times its weight
    relations    A = sum_r w_r D_r^-1 A_r            a walk first draws one of the relations that leave its node, by weight alone,
                                                     and then one of its edges; directed

so that steps of PageRank and of walks, and the matrix of FastRP, follow typed edges without knowing of types.
"""
# Shapes: N nodes, M stored edges of a relation

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Self, get_args

import numpy as np

from anabranch.bounds import near_name
from anabranch.errors import InputError
from anabranch.graph.masks import unmasked
from anabranch.graph.store import Graph

Share = Literal["edges", "relations"]


@dataclass(frozen=True, eq=False)
class TypedGraph:
    """Graphs of the same nodes, one for each relation.

    Attributes:
        relations: the graph of each relation by its name; all have the same nodes, called the same.
        weights: what relations count, at least 0; 1 where there is none. A relation of weight 0 is left out.
        share: ``edges`` or ``relations``, see the module.

    Raises:
        InputError: no relation, relations of different nodes, a weight that is negative, not finite, or of no relation.
    """

    relations: Mapping[str, Graph]
    weights: Mapping[str, float] = field(default_factory=dict)
    share: Share = "edges"

    def __post_init__(self) -> None:
        if not self.relations:
            raise InputError("a typed graph needs at least one relation")
        if self.share not in get_args(Share):
            raise InputError(f"share is {self.share!r}; it must be one of {', '.join(get_args(Share))}")
        (first, one), *others = self.relations.items()
        for name, graph in others:
            if graph.num_nodes != one.num_nodes or not _same(graph.names, one.names):
                raise InputError(f"relations {first!r} and {name!r} do not have the same nodes")
        for name, graph in self.relations.items():
            if graph.weights is not None and len(graph.weights) and graph.weights.min() < 0:
                raise InputError(f"relation {name!r} has negative edge weights")
        for name, weight in self.weights.items():
            if name not in self.relations:
                known = ", ".join(map(str, self.relations))
                raise InputError(f"there is no relation {name!r}{near_name(name, self.relations)}; there are {known}")
            if isinstance(weight, bool) or not isinstance(weight, int | float | np.number) or not 0 <= weight < np.inf:
                raise InputError(f"relation {name!r} has the weight {weight!r}; it must be a number of at least 0")
        if not any(self.weights.get(name, 1.0) for name in self.relations):
            raise InputError("all relations have the weight 0; at least one must be positive")

    @classmethod
    def from_edges(
        cls,
        edges: Mapping[str, Sequence[Any]],
        *,
        weights: Mapping[str, float] | None = None,
        share: Share = "edges",
        directed: bool | Iterable[str] = False,
        names: Sequence[Any] | None = None,
    ) -> Self:
        """Of lists of edges, whose ends are what nodes are called.

        Args:
            edges: by relation, (source, target) or (source, target, weight).
            weights: what relations count.
            share: see the module.
            directed: whether edges have a direction; or the relations whose edges do.
            names: nodes in the order wanted, those without edges too. Default: those of the edges, in rising order, numbers before text (of
                other kinds, in the order they come).

        Raises:
            InputError: as the class; lists that do not fit, ends that ``names`` does not have; and as `Graph.from_edges`.
        """
        parts = {name: _lists(name, given) for name, given in edges.items()}
        found = dict.fromkeys(end for part in parts.values() for ends in part[:2] for end in ends)
        called = list(names) if names is not None else _in_order(found)
        place = {name: number for number, name in enumerate(called)}
        strange = next((end for end in found if end not in place), None)
        if strange is not None:
            raise InputError(f"an edge ends at {strange!r}, which is not among the names")
        is_plain = called == list(range(len(called)))
        turned = set(parts) if directed is True else set() if directed is False else set(directed)
        relations = {
            name: replace(
                Graph.from_edges(
                    np.array([place[end] for end in source], np.int64),
                    np.array([place[end] for end in target], np.int64),
                    weight,
                    name in turned,
                    len(called),
                    names=None if is_plain else called,
                ),
                by_name=not is_plain,
            )
            for name, (source, target, weight) in parts.items()
        }
        return cls(relations, dict(weights or {}), share)

    @classmethod
    def from_table(cls, table: Any, relation: str = "relation", **options: Any) -> Self:
        """Of a table of edges (`pyarrow.Table` or what makes one) with a column that names the relation.

        Args:
            table: columns source, target and perhaps weight, as `anabranch.graph.formats.from_table` finds them, beside ``relation``.
            relation: that column.
            options: of `from_edges`. ``directed`` is by default what Gephi's column Type says, else False.

        Raises:
            InputError: no such column, or as `from_edges`. DataError: as `from_table`.
        """
        import pyarrow as pa

        from anabranch.graph.formats.layout import Dialect
        from anabranch.graph.formats.parquet import choose_columns
        from anabranch.graph.table_look import EdgeTable, look_at_edges

        table = table if isinstance(table, pa.Table) else pa.table(table)
        if relation not in table.column_names:
            raise InputError(f"there is no column {relation!r}; there are {', '.join(table.column_names)}")
        given = options.pop("directed", None)
        looked = EdgeTable.of("the table", table)
        said = look_at_edges(looked, directed=None if given is None else bool(given), relation=relation)
        kinds = table.column(relation).to_pylist()
        rest = table.drop_columns([relation])
        columns = [rest.column(column).to_pylist() for column in choose_columns("the table", rest.schema, Dialect())]
        edges: dict[str, list[list[Any]]] = {}
        for kind, *edge in zip(kinds, *columns, strict=True):
            if kind is None or any(value is None for value in edge):
                raise InputError("an edge of the table has an empty cell")
            part = edges.setdefault(str(kind), [[] for _ in edge])
            for values, value in zip(part, edge, strict=True):
                values.append(value)
        return cls.from_edges(edges, directed=bool(said) if given is None else given, **options)

    @classmethod
    def from_pyg(cls, data: Any, **options: Any) -> Self:
        """Of a PyTorch Geometric ``HeteroData``: relations are its edge types, nodes are called (type, number).

        Args:
            data: anything with ``edge_index_dict``, from (type, relation, type) to [2, E]; an ``edge_weight_dict`` counts, and
                ``num_nodes_dict`` tells of nodes without edges. A relation is called "type relation type".
            options: of `from_edges`. Edges have their direction by default, as there.
        """
        indexes, numbers = data.edge_index_dict, dict(getattr(data, "num_nodes_dict", None) or {})
        values = dict(getattr(data, "edge_weight_dict", None) or {})
        edges = {}
        for key, index in indexes.items():
            ends = np.asarray(unmasked(index, f"edges of {key}"))
            for kind, row in zip((key[0], key[2]), ends, strict=True):
                numbers[kind] = max(numbers.get(kind) or 0, int(row.max(initial=-1)) + 1)
            source, target = (
                [(kind, n) for n in row.tolist()] for kind, row in zip((key[0], key[2]), ends, strict=True)
            )
            weight = () if key not in values else (np.asarray(unmasked(values[key], f"weights of {key}")).reshape(-1),)
            edges[" ".join(map(str, key))] = (source, target, *weight)
        names = [(kind, number) for kind, count in numbers.items() for number in range(count)]
        return cls.from_edges(edges, **{"directed": True, "names": names, **options})

    def with_weights(self, weights: Mapping[str, float] | None = None, **more: float) -> Self:
        """The same edges with other weights of some relations. Raises InputError as the class."""
        return replace(self, weights={**self.weights, **(weights or {}), **more})

    @cached_property
    def graph(self) -> Graph:
        """The one graph that algorithms work on. Made once."""
        counted = {name: graph for name, graph in self.relations.items() if self.weights.get(name, 1.0)}
        some = next(iter(self.relations.values()))
        source, target, value = [], [], []
        for name, graph in counted.items():
            source_M = graph._sources()
            value_M = np.ones(len(graph.indices)) if graph.weights is None else graph.weights.astype(np.float64)
            if self.share == "relations":
                value_M = value_M / graph.strength_N[source_M]
            source.append(source_M)
            target.append(graph.indices)
            value.append(value_M * float(self.weights.get(name, 1.0)))
        is_directed = self.share == "relations" or any(graph.is_directed for graph in counted.values())
        made = Graph.from_edges(
            np.concatenate(source),
            np.concatenate(target),
            np.concatenate(value),
            True,
            some.num_nodes,
            names=some.names,
        )
        if made.weights is not None and (made.weights == 1).all():
            made = made.with_weights(None)
        return replace(made, is_directed=is_directed, by_name=some.by_name)

    def __repr__(self) -> str:
        parts = ", ".join(
            f"{name} x {self.weights.get(name, 1.0):g}: {graph.num_edges:,}" for name, graph in self.relations.items()
        )
        count = next(iter(self.relations.values())).num_nodes
        return f"TypedGraph({count:,} nodes; edges of {parts}; by {self.share})"


def _same(first: np.ndarray | None, second: np.ndarray | None) -> bool:
    if first is None or second is None:
        return first is second
    return bool(np.array_equal(first, second))


def _in_order(ends: Iterable[Any]) -> list[Any]:
    try:
        return sorted(ends, key=lambda end: (isinstance(end, str), end))
    except TypeError:
        return list(ends)


def _lists(name: str, given: Sequence[Any]) -> tuple[list[Any], list[Any], Any]:
    if not isinstance(given, tuple | list) or len(given) not in (2, 3):
        raise InputError(f"relation {name!r} needs (source, target) or (source, target, weight)")
    source, target = (part.tolist() if isinstance(part, np.ndarray) else list(part) for part in given[:2])
    if len(source) != len(target):
        raise InputError(f"relation {name!r} has {len(source):,} sources and {len(target):,} targets")
    return source, target, given[2] if len(given) == 3 else None
