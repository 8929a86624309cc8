"""Query -> model: an OpenAI-compatible gateway whose routing is learned, judged and explained.

    from anabranch.gateway import Gateway, strategies

Nothing here imports torch unless a strategy or an embedder that needs it is used; what is named is loaded when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anabranch.gateway import strategies
    from anabranch.gateway.config import GatewayConfig, load_config
    from anabranch.gateway.gateway import Gateway
    from anabranch.web.api_error import ApiError

__all__ = ["ApiError", "Gateway", "GatewayConfig", "load_config", "strategies"]

_HOME = {
    "ApiError": "anabranch.web.api_error",
    "Gateway": "anabranch.gateway.gateway",
    "GatewayConfig": "anabranch.gateway.config",
    "load_config": "anabranch.gateway.config",
}


def __getattr__(name: str) -> Any:
    if name == "strategies":
        return importlib.import_module("anabranch.gateway.strategies")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
