"""Query -> model: an OpenAI-compatible gateway whose routing is learned, judged and explained.

    from anabranch.gateway import Gateway, strategies

Nothing here imports torch unless a strategy or an embedder that needs it is used; what is named is loaded when it is first used.
"""

from typing import TYPE_CHECKING

from anabranch.extras import lazy

if TYPE_CHECKING:
    from anabranch.gateway.config import GatewayConfig, load_config
    from anabranch.gateway.gateway import Gateway
    from anabranch.routers import strategies
    from anabranch.web.api_error import ApiError

__all__ = ["ApiError", "Gateway", "GatewayConfig", "load_config", "strategies"]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "ApiError": "anabranch.web.api_error",
        "Gateway": ".gateway",
        "GatewayConfig": ".config",
        "load_config": ".config",
        "strategies": "anabranch.routers",
    },
)
