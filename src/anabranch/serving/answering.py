"""Which settings of an engine change what it answers: `EngineInfo.settings` is made of them, and so is ``system_fingerprint``.

Each field of `ServingConfig` and of `ElasticConfig` is in one of three tables, by its path; of a part a dotted one. A field that is in none
fails a test, so whoever adds one says here what it does to answers.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from anabranch.config import Config
from anabranch.seen_files import SeenFile, SeenFiles

__all__ = ["CHANGES", "IN_INFO", "SAME", "answer_settings", "paths_of"]

# Fields of `EngineInfo` that tell what follows from one.
IN_INFO = {
    "model": "files",
    "name": "model",
    "dtype": "numbers",
    "quantize": "numbers",
    "memory": "numbers",
    "max_positions": "max_positions",
    "num_blocks": "max_positions",
    "kv_memory": "max_positions",
    "block_tokens": "max_positions",
    "num_streams": "num_streams",
    "max_depth": "max_depth",
    "pooling": "pooling",
    "stop_tokens": "stop_tokens",
    "depth.usual": "depth",
    "rewiring.on": "rewires",
}

# What is told here, in the words of `_value`.
CHANGES = (
    "device",
    "deterministic",
    "depth.routers",
    "depth.control",
    "depth.skipper",
    "rewiring.settings",
    "adapters.load",
)

_ROUNDING = (
    "which requests run together, and in which pieces, moves the last digits alone, as it does from request to request"
)
_ROOM = "where keys and values lie, not what they are"
_EXPERTS = "experts come and go; those that run are the same"
_LIFE = "how it is run and watched"
_SCALING = "how many devices there are and when, and how weights come to them"

# Why answers to a request with a seed stay what they are.
SAME = {
    **dict.fromkeys(
        (
            "threads",
            "max_batched_tokens",
            "max_seqs",
            "long_prefill_chunk",
            "prefix_cache",
            "nano_batches",
            "pipeline",
            "scheduling",
            "context",
            "admit_by_peak",
        ),
        _ROUNDING,
    ),
    "prompt_lookup": "guesses are checked, and only those that the model would have said are kept",
    "prompt_lookup_ngram": "guesses are checked, and only those that the model would have said are kept",
    "host_kv": _ROOM,
    "disk_kv": _ROOM,
    "adapters.memory": "which adapters are in memory, not what they are",
    "adapters.versions": "what those of the start are, which their versions tell, whoever has told them",
    "expert_budget": _EXPERTS,
    **{
        f"experts.{name}": _EXPERTS
        for name in ("predictor", "policy", "least", "extra", "drop_cache", "workers", "dual_batch", "regroup")
    },
    **dict.fromkeys(("watchdog_s", "process", "context_timeout_s", "pace_s", "pace_token_s"), _LIFE),
    "rewiring.limits": "what a request may ask for, not what it gets",
    "seed": "of requests that bring none, which nobody can ask for again",
    **dict.fromkeys(
        ("devices", "weights", "device_memory", "mode", "standby", "ahead", "busy", "mapped", "p2p", "forks"), _SCALING
    ),
    **{
        f"policy.{name}": _SCALING
        for name in (
            "by",
            "min_devices",
            "max_devices",
            "step",
            "ttft_s",
            "tpot_s",
            "attainment",
            "window_s",
            "min_requests",
            "cool_down_s",
            "low",
            "high",
            "patience_s",
            "hours",
        )
    },
}


def paths_of(config: Any) -> list[str]:
    """The path of each field, those of parts among them."""
    found = []
    for field in fields(config):
        part = field.default
        found += [f"{field.name}.{path}" for path in paths_of(part)] if isinstance(part, Config) else [field.name]
    return found


def answer_settings(config: Config, adapters: Mapping[str, str | None] | None = None) -> str:
    """What of ``config`` changes answers and is in nothing else of `EngineInfo`: as text, equal where answers may be expected to be.

    Args:
        config: a `ServingConfig` or an `ElasticConfig`.
        adapters: of each that is there from the start the version of its numbers.
    """
    told = {path: _value(path, config, adapters or {}) for path in CHANGES if path in paths_of(config)}
    return repr({path: value for path, value in told.items() if value})


def _value(path: str, config: Any, adapters: Mapping[str, str | None]) -> Any:
    if path == "device":
        # Processors of a kind compute alike.
        return config.device.partition(":")[0]
    if path == "depth.control":
        return config.depth.control if config.depth.routers is not None else None
    if path == "depth.routers":
        return _content(config.depth.routers)
    if path == "depth.skipper":
        return _content(config.depth.skipper)
    if path == "rewiring.settings":
        return repr(config.rewiring.rewiring) if config.rewiring.on else None
    if path == "adapters.load":
        return sorted(adapters.items())
    return getattr(config, path)


def _content(place: str | None) -> str | None:
    """Of a file, whatever it is called, or of the files in a folder, wherever that is."""
    if place is None:
        return None
    path = Path(place)
    if path.is_dir():
        return SeenFiles.of(each for each in path.iterdir() if each.is_file()).content
    found = SeenFile.of(path)
    return f"{found.size} {found.sample}"
