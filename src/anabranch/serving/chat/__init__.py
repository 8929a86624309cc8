"""Chats as text: conversations into prompts by the model's own template, and calls of tools out of what it says.

Templates need jinja2, which arrives with torch.
"""

from anabranch.extras import require

require("lm", by=__name__)

from anabranch.serving.chat.events import ArgumentsDelta, CallRefused, CallStarted, TextDelta
from anabranch.serving.chat.formats import FORMATS, Dialect
from anabranch.serving.chat.messages import MessageError, read_messages
from anabranch.serving.chat.parser import ToolParser
from anabranch.serving.chat.template import render, takes_tools
from anabranch.serving.chat.tools import call_grammar, check_tools, parser_for

__all__ = [
    "FORMATS",
    "ArgumentsDelta",
    "CallRefused",
    "CallStarted",
    "Dialect",
    "MessageError",
    "TextDelta",
    "ToolParser",
    "call_grammar",
    "check_tools",
    "parser_for",
    "read_messages",
    "render",
    "takes_tools",
]
