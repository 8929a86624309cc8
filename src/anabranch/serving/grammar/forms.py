"""Texts that are no JSON, or JSON with text around it, said where a JSON schema is said: `regex`, `choice`, `sequence`, `repeat`."""

from collections.abc import Sequence
from typing import Any

from anabranch.errors import InputError
from anabranch.serving.grammar.characters import of_expression
from anabranch.serving.grammar.machine import Machine
from anabranch.serving.grammar.pattern import parse
from anabranch.serving.grammar.schema import json_schema
from anabranch.serving.grammar.text import utf8_character

__all__ = ["build", "choice", "regex", "repeat", "sequence"]

_REGEX, _CHOICE, _SEQUENCE, _REPEAT = (f"anabranch:{name}" for name in ("regex", "choice", "sequence", "repeat"))


def regex(pattern: str) -> dict[str, Any]:
    """For `Sampling.grammar`: the whole output matches ``pattern`` (`anabranch.serving.grammar.pattern`)."""
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


def build(machine: Machine, form: Any) -> int:
    """The node of a schema or form. Raises InputError for what is neither, or what no text matches."""
    node = _build(machine, form)
    if node == machine.nothing:
        raise InputError("no text matches the grammar")
    return node


def _build(machine: Machine, form: Any) -> int:
    if isinstance(form, str):
        return machine.literal(form.encode("utf-8"))
    if not isinstance(form, dict):
        raise InputError(f"a grammar is a JSON schema, which is an object; this is {type(form).__name__}")
    if len(form) == 1:
        (name, value), *_ = form.items()
        if name == _REGEX:
            return of_expression(parse(value, whole=True)).node(machine, utf8_character)
        if name == _CHOICE:
            return machine.choice(*(_build(machine, option) for option in value))
        if name == _SEQUENCE:
            return machine.sequence(*(_build(machine, part) for part in value))
        if name == _REPEAT:
            part, least, most = value
            return machine.repeat(_build(machine, part), least, most)
    return json_schema(machine, form)
