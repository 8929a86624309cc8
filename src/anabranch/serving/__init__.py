"""Request to device: an engine for routed models, and what stands around it.

Names are imported when they are first used, so that `anabranch.serving.core` needs neither PyTorch nor NumPy.
"""

from typing import TYPE_CHECKING

from anabranch.extras import lazy

if TYPE_CHECKING:
    from anabranch.serving.config import ServingConfig
    from anabranch.serving.core.client import EngineClient, EngineInfo, EngineStats
    from anabranch.serving.core.request import Finish, Output, Request, Sampling
    from anabranch.serving.engine import LLM, LocalEngine, ProcessEngine

__all__ = [
    "LLM",
    "EngineClient",
    "EngineInfo",
    "EngineStats",
    "Finish",
    "LocalEngine",
    "Output",
    "ProcessEngine",
    "Request",
    "Sampling",
    "ServingConfig",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "ServingConfig": ".config",
        **dict.fromkeys(("EngineClient", "EngineInfo", "EngineStats"), ".core.client"),
        **dict.fromkeys(("Finish", "Output", "Request", "Sampling"), ".core.request"),
        **dict.fromkeys(("LLM", "LocalEngine", "ProcessEngine"), ".engine"),
    },
)
