"""Tools: checked, told to a model as text, and demanded of it by a grammar."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anabranch.bounds import shown
from anabranch.serving.chat.errors import FieldError
from anabranch.serving.chat.formats import Dialect
from anabranch.serving.chat.parser import ToolParser

__all__ = ["Tools", "call_grammar", "call_text", "parser_for", "read_tools", "system_text"]

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")

_INSTRUCTIONS = """You may call one or more functions to assist with the user query. Their signatures are within <tools></tools> tags:
<tools>
{tools}
</tools>

For each function call return a JSON object with the function's name and arguments within <tool_call></tool_call> tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


@dataclass(frozen=True, slots=True)
class Tools:
    """What may be called.

    Attributes:
        offered: the tools as they came, for the template.
        choice: ``none``, ``auto``, ``required``, or ``named``.
        name: of the one that has to be called, with ``named``.
        is_parallel: several calls in one answer.
    """

    offered: tuple[Mapping[str, Any], ...] = ()
    choice: str = "auto"
    name: str = ""
    is_parallel: bool = True

    @property
    def is_demanded(self) -> bool:
        """Whether the answer has to be a call."""
        return self.choice in ("required", "named")

    def grammar(self, dialect: Dialect) -> dict[str, Any] | None:
        """What the output has to be where a call is demanded; None where it may be anything.

        With a named tool that is one call, whatever `is_parallel` says. Raises InputError for a dialect that no grammar holds.
        """
        if not self.is_demanded:
            return None
        called = [tool for tool in self.offered if self.choice == "required" or tool["function"]["name"] == self.name]
        return dialect.demanded(called, is_parallel=self.is_parallel and self.choice == "required")


def read_tools(tools: Sequence[Any] | None, choice: Any = None, *, is_parallel: bool = True) -> Tools:
    """Tools as OpenAI's API has them, checked.

    Args:
        tools: {"type": "function", "function": {"name", "description", "parameters"}}; names differ.
        choice: ``none``, ``auto``, ``required`` or {"type": "function", "function": {"name": ...}}; None is ``auto``.
        is_parallel: whether several calls may be made.

    Raises FieldError, which names the field.
    """
    offered = tuple(_tool(tool, f"tools[{at}]") for at, tool in enumerate(tools or ()))
    names = [tool["function"]["name"] for tool in offered]
    twice = next((name for at, name in enumerate(names) if name in names[:at]), None)
    if twice is not None:
        raise FieldError("tools", f"has two functions of the name {twice!r}; names must differ")
    if choice is None or choice in ("none", "auto"):
        return Tools(offered, choice or "auto", "", is_parallel)
    if not offered:
        raise FieldError("tool_choice", f"is {shown(choice)}, but there are no tools")
    if choice == "required":
        return Tools(offered, "required", "", is_parallel)
    return Tools(offered, "named", _named(choice, names), is_parallel)


def _named(choice: Any, names: Sequence[str]) -> str:
    if not isinstance(choice, Mapping):
        what = f'is {shown(choice)}; it must be "none", "auto", "required" or an object'
        raise FieldError("tool_choice", what)
    function = choice.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if choice.get("type") != "function" or not isinstance(name, str):
        what = 'must be {"type": "function", "function": {"name": ...}}, as an object'
        raise FieldError("tool_choice", what)
    if name not in names:
        raise FieldError("tool_choice.function.name", f"is {name[:60]!r}, which is none of tools")
    return name


def _tool(tool: Any, where: str) -> Mapping[str, Any]:
    kind = tool.get("type") if isinstance(tool, Mapping) else None
    if kind != "function":
        raise FieldError(f"{where}.type", f"is {shown(kind)}; only functions can be offered", is_unsupported=True)
    function = tool.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        what = f"is {shown(name)}; it must be 1 to 64 letters, digits, _, - or ."
        raise FieldError(f"{where}.function.name", what)
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        what = f"is {shown(parameters)}; it must be a JSON schema, which is an object"
        raise FieldError(f"{where}.function.parameters", what)
    return tool


def system_text(tools: Sequence[Mapping[str, Any]]) -> str:
    """The definitions of ``tools`` and how to call them, for the system message of a model whose template takes none."""
    return _INSTRUCTIONS.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))


def call_text(name: str, arguments: Any) -> str:
    """A call as a model of the Hermes or Qwen kind writes it."""
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{body}\n</tool_call>"


def call_grammar(
    tools: Sequence[Mapping[str, Any]],
    choice: Any = "auto",
    *,
    is_parallel: bool = True,
    dialect: Dialect | None = None,
) -> dict[str, Any] | None:
    """What ``tool_choice`` makes of the output, for `Sampling.grammar`; None where it may be anything.

    Args:
        tools, choice, is_parallel: see `read_tools`; with a named tool it is one call all the same.
        dialect: of the model; None for one that calls as Hermes and Qwen do.

    Raises FieldError as `read_tools`, and InputError for a dialect that no grammar holds.
    """
    return read_tools(tools, choice, is_parallel=is_parallel).grammar(dialect or Dialect())


def parser_for(tools: Sequence[Mapping[str, Any]]) -> ToolParser:
    """A parser of the calls of these tools."""
    return ToolParser(tool["function"]["name"] for tool in tools)
