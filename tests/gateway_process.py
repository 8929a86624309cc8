"""A gateway as users start it."""

from contextlib import AbstractContextManager

from server_process import SOURCE, Served, started

__all__ = ["SOURCE", "Served", "served"]


def served(*arguments: str, environment: dict[str, str] | None = None) -> AbstractContextManager[Served]:
    """``anabranch gateway serve`` with these arguments on a free port."""
    return started("gateway", "serve", *arguments, environment=environment)
