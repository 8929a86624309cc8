"""Request to device: an engine for routed models, and what stands around it.

Names are imported when they are first used, so that `anabranch.serving.core` needs neither PyTorch nor NumPy.
"""

import importlib
from typing import TYPE_CHECKING, Any

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

_HOMES = {
    "anabranch.serving.config": ("ServingConfig",),
    "anabranch.serving.core.client": ("EngineClient", "EngineInfo", "EngineStats"),
    "anabranch.serving.core.request": ("Finish", "Output", "Request", "Sampling"),
    "anabranch.serving.engine": ("LLM", "LocalEngine", "ProcessEngine"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)
