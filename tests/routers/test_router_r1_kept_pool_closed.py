"""Pools whose replies are written down, closed or broken off: calls that are out are ended and counted, and none begins."""

import asyncio
import os
import signal
import threading

import pytest

from anabranch.errors import BackendError
from anabranch.locks import locked
from anabranch.routers.contract.ask import Arm
from anabranch.routers.router_r1 import kept_pool
from anabranch.routers.router_r1.asked_pool import AskPool, Member
from anabranch.routers.router_r1.environment import Price, Reply
from anabranch.routers.router_r1.kept_pool import KeptPool
from kept_pools import Live, failing, rows
from waiting import until


@pytest.mark.parametrize("when", ["meanwhile", "while it waits"])
def test_nobody_is_asked_again_where_nobody_reads_it_any_more(tmp_path, when):
    """Whoever stopped a training because an endpoint was ill waited for further tries, and paid them."""
    over, live, path = threading.Event(), failing(True), tmp_path / "kept.jsonl"
    first = live.reply

    def reply(model, query):
        if when == "meanwhile":
            over.set()
        if when == "while it waits":
            threading.Timer(0.05, over.set).start()
        return first(model, query)

    live.reply = reply
    pool = KeptPool(live, path, retries=2, wait_s=60.0, over=over)
    with pytest.raises(BackendError, match="busy"):
        pool.reply("small", "a")
    # The call that was made counts as any.
    assert len(live.asked) == pool.calls == len(rows(path)) == 1
    over.clear()
    assert pool.reply("small", "a").text == "x"


def test_no_call_begins_where_nobody_reads_it_any_more(tmp_path):
    over, live, path = threading.Event(), Live(most=0.25), tmp_path / "kept.jsonl"
    pool = KeptPool(live, path, over=over)
    known = pool.reply("small", "a")
    over.set()
    with pytest.raises(BackendError, match="nobody was asked: the pool was closed"):
        pool.reply("small", "b")
    assert pool.reply("small", "a") == known
    assert (live.asked, pool.calls, len(rows(path))) == ([("small", "a")], 1, 1)


def test_whoever_asks_while_a_pool_is_closed_is_refused_and_pays_nothing(tmp_path):
    """Such calls were broken off ten times a second, and counted as the most that they may cost."""
    begun, closed, ends, raised = threading.Event(), threading.Event(), threading.Event(), []

    def reply(model, query):
        begun.set()
        # Slow to end.
        ends.wait(600)
        raise BackendError("closed")

    live = Live(reply, most=0.25)
    live.close = closed.set
    pool = KeptPool(live, tmp_path / "kept.jsonl")

    def call():
        with pytest.raises(BackendError, match=r"^closed$") as error:
            pool.reply("small", "a")
        raised.append(error.value)

    threads = [threading.Thread(target=call, daemon=True), threading.Thread(target=pool.close, daemon=True)]
    threads[0].start()
    assert begun.wait(60)
    threads[1].start()
    assert closed.wait(60)
    for number in range(3):
        with pytest.raises(BackendError, match="nobody was asked: the pool was closed"):
            pool.reply("small", f"later {number}")
    ends.set()
    for thread in threads:
        thread.join(60)
    assert len(raised) == len(live.asked) == pool.calls == len(rows(tmp_path / "kept.jsonl")) == 1
    assert pool.usd == 0.25
    # It begins anew.
    live._reply = None
    assert pool.reply("small", "later 0").text == "small says"


def test_of_two_that_close_at_once_the_last_lets_calls_begin():
    """The first let them in, and the second broke them off, at their most."""
    closing, go, live = threading.Event(), threading.Event(), Live(most=0.25)

    def slow():
        closing.set()
        go.wait(600)

    live.close, pool = slow, KeptPool(live)
    other = threading.Thread(target=pool.close, daemon=True)
    other.start()
    assert closing.wait(60)
    live.close = lambda: None
    pool.close()
    with pytest.raises(BackendError, match="nobody was asked: the pool was closed"):
        pool.reply("small", "a")
    go.set()
    other.join(60)
    assert (live.asked, pool.calls, pool.usd) == ([], 0, 0.0)
    assert pool.reply("small", "a").text == "small says"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize(
    "way", ["asks the same", "closes, and asks the same", "while it is closed", "while it is locked"]
)
def test_a_copy_of_the_process_waits_for_nothing_that_is_under_way_in_the_other(tmp_path, way):
    """A call, a close or a lock of a thread that the copy has not: it waited for them without end."""
    begun, go, path = threading.Event(), threading.Event(), tmp_path / "kept.jsonl"

    def reply(model, query):
        if query == "slow" and not go.is_set():
            begun.set()
            go.wait(600)
        return Reply("said", 1, 1)

    # Without a file where the copy is to ask: with one it waits for its parent, as another process does.
    pool = KeptPool(Live(reply), path if way == "while it is locked" else None)
    call = threading.Thread(target=pool.reply, args=("small", "slow"), daemon=True)
    call.start()
    assert begun.wait(60)
    if way == "while it is closed":
        pool._closing.add(object())
        pool._over.set()
    if way == "while it is locked":
        pool._lock.acquire()
    child = os.fork()
    if not child:
        # What would wait without end is ended.
        signal.alarm(120)
        go.set()
        if way == "while it is locked":
            # Whose lock file stays, since its call is still out.
            os._exit(0 if pool._lock.acquire(timeout=60) and pool._lock_file(path).exists() else 1)
        if way.startswith("closes"):
            pool.close()
        os._exit(0 if pool.reply("small", "slow").text == "said" else 1)
    try:
        assert os.waitpid(child, 0)[1] == 0
    finally:
        if way == "while it is locked":
            pool._lock.release()
        go.set()
    call.join(60)
    if way == "while it is locked":
        assert (len(rows(path)), pool._lock_file(path).exists()) == (1, False)


