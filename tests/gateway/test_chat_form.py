"""A chat's stream told in another API's form, whatever becomes of the stream."""

import asyncio
import itertools

import pytest

from anabranch.gateway.http.chat_form import ChatForm, translated
from anabranch.gateway.http.messages import PING, MessageForm
from anabranch.gateway.http.responses import ResponseForm
from anabranch.web.large_json import SLICE
from anabranch.web.sse import DONE, HEARTBEAT, event, read_data
from anabranch.web.turns import Turns


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
        return b"".join([piece async for piece in translated(source, form, Turns(), "")])

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
        coming = translated(source, lambda: ChatForm(Told()), Turns(), "")
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


def scored(text, each):
    """A chunk with so many tokens, and rivals of each."""
    rows = [{"token": text, "logprob": -1.0, "bytes": None, "top_logprobs": [{"token": "b"}] * 5}] * each
    choice = {"index": 0, "delta": {"content": text * each}, "logprobs": {"content": rows}, "finish_reason": None}
    return event({"id": "c", "model": "m", "choices": [choice]})


class Endless(Source):
    """Says something at each turn of the loop until it is told to stop."""

    def __init__(self, piece):
        super().__init__()
        self.piece, self.is_over = piece, False

    async def __anext__(self):
        await asyncio.sleep(0)
        if self.is_over:
            raise StopAsyncIteration
        return self.piece


CALLED = {"tool_calls": [{"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}
# What says all that was said before once more: the end, a failure, what begins another item, and a model's own last event.
ENDS = {
    "end": (says(None, "stop"), DONE),
    "failure": (BROKEN,),
    "garbage": (event({"choices": [3]}),),
    "another item": (event({"choices": [{"index": 0, "delta": CALLED}]}), DONE),
}
NATIVE = {"type": "response.completed", "response": {"output": [{"text": "word " * 20} for _ in range(8000)]}}


class Noted(Source):
    """Notes how many pieces were got, of all, whenever it is asked for the next of its own."""

    def __init__(self, got, *pieces):
        super().__init__(*pieces)
        self._got, self.places = got, []

    async def __anext__(self):
        self.places.append(len(self._got))
        return await super().__anext__()


def slices_of(*pieces):
    """Pieces that a response is told in, of each of its chunks and of its end, among those of another stream: whose, and bytes.

    The other says something at each turn of the loop.
    """
    turns, other, got = Turns(), Endless(says("hi")), []
    source = Noted(got, *pieces)

    async def read_all(whose, stream, form):
        async for piece in translated(stream, form, turns, whose):
            got.append((whose, len(piece)))  # noqa: PERF401

    async def work():
        neighbour = asyncio.create_task(read_all("neighbour", other, lambda: MessageForm({"model": "m"})))
        await read_all("long", source, lambda: ResponseForm({"model": "m", "input": "x"}))
        source.places.append(len(got))
        other.is_over = True
        await neighbour

    asyncio.run(work())
    return [got[begin:end] for begin, end in itertools.pairwise(source.places)]


def pieces_of(end, chunks):
    if end == "native":
        native = NATIVE if chunks > 1 else {"type": "response.completed"}
        return [event({"responses": {"type": "response.created"}}), event({"responses": native}), DONE]
    return [*(scored("a", 100 if chunks > 1 else 3) for _ in range(chunks)), *ENDS[end]]


@pytest.mark.parametrize("end", [*ENDS, "native"])
def test_what_says_all_of_a_long_response_once_more_is_made_in_slices_and_others_go_on_between(end):
    """Each of its last events was made whole, and everybody waited."""
    told = max(slices_of(*pieces_of(end, 40)), key=len)
    own = [at for at, (whose, _) in enumerate(told) if whose == "long"]
    assert len(own) > 5
    # Something of the other is between each two.
    assert all(behind - at > 1 for at, behind in itertools.pairwise(own))
    sizes = [told[at][1] for at in own]
    assert max(sizes) <= 3 * SLICE
    assert sum(sizes) > 4 * SLICE


@pytest.mark.parametrize("end", [*ENDS, "native"])
def test_a_short_response_waits_for_no_turn_of_the_loop(end):
    for told in slices_of(*pieces_of(end, 1)):
        assert len([whose for whose, _ in told if whose == "long"]) <= 1
        # Nor between its chunks, of which each comes at once.
        assert len(told) <= 2
