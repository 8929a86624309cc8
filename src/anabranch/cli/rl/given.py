"""What may be given to a training of `rl train` on its command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anabranch.errors import ConfigError


def check_settings(settings: Mapping[str, Any], sections: Sequence[str], examples: str) -> None:
    """Raise ConfigError for a ``--set`` of a field that is in none of these sections; ``examples`` are two that are."""
    wrong = next((name for name in settings if name.partition(".")[0] not in sections or "." not in name), None)
    if wrong is not None:
        listed = " and ".join([", ".join(sections[:-1]), sections[-1]])
        raise ConfigError(f"--set {wrong}: fields of {listed} can be set, such as {examples}")


def check_resumed(out: Path, what: str | None, seed: int | None) -> None:
    """Raise ConfigError where a run that goes on is told again what it learns, or its seed."""
    for name, given in (("WHAT", what), ("--seed", seed)):
        if given is not None:
            raise ConfigError(
                f"{name} is given with --resume, which goes on with the run in {out} as it began; leave it out"
            )
