"""Configs: frozen, keyword-only dataclasses that are checked when built, nest, print as JSON and read back equal.

    class TopK(Select, kind="top_k"):
        @configclass
        class Config(Select.Config):
            top_k: int = Field(default=2, ge=1)      # pydantic's Field gives the allowed range

``TopK.Config(top_k=4).build()`` makes a ``TopK``. A part's JSON form carries its ``kind``, so a config that names a
part by its interface (``select: Select.Config``) reads back as the right class (see `anabranch.registry`).
"""

import dataclasses
import datetime
import difflib
import json
import re
import types
import typing
from collections.abc import Iterator
from typing import Any, ClassVar, Self, TypeVar, dataclass_transform

import pydantic
from pydantic import Field
from pydantic.fields import FieldInfo

from anabranch.bounds import Repeats, Seed, Size, check_number, shown
from anabranch.errors import ConfigError
from anabranch.files import MOST_NESTED, parse_toml
from anabranch.registry import kinds, resolve

__all__ = [
    "Config",
    "Field",
    "Part",
    "Repeats",
    "Seed",
    "Size",
    "configclass",
    "from_dict",
    "override",
    "parse_assignment",
    "to_dict",
]

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
    """Base of what a config builds. ``family`` is the seam it fits, ``kind`` its short name there (see `registry`).

    ``default`` of an interface is the kind that is meant where a config names none.
    """

    family: ClassVar[str | None] = None
    kind: ClassVar[str | None] = None
    default_kind: ClassVar[str | None] = None
    Config: ClassVar[Any] = Config

    def __init_subclass__(
        cls, *, family: str | None = None, kind: str | None = None, default: str | None = None, **kwargs: Any
    ) -> None:
        super().__init_subclass__(**kwargs)
        if family is not None:
            cls.family, cls.default_kind = family, default
        cls.kind = kind
        if "Config" not in vars(cls):  # no fields of its own: it still needs a class that builds it and not its base
            names = {"__module__": cls.__module__, "__qualname__": f"{cls.__qualname__}.Config"}
            cls.Config = configclass(type("Config", (cls.Config,), names))
        cls.Config.owner = cls


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field, Field))
def configclass(cls: type[T]) -> type[T]:
    """Make ``cls`` a frozen, keyword-only, pydantic-checked dataclass whose errors are `ConfigError`."""
    settings = pydantic.ConfigDict(extra="forbid", strict=True, validate_default=True)
    _narrow(cls)
    made = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=settings)(cls)
    checked_init = made.__init__

    def __init__(self: Any, **values: Any) -> None:  # noqa: N807
        for name, value in values.items():
            _check_bounds(type(self), name, value)
        try:
            checked_init(self, **values)
        except pydantic.ValidationError as error:
            raise ConfigError("; ".join(_explain(type(self), item) for item in error.errors())) from None

    made.__init__ = __init__  # type: ignore[method-assign]
    return made  # type: ignore[return-value]


def _narrow(cls: type) -> None:
    """Let the limits of a field's default hold beside those of its type: of ``dim: Size = Field(default=128, ge=2)`` pydantic takes Size's
    ``ge`` alone."""
    annotations = vars(cls).get("__annotations__", {})
    for name, annotation in annotations.items():
        default = vars(cls).get(name)
        if isinstance(default, FieldInfo) and default.metadata and typing.get_origin(annotation) is typing.Annotated:
            annotations[name] = typing.Annotated[annotation, *default.metadata]


def _check_bounds(cls: Any, name: str, value: Any) -> None:
    """Raise ConfigError for numbers that no field takes; pydantic tells those that only this field does not."""
    field = cls.__pydantic_fields__.get(name)
    limits = [] if field is None else [*field.metadata, *_inner_limits(field.annotation)]
    if isinstance(value, int) and value > 0 and any(hasattr(limit, "le") or hasattr(limit, "lt") for limit in limits):
        return
    check_number(name, value, is_positive=any(getattr(limit, "gt", None) == 0 for limit in limits))


def _inner_limits(annotation: Any) -> list[Any]:
    """Limits of what a container holds: those of ``Annotated[float, Field(gt=0)]`` in a tuple of them."""
    found = [
        limit for field in getattr(annotation, "__metadata__", ()) for limit in getattr(field, "metadata", [field])
    ]
    return found + [limit for inner in typing.get_args(annotation) for limit in _inner_limits(inner)]


