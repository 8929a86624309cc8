"""The OpenAPI description of a server, with its limits in it."""

from typing import Any

from anabranch import __version__
from anabranch.graph.serve.limits import Limits
from anabranch.graph.serve.requests import default_k

# Paths of requests begin with these; clients that are to last name the version.
STARTS = ("/v1", "")

ERRORS = {
    400: "The request is not JSON, or a field has a value it may not have, or is over a limit.",
    404: "An id or name is unknown, or nothing of this kind is served.",
    408: "The body did not come in time.",
    413: "The body is larger than the limit.",
    415: "The body is not called JSON.",
    429: "Too many requests are under way; try again after Retry-After seconds.",
    503: "Nothing is loaded yet, the server is stopping, or the answer took too long.",
}


WRITES_SAY = {
    401: "The token is missing or wrong.",
    403: "The server takes no changes, or not from a page of another site or under the name of another host.",
    409: "The index holds as many vectors as it may.",
}
POST = {
    "search": ("Search", "Nearest neighbours of vectors, or of elements of the index"),
    "ppr": ("Ppr", "Nodes most related to a set of seeds, by personalised PageRank"),
    "upsert": (
        "Upsert",
        "Bring vectors in, or move those whose ids or names are there; the answer says that they are on the disk",
    ),
    "delete": ("Delete", "Take vectors out by id or name; the answer says that it is on the disk"),
}
WRITES = ("upsert", "delete")


