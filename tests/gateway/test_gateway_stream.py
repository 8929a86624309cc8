"""Streams byte by byte: upstreams that send what they please, in the pieces they please, played in process."""

import asyncio
import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.dispatch import Deployment, Dispatcher, DispatchRules, Group, Plan
from anabranch.gateway.dispatch.stream import CONTINUE, HEARTBEAT
from anabranch.gateway.dispatch.virtual_time import run_virtual as run
from anabranch.gateway.dispatch.virtual_time import virtual_clock
from anabranch.gateway.providers.assembling import assembled
from anabranch.gateway.providers.chunks import as_chunks, ended, has_content, text_of
from anabranch.gateway.providers.openai import OpenAI
from anabranch.gateway.providers.provider import Answer, Failure, UpstreamError, UpstreamRequest, Usage
from anabranch.routers.money import Price

BROKEN = "broken"  # in place of a piece: the connection breaks
HANGS = "hangs"  # nothing more comes
PRICE = Price(input=1_000_000_000, output=2_000_000_000)  # 1,000 and 2,000 nano-dollars a token


class Reply:
    """Pieces of an answer, one at a time; a number is a wait in seconds."""

    def __init__(self, pieces: Any, content_type: str) -> None:
        self.status, self.headers = 200, {"content-type": content_type}
        self.pieces, self.is_closed, self.hangs = iter(pieces), False, False

    def read_ready(self) -> bytes:
        return b""

    async def read_some(self) -> bytes:
        if self.hangs:
            await asyncio.Event().wait()
        for piece in self.pieces:
            if isinstance(piece, float):
                await asyncio.sleep(piece)
            elif piece == HANGS:
                self.hangs = True
                await asyncio.Event().wait()
            elif piece == BROKEN:
                raise UpstreamError(Failure(kind="connect", message="it broke"))
            else:
                return piece
        return b""

    def close(self) -> None:
        self.is_closed = True


class Wire:
    """A transport that gives each call the next of some lists of pieces, and remembers what was asked."""

    def __init__(self, *answers: Any, content_type: str = "text/event-stream") -> None:
        self._answers, self._type = iter(answers), content_type
        self.asked: list[Any] = []
        self.replies: list[Reply] = []

    async def open(self, call: Any) -> Reply:
        self.asked.append(json.loads(call.body))
        self.replies.append(Reply(next(self._answers), self._type))
        return self.replies[-1]


def dispatcher_of(
    wire: Wire, rules: DispatchRules | None = None, names: str = "ab", clock: Any = virtual_clock, **limits: Any
) -> Dispatcher:
    provider = OpenAI.Config(model="m", base_url="http://nowhere/v1", key_env=None)
    groups = [
        Group(name=name, deployments=(Deployment(name=f"{name}-0", provider=provider, **limits),), price=PRICE)
        for name in names
    ]
    rules = rules or DispatchRules(retries=0, backoff_s=0.0, min_extra=100)
    return Dispatcher(groups, rules, http=wire, clock=clock)


def request(endpoint: Any = "chat", **fields: Any) -> UpstreamRequest:
    body = {"messages": [{"role": "user", "content": "hello"}]} if endpoint == "chat" else {"prompt": "hello"}
    return UpstreamRequest(endpoint, {"model": "auto", "stream": True, **body, **fields}, prompt_tokens=7)


async def read(
    dispatcher: Dispatcher, asked: UpstreamRequest | None = None, seconds: float = 5.0, names: str = "ab", **fields: Any
) -> tuple[Any, bytes]:
    plan = Plan(candidates=tuple(names), deadline=dispatcher.now() + seconds, **fields)
    stream = await dispatcher.stream(plan, asked or request())
    return stream, b"".join([block async for block in stream])


def said(text: str | None, **fields: Any) -> bytes:
    chunk = {
        "id": "c1",
        "model": "m",
        "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}],
        **fields,
    }
    return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"


ROLE = b'data: {"id":"c1","model":"m","choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
END = b'data: {"id":"c1","model":"m","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
DONE = b"data: [DONE]\n\n"


def usage(prompt: int, completion: int) -> bytes:
    return said(None, choices=[], usage={"prompt_tokens": prompt, "completion_tokens": completion})


