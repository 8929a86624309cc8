"""What may be given to a training of `rl train` on its command line."""

from __future__ import annotations

from pathlib import Path

from anabranch.errors import ConfigError


def check_resumed(out: Path, what: str | None, seed: int | None) -> None:
    """Raise ConfigError where a run that goes on is told again what it learns, or its seed."""
    for name, given in (("WHAT", what), ("--seed", seed)):
        if given is not None:
            raise ConfigError(
                f"{name} is given with --resume, which goes on with the run in {out} as it began; leave it out"
            )
