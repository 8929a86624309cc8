"""Prompt tokens before a call: by the model's tokenizer where the config names one, else a quarter of the bytes, marked as an estimate."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BYTES_PER_TOKEN = 4
MESSAGE_TOKENS = 4  # around each message: its role and the marks of its ends
IMAGE_TOKENS = 1_600  # of one image, about the most that providers count

Counter = Callable[[str], int]


@dataclass(frozen=True, slots=True)
class PromptCount:
    """Tokens of a prompt.

    Attributes:
        tokens: counted or estimated.
        at_most: no tokenizer makes more of it: each token is at least a byte. What is reserved from budgets.
        is_estimate: no tokenizer was there.
    """

    tokens: int
    at_most: int
    is_estimate: bool


def count_prompt(body: Mapping[str, Any], counter: Counter | None = None) -> PromptCount:
    """Of a request to ``/v1/chat/completions``, ``/v1/completions`` or ``/v1/embeddings``."""
    around, images = 0, 0
    texts: list[str] = []
    messages = body.get("messages")
    if messages is not None:
        around = MESSAGE_TOKENS * len(messages) + 3
        for message in messages:
            images += _gather(message.get("content"), texts)
            texts.extend(str(call) for call in message.get("tool_calls") or ())
        if body.get("tools"):
            texts.append(str(body["tools"]))
    else:
        prompt = body.get("prompt", body.get("input", ""))
        if isinstance(prompt, str):
            texts.append(prompt)
        else:
            for part in prompt:
                if isinstance(part, str):
                    texts.append(part)
                else:
                    around += 1 if isinstance(part, int) else len(part)  # ids of tokens
    fixed = around + images * IMAGE_TOKENS
    num_bytes = sum(_num_bytes(text) for text in texts)
    if counter is not None:
        tokens = fixed + sum(counter(text) for text in texts)
        return PromptCount(tokens, tokens, False)
    return PromptCount(fixed + -(-num_bytes // BYTES_PER_TOKEN), fixed + num_bytes, True)


def last_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """Text of the last user message; of the last message if no user spoke."""
    if not messages:
        return ""
    message = next((message for message in reversed(messages) if message.get("role") == "user"), messages[-1])
    texts: list[str] = []
    _gather(message.get("content"), texts)
    return "\n".join(texts)


def has_images(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a message carries an image."""
    return any(
        isinstance(content := message.get("content"), list)
        and any(part.get("type") in ("image_url", "input_image") for part in content)
        for message in messages
    )


def _gather(content: Any, texts: list[str]) -> int:
    """Add the texts of a message to ``texts``; returns the number of images."""
    if isinstance(content, str):
        texts.append(content)
        return 0
    images = 0
    for part in content or ():
        text = part.get("text") or part.get("refusal")
        if isinstance(text, str):
            texts.append(text)
        elif part.get("type") != "text":
            images += 1
    return images


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
