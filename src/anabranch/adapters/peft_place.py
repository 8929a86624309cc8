"""`check_there`: what lies where a folder of peft's should, and which command takes it."""

from itertools import islice
from pathlib import Path

from anabranch.errors import CheckpointError

__all__ = ["CONFIG", "check_there", "what_lies_at"]

CONFIG = "adapter_config.json"
# Of our own form, see own_folder.
_OWN = "adapter.json"
# Entries of a folder that are looked at, and adapters that are told.
_MOST, _TOLD = 1000, 3


def check_there(place: Path) -> None:
    """Raise CheckpointError unless there is a folder of peft's; it says what is there instead, and what takes that."""
    if (place / CONFIG).is_file():
        return
    if (place / _OWN).is_file():
        raise CheckpointError(
            f"{place} is an adapter in anabranch's own form, and one in peft's is needed; anabranch adapters export MODEL {place} "
            "--out DIR makes one (--task or --average says of what)"
        )
    raise CheckpointError(f"no adapter at {place}: it {what_lies_at(place)}")


def what_lies_at(place: Path) -> str:
    """What a place without an adapter is, and what to give instead."""
    give = "give a folder that anabranch adapt or peft's save_pretrained wrote"
    if not place.is_dir():
        return f"is a file; {give}" if place.is_file() else f"is not there; {give}"
    adapters = _adapters_in(place)
    if adapters == ["adapter"]:
        return f"holds no {CONFIG}, and is a run of anabranch adapt; give its adapter, {place / 'adapter'}"
    if adapters:
        named = ", ".join(adapters[:_TOLD]) + (", ..." if len(adapters) > _TOLD else "")
        return (
            f"holds no {CONFIG}, and is a pool, a folder of adapters ({named}); name one of them here (anabranch adapters eval and "
            "route take pools)"
        )
    if (place / "catalogue_adapter.json").is_file():
        return f"holds no {CONFIG}, and is of catalogue.apply, which load_applied reads in Python; commands read what adapt writes"
    if (place / "config.json").is_file():
        return f"holds no {CONFIG}, and is a model (config.json); {give}, and the model where MODEL stands"
    return f"holds no {CONFIG}; {give}"


def _adapters_in(place: Path) -> list[str]:
    """Names of the adapters in a folder, sorted; none where it cannot be read."""
    try:
        entries = islice(place.iterdir(), _MOST)
        return sorted(path.name for path in entries if (path / CONFIG).is_file() or (path / _OWN).is_file())
    except OSError:
        return []