def test_an_interruption_is_told_to_its_own_thread_alone():
    """Whoever waited for the same answer was interrupted too."""
    begun, go, raised = threading.Event(), threading.Event(), {}

    def interrupted(model, query):
        begun.set()
        go.wait(60)
        raise KeyboardInterrupt

    pool = KeptPool(live := Live(interrupted))

    def call(name):
        try:
            pool.reply("small", "a")
        except BaseException as error:
            raised[name] = error

    first, other = (threading.Thread(target=call, args=(name,), daemon=True) for name in ("first", "other"))
    first.start()
    assert begun.wait(60)
    [coming] = pool._coming.values()
    other.start()
    # It waits.
    until(lambda: coming._condition._waiters)
    go.set()
    first.join(60)
    other.join(60)
    assert isinstance(raised["first"], KeyboardInterrupt)
    assert isinstance(raised["other"], BackendError)
    assert str(raised["other"]) == "small did not answer: who asked it first was interrupted"
    assert len(live.asked) == 1


@pytest.mark.parametrize("is_out", [True, False])
def test_a_pool_that_is_closed_ends_calls_and_waits_for_further_ones(tmp_path, is_out):
    """What was out was in no file, though it may be billed."""
    begun, closed, raised = threading.Event(), threading.Event(), []

    def reply(model, query):
        begun.set()
        if is_out and not closed.wait(600):
            return Reply("late")
        error = BackendError("closed" if is_out else "busy")
        error.is_transient = not is_out
        raise error

    live = Live(reply, most=0.25)
    live.close = closed.set
    pool = KeptPool(live, tmp_path / "kept.jsonl", retries=2, wait_s=600.0)

    def call():
        with pytest.raises(BackendError) as error:
            pool.reply("small", "a")
        raised.append(str(error.value))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    begun.wait(60)
    pool.close()
    thread.join(60)
    said = "closed" if is_out else "busy"
    assert raised == [said]
    assert rows(tmp_path / "kept.jsonl") == [{"model": "small", "query": "a", "error": said, "usd": 0.25}]
    assert (pool.calls, pool.usd) == (1, 0.25)
    # It begins anew, with its further tries.
    live._reply, pool._wait_s = failing(True)._reply, 0.0
    assert pool.reply("small", "a").text == "x"


def test_nobody_is_asked_once_a_pool_is_closed_that_waits_for_another_process(tmp_path):
    """`close` waited for the file too, and then the call was made."""
    path, raised = tmp_path / "kept.jsonl", []
    pool = KeptPool(Live(), path)

    def call():
        with pytest.raises(BackendError, match="the pool was closed") as error:
            pool.reply("small", "a")
        raised.append(error.value)

    with locked(tmp_path / ".kept.jsonl.lock") as is_ours:
        assert is_ours
        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        # It has the lock of all, and waits for the file.
        until(lambda: not pool._lock.acquire(blocking=False) or pool._lock.release())
        pool.close()
        thread.join(60)
    assert (len(raised), pool.calls, path.exists()) == (1, 0, False)
    assert pool.reply("small", "a").text == "small says"


def test_a_call_that_comes_to_its_model_only_after_that_was_closed_is_ended_too(tmp_path, monkeypatch):
    """It was made, and `close` went away before it ended."""
    begun, closed, path = threading.Event(), threading.Event(), tmp_path / "kept.jsonl"
    monkeypatch.setattr(kept_pool, "_CLOSE_S", 60.0)

    async def hangs(arm, messages, **how):
        await asyncio.sleep(600)

    live = AskPool({"small": Member(hangs, Arm("small"), Price(2.0))})
    asked, ended = live.reply, live.close

    def reply(model, query):
        begun.set()
        closed.wait(60)
        return asked(model, query)

    def close():
        ended()
        closed.set()

    live.reply, live.close = reply, close
    pool, raised = KeptPool(live, path), []

    def call():
        with pytest.raises(BackendError, match="when the pool was closed") as error:
            pool.reply("small", "a")
        raised.append(error.value)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    begun.wait(60)
    pool.close()
    [row] = rows(path)
    assert row["usd"] == pool.usd == live.most_usd("small", "a") > 0
    thread.join(60)
    assert len(raised) == 1


def test_no_further_try_is_made_once_a_pool_is_closed(tmp_path):
    """Where it was closed just after the wait before that, it was."""
    live, is_closed = failing(True), threading.Event()
    live.close = is_closed.set

    class ClosedAsItEnds(threading.Event):
        def wait(self, timeout=None):
            closing.start()
            is_closed.wait(60)
            return False

    pool = KeptPool(live, tmp_path / "kept.jsonl", retries=2, wait_s=0.0, over=ClosedAsItEnds())
    closing = threading.Thread(target=pool.close)
    with pytest.raises(BackendError, match="busy"):
        pool.reply("small", "a")
    closing.join(60)
    assert len(live.asked) == pool.calls == len(rows(tmp_path / "kept.jsonl")) == 1


def test_a_close_that_is_broken_off_leaves_further_tries(tmp_path):
    pool = KeptPool(failing(True), retries=1, wait_s=0.0)

    def interrupted():
        raise KeyboardInterrupt

    pool.live.close = interrupted
    with pytest.raises(KeyboardInterrupt):
        pool.close()
    assert pool.reply("small", "a").text == "x"


def test_calls_that_are_ended_by_closing_are_no_failures_in_a_row():
    pool = KeptPool(failing(True, True), max_failures=2)
    with pytest.raises(BackendError, match="busy"):
        pool.reply("small", "a")
    pool.close()
    with pytest.raises(BackendError, match="busy"):
        pool.reply("small", "a")
