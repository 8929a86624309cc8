"""How a sandbox hands out its processes, and to whom; what they do is in tests/data/test_templates.py."""

import asyncio
import functools
import os
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from anabranch import sandbox
from anabranch.data import templates
from anabranch.sandbox import Refused, Sandbox, SandboxBusyError, Work
from anabranch.sandbox_worker import Limits
from waiting import until, until_async

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


def test_who_gets_no_process_in_time_is_told_that_they_are_busy_and_the_others_come_in_order(monkeypatch):
    renderer = Sandbox(templates.WORK)
    renderer._note("quick", 0.0)
    taken = [renderer._take("quick", 1, 0) for _ in renderer.workers]
    assert 2 <= len(taken) <= 4
    monkeypatch.setattr(sandbox, "WAIT_S", 0.05)
    with pytest.raises(
        SandboxBusyError, match=r"^busy: none of the \d processes that render chat templates was free in 0.05 s$"
    ):
        renderer.ask("quick", {})
    assert order_of(renderer, taken.pop(), [("quick", 1)] * 3) == [0, 1, 2]
    assert len(renderer._free) == 1


def order_of(renderer, worker, requests):
    """The order in which requests (source, bytes) get the only free worker, where they come one after another before it is free."""
    order = []

    def wait(number, source, size):
        got = renderer._take(source, size, time.monotonic() + 60)
        order.append(number)
        renderer._give(got)

    with ThreadPoolExecutor(len(requests)) as pool:
        for number, (source, size) in enumerate(requests):
            pool.submit(wait, number, source, size)
            while len(renderer._waiting) <= number:
                time.sleep(0.001)
        renderer._give(worker)
    return order


def test_sources_take_turns_whoever_asks_most():
    renderer = Sandbox(templates.WORK)
    for source in "abc":
        renderer._note(source, 0.0)
    taken = [renderer._take("c", 1, 0) for _ in renderer.workers]
    assert order_of(renderer, taken.pop(), [("a", 1)] * 4 + [("b", 1)] * 2) == [0, 4, 1, 5, 2, 3]


@pytest.mark.parametrize("source", ["quick", "slow"])
def test_one_process_is_kept_for_short_requests_of_quick_sources(source):
    renderer = Sandbox(templates.WORK)
    renderer._note("quick", 0.0)
    renderer._note("slow", 1.0)
    large = 200_000 if source == "quick" else 1
    slow = [renderer._take(source, large, 0) for _ in range(len(renderer.workers) - 1)]
    for asked in (("slow", 1), ("quick", 200_000), ("new", 200_000)):
        with pytest.raises(SandboxBusyError, match=r"^busy"):
            renderer._take(*asked, 0)
    # A new one may be quick, but comes after those that are.
    kept = renderer._take("new", 1, 0)
    with pytest.raises(SandboxBusyError, match=r"^busy"):
        renderer._take("quick", 1, 0)
    assert order_of(renderer, kept, [("another", 1), ("quick", 1), ("quick", 1)]) == [1, 2, 0]
    # One that was quick and is no more.
    renderer._note("quick", 1.0)
    with pytest.raises(SandboxBusyError, match=r"^busy"):
        renderer._take("quick", 1, 0)
    for worker in slow:
        renderer._give(worker)
    assert not renderer._slow
    assert len(renderer._free) == len(renderer.workers)


def test_times_of_sources_are_not_remembered_without_end():
    renderer = Sandbox(templates.WORK)
    for number in range(sandbox.MOST_SOURCES + 5):
        renderer._note(str(number), 0.0)
        renderer._give(renderer._take(str(number), 1, 0))
    assert len(renderer._seconds) == sandbox.MOST_SOURCES
    # The one that came again is as new as it can be.
    first = next(iter(renderer._seconds))
    renderer._note(first, 0.0)
    renderer._note("another", 0.0)
    assert first in renderer._seconds
    assert len(renderer._served) == 1


def test_an_interrupt_at_the_terminal_is_not_for_its_processes():
    process, pipes = sandbox._started(templates.WORK.program)
    try:
        assert os.getsid(process.pid) == process.pid != os.getsid(0)
    finally:
        process.kill()
        process.wait()
        for pipe in pipes:
            pipe.close()


SLEEPS = """
import json, time
from pathlib import Path
from anabranch.sandbox_worker import Limits, serve

def answer(request):
    seconds = json.loads(request)
    while not (Path(__file__).parent / "go").exists():
        time.sleep(0.005)
    time.sleep(seconds)
    return {"answer": str(seconds)} if seconds < 1 else {"error": "too long"}

serve(answer, Limits(seconds=60.0, memory=1 << 30))
"""


@pytest.fixture
def sleeping(tmp_path):
    """Processes that sleep as long as they are asked to, once there is a file ``go``."""
    (tmp_path / "sleeps.py").write_text(SLEEPS)
    limits = Limits(seconds=60.0, memory=1 << 30)
    pool = Sandbox(Work(program=tmp_path / "sleeps.py", does="sleeps", do="sleep", limits=limits, greeting=0))
    yield pool
    pool.close()


def test_turns_come_before_threads(sleeping, tmp_path):
    """However many one source asks for at once, another's one is not behind them."""
    order = []

    async def ask(source, seconds):
        assert await sleeping.ask_in_turn(source, seconds) == str(seconds)
        order.append(source)

    async def scene():
        many = [asyncio.create_task(ask("many", 0.0)) for _ in range(60)]
        await until_async(lambda: len(sleeping._waiting) == 60 - len(sleeping.workers))
        one = asyncio.create_task(ask("one", 0.0))
        await until_async(lambda: len(sleeping._waiting) == 61 - len(sleeping.workers))
        (tmp_path / "go").touch()
        await one
        place = order.index("one") + 1
        await asyncio.gather(*many)
        return place

    # Those that were at work as it came, and one each for its turn and theirs.
    before = asyncio.run(scene())
    assert before < 60 - 2 * len(sleeping.workers)
    assert order.index("one") == before - 1
    assert sorted(map(id, sleeping._free)) == sorted(map(id, sleeping.workers))


def test_who_stops_waiting_holds_nothing(sleeping, tmp_path, monkeypatch):
    (tmp_path / "go").touch()

    async def scene():
        asked = [asyncio.create_task(sleeping.ask_in_turn("a", 0.05)) for _ in range(20)]
        await asyncio.sleep(0.02)
        # Some wait for their turn, and some for their answer.
        for one in asked:
            one.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        assert sleeping._waiting == []
        assert await sleeping.ask_in_turn("b", 0.0) == "0.0"
        with pytest.raises(Refused, match="they are no JSON"):
            await sleeping.ask_in_turn("b", object())
        with pytest.raises(Refused, match="too long"):
            await sleeping.ask_in_turn("b", 1)
        taken = [sleeping._free.pop() for _ in range(len(sleeping._free))]
        monkeypatch.setattr(sandbox, "WAIT_S", 0.02)
        with pytest.raises(SandboxBusyError, match="busy"):
            await sleeping.ask_in_turn("b", 0)
        for one in taken:
            sleeping._give(one)

    asyncio.run(scene())
    assert sleeping._waiting == []
    until(lambda: len(sleeping._free) == len(sleeping.workers))
