"""JSON schemas as nodes of a `Machine`.

Supported: ``type`` (one or several), ``properties``, ``required``, ``additionalProperties``; ``items``, ``prefixItems``, ``minItems``,
``maxItems``; ``minLength``, ``maxLength``, ``pattern``, ``format`` (`FORMATS`); ``minimum``, ``maximum``, ``exclusiveMinimum``,
``exclusiveMaximum``; ``enum``, ``const``; ``anyOf``, ``oneOf``, ``allOf`` of one; ``$ref`` into the schema itself, recursive or not.
Titles, descriptions and other annotations are passed over. Any other keyword is refused by name.

Every text that is let through is valid, but not every valid text is let through:
- at the top, {} is any JSON object; an object with ``properties`` and no ``additionalProperties`` takes no others (as in OpenAI's strict
  mode), without ``properties`` any; properties come in any order, those that are defined at most once;
- blanks are one space, or a line feed and up to 40 spaces or tabs, after ``{ [ , :`` and before ``} ]``: a model cannot pad for ever;
- integers are digits alone; numbers between bounds have no exponent; a schema without ``type`` has that of its keywords.
``oneOf`` is read as ``anyOf``: a text that matches two branches is let through.
"""

import json
import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from anabranch.errors import InputError
from anabranch.serving.grammar.characters import anything_but, of_expression
from anabranch.serving.grammar.formats import FORMATS
from anabranch.serving.grammar.machine import Machine
from anabranch.serving.grammar.numbers import bounded_integer, bounded_number, integer, number
from anabranch.serving.grammar.pattern import parse
from anabranch.serving.grammar.references import merge, resolve
from anabranch.serving.grammar.text import ALL, json_character, json_literal

__all__ = ["json_schema"]

_MOST_REFERENCES = 500  # different ones

_OF_TYPE = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
}
_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_COMBINERS = ("anyOf", "oneOf", "allOf")
_ANNOTATIONS = {
    "title", "description", "default", "examples", "example", "$schema", "$id", "$comment", "$defs", "definitions", "deprecated",
    "readOnly", "writeOnly",
}  # fmt: skip
_ASSERTIONS = {"type", "enum", "const", "$ref", *_COMBINERS, *(name for names in _OF_TYPE.values() for name in names)}


def json_schema(machine: Machine, schema: dict[str, Any]) -> int:
    """The node of JSON texts that ``schema`` allows, blanks before them included. `Machine.nothing` where there is none.

    Raises InputError for what is not supported; the message names the keyword and where it stands.
    """
    top = {"type": "object"} if not schema else schema
    known: set[str] = set()
    _Builder(Machine(), top, known).find_possible()
    builder = _Builder(machine, top, known, is_trial=False)
    return machine.sequence(builder.blank, builder.value(top, "#"))