# What pydantic calls the kinds of values, and what who writes a config does.
_WORDS = {
    "a valid integer": "an integer",
    "a valid number": "a number",
    "a valid boolean": "true or false",
    "a valid string": "text",
    "a valid tuple": "a list",
    "a valid list": "a list",
    "a valid dictionary": "a table",
}


def _explain(cls: type, item: Any) -> str:
    """One pydantic complaint as: field, value, what is allowed."""
    if item["type"] == "value_error":  # raised by a __post_init__ of ours: already a full sentence
        return str(item["ctx"]["error"])
    name = ".".join(str(part) for part in item["loc"]) or _label(cls)
    if item["type"] == "unexpected_keyword_argument":
        return _unknown(name, [field.name for field in dataclasses.fields(cls)], _label(cls))
    if item["type"] == "missing":
        return f"{name} is missing in {_label(cls)}"
    message = item["msg"]
    if message.startswith("Input should be "):
        wanted = message.removeprefix("Input should be ")
        return f"{name} is {shown(item['input'])}; it must be {_WORDS.get(wanted, wanted)}"
    # A length or a pattern: "tuple should have at least 1 item after validation, not 0".
    of_what = re.fullmatch(r"\w+ should (.*?)(?: after validation, not .*)?", message)
    said = f"; it must {of_what[1]}" if of_what else f": {message[0].lower()}{message[1:]}"
    return f"{name} is {shown(item['input'])}{said}"


def _label(cls: type) -> str:
    """What errors call a config: the name of what it is of, as Python has it; of a part of a file, whose class nobody sees, in words."""
    name = cls.__qualname__.removesuffix(".Config").rpartition(".")[2] or cls.__qualname__
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name.removesuffix("Config")).lower()
    return f"the {words} config" if name.endswith("Config") and words else cls.__qualname__.removesuffix(".Config")


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


def completed(recorded: Any, current: Any) -> Any:
    """``recorded``, an older JSON form of the config ``current``, with the fields that came later, at their defaults.

    Only fields of a config class can come later: keys of a dict, such as the domains of a mixture, are what somebody wrote.
    """
    if isinstance(current, Config) and isinstance(recorded, dict):
        cls: Any = type(current)
        kind = getattr(current.owner, "kind", None)
        if kind and recorded.get("kind") != kind:
            return recorded
        later = {}
        for field in dataclasses.fields(cls):
            if field.name in recorded:
                later[field.name] = completed(recorded[field.name], getattr(current, field.name))
            elif not cls.__pydantic_fields__[field.name].is_required():
                later[field.name] = _get(cls, {}, field.name)
        return {**recorded, **later}
    if isinstance(current, dict) and isinstance(recorded, dict):
        return {key: completed(value, current[key]) if key in current else value for key, value in recorded.items()}
    if isinstance(current, list | tuple) and isinstance(recorded, list) and len(current) == len(recorded):
        return [completed(*pair) for pair in zip(recorded, current, strict=True)]
    return recorded


def differences(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Dotted path of every field that differs between two configs (or their JSON forms), with both values (None where absent).

    Values are the same if they are written the same in JSON: 1, 1.0 and true are three.
    """
    return dict(_differences(to_dict(old), to_dict(new), ""))


def _differences(old: Any, new: Any, path: str) -> Iterator[tuple[str, tuple[Any, Any]]]:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        if json.dumps(old, sort_keys=True) != json.dumps(new, sort_keys=True):
            yield path, (old, new)
        return
    for name in [*old, *(name for name in new if name not in old)]:
        here = f"{path}.{name}" if path else str(name)
        if name in old and name in new:
            yield from _differences(old[name], new[name], here)
        else:
            yield here, (old.get(name), new.get(name))


def from_dict(cls: type[T], data: Any, path: str = "") -> T:
    """Read a config back from the form `to_dict` gives.

    Raises ConfigError that names the dotted path of the offending field.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{path or _label(cls)} is {shown(data)}; it must be a table of fields")
    cls = _class_of(cls, data, path)
    values = {name: value for name, value in data.items() if name != "kind"}
    hints = _hints(cls)
    for name in values:
        if name not in hints:
            raise ConfigError(_prefixed(path, _unknown(name, list(hints), _label(cls)), hints))
    parsed = {name: _value(hints[name], value, f"{path}.{name}" if path else name) for name, value in values.items()}
    try:
        return cls(**parsed)
    except ConfigError as error:
        raise ConfigError(_prefixed(path, str(error), hints)) from None


def _class_of(cls: Any, data: dict[str, Any], path: str) -> Any:
    """The config class of ``data`` where ``cls`` is asked for: that of its kind, or ``cls`` if it names none."""
    owner, kind = cls.owner, data.get("kind")
    family = getattr(owner, "family", None)
    if kind is None and family is not None and owner.kind is None:
        kind = owner.default_kind
    if kind is None:
        if family is not None and "family" in vars(owner) and owner.kind is None:  # an interface, nothing to build
            raise ConfigError(f"{path or _label(cls)} needs a kind of {family}; known: {', '.join(kinds(family))}")
        return cls
    if family is None:
        raise ConfigError(f"{path or _label(cls)} has no field 'kind' (got {shown(kind)})")
    if not isinstance(kind, str):
        raise ConfigError(
            f"{path or _label(cls)} has kind {shown(kind)}; it must be one of: {', '.join(kinds(family))}"
        )
    try:
        made: Any = owner if kind == owner.kind else resolve(family, kind)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}" if path else str(error)) from None
    return made.Config


