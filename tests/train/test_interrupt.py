"""Which errors say that another process of a run is gone."""

import pytest

from anabranch.train.interrupt import has_lost_process


@pytest.mark.parametrize(
    "said",
    [
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:53174",
        "[pair.cc:512] writev [127.0.0.1]:4000: Connection reset by peer",
        "[pair.cc:512] writev [127.0.0.1]:4000: Broken pipe",
        "NCCL error ... ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
        "Last error: socketProgress: Connection closed by remote peer host<4000>",
    ],
)
def test_a_lost_connection_is_seen(said):
    assert has_lost_process(RuntimeError(said))


def test_so_is_one_that_caused_another_error():
    error = RuntimeError("stage 0 failed")
    error.__cause__ = RuntimeError("Connection closed by peer")
    assert has_lost_process(error)


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError("Connection closed by peer")])
def test_other_errors_are_not(error):
    assert not has_lost_process(error)
