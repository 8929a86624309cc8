"""Prompt tokens before a call: by the model's tokenizer where the config names one, else a quarter of the bytes, marked as an estimate."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BYTES_PER_TOKEN = 4

# Around each message: its role and the marks of its ends.
MESSAGE_TOKENS = 4

# Of one image, about the most that providers count.
IMAGE_TOKENS = 1_600
IMAGES = ("image_url", "input_image")
# Fields that no model reads. All others count, unknown ones too: a text that is sent on is a text that is paid for.
NO_PROMPT = frozenset(
    {
        "model",
        "user",
        "metadata",
        "logit_bias",
        "stop",
        "stream_options",
        "tool_choice",
        "encoding_format",
        "modalities",
    }
)

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
    for name, value in body.items():
        if name == "messages" and isinstance(value, list):
            around += MESSAGE_TOKENS * len(value) + 3
            images += sum(_gather_message(message, texts) for message in value)
        elif name in ("prompt", "input") and isinstance(value, list):
            for part in value:
                if isinstance(part, int | list):  # ids of tokens
                    around += 1 if isinstance(part, int) else len(part)
                else:
                    texts.append(_text(part))
        elif name not in NO_PROMPT and isinstance(value, str | list | dict):
            texts.append(_text(value))
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


def asked_text(endpoint: str, body: Mapping[str, Any]) -> str:
    """What a request asks: the last user message of a chat, else prompt or input; of several, one below the other."""
    if endpoint == "chat":
        return last_text(body["messages"])
    prompt = body.get("prompt", body.get("input", ""))
    return prompt if isinstance(prompt, str) else "\n".join(part for part in prompt if isinstance(part, str))


def has_images(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a message carries an image."""
    return any(
        isinstance(content := message.get("content"), list) and any(part.get("type") in IMAGES for part in content)
        for message in messages
    )


def num_prompts(body: Mapping[str, Any]) -> int:
    """How many prompts a request to ``/v1/completions`` holds; each is answered."""
    prompt = body.get("prompt")
    return len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1


def _gather_message(message: Any, texts: list[str]) -> int:
    """Add all texts of a message to ``texts``; returns the number of images."""
    if not isinstance(message, dict):
        texts.append(_text(message))
        return 0
    for name, value in message.items():
        if name not in ("role", "content") and value:
            texts.append(_text(value))
    return _gather(message.get("content"), texts)


def _gather(content: Any, texts: list[str]) -> int:
    """Add the texts of a message's content to ``texts``; returns the number of images."""
    if isinstance(content, str):
        texts.append(content)
        return 0
    images = 0
    for part in content if isinstance(content, list) else ():
        if not isinstance(part, dict):
            texts.append(_text(part))
        elif part.get("type") in IMAGES:
            images += 1
            texts.extend(value for value in part.values() if isinstance(value, str) and value != part["type"])
        else:
            texts.extend(_text(value) for name, value in part.items() if name != "type" and value)
    return images


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value)


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
