"""Changes over HTTP: what a request may be, and what becomes of it."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from anabranch.graph.live import LiveIndex, NoRoomError
from anabranch.graph.serve.answers import fitting
from anabranch.graph.serve.limits import Limits
from anabranch.graph.serve.requests import RequestError, known_fields, read_ids, read_matrix
from anabranch.graph.serve.sources import Loaded

# Changes that wait for the disk together; each has a thread.
WRITERS = 8


@dataclass(frozen=True)
class Upsert:
    """Elements that come, or move: int64 [N], each once and not negative, and float32 [N, D]."""

    ids: np.ndarray
    vectors: np.ndarray


@dataclass(frozen=True)
class Delete:
    """Elements that go: int64 [N], each once."""

    ids: np.ndarray


def read_upsert(found: dict[str, Any], limits: Limits) -> Upsert:
    """A request that brings elements. Raises RequestError."""
    known_fields(found, {"ids", "vectors"}, "")
    for name in ("ids", "vectors"):
        if name not in found:
            raise RequestError(400, "invalid_request", f"give ids and vectors; there are no {name}", field=name)
    ids = _distinct(read_ids(found["ids"], "ids", limits.batch))
    vectors = read_matrix(found["vectors"], "vectors", limits.batch)
    if len(ids) != len(vectors):
        message = f"there are {len(ids):,} ids for {len(vectors):,} vectors; give one each"
        raise RequestError(400, "invalid_request", message, field="ids")
    return Upsert(ids, vectors)


def read_delete(found: dict[str, Any], limits: Limits) -> Delete:
    """A request that takes elements out. Raises RequestError."""
    known_fields(found, {"ids"}, "")
    if "ids" not in found:
        raise RequestError(400, "invalid_request", "give ids; there are none", field="ids")
    return Delete(_distinct(read_ids(found["ids"], "ids", limits.batch)))


def answer_upsert(loaded: Loaded, wanted: Upsert) -> dict[str, Any]:
    """Bring elements in for good. Raises RequestError."""
    live = live_of(loaded)
    vectors = fitting(wanted.vectors, live.index)
    try:
        number, known = live.upsert(wanted.ids, vectors)
    except NoRoomError as error:
        raise RequestError(409, "index_full", str(error)) from None
    return _done(loaded, live, number, upserted=len(known), new=int((~known).sum()))


def answer_delete(loaded: Loaded, wanted: Delete) -> dict[str, Any]:
    """Take elements out for good. Those that are not there are named, which is no error: the request may be sent again."""
    live = live_of(loaded)
    number, known = live.delete(wanted.ids)
    return _done(loaded, live, number, deleted=int(known.sum()), missing=wanted.ids[~known].tolist())


def live_of(loaded: Loaded) -> LiveIndex:
    """The index that takes changes. Raises RequestError if there is none."""
    held = loaded.vectors
    if held is None:
        raise RequestError(404, "not_served", "this server holds no index of vectors, so it takes no changes")
    if held.live is None:
        raise RequestError(403, "read_only", f"this server takes no changes: {held.why_read_only}")
    return held.live


def _distinct(ids: np.ndarray) -> np.ndarray:
    bad = np.flatnonzero(ids < 0)
    if bad.size:
        field = f"ids[{bad[0]}]"
        raise RequestError(400, "invalid_request", f"{field} is {ids[bad[0]]}; ids are not negative", field=field)
    _, first = np.unique(ids, return_index=True)
    if len(first) < len(ids):
        is_first = np.zeros(len(ids), bool)
        is_first[first] = True
        place = int(np.flatnonzero(~is_first)[0])
        field = f"ids[{place}]"
        message = f"{field} is {ids[place]}, which stands there before; give each id once"
        raise RequestError(400, "invalid_request", message, field=field)
    return ids


def _done(loaded: Loaded, live: LiveIndex, number: int, **what: Any) -> dict[str, Any]:
    return {**what, "vectors": len(live), "number": number, "generation": loaded.generation}
