"""How a sandbox hands out its processes; what they do is in tests/data/test_templates.py."""

import functools
import os
import signal
from concurrent.futures import Future

import pytest

from anabranch import sandbox
from anabranch.data import templates
from anabranch.sandbox import Sandbox, SandboxBusyError

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGPROF"), reason="the limits of POSIX")


def test_a_worker_that_comes_as_the_wait_ends_is_given_back(monkeypatch):
    pool = Sandbox(templates.WORK)
    taken = [pool._free.pop() for _ in pool.workers]

    class Late(Future):
        """Gets its worker between the end of the wait and the look at who waits."""

        def result(self, timeout=None):
            if timeout is None:
                return super().result()
            pool._give(taken.pop())
            assert self.done()
            raise TimeoutError

    monkeypatch.setattr(sandbox, "_Turn", functools.partial(sandbox._Turn, worker=Late()))
    with pytest.raises(SandboxBusyError, match="busy"):
        pool._take("a", 1, 0.0)
    assert len(pool._free) == 1
    assert pool._waiting == []
    assert pool._slow == set()


def test_one_who_waited_in_vain_is_forgotten():
    pool = Sandbox(templates.WORK)
    taken = [pool._free.pop() for _ in pool.workers]
    with pytest.raises(SandboxBusyError, match="busy"):
        pool._take("a", 1, 0.0)
    for worker in taken:
        pool._give(worker)
    assert sorted(map(id, pool._free)) == sorted(map(id, pool.workers))


def test_an_interrupt_at_the_terminal_is_not_for_its_processes():
    process, pipes = sandbox._started(templates.WORK.program)
    try:
        assert os.getsid(process.pid) == process.pid != os.getsid(0)
    finally:
        process.kill()
        process.wait()
        for pipe in pipes:
            pipe.close()
