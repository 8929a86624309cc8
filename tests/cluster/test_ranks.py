"""The harness of ranks: values, errors with rank and cause, a bound on hangs, kill and join, bytes between pairs."""

import multiprocessing
import os
import pipes
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from anabranch.cluster.ranks import _watch
from anabranch.testing import RankError, Ranks, run_ranks
from waiting import until


def test_each_rank_gives_its_value():
    assert run_ranks(pipes.total, 3) == [3.0, 3.0, 3.0]


def test_the_error_of_a_rank_is_raised_with_its_cause():
    with pytest.raises(RankError, match="rank 1: KeyError: 'a reason'") as caught:
        run_ranks(pipes.fail_at, 2, 1)
    assert caught.value.rank == 1
    assert "in fail_at" in str(caught.value)


def test_a_rank_that_vanishes_is_told_with_what_it_printed():
    with pytest.raises(RankError, match="rank 0: ended by SIGABRT before it had a result") as caught:
        run_ranks(pipes.vanish, 1, backend=None)
    assert "about to go" in str(caught.value)


def test_a_hang_is_bounded_and_says_where_it_stood():
    with pytest.raises(RankError, match="rank 1: no result after 1 s") as caught:
        run_ranks(pipes.wait_forever, 2, timeout_s=1)
    assert "_asleep" in str(caught.value)


def test_a_rank_is_killed_and_another_joins():
    with Ranks(2, pipes.meet, "first", backend=None) as ranks:
        ranks.kill(1)
        assert ranks.join(pipes.meet, "second", rank=1) == 1
        with pytest.raises(ValueError, match="rank 0 is still there"):
            ranks.join(pipes.meet, "second", rank=0)
        found = ranks.wait()
    assert sorted(found) == [1, 2]


def test_who_joins_late_has_as_long_to_begin_as_the_first(monkeypatch):
    monkeypatch.setattr("anabranch.cluster.ranks._START_S", 20.0)
    with Ranks(1, pipes.meet, "first", backend=None) as ranks:
        clock = time.monotonic
        # A run has gone on for longer than that when one more comes.
        monkeypatch.setattr(time, "monotonic", lambda: clock() + 60)
        ranks.join(pipes.meet, "second")
        assert sorted(ranks.wait()) == [1, 2]


def test_bytes_are_counted_for_each_directed_pair():
    numbers = 100_000
    with Ranks(3, pipes.ring, numbers) as ranks:
        assert ranks.wait() == [0, 1, 2]
        sent = ranks.sent_bytes()
    if sent is None:
        pytest.skip("the kernel does not count")
    for rank in range(3):
        # Beside the numbers there are messages of gloo's own and the barrier's.
        assert 4 * numbers <= sent[rank, (rank + 1) % 3] < 4 * numbers + 20_000
        assert sent[rank, (rank - 1) % 3] < 20_000


@pytest.mark.parametrize("has_told", [False, True])
def test_a_rank_ends_by_itself_when_the_other_end_is_closed_too_soon(tmp_path, monkeypatch, has_told):
    ended, told, folder = [], threading.Event(), tmp_path / "ranks"
    monkeypatch.setattr(os, "_exit", ended.append)
    folder.mkdir()
    ours, theirs = multiprocessing.Pipe()
    watch = threading.Thread(target=_watch, args=(theirs, told, folder))
    watch.start()
    if has_told:
        told.set()
    assert not ended
    ours.close()
    watch.join(60)
    assert (ended, folder.exists()) == (([], True) if has_told else ([1], False))


PARENT = """
import sys, tempfile, pipes
from anabranch.testing import run_ranks
tempfile.tempdir = sys.argv[1]
if __name__ == "__main__":
    run_ranks(pipes.tell_and_wait, 2, sys.argv[1], backend=None)
"""


@pytest.mark.slow
def test_ranks_end_when_whoever_started_them_is_gone(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    path = os.pathsep.join([str(Path(pipes.__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env={**os.environ, "PYTHONPATH": path})
    until(lambda: len(list(tmp_path.glob("pid-*"))) == 2)
    ranks = [int(file.name.removeprefix("pid-")) for file in tmp_path.glob("pid-*")]
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    until(lambda: not any(_is_there(rank) for rank in ranks))
    until(lambda: not list(tmp_path.glob("anabranch-ranks-*")))


def _is_there(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    # A zombie has ended; nobody has asked how.
    return state != "Z"
