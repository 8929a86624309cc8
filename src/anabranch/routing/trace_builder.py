"""How a `RoutingTrace` is made of decisions as they come: `TraceBuilder` keeps them in memory, `TraceWriter` streams them to a file."""
# Shapes: N items, K choices per item, R rows

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from anabranch.errors import CapacityError, DataError
from anabranch.files import atomic_file
from anabranch.routing.trace import RoutingTrace
from anabranch.routing.trace_schema import (
    METADATA_KEY,
    OF_SCORES,
    PARQUET_OPTIONS,
    ROWS_PER_GROUP,
    SCHEMA,
    UNKNOWN,
    TraceLayer,
    layers_to_json,
    merge_layers,
    schema_with,
)

# Offsets of Arrow's lists are int32.
MOST_SCORES = 2**31


class TraceBuilder:
    """Collects decisions in memory, as whatever routes makes them.

    Args:
        scores: keep scores and propensities too, in columns of their own. Scores are E floats for each decision.
    """

    def __init__(self, *, scores: bool = False) -> None:
        self.layers: dict[int, TraceLayer] = {}
        self.num_rows = 0
        self.schema = schema_with(OF_SCORES if scores else ())
        self._scores = _Scores() if scores else None
        self._parts: list[tuple[np.ndarray, ...]] = []
        self._domains: dict[str, int] = {}

    def add(
        self,
        layer: TraceLayer,
        index_NK: Any,
        weight_NK: Any,
        *,
        item_N: Any,
        position_N: Any = 0,
        token_N: Any = UNKNOWN,
        domain: str | Sequence[str | None] | None = None,
        score_NE: Any = None,
        propensity_NK: Any = None,
    ) -> None:
        """Add N decisions of one layer. ``position_N``, ``token_N`` and ``domain`` may be one value for all.

        ``score_NE`` and ``propensity_NK`` (NaN where nothing was drawn) may be None for unknown, and are left out unless the builder keeps
        ``scores``.

        Raises DataError if ``layer`` was added before as something else, or the scores are not of E destinations.
        """
        self.layers[layer.layer] = merge_layers(self.layers.get(layer.layer), layer)
        index_NK = np.asarray(index_NK)
        used_NK = index_NK >= 0
        # An item with no used choice keeps its first one.
        used_NK[:, :1] |= ~used_NK.any(1, keepdims=True)
        row_R, rank_R = np.nonzero(used_NK)
        domains = [domain] if domain is None or isinstance(domain, str) else domain
        code_N = [UNKNOWN if name is None else self._domains.setdefault(name, len(self._domains)) for name in domains]
        every = (len(index_NK),)
        columns = (
            np.broadcast_to(item_N, every)[row_R],
            np.broadcast_to(position_N, every)[row_R],
            np.full(len(row_R), layer.layer),
            rank_R,
            index_NK[row_R, rank_R],
            np.asarray(weight_NK)[row_R, rank_R],
            np.broadcast_to(token_N, every)[row_R],
        )
        types = [field.type.to_pandas_dtype() for field in SCHEMA if field.name != "domain"]
        part = [column.astype(dtype, copy=False) for column, dtype in zip(columns, types, strict=True)]
        self._parts.append((*part, np.broadcast_to(np.array(code_N, np.int32), every)[row_R]))
        if self._scores is not None:
            self._scores.add(layer, row_R, rank_R, score_NE, propensity_NK)
        self.num_rows += len(row_R)

    @property
    def num_scores(self) -> int:
        """Scores that were added so far."""
        return 0 if self._scores is None else self._scores.count

    def trace(self) -> RoutingTrace:
        """What was added so far. Raises CapacityError for more scores than a table holds (2^31), which a file may hold."""
        return RoutingTrace(self._table(), self.layers.values())

    def take(self) -> pa.Table:
        """What was added so far, as a table, which is then forgotten."""
        table = self._table()
        self._parts, self.num_rows = [], 0
        if self._scores is not None:
            self._scores = _Scores()
        return table

    def _table(self) -> pa.Table:
        if not self._parts:
            return self.schema.empty_table()
        *columns, token, code = (np.concatenate(parts) for parts in zip(*self._parts, strict=True))
        domain = pa.DictionaryArray.from_arrays(
            pa.array(code, mask=code == UNKNOWN), pa.array(list(self._domains), pa.string())
        )
        optional = [] if self._scores is None else self._scores.columns()
        return pa.Table.from_arrays(
            [*map(pa.array, columns), pa.array(token, mask=token == UNKNOWN), domain, *optional], schema=self.schema
        )


