"""`Foreign`: a config.json of Hugging Face's, read field by field."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from anabranch.bounds import MOST_LAYERS, shown
from anabranch.errors import CheckpointError

__all__ = ["Foreign"]


class Foreign:
    """A foreign config.json, read field by field."""

    def __init__(self, table: dict[str, Any], path: Path) -> None:
        self.table, self.path = table, path

    def __getitem__(self, name: str) -> Any:
        """A field that must be there."""
        if self.table.get(name) is None:
            raise CheckpointError(f"{self.path} has no {name}, without which the model cannot be built")
        return self.table[name]

    def get(self, name: str, default: Any = None) -> Any:
        """A field, or ``default`` where it is absent or null."""
        value = self.table.get(name)
        return default if value is None else value

    def with_usual(self, **usual: Any) -> "Foreign":
        """The same, with what a family takes for fields that are absent; null stays null."""
        return Foreign({**usual, **self.table}, self.path)

    @property
    def num_layers(self) -> int:
        """``num_hidden_layers``, checked here because families walk through the layers before a config of ours is made."""
        value = self["num_hidden_layers"]
        if type(value) is not int or not 1 <= value <= MOST_LAYERS:
            raise CheckpointError(
                f"num_hidden_layers in {self.path} is {shown(value)}; it must be a whole number from 1 to {MOST_LAYERS}"
            )
        return value

    def refuse(self, name: str, value: Any, supported: str) -> None:
        """Raise CheckpointError: ``name`` has a ``value`` that asks for something we do not compute."""
        raise CheckpointError(
            f"{name} in {self.path} is {shown(value)}, which is not supported; supported: {supported}"
        )

    def require(self, name: str, allowed: Collection[Any], default: Any = None) -> None:
        """Refuse any value that is not ``allowed``."""
        value = self.get(name, default)
        if value is not None and value not in allowed:
            self.refuse(name, value, " or ".join(repr(one) for one in allowed))
