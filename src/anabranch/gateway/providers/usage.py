"""`Usage`: what a provider says a call came to: tokens by what they cost, its tier, its searches, and, of some, its dollars."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from anabranch.gateway.plain_values import whole_of
from anabranch.routers.money import MOST_NANO, NANO, Tokens

# Most tokens of one call that are believed: as many as no model has room for.
TOKENS = 10**7

# xAI's unit of money: so many are a dollar.
TICKS = 10**10

# A text of more bytes takes more than one token, whoever counts: a completion that is told as 0 or 1 beside it was not counted.
ONE_TOKEN_BYTES = 256

# The longest name of a tier that is believed.
TIER_CHARACTERS = 40


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a call, and what else it costs.

    Attributes:
        prompt: all prompt tokens.
        completion: completion tokens, reasoning among them.
        cached: prompt tokens that the provider had cached.
        is_estimated: counted here because the provider did not say.
        cache_write: prompt tokens that it put into its cache, for minutes.
        cache_write_1h: likewise for an hour.
        audio_input, image_input: prompt tokens of sound and pictures, where it tells them apart.
        audio_output, image_output: completion tokens likewise.
        searches: of the web, made for the answer; None if it does not say.
        tier: its word for the service tier that the call was given; "" if it does not say.
        nano: nano-dollars that it says the call costs; None if it does not.
        tells_ttl: it says for how long tokens are cached.
        tells_prompt: of an estimate, that the prompt is as the provider said.
        calls: as how many calls it is billed, where those have a price; None for one, if it does not say.
        pages: of the most that a call may come to, the prompt tokens that tools of the provider may bring: what is told before the end
            is without them.
        predicted: likewise, the completion tokens of a text that the sender predicted: what of it is not taken is billed, and not shown.
    """

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    is_estimated: bool = False
    cache_write: int = 0
    cache_write_1h: int = 0
    audio_input: int = 0
    image_input: int = 0
    audio_output: int = 0
    image_output: int = 0
    searches: int | None = None
    tier: str = ""
    nano: int | None = None
    tells_ttl: bool = False
    tells_prompt: bool = False
    calls: int | None = None
    pages: int = 0
    predicted: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.prompt + other.prompt,
            self.completion + other.completion,
            self.cached + other.cached,
            self.is_estimated or other.is_estimated,
            self.cache_write + other.cache_write,
            self.cache_write_1h + other.cache_write_1h,
            self.audio_input + other.audio_input,
            self.image_input + other.image_input,
            self.audio_output + other.audio_output,
            self.image_output + other.image_output,
            _sum(self.searches, other.searches),
            self.tier or other.tier,
            _sum(self.nano, other.nano),
            calls=_sum(self.calls, other.calls),
            pages=self.pages + other.pages,
            predicted=self.predicted + other.predicted,
        )

    @property
    def tokens(self) -> Tokens:
        """For a price."""
        return Tokens(
            prompt=self.prompt,
            completion=self.completion,
            cached=self.cached,
            cache_write=self.cache_write,
            cache_write_1h=self.cache_write_1h,
            audio_input=self.audio_input,
            image_input=self.image_input,
            audio_output=self.audio_output,
            image_output=self.image_output,
        )

    @classmethod
    def of(cls, body: Any) -> "Usage | None":
        """From an answer or a chunk in OpenAI's form; None if its ``usage`` is not there or makes no sense.

        Beside OpenAI's fields those of OpenRouter (cache writes, searches, ``cost``), xAI (``cost_in_usd_ticks``) and Perplexity. xAI and
        servers before Gemini tell thoughts beside the completion, and some in the sum of all tokens alone: whatever is in the sum and not
        in the prompt is billed as the answer is.
        """
        usage = body.get("usage") if isinstance(body, dict) else None
        if not isinstance(usage, dict):
            return None
        asked, made = _table(usage, "prompt_tokens_details"), _table(usage, "completion_tokens_details")
        prompt = _counted(usage.get("prompt_tokens"))
        completion, cached = _counted(_told(usage, "completion_tokens")), _counted(_told(asked, "cached_tokens"))
        if prompt is None or completion is None or cached is None:
            return None
        # Some say all of it, or the thoughts beside it, in the sum alone. What is more than the prompt cannot be a part of it.
        beside = cached if cached > prompt else 0
        completion = max(_count(usage, "total_tokens") - prompt - beside, completion)
        for_hour = min(_count(asked, "cache_write_1h_tokens"), prompt)
        written = min(_count(asked, "cache_write_tokens"), prompt)
        return cls(
            prompt,
            completion,
            min(cached, prompt),
            cache_write=max(0, written - for_hour),
            cache_write_1h=for_hour,
            audio_input=min(_count(asked, "audio_tokens"), prompt),
            image_input=min(_count(asked, "image_tokens"), prompt),
            audio_output=min(_count(made, "audio_tokens"), completion),
            image_output=min(_count(made, "image_tokens"), completion),
            searches=searches_of(usage),
            tier=tier_of(body) or tier_of(usage),
            nano=nano_of(usage),
            tells_ttl="cache_write_1h_tokens" in asked,
        )

    def to_openai(self) -> dict[str, Any]:
        """OpenAI's ``usage``, from which `of` reads the same."""
        asked: dict[str, Any] = {"cached_tokens": self.cached}
        if self.cache_write or self.cache_write_1h:
            asked["cache_write_tokens"] = self.cache_write + self.cache_write_1h
        if self.tells_ttl and "cache_write_tokens" in asked:
            asked["cache_write_1h_tokens"] = self.cache_write_1h
        made: dict[str, Any] = {}
        for table, name, count in (
            (asked, "audio_tokens", self.audio_input),
            (asked, "image_tokens", self.image_input),
            (made, "audio_tokens", self.audio_output),
            (made, "image_tokens", self.image_output),
        ):
            if count:
                table[name] = count
        told: dict[str, Any] = {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": asked,
        }
        if made:
            told["completion_tokens_details"] = made
        if self.searches is not None:
            told["server_tool_use"] = {"web_search_requests": self.searches}
        if self.tier:
            told["service_tier"] = self.tier
        if self.nano is not None:
            told["cost"] = self.nano / NANO
        return told


