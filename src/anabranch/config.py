"""Configs: frozen, keyword-only dataclasses that are checked when built, nest, print as JSON and read back equal.

    class TopK(Select, kind="top_k"):
        @configclass
        class Config(Select.Config):
            top_k: int = Field(default=2, ge=1)      # pydantic's Field gives the allowed range

``TopK.Config(top_k=4).build()`` makes a ``TopK``. A part's JSON form carries its ``kind``, so a config that names a part by
its interface (``select: Select.Config``) reads back as the right class (see `anabranch.registry`).
"""

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from typing import Any, ClassVar, Self, TypeVar, dataclass_transform

import pydantic
from pydantic import Field

from anabranch.errors import ConfigError
from anabranch.registry import resolve

__all__ = ["Config", "Field", "Part", "configclass", "from_dict", "override", "parse_assignment", "to_dict"]

T = TypeVar("T")


class Config:
    """Base of every config. ``build`` makes the object that owns the config class."""

    owner: ClassVar[Any] = None

    def build(self, *args: Any, **kwargs: Any) -> Any:
        """Make the owner of this config, passing on what it needs beside the config."""
        return self.owner(self, *args, **kwargs)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


class Part:
    """Base of what a config builds. ``family`` is the seam it fits, ``kind`` its short name there (see the registry)."""

    family: ClassVar[str | None] = None
    kind: ClassVar[str | None] = None
    Config: ClassVar[Any] = Config

    def __init_subclass__(cls, *, family: str | None = None, kind: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if family is not None:
            cls.family = family
        cls.kind = kind
        if "Config" in vars(cls):
            cls.Config.owner = cls


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field, Field))
def configclass(cls: type[T]) -> type[T]:
    """Make ``cls`` a frozen, keyword-only, pydantic-checked dataclass whose errors are `ConfigError`."""
    settings = pydantic.ConfigDict(extra="forbid", strict=True, validate_default=True)
    made = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=settings)(cls)
    checked_init = made.__init__

    def __init__(self: Any, **values: Any) -> None:  # noqa: N807
        try:
            checked_init(self, **values)
        except pydantic.ValidationError as error:
            raise ConfigError("; ".join(_explain(type(self), item) for item in error.errors())) from None

    made.__init__ = __init__  # type: ignore[method-assign, assignment]
    return made  # type: ignore[return-value]


def _explain(cls: type, item: Any) -> str:
    """One pydantic complaint as: field, value, what is allowed."""
    if item["type"] == "value_error":  # raised by a __post_init__ of ours: already a full sentence
        return str(item["ctx"]["error"])
    name = ".".join(str(part) for part in item["loc"]) or _label(cls)
    if item["type"] == "unexpected_keyword_argument":
        return _unknown(name, [field.name for field in dataclasses.fields(cls)], _label(cls))
    if item["type"] == "missing":
        return f"{name} is missing in {_label(cls)}"
    message = item["msg"].removeprefix("Input should be ").replace("a valid ", "a ")
    return f"{name} is {item['input']!r}; it must be {message}"


def _label(cls: type) -> str:
    return cls.__qualname__.removesuffix(".Config")


def _unknown(name: str, known: list[str], where: str) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    return f"{where} has no field {name!r}; {hint}"


def to_dict(config: Any) -> Any:
    """Plain JSON-ready form of a config: dicts, lists and scalars, with the ``kind`` of each part."""
    if isinstance(config, Config):
        kind = getattr(config.owner, "kind", None)
        fields = {field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)}  # type: ignore[arg-type]
        return {"kind": kind, **fields} if kind else fields
    if isinstance(config, dict):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_dict(value) for value in config]
    return config


