"""Putting examples before a request, in the form a chat template expects.

    turns    a user's and an assistant's message per example, after what stands before the conversation (system messages stay as they are)
    block    an instruction and the examples as text before the last user's message

What never changes comes first (system message, instruction), examples follow, the question is last: so a prefix cache keeps as much as
can be kept. Examples that the context window has no room for are dropped, the least useful first.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from anabranch.routers.ic_cache.selector import Chosen, CountTokens, estimate_tokens

Messages = Sequence[Mapping[str, Any]]
Style = Literal["turns", "block"]

INSTRUCTION = "Below are earlier requests with good answers. Answer the last request in the same manner; take over only what fits it."

# Tokens a chat template puts around a message, rounded up.
PER_MESSAGE = 8

# Roles that stand before a conversation.
LEADING = ("system", "developer")


def build(messages: Messages, chosen: Sequence[Chosen], *, style: Style = "turns") -> Messages:
    """Messages with the examples, in the order given; the very same object if there are none.

    ``messages`` is not changed, nor is any message of it but, in "block", the last user's one where its content is text.
    """
    if not chosen:
        return messages
    if style == "block":
        return _block(messages, chosen)
    start = next((at for at, message in enumerate(messages) if message.get("role") not in LEADING), len(messages))
    turns = [
        {"role": role, "content": text}
        for item in chosen
        for role, text in (("user", item.example.request), ("assistant", item.example.response))
    ]
    return [*messages[:start], *turns, *messages[start:]]


def _block(messages: Messages, chosen: Sequence[Chosen]) -> Messages:
    last = next((at for at in reversed(range(len(messages))) if messages[at].get("role") == "user"), None)
    if last is None:
        return messages
    shown = [f"Request: {item.example.request}\nAnswer: {item.example.response}" for item in chosen]
    text = "\n\n".join([INSTRUCTION, *shown, "Request: "])
    content = messages[last].get("content")
    new = text + content if isinstance(content, str) else [{"type": "text", "text": text}, *(content or [])]
    return [*messages[:last], {**messages[last], "content": new}, *messages[last + 1 :]]


def fit(
    messages: Messages,
    chosen: Sequence[Chosen],
    *,
    context: int | None,
    max_tokens: int | None = None,
    prompt_tokens: int | None = None,
    style: Style = "turns",
    count_tokens: CountTokens = estimate_tokens,
) -> tuple[Chosen, ...]:
    """Those examples that the context window has room for beside prompt and answer; the least useful are dropped first.

    Args:
        messages: of the request.
        chosen: examples, best last.
        context: tokens of the window; None for no end.
        max_tokens: kept for the answer; None keeps a quarter of the window.
        prompt_tokens: of the messages, where known.
        style: how they will be put in.
        count_tokens: of a text.
    """
    if context is None:
        return tuple(chosen)
    if prompt_tokens is None:
        prompt_tokens = sum(PER_MESSAGE + count_tokens(text_of(message)) for message in messages)
    room = context - prompt_tokens - (context // 4 if max_tokens is None else max_tokens)
    room -= count_tokens(INSTRUCTION) if style == "block" else 0
    kept = list(chosen)
    while kept and sum(item.tokens + 2 * PER_MESSAGE for item in kept) > room:
        kept.remove(min(kept, key=lambda item: item.utility))
    return tuple(kept)


def text_of(message: Mapping[str, Any]) -> str:
    """The text of a message: its content, or the text parts of it."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "\n".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))
