"""Chats as text: conversations into prompts by the model's own template, and calls of tools out of what it says.

Templates need jinja2, which arrives with torch.
"""

from anabranch.extras import require

require("lm", by=__name__)

from anabranch.serving.chat.parser import ArgumentsDelta, CallRefused, CallStarted, TextDelta, ToolParser
from anabranch.serving.chat.template import render, takes_tools
from anabranch.serving.chat.tools import call_grammar, check_tools, parser_for

__all__ = [
    "ArgumentsDelta",
    "CallRefused",
    "CallStarted",
    "TextDelta",
    "ToolParser",
    "call_grammar",
    "check_tools",
    "parser_for",
    "render",
    "takes_tools",
]
