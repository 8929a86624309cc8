"""The gateway that runs without a config: three scripted models that need no key and no network."""

from typing import Any

from anabranch.config import from_dict
from anabranch.gateway.config.gateway import GatewayConfig

# name, nano-dollars per million prompt and completion tokens, billions of parameters, what it is good at, seconds to the first token,
# tokens a second
_MODELS = (
    (
        "small",
        100_000_000,
        400_000_000,
        3.0,
        "quick and cheap; short questions, rewriting, classification",
        0.02,
        400.0,
    ),
    ("medium", 500_000_000, 1_500_000_000, 30.0, "everyday work; summaries, drafting, simple code", 0.05, 200.0),
    (
        "large",
        3_000_000_000,
        15_000_000_000,
        300.0,
        "slow and dear; hard reasoning, mathematics, long code",
        0.15,
        100.0,
    ),
)
# By the name that requests use.
_STRATEGIES = {
    **{name: name for name in ("rules", "cheapest", "random", "round_robin", "least_latency", "scale")},
    "best-of": "best_of",
    "router-r1": "router_r1",
}


def default_config() -> GatewayConfig:
    """A pool of mock models, ``auto/...`` strategies that need no training, and no keys: for a first look, not for the open net.

    Raises ConfigError if a part of it is not installed.
    """
    models = [
        {
            "name": name,
            "price": {"input": price_in, "output": price_out},
            "context": 128_000,
            "max_tokens": 4096,
            "parameters": parameters,
            "description": description,
            "deployments": [
                {"provider": {"kind": "mock", "model": name, "latency_s": latency_s, "tokens_per_s": speed}}
            ],
        }
        for name, price_in, price_out, parameters, description, latency_s, speed in _MODELS
    ]
    config: dict[str, Any] = {
        "models": models,
        "strategies": {name: {"use": kind} for name, kind in _STRATEGIES.items()},
        "default_strategy": "rules",
        "fallbacks": {"small": ["medium", "large"], "medium": ["large", "small"], "large": ["medium", "small"]},
        "require_key": False,
    }
    return from_dict(GatewayConfig, config)
