"""A process that ends while an engine loads or computes in one of its threads ends by itself, with its own status."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from anabranch.serving.engine import at_exit

SOURCE = str(Path(__file__).parents[3] / "src")
HEAD = """
import asyncio, sys, threading, time
import torch
from anabranch.serving.engine.at_exit import end_before_exit
from anabranch.serving.engine.local import LocalEngine

begun = threading.Event()

def loads():
    try:
        begun.set()
        x = torch.ones(300, 300)
        while True:
            x = (x @ x).softmax(-1)
    finally:
        print("cut off", flush=True)
"""
LOADING = """
async def main():
    engine = LocalEngine(loads)
    starting = asyncio.create_task(engine.start())
    await asyncio.to_thread(begun.wait)
    starting.cancel()
    await asyncio.wait({starting})

asyncio.run(main())
sys.exit(7)
"""
# Who only forgets to close an engine is not worse off, and threads that are gone are not asked.
STEPS = """
over = threading.Event()

def steps():
    while not over.is_set():
        torch.ones(300, 300) @ torch.ones(300, 300)
    print("after its step", flush=True)

thread = threading.Thread(target=steps, daemon=True)
thread.start()
end_before_exit(thread, over.set)
gone = threading.Thread(target=lambda: None)
gone.start()
gone.join()
end_before_exit(gone, lambda: print("asked who is gone", flush=True))
sys.exit(3)
"""


@pytest.mark.parametrize(("body", "status", "said"), [(LOADING, 7, "cut off"), (STEPS, 3, "after its step")])
def test_threads_that_compute_end_before_the_interpreter(body, status, said):
    ended = subprocess.run(
        [sys.executable, "-c", HEAD + body],
        env={**os.environ, "PYTHONPATH": SOURCE},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ended.returncode, ended.stdout.split("\n")) == (status, [said, ""]), ended.stderr
    assert ended.stderr == ""


def test_what_one_thread_leaves_of_their_time_is_for_the_others(monkeypatch):
    """Each had its part, and no more, also where the others ended at once."""
    now, waited, ended = [50.0], [], []

    class Thread:
        def __init__(self, lasts_s):
            self.lasts_s = lasts_s

        def is_alive(self):
            return True

        def join(self, timeout):
            waited.append(timeout)
            now[0] += min(timeout, self.lasts_s)

    threads = [Thread(2.0), Thread(0.5 * at_exit.END_S), Thread(1e9), Thread(1.0)]
    monkeypatch.setattr(at_exit, "_THREADS", {thread: partial(ended.append, thread) for thread in threads})
    monkeypatch.setattr(at_exit, "time", SimpleNamespace(monotonic=lambda: now[0]))
    at_exit._end_all()
    assert ended == threads
    most = at_exit.END_S
    assert waited == [most, most - 2.0, 0.5 * most - 2.0, 0.0]
