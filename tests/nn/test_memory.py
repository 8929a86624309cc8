"""What the C library is told, in a process of its own, since it stays told."""

import platform
import subprocess
import sys
import threading

import pytest

from anabranch.nn.kernels import memory

STEPS = """
import resource, torch
from anabranch.nn.kernels.memory import keep_freed_memory
torch.set_num_threads(1)
def step():
    held = [torch.ones(3 << 18) for _ in range(30)]  # 3 MB each
def faults():
    for _ in range(3):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
untold = faults()
assert keep_freed_memory()
print(untold, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc is what can be told")
def test_freed_memory_is_used_again():
    """Pages that the system cleared in ten steps of 90 MB, each like those before; in one process, which takes seconds to begin."""
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True)
    untold, told = map(int, done.stdout.split())
    assert 10 * told < untold  # a tenth, since pages may be small or huge


def test_memory_may_return_while_the_same_thread_looks_for_some():
    """Garbage collection may come at any allocation, and let a gradient go."""

    def collect_inside():
        with memory._lock:
            memory._give_back(1, None)

    thread = threading.Thread(target=collect_inside, daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert memory._free.pop(1) == [None]
