"""A peer in one checked file: its log, its library, the peers it knows, and its parameters."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from anabranch.files import parse_json
from anabranch.graph.array_file import read_arrays, write_arrays
from anabranch.graph.header import described, whole
from anabranch.graph.rank.defences import Defences
from anabranch.graph.rank.items import Item
from anabranch.graph.rank.rows import check_vector, is_node, row_from_json

KIND = "rank peer"
# A kind of peer (`anabranch.graph.rank.peer`), which reads and writes itself by these.
P = TypeVar("P")


def write(path: str | Path, peer: Any) -> None:
    """See `Peer.save`."""
    held = list(peer.log.all_rows())
    rows = b"\n".join(json.dumps(row.to_json()).encode() for row in held)
    place_of: dict[str, int] = {}
    tellers = [place_of.setdefault(peer.log.teller_of(row), len(place_of)) for row in held]
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
        "tellers": list(place_of),
        "generator": peer._generator.bit_generator.state,
    }
    arrays: dict[str, np.ndarray] = {
        "rows": np.frombuffer(rows, np.uint8),
        "library": np.frombuffer(json.dumps(library).encode(), np.uint8),
        "teller": np.array(tellers, np.int32),
    }
    write_arrays(path, KIND, arrays, meta)


def read(path: str | Path, kind: Callable[..., P], others: dict[str, Any]) -> P:
    """See `Peer.load`; ``kind`` is the class."""
    file = read_arrays(path, KIND)
    meta = file.meta
    with described(path, "a peer"):
        entries = parse_json(file.arrays["library"].tobytes())
        items = [Item(id, title, artist, tuple(tags)) for id, title, artist, tags in entries]
        defences = Defences(**meta["defences"])
        named = [meta[name] for name in ("node_id", "F", "explore", "top_terms")]
        lines = file.arrays["rows"].tobytes().splitlines()
        rows = [row_from_json(parse_json(line)) for line in lines]
        told = list(zip(rows, _tellers(file, len(rows)), strict=True))
        held, known = check_vector(meta["held"]), [_node(name) for name in meta["known"]]
        marked = {_node(name): whole(count, "marks") for name, count in dict(meta["marked"]).items()}
        distrusted, next_query = [_node(name) for name in meta["distrusted"]], whole(meta["next_query"], "next_query")
        generator = np.random.default_rng()
        generator.bit_generator.state = meta["generator"]
        # What the caller brings is theirs to answer for.
        kind(items, *named, defences=Defences())
    peer: Any = kind(items, *named, defences=defences, **others)
    peer._take(told, is_ours=True)
    for origin, ends in held.items():
        peer.log.restore(origin, ends)
    for node in known:
        peer.learn(node)
    peer.log.marked.update(marked)
    peer.log.distrusted.update(distrusted)
    peer._next_query = max(peer._next_query, next_query)
    peer._generator = generator
    return peer


def _tellers(file: Any, count: int) -> list[str]:
    """Who told each row; "" in files of releases that did not note it."""
    if "teller" not in file.arrays:
        return [""] * count
    names, places = list(file.meta["tellers"]), file.arrays["teller"].tolist()
    if len(places) != count or not all(isinstance(name, str) for name in names):
        raise ValueError("rows and who told them do not fit together")
    if not all(isinstance(place, int) and 0 <= place < len(names) for place in places):
        raise ValueError("a row was told by none of those who are named")
    return [names[place] for place in places]


def _node(name: Any) -> str:
    if not is_node(name):
        raise ValueError(f"{name!r:.80} is no name of a node")
    return str(name)
