"""The tools of a chat request, and the choice among them."""

from dataclasses import dataclass
from typing import Any

from anabranch.serving.chat import Dialect, call_grammar
from anabranch.serving.http.fields import unsupported
from anabranch.web.api_error import wrong
from anabranch.web.body import said

_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.")


@dataclass(frozen=True, slots=True)
class Tools:
    """What may be called.

    Attributes:
        offered: the tools as they came, for the template.
        choice: ``auto``, ``required``, or ``named``.
        name: of the one that has to be called, with ``named``.
        is_parallel: several calls in one answer.
    """

    offered: tuple[dict[str, Any], ...]
    choice: str = "auto"
    name: str = ""
    is_parallel: bool = True

    def grammar(self, dialect: Dialect) -> dict[str, Any] | None:
        """What the output has to be where a call is demanded; None where it may be anything. Raises InputError."""
        wanted = {"type": "function", "function": {"name": self.name}} if self.choice == "named" else self.choice
        return call_grammar(self.offered, wanted, is_parallel=self.is_parallel, dialect=dialect)


def read_tools(body: dict[str, Any]) -> Tools | None:
    """The tools of a request; None if it has none or wants none. Raises ApiError (400)."""
    tools, choice = body.get("tools") or [], body.get("tool_choice")
    if not tools:
        if choice not in (None, "none", "auto"):
            raise wrong("tool_choice", f"tool_choice is {said(choice)}, but there are no tools")
        return None
    offered = tuple(_tool(tool, f"tools[{at}]") for at, tool in enumerate(tools))
    names = [tool["function"]["name"] for tool in offered]
    if len(set(names)) < len(names):
        raise wrong("tools", "tools has two functions of one name")
    is_parallel = body.get("parallel_tool_calls") is not False
    if choice == "none":
        return None
    if choice in (None, "auto", "required"):
        return Tools(offered, choice or "auto", "", is_parallel)
    if isinstance(choice, str):
        raise wrong("tool_choice", f'tool_choice is {said(choice)}; it must be "none", "auto", "required" or an object')
    name = choice["function"].get("name") if isinstance(choice.get("function"), dict) else None
    if choice.get("type") != "function" or not isinstance(name, str):
        raise wrong("tool_choice", 'tool_choice as an object is {"type": "function", "function": {"name": ...}}')
    if name not in names:
        raise wrong("tool_choice.function.name", f"tool_choice names {name[:60]!r}, which is none of tools")
    return Tools(offered, "named", name, is_parallel)


def _tool(tool: Any, name: str) -> dict[str, Any]:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if kind != "function":
        raise unsupported(f"{name}.type", f"{name} is of type {said(kind)}; only functions can be offered")
    function = tool.get("function")
    label = function.get("name") if isinstance(function, dict) else None
    if not isinstance(label, str) or not 0 < len(label) <= 64 or set(label) - _NAME:
        raise wrong(f"{name}.function.name", f"{name}.function.name must be 1 to 64 letters, digits, _, - or .")
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise wrong(f"{name}.function.parameters", f"{name}.function.parameters must be a JSON schema")
    return tool
