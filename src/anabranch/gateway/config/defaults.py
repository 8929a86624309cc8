"""The gateway that runs without a config: three scripted models that need no key and no network."""

from typing import Any

from anabranch.config import from_dict
from anabranch.gateway.config.gateway import GatewayConfig

# name, dollars per million prompt and completion tokens as nano-dollars, billions of parameters, what it is good at
_MODELS = (
    ("small", 100_000_000, 400_000_000, 3.0, "quick and cheap; short questions, rewriting, classification"),
    ("medium", 500_000_000, 1_500_000_000, 30.0, "everyday work; summaries, drafting, simple code"),
    ("large", 3_000_000_000, 15_000_000_000, 300.0, "slow and dear; hard reasoning, mathematics, long code"),
)
_STRATEGIES = ("cheapest", "random", "round_robin", "least_latency")
_HARD = r"(?i)\b(prove|theorem|integral|derive|debug|refactor|step by step)\b|```"


def default_config() -> GatewayConfig:
    """A pool of mock models, ``auto/...`` strategies that need no training, and no keys: for a first look, not for the open net.

    Raises ConfigError if a part of it is not installed.
    """
    models = [
        {
            "name": name, "price": {"input": price_in, "output": price_out}, "context": 128_000, "max_tokens": 4096,
            "parameters": parameters, "description": description, "deployments": [{"provider": _provider(name)}],
        }
        for name, price_in, price_out, parameters, description in _MODELS
    ]  # fmt: skip
    config: dict[str, Any] = {
        "models": models,
        "strategies": {name: {"use": name} for name in _STRATEGIES},
        "default_strategy": "cheapest",
        "fallbacks": {"small": ["medium", "large"], "medium": ["large", "small"], "large": ["medium", "small"]},
        "require_key": False,
    }
    return from_dict(GatewayConfig, config)


def _provider(name: str) -> dict[str, Any]:
    return {"kind": "mock", "model": name}
