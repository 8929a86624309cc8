"""Which runs are of routers, which learn in tokens: told by name or by the folder, before anything of either kind is loaded."""

from __future__ import annotations

from pathlib import Path

__all__ = ["ROUTERS", "is_router_run", "learns_router"]

ROUTERS = ("router-r1", "router-r1-grpo")
# Of tasks.
_KINDS = ("grpo", "token_ppo")


def is_router_run(run: Path) -> bool:
    """Whether there is a router's run in a folder."""
    from anabranch.errors import AnabranchError
    from anabranch.train.config import task_kind

    try:
        return task_kind(run) in _KINDS
    except AnabranchError:
        # Whoever reads it says what is wrong.
        return False


def learns_router(out: Path, name: str | None, *, resume: bool) -> bool:
    """Whether a training is one of a router: by its name, or by the run that goes on."""
    return name in ROUTERS or (resume and is_router_run(out))
