"""Run a script in several gloo processes: the smallest way to test what happens between ranks."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

PREAMBLE = """
import os, sys, time, torch, torch.distributed as dist
torch.set_num_threads(1)
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo", init_method="file://" + os.environ["STORE"], rank=rank, world_size=world)
"""


def run_ranks(script: str, folder: Path, world_size: int = 2) -> list[str]:
    """What each rank printed. ``script`` finds ``rank`` and ``world``; a rank that fails fails the test."""
    # A pause before the end: threads of gloo may still want the interpreter's lock, and the end would wait for them holding it.
    end = "\ntime.sleep(0.2)\ndist.destroy_process_group()\n"
    store = Path(tempfile.mkdtemp(dir=folder)) / "store"
    processes = []
    for rank in range(world_size):
        env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world_size), "STORE": str(store)}
        command = [sys.executable, "-c", PREAMBLE + script + end]
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=120) for process in processes]
    for process, (_, stderr) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, stderr
    return [stdout for stdout, _ in outputs]
