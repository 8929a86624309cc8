"""What is computed for a request. These functions run in threads, on what was loaded when the request came."""

from typing import Any

import numpy as np

from anabranch.errors import DataError, InputError
from anabranch.graph.hnsw import HNSW
from anabranch.graph.hnsw.checks import MAX_LENGTH, TOO_LONG, too_long
from anabranch.graph.hnsw.ranges import DAMAGED
from anabranch.graph.hnsw.searching import SCANNED, WALKED
from anabranch.graph.names import Names
from anabranch.graph.serve.gate import Steps
from anabranch.graph.serve.limits import Limits
from anabranch.graph.serve.requests import Ppr, RequestError, Search, SeedSet
from anabranch.graph.serve.sources import Loaded
from anabranch.graph.serve.text import SHORT, Text
from anabranch.web.json_text import to_json

# Text of a number that is no whole one, as it is on average; of a result besides its hits.
NUMBER_BYTES, ROW_BYTES = 19, 40

# Names that are looked at for how long they are.
SOME_NAMES = 32

# Of each query: ids, distances, and with a radius how many are within.
Rows = list[tuple[np.ndarray, np.ndarray, int]]


def answer_search(loaded: Loaded, wanted: Search, limits: Limits, text: Text) -> Steps[None]:
    """Nearest neighbours of each query, nearest first; a step for every few of them, and for the text of each. Raises RequestError."""
    held = loaded.vectors
    if held is None:
        raise RequestError(404, "not_served", "this server holds no index of vectors, so it answers no searches")
    index, own = held.index, wanted.ids
    if wanted.names is not None:
        own = _by_name(held.names, wanted.names, "names")
    if own is not None:
        query = _rows(index, own, wanted.names)
    else:
        assert wanted.vectors is not None
        query = fitting(wanted.vectors, index)
    filter, let_through = _filter(wanted, held.names, index)
    step, told = _step(index, wanted), _Told(limits)
    # How many lie within a radius nobody knows before.
    k = min(wanted.k, let_through) if wanted.radius is None else 0
    text.expect([_row_bytes(k, len(index), held.names)] * len(query))
    for first in range(0, len(query), step):
        part = slice(first, first + step)
        mine = None if own is None else own[part]
        results = _results(_found(index, query[part], wanted, mine, filter), wanted, mine, held.names, told)
        yield
        yield from text.rows(results)
    text.end(generation=loaded.generation)


