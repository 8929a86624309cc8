"""What a stream may come to beside what it shows, told by the request and the model's name: thoughts, sound, pictures.

Thoughts are billed whole, and shown as a summary or not at all, so what came says nothing of how many they were: only the time does. Sound
and pictures have tokens of their own, of which neither says anything. What came tells it too: see `Tally.has_thought` and
`Tally.has_media`.
"""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from anabranch.gateway.providers.openai_models import reasons
from anabranch.gateway.providers.provider import Json, Usage

if TYPE_CHECKING:
    from anabranch.gateway.dispatch.deployment_state import Live

# Those that think unasked, beside OpenAI's. What is left of them is charged by all its time.
_UNASKED = re.compile(
    r"think|reason|nemotron|gemini-(?:2\.5|[3-9]|\d\d)|gpt-oss|deepseek-(?:r\d|v3\.[1-9]|v[4-9])|(?:^|[-/])r1(?:$|[-:])|qwq|qwen-?3|magistral"
    r"|grok-(?:3-mini|[4-9]|code)|glm-(?:4\.[5-9]|[5-9])|kimi-k[2-9]|minimax-m|claude-(?:[a-z]{1,20}-){0,4}(?:[5-9]|\d\d)(?!\d)"
)
# Those that think when they are asked to, or never, whatever comes behind; dates and sizes among it. No other name says that of a model:
# many are chosen by whoever deploys it (Azure, vLLM).
_PLAIN = re.compile(
    r"(?:^|[-/.:_])(?:gpt-?3\.?5|gpt-?4o|gpt-?4\.[15](?!\d)|gpt-?4(?:$|[-:](?:turbo|32k|vision|\d))|chatgpt-4o|davinci|babbage"
    r"|claude-(?:instant|v?[123](?!\d)|(?:[a-z]+-)?4(?!\d))|gemini-(?:1\.|2\.0)|gemma-?[123](?!\d)|llama-?[234](?!\d)|codellama"
    r"|mistral|mixtral|ministral|codestral|pixtral|devstral|command-(?:r|a|light|nightly)|deepseek-(?:chat|coder|v2|v3(?:$|[-:]))"
    r"|qwen-?(?:1\.5|2(?:\.5)?)(?:$|[-:])|phi-?[1234](?!\d)|nova-(?:micro|lite|pro)|titan|jamba|grok-(?:beta|2|3)(?!\d)|smollm2?(?!\d)"
    r"|olmo-?2(?!\d)|granite-3\.[01](?!\d)|tinyllama)"
)
# Where servers take what they pass on to a model.
_WITHIN = ("chat_template_kwargs", "extra_body", "output_config", "generationConfig")
# Types of tools that whoever asks runs: what a model says to them comes as it is made. All others run at the provider, or nobody knows.
_SENDERS_OWN = ("function", "custom")
# Said by who wants none.
_OFF = ("none", "disabled", "off", "false")


def may_think(body: Json, model: str, thinks: bool | None = None, is_openais: bool | None = None) -> bool:
    """Whether a model may think what it does not show: one of which nobody says that it does not, may.

    Args:
        body: of the request, which may ask for it.
        model: what the upstream calls it.
        thinks: the config says that it does, or does not unasked; None if its name is to tell.
        is_openais: the config says that it is one of OpenAI's that reason, or that it is none; None if it does not say.
    """
    if any(("think" in name or "reason" in name) and not _is_off(value) for name, value in _fields(body)):
        return True
    if thinks is not None:
        return thinks
    name = model.lower()
    if is_openais or (is_openais is None and reasons(model)) or _UNASKED.search(name) is not None:
        return True
    return _PLAIN.search(name) is None


def may_hide(live: "Live", body: Json, most: Usage, answers: int) -> bool:
    """Whether what a stream shows says nothing of what was made before it: thoughts, what tools of the provider are asked, other answers.

    Nor does what comes first where that is the prompt (``echo``): the first text that is made tells how long one takes to be shown.

    Args:
        live: the deployment.
        body: of the request.
        most: that it may be billed.
        answers: that are made at the same time.
    """
    config = live.provider.config
    model, is_openais = str(getattr(config, "model", None) or ""), getattr(config, "reasons", None)
    if answers > 1 or most.pages > 0 or body.get("echo") or has_tools_of_provider(body):
        return True
    return may_think(body, model, live.deployment.thinks, is_openais)


def has_tools_of_provider(body: Json) -> bool:
    """Whether a request offers tools that may run at the provider: what the model says to them, and is told, may not be shown."""
    if body.get("mcp_servers") or body.get("web_search_options") is not None:
        return True
    tools = body.get("tools")
    given = [one for one in tools if isinstance(one, dict)] if isinstance(tools, list) else []
    return any(str(one.get("type") or "function") not in _SENDERS_OWN for one in given)


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
