"""What a request may be: JSON in, checked values out, or a `RequestError` that says what is wrong with which field."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from anabranch.bounds import shown
from anabranch.graph.serve.limits import Limits
from anabranch.web.large_json import LARGE, load_large

DEFAULT_K = 10


class RequestError(Exception):
    """A request that is not answered: an HTTP status, a word for programs, and a sentence for people.

    ``field`` is the part of the request that is wrong; ``headers`` go with the answer.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        field: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.field = status, code, message, field
        self.headers = dict(headers or {})

    def to_dict(self) -> dict[str, Any]:
        """The body of the answer."""
        where = {} if self.field is None else {"field": self.field}
        return {"error": {"code": self.code, "message": self.message, **where}}


@dataclass(frozen=True)
class Search:
    """A search. One of ``vectors``, ``ids`` and ``names`` is given: what is searched for.

    With a ``radius`` it is for all within, of which the nearest ``k`` are told.
    """

    vectors: np.ndarray | None
    ids: np.ndarray | None
    names: list[Any] | None
    k: int
    ef: int | None
    filter_ids: np.ndarray | None
    filter_names: list[Any] | None
    is_exclude: bool
    radius: float | None = None
    is_exact: bool = False


@dataclass(frozen=True)
class SeedSet:
    """Seeds of one PageRank, by id or by name. ``weights`` are not negative; all 1 where none were given."""

    ids: np.ndarray | None
    names: list[Any] | None
    weights: np.ndarray


@dataclass(frozen=True)
class Ppr:
    """PageRank from one or more sets of seeds. ``field_of`` is what each set is called in the request."""

    queries: list[SeedSet]
    field_of: list[str]
    k: int


