"""Values of parameters that are written as they are, not as JSON: which of them are JSON all the same, a tool's schema says."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["is_text", "json_value", "listed"]

# Schemas within schemas, references followed; of what is nested deeper nothing is known.
_DEEPEST = 32
_WORDS = {"True": "true", "False": "false", "None": "null"}


def json_value(text: str, name: str, parameters: Any) -> str:
    """A value as JSON: as it is where the schema says that it is no text and it can be read as JSON, else as a text.

    Args:
        text: as it was written.
        name: of the parameter.
        parameters: the schema of all, in which ``$ref`` is looked up.
    """
    # The form puts a line feed before and after it.
    text = text.removeprefix("\n").removesuffix("\n")
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    schema = properties.get(name) if isinstance(properties, Mapping) else None
    if is_text(schema, parameters):
        is_null = "null" in _Kinds(parameters).of(schema) and text.strip() in ("null", "None")
        return "null" if is_null else json.dumps(text, ensure_ascii=False)
    plain = _WORDS.get(text.strip(), text.strip())
    try:
        json.loads(plain, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    return plain


def is_text(schema: Any, parameters: Any) -> bool:
    """Whether `json_value` takes a value of this schema for the text that it is.

    Args:
        schema: of one parameter.
        parameters: the schema of all, in which ``$ref`` is looked up.
    """
    kinds = _Kinds(parameters).of(schema)
    return not kinds or "string" in kinds


def listed(schema: Any, parameters: Any) -> list[Any] | None:
    """The values that a schema lists (``enum``, ``const``, null), also by reference or as alternatives; None where it lists none.

    Args:
        schema, parameters: see `is_text`.
    """
    return _Kinds(parameters).listed(schema)


class _Kinds:
    """The types that values of a schema may have.

    Args:
        root: in which ``#/...`` is looked up.
    """

    def __init__(self, root: Any) -> None:
        self._root = root
        self._followed: set[str] = set()

    def of(self, schema: Any, depth: int = 0) -> frozenset[str]:
        """Names of types; "value" for any but text; none where the schema does not say, or allows anything."""
        if not isinstance(schema, Mapping) or depth > _DEEPEST:
            return frozenset()
        kinds = schema.get("type")
        if isinstance(kinds, str):
            return frozenset((kinds,))
        if isinstance(kinds, list):
            return frozenset(kind for kind in kinds if isinstance(kind, str))
        listed = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if isinstance(listed, list):
            return frozenset(map(_kind, listed))
        for name in ("anyOf", "oneOf"):
            if isinstance(parts := schema.get(name), list):
                return self._any(parts, depth)
        # Each of them holds, so what one says is enough.
        parts = schema.get("allOf")
        each = [*(parts if isinstance(parts, list) else ()), self._found(schema.get("$ref"))]
        for part in each:
            if kinds_of_part := self.of(part, depth + 1):
                return kinds_of_part
        known = {"properties": "object", "additionalProperties": "object", "items": "array", "prefixItems": "array"}
        return frozenset(kind for name, kind in known.items() if name in schema)

    def listed(self, schema: Any, depth: int = 0) -> list[Any] | None:
        """See the function."""
        if not isinstance(schema, Mapping) or depth > _DEEPEST:
            return None
        if isinstance(values := schema.get("enum"), list):
            return values
        if "const" in schema or schema.get("type") == "null":
            return [schema.get("const")]
        for name in ("anyOf", "oneOf"):
            if isinstance(parts := schema.get(name), list):
                each = [self.listed(part, depth + 1) for part in parts]
                return None if None in each else [value for values in each for value in values or ()]
        parts = schema.get("allOf")
        among = [*(parts if isinstance(parts, list) else ()), self._found(schema.get("$ref"))]
        return next((found for part in among if (found := self.listed(part, depth + 1)) is not None), None)

    def _any(self, parts: Sequence[Any], depth: int) -> frozenset[str]:
        kinds = [self.of(part, depth + 1) for part in parts]
        return frozenset().union(*kinds) if all(kinds) else frozenset()

    def _found(self, reference: Any) -> Any:
        """What a reference is to, the first time."""
        if not isinstance(reference, str) or not reference.startswith("#") or reference in self._followed:
            return None
        found = self._root
        for part in reference[1:].split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            found = found.get(name) if isinstance(found, Mapping) else None
        self._followed.add(reference)
        return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _kind(value: Any) -> str:
    return "string" if isinstance(value, str) else "null" if value is None else "value"
