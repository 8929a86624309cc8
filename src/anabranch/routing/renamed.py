"""Names of before, kept for one version."""

import warnings
from typing import Any

__all__ = ["Renamed"]


class Renamed:
    """The name that an attribute had: reads the attribute ``to`` of its object, with a DeprecationWarning."""

    def __init__(self, to: str) -> None:
        self._to = to

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        message = (
            f"{self._name} of {type(instance).__name__} is called {self._to}; the old name goes in the next version"
        )
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return getattr(instance, self._to)
