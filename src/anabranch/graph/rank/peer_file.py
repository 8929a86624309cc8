"""A peer in one checked file: its log, its library, the peers it knows, and its parameters."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from anabranch.files import parse_json
from anabranch.graph.array_file import read_arrays, write_arrays
from anabranch.graph.rank.defences import Defences
from anabranch.graph.rank.items import Item
from anabranch.graph.rank.rows import row_from_json

KIND = "rank peer"
# A kind of peer (`anabranch.graph.rank.peer`), which reads and writes itself by these.
P = TypeVar("P")


def write(path: str | Path, peer: Any) -> None:
    """See `Peer.save`."""
    rows = b"\n".join(json.dumps(row.to_json()).encode() for row in peer.log.all_rows())
    library = [[item.id, item.title, item.artist, list(item.tags)] for item in peer.library.values()]
    meta = {
        "node_id": peer.node_id,
        "F": peer.F,
        "explore": peer.explore,
        "top_terms": peer.top_terms,
        "defences": asdict(peer.defences),
        "known": list(peer._known),
        "marked": dict(peer.log.marked),
        "distrusted": sorted(peer.log.distrusted),
        "held": peer.log.vector(),
        "next_query": peer._next_query,
        "generator": peer._generator.bit_generator.state,
    }
    arrays = {
        "rows": np.frombuffer(rows, np.uint8),
        "library": np.frombuffer(json.dumps(library).encode(), np.uint8),
    }
    write_arrays(path, KIND, arrays, meta)


def read(path: str | Path, kind: Callable[..., P], others: dict[str, Any]) -> P:
    """See `Peer.load`; ``kind`` is the class."""
    file = read_arrays(path, KIND)
    meta = file.meta
    items = [
        Item(id, title, artist, tuple(tags)) for id, title, artist, tags in parse_json(file.arrays["library"].tobytes())
    ]
    defences = Defences(**meta["defences"])
    peer: Any = kind(items, meta["node_id"], meta["F"], meta["explore"], meta["top_terms"], defences=defences, **others)
    lines = file.arrays["rows"].tobytes().splitlines()
    peer._take([row_from_json(parse_json(line)) for line in lines], is_ours=True)
    for origin, ends in meta["held"].items():
        peer.log.restore(origin, ends)
    for node in meta["known"]:
        peer.learn(node)
    peer.log.marked.update(meta["marked"])
    peer.log.distrusted.update(meta["distrusted"])
    peer._next_query = max(peer._next_query, meta["next_query"])
    peer._generator.bit_generator.state = meta["generator"]
    return peer
