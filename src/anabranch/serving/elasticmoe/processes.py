"""Processes of an elastic group: started with one end of a channel, on one thread each, and ended with whoever started them."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import anabranch
from anabranch.serving.elasticmoe.wire import Channel, pair

__all__ = ["Process", "start_process"]

_SOURCE = str(Path(anabranch.__file__).resolve().parent.parent)
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Process:
    """A child and the channel to it; it ends by itself when the channel does."""

    def __init__(self, name: str, popen: subprocess.Popen, channel: Channel) -> None:
        self.name, self.popen, self.channel = name, popen, channel

    @property
    def pid(self) -> int:
        """Of the process."""
        return self.popen.pid

    @property
    def is_alive(self) -> bool:
        """Whether it runs still."""
        return self.popen.poll() is None

    def kill(self) -> None:
        """End it at once."""
        self.popen.kill()

    def close(self, patience_s: float = 2.0) -> None:
        """Close the channel, wait for the end, and see to it after ``patience_s`` seconds."""
        self.channel.close()
        try:
            self.popen.wait(patience_s)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()


def start_process(
    module: str,
    name: str,
    *,
    arguments: Sequence[str] = (),
    fds: Sequence[int] = (),
    environment: Mapping | None = None,
) -> Process:
    """Run ``module`` with the number of its end of the channel as first argument, then ``arguments``.

    ``fds`` are open in the child as well and closed here.
    """
    ours, theirs = pair()
    fd = theirs.detach()
    variables = {**os.environ, **dict.fromkeys(_THREADS, "1"), **(environment or {})}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [_SOURCE, os.environ.get("PYTHONPATH", "")]))
    try:
        popen = subprocess.Popen(
            [sys.executable, "-m", module, str(fd), *arguments],
            pass_fds=[fd, *fds],
            env=variables,
            stdin=subprocess.DEVNULL,
        )
    except BaseException:
        ours.close()
        raise
    finally:
        for each in (fd, *fds):
            os.close(each)
    return Process(name, popen, ours)
