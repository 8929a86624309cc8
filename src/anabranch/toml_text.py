"""Writing TOML: `tomllib` reads, and Python has nothing that writes.

toml_text({"require_key": False, "models": [{"name": "small"}]})
# require_key = false
#
# [[models]]
# name = "small"
"""

import datetime
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from anabranch.errors import InputError
from anabranch.files import check_nesting

__all__ = ["toml_text"]

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_SHORT = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
# Of a block of its own, as it is headed.
_Path = tuple[str, ...]


def toml_text(table: Mapping[str, Any]) -> str:
    """TOML that spells a table, as `anabranch.files.parse_toml` reads it.

    Args:
        table: of texts, numbers, dates, lists and tables. Those in it become blocks (``[name]``), lists of tables ``[[name]]``, and what
            lies in a ``[[name]]`` stands in its lines.

    Raises InputError for what TOML does not have: None, half of a surrogate pair, a name that is no text, what is nested too deeply.
    """
    try:
        check_nesting(table)
    except ValueError as error:
        raise InputError(f"cannot be written as TOML: {error}") from None
    return "".join(f"{line}\n" for line in _block(table, ())).lstrip("\n")


def _block(table: Mapping[str, Any], path: _Path) -> Iterator[str]:
    blocks = {name: value for name, value in table.items() if isinstance(value, Mapping) or _is_blocks(value)}
    lines = [line for name, value in table.items() if name not in blocks for line in _lines({name: value})]
    # One that holds blocks alone is there by their heads.
    if path and (lines or not blocks):
        yield from ("", f"[{_head(path)}]")
    yield from lines
    for name, value in blocks.items():
        if isinstance(value, Mapping):
            yield from _block(value, (*path, name))
            continue
        for one in value:
            yield from ("", f"[[{_head((*path, name))}]]", *_lines(one))


def _is_blocks(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(one, Mapping) for one in value)


def _lines(table: Mapping[str, Any]) -> list[str]:
    return [f"{_name(name)} = {_value(value)}" for name, value in table.items()]


def _head(path: _Path) -> str:
    return ".".join(map(_name, path))


def _name(name: Any) -> str:
    if not isinstance(name, str):
        raise InputError(f"cannot be written as TOML: the name {name!r:.40} is a {type(name).__name__}, not a text")
    return name if _BARE.fullmatch(name) else _text(name)


def _value(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int():
            return str(int(value))
        case float():
            return _float(value)
        case str():
            return _text(value)
        case datetime.datetime() | datetime.date() | datetime.time():
            return value.isoformat()
        case Mapping():
            return f"{{ {', '.join(_lines(value))} }}" if value else "{}"
        case Sequence() if not isinstance(value, bytes | bytearray | memoryview):
            return f"[{', '.join(map(_value, value))}]"
    raise InputError(f"cannot be written as TOML: {value!r:.40} is a {type(value).__name__}")


def _float(value: float) -> str:
    if math.isnan(value):
        return "nan"
    # "1e+16" is TOML, "1e16" too; an infinity is "inf" in both.
    return repr(float(value))


def _text(text: str) -> str:
    """Between quotes; what cannot be seen is spelt out."""
    return f'"{"".join(_SHORT.get(one) or (one if one.isprintable() else _spelt(one)) for one in text)}"'


def _spelt(character: str) -> str:
    number = ord(character)
    if 0xD800 <= number <= 0xDFFF:
        raise InputError(f"cannot be written as TOML: a text has {character!r}, half of a surrogate pair")
    return f"\\u{number:04X}" if number <= 0xFFFF else f"\\U{number:08X}"
