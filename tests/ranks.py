"""Run a script in several gloo processes, by the harness that ships (`anabranch.testing.run_ranks`), with the user's compiled kernels."""

import contextlib
import io
import sys
import types

from anabranch.cluster.ranks import run_ranks as ranks_of
from anabranch.places import cache_folder

PREAMBLE = "import os, sys, time, torch, torch.distributed as dist\n"
TIMEOUT_S = 120

# Looked for when tests are collected, before one of them has a cache of its own.
_KERNELS = cache_folder() / "kernels"


def _with_kernels() -> None:
    """A test's own cache has the user's kernels: each rank would compile them anew, which takes a minute of two cores."""
    own = cache_folder() / "kernels"
    if _KERNELS.is_dir() and not own.exists():
        own.parent.mkdir(parents=True, exist_ok=True)
        own.symlink_to(_KERNELS)


def run_ranks(script: str, world_size: int = 2) -> list[str]:
    """What each rank printed. ``script`` finds ``rank`` and ``world``; a rank that fails fails the test."""
    _with_kernels()
    return ranks_of(_run, world_size, script, timeout_s=TIMEOUT_S)


def _run(rank: int, world: int, script: str) -> str:
    # A module of its own, so that what looks for the place of a class finds the script.
    main = types.ModuleType("__main__")
    vars(main).update(rank=rank, world=world)
    sys.modules["__main__"] = main
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(PREAMBLE + script, "<script of ranks>", "exec"), vars(main))
    return printed.getvalue()
