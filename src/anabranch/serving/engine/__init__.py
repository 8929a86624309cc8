"""The engine: a paged key-value store, a runner, a loop, and its clients in a thread, a process, or none."""

from anabranch.extras import require

require("lm", by=__name__)

from anabranch.serving.engine.engine import Engine
from anabranch.serving.engine.llm import LLM, Generation
from anabranch.serving.engine.local import LocalEngine
from anabranch.serving.engine.loop import EngineLoop
from anabranch.serving.engine.paged import PagedPool, PagedShape, PagedStore
from anabranch.serving.engine.process import ProcessEngine
from anabranch.serving.engine.runner import ModelRunner

__all__ = [
    "LLM",
    "Engine",
    "EngineLoop",
    "Generation",
    "LocalEngine",
    "ModelRunner",
    "PagedPool",
    "PagedShape",
    "PagedStore",
    "ProcessEngine",
]
