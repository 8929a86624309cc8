"""Tools: checked, told to a model as text, and demanded of it by a grammar."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from anabranch.errors import InputError
from anabranch.serving.chat.formats import Dialect
from anabranch.serving.chat.parser import ToolParser

__all__ = ["call_grammar", "call_text", "check_tools", "parser_for", "system_text"]

_INSTRUCTIONS = """You may call one or more functions to assist with the user query. Their signatures are within <tools></tools> tags:
<tools>
{tools}
</tools>

For each function call return a JSON object with the function's name and arguments within <tool_call></tool_call> tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def check_tools(tools: Sequence[Mapping[str, Any]]) -> None:
    """Raises InputError for a definition that is malformed, and for two of one name."""
    seen: set[str] = set()
    for at, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
        if not isinstance(function, Mapping):
            raise InputError(f"tools[{at}] must be an object of type 'function' with a function")
        name = function.get("name")
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name):
            raise InputError(f"tools[{at}].function.name is {name!r}; it must be 1 to 64 letters, digits, _, . or -")
        if name in seen:
            raise InputError(f"tools[{at}].function.name is {name!r}, as an earlier tool's; names must differ")
        if not isinstance(function.get("parameters", {}), Mapping):
            raise InputError(f"tools[{at}].function.parameters must be a JSON schema, which is an object")
        seen.add(name)


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
        tools: those offered.
        choice: ``none``, ``auto``, ``required`` or {"type": "function", "function": {"name": ...}}.
        is_parallel: whether several calls may be made; with a named tool it is one all the same.
        dialect: of the model; None for one that calls as Hermes and Qwen do.

    Raises InputError for another choice, a name that no tool has, ``required`` without tools, and a dialect that no grammar holds.
    """
    check_tools(tools)
    dialect = dialect or Dialect()
    if choice in ("none", "auto"):
        return None
    if choice == "required":
        if not tools:
            raise InputError("tool_choice is 'required', but there are no tools")
        called = list(tools)
    else:
        name = choice.get("function", {}).get("name") if isinstance(choice, Mapping) else None
        if name is None:
            raise InputError(
                f"tool_choice is {choice!r}; it must be none, auto, required or an object that names a function"
            )
        called = [tool for tool in tools if tool["function"]["name"] == name]
        if not called:
            raise InputError(f"tool_choice names {name!r}, which no tool has")
    return dialect.demanded(called, is_parallel=is_parallel and choice == "required")


def parser_for(tools: Sequence[Mapping[str, Any]]) -> ToolParser:
    """A parser of the calls of these tools."""
    return ToolParser(tool["function"]["name"] for tool in tools)