def is_untold(completion: int, text_bytes: int) -> bool:
    """Whether a completion of so many tokens cannot be that of a text of so many bytes: it was not counted, or not yet."""
    return completion <= 1 and text_bytes > ONE_TOKEN_BYTES


def searches_of(usage: Mapping[str, Any]) -> int | None:
    """Searches of the web that a ``usage`` tells: as Anthropic and OpenRouter, or as Perplexity; None for none told."""
    for table, name in ((_table(usage, "server_tool_use"), "web_search_requests"), (usage, "num_search_queries")):
        value = _counted(table.get(name))
        if value is not None:
            return value
    return None


def tier_of(table: Mapping[str, Any]) -> str:
    """``service_tier``, or ``fast`` where its ``speed`` is; "" for none."""
    if table.get("speed") == "fast":
        return "fast"
    value = table.get("service_tier")
    return value.lower() if isinstance(value, str) and len(value) <= TIER_CHARACTERS else ""


def nano_of(usage: Mapping[str, Any]) -> int | None:
    """Nano-dollars that a ``usage`` says the call costs, rounded up; None if it says none that can be."""
    cost = usage.get("cost")
    if isinstance(cost, dict):
        cost = cost.get("total_cost")
    parts = [_nano(cost, 1)]
    # With a key of one's own OpenRouter bills a fee, and the provider the rest.
    if usage.get("is_byok") is not False:
        parts.append(_nano(_table(usage, "cost_details").get("upstream_inference_cost"), 1))
    told = [part for part in parts if part is not None]
    ticks = _nano(usage.get("cost_in_usd_ticks"), TICKS)
    if ticks is not None:
        return max(ticks, sum(told))
    return sum(told) if told else None


def _nano(value: Any, unit: int) -> int | None:
    # No number is within these bounds but a finite one; an integer may be too long to be made a float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= unit * (MOST_NANO // NANO):
        return None
    return math.ceil(Decimal(str(value)) * NANO / unit)


def _sum(one: int | None, other: int | None) -> int | None:
    return None if one is None and other is None else (one or 0) + (other or 0)


def _table(usage: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = usage.get(name)
    return value if isinstance(value, dict) else {}


def _count(table: Mapping[str, Any], name: str) -> int:
    """0 where there is none that makes sense."""
    return _counted(table.get(name)) or 0


def _told(table: Mapping[str, Any], name: str) -> Any:
    """0 for what says nothing."""
    value = table.get(name)
    return 0 if value is None or (isinstance(value, str | list | dict | bool) and not value) else value


def _counted(value: Any) -> int | None:
    """The number of tokens that it equals; None for none that can be."""
    found = whole_of(value)
    return found if found is not None and 0 <= found <= TOKENS else None
