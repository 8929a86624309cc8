"""The ways in which models write calls of tools, by name: how each is parsed, and demanded by a grammar. `Dialect` is that of one model."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from anabranch.data.tokenizer import Tokenizer
from anabranch.errors import InputError
from anabranch.serving import grammar
from anabranch.serving.chat.events import Parser
from anabranch.serving.chat.harmony import HarmonyParser
from anabranch.serving.chat.marked import DeepSeekParser, MistralParser, XmlParser, names_of
from anabranch.serving.chat.parser import ToolParser
from anabranch.serving.chat.pythonic import PythonicParser, python_text
from anabranch.serving.chat.reasoning import Reasoning
from anabranch.serving.chat.values import is_text, listed
from anabranch.serving.core.request import Preamble

__all__ = ["FORMATS", "Dialect", "ToolFormat"]

Offered = Sequence[Mapping[str, Any]]
# In one answer that must be calls.
_MOST_CALLS = 16
# Text without a closing tag of a parameter.
_NO_TAG = r"([^<]|<+([^</]|/[^p<]))*"


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How calls are written.

    Attributes:
        parser: makes a parser for tools that are offered, and for what the prompt has begun of the answer's turn and is no reasoning.
        text: a call by its name and the JSON of its arguments.
        call: the same as the form of a grammar, by the tool's function; None where no grammar holds it.
        frame: what stands before the first call, between two and after the last.
        is_always: answers are read so even where no tools are offered.
        is_single: an answer has one call at the most.
        opening: what an answer that must be calls may begin with, behind reasoning.
    """

    parser: Callable[[Offered, str], Parser]
    text: Callable[[str, str], str]
    call: Callable[[Mapping[str, Any]], Any] | None = None
    frame: tuple[str, str, str] = ("", "\n", "")
    is_always: bool = False
    is_single: bool = False
    opening: str = ""

    def written(self, calls: Sequence[tuple[str, str]]) -> str:
        """The text of calls, each a name and the JSON of its arguments."""
        before, between, after = self.frame
        return before + between.join(self.text(name, arguments) for name, arguments in calls) + after

    def demanded(self, tools: Offered, *, is_parallel: bool) -> dict[str, Any] | None:
        """The grammar of one call of ``tools``, or with ``is_parallel`` up to 16; None where no grammar holds this form."""
        if self.call is None:
            return None
        before, between, after = self.frame
        one = grammar.choice([self.call(tool["function"]) for tool in tools])
        next_one = grammar.sequence([between, one]) if between else one
        more = [grammar.repeat(next_one, 0, _MOST_CALLS - 1)] if is_parallel and not self.is_single else []
        form = grammar.sequence([*([before] if before else []), one, *more, *([after] if after else [])])
        return grammar.sequence([grammar.repeat(self.opening, 0, 1), form]) if self.opening else form


def _json_call(begin: str, name_end: str, end: str) -> Callable[[Mapping[str, Any]], Any]:
    """A grammar of calls whose arguments are JSON: ``begin``, the name, ``name_end``, the arguments, ``end``."""

    def made(function: Mapping[str, Any]) -> Any:
        return grammar.sequence(
            [f"{begin}{function['name']}{name_end}", _parameters(function), *([end] if end else [])]
        )

    return made


def _json_text(begin: str, name_end: str, end: str) -> Callable[[str, str], str]:
    return lambda name, arguments: f"{begin}{name}{name_end}{arguments}{end}"


def _parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a tool's arguments; its references stay within it."""
    parameters = dict(function.get("parameters") or {"type": "object", "properties": {}})
    parameters.setdefault("type", "object")
    return parameters


def _json_format(
    parser: Callable[[Offered, str], Parser],
    parts: tuple[str, str, str],
    frame: tuple[str, str, str] = ("", "\n", ""),
    **more: Any,
) -> ToolFormat:
    return ToolFormat(parser, _json_text(*parts), _json_call(*parts), frame, **more)


def _xml_call(function: Mapping[str, Any]) -> Any:
    """Required parameters in their order, the others perhaps. Raises InputError for a schema that has no plain list of them."""
    schema = _parameters(function)
    properties, required = schema.get("properties") or {}, schema.get("required") or []
    if not isinstance(properties, Mapping) or not isinstance(required, list):
        raise InputError("a call that is demanded of this model needs parameters with properties by name")
    parts: list[Any] = [f"<tool_call>\n<function={function['name']}>\n"]
    shared: dict[str, Any] = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    for name, inner in properties.items():
        value = _xml_texts(inner, schema) if is_text(inner, schema) else {**inner, **shared}
        part = grammar.sequence([f"<parameter={name}>\n", value, "\n</parameter>\n"])
        parts.append(part if name in required else grammar.repeat(part, 0, 1))
    return grammar.sequence([*parts, "</function>\n</tool_call>"])


def _xml_texts(inner: Any, schema: Mapping[str, Any]) -> Any:
    """The texts that a parameter may be, which stand there without quotes."""
    values = listed(inner, schema)
    texts = [value if isinstance(value, str) else "null" for value in values or () if isinstance(value, str | None)]
    return grammar.choice(texts) if texts else grammar.regex(_NO_TAG)


def _xml_text(name: str, arguments: str) -> str:
    values = {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in json.loads(arguments).items()
    }
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


