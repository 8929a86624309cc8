"""What an output may have to be, as a plain value: a JSON schema, or what `regex`, `choice`, `sequence` and `repeat` make.

JSON schemas are read as llguidance reads them: properties come in the order in which the schema names them, ``oneOf`` is ``anyOf``, and
a keyword or format that it cannot hold is refused by name. Ours are these rules:

- at the top, {} is any JSON object;
- an object with ``properties`` that says nothing of others takes no others, as in OpenAI's strict mode, unless the schema puts objects
  together (``allOf``, or ``$ref`` beside ``properties``);
- blanks are one space, or a line feed and up to 40 spaces or tabs: a model cannot pad for ever.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

from anabranch.errors import InputError

__all__ = ["MOST_CHARACTERS", "choice", "depth_of", "key_of", "regex", "repeat", "sequence", "text_of"]

# Of a grammar as JSON; OpenAI takes 120,000.
MOST_CHARACTERS = 250_000
# Of objects and lists in each other; OpenAI takes 10. What is deeper may not get through a pipe, which pickles by recursion.
MOST_DEPTH = 200
_REGEX, _CHOICE, _SEQUENCE, _REPEAT = (f"anabranch:{name}" for name in ("regex", "choice", "sequence", "repeat"))
_FORMS = (_REGEX, _CHOICE, _SEQUENCE, _REPEAT)

# Where a schema has options for llguidance; those are ours to give.
_OPTIONS = "x-guidance"
_JSON_OPTIONS = {"whitespace_pattern": r"[ ]?|\n[ \t]{0,40}", "coerce_one_of": True, "lenient": False}
# Where only one text may follow, its tokens are the model's choice all the same.
_LARK_OPTIONS = {"no_forcing": True}
# Where schemas stand in a schema: below these keywords one, a list of them, or one for each name.
_ONE = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
# A bound that leaves its number out, those of the other side, and which way numbers go from the first to the others.
_SIDES = (
    ("exclusiveMinimum", ("maximum", "exclusiveMaximum"), 1),
    ("exclusiveMaximum", ("minimum", "exclusiveMinimum"), -1),
)
_A_LITTLE = 1e-12


def regex(pattern: str) -> dict[str, Any]:
    """For `Sampling.grammar`: the whole output matches ``pattern``, in the syntax of Rust's regex crate, without look-around."""
    return {_REGEX: pattern}


def choice(options: Sequence[str | dict[str, Any]]) -> dict[str, Any]:
    """For `Sampling.grammar`: the output is one of ``options``, each a text, a JSON schema or another form."""
    return {_CHOICE: list(options)}


def sequence(parts: Sequence[str | dict[str, Any]]) -> dict[str, Any]:
    """For `Sampling.grammar`: one part after the other, each a text, a JSON schema or another form."""
    return {_SEQUENCE: list(parts)}


def repeat(part: str | dict[str, Any], least: int = 0, most: int | None = None) -> dict[str, Any]:
    """For `Sampling.grammar`: ``part``, a text, a JSON schema or another form, from ``least`` to ``most`` times; None for no end."""
    return {_REPEAT: [part, least, most]}