def default_k(limits: Limits) -> int:
    """Results of a request that does not say how many."""
    return min(DEFAULT_K, limits.k)


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object in a body. Raises RequestError."""
    try:
        # In steps, between which other threads have their turns.
        found = load_large(body, _read) if len(body) > LARGE else _read(body.decode())
    except UnicodeDecodeError as error:
        raise RequestError(400, "invalid_json", f"the body is not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise RequestError(
            400, "invalid_json", f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except RecursionError:
        raise RequestError(400, "invalid_json", "the body is nested too deeply") from None
    except ValueError as error:
        # NaN, or a number of thousands of digits.
        raise RequestError(400, "invalid_json", f"the body is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise _wrong("queries", f"the body is {_kind(found)}; it must be a JSON object")
    return found


def read_search(found: dict[str, Any], limits: Limits) -> Search:
    """A request for nearest neighbours. Raises RequestError."""
    known_fields(found, {"vectors", "ids", "names", "k", "ef", "filter", "radius", "exact"}, "")
    given = [name for name in ("vectors", "ids", "names") if name in found]
    if len(given) != 1:
        what = "none is" if not given else f"{' and '.join(given)} are"
        raise RequestError(400, "invalid_request", f"give one of vectors, ids and names; {what} given")
    vectors = read_matrix(found["vectors"], "vectors", limits.batch) if given == ["vectors"] else None
    ids = read_ids(found["ids"], "ids", limits.batch) if given == ["ids"] else None
    names = read_named(found["names"], "names", limits.batch) if given == ["names"] else None
    ef = None if found.get("ef") is None else _count(found["ef"], "ef", limits.ef)
    by_id, by_name, is_exclude = _filter(found.get("filter"))
    radius, exact = _radius(found)
    # Of a radius, as many as there may be.
    k = _count(found.get("k", default_k(limits) if radius is None else limits.k), "k", limits.k)
    return Search(vectors, ids, names, k, ef, by_id, by_name, is_exclude, radius, exact)


def read_ppr(found: dict[str, Any], limits: Limits) -> Ppr:
    """A request for PageRank. Raises RequestError."""
    known_fields(found, {"seeds", "names", "weights", "queries", "k"}, "")
    k = _count(found.get("k", default_k(limits)), "k", limits.k)
    if "queries" not in found:
        seeds = {name: value for name, value in found.items() if name != "k"}
        return Ppr([_seed_set(seeds, "", limits)], [""], k)
    if len(found.keys() - {"k"}) > 1:
        raise RequestError(400, "invalid_request", "seeds stand inside of queries, or there are no queries")
    queries = _list(found["queries"], "queries", limits.batch)
    sets, names = [], [f"queries[{number}]." for number in range(len(queries))]
    for query, name in zip(queries, names, strict=True):
        if not isinstance(query, dict):
            raise _wrong(name[:-1], f"{name[:-1]} is {_kind(query)}; it must be an object")
        known_fields(query, {"seeds", "names", "weights"}, name)
        sets.append(_seed_set(query, name, limits))
    return Ppr(sets, names, k)


def _radius(found: dict[str, Any]) -> tuple[float | None, bool]:
    exact = found.get("exact", False)
    if not isinstance(exact, bool):
        raise _wrong("exact", f"exact is {_kind(exact)}; it must be true or false")
    if found.get("radius") is None:
        if exact:
            raise _wrong("exact", "exact is for a radius; there is none")
        return None, False
    value = found["radius"]
    if type(value) not in (int, float):
        raise _wrong("radius", f"radius is {_kind(value)}; it must be a number")
    if abs(value) > float(np.finfo(np.float32).max):
        raise _wrong("radius", "radius does not fit into a float32")
    return float(value), exact


def _seed_set(found: dict[str, Any], where: str, limits: Limits) -> SeedSet:
    given = [name for name in ("seeds", "names") if name in found]
    if len(given) != 1:
        what = "both are" if given else "none is"
        raise _wrong(where + "seeds", f"give {where}seeds or {where}names; {what} given")
    field, value = where + given[0], found[given[0]]
    if not isinstance(value, list):
        # One seed need not be a list.
        value = [value]
    ids = read_ids(value, field, limits.seeds) if given == ["seeds"] else None
    names = read_named(value, field, limits.seeds) if given == ["names"] else None
    if found.get("weights") is None:
        return SeedSet(ids, names, np.ones(len(value)))
    name = f"{where}weights"
    weights = _floats(_list(found["weights"], name, limits.seeds), name, np.float64)
    if len(weights) != len(value):
        raise _wrong(name, f"{name} has {len(weights)} numbers for {len(value)} seeds; give one each")
    bad = np.flatnonzero(weights < 0)
    if bad.size or not weights.any():
        what = (
            f"{name}[{bad[0]}] is {weights[bad[0]]}; weights must not be negative" if bad.size else f"{name} are all 0"
        )
        raise _wrong(name, what)
    return SeedSet(ids, names, weights)


def _filter(found: Any) -> tuple[np.ndarray | None, list[Any] | None, bool]:
    if found is None:
        return None, None, False
    if not isinstance(found, dict):
        raise _wrong("filter", f"filter is {_kind(found)}; it must be an object")
    known_fields(found, {"ids", "names", "exclude"}, "filter.")
    given = [name for name in ("ids", "names") if name in found]
    if len(given) != 1:
        what = "both are" if given else "none is"
        raise _wrong("filter", f"give filter.ids or filter.names; {what} given")
    exclude = found.get("exclude", False)
    if not isinstance(exclude, bool):
        raise _wrong("filter.exclude", f"filter.exclude is {_kind(exclude)}; it must be true or false")
    field = f"filter.{given[0]}"
    if given == ["ids"]:
        return read_ids(found["ids"], field, None), None, exclude
    return None, read_named(found["names"], field, None), exclude


def read_matrix(value: Any, field: str, most: int) -> np.ndarray:
    """Rows of numbers, float32 [N, D]. Raises RequestError."""
    rows = _list(value, field, most)
    for number, row in enumerate(rows):
        if not isinstance(row, list):
            raise _wrong(f"{field}[{number}]", f"{field}[{number}] is {_kind(row)}; a vector is a list of numbers")
        if len(row) != len(rows[0]):
            raise _wrong(
                f"{field}[{number}]", f"{field}[{number}] has {len(row)} numbers, {field}[0] has {len(rows[0])}"
            )
    found = np.empty((len(rows), len(rows[0])), np.float32)
    for number, row in enumerate(rows):
        found[number] = _floats(row, f"{field}[{number}]", np.float32)
    return found


def _floats(row: list[Any], field: str, dtype: Any) -> np.ndarray:
    if not set(map(type, row)) <= {int, float}:
        place = next(place for place, value in enumerate(row) if type(value) not in (int, float))
        raise _wrong(f"{field}[{place}]", f"{field}[{place}] is {_kind(row[place])}; it must be a number")
    try:
        with np.errstate(over="ignore"):
            found = np.array(row, np.float64).astype(dtype)
    except OverflowError:
        found = np.full(len(row), np.inf, dtype)
    bad = np.flatnonzero(~np.isfinite(found))
    if bad.size:
        raise _wrong(f"{field}[{bad[0]}]", f"{field}[{bad[0]}] does not fit into a {np.dtype(dtype)}")
    return found


def read_ids(value: Any, field: str, most: int | None) -> np.ndarray:
    """Whole numbers, int64 [N]. Raises RequestError."""
    found = _list(value, field, most)
    for place, id in enumerate(found):
        if type(id) is not int or not -(2**63) <= id < 2**63:
            shown = _kind(id) if type(id) is not int else "too large"
            raise _wrong(f"{field}[{place}]", f"{field}[{place}] is {shown}; it must be an id, a whole number")
    return np.array(found, np.int64)


def read_named(value: Any, field: str, most: int | None) -> list[Any]:
    """Names: text and whole numbers. Raises RequestError."""
    found = _list(value, field, most)
    for place, name in enumerate(found):
        if type(name) not in (int, str):
            raise _wrong(f"{field}[{place}]", f"{field}[{place}] is {_kind(name)}; a name is text or a whole number")
    return found


def _list(value: Any, field: str, most: int | None) -> list[Any]:
    """A list of 1 to ``most`` entries; for None of any number, none included."""
    if not isinstance(value, list):
        raise _wrong(field, f"{field} is {_kind(value)}; it must be a list")
    if most is None:
        return value
    if not value:
        raise _wrong(field, f"{field} is empty")
    if len(value) > most:
        raise RequestError(
            400, "over_limit", f"{field} has {len(value):,} entries; this server takes {most:,}", field=field
        )
    return value


def _count(value: Any, field: str, most: int) -> int:
    if type(value) is not int or value < 1:
        raise _wrong(field, f"{field} is {_kind(value)}; it must be a whole number of at least 1")
    if value > most:
        raise RequestError(
            400, "over_limit", f"{field} is {shown(value)}; this server takes at most {most:,}", field=field
        )
    return value


def known_fields(found: dict[str, Any], known: set[str], where: str) -> None:
    """Raise RequestError for a field that there is not."""
    for name in found:
        if name not in known:
            raise RequestError(
                400,
                "invalid_request",
                f"there is no field {where + name!r:.80}; known: {', '.join(sorted(known))}",
                field=(where + name)[:80],
            )


def _wrong(field: str, message: str) -> RequestError:
    return RequestError(400, "invalid_request", message, field=field)


def _read(text: str) -> Any:
    return json.loads(text, parse_constant=_constant)


def _constant(word: str) -> float:
    raise ValueError(f"{word} is no number of JSON")


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the text {value!r:.40}"
    if isinstance(value, int | float):
        return f"the number {value!r:.40}" if abs(value) < 1e300 else "a huge number"
    return "a list" if isinstance(value, list) else "an object"