def _plain(make: Callable[[Offered], Parser]) -> Callable[[Offered, str], Parser]:
    """A parser of an answer, whatever its turn begins with."""
    return lambda tools, begun: make(tools)


_GENERIC = _plain(lambda tools: ToolParser(names_of(tools)))
_HERMES = ('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>")
_DEEPSEEK_FRAME = ("<｜tool▁calls▁begin｜>", "\n", "<｜tool▁calls▁end｜>")
FORMATS: Mapping[str, ToolFormat] = {
    "hermes": _json_format(_GENERIC, _HERMES),
    "llama3": _json_format(_GENERIC, ('{"name": "', '", "parameters": ', "}"), ("", "; ", "")),
    "mistral": _json_format(_GENERIC, ('{"name": "', '", "arguments": ', "}"), ("[TOOL_CALLS][", ", ", "]")),
    "mistral_args": _json_format(_plain(MistralParser), ("[TOOL_CALLS]", "[ARGS]", ""), ("", "", "")),
    "deepseek_v3": _json_format(
        _plain(DeepSeekParser),
        ("<｜tool▁call▁begin｜>function<｜tool▁sep｜>", "\n```json\n", "\n```<｜tool▁call▁end｜>"),
        _DEEPSEEK_FRAME,
    ),
    "deepseek_v31": _json_format(
        _plain(DeepSeekParser), ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"), _DEEPSEEK_FRAME
    ),
    "pythonic": ToolFormat(
        _plain(PythonicParser), lambda name, arguments: python_text(name, json.loads(arguments)), frame=("[", ", ", "]")
    ),
    "qwen3_coder": ToolFormat(_plain(XmlParser), _xml_text, _xml_call),
    "harmony": _json_format(
        lambda tools, begun: HarmonyParser(names_of(tools), begun),
        ("<|channel|>commentary to=functions.", " <|constrain|>json<|message|>", ""),
        ("", "<|call|><|start|>assistant", ""),
        is_always=True,
        is_single=True,
        # Behind reasoning a message begins with its author.
        opening="<|start|>assistant",
    ),
}

# A mark of a chat template that says which format its model was trained on; the first that is there does.
_TOOL_SIGNS = (
    ("<|channel|>", "harmony"),
    ("<｜tool▁sep｜>", "deepseek_v31"),
    ("<parameter=", "qwen3_coder"),
    ("<|python_start|>", "pythonic"),
    ("[func_name1(", "pythonic"),
    ("[ARGS]", "mistral_args"),
    ("[TOOL_CALLS]", "mistral"),
    ("<tool_call>", "hermes"),
    ("<|python_tag|>", "llama3"),
)
_REASONING_SIGNS = (("<|channel|>", "harmony"), ("[THINK]", "magistral"), ("</think>", "think"), ("<think>", "think"))


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one model says what it thinks and what it calls.

    Attributes:
        reasoning: one of `anabranch.serving.chat.reasoning.FORMATS`; empty where it does not reason.
        tools: one of `FORMATS`.
    """

    reasoning: str = ""
    tools: str = "hermes"

    @classmethod
    def of(cls, tokenizer: Tokenizer, *, reasoning: str = "auto", tools: str = "auto") -> "Dialect":
        """The dialect of a model by its chat template, where a name is ``auto``; ``none`` is for one that does not reason."""
        template = tokenizer.chat_template or ""
        found = cls(_sign(template, _REASONING_SIGNS), _tools_of(template))
        if reasoning != "auto":
            found = replace(found, reasoning="" if reasoning == "none" else reasoning)
        return found if tools == "auto" else replace(found, tools=tools)

    @property
    def format(self) -> ToolFormat:
        """How it calls tools."""
        return FORMATS[self.tools]

    def reasoning_after(self, prompt: str) -> Reasoning | None:
        """How the reasoning of an answer to ``prompt`` is told apart; None where there is none."""
        return Reasoning.after(self.reasoning, prompt) if self.reasoning else None

    def parser(self, tools: Offered, reasoning: Reasoning | None = None) -> Parser | None:
        """A parser of an answer; None where all of it is text."""
        if not tools and not self.format.is_always:
            return None
        return self.format.parser(tools, reasoning.said if reasoning is not None else "")

    def demanded(self, tools: Offered, *, is_parallel: bool) -> dict[str, Any]:
        """The grammar of an answer that must call. Raises InputError where no grammar holds the format."""
        form = self.format.demanded(tools, is_parallel=is_parallel)
        if form is None:
            raise InputError(
                f"this model writes calls as {self.tools} does, which no grammar holds: tool_choice can be auto or none"
            )
        return form

    def preamble(self, reasoning: Reasoning | None, tokenizer: Tokenizer, *, is_call: bool) -> Preamble | None:
        """What may come before what a grammar holds for, an answer or with ``is_call`` calls."""
        return None if reasoning is None else reasoning.preamble(tokenizer, is_call=is_call)


def _sign(template: str, signs: Sequence[tuple[str, str]], default: str = "") -> str:
    return next((name for mark, name in signs if mark in template), default)


def _tools_of(template: str) -> str:
    if "<|channel|>" not in template and "tools" not in template:
        # It is told of tools, and how to call them, in our words.
        return "hermes"
    if "<｜tool▁sep｜>" in template and "```json" in template:
        return "deepseek_v3"
    return _sign(template, _TOOL_SIGNS, "hermes")