def chunks_of(raw: bytes) -> list[Any]:
    """Parsed events, all of which must be JSON."""
    lines = [line[6:] for line in raw.decode().splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def text(raw: bytes) -> str:
    return text_of(chunk for chunk in chunks_of(raw) if "error" not in chunk)


# Pieces


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_where_a_stream_is_cut_makes_no_difference(line_end):
    whole = (ROLE + b": a comment\n\n" + said("Grüße ") + said("🦊") + END + usage(3, 2) + DONE).replace(
        b"\n", line_end
    )

    async def work() -> None:
        for pieces in [
            *([whole[:at], whole[at:]] for at in range(1, len(whole))),
            [whole[at : at + 1] for at in range(len(whole))],
        ]:
            stream, raw = await read(dispatcher_of(Wire(pieces)))
            assert (text(raw), raw.count(DONE), raw[-len(DONE) :]) == ("Grüße 🦊", 1, DONE)
            assert stream.usage == Usage(3, 2)
            assert not any("usage" in chunk for chunk in chunks_of(raw))

    run(work)


def test_what_needs_no_reading_is_passed_on_to_the_byte():
    odd = b'data: {"id" : "c1","choices":[{"index":0,"delta":{"content":"x\\n\\n[DONE]"},"unknown":1e400}]}\n\n'

    async def work() -> None:
        _, raw = await read(dispatcher_of(Wire([ROLE, said("a"), odd, END, DONE])))
        assert raw == ROLE + said("a") + odd + END + DONE

    run(work)


@pytest.mark.parametrize(
    "pieces",
    [
        [DONE],
        [ROLE, DONE],
        [ROLE],
        [],
        [b": comment\n\n"] * 3,
        [ROLE, BROKEN],
        [b"data: {"],
        [b"nonsense\n\n"],
        [b"data: {no json}\n\n"],
        [b"data: [1]\n\n"],
        [b'data: {"error":"boom"}\n\n'],
        [b"<!doctype html><html>"],
    ],
)
def test_a_stream_that_brings_no_token_is_asked_for_elsewhere(pieces):
    async def work() -> None:
        wire = Wire(pieces, [said("fine"), END, DONE])
        stream, raw = await read(dispatcher_of(wire))
        assert text(raw) == "fine"
        assert [attempt.status == "ok" for attempt in stream.report.attempts] == [False, True]
        assert wire.replies[0].is_closed

    run(work)


@pytest.mark.parametrize(
    ("piece", "kind"),
    [
        (b'data: {"choices": [{"delta": {"con\n\n', "garbage"),
        (b'data: {"choices":[{"delta":{"content":"\xff\xfe"}}]}\n\n', "garbage"),
        (b"<html>\n\n", "garbage"),
        (b"data: 7\n\n", "garbage"),
        (b'data: {"error":"boom"}\n\n', "server"),
        (b'data: {"error":{"message":"slow down","code":429}}\n\n', "rate_limit"),
        (b'data: {"error":{"message":"m","status":"bad"}}\n\n', "server"),
        (b'event: error\ndata: {"message":"m"}\n\n', "server"),
        (b'data: {"id":"c1","choices":[],"error":{"message":"late in the object"}}\n\n', "server"),
        (BROKEN, "cut"),
        (b"", "cut"),
    ],
)
def test_what_breaks_in_the_middle_ends_in_an_error_and_is_not_passed_on(piece, kind):
    async def work() -> None:
        wire = Wire([said("a"), said("b"), piece, said("never"), END, DONE])
        stream, raw = await read(dispatcher_of(wire))
        assert (text(raw), stream.failure.kind, stream.report.attempts[0].status) == ("ab", kind, kind)
        assert list(chunks_of(raw)[-1]) == ["error"]
        assert DONE not in raw
        assert stream.report.cost == 7 * 1000 + 2 * 2000  # the prompt, and two chunks with text
        assert wire.replies[0].is_closed

    run(work)


@pytest.mark.parametrize("tail", [[BROKEN], [DONE[:-2]], [b"data: [DON"], [END[:-1], BROKEN], []])
def test_an_answer_that_came_to_its_end_is_whole_whatever_the_connection_does(tail):
    async def work() -> None:
        stream, raw = await read(dispatcher_of(Wire([said("a"), END, *tail])))
        assert (text(raw), raw[-len(DONE) :], stream.failure) == ("a", DONE, None)

    run(work)


def test_a_last_event_without_its_empty_line_is_read():
    async def work() -> None:
        _, raw = await read(dispatcher_of(Wire([said("a"), said("b"), END[:-2]])))
        assert (text(raw), raw[-len(DONE) :]) == ("ab", DONE)

    run(work)


def test_an_event_without_end_is_given_up_on(monkeypatch):
    monkeypatch.setattr("anabranch.gateway.providers.sse.EVENT_BYTES", 1000)

    async def work() -> None:
        stream, _ = await read(dispatcher_of(Wire([said("a"), *([b"x" * 600] * 3)])))
        assert stream.failure.kind == "excess"

    run(work)


def test_an_upstream_that_never_begins_is_not_listened_to_for_ever(monkeypatch):
    monkeypatch.setattr("anabranch.gateway.dispatch.upstream_stream.EVENT_BYTES", 1000)

    async def work() -> None:
        for piece in (ROLE, b": a comment\n\n"):
            stream, raw = await read(dispatcher_of(Wire([piece] * 99, [said("b"), END])))
            assert (text(raw), stream.report.attempts[0].status) == ("b", "garbage")

    run(work)


def test_an_answer_that_is_to_be_judged_is_bounded(monkeypatch):
    monkeypatch.setattr("anabranch.gateway.dispatch.upstream_stream.BODY_BYTES", 1000)

    async def work() -> None:
        wire = Wire([said("a")] * 50, [said("b"), END])
        stream, raw = await read(dispatcher_of(wire), accept=lambda model, answer: True)
        assert (text(raw), stream.report.attempts[0].status) == ("b", "excess")

    run(work)


def test_a_whole_answer_to_a_wish_for_a_stream_is_made_one():
    body = {
        "id": "x",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "all"}, "finish_reason": "length"}],
    }

    async def work() -> None:
        wire = Wire(
            [json.dumps({**body, "usage": {"prompt_tokens": 4, "completion_tokens": 1}}).encode()],
            content_type="application/json",
        )
        stream, raw = await read(dispatcher_of(wire))
        assert (text(raw), stream.usage) == ("all", Usage(4, 1))
        assert chunks_of(raw)[-1]["choices"][0]["finish_reason"] == "length"

        wire = Wire([b'{"choices": []}'], [json.dumps(body).encode()], content_type="application/json")
        assert text((await read(dispatcher_of(wire)))[1]) == "all"

    run(work)


