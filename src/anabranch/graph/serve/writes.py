"""Changes over HTTP: what a request may be, and what becomes of it."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from anabranch.errors import InputError
from anabranch.graph.live import LiveIndex, NoRoomError
from anabranch.graph.serve.answers import fitting
from anabranch.graph.serve.gate import Steps
from anabranch.graph.serve.limits import Limits
from anabranch.graph.serve.requests import RequestError, known_fields, read_ids, read_matrix, read_named
from anabranch.graph.serve.sources import Loaded
from anabranch.graph.serve.text import Text

# Changes that wait for the disk together; each has a thread.
WRITERS = 8


@dataclass(frozen=True)
class Upsert:
    """Elements that come, or move: ids, int64 [N], each once and not negative, or names; and float32 [N, D]."""

    ids: np.ndarray | None
    names: list[Any] | None
    vectors: np.ndarray


@dataclass(frozen=True)
class Delete:
    """Elements that go: ids, int64 [N], each once, or names."""

    ids: np.ndarray | None
    names: list[Any] | None


def read_upsert(found: dict[str, Any], limits: Limits) -> Upsert:
    """A request that brings elements. Raises RequestError."""
    known_fields(found, {"ids", "names", "vectors"}, "")
    ids, names = _elements(found, limits)
    if "vectors" not in found:
        raise RequestError(400, "invalid_request", "give vectors; there are none", field="vectors")
    vectors = read_matrix(found["vectors"], "vectors", limits.batch)
    field, count = ("ids", len(ids)) if ids is not None else ("names", len(names or ()))
    if count != len(vectors):
        message = f"there are {count:,} {field} for {len(vectors):,} vectors; give one each"
        raise RequestError(400, "invalid_request", message, field=field)
    return Upsert(ids, names, vectors)


def read_delete(found: dict[str, Any], limits: Limits) -> Delete:
    """A request that takes elements out. Raises RequestError."""
    known_fields(found, {"ids", "names"}, "")
    return Delete(*_elements(found, limits))


def _elements(found: dict[str, Any], limits: Limits) -> tuple[np.ndarray | None, list[Any] | None]:
    """Which elements a request is about, by id or by name."""
    given = [name for name in ("ids", "names") if name in found]
    if len(given) != 1:
        what = "both are given" if given else "none is given"
        raise RequestError(400, "invalid_request", f"give ids or names; {what}", field=given[0] if given else "ids")
    if given == ["ids"]:
        return _distinct(read_ids(found["ids"], "ids", limits.batch)), None
    return None, read_named(found["names"], "names", limits.batch)


def answer_upsert(loaded: Loaded, wanted: Upsert, limits: Limits, text: Text) -> Steps[None]:
    """Bring elements in for good, in one step. Raises RequestError."""
    yield from ()
    live = live_of(loaded)
    vectors = fitting(wanted.vectors, live.index)
    try:
        if wanted.names is not None:
            number, known = live.upsert_named(_known(live, wanted.names), vectors)
        else:
            number, known = live.upsert(wanted.ids, vectors)
    except NoRoomError as error:
        raise RequestError(409, "index_full", str(error)) from None
    except InputError as error:
        raise _refused(error) from None
    _done(text, loaded, live, number, upserted=len(known), new=int((~known).sum()))


def answer_delete(loaded: Loaded, wanted: Delete, limits: Limits, text: Text) -> Steps[None]:
    """Take elements out for good, in one step. Those that are not there are named, which is no error: the request may be sent again."""
    yield from ()
    live = live_of(loaded)
    try:
        if wanted.names is not None:
            number, known = live.delete_named(_known(live, wanted.names))
            missing = [name for name, there in zip(wanted.names, known.tolist(), strict=True) if not there]
        else:
            assert wanted.ids is not None
            number, known = live.delete(wanted.ids)
            missing = wanted.ids[~known].tolist()
    except InputError as error:
        raise _refused(error) from None
    _done(text, loaded, live, number, deleted=int(known.sum()), missing=missing)


def _refused(error: InputError) -> RequestError:
    # As in `ids[3] is ...`.
    word = str(error).partition(" ")[0]
    return RequestError(400, "invalid_request", str(error), field=word if word.endswith("]") else None)


def _known(live: LiveIndex, names: list[Any]) -> list[Any]:
    """The names. Raises RequestError where elements have none."""
    if not live.takes_names:
        message = "names cannot be used: elements of this index have none; give ids"
        raise RequestError(400, "invalid_request", message, field="names")
    return names


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


def _done(text: Text, loaded: Loaded, live: LiveIndex, number: int, **what: Any) -> None:
    text.whole({**what, "vectors": len(live), "number": number, "generation": loaded.generation})
