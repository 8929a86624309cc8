"""`answer_mark`: what tells configs apart that answer the same request differently."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from anabranch.config import to_dict
from anabranch.errors import ConfigError
from anabranch.gateway.config import GatewayConfig
from anabranch.routers.contract.strategy import Strategy

# Fields of a config that decide who answers, and how.
DECIDING = (
    "models",
    "strategies",
    "ab",
    "default",
    "fallbacks",
    "context_fallbacks",
    "filter_fallbacks",
    "embedder",
    "mid_stream",
)


def answer_mark(config: GatewayConfig, strategies: Mapping[str, Strategy] | None = None) -> bytes:
    """16 bytes that two gateways share where an answer of one is as good as an answer of the other, for as long.

    Models, deployments, strategies and what fitted routers have in their files make a difference, as does ``cache.ttl_s``; where
    gateways listen, who may ask how much, and what strategies learn while they run do not.

    Args:
        config: checked.
        strategies: ready-made ones that take the place of the config's.

    Raises ConfigError for a router's file that cannot be read.
    """
    ready = strategies or {}
    parts = {name: to_dict(getattr(config, name)) for name in DECIDING}
    parts["ttl_s"] = config.cache.ttl_s
    parts["routers"] = {
        name: _router(name, strategy.router)
        for name, strategy in config.strategies.items()
        if strategy.router is not None and name not in ready
    }
    parts["ready"] = {
        name: [type(strategy).__module__, type(strategy).__qualname__, to_dict(strategy.config)]
        for name, strategy in ready.items()
    }
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).digest()[:16]


def _router(name: str, place: str) -> dict[str, str]:
    try:
        return dict(_contents(Path(place)))
    except OSError as error:
        raise ConfigError(f"strategies.{name}.router: {place!r} cannot be read: {error}") from None


def _contents(place: Path) -> Iterator[tuple[str, str]]:
    """Names and digests of a file, or of all files of a folder."""
    files = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
    for path in files:
        with path.open("rb") as file:
            yield str(path.relative_to(place)), hashlib.file_digest(file, "sha256").hexdigest()
