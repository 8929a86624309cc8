"""What a stream that is left can have made, exactly: by what had come when all of it was last read, and the time since."""

import asyncio
import json
import math
from types import SimpleNamespace

import pytest

from anabranch.gateway.dispatch.billed import FEW
from anabranch.gateway.dispatch.output_speed import OutputSpeed
from anabranch.gateway.dispatch.stream_lag import AHEAD_BYTES, CAUGHT_UP_S
from anabranch.gateway.dispatch.upstream_stream import Opened
from anabranch.gateway.providers.provider import Usage

MOST, MARGIN_S = Usage(7, 1_000_000), 0.5


def chunks(texts, pad=""):
    """So many chunks with three bytes of text each."""
    one = {"pad": pad, "choices": [{"index": 0, "delta": {"content": "abc"}, "finish_reason": None}]}
    return (b"data: " + json.dumps(one).encode() + b"\n\n") * texts


def large(texts):
    return chunks(texts, "p" * (AHEAD_BYTES // texts + 1))


class Reply:
    """Gives what it is told to, each after some seconds."""

    def __init__(self, clock, *parts):
        self.clock, self.parts = clock, list(parts)

    def read_ready(self):
        return b""

    async def read_some(self):
        seconds, data = self.parts.pop(0)
        self.clock.now += seconds
        return data

    def close(self):
        pass


def opened(rate, *parts, asked=None, model="gpt-4o", thinks=None, stops=True):
    """A stream whose first token came at 1 s, the clock, and what it is charged in the end."""
    clock, charged = SimpleNamespace(now=1.0), []
    ends = SimpleNamespace(lost=lambda live, attempt, failure, usage: charged.append(usage))
    run = SimpleNamespace(
        dispatcher=SimpleNamespace(now=lambda: clock.now),
        began=0.0,
        ends=ends,
        rules=SimpleNamespace(margin_s=MARGIN_S, bytes_per_token=1.0),
    )
    live = SimpleNamespace(
        speed=OutputSpeed("m", rate),
        deployment=SimpleNamespace(thinks=thinks),
        provider=SimpleNamespace(translator=lambda request: None, config=SimpleNamespace(model=model)),
        bill=lambda usage, most: 0,
        name="m",
        stops_when_closed=stops,
    )
    attempt = SimpleNamespace(start_s=0.0, first_token_s=1.0, most=MOST, seen=0, is_late=False)
    request = SimpleNamespace(wants_usage=False, body=asked or {}, prompt_tokens=7, endpoint="chat")
    return Opened(run, live, attempt, request, Reply(clock, *parts)), clock, charged


def waited(stream, clock, seconds):
    """Its reader was there all the time."""
    clock.now += seconds
    stream.made.lag.waited(seconds)


def speed(seconds, rate=10.0):
    return FEW + math.ceil(rate * seconds)


@pytest.mark.parametrize(("known", "found"), [(100, 10), (10, 1000)])
def test_what_lies_unread_is_charged_by_the_time_since_all_was_read(known, found):
    stream, clock, charged = opened(10.0)
    waited(stream, clock, 1.0)
    stream.taken(chunks(known))
    clock.now = 3.0
    stream.taken(large(found))
    clock.now = 5.0
    stream.drop()
    assert charged == [Usage(7, 3 * (known + found) + 1 + speed(3 + MARGIN_S), 0, True)]


def test_more_than_is_looked_at_is_charged_by_that_time_too():
    stream, clock, charged = opened(10.0)
    waited(stream, clock, 1.0)
    stream.taken(chunks(10))
    clock.now = 5.0
    stream.reply.read_ready = lambda: large(100)
    stream.drop()
    assert charged == [Usage(7, 330 + 1 + speed(3 + MARGIN_S), 0, True)]


def test_what_came_by_the_burst_says_nothing_of_how_fast_it_was_made():
    """F1 of R20b."""
    stream, clock, charged = opened(10.0)
    waited(stream, clock, 5.0)
    stream.taken(chunks(1))
    clock.now += 0.0625
    stream.taken(chunks(120))
    clock.now += 3.0
    stream.drop()
    assert charged == [Usage(7, 363 + 1 + speed(3 + MARGIN_S), 0, True)]


@pytest.mark.parametrize("beside", [b": keep-alive\n\n", b'data: {"choices": []}\n\n'])
def test_pings_and_comments_say_nothing_of_what_is_made_meanwhile(beside):
    stream, clock, charged = opened(10.0)
    waited(stream, clock, 1.0)
    stream.taken(chunks(10))
    for _ in range(11):
        clock.now += 0.5
        stream.taken(beside)
    stream.drop()
    # The time since the text grew, and the margin.
    assert charged == [Usage(7, 31 + speed(5.5 + MARGIN_S), 0, True)]


def test_answers_that_are_not_shown_are_as_long_as_the_best_at_least():
    stream, clock, charged = opened(0.5, asked={"best_of": 4})
    waited(stream, clock, 1.0)
    stream.taken(chunks(10))
    stream.drop()
    assert charged == [Usage(7, 4 * 31 + 4 * FEW + 1, 0, True)]


def test_what_came_at_one_moment_may_have_been_held_back_since_the_one_before():
    stream, clock, charged = opened(100.0)
    for seconds in (1.0, 2.0, 0.05, 0.03):
        waited(stream, clock, seconds)
        stream.taken(chunks(10))
    clock.now += 1.0
    stream.drop()
    # Two seconds, and what came within a tenth of one behind them; and two until the first text: that is all the time.
    assert charged == [Usage(7, 408 + speed(1 + MARGIN_S, 100.0), 0, True)]


def thought(text="so, let me see"):
    one = {"choices": [{"index": 0, "delta": {"reasoning_content": text}, "finish_reason": None}]}
    return b"data: " + json.dumps(one).encode() + b"\n\n"


def test_thoughts_of_which_a_summary_is_shown_are_charged_by_all_the_time():
    stream, clock, charged = opened(100.0)
    for _ in range(17):
        clock.now += 0.5
        stream.taken(thought())
    stream.drop()
    assert charged == [Usage(7, 950 + speed(MARGIN_S, 100.0), 0, True)]


@pytest.mark.parametrize(
    ("asked", "model", "thinks", "by_all"),
    [
        ({}, "gpt-4o", None, False),
        ({}, "gpt-4o", True, True),
        ({}, "prod", None, True),
        ({}, "prod", False, False),
        ({"n": 2}, "gpt-4o", None, True),
        ({"reasoning_effort": "low"}, "gpt-4o", False, True),
        ({"reasoning_effort": "none", "thinking": {"type": "disabled"}}, "gpt-4o", None, False),
    ],
)
def test_what_may_think_unseen_is_charged_by_all_the_time(asked, model, thinks, by_all):
    stream, clock, charged = opened(100.0, asked=asked, model=model, thinks=thinks)
    waited(stream, clock, 1.0)
    for seconds in (0.0, 4.0, 0.125):
        clock.now += seconds
        stream.taken(chunks(5))
    clock.now += 2.0
    stream.drop()
    answers = asked.get("n", 1)
    # Of all seconds before its text grew; or of the eighth of one for which what came last may have been held back, and the two that its
    # first text took.
    seen = math.ceil(612.5 * answers) if by_all else 46 + 213
    assert charged == [Usage(7, seen + answers * speed(2 + MARGIN_S, 100.0), 0, True)]


def test_what_tools_of_the_provider_are_asked_is_not_seen_either():
    stream, clock, charged = opened(100.0)
    stream.attempt.most = Usage(7, 1_000_000, pages=500)
    waited(stream, clock, 1.0)
    stream.taken(chunks(10))
    stream.drop()
    assert charged[0].completion == 200 + speed(MARGIN_S, 100.0)


@pytest.mark.parametrize("asked", [{}, {"modalities": ["text", "audio"]}])
def test_sound_and_pictures_are_charged_the_most(asked):
    stream, clock, charged = opened(10.0, asked=asked)
    waited(stream, clock, 1.0)
    sound = b'data: {"choices": [{"index": 0, "delta": {"audio": {"data": "AAAA"}}}]}\n\n'
    stream.taken(chunks(10) + (b"" if asked else sound))
    stream.drop()
    assert charged == [Usage(7, MOST.completion, 0, True)]


END = b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}\n\n'


@pytest.mark.parametrize(("model", "made"), [("gpt-4o", 31), ("prod", 300)])
def test_what_had_come_to_its_end_and_did_not_say_is_charged_no_time_behind_that(model, made):
    stream, clock, charged = opened(100.0, model=model)
    waited(stream, clock, 2.0)
    stream.taken(chunks(10) + END)
    clock.now += 50.0
    stream.drop()
    assert charged == [Usage(7, made + FEW, 0, True)]


def test_a_reader_who_waits_for_what_comes_has_caught_up():
    half = CAUGHT_UP_S / 2
    stream, clock, _ = opened(10.0, (half, large(3)), (half, chunks(1)), (half, chunks(1)))
    began = stream.made.lag.known_at

    async def main():
        found = []
        for _ in range(3):
            await stream.next()
            found.append(stream.made.lag.known_at)
            # The reader takes its time: that is no wait for the upstream.
            clock.now += 5.0
        return found

    assert asyncio.run(main()) == [began, began, 1.0 + 10 + 3 * half]


def made_for(tool):
    """A delta of an argument for a tool, in a message's own form."""
    return {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": tool}}


def test_what_an_event_and_its_chunk_say_is_counted_once():
    """Both were, so that a stream cost twice what it showed (F4 of R20c); what the event says alone was not."""
    stream, _, _ = opened(10.0)
    chunk = json.loads(chunks(1)[6:])
    text = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "abc"}}
    events = [[{**chunk, "anthropic": text}]] * 4 + [[{"choices": [], "anthropic": made_for("select\u5b57")}]] * 2
    stream.translator = SimpleNamespace(feed=lambda data: events.pop(0), is_done=False, told=None)
    stream.taken(b"data: {}\n\n" * 4)
    assert (stream.tally.texts, stream.tally.text_bytes) == (4, 12)
    stream.taken(b"data: {}\n\n" * 2)
    assert (stream.tally.texts, stream.tally.text_bytes) == (6, 12 + 2 * 9)