NAMES = "choices delta message content text tool_calls function index finish_reason usage logprobs error".split()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=8,
)
OBJECT = st.dictionaries(st.sampled_from(["choices", "usage", "id", "error"]), JSON, max_size=4)


@given(st.lists(OBJECT, max_size=3), st.sampled_from(["chat", "completions"]))
def test_chunks_of_any_shape_are_read_without_a_fault(chunks, endpoint):
    whole = assembled(chunks, endpoint)
    assert isinstance(text_of(chunks), str)
    for chunk in [*chunks, whole]:
        has_content(chunk), ended(chunk), as_chunks(chunk, endpoint, True), Usage.of(chunk)
        answer = Answer(chunk, None, Usage())
        assert isinstance(answer.text, str)


@given(
    st.lists(
        st.binary(max_size=20) | OBJECT.map(lambda chunk: b"data: " + json.dumps(chunk).encode() + b"\n\n"), max_size=6
    )
)
def test_any_bytes_end_in_an_error_or_in_a_stream_of_json(pieces):
    async def work() -> None:
        pieces_ = [said("a"), *filter(None, pieces), END]
        stream, raw = await read(dispatcher_of(Wire(pieces_), names="a"), names="a", keep=True)
        chunks = chunks_of(raw)
        assert (stream.failure is None) == raw.endswith(DONE)
        assert ("error" in chunks[-1]) == (stream.failure is not None)
        stream.answer()

    run(work)


# Usage


def test_what_was_not_said_is_counted():
    async def work() -> None:
        stream, _ = await read(dispatcher_of(Wire([ROLE, said("one"), said(" two"), END, DONE])))
        assert stream.usage == Usage(7, 2, 0, True)  # two chunks with text; 7 bytes would be one token
        stream, _ = await read(dispatcher_of(Wire([ROLE, said("x" * 400), END, DONE])))
        assert stream.usage == Usage(7, 100, 0, True)  # a chunk of many tokens: a quarter of its bytes

    run(work)