def _step(index: Any, wanted: Search) -> int:
    """How many queries take some milliseconds: walks; or with a radius maybe distances to all, after walks that cost as much or more."""
    walks = max(1, WALKED // max(wanted.k, wanted.ef or 1))
    return walks if wanted.radius is None else max(1, min(walks, SCANNED // max(1, 4 * len(index))))


def _row_bytes(k: int, largest: int, names: Names | None) -> int:
    """About so many bytes are the text of a result of k hits with ids up to ``largest``."""
    each = NUMBER_BYTES + len(str(largest)) + 2
    if names is not None and len(names):
        some = names.of(np.unique(np.linspace(0, len(names) - 1, SOME_NAMES).astype(np.int64)))
        each += len(to_json(some, SHORT)) // len(some) + 1
    return ROW_BYTES + k * each


class _Told:
    """Counts characters of names in an answer: a result is as long as the name it finds."""

    def __init__(self, limits: Limits) -> None:
        self._left = self._most = limits.answer_names

    def names(self, names: Names, ids: np.ndarray) -> list[Any]:
        """Names of ids. Raises RequestError where there is no room for them."""
        found = names.of(ids)
        if not names.are_numbers:
            self._left -= sum(map(len, found))
        if self._left < 0:
            message = f"names of results have over {self._most:,} characters, which is the limit; ask for fewer at once"
            raise RequestError(400, "over_limit", message)
        return found


def _results(
    rows: Rows, wanted: Search, own: np.ndarray | None, names: Names | None, told: _Told
) -> list[dict[str, Any]]:
    results = []
    for row, (ids, distances, within) in enumerate(rows):
        if not np.isfinite(distances).all():
            # Vectors and queries are such that distances are (`MAX_LENGTH`).
            raise _damaged(f"the {DAMAGED}")
        if own is not None:
            kept = ids != own[row]
            within -= not kept.all()
            ids, distances = ids[kept], distances[kept]
        result: dict[str, Any] = {"ids": ids[: wanted.k].tolist(), "distances": distances[: wanted.k].tolist()}
        if wanted.radius is not None:
            result["within"] = within
        results.append(result if names is None else {**result, "names": told.names(names, ids[: wanted.k])})
    return results


def _found(index: Any, query: np.ndarray, wanted: Search, own: np.ndarray | None, filter: Any) -> Rows:
    if wanted.radius is not None and not isinstance(index, HNSW):
        message = "radius cannot be used: an index on disk finds the nearest k, not all within a distance"
        raise RequestError(400, "invalid_request", message, field="radius")
    # An element finds itself, and that is left out.
    k = wanted.k + (own is not None)
    try:
        if wanted.radius is None:
            ids, distances = index.search(query, k, wanted.ef, filter, workers=1)
            within = np.zeros(len(ids), np.int64)
        else:
            ids, distances, within = index.nearest_within(
                query, wanted.radius, k, wanted.ef, filter, exact=wanted.is_exact, workers=1
            )
    except DataError as error:
        # Of one on disk: a block that was read is not what was written.
        raise _damaged(str(error)) from None
    return [
        (id_K[id_K >= 0], distance_K[id_K >= 0], number)
        for id_K, distance_K, number in zip(ids, distances, within.tolist(), strict=True)
    ]


def _damaged(message: str) -> RequestError:
    return RequestError(500, "damaged_index", message)


def answer_ppr(loaded: Loaded, wanted: Ppr, limits: Limits, text: Text) -> Steps[None]:
    """The nodes most related to each set of seeds, highest score first; a step for each. Raises RequestError."""
    held = loaded.scores
    if held is None:
        raise RequestError(404, "not_served", "this server holds no graph, so it answers no PageRank requests")
    told, ids_of, expected = _Told(limits), [], []
    for seeds, field in zip(wanted.queries, wanted.field_of, strict=True):
        ids_of.append(_seeds(seeds, field, held.names, held.num_nodes))
        expected.append(_row_bytes(held.most(ids_of[-1], wanted.k), held.num_nodes, held.names))
        yield
    text.expect(expected)
    for ids, seeds in zip(ids_of, wanted.queries, strict=True):
        found, scores = held.top(ids, seeds.weights, wanted.k)
        result = {"ids": found.tolist(), "scores": scores.tolist()}
        result = result if held.names is None else {**result, "names": told.names(held.names, found)}
        yield
        yield from text.rows([result])
    text.end(generation=loaded.generation)


def _rows(index: Any, own: np.ndarray, names: list[Any] | None) -> np.ndarray:
    """Vectors of ids, which were asked for by ``names`` where there are some."""
    known = (own >= 0) & index.contains(np.maximum(own, 0))
    if not known.all() and names is not None:
        raise _gone(names, int(np.flatnonzero(~known)[0]))
    if not known.all():
        raise _unknown("ids", own, known, f"the {len(index):,} vectors")
    try:
        return index.vectors(own)
    except DataError as error:
        raise RequestError(500, "damaged_index", str(error)) from None
    except InputError as error:
        # A change took one out just now.
        if names is not None:
            raise _gone(names, int(np.flatnonzero(~index.contains(own))[:1].sum())) from None
        raise RequestError(404, "unknown_id", str(error), field=str(error).partition(" ")[0]) from None


def _seeds(seeds: SeedSet, field: str, names: Names | None, num_nodes: int) -> np.ndarray:
    if seeds.names is not None:
        return _by_name(names, seeds.names, f"{field}names")
    ids = seeds.ids
    assert ids is not None
    known = (ids >= 0) & (ids < num_nodes)
    if not known.all():
        raise _unknown(f"{field}seeds", ids, known, f"the {num_nodes:,} nodes")
    return ids


def fitting(vectors: np.ndarray, index: Any) -> np.ndarray:
    """The same vectors, as bytes where the index holds bits. Raises RequestError unless the index can measure them."""
    if vectors.shape[1] != index.row_size:
        bits = f" bytes, which are {index.dim} bits" if index.metric == "hamming" else ""
        raise RequestError(
            400,
            "invalid_request",
            f"vectors have {vectors.shape[1]} numbers each, those of the index {index.row_size}{bits}",
            field="vectors",
        )
    if index.metric == "hamming":
        return _bytes(vectors)
    if index.metric == "cosine" and not vectors.any(1).all():
        row = int(np.flatnonzero(~vectors.any(1))[0])
        raise RequestError(
            400, "invalid_request", f"vectors[{row}] is all zeros, which has no cosine", field=f"vectors[{row}]"
        )
    if index.metric != "cosine" and (long := too_long(vectors)) is not None:
        message = f"vectors[{long}] is longer than {MAX_LENGTH:g}: {TOO_LONG}"
        raise RequestError(400, "invalid_request", message, field=f"vectors[{long}]")
    return vectors


def _bytes(vectors: np.ndarray) -> np.ndarray:
    bad = np.argwhere((vectors != np.floor(vectors)) | (vectors < 0) | (vectors > 255))
    if len(bad):
        row, place = bad[0].tolist()
        field = f"vectors[{row}][{place}]"
        message = (
            f"{field} is {vectors[row, place]:g}; the index holds bits, which are sent as bytes: whole numbers 0 to 255"
        )
        raise RequestError(400, "invalid_request", message, field=field)
    return vectors.astype(np.uint8)


def _filter(wanted: Search, names: Names | None, index: Any) -> tuple[Any, int]:
    """What `HNSW.search` takes, worked out once, and how many elements it lets through. Ids that no element has are no mistake."""
    ids = wanted.filter_ids
    if wanted.filter_names is not None:
        ids = _by_name(names, wanted.filter_names, "filter.names")
    if ids is None:
        return None, len(index)
    let_through = np.setdiff1d(index.ids, ids) if wanted.is_exclude else np.unique(ids[ids >= 0])
    number = len(let_through) if wanted.is_exclude else int(index.contains(let_through).sum())
    return index.prepare_filter(let_through), number


def _by_name(names: Names | None, asked: list[Any], field: str) -> np.ndarray:
    if names is None:
        raise RequestError(
            400, "invalid_request", f"{field} cannot be used: what is served has no names; give ids", field=field
        )
    try:
        return names.ids_of(asked)
    except InputError as error:
        raise RequestError(404, "unknown_id", f"{field}: {error}", field=field) from None


def _gone(names: list[Any], place: int) -> RequestError:
    """Of a name that the index knows, and whose element was deleted."""
    field = f"names[{place}]"
    return RequestError(404, "unknown_id", f"{field} is {names[place]!r}, which was deleted", field=field)


def _unknown(field: str, ids: np.ndarray, known: np.ndarray, of: str) -> RequestError:
    place = int(np.flatnonzero(~known)[0])
    name = f"{field}[{place}]"
    return RequestError(404, "unknown_id", f"{name} is {ids[place]}, which is none of {of}", field=name)
