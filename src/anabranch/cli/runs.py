"""Run configs from what is given on the command line: a preset, a TOML file, fields set by path."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anabranch import presets
from anabranch.bounds import shown
from anabranch.cli.options import read_toml
from anabranch.config import override, quoted
from anabranch.errors import ConfigError
from anabranch.train import RunConfig

DEFAULT_PRESET = "demo"


def build_config(
    preset: str | None, config_file: Path | None, size: str | None, assignments: Mapping[str, Any]
) -> tuple[str, RunConfig]:
    """Name and config: the preset, then what the file sets, then ``assignments``.

    The file may name the preset itself (``preset = "moe"`` at its top, and ``size``); one given on the command line wins.
    """
    table = read_toml(config_file) if config_file else {}
    name = preset or table.pop("preset", None) or DEFAULT_PRESET
    wanted = size or table.pop("size", None) or "tiny"
    table.pop("preset", None), table.pop("size", None)
    for field, value in (("preset", name), ("size", wanted)):
        if not isinstance(value, str):
            raise ConfigError(f"{field} in {config_file} is {shown(value)}; it must be a name")
    if name not in presets.names() and Path(name).exists():
        raise ConfigError(
            f"{name!r} is a file or folder, not a preset; give text with --data, and put patterns in quotes"
        )
    config = presets.find(name)(wanted)
    return name, override(config, {**flatten(table), **assignments})


def names_preset(config_file: Path) -> bool:
    """Whether a TOML file says what it starts from."""
    return "preset" in read_toml(config_file)


def set_fields(config_file: Path | None, assignments: Mapping[str, Any]) -> dict[str, Any]:
    """What file and command line set, by dotted path."""
    table = read_toml(config_file) if config_file else {}
    return {name: value for name, value in flatten(table).items() if name not in ("preset", "size")} | dict(assignments)


def check_preset(name: str, config: RunConfig, out: Path) -> None:
    """Raise ConfigError if there is no preset of this name, or the run in ``out`` is of another design."""
    wanted, held = (found.model.feed_forward.owner.kind for found in (presets.find(name)("tiny"), config))
    if wanted != held:
        raise ConfigError(
            f"{out} holds a run whose layers are {held!r}, and those of preset {name!r} are {wanted!r}; "
            "leave the preset out to continue it"
        )


def flatten(table: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """The leaves of nested tables by dotted path; ``kind`` before what it has, since it decides what that may be."""
    leaves: dict[str, Any] = {}
    for name, value in sorted(table.items(), key=lambda item: item[0] != "kind"):
        here = f"{path}.{quoted(name)}" if path else quoted(name)
        if isinstance(value, Mapping) and value:
            leaves |= flatten(value, here)
        else:
            leaves[here] = value
    return leaves


def describe_model(config: RunConfig) -> str:
    """A few words: layers, experts, what is active, what is shared."""
    model = config.model
    routed: Any = model.feed_forward
    words = [f"{model.num_layers} layers"]
    if routed.is_routed:
        experts = getattr(routed, "num_experts", None)
        words[0] += f" x {experts} experts" if experts else ""
        choices = routed.router.select.exact_choices if hasattr(routed, "router") else None
        words += [f"top-{choices}"] if choices else []
        words += [f"{routed.shared_experts} shared"] if getattr(routed, "shared_experts", 0) else []
        words += [f"reuse {routed.reuse}"] if getattr(routed, "reuse", 1) > 1 else []
    return ", ".join([*words, f"width {model.dim}"])