def describe(limits: Limits) -> dict[str, Any]:
    """OpenAPI 3.1, as JSON."""
    paths: dict[str, Any] = {f"{start}/{name}": _post(name, start) for name in POST for start in STARTS}
    paths["/v1/info"] = _get("info", "What is served, and the limits")
    paths["/healthz"] = _get("healthz", "Whether the process is alive")
    paths["/readyz"] = _get("readyz", "Whether it answers requests; 503 if not", 503)
    paths["/metrics"] = _get("metrics", "Counters for Prometheus", media="text/plain")
    paths["/openapi.json"] = _get("openapi", "This description")
    paths["/admin/reload"] = {
        "post": {
            "operationId": "reload",
            "summary": "Read the files again and serve them, without a pause",
            "security": [{"token": []}],
            "responses": {
                "200": {"description": "They are served.", "content": _json({"type": "object"})},
                **_errors(401, 403, 409),
            },
        }
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "anabranch graph serve", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": _schemas(limits),
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _post(name: str, start: str) -> dict[str, Any]:
    schema, about = POST[name]
    is_write = name in WRITES
    more: dict[str, Any] = {"security": [{}, {"token": []}]} if is_write else {}
    return {
        "post": {
            "operationId": name if start else f"{name}_unversioned",
            "summary": about,
            "requestBody": {"required": True, "content": _json(_ref(f"{schema}Request"))},
            "responses": {
                "200": {"description": "The results.", "content": _json(_ref(f"{schema}Response"))},
                **_errors(*ERRORS),
                **(_errors(401, 403, 409, of=WRITES_SAY) if is_write else {}),
            },
            **more,
        }
    }


def _schemas(limits: Limits) -> dict[str, Any]:
    ids, names = _list({"type": "integer"}), _list({"type": ["string", "integer"]})
    id, count = {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}, {"type": "integer", "minimum": 0}
    k = {"type": "integer", "minimum": 1, "maximum": limits.k, "default": default_k(limits)}
    seeds = {
        "seeds": {"oneOf": [{"type": "integer"}, _list({"type": "integer"}, limits.seeds)]},
        "names": {"oneOf": [{"type": ["string", "integer"]}, _list({"type": ["string", "integer"]}, limits.seeds)]},
        "weights": _list({"type": "number", "minimum": 0}, limits.seeds),
    }
    name = {"type": ["string", "integer"]}
    named = {**_list(name, limits.batch), "uniqueItems": True}
    by = [{"required": ["ids"]}, {"required": ["names"]}]
    either = {"oneOf": [{"required": ["seeds"]}, {"required": ["names"]}]}
    return {
        "SearchRequest": {
            "type": "object",
            "additionalProperties": False,
            "oneOf": [{"required": [name]} for name in ("vectors", "ids", "names")],
            "properties": {
                "vectors": _list(
                    _list({"type": "number"}),
                    limits.batch,
                    "What to search for; for packed bits (hamming) bytes, 0 to 255.",
                ),
                "ids": _list({"type": "integer"}, limits.batch, "Or elements, which are left out of their results."),
                "names": _list({"type": ["string", "integer"]}, limits.batch, "Or the same by name."),
                "k": k,
                "ef": {
                    "type": "integer",
                    "minimum": 1,
                    "maximum": limits.ef,
                    "default": 64,
                    "description": "Width of the search: more finds more and takes longer.",
                },
                "radius": {
                    "type": "number",
                    "description": "All within this distance instead, of which the nearest k are told (default: the most).",
                },
                "exact": {"type": "boolean", "default": False, "description": "With radius: measure every distance."},
                "filter": {
                    "type": "object",
                    "additionalProperties": False,
                    "oneOf": [{"required": ["ids"]}, {"required": ["names"]}],
                    "properties": {
                        "ids": {**ids, "minItems": 0},
                        "names": {**names, "minItems": 0},
                        "exclude": {"type": "boolean", "default": False},
                    },
                    "description": "Only these elements are results; with exclude, all but these.",
                },
            },
        },
        "SearchResponse": _response("distances", "Nearest first; fewer than k where there are no more."),
        "SeedSet": {"type": "object", "additionalProperties": False, "properties": seeds, **either},
        "PprRequest": {
            "type": "object",
            "additionalProperties": False,
            "oneOf": [*either["oneOf"], {"required": ["queries"]}],
            "properties": {**seeds, "queries": _list(_ref("SeedSet"), limits.batch, "Several sets of seeds."), "k": k},
        },
        "PprResponse": _response("scores", "Highest score first; only nodes that can be reached."),
        "UpsertRequest": {
            "type": "object",
            "additionalProperties": False,
            "required": ["vectors"],
            "oneOf": by,
            "properties": {
                "ids": {**_list(id, limits.batch, "One for each vector."), "uniqueItems": True},
                "names": {
                    **named,
                    "description": "Or names, of an index whose elements have some, or which is empty; new ones are kept.",
                },
                "vectors": _list(
                    _list({"type": "number"}), limits.batch, "As long as those of the index; packed bits as bytes."
                ),
            },
        },
        "UpsertResponse": _changed(
            {"upserted": count, "new": {**count, "description": "Those that were not there before."}}
        ),
        "DeleteRequest": {
            "type": "object",
            "additionalProperties": False,
            "oneOf": by,
            "properties": {"ids": {**_list(id, limits.batch), "uniqueItems": True}, "names": named},
        },
        "DeleteResponse": _changed(
            {"deleted": count, "missing": {"type": "array", "items": name, "description": "Those that were not there."}}
        ),
        "Error": {
            "type": "object",
            "required": ["error"],
            "properties": {
                "error": {
                    "type": "object",
                    "required": ["code", "message"],
                    "properties": {name: {"type": "string"} for name in ("code", "message", "field")},
                }
            },
        },
    }


def _changed(properties: dict[str, Any]) -> dict[str, Any]:
    count = {"type": "integer", "minimum": 0}
    return {
        "type": "object",
        "required": [*properties, "vectors", "number", "generation"],
        "properties": {
            **properties,
            "vectors": {**count, "description": "How many the index holds now."},
            "number": {**count, "description": "Of the write to the log, rising."},
            "generation": count,
        },
    }


def _response(measure: str, about: str) -> dict[str, Any]:
    result: dict[str, Any] = {
        "type": "object",
        "required": ["ids", measure],
        "properties": {
            "ids": {"type": "array", "items": {"type": "integer"}},
            # null: one that JSON has no number for.
            measure: {"type": "array", "items": {"type": ["number", "null"]}},
            "names": {"type": "array", "items": {"type": ["string", "integer"]}},
        },
    }
    if measure == "distances":
        about_within = "Of a radius: how many lie within, of which at most k are told."
        result["properties"]["within"] = {"type": "integer", "minimum": 0, "description": about_within}
    return {
        "type": "object",
        "required": ["results", "generation"],
        "properties": {
            "results": {"type": "array", "items": result, "description": f"One for each query. {about}"},
            "generation": {"type": "integer", "description": "Which loading of the files answered."},
        },
    }


def _list(items: dict[str, Any], most: int | None = None, about: str | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "array", "items": items, "minItems": 1}
    if most is not None:
        found["maxItems"] = most
    return found if about is None else {**found, "description": about}


def _get(name: str, about: str, *errors: int, media: str = "application/json") -> dict[str, Any]:
    content = {media: {"schema": {"type": "string" if media == "text/plain" else "object"}}}
    return {
        "get": {
            "operationId": name,
            "summary": about,
            "responses": {"200": {"description": about, "content": content}, **_errors(*errors)},
        }
    }


def _errors(*statuses: int, of: dict[int, str] | None = None) -> dict[str, Any]:
    known = {
        **ERRORS,
        401: "The token is missing or wrong.",
        403: "The server was started without a token.",
        409: "The files cannot be used; the old ones are still served.",
        **(of or {}),
    }
    return {str(status): {"description": known[status], "content": _json(_ref("Error"))} for status in statuses}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}