class _Scores:
    """The optional columns of a builder's rows, as they come."""

    def __init__(self) -> None:
        self.count = 0
        self._score: list[np.ndarray] = []
        # Scores of each row, 0 where it has none.
        self._length: list[np.ndarray] = []
        self._propensity: list[np.ndarray] = []

    def add(self, layer: TraceLayer, row_R: np.ndarray, rank_R: np.ndarray, score_NE: Any, propensity_NK: Any) -> None:
        """Of rows that are choice ``rank_R`` of items ``row_R``."""
        length_R = np.zeros(len(row_R), np.int64)
        if score_NE is not None:
            score_NE = np.asarray(score_NE, np.float32)
            if score_NE.shape[1:] != (layer.num_destinations,):
                raise DataError(
                    f"scores of layer {layer.layer} have shape {list(score_NE.shape)}; it has {layer.num_destinations} destinations"
                )
            first_R = np.diff(row_R, prepend=-1) != 0
            length_R[first_R] = layer.num_destinations
            self._score.append(score_NE[row_R[first_R]].reshape(-1))
            self.count += self._score[-1].size
        self._length.append(length_R)
        drawn_R = np.full(len(row_R), np.nan, np.float32)
        if propensity_NK is not None:
            drawn_R = np.asarray(propensity_NK, np.float32)[row_R, rank_R]
        self._propensity.append(drawn_R)

    def columns(self) -> list[pa.Array]:
        """In the order of `OF_SCORES`."""
        if self.count >= MOST_SCORES:
            raise CapacityError(
                f"there are {self.count:,} scores, and a table in memory holds {MOST_SCORES:,}; record to a file (path=...)"
            )
        length_R, drawn_R = np.concatenate(self._length), np.concatenate(self._propensity)
        score = np.concatenate(self._score) if self._score else np.zeros(0, np.float32)
        end_R = np.concatenate([[0], np.cumsum(length_R)]).astype(np.int32)
        scores = pa.ListArray.from_arrays(pa.array(end_R), pa.array(score), mask=pa.array(length_R == 0))
        return [scores, pa.array(drawn_R, mask=np.isnan(drawn_R))]


class TraceWriter:
    """Streams decisions to a file in row groups, so that a long recording needs little memory.

    A context manager; the file appears when it is left without an error, and not at all otherwise.

        with TraceWriter("trace.parquet") as writer:
            writer.add(layer, index_NK, weight_NK, item_N=item_N)
    """

    def __init__(self, path: str | Path, *, rows_per_group: int = ROWS_PER_GROUP, scores: bool = False) -> None:
        self.path = Path(path)
        self._rows_per_group = rows_per_group
        self._builder = TraceBuilder(scores=scores)

    def __enter__(self) -> Self:
        self._place = atomic_file(self.path)
        self._file = pq.ParquetWriter(self._place.__enter__(), self._builder.schema, **PARQUET_OPTIONS)
        return self

    def add(self, layer: TraceLayer, index_NK: Any, weight_NK: Any, **columns: Any) -> None:
        """Add N decisions of one layer, see `TraceBuilder.add`."""
        self._builder.add(layer, index_NK, weight_NK, **columns)
        # A row without scores takes as much memory as eight scores.
        if self._builder.num_rows + self._builder.num_scores // 8 >= self._rows_per_group:
            self._file.write_table(self._builder.take())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        if error is not None:
            self._file.close()
            # Not the caller's error: an OSError of the caller would be taken for a failure to write here.
            with suppress(_Abandoned):
                self._place.__exit__(_Abandoned, _Abandoned(), None)
            return
        layers = tuple(sorted(self._builder.layers.values(), key=lambda layer: layer.layer))
        self._file.write_table(self._builder.take())
        self._file.add_key_value_metadata({METADATA_KEY: layers_to_json(layers)})
        self._file.close()
        self._place.__exit__(None, None, None)


class _Abandoned(Exception):  # noqa: N818
    """Tells `atomic_file` to drop the file."""