def _prefixed(path: str, message: str, fields: Any) -> str:
    """``message`` with where it happened: joined to the field's name if the message begins with one."""
    if not path:
        return message
    return f"{path}.{message}" if re.split(r"[ .]", message, maxsplit=1)[0] in fields else f"{path}: {message}"


def _hints(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _value(hint: Any, value: Any, path: str) -> Any:
    """Turn JSON ``value`` into what ``hint`` says: configs from dicts, tuples from lists."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        fitting = next((arg for arg in args if _fits(arg, value)), None)
        return value if fitting is None else _value(fitting, value, path)
    if origin in (tuple, list) and isinstance(value, list | tuple):
        items = zip(_item_hints(hint, value), value, strict=False)
        parsed = [_value(item_hint, item, f"{path}.{place}") for place, (item_hint, item) in enumerate(items)]
        return origin([*parsed, *value[len(parsed) :]])  # a wrong length is for pydantic to explain
    if origin in (tuple, list):
        form = f", in TOML [[{path}]] or [{{...}}, {{...}}]" if isinstance(value, dict) else ""
        raise ConfigError(f"{path} is {shown(value)}; it must be a list{form}")
    if origin is dict and isinstance(value, dict):
        return {key: _value(args[1], item, f"{path}.{key}") for key, item in value.items()}
    if _is_config(hint) and not isinstance(value, hint):
        return from_dict(hint, value, path)
    return value


def _is_config(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Config)


def _item_hints(hint: Any, items: Any) -> Any:
    """The type of each item of a tuple or list of type ``hint``."""
    args = typing.get_args(hint) or (Any,)
    one_type = typing.get_origin(hint) is not tuple or args[-1] is Ellipsis
    return args[:1] * len(items) if one_type else args


def _fits(hint: Any, value: Any) -> bool:
    """Whether a JSON table or list can be of ``hint`` (scalars are for pydantic to tell)."""
    if isinstance(value, dict):
        return _is_config(hint) or typing.get_origin(hint) is dict
    return isinstance(value, list | tuple) and typing.get_origin(hint) in (tuple, list)


def parse_assignment(text: str) -> tuple[str, Any]:
    """Split ``path=value``; the value is read as TOML, and as a plain string where it is not TOML.

    ``True`` and ``False`` are read as TOML's ``true`` and ``false``. ``none`` and ``null`` are None, which `override` takes for the choice
    ``none`` of a field that has it and cannot be None. Raises ConfigError if there is no ``=`` or no path.
    """
    path, separator, raw = text.partition("=")
    if not separator or not path.strip():
        raise ConfigError(f"cannot read {text!r}; write path=value, e.g. model.feed_forward.top_k=4")
    if raw.strip() in ("none", "null", "None"):
        return path.strip(), None
    if raw.strip() in ("True", "False"):
        # As Python writes them.
        return path.strip(), raw.strip() == "True"
    try:
        value = parse_toml(f"value = {raw}")["value"]
    except ValueError:
        return path.strip(), raw.strip()
    # Configs hold what JSON holds: 2024-05-01 and 12:30 stay the text they are.
    return path.strip(), raw.strip() if isinstance(value, datetime.date | datetime.time) else value


def override(config: T, assignments: dict[str, Any]) -> T:
    """A copy of ``config`` with fields set by dotted path, in order, e.g. ``{"model.feed_forward.top_k": 4}``.

    A name that holds a dot is written in quotes, as in TOML: ``data.corpus.domains."v1.0".weight``.

    Setting ``...kind`` swaps the part and keeps the fields that the new one also has. A path through a part
    that is None starts it from its defaults. Raises ConfigError for an unknown path (with the nearest name) or a value
    out of range.
    """
    data = to_dict(config)
    for path, value in assignments.items():
        names = _names(path)
        if len(names) > MOST_NESTED:
            raise ConfigError(
                f"cannot set {shown(path)}: that is {len(names):,} names; a path has at most {MOST_NESTED}"
            )
        data = _assign(type(config), data, names, value, path)
    # A JSON round trip proves that whatever was set can be saved beside a checkpoint; dates of TOML are the text they are.
    return from_dict(type(config), json.loads(json.dumps(data, default=str)))


def _names(path: str) -> list[str]:
    """The names in a dotted path, those in quotes without them."""
    if '"' not in path:
        return path.split(".")
    found = re.findall(r'("(?:[^"\\]|\\.)*"|[^.]*)(?:\.|$)', path)[: None if path.endswith(".") else -1]
    try:
        return [json.loads(name) if name.startswith('"') else name for name in found]
    except ValueError:
        raise ConfigError(f"cannot read the path {path!r}; quote names as in TOML") from None


def quoted(name: str) -> str:
    """``name`` as it is written in a dotted path: in quotes where it would be read as another."""
    return name if re.fullmatch(r'[^."]+', name) else json.dumps(name, ensure_ascii=False)


def _assign(hint: Any, node: Any, names: list[str], value: Any, path: str, seen: str = "") -> Any:
    """JSON ``node`` of type ``hint``, which lies at ``seen``, with what ``names``, the end of ``path``, leads to set to ``value``."""
    if not names:
        return _none_of(hint) if value is None else value
    name, *rest = names
    here = f"{seen}.{quoted(name)}" if seen else quoted(name)
    hint = _within(hint, node)
    if _is_config(hint) and isinstance(node, dict | None):
        node = node or {}
        if name == "kind" and not rest:
            return _with_kind(hint, node, value, seen)
        cls = _class_of(hint, node, seen)
        hints = _hints(cls)
        if name not in hints:
            raise ConfigError(f"cannot set {path}: " + _unknown(name, list(hints), seen or _label(cls)))
        return {**node, name: _assign(hints[name], _get(cls, node, name), rest, value, path, here)}
    args = typing.get_args(hint)
    if node is None and typing.get_origin(hint) is dict:
        node = {}  # a field without a default, of a part that is being put together
    if isinstance(node, dict):
        return {**node, name: _assign(args[1] if args else Any, node.get(name), rest, value, path, here)}
    if isinstance(node, list):
        if not name.isdigit() or int(name) >= len(node):
            allowed = f"use {seen}.0 to {seen}.{len(node) - 1}" if node else f"set {seen} as a whole"
            raise ConfigError(f"cannot set {path}: {seen} has {len(node)} entries; {allowed}")
        place = int(name)
        item = _assign(_item_hints(hint, node)[place], node[place], rest, value, path, here)
        return [*node[:place], item, *node[place + 1 :]]
    raise ConfigError(f"cannot set {path}: {seen} is {shown(node)}, which has no fields; set {seen} itself")


def _none_of(hint: Any) -> str | None:
    """What ``none`` means for a field of type ``hint``: nothing, or the choice of that name where nothing is no choice."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    chosen = any(
        typing.get_origin(member) is typing.Literal and "none" in typing.get_args(member) for member in members
    )
    return "none" if chosen and type(None) not in members else None


def _within(hint: Any, node: Any) -> Any:
    """The member of a union that ``node`` is of; a config where it is None."""
    if typing.get_origin(hint) not in (types.UnionType, typing.Union):
        return hint
    fits = _is_config if node is None else lambda arg: _fits(arg, node)
    return next((arg for arg in typing.get_args(hint) if fits(arg)), hint)


def _get(cls: Any, node: dict[str, Any], name: str) -> Any:
    """The value of a field in JSON ``node``, or its default."""
    field = cls.__pydantic_fields__[name]
    if name in node or field.is_required():
        return node.get(name)
    return to_dict(field.get_default(call_default_factory=True))


def _with_kind(cls: Any, node: dict[str, Any], kind: Any, path: str) -> dict[str, Any]:
    """``node`` turned into another kind: fields that the new class lacks are dropped."""
    known = _hints(_class_of(cls, {"kind": kind}, path))
    return {"kind": kind, **{name: value for name, value in node.items() if name in known}}
