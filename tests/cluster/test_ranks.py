"""The harness of ranks: values, errors with rank and cause, a bound on hangs, kill and join, bytes between pairs."""

import pipes
import time

import pytest

from anabranch.testing import RankError, Ranks, run_ranks


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
    start = time.monotonic()
    with pytest.raises(RankError, match="rank 1: no result after 1 s") as caught:
        run_ranks(pipes.wait_forever, 2, timeout_s=1)
    assert "_asleep" in str(caught.value)
    assert time.monotonic() - start < 30


def test_a_rank_is_killed_and_another_joins():
    with Ranks(2, pipes.meet, "first", backend=None) as ranks:
        ranks.kill(1)
        assert ranks.join(pipes.meet, "second", rank=1) == 1
        with pytest.raises(ValueError, match="rank 0 is still there"):
            ranks.join(pipes.meet, "second", rank=0)
        found = ranks.wait()
    assert sorted(found) == [1, 2]


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
