"""ExpertFlow as an engine's config asks for it: from words to the arguments of `offload`, and from a running one to words."""

from pathlib import Path
from typing import Any

from anabranch.serving.expertflow.expertflow import OffloadEngine
from anabranch.serving.expertflow.predictors import files
from anabranch.serving.expertflow.predictors.base import Naming
from anabranch.serving.expertflow.predictors.plain import RouterLookahead
from anabranch.serving.expertflow.token_scheduler import TokenScheduler
from anabranch.serving.experts import AUTO, NONE, ExpertsConfig

__all__ = ["describe", "offload_options", "paired"]


def offload_options(config: ExpertsConfig, model: str | Path) -> dict[str, Any]:
    """Arguments of `offload` and `load_offloaded` for the model at a path."""
    return {
        "policy": config.policy,
        "predictor": _predictor(config, model),
        # What lies beside the model has not been asked for.
        "insist": config.predictor != AUTO,
        "naming": Naming(config.least, config.extra),
        "drop_cache": config.drop_cache,
        "workers": config.workers,
    }


def _predictor(config: ExpertsConfig, model: str | Path) -> str | None:
    """What predicts: what the config names; else a whole-path predictor that was fitted to the model, else the look-ahead."""
    if config.predictor == NONE or not config.is_told:
        return None
    if config.predictor != AUTO:
        return config.predictor
    found = files.find_file(model)
    return RouterLookahead.kind if found is None else str(found)


def paired(config: ExpertsConfig, engine: OffloadEngine) -> dict[str, Any]:
    """Arguments of `Engine.of` for steps in units of two, where the config asks for them. Raises ConfigError if nothing predicts routes."""
    if config.dual_batch is None or not (config.regroup or _knows_steps(engine)):
        return {}
    return {"order": engine.pair(TokenScheduler() if config.regroup else None).order}


def _knows_steps(engine: OffloadEngine) -> bool:
    return engine.predictor is not None and engine.predictor.knows_steps


def describe(config: ExpertsConfig, engine: OffloadEngine) -> dict[str, Any]:
    """What an engine says of its experts when it starts: bytes, policy, ``predictor`` (its kind; None for none), whether that sees whole
    paths (``sees_all_layers``), and the steps of a unit (``dual_batch``, ``regroup``)."""
    predictor = engine.predictor
    return {
        "budget_bytes": engine.budget_bytes,
        "all_bytes": engine.layout.total_bytes,
        "policy": config.policy,
        "predictor": None if predictor is None else predictor.kind,
        "sees_all_layers": _knows_steps(engine),
        "dual_batch": config.dual_batch,
        "regroup": config.dual_batch is not None and config.regroup,
    }
