"""Changes over HTTP: what a request may be, what becomes of it, and who may send one."""

import hmac
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from starlette.requests import Request

from anabranch.errors import InputError
from anabranch.graph.live import LiveIndex, NoRoomError
from anabranch.graph.live.index import FSYNC, SNAPSHOT_BYTES
from anabranch.graph.serve.answers import fitting
from anabranch.graph.serve.limits import Limits
from anabranch.graph.serve.requests import RequestError, known_fields, read_ids, read_matrix
from anabranch.graph.serve.sources import Loaded

# Changes that wait for the disk together; each has a thread.
WRITERS = 8


@dataclass(frozen=True, kw_only=True)
class Writes:
    """How a server takes changes of its index of vectors.

    Attributes:
        fsync: when they are brought to the disk, as of `LiveIndex.open`.
        snapshot_bytes: size of the log beyond which a snapshot is written and a new log begun.
        vectors: most that the index may hold; None for as many as there is memory for.
        token: who changes something sends it, as ``Authorization: Bearer TOKEN``; None lets everybody.

    Raises InputError for a value that makes no sense.
    """

    fsync: str | float = "always"
    snapshot_bytes: int = SNAPSHOT_BYTES
    vectors: int | None = None
    token: str | None = None

    def __post_init__(self) -> None:
        if self.fsync not in FSYNC and (isinstance(self.fsync, str | bool) or not 0 < self.fsync < float("inf")):
            raise InputError(f"fsync is {self.fsync!r}; it must be always, never, or a positive number of seconds")
        for name in ("snapshot_bytes", "vectors"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(f"{name} is {value!r}; it must be a whole number of at least 1")


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


def check_sender(request: Request, writes: Writes | None) -> None:
    """Raise RequestError for a request that may change nothing: without the token, or sent by a page of another site."""
    origin, host = request.headers.get("origin"), request.headers.get("host", "")
    if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
        raise RequestError(403, "other_origin", f"a page of {origin!r:.80} may change nothing here")
    token = None if writes is None else writes.token
    if token is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token.encode()):
        raise RequestError(
            401, "wrong_token", "the token is missing or wrong; send Authorization: Bearer TOKEN",
            headers={"WWW-Authenticate": "Bearer"},
        )  # fmt: skip


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