def from_dict(cls: type[T], data: Any, path: str = "") -> T:
    """Read a config back from the form `to_dict` gives.

    Raises ConfigError that names the dotted path of the offending field.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{path or _label(cls)} is {data!r}; it must be a table of fields")
    values = dict(data)
    kind = values.pop("kind", None)
    if kind is not None:
        family = getattr(getattr(cls, "owner", None), "family", None)
        if family is None:
            raise ConfigError(f"{path or _label(cls)} takes no 'kind' (got {kind!r})")
        cls = resolve(family, kind).Config
    hints = _hints(cls)
    for name in values:
        if name not in hints:
            raise ConfigError(_prefixed(path, _unknown(name, list(hints), _label(cls))))
    parsed = {name: _value(hints[name], value, f"{path}.{name}" if path else name) for name, value in values.items()}
    try:
        return cls(**parsed)
    except ConfigError as error:
        raise ConfigError(_prefixed(path, str(error))) from None


def _prefixed(path: str, message: str) -> str:
    return f"{path}: {message}" if path else message


def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}  # type: ignore[arg-type]


def _value(hint: Any, value: Any, path: str) -> Any:
    """Turn JSON ``value`` into what ``hint`` says: configs from dicts, tuples from lists."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        config = next((arg for arg in args if _is_config(arg)), None)
        inner = config if config and isinstance(value, dict) else next(arg for arg in args if arg is not type(None))
        return _value(inner, value, path) if isinstance(value, dict | list) else value
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_value(args[0], item, f"{path}.{position}") for position, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _value(args[1], item, f"{path}.{key}") for key, item in value.items()}
    if _is_config(hint) and not isinstance(value, hint):
        return from_dict(hint, value, path)
    return value


def _is_config(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Config)


def parse_assignment(text: str) -> tuple[str, Any]:
    """Split ``path=value``; the value is read as TOML, and as a plain string where it is not TOML.

    Raises ConfigError if there is no ``=`` or no path.
    """
    path, separator, raw = text.partition("=")
    if not separator or not path.strip():
        raise ConfigError(f"cannot read {text!r}; write path=value, e.g. model.feed_forward.top_k=4")
    if raw.strip() in ("none", "null", "None"):
        return path.strip(), None
    try:
        return path.strip(), tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        return path.strip(), raw.strip()


def override(config: T, assignments: dict[str, Any]) -> T:
    """A copy of ``config`` with fields set by dotted path, e.g. ``{"model.feed_forward.top_k": 4}``.

    Setting ``...kind`` swaps the part and keeps the fields that the new one also has. Raises ConfigError for an unknown
    path (with the nearest name) or a value out of range.
    """
    data = to_dict(config)
    for path, value in assignments.items():
        _assign(data, path, value)
    # A JSON round trip proves that whatever was set can be saved beside a checkpoint.
    return from_dict(type(config), json.loads(json.dumps(data)))


def _assign(data: Any, path: str, value: Any) -> None:
    *parents, last = path.split(".")
    node, seen = data, ""
    for name in parents:
        node = _child(node, name, seen, path)
        seen = f"{seen}.{name}" if seen else name
    if isinstance(node, list):
        _child(node, last, seen, path)
        node[int(last)] = value
    elif last == "kind" and isinstance(node, dict):
        _swap_kind(node, value)
    else:
        _child(node, last, seen, path)
        node[last] = value


def _child(node: Any, name: str, seen: str, path: str) -> Any:
    if isinstance(node, dict):
        if name not in node:
            raise ConfigError(f"cannot set {path}: " + _unknown(name, list(node), seen or "the config"))
        return node[name]
    if isinstance(node, list):
        if not name.isdigit() or int(name) >= len(node):
            raise ConfigError(f"cannot set {path}: {seen} has {len(node)} entries; use {seen}.0 to {seen}.{len(node) - 1}")
        return node[int(name)]
    raise ConfigError(f"cannot set {path}: {seen} is {node!r}, which has no fields; set {seen}.kind first")


def _swap_kind(node: dict[str, Any], kind: Any) -> None:
    """Change the kind in place; fields the new class lacks are dropped when its class is known from the old kind."""
    from anabranch.registry import BUILTIN

    families = [family for family, table in BUILTIN.items() if node.get("kind") in table and kind in table]
    if families:
        known = _hints(resolve(families[0], kind).Config)
        for name in [name for name in node if name not in known and name != "kind"]:
            del node[name]
    node["kind"] = kind
