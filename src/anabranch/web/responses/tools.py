"""Tools of a response as those of chat.

Chat knows functions, and so does every model. A custom tool, which takes a text, is offered as a function with one argument, ``input``; a
grammar of its text is told in its description, which no model is held to. Tools that run at a provider are refused.
"""

import json
from typing import Any

from anabranch.web.api_error import wrong
from anabranch.web.body import said

INPUT = "input"


def custom_names(body: dict[str, Any]) -> frozenset[str]:
    """Names of the custom tools of a request, as it came."""
    tools = body.get("tools")
    made = [tool for tool in tools if isinstance(tool, dict)] if isinstance(tools, list) else []
    return frozenset(str(tool.get("name")) for tool in made if tool.get("type") == "custom")


def arguments_of(text: str) -> str:
    """Arguments of the function that stands for a custom tool."""
    return json.dumps({INPUT: text}, ensure_ascii=False)


def text_of(arguments: str) -> str:
    """What a custom tool is given; what a model wrote that is no such arguments is passed on as it is."""
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    text = found.get(INPUT) if isinstance(found, dict) else None
    return text if isinstance(text, str) else arguments


def tools_of(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of a request that may be called. Raises ApiError for what chat does not have."""
    tools = body["tools"]
    if not isinstance(tools, list):
        raise wrong("tools", "tools must be a list")
    made = [_tool(tool, at) for at, tool in enumerate(tools)]
    allowed = _allowed(body.get("tool_choice"))
    if allowed is None:
        return made
    if unknown := sorted(allowed - {tool["function"].get("name") for tool in made}):
        raise wrong("tool_choice.tools", f"tool_choice.tools has {unknown[0]!r:.80}, which is none of tools")
    return [tool for tool in made if tool["function"].get("name") in allowed]


def _tool(tool: Any, at: int) -> dict[str, Any]:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if kind == "function":
        if not isinstance(tool.get("name", ""), str):
            raise wrong(f"tools[{at}].name", f"tools[{at}].name is {said(tool['name'])}; it must be text")
        return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}
    if kind != "custom":
        if not isinstance(kind, str):
            raise wrong(f"tools[{at}].type", f"tools[{at}].type is {said(kind)}; it must be function or custom")
        what = (
            f"tools[{at}] is {kind[:40]!r}, a tool that runs at a provider; no model that is asked here has it: "
            "they are offered tools of type function and custom"
        )
        raise wrong(f"tools[{at}]", what, "unsupported")
    if not isinstance(tool.get("name"), str):
        raise wrong(f"tools[{at}].name", f"tools[{at}].name must be text")
    told = told_of(tool)
    parameters = {
        "type": "object",
        "properties": {INPUT: {"type": "string"}},
        "required": [INPUT],
        "additionalProperties": False,
    }
    function = {"name": tool["name"], "parameters": parameters}
    return {"type": "function", "function": {**function, "description": told} if told else function}


def told_of(tool: dict[str, Any]) -> str:
    """What the function that stands for a custom tool says of itself; "" for nothing."""
    given, form = tool.get("description"), tool.get("format")
    told = [given] if isinstance(given, str) and given else []
    if isinstance(form, dict) and form.get("type") == "grammar":
        told.append(f"The input must be of this grammar ({form.get('syntax')}):\n{form.get('definition')}")
    return "\n\n".join(told)


def choice_of(choice: Any) -> Any:
    """A ``tool_choice`` as chat has it. Raises ApiError for what chat does not have."""
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") == "allowed_tools":
        if choice.get("mode") not in ("auto", "required"):
            raise wrong("tool_choice.mode", "tool_choice.mode must be auto or required")
        return choice["mode"]
    if choice.get("type") not in ("function", "custom") or not isinstance(choice.get("name"), str):
        what = 'as an object tool_choice is {"type": "function", "name": ...}, or "custom" or "allowed_tools"; no other kind can be chosen'
        raise wrong("tool_choice", what, "unsupported")
    return {"type": "function", "function": {"name": choice["name"]}}


def _allowed(choice: Any) -> frozenset[str] | None:
    """Names of the tools that may be called; None for all. Raises ApiError."""
    if not isinstance(choice, dict) or choice.get("type") != "allowed_tools":
        return None
    tools = choice.get("tools")
    named = [tool.get("name") if isinstance(tool, dict) else None for tool in tools] if isinstance(tools, list) else []
    if not named or not all(isinstance(name, str) for name in named):
        raise wrong("tool_choice.tools", "tool_choice.tools must be a list of functions and custom tools by name")
    return frozenset(map(str, named))