def key_of(form: Any) -> str:
    """A form as JSON, by which equal ones are known; the order of an object's properties counts.

    Raises InputError for what is no JSON object, or longer than `MOST_CHARACTERS`, or deeper than `MOST_DEPTH`.
    """
    if not isinstance(form, dict):
        raise InputError(f"a grammar is a JSON schema, which is an object; this is {type(form).__name__}")
    try:
        key = json.dumps(form)
    except RecursionError:
        raise InputError("the grammar is nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise InputError(f"the grammar is no JSON: {error}") from None
    if len(key) > MOST_CHARACTERS:
        raise InputError(
            f"the grammar has {len(key):,} characters as JSON; at most {MOST_CHARACTERS:,} can be followed"
        )
    if depth_of(form) > MOST_DEPTH:
        raise InputError(
            f"the grammar is nested too deeply: at most {MOST_DEPTH} objects and lists in each other can be followed"
        )
    return key


def depth_of(form: Any) -> int:
    """Objects and lists in each other, of what is JSON."""
    depth, level = 0, [form]
    while level := [part for part in level if isinstance(part, dict | list | tuple)]:
        depth += 1
        level = [inner for part in level for inner in (part.values() if isinstance(part, dict) else part)]
    return depth


def text_of(form: dict[str, Any]) -> str:
    """The grammar as llguidance reads it. Raises InputError for a form that is malformed, MissingExtraError without llguidance."""
    try:
        rules = _Rules()
        start = rules.expression(form)
        lines = ["%llguidance " + json.dumps(_LARK_OPTIONS), f"start: {start}", *rules.lines]
        return json.dumps({"grammars": [{"lark_grammar": "\n".join(lines)}]})
    except RecursionError:
        raise InputError("the grammar is nested too deeply") from None


def _name_of(form: Any) -> str | None:
    """Which form it is; None for a JSON schema."""
    if not isinstance(form, Mapping) or len(form) != 1:
        return None
    (name,) = form
    return name if name in _FORMS else None


class _Rules:
    """The rules of a grammar in llguidance's dialect of Lark, in which names of terminals are upper case."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def expression(self, form: Any) -> str:
        """The name of the rule for a form."""
        # A terminal is matched as a whole, rules from terminal to terminal, each as long as it can be: what is regular is one terminal.
        is_regular = _is_regular(form)
        name = f"{'T' if is_regular else 'r'}{len(self.lines)}"
        at = len(self.lines)
        self.lines.append("")
        self.lines[at] = f"{name}: {self._body(form, is_regular)}"
        return name

    def _body(self, form: Any, is_regular: bool) -> str:
        def part(inner: Any) -> str:
            return f"({self._body(inner, True)})" if is_regular else self.expression(inner)

        if isinstance(form, str):
            return json.dumps(form)
        kind = _name_of(form)
        if kind is None:
            return f"%json {json.dumps(_schema(form))}"
        value = form[kind]
        if kind == _REGEX:
            return f"/{_regex(value)}/"
        if kind == _REPEAT:
            repeated, least, most = _repetition(value)
            return f"{part(repeated)}{{{least},{'' if most is None else most}}}"
        if not isinstance(value, list):
            raise InputError(f"grammar: {kind.partition(':')[2]} is {type(value).__name__}; it must be a list")
        if kind == _SEQUENCE:
            return " ".join(map(part, value)) or '""'
        if not value:
            raise InputError("no text matches the grammar: a choice without options")
        return " | ".join(map(part, value))


def _is_regular(form: Any) -> bool:
    if isinstance(form, str):
        return True
    kind = _name_of(form)
    if kind is None:
        return False
    value = form[kind]
    if kind == _REGEX:
        return True
    return all(map(_is_regular, value[:1] if kind == _REPEAT else value)) if isinstance(value, list) else True


def _repetition(value: Any) -> tuple[Any, int, int | None]:
    if isinstance(value, list) and len(value) == 3:
        part, least, most = value
        if isinstance(least, int) and least >= 0 and (most is None or (isinstance(most, int) and most >= least)):
            return part, int(least), None if most is None else int(most)
    raise InputError("grammar: repeat must be a part, the least and the most times it stands, or null for no end")


def _regex(pattern: Any) -> str:
    """A pattern to stand between slashes; ``\\d`` and ``\\w`` are those of ASCII, and anchors say what is so anyway."""
    from anabranch.serving.grammar.library import llguidance

    if not isinstance(pattern, str):
        raise InputError(f"grammar: regex is {type(pattern).__name__}; it must be text")
    return str(llguidance().regex_to_lark(pattern, "dw"))


def _schema(form: Any) -> dict[str, Any]:
    """A schema with our rules, and our options in place of any of its own."""
    if not isinstance(form, dict):
        raise InputError(f"a grammar is a JSON schema, which is an object; this is {type(form).__name__}")
    named = {name: value for name, value in form.items() if name != _OPTIONS}
    if not named:
        named = {"type": "object"}
    named = _changed(named, _beside_whole_numbers)
    return {**(named if _puts_together(named) else _changed(named, _closed)), _OPTIONS: _JSON_OPTIONS}


def _changed(schema: Any, change: Callable[[dict[str, Any]], None]) -> Any:
    """A schema whose parts, and then itself, were changed in place by ``change``; the one that is given stays as it is."""
    if not isinstance(schema, dict):
        return schema
    made = dict(schema)
    for keyword, value in schema.items():
        if keyword in _ONE:
            made[keyword] = _changed(value, change)
        elif keyword in _LISTS and isinstance(value, list):
            made[keyword] = [_changed(part, change) for part in value]
        elif keyword in _MAPS and isinstance(value, dict):
            made[keyword] = {name: _changed(part, change) for name, part in value.items()}
    change(made)
    return made


def _closed(schema: dict[str, Any]) -> None:
    """Objects take no properties but those they name, where they name some and do not say."""
    named, required = schema.get("properties"), schema.get("required", [])
    if isinstance(named, dict) and isinstance(required, list) and "patternProperties" not in schema:
        if all(isinstance(name, str) and name in named for name in required):
            schema.setdefault("additionalProperties", False)


def _beside_whole_numbers(schema: dict[str, Any]) -> None:
    """Where numbers begin behind a whole one and end less than 1 further from 0, the whole one moves a little towards the end.

    llguidance (1.9) would let the whole number itself through: 0 by ``exclusiveMinimum: 0, maximum: 0.5``.
    """
    for left_out, others, sign in _SIDES:
        whole = schema.get(left_out)
        if not _is_bound(whole) or whole != round(whole) or sign * whole < 0:
            continue
        ends = [schema[name] for name in others if _is_bound(schema.get(name))]
        if any(0 < sign * (end - whole) < 1 for end in ends):
            schema[left_out] = whole + sign * max(_A_LITTLE, 4 * math.ulp(whole))


def _is_bound(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**53


def _puts_together(schema: Any) -> bool:
    """Whether objects are put together somewhere, so that one that takes no others would leave out what the rest adds."""
    if not isinstance(schema, dict):
        return False
    if "allOf" in schema or ("properties" in schema and schema.keys() & {"$ref", "anyOf", "oneOf"}):
        return True
    parts = [value for keyword, value in schema.items() if keyword in _ONE]
    parts += [part for keyword in _LISTS if isinstance(schema.get(keyword), list) for part in schema[keyword]]
    parts += [part for keyword in _MAPS if isinstance(schema.get(keyword), dict) for part in schema[keyword].values()]
    return any(map(_puts_together, parts))
