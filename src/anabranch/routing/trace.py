"""`RoutingTrace`: the record of routing decisions, an Arrow table kept in Parquet.

One row says that one item went to one destination. MoE layers, depth routers, a gateway and a network simulator write this
one schema; measures, cache simulators, predictors and reports read it. The schema metadata say what the layers are.

A *decision* is the rows of one item at one layer: they stand together, in order of rank, so a trace gives back the `Routing`
it came from. Unused choices (capacity, threshold) are not stored; an item with no used choice at all keeps one row of rank 0
and destination -1, so that what was dropped can be counted. Padding items leave no rows. A trace may have columns of scores and of
propensities, and of predicted tokens (`anabranch.routing.trace_schema.OPTIONAL`); one without them is as it always was.

    with record_routing(model) as recorder:        # anabranch.routing.record
        model(token_BL)
    recorder.trace().write("trace.parquet")
    RoutingTrace.read("trace.parquet").load_LE()
"""
# Shapes: R rows, N decisions of a layer, K choices per item, E destinations, L layers

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from anabranch.errors import DataError, first_line
from anabranch.files import atomic_write
from anabranch.routing.decision import UNUSED, Routing
from anabranch.routing.trace_schema import (
    METADATA_KEY,
    PARQUET_OPTIONS,
    ROWS_PER_GROUP,
    SCHEMA,
    UNKNOWN,
    TraceLayer,
    check_schema,
    check_values,
    layers_from_json,
    layers_to_json,
    merge_layers,
    schema_with,
)


@dataclass(frozen=True)
class Decisions:
    """The decisions of one layer in the order they were made, as numpy arrays.

    Attributes:
        index_NK: int32, destinations; -1 where a choice is unused.
        weight_NK: float32, 0 where a choice is unused.
        item_N: int64.
        position_N: int32.
        token_N: int32; -1 where unknown.
        domain_N: int32, number of the domain in `RoutingTrace.domains`; -1 where unknown.
        score_NE: float32, scores of all destinations before any selection bias, NaN where unknown; None if the trace has no scores.
        propensity_NK: float32, probability with which a destination was drawn, NaN where it was not; None if the trace has none.
        predicted_N: int32, the token that the model predicts next; -1 where unknown; None if the trace has none.
    """

    index_NK: np.ndarray
    weight_NK: np.ndarray
    item_N: np.ndarray
    position_N: np.ndarray
    token_N: np.ndarray
    domain_N: np.ndarray
    score_NE: np.ndarray | None = None
    propensity_NK: np.ndarray | None = None
    predicted_N: np.ndarray | None = None


