"""A chat's stream told in another API's form, whatever becomes of the stream."""

import asyncio

import pytest

from anabranch.gateway.http.chat_form import ChatForm, translated
from anabranch.gateway.http.messages import PING, MessageForm
from anabranch.gateway.http.responses import ResponseForm
from anabranch.web.sse import DONE, HEARTBEAT, event, read_data


class Told:
    """Writes what it is told in brackets."""

    def add(self, chunk):
        yield f"[{chunk['text']}]".encode()

    def end(self):
        yield b"[end]"

    def fail(self, message, code):
        yield f"[{code}: {message}]".encode()


class Source:
    """A stream of such pieces, which notes that it was closed."""

    def __init__(self, *pieces):
        self._pieces, self.is_closed = iter(pieces), False

    def __aiter__(self):
        return self

    async def __anext__(self):
        try:
            return next(self._pieces)
        except StopIteration:
            raise StopAsyncIteration from None

    async def aclose(self):
        self.is_closed = True


class Beating(ChatForm):
    beat = b"[beat]"


def read(*pieces, form=lambda: ChatForm(Told())):
    source = Source(*pieces)

    async def work():
        return b"".join([piece async for piece in translated(source, form)])

    told = asyncio.run(work())
    assert source.is_closed
    return told.decode()


def chunk(text):
    return event({"text": text})


BROKEN = event({"error": {"message": "it broke", "code": "upstream_cut"}})


@pytest.mark.parametrize(
    ("pieces", "told"),
    [
        ((chunk("a") + chunk("b"), chunk("c"), DONE), "[a][b][c][end]"),
        ((), "[end]"),
        ((chunk("a"), HEARTBEAT, chunk("b")), "[a][b][end]"),
        ((chunk("a"), BROKEN, chunk("b")), "[a][upstream_cut: it broke]"),
        # No chunk of a chat at all.
        (
            (chunk("a"), event({"other": 1}), chunk("b")),
            "[a][upstream_garbage: the upstream sent chunks that make no answer]",
        ),
    ],
)
def test_what_comes_is_told_and_nothing_after_its_end(pieces, told):
    assert read(*pieces) == told


def test_signs_of_life_are_told_where_a_form_has_them():
    assert read(chunk("a"), HEARTBEAT, form=lambda: Beating(Told())) == "[a][beat][end]"


def test_a_reader_who_leaves_closes_the_stream():
    source = Source(chunk("a"), chunk("b"))

    async def work():
        coming = translated(source, lambda: ChatForm(Told()))
        assert await anext(coming) == b"[a]"
        await coming.aclose()

    asyncio.run(work())
    assert source.is_closed


def says(text=None, reason=None):
    delta = {} if text is None else {"content": text}
    return event({"id": "c", "model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})


def names(told):
    return [line.partition(": ")[2] for line in told.splitlines() if line.startswith("event: ")]


def test_a_message_beats_and_ends():
    def form():
        return MessageForm({"model": "m", "messages": []})

    told = read(says("hel"), HEARTBEAT, says("lo"), says(None, "stop"), DONE, form=form)
    assert PING.decode() in told
    assert (names(told)[0], names(told)[-1]) == ("message_start", "message_stop")
    assert names(read(says("hel"), BROKEN, form=form))[-1] == "error"


def test_a_response_begins_once_and_says_nothing_of_its_own_where_the_model_does():
    def form():
        return ResponseForm({"model": "m", "input": "x"})

    found = names(read(says("hel"), says("lo"), says(None, "stop"), DONE, form=form))
    assert (found.count("response.created"), found[0], found[-1]) == (1, "response.created", "response.completed")
    # Of nothing a whole response is made all the same.
    assert names(read(DONE, form=form))[0] == "response.created"
    native = event({"responses": {"type": "response.output_text.delta", "delta": "hi"}})
    ended = event({"responses": {"type": "response.completed"}})
    assert names(read(native, event({"choices": [], "usage": {}}), ended, DONE, form=form)) == [
        "response.output_text.delta",
        "response.completed",
    ]
    # Another model goes on, whose words have no place in the response that was begun.
    told = read(native, says("lo"), says("!"), form=form)
    assert (names(told)[-1], '"lo"' in told, "upstream_cut" in told) == ("response.failed", False, True)
    assert list(read_data(read(BROKEN, form=form).encode()))[-1]["response"]["status"] == "failed"
