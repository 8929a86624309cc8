"""Names of before, kept for one version."""

import importlib
import warnings
from collections.abc import Callable
from typing import Any

__all__ = ["Renamed", "moved"]


def moved(module: str, names: dict[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of ``module``, whose ``names`` are in other modules now: gives them from there, with a DeprecationWarning."""

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(
            f"{name} of {module} is in {names[name]}; the old place goes in the next version",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(importlib.import_module(names[name]), name)

    return find


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
