"""What a request asks for, in words, as routers of adapters compare it with the instructions of their experts.

Servers and the command line ask here, so that the same prompt finds the same adapters wherever it is written.
"""

from collections.abc import Sequence
from typing import Any

__all__ = ["MOST_QUERY", "instruction_in", "last_asked"]

# Characters that are compared.
MOST_QUERY = 2000


def instruction_in(prompt: str, asked: str = "") -> str | None:
    """The `Request.instruction` of whoever says no other: of a chat what was ``asked`` last, else the text of the ``prompt``.

    At most `MOST_QUERY` characters, the first; None where there are none.
    """
    return (asked or prompt)[:MOST_QUERY] or None


def last_asked(messages: Sequence[Any]) -> str:
    """The text of the last message that a user wrote; "" where there is none."""
    for message in reversed(messages):
        if not isinstance(message, dict) or message.get("role") != "user":
            continue
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        texts = [part.get("text") for part in parts if isinstance(part, dict)]
        return content if isinstance(content, str) else "\n".join(text for text in texts if isinstance(text, str))
    return ""
