"""Where ``pool.json`` lies in the folder of a pool, and what it says of these adapters; see `anabranch.adapters.glider.settings`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from anabranch.adapters.glider.settings import PoolSettings, read_settings
from anabranch.errors import ConfigError
from anabranch.files import read_json

__all__ = ["POOL", "PoolKind", "named_by", "pool_file", "settings_in"]

POOL = "pool.json"

PoolKind = Literal["glider", "phatgoose", "arrow"]
# What a kind of pool decides before its file.
_KINDS: dict[PoolKind, dict[str, Any]] = {
    "glider": {},
    "phatgoose": {"local": "phatgoose", "instruction": False},
    "arrow": {"local": "arrow", "instruction": False},
}


def pool_file(folder: Path) -> Path | None:
    """The file that says how a pool chooses; None without one."""
    path = folder / POOL
    return path if path.is_file() else None


def settings_in(folder: Path, num_experts: int, kind: PoolKind | None = None) -> PoolSettings:
    """What the file of a pool of so many adapters says, a table of fields of `PoolSettings`; what its ``kind`` decides goes before that.

    Raises CheckpointError for a file that cannot be read, ConfigError for settings that cannot be; both name the file.
    """
    path = pool_file(folder)
    said = {} if path is None else read_json(path)
    with named_by(path):
        # Of so many adapters, while it is known who said so.
        return read_settings(said, _KINDS[kind or "glider"], num_experts)


@contextmanager
def named_by(path: Path | None) -> Iterator[None]:
    """Errors of settings name the file that has them; None for settings that are in none."""
    try:
        yield
    except ConfigError as error:
        raise (error if path is None else ConfigError(f"{path}: {error}")) from None
