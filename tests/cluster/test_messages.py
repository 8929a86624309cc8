"""The log of messages, as a matrix and as a trace."""

import pickle

import numpy as np
import pytest

from anabranch.cluster import MessageLog
from anabranch.cluster.messages import link_of, ranks_of
from anabranch.errors import InputError
from anabranch.routing import RoutingTrace


def test_a_log_is_a_matrix_and_a_trace(tmp_path):
    log = MessageLog(3)
    log.add(0, 1, 4096, kind="forward", micro_batch=2)
    log.add(0, 1, 1024, kind="forward", micro_batch=3)
    log.add(2, 0, 7, kind="skip")
    assert log.bytes_RR.tolist() == [[0, 5120, 0], [0, 0, 0], [7, 0, 0]]
    assert log.counts_RR.sum() == len(log) == 3
    assert log.of_kind("forward") == 5120
    log.trace().write(tmp_path / "messages.parquet")
    trace = RoutingTrace.read(tmp_path / "messages.parquet")
    assert trace.load_E(0).tolist() == [0, 2, 0, 0, 0, 0, 1, 0, 0]
    assert trace.domains == ["forward", "skip"]
    rows = trace.decisions(0)
    assert rows.weight_NK[:, 0].tolist() == [4096, 1024, 7]
    assert rows.position_N.tolist() == [2, 3, 0]
    assert [ranks_of(link, 3) for link in rows.index_NK[:, 0]] == [(0, 1), (0, 1), (2, 0)]
    assert ranks_of(link_of(2, 1, 3), 3) == (2, 1)


def test_logs_of_ranks_are_put_together():
    parts = [MessageLog(2), MessageLog(2)]
    parts[0].add(0, 1, 5)
    parts[1].add(1, 0, 6, kind="back", micro_batch=1)
    whole = MessageLog(2)
    whole.extend(pickle.loads(pickle.dumps(parts)))
    assert np.array_equal(whole.bytes_RR, [[0, 5], [6, 0]])
    assert len(MessageLog(2).trace()) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MessageLog(0), "num_ranks is 0"),
        (lambda: MessageLog(2).add(0, 2, 1), "target is 2, and ranks are 0 to 1"),
        (lambda: MessageLog(2).add(0, 1, -1), "size_bytes is -1"),
    ],
)
def test_what_is_no_message_is_told(call, message):
    with pytest.raises(InputError, match=message):
        call()
