"""torchrun as tests start it, and the processes that it has started."""

import sys
from pathlib import Path


def started_by(processes, *, restarts=0):
    """The beginning of a command line of so many processes, which are started again so often where one ends by an error."""
    counts = ["--nproc-per-node", str(processes), "--max-restarts", str(restarts)]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", *counts, "-m", "anabranch"]


def children_of(pid):
    """The processes that a torchrun has started, by rank."""
    found = {}
    for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        named = dict(pair.split(b"=", 1) for pair in Path(f"/proc/{child}/environ").read_bytes().split(b"\0") if pair)
        if b"RANK" in named:
            found[int(named[b"RANK"])] = child
    return found
