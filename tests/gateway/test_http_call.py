"""What goes over the wire: nothing of it in logs, and no answer longer than is read."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.providers.failures import UpstreamError
from anabranch.gateway.providers.http_call import ERROR_BYTES, HttpCall, read_all, read_beginning, read_error


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


@given(st.lists(st.binary(min_size=1, max_size=9), max_size=9), st.integers(0, 40), st.integers(0, 9))
def test_what_has_begun_counts_too_and_each_piece_is_told_before_the_next_is_asked_for(parts, most, begun):
    begun, rest = parts[:begun], parts[begun:]
    reply, kept = Told(*rest), []

    async def keep(num_bytes):
        # The first is what has begun.
        assert reply.num_read == len(kept)
        kept.append(num_bytes)

    is_too_much = sum(map(len, parts)) > most
    try:
        assert asyncio.run(read_all(reply, most, begun, keep)) == b"".join(parts)
        assert not is_too_much
    except UpstreamError:
        assert is_too_much
    sizes = [sum(map(len, begun)), *map(len, rest)]
    assert kept == sizes[: len(kept)]
    assert len(kept) == len(sizes) or sum(kept) > most


@given(st.lists(st.binary(min_size=1, max_size=9), max_size=9), st.integers(0, 40))
def test_of_a_beginning_no_more_is_read_than_it_takes(parts, size):
    reply = Told(*parts)
    begun, is_more = asyncio.run(read_beginning(reply, size))
    assert begun == parts[: len(begun)]
    assert is_more is (sum(map(len, begun)) > size)
    assert sum(map(len, begun[:-1])) <= size
    assert is_more or begun == parts


def test_of_what_went_wrong_the_beginning_is_read():
    piece = b"x" * (ERROR_BYTES // 4)
    assert asyncio.run(read_error(Told(b"no ", b"such model"))) == b"no such model"
    reply = Told(*[piece] * 20)
    assert asyncio.run(read_error(reply)) == piece * 5
    assert reply.num_read == 5


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