def test_who_asks_for_usage_gets_it_once():
    asked = request(stream_options={"include_usage": True})

    async def work() -> None:
        _, raw = await read(dispatcher_of(Wire([said("a"), END, usage(5, 6), DONE])), asked)
        assert [chunk["usage"]["completion_tokens"] for chunk in chunks_of(raw) if chunk.get("usage")] == [6]
        _, raw = await read(dispatcher_of(Wire([said("a"), END, DONE])), asked)  # the upstream knows nothing of it
        last = chunks_of(raw)[-1]
        assert (last["choices"], last["usage"]["prompt_tokens"], last["id"]) == ([], 7, "c1")

    run(work)


@pytest.mark.parametrize("more", [[], [usage(5, 6)]])
def test_usage_beside_the_last_words_is_told_once_and_only_to_who_asks(more):
    """As DeepSeek and Gemini's compatible endpoint send it; some send it in a chunk of its own as well."""
    counts = {"prompt_tokens": 5, "completion_tokens": 6, "completion_tokens_details": {"reasoning_tokens": 2}}
    last = said("b", usage=counts).replace(b'"finish_reason": null', b'"finish_reason": "stop"')

    async def work() -> None:
        stream, raw = await read(
            dispatcher_of(Wire([said("a"), last, *more, DONE])), request(stream_options={"include_usage": True})
        )
        told = [(len(chunk["choices"]), chunk["usage"]) for chunk in chunks_of(raw) if chunk.get("usage")]
        assert told == [(0, counts if not more else {"prompt_tokens": 5, "completion_tokens": 6})]
        assert (text(raw), stream.usage) == ("ab", Usage(5, 6))
        stream, raw = await read(dispatcher_of(Wire([said("a"), last, *more, DONE])))
        assert (text(raw), stream.usage) == ("ab", Usage(5, 6))
        assert not any(chunk.get("usage") for chunk in chunks_of(raw))
        wanted = request(stream_options={"include_usage": True, "continuous_usage_stats": True})
        _, raw = await read(dispatcher_of(Wire([said("a"), last, usage(5, 6), DONE])), wanted)
        assert [len(chunk["choices"]) for chunk in chunks_of(raw) if chunk.get("usage")] == [1, 0]

    run(work)


# Time


def test_the_last_event_does_not_wait_for_the_connection_to_end():
    async def work() -> None:
        wire = Wire([said("a"), END, DONE, HANGS])
        dispatcher = dispatcher_of(wire)
        began = dispatcher.now()
        _, raw = await read(dispatcher)
        assert raw.endswith(DONE)
        assert dispatcher.now() == began
        await dispatcher.close()
        assert len(asyncio.all_tasks()) == 1
        assert wire.replies[0].is_closed

    run(work)


def test_the_deadline_holds_for_an_upstream_that_never_pauses():
    async def work() -> None:
        looks = itertools.count()  # every look at the clock takes a millisecond
        dispatcher = dispatcher_of(Wire(itertools.repeat(said("more"))), clock=lambda: next(looks) / 1000)
        began = dispatcher.now()
        stream, _ = await read(dispatcher, seconds=0.5)
        assert 0.5 <= dispatcher.now() - began < 0.55
        assert stream.failure.kind == "deadline"

    run(work)


def test_a_slow_reader_is_not_held_against_the_upstream():
    async def work() -> None:
        dispatcher = dispatcher_of(Wire([said("a"), 0.05, said("b"), END, DONE]), timeout_s=0.1)
        stream = await dispatcher.stream(Plan(candidates=("a",), deadline=dispatcher.now() + 5), request())
        raw = b""
        async for block in stream:
            raw += block
            if len(raw) < 200:
                await asyncio.sleep(0.15)  # longer than an upstream may take
        assert (text(raw), stream.failure) == ("ab", None)

    run(work)


