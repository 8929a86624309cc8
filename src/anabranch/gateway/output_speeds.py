"""How fast answers are made where nobody declares it: of most providers, and of those on hardware made for it."""

from urllib.parse import urlsplit

# Tokens a second of one answer, at most: more than most of today's models make. And the most that is taken.
OUTPUT_SPEED, MOST_SPEED = 500.0, 1e6

# By address, of those that make more. Twice what they tell of their fastest models, as that is what is usual there and not the most: Groq
# (console.groq.com/docs/models) a thousand, Cerebras (inference-docs.cerebras.ai/models/overview) three thousand.
_FAST = {"groq.com": 2_000.0, "cerebras.ai": 6_000.0}


def speed_at(base_url: str) -> float | None:
    """Tokens a second of one answer, at most, of what is at an address and is known to be faster than `OUTPUT_SPEED`; None for all else."""
    try:
        host = urlsplit(base_url).hostname or ""
    except ValueError:
        return None
    return next((speed for name, speed in _FAST.items() if host == name or host.endswith(f".{name}")), None)
