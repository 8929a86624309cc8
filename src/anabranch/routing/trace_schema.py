"""The schema of routing traces: the columns of a row, what the metadata say of a layer, and the checks of both."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from anabranch.bounds import shown
from anabranch.errors import DataError
from anabranch.files import parse_json
from anabranch.routing.decision import UNUSED

VERSION = 1
METADATA_KEY = b"anabranch.trace"
SCHEMA = pa.schema(
    [
        pa.field("item", pa.int64(), nullable=False),  # id of the sequence, request, query, ...
        pa.field("position", pa.int32(), nullable=False),  # place of the token in it; 0 where there is no order
        pa.field("layer", pa.int16(), nullable=False),  # key of a `TraceLayer` in the metadata
        pa.field("rank", pa.int16(), nullable=False),  # which of the K choices
        pa.field("destination", pa.int32(), nullable=False),  # slot in the layer's pool, -1 if nothing was chosen
        pa.field("weight", pa.float32(), nullable=False),  # weight of the destination's output
        pa.field("token", pa.int32()),  # id of the token routed
        pa.field("domain", pa.dictionary(pa.int32(), pa.string())),  # where the item comes from ("code", "books", ...)
    ]
)
# Columns that a trace may have behind those, in this order.
OPTIONAL = (
    # On the first row of a decision: the scores of all E destinations, before any selection bias; null on its other rows.
    pa.field("scores", pa.list_(pa.float32())),
    # Probability with which the destination was drawn; null where the choice was no draw: with the same scores it would come again.
    pa.field("propensity", pa.float32()),
    # Id of the token that the model predicts after the one routed; null where it is not known.
    pa.field("predicted", pa.int32()),
)
OF_SCORES = ("scores", "propensity")
ROWS_PER_GROUP = 1_000_000  # 32 MB in memory
# Destinations of a layer at most: measures count each of them.
_MOST_OF_LAYER = 2**24
# Code of a token or domain that is not known.
UNKNOWN = -1
PARQUET_OPTIONS: dict[str, Any] = {
    "compression": "zstd",
    "use_dictionary": [field.name for field in SCHEMA if field.name != "weight"],
    # Floats pack better byte by byte.
    "use_byte_stream_split": ["weight"],
}


@dataclass(frozen=True, kw_only=True)
class TraceLayer:
    """What one layer of a trace chooses from.

    Attributes:
        layer: the number that rows carry.
        name: for people, e.g. the router's path in the model.
        num_destinations: E, what the layer can choose from.
        top_k: K, the most choices of a decision.
        pool: name of the pool that ``destination`` counts in. Layers with one pool share its destinations (ReXMoE); empty
            means a pool of its own.
        own_start: first pool slot owned by this layer.
        pool_size: slots in the pool; 0 means ``num_destinations``.
        weight_dtype: ``float32``, or ``float64`` where weights and scores were rounded to be kept.
        visits: the most decisions of one item and position in one forward pass: more than 1 where a pass ran the layer again.
    """

    layer: int
    name: str
    num_destinations: int
    top_k: int
    pool: str = ""
    own_start: int = 0
    pool_size: int = 0
    weight_dtype: str = "float32"
    visits: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "pool", self.pool or self.name)
        object.__setattr__(self, "pool_size", self.pool_size or self.num_destinations)


def schema_with(names: Iterable[str] = ()) -> pa.Schema:
    """The schema with the optional columns of these names."""
    return pa.schema([*SCHEMA, *(field for field in OPTIONAL if field.name in set(names))])


def check_schema(schema: pa.Schema, path: Path | None = None) -> None:
    """Raise DataError, with ``path`` in front where given, unless ``schema`` is that of a trace."""
    where = f"{path}: " if path else ""
    for field in schema_with(schema.names):
        if field.name not in schema.names:
            raise DataError(
                f"{where}a routing trace needs a column {field.name!r}; this table has {', '.join(schema.names)}"
            )
        found = schema.field(field.name).type
        if found != field.type:
            raise DataError(f"{where}column {field.name!r} of a routing trace is {field.type}, not {found}")
    if schema.names != schema_with(schema.names).names:
        optional = ", ".join(field.name for field in OPTIONAL)
        raise DataError(
            f"{where}columns of a routing trace are {', '.join(SCHEMA.names)}, not {', '.join(schema.names)} ({optional} may follow)"
        )


def check_values(table: pa.Table, layers: dict[int, TraceLayer]) -> None:
    """Raise DataError for a layer, rank or destination that ``layers`` does not have, and for optional values that cannot be."""
    limits = table.group_by("layer").aggregate([("destination", "min_max"), ("rank", "min_max")]).to_pylist()
    for row in limits:
        layer = layers.get(row["layer"])
        if layer is None:
            raise DataError(
                f"rows name layer {row['layer']}, but the trace describes {', '.join(map(str, layers)) or 'none'}"
            )
        for name, low, end in (("destination", UNUSED, layer.num_destinations), ("rank", 0, layer.top_k)):
            seen = row[f"{name}_min_max"]
            if seen["min"] < low or seen["max"] >= end:
                wrong = seen["min"] if seen["min"] < low else seen["max"]
                raise DataError(f"layer {layer.layer} has {name} {wrong}; {low} to {end - 1} are allowed")
    if "scores" in table.column_names:
        _check_scores(table, layers)
    if "propensity" in table.column_names:
        limit = pc.min_max(table["propensity"]).as_py()
        for wrong in limit.values():
            if wrong is not None and not 0 <= wrong <= 1:
                raise DataError(f"a propensity is {wrong}; probabilities are 0 to 1")


def _check_scores(table: pa.Table, layers: dict[int, TraceLayer]) -> None:
    length = pc.list_value_length(table["scores"]).combine_chunks()
    rows = np.flatnonzero(length.is_valid().to_numpy(zero_copy_only=False))
    length_R = length.take(pa.array(rows)).to_numpy(zero_copy_only=False)
    layer_R = table["layer"].to_numpy()[rows]
    for number in np.unique(layer_R).tolist():
        wrong = length_R[(layer_R == number) & (length_R != layers[number].num_destinations)]
        if len(wrong):
            wanted = layers[number].num_destinations
            raise DataError(f"layer {number} has {wrong[0]} scores of one item; it has {wanted} destinations")
    if pc.list_flatten(table["scores"]).null_count:
        raise DataError("a score is missing among those of one item")


def layers_to_json(layers: Iterable[TraceLayer]) -> str:
    """The metadata of a trace file."""
    told = [asdict(layer) for layer in layers]
    # Earlier versions refuse a field they do not know, so it is left out where it has its default.
    for layer in told:
        for name in ("weight_dtype", "visits"):
            if layer[name] == getattr(TraceLayer, name):
                del layer[name]
    return json.dumps({"version": VERSION, "layers": told})


def layers_from_json(text: bytes | None, path: Path) -> tuple[TraceLayer, ...]:
    """What `layers_to_json` wrote. Raises DataError for anything else."""
    if text is None:
        raise DataError(
            f"{path} is a Parquet file but no routing trace (it lacks the metadata {METADATA_KEY.decode()!r})"
        )
    try:
        data = parse_json(text)
        if data["version"] != VERSION:
            raise DataError(
                f"{path} is a routing trace of version {data['version']!r}; this program reads version {VERSION}"
            )
        for layer in data["layers"]:
            _check_layer(layer)
        return tuple(TraceLayer(**layer) for layer in data["layers"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} has damaged trace metadata: {error!r}") from error


def _check_layer(layer: dict[str, Any]) -> None:
    """Raise ValueError unless the fields of a layer are of the right kind, and numbers that the columns can hold."""
    for name, value in layer.items():
        if name in ("name", "pool", "weight_dtype"):
            if not isinstance(value, str):
                raise ValueError(f"{name} of a layer is {shown(value)}; it must be text")
            if name == "weight_dtype" and value not in ("float32", "float64"):
                raise ValueError(f"weight_dtype of a layer is {shown(value)}; it must be float32 or float64")
        elif type(value) is not int or not 0 <= value < _MOST_OF_LAYER:
            raise ValueError(f"{name} of a layer is {shown(value)}; it must be a whole number below {_MOST_OF_LAYER}")


def merge_layers(before: TraceLayer | None, layer: TraceLayer) -> TraceLayer:
    """The one layer that both describe; the numbers of choices and of visits may vary from batch to batch."""
    if before is None or before == layer:
        return layer
    varying = {name: max(getattr(before, name), getattr(layer, name)) for name in ("top_k", "weight_dtype", "visits")}
    merged = replace(before, **varying)
    if merged != replace(layer, **varying):
        raise DataError(f"layer {layer.layer} is described in two ways: {before} and {layer}")
    return merged
