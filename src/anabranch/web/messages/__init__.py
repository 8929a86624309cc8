"""Anthropic's Messages API on top of chat: a request becomes one of chat, the answer or its stream becomes a message.

What chat has no words for goes along in fields that only Anthropic's own models are sent: see `to_chat`.
"""

from anabranch.web.messages.answer import to_message
from anabranch.web.messages.errors import to_error
from anabranch.web.messages.request import to_chat
from anabranch.web.messages.stream import MessageEvents

__all__ = ["MessageEvents", "to_chat", "to_error", "to_message"]
