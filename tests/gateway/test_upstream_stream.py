"""What a stream that is left can have made, exactly: by what had come when all of it was last read, and the time since."""

import asyncio
import json
import math
from types import SimpleNamespace

import pytest

from anabranch.gateway.dispatch.billed import FEW
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


def opened(rate, *parts):
    """A stream whose first token came at 1 s, the clock, and what it is charged in the end."""
    clock, charged = SimpleNamespace(now=1.0), []
    ends = SimpleNamespace(lost=lambda live, attempt, failure, usage: charged.append(usage))
    run = SimpleNamespace(
        dispatcher=SimpleNamespace(now=lambda: clock.now), began=0.0, ends=ends,
        rules=SimpleNamespace(margin_s=MARGIN_S, bytes_per_token=1.0),
    )  # fmt: skip
    live = SimpleNamespace(
        speed=SimpleNamespace(of=lambda tier, now: rate),
        provider=SimpleNamespace(translator=lambda request: None, config=SimpleNamespace(model="m")),
        name="m",
    )
    attempt = SimpleNamespace(start_s=0.0, first_token_s=1.0, most=MOST, seen=0, is_late=False)
    request = SimpleNamespace(wants_usage=False, body={}, prompt_tokens=7, endpoint="chat")
    return Opened(run, live, attempt, request, Reply(clock, *parts)), clock, charged


def waited(stream, clock, seconds):
    """Its reader was there all the time."""
    clock.now += seconds
    stream.made.lag.waited(seconds)


@pytest.mark.parametrize(
    ("rate", "known", "found", "wanted"),
    [
        # As fast as it was while all of it was read: bytes, where nobody knows how fast others are.
        (None, 100, 10, 300),
        # Or as fast as it was read since.
        (None, 10, 1000, 3031 / 4),
        # Tokens as they mostly are, beside what is known of others.
        (10.0, 100, 10, 100),
        (10.0, 10, 1000, 1010 / 4),
        (500.0, 10, 10, 500),
    ],
)
def test_what_lies_unread_is_charged_by_the_time_since_all_was_read(rate, known, found, wanted):
    stream, clock, charged = opened(rate)
    waited(stream, clock, 1.0)
    stream.taken(chunks(known))
    clock.now = 3.0
    stream.taken(large(found))
    clock.now = 5.0
    stream.drop()
    seen = max(3 * (known + found) + 1, 0 if rate is None else math.ceil(wanted))
    # The first second, of which nothing was seen, and three since all was read.
    assert charged == [Usage(7, seen + FEW + math.ceil(wanted * (1 + 3 + MARGIN_S)), 0, True)]


def test_what_came_while_the_reader_was_away_may_have_come_at_once():
    stream, clock, charged = opened(None)
    waited(stream, clock, 0.1)
    clock.now += 0.9
    stream.taken(chunks(10))
    clock.now += 2.0
    stream.drop()
    assert charged == [Usage(7, 31 + FEW + math.ceil(30 / 0.1 * (1 + 2 + MARGIN_S)), 0, True)]


@pytest.mark.parametrize("beside", [b": keep-alive\n\n", b'data: {"choices": []}\n\n'])
@pytest.mark.parametrize(("rate", "made"), [(10.0, 10.0), (None, 30.0)])
def test_pings_and_comments_say_nothing_of_what_is_made_meanwhile(beside, rate, made):
    stream, clock, charged = opened(rate)
    waited(stream, clock, 1.0)
    stream.taken(chunks(10))
    for _ in range(11):
        clock.now += 0.5
        stream.taken(beside)
    stream.drop()
    # The first second, the time since the text grew, and the margin.
    assert charged == [Usage(7, 31 + FEW + math.ceil(made * (1 + 5.5 + MARGIN_S)), 0, True)]


def thought(text="so, let me see"):
    one = {"choices": [{"index": 0, "delta": {"reasoning_content": text}, "finish_reason": None}]}
    return b"data: " + json.dumps(one).encode() + b"\n\n"


def test_thoughts_of_which_a_summary_is_shown_are_charged_by_all_the_time():
    for rate, made in ((100.0, FEW + 850 + 150), (None, MOST.completion)):
        stream, clock, charged = opened(rate)
        for _ in range(17):
            clock.now += 0.5
            stream.taken(thought())
        stream.drop()
        assert charged == [Usage(7, made, 0, True)]


@pytest.mark.parametrize(
    ("asked", "model", "is_most"),
    [
        ({}, "m", False),
        ({}, "openai/gpt-5-mini", True),
        ({"reasoning_effort": "low"}, "m", True),
        ({"reasoning_effort": "none", "thinking": {"type": "disabled"}}, "m", False),
        ({"modalities": ["text", "audio"]}, "m", True),
    ],
)
def test_where_nobody_knows_how_fast_it_is_what_may_think_is_charged_the_most(asked, model, is_most):
    stream, clock, charged = opened(None)
    stream.request.body, stream.live.provider.config.model = asked, model
    waited(stream, clock, 1.0)
    stream.taken(chunks(10))
    stream.drop()
    assert (charged[0].completion == MOST.completion) == is_most


@pytest.mark.parametrize("rate", [None, 10.0])
def test_sound_and_pictures_are_charged_the_most(rate):
    stream, clock, charged = opened(rate)
    waited(stream, clock, 1.0)
    stream.taken(chunks(10) + b'data: {"choices": [{"index": 0, "delta": {"audio": {"data": "AAAA"}}}]}\n\n')
    stream.drop()
    assert charged == [Usage(7, MOST.completion, 0, True)]


def test_a_reader_who_waits_for_what_comes_has_caught_up():
    half = CAUGHT_UP_S / 2
    stream, clock, _ = opened(None, (half, large(3)), (half, chunks(1)), (half, chunks(1)))
    began = stream.made.lag.known_at

    async def main():
        found = []
        for _ in range(3):
            await stream.next()
            found.append(stream.made.lag.known_at)
            # The reader takes its time: that is no wait for the upstream.
            clock.now += 5.0
        return found

    assert asyncio.run(main()) == [began, began, began + 10 + 3 * half]
