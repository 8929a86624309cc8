"""Two doors lead to the same commands: ``anabranch gateway`` and, without the proxy, ``anabranch routers``. Each names itself."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from inspect import getdoc

GATEWAY, ROUTERS = "anabranch gateway", "anabranch routers"
_entered: ContextVar[str] = ContextVar("door", default=GATEWAY)


def door() -> str:
    """The one through which the command under way was called."""
    return _entered.get()


def entering(name: str) -> Callable[[], None]:
    """What the group of a door does before its commands."""

    def enter() -> None:
        _entered.set(name)

    return enter


def help_of(command: Callable[..., None], name: str) -> str:
    """What a command says of itself at a door."""
    return (getdoc(command) or "").replace(f"Example: {GATEWAY} ", f"Example: {name} ")
