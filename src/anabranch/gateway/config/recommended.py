"""A gateway that serves what an evaluation recommends of a folder of fitted routers."""

import os
from pathlib import Path
from typing import Any

from anabranch.errors import ConfigError
from anabranch.gateway.config.gateway import GatewayConfig
from anabranch.gateway.config.strategies import StrategyConfig
from anabranch.routers.recommendation import Picked, no_recommendation, pick

# Of the strategy that serves it.
NAME = "recommended"


def with_recommended(config: GatewayConfig, place: str | Path) -> GatewayConfig:
    """A gateway whose ``auto`` is the recommended router of a folder, or a single file.

    Raises ConfigError if none is recommended or the config has a strategy of that name, CheckpointError as `pick`.
    """
    if NAME in config.strategies:
        raise ConfigError(f"strategies.{NAME} is in the config, and is the name of what --router serves; rename it")
    if pick(place) is None:
        raise ConfigError(
            f"{no_recommendation(place, 'anabranch gateway')}; or give one file: --router {os.path.join(place, 'NAME.safetensors')}"
        )
    strategies = {**config.strategies, NAME: StrategyConfig(router=str(place))}
    return config.replace(strategies=strategies, default_strategy=NAME)


def check_models(name: str, picked: Picked, known: Any) -> None:
    """Raises ConfigError if a gateway with ``known`` models has no use for what is recommended."""
    models = (
        [model.name for model in picked.router.models]
        if picked.choice and picked.choice.kind == "strategy"
        else [picked.name]
    )
    if picked.choice is not None and not set(models) & set(known):
        raise ConfigError(
            f"strategies.{name}: {picked.why}, and {', '.join(models)} {'is' if len(models) == 1 else 'are'} not in the config, "
            f"which has {', '.join(known)}"
        )