@pytest.mark.parametrize("empty", [b'""', b'  ""', b"null"])
def test_an_empty_reason_is_no_end(empty):
    """SGLang and Ollama said one with each chunk: what was left was charged as whole, and what broke off was taken for it (S1 of R20c)."""
    stream, clock, charged = opened(10.0)
    for _ in range(3):
        clock.now += 1.0
        stream.taken(chunks(1).replace(b'"finish_reason": null', b'"finish_reason":' + empty))
    assert not stream.has_finished
    clock.now += 2.0
    stream.drop()
    assert charged[0].completion >= 10 + speed(2 + MARGIN_S)
    stream.taken(END)
    assert stream.has_finished


def test_one_that_is_made_to_its_end_whoever_leaves_is_charged_the_most():
    """S2 of R20c: providers that do not stop where the connection is closed."""
    for stops in (True, False):
        stream, clock, charged = opened(10.0, stops=stops)
        waited(stream, clock, 1.0)
        stream.taken(chunks(10))
        stream.drop()
        assert (charged[0].completion == MOST.completion) is not stops


def test_a_whole_stream_that_did_not_tell_is_charged_until_its_end_was_read():
    """What came last by more than is found at once was charged until what was before it (S3 of R20c)."""
    stream, clock, _ = opened(100.0, model="prod")
    waited(stream, clock, 1.0)
    stream.taken(chunks(1))
    waited(stream, clock, 9.0)
    stream.taken(large(300) + END)
    clock.now += 50.0
    assert stream.made.untold(MOST, None).completion == 1100 + FEW
