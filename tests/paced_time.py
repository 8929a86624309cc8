"""An event loop whose time does not pass while the machine does something else.

Between two looks for what is ready, time passes by the wait and a little more, however long the loop was kept from running: a timer that
was set for 20 ms has 20 ms in which this process could work, on a machine with nothing else to do and on one that is overloaded. For what
all happens in one loop, servers on loopback among it.
"""

import asyncio
import selectors
import time

# Of one wait, the most that counts; and of work between two looks.
WAIT_S, WORK_S = 0.005, 0.001


class PacedLoop(asyncio.SelectorEventLoop):
    """See the module.

    Args:
        work_s: the most that counts of work between two looks.
    """

    def __init__(self, work_s=WORK_S):
        self._now_s, self.work_s = 0.0, work_s
        super().__init__(_Paced(self))

    def time(self):
        """Seconds since the loop was made."""
        return self._now_s

    def passed(self, seconds):
        """Let time pass."""
        self._now_s += seconds


class _Paced(selectors.DefaultSelector):
    def __init__(self, loop):
        super().__init__()
        self._loop, self._looked = loop, time.monotonic()

    def select(self, timeout=None):
        began = time.monotonic()
        self._loop.passed(min(began - self._looked, self._loop.work_s))
        ready = super().select(WAIT_S if timeout is None else min(timeout, WAIT_S))
        self._looked = time.monotonic()
        waited = self._looked - began
        self._loop.passed(min(waited, WAIT_S if timeout is None else max(timeout, 0.0), WAIT_S))
        return ready


def run_paced(work, work_s=WORK_S):
    """Run a coroutine in a loop of its own."""
    with asyncio.Runner(loop_factory=lambda: PacedLoop(work_s)) as runner:
        return runner.run(work)


def pace(gateway):
    """Let a gateway that runs in such a loop tell the time by it, before its first request."""
    gateway.runtime.dispatcher.now = asyncio.get_running_loop().time
    return gateway