class RoutingTrace:
    """An immutable record of routing decisions: ``table`` in the fixed schema, and what its layers are.

    Raises DataError if ``table`` is not in the schema, or names a layer, rank or destination that ``layers`` does not have.
    """

    def __init__(self, table: pa.Table, layers: Iterable[TraceLayer]) -> None:
        self.layers = tuple(sorted(layers, key=lambda layer: layer.layer))
        check_schema(table.schema)
        self.table = table.replace_schema_metadata({METADATA_KEY: layers_to_json(self.layers)}).unify_dictionaries()
        self._by_number = {layer.layer: layer for layer in self.layers}
        self._columns: dict[str, np.ndarray] = {}
        self._order_R: np.ndarray | None = None
        check_values(self.table, self._by_number)

    def __len__(self) -> int:
        return self.table.num_rows

    def __repr__(self) -> str:
        return f"RoutingTrace({len(self):,} rows, {len(self.layers)} layers, domains {self.domains})"

    # files

    def write(self, path: str | Path) -> None:
        """Write as Parquet, all or nothing. Raises CapacityError or DataError as `anabranch.files.atomic_write`."""
        options = PARQUET_OPTIONS | {"row_group_size": ROWS_PER_GROUP}
        atomic_write(path, lambda temporary: pq.write_table(self.table, temporary, **options))

    @classmethod
    def read(cls, path: str | Path, layers: Iterable[int] | None = None) -> Self:
        """Read a trace; with ``layers``, only the rows of these, which takes less memory.

        Raises DataError if there is no such file, or it is not a trace of this schema and version, or lacks a layer asked for.
        """
        path = Path(path)
        if not path.is_file():
            raise DataError(f"no routing trace at {path}")
        try:
            with pq.ParquetFile(path) as file:
                known = layers_from_json((file.metadata.metadata or {}).get(METADATA_KEY), path)
                check_schema(file.schema_arrow, path)
            wanted = None if layers is None else _pick(known, layers, path)
            filters = None if wanted is None else [("layer", "in", [layer.layer for layer in wanted])]
            return cls(pq.read_table(path, filters=filters), known if wanted is None else wanted)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read as a Parquet file: {first_line(error)}") from error

    # layers

    def layer(self, number: int) -> TraceLayer:
        """The layer with this number. Raises DataError if there is none."""
        if number not in self._by_number:
            raise DataError(f"the trace has no layer {number}; it has {', '.join(map(str, self._by_number))}")
        return self._by_number[number]

    @property
    def pools(self) -> dict[str, list[TraceLayer]]:
        """The layers of each pool, by the pool's name."""
        pools: dict[str, list[TraceLayer]] = {}
        for layer in self.layers:
            pools.setdefault(layer.pool, []).append(layer)
        return pools

    def own_slots(self, number: int) -> range:
        """The pool slots that a layer owns: from its ``own_start`` to that of the pool's next layer, or to the end."""
        layer = self.layer(number)
        later = [other.own_start for other in self.pools[layer.pool] if other.own_start > layer.own_start]
        return range(layer.own_start, min(later, default=layer.pool_size))

    @property
    def domains(self) -> list[str]:
        """Names of the domains, sorted."""
        return sorted(self._dictionary())

    # rows

    def column(self, name: str, layer: int) -> np.ndarray:
        """One column of one layer's rows, in recorded order. Unknown tokens and domains are -1; domains are numbers.

        A propensity that there is none of is NaN. Raises DataError for a column that the trace does not have; scores are in `decisions`.
        """
        self.layer(layer)
        if name == "scores" or name not in self.table.column_names:
            raise DataError(
                f"the trace has no column {name!r} of one value per row; it has {', '.join(self.table.column_names)}"
            )
        return self._column(name)[self._rows(layer)]

    def decisions(self, layer: int) -> Decisions:
        """The decisions of a layer; memory is N K choices."""
        item_R, position_R, rank_R = (self.column(name, layer) for name in ("item", "position", "rank"))
        first_R = np.ones(len(item_R), bool)
        # A new decision begins where the item changes, or where the ranks start again (an item that comes twice in a row).
        first_R[1:] = (np.diff(item_R) != 0) | (np.diff(position_R) != 0) | (np.diff(rank_R) <= 0)
        row_R = np.cumsum(first_R) - 1
        shape = (int(first_R.sum()), self.layer(layer).top_k)
        index_NK = np.full(shape, UNUSED, np.int32)
        index_NK[row_R, rank_R] = self.column("destination", layer)
        weight_NK = np.zeros(shape, np.float32)
        weight_NK[row_R, rank_R] = self.column("weight", layer)
        token_N, domain_N = (self.column(name, layer)[first_R] for name in ("token", "domain"))
        propensity_NK = None
        if "propensity" in self.table.column_names:
            propensity_NK = np.full(shape, np.nan, np.float32)
            propensity_NK[row_R, rank_R] = self.column("propensity", layer)
        predicted_N = self.column("predicted", layer)[first_R] if "predicted" in self.table.column_names else None
        return Decisions(
            index_NK,
            weight_NK,
            item_R[first_R],
            position_R[first_R],
            token_N,
            domain_N,
            self._scores(layer, self._rows(layer)[first_R]),
            propensity_NK,
            predicted_N,
        )

    def _scores(self, layer: int, rows: np.ndarray) -> np.ndarray | None:
        """score_NE of the decisions that begin at these rows of the table."""
        if "scores" not in self.table.column_names:
            return None
        scores = self.table["scores"].take(pa.array(rows))
        known_N = scores.is_valid().to_numpy()
        score_NE = np.full((len(rows), self.layer(layer).num_destinations), np.nan, np.float32)
        score_NE[known_N] = pc.list_flatten(scores).to_numpy().reshape(-1, score_NE.shape[1])
        return score_NE

    def __iter__(self) -> Iterator[tuple[TraceLayer, Decisions]]:
        """Each layer with its decisions, one layer in memory at a time."""
        for layer in self.layers:
            yield layer, self.decisions(layer.layer)

    def routing(self, layer: int) -> Routing:
        """The `Routing` of a layer: index and weight exactly as recorded.

        Where no scores are recorded ``score_NE`` holds the weights of the chosen destinations and 0 elsewhere. It takes N E floats.
        """
        decisions = self.decisions(layer)
        index_NK = torch.from_numpy(decisions.index_NK.astype(np.int64))
        weight_NK = torch.from_numpy(decisions.weight_NK)
        score_NE = torch.zeros(index_NK.shape[0], self.layer(layer).num_destinations)
        # Unused choices add their weight, which is 0.
        score_NE.scatter_add_(1, index_NK.clamp_min(0), weight_NK)
        if decisions.score_NE is not None:
            known_NE = torch.from_numpy(decisions.score_NE)
            score_NE = torch.where(known_NE.isnan(), score_NE, known_NE)
        propensity_NK = None if decisions.propensity_NK is None else torch.from_numpy(decisions.propensity_NK)
        return Routing(index_NK, weight_NK, score_NE, propensity_NK)

    def load_E(self, layer: int, domain: str | None = None) -> np.ndarray:
        """int64 [E]: how many decisions name each destination, of one domain or of all."""
        destination_R = self.column("destination", layer)
        if domain is not None:
            destination_R = destination_R[self.column("domain", layer) == self._domain_code(domain)]
        return np.bincount(destination_R[destination_R >= 0], minlength=self.layer(layer).num_destinations)

    def load_LE(self, domain: str | None = None) -> np.ndarray:
        """int64 [L, E]: `load_E` of every layer, in order; layers with fewer destinations are padded with 0."""
        load_LE = np.zeros((len(self.layers), max((x.num_destinations for x in self.layers), default=0)), np.int64)
        for row_E, layer in zip(load_LE, self.layers, strict=True):
            row_E[: layer.num_destinations] = self.load_E(layer.layer, domain)
        return load_LE

    def _domain_code(self, domain: str) -> int:
        if domain not in self.domains:
            raise DataError(f"the trace has no domain {domain!r}; it has {', '.join(self.domains) or 'none'}")
        return self.domains.index(domain)

    def _dictionary(self) -> list[str]:
        column = self.table["domain"]
        return column.chunk(0).dictionary.to_pylist() if column.num_chunks else []

    def _column(self, name: str) -> np.ndarray:
        if name not in self._columns:
            column = self.table[name].combine_chunks()
            if name == "domain":
                number = {domain: number for number, domain in enumerate(self.domains)}
                # One entry more, last, for the code -1.
                code = np.array([*(number[domain] for domain in self._dictionary()), UNKNOWN], np.int32)
                self._columns[name] = code[_no_nulls(column.indices)]
            else:
                self._columns[name] = _no_nulls(column)
        return self._columns[name]

    def _rows(self, layer: int) -> np.ndarray:
        if self._order_R is None:
            layer_R = self._column("layer")
            self._order_R = np.argsort(layer_R, kind="stable")
            self._columns["sorted layer"] = layer_R[self._order_R]
        start, stop = np.searchsorted(self._columns["sorted layer"], [layer, layer + 1])
        return self._order_R[start:stop]