class _Builder:
    def __init__(self, machine: Machine, root: dict[str, Any], known: set[str], *, is_trial: bool = True) -> None:
        self.machine, self.root, self.known, self.is_trial = machine, root, known, is_trial
        self.named: dict[
            str, tuple[Any, str]
        ] = {}  # schemas that were referred to, by key: the schema and where it stands
        self.serial = 0
        lines = machine.sequence(machine.literal(b"\n"), machine.repeat(machine.one_of(b" \t"), 0, 40))
        self.blank = machine.choice(machine.sequence(), machine.literal(b" "), lines)
        self.quote = machine.literal(b'"')

    def find_possible(self) -> None:
        """Put into ``known`` the references that lead to a text: as long as one more is found, those that need only known ones."""
        self.value(self.root, "#")
        visited: set[str] = set()
        while left := [key for key in self.named if key not in visited]:
            for key in left:
                self.value(*self.named[key])
            visited.update(left)
            if len(visited) > _MOST_REFERENCES:
                raise InputError(f"schema: more than {_MOST_REFERENCES} references are not supported")
        deepest_first = list(reversed(self.named))
        while True:
            before = len(self.known)
            for key in deepest_first:
                if key not in self.known and self.value(*self.named[key]) != self.machine.nothing:
                    self.known.add(key)
            if len(self.known) == before:
                return

    def refer(self, key: str, schema: Any, path: str) -> int:
        """The node of a schema that may contain itself."""
        self.named.setdefault(key, (schema, path))
        if key not in self.known:
            return self.machine.nothing
        if self.is_trial:
            return self.machine.sequence()
        return self.machine.lazy(("named", key), lambda: self.value(schema, path))

    def value(self, schema: Any, path: str) -> int:
        """The node of ``schema``, which stands at ``path``."""
        if schema is True or schema == {}:
            return self.anything()
        if schema is False:
            return self.machine.nothing
        if not isinstance(schema, dict):
            raise InputError(f"schema: {path} is {type(schema).__name__}; it must be an object, true or false")
        for keyword in schema:
            if keyword not in _ASSERTIONS and keyword not in _ANNOTATIONS:
                raise InputError(f"schema: keyword {keyword!r} at {path} is not supported")
        own = {keyword: value for keyword, value in schema.items() if keyword in _ASSERTIONS}
        combined = self._combined(own, path)
        if combined is not None:
            return combined
        if "enum" in own or "const" in own:
            return self._listed(own, path)
        return self.machine.choice(*(self._of_type(kind, own, path) for kind in _types(own, path)))

    def _combined(self, own: dict[str, Any], path: str) -> int | None:
        """Where the schema is made of others: ``$ref`` and the like."""
        if "$ref" in own:
            pointer = own["$ref"]
            target = resolve(self.root, pointer, path)
            rest = {keyword: value for keyword, value in own.items() if keyword != "$ref"}
            if not rest:
                return self.refer(pointer, target, pointer)
            merged = merge(rest, target, _ASSERTIONS, path)
            return self.refer(json.dumps(merged), merged, path)
        for keyword in _COMBINERS:
            if keyword not in own:
                continue
            branches = own[keyword]
            if not isinstance(branches, list) or not branches:
                raise InputError(f"schema: {keyword} at {path} must be a list with at least one schema")
            if keyword == "allOf" and len(branches) > 1:
                raise InputError(f"schema: keyword 'allOf' at {path} with more than one schema is not supported")
            rest = {name: value for name, value in own.items() if name != keyword}
            return self.machine.choice(
                *(
                    self.value(merge(rest, branch, _ASSERTIONS, path) if rest else branch, f"{path}/{keyword}/{at}")
                    for at, branch in enumerate(branches)
                )
            )
        return None

    def _listed(self, own: dict[str, Any], path: str) -> int:
        beside = own.keys() - {"enum", "const", "type"}
        if beside:
            raise InputError(f"schema: keyword {min(beside)!r} at {path} beside enum or const is not supported")
        if "enum" in own and not isinstance(own["enum"], list):
            raise InputError(f"schema: enum at {path} must be a list")
        values = own.get("enum", [own.get("const")])
        if "const" in own:
            values = [value for value in values if value == own["const"]]
        if "type" in own:
            kinds = _types(own, path)
            values = [value for value in values if any(_is_of(kind, value) for kind in kinds)]
        return self.machine.choice(*(self._constant(value) for value in values))

    def _constant(self, value: Any) -> int:
        machine = self.machine
        if isinstance(value, str):
            return json_literal(machine, value)
        if isinstance(value, list):
            return self._row([self._constant(item) for item in value], b"[", b"]")
        if isinstance(value, dict):
            pairs = [
                machine.sequence(json_literal(machine, name), machine.literal(b":"), self.blank, self._constant(item))
                for name, item in value.items()
            ]
            return self._row(pairs, b"{", b"}")
        return machine.literal(json.dumps(value).encode())

    def _row(self, parts: list[int], opening: bytes, closing: bytes) -> int:
        machine = self.machine
        comma = machine.sequence(machine.literal(b","), self.blank)
        inside = [node for part in parts for node in (comma, part)][1:]
        return machine.sequence(machine.literal(opening), self.blank, *inside, self.blank, machine.literal(closing))

    def _of_type(self, kind: str, own: dict[str, Any], path: str) -> int:
        machine = self.machine
        if kind == "object":
            return self._object(own, path)
        if kind == "array":
            return self._array(own, path)
        if kind == "string":
            return machine.sequence(self.quote, self._characters(own, path), self.quote)
        if kind in ("number", "integer"):
            return _number(machine, own, path, whole=kind == "integer")
        if kind == "boolean":
            return machine.choice(machine.literal(b"true"), machine.literal(b"false"))
        return machine.literal(b"null")

    def anything(self) -> int:
        """Any JSON value."""
        machine = self.machine
        kinds = ("object", "array", "string", "number", "boolean", "null")
        if self.is_trial:
            return machine.sequence()
        return machine.lazy("anything", lambda: machine.choice(*(self._of_type(kind, {}, "#") for kind in kinds)))

    # -- strings

    def _characters(self, own: dict[str, Any], path: str) -> int:
        least, most = _bounds(own, "minLength", "maxLength", path)
        if most is not None and least > most:
            return self.machine.nothing
        if "pattern" in own and "format" in own:
            raise InputError(f"schema: keyword 'pattern' at {path} beside format is not supported")
        if "format" in own:
            if own["format"] not in FORMATS:
                raise InputError(
                    f"schema: format {own['format']!r} at {path} is not supported; there are {', '.join(FORMATS)}"
                )
            expression = parse(FORMATS[own["format"]], whole=True)
        elif "pattern" in own:
            if not isinstance(own["pattern"], str):
                raise InputError(f"schema: pattern at {path} must be a string")
            expression = parse(own["pattern"], whole=False)
        else:
            return self.machine.repeat(json_character(self.machine, ALL), least, most)
        return of_expression(expression).node(self.machine, json_character, least=least, most=most)

    # -- objects and arrays

    def _object(self, own: dict[str, Any], path: str) -> int:
        machine = self.machine
        properties = own.get("properties", {})
        required = own.get("required", [])
        if not isinstance(properties, dict) or not isinstance(required, list):
            raise InputError(f"schema: properties at {path} must be an object and required a list")
        more = own.get("additionalProperties", "properties" not in own)
        other = machine.nothing if more is False else self.value(more, f"{path}/additionalProperties")
        nodes = {name: self.value(schema, f"{path}/properties/{name}") for name, schema in properties.items()}
        for name in required:
            if name not in nodes:
                nodes[name] = self.anything() if "additionalProperties" not in own else other
        if any(nodes[name] == machine.nothing for name in required):
            return machine.nothing
        fields = [
            (machine.sequence(json_literal(machine, name), machine.literal(b":"), self.blank, node), name in required)
            for name, node in nodes.items()
            if node != machine.nothing
        ]
        free = None
        if other != machine.nothing:
            key = anything_but(nodes).node(machine, json_character)
            free = machine.sequence(self.quote, key, self.quote, machine.literal(b":"), self.blank, other)
        return machine.sequence(machine.literal(b"{"), self._fields(fields, free))

    def _fields(self, fields: list[tuple[int, bool]], free: int | None) -> int:
        """What follows the opening brace: (node, whether required) in any order, and ``free`` ones between them."""
        machine, serial = self.machine, self._next()
        needed = sum(1 << at for at, (_, is_required) in enumerate(fields) if is_required)
        comma, end = machine.literal(b","), machine.sequence(self.blank, machine.literal(b"}"))

        def expand(left: int, is_first: bool) -> int:
            options = [
                machine.sequence(node, rest(left & ~(1 << at))) for at, (node, _) in enumerate(fields) if left >> at & 1
            ]
            if free is not None:
                options.append(machine.sequence(free, rest(left)))
            further = machine.sequence(self.blank, machine.choice(*options))
            more = further if is_first else machine.sequence(comma, further)
            return more if left & needed else machine.choice(end, more)

        def rest(left: int, is_first: bool = False) -> int:
            return machine.lazy(("fields", serial, left, is_first), lambda: expand(left, is_first))

        return rest((1 << len(fields)) - 1, True)

    def _array(self, own: dict[str, Any], path: str) -> int:
        machine, serial = self.machine, self._next()
        least, most = _bounds(own, "minItems", "maxItems", path)
        heads = own.get("prefixItems", [])
        if not isinstance(heads, list):
            raise InputError(f"schema: prefixItems at {path} must be a list")
        first = [self.value(schema, f"{path}/prefixItems/{at}") for at, schema in enumerate(heads)]
        item = self.value(own.get("items", True), f"{path}/items")
        # Items end where none can follow.
        ends = next((at for at, node in enumerate(first) if node == machine.nothing), None)
        ends = len(first) if ends is None and item == machine.nothing else ends
        most = ends if most is None else most if ends is None else min(most, ends)
        if most is not None and least > most:
            return machine.nothing
        comma, end = machine.literal(b","), machine.sequence(self.blank, machine.literal(b"]"))
        all_alike = max(least, len(first), 1)  # from here on every place is like the next where there is no most

        def expand(count: int) -> int:
            options = [end] if count >= least else []
            if most is None or count < most:
                node = first[count] if count < len(first) else item
                after = count + 1 if most is not None else min(count + 1, all_alike)
                further = machine.sequence(self.blank, node, rest(after))
                options.append(further if count == 0 else machine.sequence(comma, further))
            return machine.choice(*options)

        def rest(count: int) -> int:
            return machine.lazy(("items", serial, count), lambda: expand(count))

        return machine.sequence(machine.literal(b"["), rest(0))

    def _next(self) -> int:
        self.serial += 1
        return self.serial


