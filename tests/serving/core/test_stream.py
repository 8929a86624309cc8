"""A reader that is slow, told by hand: when its request is paused, resumed and given up, and that no output is lost."""

import asyncio
import math

import pytest

from anabranch.errors import InputError
from anabranch.serving.core import stream as streams
from anabranch.serving.core.request import Finish, Output
from anabranch.serving.core.stream import Stream, joined
from waiting import until_async


class Told:
    """What a request was told."""

    def __init__(self):
        self.calls = []

    def stream(self, **limits):
        names = ("pause", "resume", "abort")
        return Stream("a", **{name: lambda id, name=name: self.calls.append((name, id)) for name in names}, **limits)


def told(work, monkeypatch, buffer=4):
    """Run ``work(stream, told)`` with a stream that holds so many outputs; what its request was told."""
    monkeypatch.setattr(streams, "BUFFER", buffer)

    async def main():
        told = Told()
        with told.stream() as stream:
            await work(stream, told)
        return told.calls

    return asyncio.run(main())


def push(stream, *tokens):
    for token in tokens:
        stream.push(Output(id="a", tokens=(token,)))


def test_a_stream_may_have_limits_of_its_own(monkeypatch):
    monkeypatch.setattr(streams, "STALL_S", 0.001)

    async def main():
        told = Told()
        patient = told.stream(buffer=2, stall_s=math.inf)
        push(patient, 0, 1)
        assert told.calls == [("pause", "a")]
        await asyncio.sleep(0.02)
        assert (await patient.take()).tokens == (0,)
        assert told.calls == [("pause", "a"), ("resume", "a")]
        hasty = told.stream(buffer=1, stall_s=0.001)
        push(hasty, 0)
        await until_async(lambda: len(told.calls) == 4)
        assert told.calls[2:] == [("pause", "a"), ("abort", "a")]

    asyncio.run(main())


def test_a_full_buffer_pauses_and_one_half_empty_resumes(monkeypatch):
    async def work(stream, told):
        push(stream, 0, 1, 2)
        assert told.calls == []
        push(stream, 3)
        assert told.calls == [("pause", "a")]
        push(stream, 4, 5)  # of steps that were under way: no more outputs, no second pause
        assert (await stream.take()).tokens == (0,)
        assert told.calls == [("pause", "a")]  # three are left, more than half
        assert (await stream.take()).tokens == (1,)
        assert told.calls == [("pause", "a"), ("resume", "a")]
        push(stream, 6, 7)
        assert told.calls[2:] == [("pause", "a")]  # full again
        stream.push(Output(id="a", tokens=(8,), finish=Finish.LENGTH))
        rest = []
        while not stream.is_over:
            rest.append(await stream.take())
        assert [output.tokens for output in rest] == [(2,), (3, 4, 5), (6,), (7, 8)]
        assert rest[-1].finish is Finish.LENGTH

    assert told(work, monkeypatch) == [
        ("pause", "a"),
        ("resume", "a"),
        ("pause", "a"),
    ]  # one that has ended is not resumed


def test_a_reader_that_does_not_come_has_its_request_ended(monkeypatch, caplog):
    monkeypatch.setattr(streams, "STALL_S", 0.01)

    async def work(stream, told):
        push(stream, *range(4))
        while len(told.calls) < 2:
            await asyncio.sleep(0.001)
        stream.push(Output(id="a", finish=Finish.ABORT))

    assert told(work, monkeypatch) == [("pause", "a"), ("abort", "a")]
    assert "request a is ended: nobody has read its output for 0.01 s" in caplog.text


def test_the_time_ends_with_the_request_and_with_the_reader(monkeypatch):
    monkeypatch.setattr(streams, "STALL_S", 0.001)

    async def ends(stream, told):
        push(stream, *range(4))
        stream.push(Output(id="a", finish=Finish.STOP))
        await asyncio.sleep(0.05)

    async def leaves(stream, told):
        with stream:
            push(stream, *range(4))
        await asyncio.sleep(0.05)
        stream.has_ended = True  # as it has been aborted

    assert told(ends, monkeypatch) == [("pause", "a")]
    assert told(leaves, monkeypatch) == [("pause", "a"), ("abort", "a")]


def test_a_reader_that_leaves_aborts_and_a_refusal_is_raised(monkeypatch):
    async def leaves(stream, told):
        push(stream, 0)

    async def refused(stream, told):
        stream.refuse(InputError("too long"))
        with pytest.raises(InputError, match="too long"):
            await stream.take()
        assert stream.is_over

    assert told(leaves, monkeypatch) == [("abort", "a")]
    assert told(refused, monkeypatch) == []


def test_outputs_are_joined_in_order():
    first = Output(id="a", tokens=(1,), cached_tokens=3, queue_s=0.5)
    both = joined(first, Output(id="a", tokens=(2, 3), finish=Finish.STOP))
    assert both == Output(id="a", tokens=(1, 2, 3), cached_tokens=3, queue_s=0.5, finish=Finish.STOP)
    # The last word counts.
    first, second = (Output(id="a", is_prepared=told) for told in (False, True))
    assert joined(joined(first, second), Output(id="a", tokens=(1,))) == Output(id="a", tokens=(1,), is_prepared=True)
