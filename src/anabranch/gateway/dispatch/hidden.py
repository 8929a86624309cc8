"""What a stream may come to beside what it shows, told by the request and the model's name: thoughts, sound, pictures.

Thoughts are billed whole, and shown as a summary or not at all, so what came says nothing of how many they were. Where nobody knows yet
how fast a deployment is, nor does the time. Sound and pictures have tokens of their own, of which neither says anything. What came tells
it too: see `Tally.has_thought` and `Tally.has_media`.
"""

import re
from collections.abc import Iterator
from typing import Any

from anabranch.gateway.providers.openai_models import reasons
from anabranch.gateway.providers.provider import Json

# Those that think unasked, beside OpenAI's. A name too many does little harm: until the deployment is known, what is left is charged more.
_UNASKED = re.compile(
    r"think|reason|gemini-(?:2\.5|[3-9]|\d\d)|gpt-oss|deepseek-(?:r\d|v3\.[1-9]|v[4-9])|(?:^|[-/])r1(?:$|[-:])|qwq|qwen-?3|magistral"
    r"|grok-(?:3-mini|[4-9]|code)|glm-(?:4\.[5-9]|[5-9])|kimi-k[2-9]|minimax-m|claude-(?:[a-z]+-)*(?:[5-9]|\d\d)(?!\d)"
)
# Where servers take what they pass on to a model.
_WITHIN = ("chat_template_kwargs", "extra_body", "output_config", "generationConfig")
# Said by who wants none.
_OFF = ("none", "disabled", "off", "false")


def may_think(body: Json, model: str, is_told: bool | None = None) -> bool:
    """Whether a model may think what it does not show.

    Args:
        body: of the request.
        model: what the upstream calls it.
        is_told: the config says that it is one of OpenAI's that reason, or that it is none; None if it does not say.
    """
    if any(("think" in name or "reason" in name) and not _is_off(value) for name, value in _fields(body)):
        return True
    is_openai = reasons(model) if is_told is None else is_told
    return is_openai or _UNASKED.search(model.lower()) is not None


def asks_media(body: Json) -> bool:
    """Whether a request asks for sound or pictures in its answer."""
    asked = body.get("modalities")
    return isinstance(asked, list) and any(str(one).lower() != "text" for one in asked)


def _fields(body: Json) -> Iterator[tuple[str, Any]]:
    yield from body.items()
    for name in _WITHIN:
        if isinstance(within := body.get(name), dict):
            yield from within.items()


def _is_off(value: Any) -> bool:
    if isinstance(value, dict):
        said = [value[name] for name in ("type", "effort", "enabled") if name in value]
        return bool(said) and all(_is_off(one) for one in said)
    return not value or (isinstance(value, str) and value in _OFF)
