"""What goes over the wire: nothing of it in logs, and no answer longer than is read."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.providers.failures import UpstreamError
from anabranch.gateway.providers.http_call import HttpCall, read_all


class Told:
    """A reply in pieces."""

    status, headers = 200, {}

    def __init__(self, *parts):
        self.parts, self.is_closed, self.num_read = list(parts), False, 0

    def read_ready(self):
        return b""

    async def read_some(self):
        self.num_read += 1
        return self.parts.pop(0) if self.parts else b""

    def close(self):
        self.is_closed = True


def test_a_call_shows_neither_keys_nor_prompts():
    call = HttpCall("http://host/v1", {"authorization": "Bearer secret", "accept": "x"}, b"the prompt", "http://u:pw@p")
    shown = repr(call)
    assert shown == "HttpCall('http://host/v1', headers of ['accept', 'authorization'], 10 bytes)"
    assert not call.is_sent


@given(st.lists(st.binary(min_size=1, max_size=9), max_size=9))
def test_pieces_are_put_together_in_their_order(parts):
    reply = Told(*parts)
    assert asyncio.run(read_all(reply)) == b"".join(parts)
    assert not reply.is_closed


@given(st.lists(st.binary(min_size=1, max_size=9), max_size=9), st.integers(0, 40))
def test_what_is_longer_than_may_be_is_dropped_at_once(parts, most):
    reply = Told(*parts)
    if sum(map(len, parts)) <= most:
        assert asyncio.run(read_all(reply, most)) == b"".join(parts)
        return
    with pytest.raises(UpstreamError, match=f"^the upstream sent an answer of more than {most} bytes$") as caught:
        asyncio.run(read_all(reply, most))
    # It is nobody's fault but the answer's.
    assert caught.value.failure.kind == "excess"
    assert reply.is_closed
    # The piece that is too much is the last that was read.
    assert sum(map(len, parts[: reply.num_read - 1])) <= most < sum(map(len, parts[: reply.num_read]))