def test_an_upstream_that_falls_silent_is_given_up_on_after_signs_of_life():
    async def work() -> None:
        rules = DispatchRules(heartbeat_s=0.03)
        stream, raw = await read(dispatcher_of(Wire([said("a"), HANGS]), rules, timeout_s=0.1))
        assert stream.failure.kind == "timeout"
        assert raw.count(b": waiting\n\n") == 3  # after 30, 60 and 90 of 100 ms

    run(work)


@pytest.mark.parametrize("ping", [b": keep-alive\n\n", b"event: ping\ndata: {}\n\n"])
def test_pings_keep_a_stream_alive_until_the_whole_time_is_up(ping):
    """They were passed over, and an upstream that sent them through a long parameter was given up on (R20's F2)."""

    async def work() -> None:
        pings = [0.05, ping] * 8
        wire = Wire([said("a"), *pings, said("b"), END, DONE], [said("a"), *pings, HANGS], [said("a"), *pings * 9])
        dispatcher = dispatcher_of(wire, timeout_s=0.1)
        stream, raw = await read(dispatcher)
        assert (text(raw), stream.failure) == ("ab", None)
        stream, _ = await read(dispatcher)
        assert stream.failure.kind == "timeout"
        stream, _ = await read(dispatcher, seconds=1.0)
        assert stream.failure.kind == "deadline"

    run(work)


def test_what_came_while_the_reader_was_away_is_a_sign_of_life():
    async def work() -> None:
        rules = DispatchRules(heartbeat_s=0.03, retries=0)
        dispatcher = dispatcher_of(
            Wire([said("a"), 0.05, b": ping\n\n", 0.08, said("b"), END, DONE]), rules, timeout_s=0.1
        )
        plan = Plan(candidates=("a",), deadline=dispatcher.now() + 5.0)
        stream = await dispatcher.stream(plan, request())
        blocks = []
        async for block in stream:
            blocks.append(block)
            await asyncio.sleep(0.01)
        assert (text(b"".join(blocks)), stream.failure) == ("ab", None)

    run(work)


def test_pings_of_an_upstream_keep_no_heartbeat_from_the_reader():
    """Of pings nothing is passed on: a proxy before the reader would cut a stream of which nothing comes."""

    async def work() -> None:
        rules = DispatchRules(heartbeat_s=0.05, retries=0)
        pings = [0.03, b": ping\n\n"] * 10
        dispatcher = dispatcher_of(Wire([said("a"), *pings, said("b"), END, DONE]), rules, timeout_s=0.2)
        plan = Plan(candidates=("a",), deadline=dispatcher.now() + 5.0)
        blocks = [block async for block in await dispatcher.stream(plan, request())]
        assert text(b"".join(blocks)) == "ab"
        assert blocks.count(HEARTBEAT) == 5

    run(work)


# Going on


def continued(*answers: Any, **fields: Any) -> tuple[Wire, Any, bytes]:
    wire = Wire(*answers)
    asked = fields.pop("asked", None) or request()
    stream, raw = run(lambda: read(dispatcher_of(wire), asked, mid_stream="continue", keep=True, **fields))
    return wire, stream, raw


def test_what_goes_on_reads_as_one_answer():
    asked = request(max_tokens=10, stream_options={"include_usage": True})
    second = [
        ROLE.replace(b"c1", b"c2"),
        said(" there", id="c2", model="n"),
        END.replace(b"c1", b"c2"),
        usage(9, 1).replace(b"c1", b"c2"),
        DONE,
    ]
    wire, stream, raw = continued([ROLE, said("so"), said(" far"), BROKEN], second, asked=asked)
    chunks = chunks_of(raw)
    assert text(raw) == "so far there"
    assert {(chunk["id"], chunk["model"]) for chunk in chunks} == {("c1", "m")}
    roles = [choice["delta"] for chunk in chunks for choice in chunk["choices"] if "role" in choice["delta"]]
    assert len(roles) == 1
    assert wire.asked[1]["messages"][1:] == [
        {"role": "assistant", "content": "so far"},
        {"role": "user", "content": CONTINUE},
    ]
    assert wire.asked[1]["max_tokens"] == 10 - 2  # two chunks had come
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk.get("usage")] == [2 + 1]
    assert stream.report.is_stitched
    assert stream.report.cost == (7 * 1000 + 2 * 2000) + (9 * 1000 + 1 * 2000)  # both prompts, both answers
    assert stream.answer().text == "so far there"
    assert stream.answer().usage == Usage(7, 3, 0, True)


