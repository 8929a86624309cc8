"""A process that has imported all that a rank needs and is copied whenever one is wanted: a rank is there in milliseconds.

Without it each rank starts an interpreter and imports torch, which is seconds of work. The copies share the pages of what was imported.
The fork server has one thread, so that there is nothing in it that could be copied halfway. Linux; elsewhere ranks start anew.
"""

import contextlib
import gc
import os
import select
import signal
import sys
import threading
import time

from anabranch.serving.elasticmoe.processes import Process, start_process
from anabranch.serving.elasticmoe.wire import Channel, ChannelClosedError, pair

__all__ = ["ForkServer", "ForkedProcess"]

_RANK = "anabranch.serving.elasticmoe.rank_process"


class ForkedProcess(Process):
    """A copy of the fork server, by a file descriptor that means this process and no later one of its number."""

    def __init__(self, name: str, pid: int, pidfd: int, channel: Channel) -> None:
        self.name, self.channel = name, channel
        self._pid, self._pidfd = pid, pidfd

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._pid

    @property
    def is_alive(self) -> bool:
        """Whether it runs still."""
        return self._pidfd >= 0 and not self._wait(0.0)

    def kill(self) -> None:
        """End it at once."""
        if self._pidfd >= 0:
            # It has ended by itself.
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def close(self, patience_s: float = 2.0) -> None:
        """Close the channel, wait for the end, and see to it after ``patience_s`` seconds."""
        self.channel.close()
        if self._pidfd < 0:
            return
        if not self._wait(patience_s):
            self.kill()
            self._wait(None)
        os.close(self._pidfd)
        self._pidfd = -1

    def _wait(self, timeout_s: float | None) -> bool:
        waiter = select.poll()
        waiter.register(self._pidfd, select.POLLIN)
        return bool(waiter.poll(None if timeout_s is None else timeout_s * 1000))


class ForkServer:
    """Makes the processes of ranks. ``forks=False`` starts each anew, as it is where processes cannot be copied."""

    def __init__(self, *, forks: bool = sys.platform == "linux") -> None:
        self._process = start_process("anabranch.serving.elasticmoe.fork_server", "fork_server") if forks else None
        self._lock = threading.Lock()

    def make(self, name: str) -> Process:
        """A new rank, which waits for its `Boot`. Raises ChannelClosedError if the fork server has died."""
        if self._process is None:
            return start_process(_RANK, name)
        ours, theirs = pair()
        fd = theirs.detach()
        try:
            with self._lock:
                pid, (pidfd,) = self._process.channel.ask(name, [fd])
        except BaseException:
            ours.close()
            raise
        finally:
            os.close(fd)
        return ForkedProcess(name, pid, pidfd, ours)

    def ping(self) -> None:
        """Wait for a sign of life. Raises ChannelClosedError if the fork server has died."""
        if self._process is not None:
            with self._lock:
                self._process.channel.ask(None)

    def kill(self) -> None:
        """End it at once, as a fault would."""
        if self._process is not None:
            self._process.kill()

    @property
    def pid(self) -> int | None:
        """Of the process that is copied."""
        return None if self._process is None else self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether it can make ranks."""
        return self._process is None or self._process.is_alive

    def is_gone(self, patience_s: float = 1.0) -> bool:
        """Whether it cannot make ranks any more; one whose channel is closed may take a moment to end."""
        end = time.monotonic() + patience_s
        while self.is_alive and time.monotonic() < end:
            time.sleep(0.01)
        return not self.is_alive

    def close(self) -> None:
        """End it; ranks that were made live on."""
        if self._process is not None:
            self._process.close()


def main() -> None:
    """The process."""
    control = Channel.of_fd(int(sys.argv[1]))
    from anabranch.serving.elasticmoe import rank_process

    rank_process.rehearse()
    gc.collect()
    # The collector would write to every object, and no page of them would be shared any more.
    gc.freeze()
    with contextlib.suppress(ChannelClosedError):
        while True:
            while not control.poll(1.0):
                _reap()
            name, fds = control.recv()
            if name is None:
                control.send(None)
                continue
            (fd,) = fds
            pid = os.fork()
            if pid == 0:
                control.forget()
                rank_process.main(fd)
            os.close(fd)
            pidfd = os.pidfd_open(pid)
            control.send(pid, [pidfd])
            os.close(pidfd)
            _reap()
    os._exit(0)


def _reap() -> None:
    """Let copies that have ended go."""
    with contextlib.suppress(ChildProcessError):  # there are none
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


if __name__ == "__main__":
    main()
