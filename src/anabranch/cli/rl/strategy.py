"""What a gateway needs of a router that was trained: its strategy, and where all its models are known a whole config."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from anabranch.errors import InputError
from anabranch.files import atomic_write_text
from anabranch.toml_text import toml_text

__all__ = ["GATEWAY", "STRATEGY", "write_strategy"]

# In the folder of a run.
STRATEGY, GATEWAY = "strategy.toml", "gateway.toml"
_STRATEGY_HEAD = """\
# For a gateway that has the router's checkpoint as the model "router", and the models of the world by these names.
"""
_GATEWAY_HEAD = """\
# A gateway with the router, which is asked as auto/router-r1, and its pool: anabranch gateway serve --config
# Whoever reaches it may ask it; for a gateway that others reach see "anabranch gateway keys".
"""

logger = logging.getLogger(__name__)


def write_strategy(world: Any, out: Path) -> dict[str, str]:
    """Write what a gateway needs of the router in ``out``; the files by what they are. Nothing for a world of no router's.

    A file that TOML cannot spell (a folder whose name is not UTF-8) is left out with a warning: the router was trained.
    """
    from anabranch.rl.router_r1 import LiveWorld, RoutedWorld

    if not isinstance(world, RoutedWorld):
        return {}
    strategy = _strategy(world)
    tables = {"strategy": (STRATEGY, _STRATEGY_HEAD, strategy)}
    models = _models(world, out) if isinstance(world, LiveWorld) else None
    if models is not None:
        tables["gateway"] = (
            GATEWAY,
            _GATEWAY_HEAD + _left_out(world),
            {"require_key": False, "models": models, **strategy},
        )
    written = {}
    for what, (name, head, table) in tables.items():
        try:
            text = head + toml_text(table)
        except InputError as error:
            logger.warning("%s was not written: it %s", name, error)
            continue
        atomic_write_text(out / name, text)
        written[what] = str(out / name)
    return written


def _left_out(world: Any) -> str:
    """A line on what models were asked with in training that a gateway's config cannot say; it is warned of, too."""
    names = [name for name, one in world.config.models.items() if one.settings]
    if not names:
        return ""
    told = f"settings of {', '.join(map(repr, names))} are not in {GATEWAY}: clients of the gateway say such fields themselves"
    logger.warning("%s", told)
    return f"# {told}\n"


def _strategy(world: Any) -> dict[str, Any]:
    """With the models as an episode names them."""
    return {"strategies": {"router-r1": {"policy": "router", **world.strategy(), "about": world.about()}}}


def _models(world: Any, out: Path) -> list[dict[str, Any]] | None:
    """The models of a gateway: the router, and those of its pool; None where one is known from a table alone, or called as the router."""
    models = [_model("router", 0.0, 0.0, {"kind": "local", "model": str(out.resolve())})]
    for name, one in world.config.models.items():
        there = world.endpoint_of(name)
        if name == "router" or (there is None and not one.engine):
            return None
        if there is None:
            provider = {"kind": "local", "model": str(Path(one.engine).resolve())}
            provider |= {"engine": one.engine_settings} if one.engine_settings else {}
        else:
            url, key_env, model = there
            provider = {"kind": "openai", "model": model, "base_url": url, "key_env": key_env}
        models.append(_model(name, one.price.input_usd, one.price.output_usd, provider))
    return models


def _model(name: str, input_usd: float, output_usd: float, provider: dict[str, Any]) -> dict[str, Any]:
    price = {"input_usd": input_usd, "output_usd": output_usd}
    return {"name": name, "price": price, "deployments": [{"provider": provider}]}
