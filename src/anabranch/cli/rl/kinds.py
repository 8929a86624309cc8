"""Which runs are of policies of tokens: told by name or by the folder, before anything of either kind is loaded."""

from __future__ import annotations

from pathlib import Path

from anabranch.errors import AnabranchError
from anabranch.run_folder import task_kind

__all__ = ["ANSWERS", "ROUTERS", "is_token_run", "learns_tokens"]

ROUTERS = ("router-r1", "router-r1-grpo")
# Questions of one's own: what is named on a command line, and its task.
ANSWERS = {"grpo": "grpo", "token-ppo": "token_ppo"}
# Of tasks.
_KINDS = ("grpo", "token_ppo")


def is_token_run(run: Path) -> bool:
    """Whether there is a run of a policy of tokens in a folder."""
    try:
        return task_kind(run) in _KINDS
    except AnabranchError:
        # Whoever reads it says what is wrong.
        return False


def learns_tokens(out: Path, name: str | None, *, resume: bool) -> bool:
    """Whether a training is one of a policy of tokens: by its name, or by the run that goes on."""
    return name in (*ROUTERS, *ANSWERS) or (resume and is_token_run(out))