def test_a_plain_completion_goes_on_from_its_prompt():
    def piece(text: str) -> bytes:
        return b"data: " + json.dumps({"id": "c", "choices": [{"index": 0, "text": text}]}).encode() + b"\n\n"

    end = b'data: {"id":"c","choices":[{"index":0,"text":"","finish_reason":"stop"}]}\n\n'
    wire, _, raw = continued([piece(" world"), BROKEN], [piece("!"), end], asked=request("completions"))
    assert wire.asked[1]["prompt"] == "hello world"
    assert text(raw) == " world!"


CALL = said(None, choices=[{"index": 0, "delta": {"content": "x", "tool_calls": [{"index": 0, "id": "t"}]}}])


@pytest.mark.parametrize(
    ("first", "asked"),
    [
        ([CALL, BROKEN], request()),
        ([said("a"), BROKEN], request(n=2)),
        ([said("a"), BROKEN], request("completions", prompt=["x"])),
    ],
)
def test_what_cannot_be_told_to_another_model_is_not_gone_on_with(first, asked):
    wire, stream, raw = continued(first, [said("b"), END], asked=asked)
    assert (len(wire.asked), stream.failure.kind, stream.report.is_stitched) == (1, "cut", False)
    assert list(chunks_of(raw)[-1]) == ["error"]


def test_when_nobody_goes_on_the_stream_ends_in_an_error():
    wire, stream, raw = continued([said("a"), BROKEN], [BROKEN])
    assert (text(raw), len(wire.asked), stream.failure.kind) == ("a", 2, "connect")
    assert not stream.report.is_stitched


def test_signs_of_life_while_another_upstream_is_awaited_and_a_reader_who_leaves_then():
    async def work() -> None:
        wire = Wire([said("a"), BROKEN], [HANGS])
        dispatcher = dispatcher_of(wire, DispatchRules(retries=0, heartbeat_s=0.01))
        plan = Plan(candidates=("a", "b"), deadline=dispatcher.now() + 5, mid_stream="continue")
        stream, seen = await dispatcher.stream(plan, request()), []
        async for block in stream:
            seen.append(block)
            if seen.count(b": waiting\n\n") == 2:
                break
        await stream.aclose()
        assert wire.replies[1].is_closed
        assert [attempt.status for attempt in stream.report.attempts] == ["cut", "cancelled"]
        assert [state["in_flight"] for state in dispatcher.states()] == [0, 0]

    run(work)


# Judging


def test_an_answer_that_is_not_accepted_never_reaches_the_reader():
    judged = []

    async def accept(model: str, answer: Answer) -> bool:
        judged.append((model, answer.text, answer.usage.completion))
        return False

    async def work() -> None:
        wire = Wire([said("poor"), END, usage(7, 1), DONE], [said("rich"), END, usage(7, 1), DONE])
        stream, raw = await read(dispatcher_of(wire), accept=accept)
        assert (text(raw), judged) == ("rich", [("a", "poor", 1)])
        assert [attempt.status for attempt in stream.report.attempts] == ["rejected", "ok"]
        assert (stream.report.model, stream.report.cost) == ("b", 2 * 9000)

        wire = Wire([said("poor"), END, DONE], [BROKEN])
        stream, raw = await read(dispatcher_of(wire), accept=accept)
        assert (text(raw), stream.report.model) == ("poor", "a")  # better than none

        wire = Wire([said("poor"), BROKEN], [said("rich"), END, DONE])
        stream, raw = await read(dispatcher_of(wire), accept=accept)
        assert text(raw) == "rich"  # it broke before it could be judged, and nobody had seen any of it
        assert raw.count(b"poor") == 0

    run(work)


def test_an_accepted_stream_is_passed_on_as_it_came():
    async def work() -> None:
        wire = Wire([ROLE, said("fine"), END, DONE])
        dispatcher = dispatcher_of(wire)
        stream, raw = await read(dispatcher, accept=lambda model, answer: answer.text == "fine")
        assert raw == ROLE + said("fine") + END + DONE
        assert [attempt.status for attempt in stream.report.attempts] == ["ok"]
        assert [state["in_flight"] for state in dispatcher.states()] == [0, 0]

    run(work)
