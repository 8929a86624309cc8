"""Run a script in several gloo processes: the smallest way to test what happens between ranks."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from anabranch.places import cache_folder

PREAMBLE = """
import os, sys, time, torch, torch.distributed as dist
torch.set_num_threads(1)
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo", init_method="file://" + os.environ["STORE"], rank=rank, world_size=world)
"""


# Looked for when tests are collected, before one of them has a cache of its own.
_KERNELS = cache_folder() / "kernels"


def _with_kernels() -> None:
    """A test's own cache has the user's kernels: each rank would compile them anew, which takes a minute of two cores."""
    own = cache_folder() / "kernels"
    if _KERNELS.is_dir() and not own.exists():
        own.parent.mkdir(parents=True, exist_ok=True)
        own.symlink_to(_KERNELS)


def run_ranks(script: str, folder: Path, world_size: int = 2) -> list[str]:
    """What each rank printed. ``script`` finds ``rank`` and ``world``; a rank that fails fails the test."""
    # A pause before the end: threads of gloo may still want the interpreter's lock, and the end would wait for them holding it.
    end = "\ntime.sleep(0.2)\ndist.destroy_process_group()\n"
    store = Path(tempfile.mkdtemp(dir=folder)) / "store"
    processes = []
    _with_kernels()
    for rank in range(world_size):
        env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world_size), "STORE": str(store)}
        command = [sys.executable, "-c", PREAMBLE + script + end]
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=120) for process in processes]
    for process, (_, stderr) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, stderr
    return [stdout for stdout, _ in outputs]
