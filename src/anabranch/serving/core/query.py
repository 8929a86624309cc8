"""What a request asks for, in words, as routers of adapters compare it with the instructions of their experts.

Servers and the command line ask here, so that the same prompt finds the same adapters wherever it is written.
"""

from collections.abc import Sequence
from typing import Any

from anabranch.bounds import MOST_QUERY

__all__ = ["asked_in", "last_asked"]


def asked_in(prompt: str, asked: str = "", *, told: str | None = None) -> dict[str, Any]:
    """Fields of a `Request`: its ``instruction`` where one is ``told``, else its ``query``; neither where nothing is said.

    Args:
        prompt: the text, whose first `MOST_QUERY` characters are the query.
        asked: of a chat, what was asked last, in the place of the prompt.
        told: an instruction; "" for none, and no query either.
    """
    if told is not None:
        return {"instruction": told} if told else {}
    query = (asked or prompt)[:MOST_QUERY]
    return {"query": query} if query else {}


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
