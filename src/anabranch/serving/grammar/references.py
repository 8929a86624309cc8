"""Schemas that point at others, or add to them."""

from typing import Any
from urllib.parse import unquote

from anabranch.errors import InputError

__all__ = ["merge", "resolve"]


def resolve(root: dict[str, Any], pointer: Any, path: str) -> Any:
    """The part of ``root`` that ``pointer`` (``#/$defs/node``) names. Raises InputError for one that leads nowhere or outside."""
    if not isinstance(pointer, str) or not (pointer == "#" or pointer.startswith("#/")):
        raise InputError(
            f"schema: $ref {pointer!r} at {path} is not supported; it must point into the schema (#/$defs/...)"
        )
    found: Any = root
    for step in pointer.split("/")[1:]:
        name = unquote(step).replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and name in found:
            found = found[name]
        elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        else:
            raise InputError(f"schema: $ref {pointer!r} at {path} leads nowhere: there is no {name!r}")
    return found


def merge(left: dict[str, Any], right: Any, assertions: set[str], path: str) -> Any:
    """One schema that says what both say. Raises InputError where one keyword of both cannot be told in one."""
    if right is True or right is False:
        return left if right else False
    if not isinstance(right, dict):
        raise InputError(f"schema: {path} holds {type(right).__name__} where a schema must be")
    result = dict(left)
    for keyword, value in right.items():
        if keyword not in assertions or keyword not in left or left[keyword] == value:
            result[keyword] = value
        elif keyword == "required":
            result[keyword] = list(dict.fromkeys([*left[keyword], *value]))
        elif keyword == "properties" and not left[keyword].keys() & value.keys():
            result[keyword] = {**left[keyword], **value}
        else:
            raise InputError(
                f"schema: keyword {keyword!r} at {path} and again in what it is combined with is not supported"
            )
    return result
