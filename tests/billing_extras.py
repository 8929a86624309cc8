"""What a `BillingProvider` bills beside plain tokens: tiers, cache writes and reads, searches. The sums are made here, by hand."""

import math
import random
from typing import Any

from billing_provider import Call, Json

# Nano-dollars a token: (standard, priority).
INPUT = {"small": (150, 300), "large": (2500, 4250), "other": (3000, 9000)}
OUTPUT = {"small": (600, 1200), "large": (10_000, 17_000), "other": (15_000, 45_000)}

# Of a token that is read from the cache or written to it, for minutes and for an hour, over one of the prompt.
READ, WRITTEN, FOR_HOUR = 0.1, 1.25, 2.0
SEARCH_NANO = 25_000_000


class RichCall(Call):
    """A call that is served at some tier, whose prompt is cached in parts, and that may have searched.

    ``small`` caches nothing by itself, ``large`` (of OpenAI's form) whatever it likes, ``other`` (Anthropic) what is marked.
    """

    def __init__(self, body: Json, draw: random.Random, habit: str = "usual") -> None:
        super().__init__(body, draw, habit)
        # Who asks for it gets the dear tier, mostly.
        self.is_priority = body.get("service_tier") == "priority" and draw.random() < 0.8
        self.tells_tier = draw.random() < 0.8
        self.searches = 1 if body.get("web_search_options") is not None else 0
        text = str(body)
        marked = "cache_control" in text if self.model == "other" else self.model == "large"
        self.ttl = "1h" if "'ttl': '1h'" in text else "5m"
        self.written = draw.randint(0, self.prompt) if marked else 0
        self.read = draw.randint(0, self.prompt - self.written) if self.model != "small" else 0
        self.tells_ttl = draw.random() < 0.5

    def nano(self, price: Any, made: int) -> int:
        """By hand; the price list is that of this module."""
        tier = int(self.is_priority)
        factor = FOR_HOUR if self.ttl == "1h" else WRITTEN
        tokens = self.prompt - self.written - self.read + self.written * factor + self.read * READ
        return (
            math.ceil(tokens * INPUT[self.model][tier] + made * OUTPUT[self.model][tier]) + self.searches * SEARCH_NANO
        )

    def openai_usage(self) -> Json:
        """With the parts of the prompt."""
        parts = {"cached_tokens": self.read, "cache_write_tokens": self.written}
        return {**super().openai_usage(), "prompt_tokens_details": parts}

    def anthropic_usage(self) -> Json:
        """Likewise; cached tokens are beside the others."""
        told: Json = {
            "input_tokens": self.prompt - self.written - self.read,
            "cache_creation_input_tokens": self.written,
            "cache_read_input_tokens": self.read,
        }
        if self.tells_ttl:
            names = {"5m": "ephemeral_5m_input_tokens", "1h": "ephemeral_1h_input_tokens"}
            told["cache_creation"] = {name: self.written if ttl == self.ttl else 0 for ttl, name in names.items()}
        if self.tells_tier:
            told["service_tier"] = "priority" if self.is_priority else "standard"
        return told

    def beside(self) -> Json:
        """The tier that it was served at."""
        return {"service_tier": "priority" if self.is_priority else "default"} if self.tells_tier else {}