def _types(own: dict[str, Any], path: str) -> list[str]:
    """The types that a schema allows: those it names, else those its keywords are about, else all."""
    named = own.get("type")
    if named is None:
        return [kind for kind, keywords in _OF_TYPE.items() if keywords & own.keys()] or list(_TYPES)
    kinds = named if isinstance(named, list) else [named]
    for kind in kinds:
        if kind not in _TYPES:
            raise InputError(f"schema: type {kind!r} at {path} is not supported; there are {', '.join(_TYPES)}")
    return kinds


def _is_of(kind: str, value: Any) -> bool:
    if kind in ("number", "integer"):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and (kind == "number" or float(value).is_integer())
    classes = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
    return isinstance(value, classes[kind])


def _bounds(own: dict[str, Any], least: str, most: str, path: str) -> tuple[int, int | None]:
    for name in (least, most):
        value = own.get(name, 0)
        if not _is_of("integer", value) or value < 0:
            raise InputError(f"schema: {name} at {path} is {value!r}; it must be an integer of at least 0")
    high = own.get(most)
    return int(own.get(least, 0)), None if high is None else int(high)


def _number(machine: Machine, own: dict[str, Any], path: str, *, whole: bool) -> int:
    bounds: dict[str, Decimal] = {}
    for name in sorted(_OF_TYPE["number"] & own.keys()):
        if not _is_of("number", own[name]) or not math.isfinite(own[name]):
            raise InputError(f"schema: {name} at {path} is {own[name]!r}; it must be a number")
        bounds[name] = Decimal(repr(own[name]))
    if not bounds:
        return integer(machine) if whole else number(machine)
    low, open_low = _tighter(bounds.get("minimum"), bounds.get("exclusiveMinimum"), max)
    high, open_high = _tighter(bounds.get("maximum"), bounds.get("exclusiveMaximum"), min)
    if whole:
        first = None if low is None else math.floor(low) + 1 if open_low else math.ceil(low)
        last = None if high is None else math.ceil(high) - 1 if open_high else math.floor(high)
        if first is not None and last is not None and first > last:
            return machine.nothing
        return bounded_integer(machine, first, last)
    if low is not None and high is not None and (low > high or (low == high and (open_low or open_high))):
        return machine.nothing
    return bounded_number(machine, low, high, open_low=open_low, open_high=open_high)


def _tighter(
    inside: Decimal | None, outside: Decimal | None, choose: Callable[[Decimal, Decimal], Decimal]
) -> tuple[Decimal | None, bool]:
    """The tighter of a bound and one that is left out, and whether it is left out."""
    if inside is None or outside is None:
        return (inside, False) if outside is None else (outside, True)
    return choose(inside, outside), choose(inside, outside) == outside
