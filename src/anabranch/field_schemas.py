"""JSON schemas of the fields of configs, for what takes them from elsewhere and describes what it takes."""

from dataclasses import fields
from typing import Any

from pydantic import TypeAdapter

from anabranch.bounds import LARGEST_FLOAT, SMALLEST_FLOAT

__all__ = ["field_schemas"]


def field_schemas(cls: type) -> dict[str, dict[str, Any]]:
    """What each field of a config takes beside null, by name, in the order of the class.

    Args:
        cls: a `configclass` whose fields are numbers, truths and choices of words, or None.

    A schema has ``type`` and ``minimum``, ``maximum``, ``exclusiveMaximum`` of numbers, or ``enum``. Numbers have ends always: those that
    `anabranch.bounds.check_number` sets where the field sets none.
    """
    made = TypeAdapter(cls).json_schema()["properties"]
    return {one.name: _plain(made[one.name]) for one in fields(cls)}


def _plain(schema: dict[str, Any]) -> dict[str, Any]:
    said = next((one for one in schema.get("anyOf", ()) if one["type"] != "null"), schema)
    kept = ("type", "minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "enum")
    found = {name: said[name] for name in kept if name in said}
    if found["type"] != "number":
        return found
    # A number above 0 is one for float32 too.
    if found.get("exclusiveMinimum") == 0:
        found["minimum"] = SMALLEST_FLOAT
        del found["exclusiveMinimum"]
    elif "exclusiveMinimum" not in found:
        found.setdefault("minimum", -LARGEST_FLOAT)
    if "exclusiveMaximum" not in found:
        found.setdefault("maximum", LARGEST_FLOAT)
    return found