def concat(traces: Iterable[RoutingTrace], *, renumber: bool = False) -> RoutingTrace:
    """One trace of several, in order.

    Args:
        traces: at least one; a layer that several have must be the same in all (``top_k`` may differ, the largest counts).
        renumber: shift the item ids of each trace past those of the one before, for recordings that each count from 0.

    Raises DataError if two traces disagree about a layer.
    """
    tables: list[pa.Table] = []
    layers: dict[int, TraceLayer] = {}
    next_item = 0
    for trace in traces:
        for layer in trace.layers:
            layers[layer.layer] = merge_layers(layers.get(layer.layer), layer)
        table = trace.table.replace_schema_metadata(None)
        if renumber and table.num_rows:
            item_R = table["item"].to_numpy() - table["item"].to_numpy().min() + next_item
            table = table.set_column(0, SCHEMA.field("item"), pa.array(item_R))
            next_item = int(item_R.max()) + 1
        tables.append(table)
    names = {name for table in tables for name in table.column_names}
    joined = pa.concat_tables(tables or [SCHEMA.empty_table()], promote_options="default")
    return RoutingTrace(joined.select(schema_with(names).names), layers.values())


def _pick(known: Iterable[TraceLayer], wanted: Iterable[int], path: Path) -> tuple[TraceLayer, ...]:
    by_number = {layer.layer: layer for layer in known}
    wanted = list(wanted)
    for number in wanted:
        if number not in by_number:
            raise DataError(f"{path} has no layer {number}; it has {', '.join(map(str, by_number))}")
    return tuple(by_number[number] for number in wanted)


def _no_nulls(column: pa.Array) -> np.ndarray:
    unknown = np.nan if pa.types.is_floating(column.type) else UNKNOWN
    return (column.fill_null(unknown) if column.null_count else column).to_numpy(zero_copy_only=False)
