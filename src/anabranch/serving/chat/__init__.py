"""Chats as text: conversations into prompts by the model's own template, and calls of tools out of what it says.

Templates need jinja2, which arrives with torch.
"""

from anabranch.extras import require

require("lm", by=__name__)

from anabranch.serving.chat.errors import FieldError
from anabranch.serving.chat.events import ArgumentsDelta, TextDelta, ToolCallRefused, ToolCallStarted
from anabranch.serving.chat.formats import FORMATS, Dialect
from anabranch.serving.chat.messages import read_messages
from anabranch.serving.chat.parser import ToolParser
from anabranch.serving.chat.template import render, takes_tools
from anabranch.serving.chat.tools import Tools, call_grammar, parser_for, read_tools

__all__ = [
    "FORMATS",
    "ArgumentsDelta",
    "Dialect",
    "FieldError",
    "TextDelta",
    "ToolCallRefused",
    "ToolCallStarted",
    "ToolParser",
    "Tools",
    "call_grammar",
    "parser_for",
    "read_messages",
    "read_tools",
    "render",
    "takes_tools",
]
