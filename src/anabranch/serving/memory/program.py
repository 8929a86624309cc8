"""What an engine's processes take before there is a model: measured in one that has loaded the same code and the model's tokenizer.

``python -m anabranch.serving.memory.program MODEL`` prints two numbers of bytes: of a front end, and of an engine.
"""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

from anabranch.errors import AnabranchError, BackendError

__all__ = ["peak_bytes", "program_bytes"]

# What is measured differs by less from one time to the next.
STEP = 4 << 20
TIMEOUT_S = 300.0


def program_bytes(model: str, *, processes: int) -> int:
    """Memory of a program that serves ``model`` without its weights, as the system counts it for each process: code in files too.

    Args:
        model: a path; its tokenizer is read.
        processes: 2 for a front end and an engine of its own, 1 for both in one.

    Raises BackendError where the process that is measured cannot run.
    """
    command = [sys.executable, "-m", "anabranch.serving.memory.program", model]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S, check=False
        )
        front, engine = map(int, done.stdout.split()[-2:])
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise BackendError(f"the memory of the program cannot be measured: {error}") from error
    taken = engine if processes == 1 else front + engine
    return -(-taken // STEP) * STEP


def peak_bytes() -> int:
    """The most memory that this process has had at a time."""
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found is not None:
        return int(found[1]) << 10
    # In KiB but on macOS; what a parent had before counts here.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)


def main(model: str) -> None:
    """Load what both processes load, and tell what that took."""
    # The last two are for command lines.
    import rich.table  # noqa: F401
    import torch
    import typer  # noqa: F401

    import anabranch.serving.engine.worker
    import anabranch.serving.expertflow
    import anabranch.serving.http.run
    import anabranch.serving.load  # noqa: F401
    from anabranch.nn.kernels import load
    from anabranch.serving.http.serve import read_tokenizer
    from anabranch.serving.sampling import Sampler

    try:
        tokenizer = read_tokenizer(model)
        tokenizer.encode("as whoever serves it will")
    except AnabranchError:
        tokenizer = None
    front = peak_bytes()
    load()
    torch.ones(64, 64) @ torch.ones(64, 64)
    sampler = Sampler(257 if tokenizer is None else tokenizer.vocab_size, tokenizer=tokenizer)
    sampler.warm_up()
    sampler.close()
    print(front, peak_bytes())


if __name__ == "__main__":
    main(sys.argv[1])
