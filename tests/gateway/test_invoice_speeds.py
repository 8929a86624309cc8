"""The ledger against the invoice of streams that are left: no server, and a clock by hand.

A provider makes so many tokens a second of every answer, thoughts that nobody sees among them, of texts that are dense or not, with
pauses, by the burst, through proxies that hold events back and filters that show each a constant time after it was made, with comments
and empty chunks beside it, and much that is found at once. Somebody leaves. As long as it makes no more than its `output_speed`
declares, what they are charged is never below what was made, and not above what was shown and what can have been made unseen; and
whatever streams others had, it is the same.
"""

import functools
import json
import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.gateway.dispatch import Attempt, Deployment, Dispatcher, DispatchRules, Group, Plan, Report
from anabranch.gateway.dispatch.attempt_ends import AttemptEnds
from anabranch.gateway.dispatch.billed import FEW
from anabranch.gateway.dispatch.stream_lag import AHEAD_BYTES, MOMENT_S
from anabranch.gateway.dispatch.upstream_stream import Opened
from anabranch.gateway.providers.openai import OpenAI
from anabranch.gateway.providers.provider import HttpCall, UpstreamRequest, Usage
from anabranch.routers.money import Price

MARGIN_S, MOST = 0.5, 10**6
WORD, CHINESE, DIGIT, TABLE = "word ", "\u5b57", "7", "-----|" * 4
# Beside an answer: comments, and chunks that say nothing of it; and what makes an event longer than is found at once.
ROLE = {"id": "c", "choices": [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}]}
PING = b": still there\n\ndata: " + json.dumps(ROLE).encode() + b"\n\n"
PAD = b": " + b"p" * (AHEAD_BYTES + 1) + b"\n\n"
# One whose name says that it shows what it makes, and one that nobody knows.
PLAIN, UNKNOWN = "gpt-4o", "prod"


@dataclass(frozen=True)
class Shape:
    """How a stream goes: parts one after another, each (what, seconds), or (what, seconds, text of a token).

    wait     nothing is made and nothing comes
    think    tokens are made and nothing comes
    sum up   tokens are made, and a summary of them comes, of a few words
    aloud    tokens are made, and come as thoughts
    write    tokens are made and come
    whole    tokens are made, and come when it ends, in one event
    give     as many come at once, of a cache: they are billed

    Each event comes ``lag_s`` after it would; a comment and an empty chunk every ``pings_s``; of ``pads`` events one is longer than is
    found at once; ``reason`` is the finish_reason of what is no end; without ``tells`` no usage comes.
    """

    parts: tuple[tuple, ...]
    speed: float = 100.0
    at_once: int = 1
    flush_s: float = 0.0
    reads: int = 1
    n: int = 1
    best_of: int = 1
    prompts: int = 1
    tier: str = ""
    told: int | None = None
    lag_s: float = 0.0
    pings_s: float = 0.0
    pads: int = 0
    reason: str | None = None
    tells: bool = True

    @property
    def answers(self):
        return max(self.n, self.best_of) * self.prompts

    @property
    def shown(self):
        return self.n * self.prompts

    @property
    def seconds(self):
        return sum(seconds for what, seconds, *_ in self.parts if what != "give") + self.lag_s

    def body(self):
        asked = {"stream": True, "n": self.n}
        if self.best_of > 1 or self.prompts > 1:
            return {**asked, "best_of": self.best_of, "prompt": ["a"] * self.prompts}
        return {**asked, "messages": []}

    def made(self, until):
        """Tokens of one answer by then."""
        at = made = 0.0
        for what, seconds, *_ in self.parts:
            if what == "give":
                made += seconds * self.speed * (at <= until)
                continue
            if what != "wait":
                made += self.speed * max(0.0, min(seconds, until - at))
            at += seconds
        return math.floor(made + 1e-6)

    def events(self):
        """(when, bytes) of all that comes."""
        found, at = [], 0.0
        for what, seconds, *texts in self.parts:
            text = texts[0] if texts else WORD
            num = math.floor(seconds * self.speed + 1e-6)
            if what in ("write", "aloud"):
                name = "content" if what == "write" else "reasoning_content"
                for start in range(0, num, self.at_once):
                    size = min(self.at_once, num - start)
                    found.append((at + (start + size) / self.speed, self.delta(name, text * size)))
            elif what in ("whole", "give") and num:
                found.append((at + seconds * (what == "whole"), self.delta("content", text * num)))
            elif what == "sum up":
                found += [(at + part * seconds / 5, self.delta("reasoning_content", "so, ")) for part in range(1, 6)]
            at += seconds * (what != "give")
        end = b"".join(event({"index": index, "delta": {}, "finish_reason": "stop"}) for index in range(self.shown))
        found.append((at, end + self.usage(at)))
        return self.beside([(when + self.lag_s, data) for when, data in self.flushed(found, at)])

    def flushed(self, found, at):
        """As a proxy lets them go."""
        if not self.flush_s:
            return found
        held = [(min(at, math.ceil(when / self.flush_s) * self.flush_s), data) for when, data in found]
        # In several reads, a few milliseconds apart.
        split = [(when + 0.005 * (index % self.reads), data) for index, (when, data) in enumerate(held[:-1])]
        return [*sorted(split, key=lambda one: one[0]), (held[-1][0] + 0.02, held[-1][1])]

    def beside(self, found):
        """With comments, empty chunks and padding."""
        if self.pads:
            found = [
                (when, PAD + data if index % self.pads == self.pads - 1 else data)
                for index, (when, data) in enumerate(found)
            ]
        if not self.pings_s:
            return found
        num = math.floor(found[-1][0] / self.pings_s)
        return sorted([*((at * self.pings_s, PING) for at in range(1, num + 1)), *found], key=lambda one: one[0])

    def delta(self, name, text):
        return deltas(name, text, self.shown, self.reason)

    def usage(self, end):
        if not self.tells:
            return b"data: [DONE]\n\n"
        made = self.made(end) * self.answers if self.told is None else self.told
        told = {"prompt_tokens": 5, "completion_tokens": made, "total_tokens": made + 5}
        return b"data: " + json.dumps({"id": "c", "choices": [], "usage": told}).encode() + b"\n\ndata: [DONE]\n\n"


@functools.cache
def deltas(name, text, choices, reason):
    return b"".join(event({"index": index, "delta": {name: text}, "finish_reason": reason}) for index in range(choices))


def event(choice):
    return b"data: " + json.dumps({"id": "c", "choices": [choice]}).encode() + b"\n\n"


class Reply:
    """What comes of a stream that its reader takes at once, but for pauses of theirs."""

    headers, status = {}, 200

    def __init__(self, world, shape, stalls=()):
        self.world, self.began = world, world.now_s
        self.events, self.stalls = shape.events(), list(stalls)

    def read_ready(self):
        return self.taken(self.world.now_s)

    async def read_some(self):
        if not self.events:
            return b""
        self.world.now_s = max(self.world.now_s, self.began + self.events[0][0])
        return self.taken(self.world.now_s)

    def taken(self, now_s):
        parts = []
        while self.events and self.began + self.events[0][0] <= now_s + 1e-9:
            parts.append(self.events.pop(0)[1])
        return b"".join(parts)

    def close(self):
        pass


class World:
    """One deployment, that makes no more than ``declared`` tokens a second of an answer, as its operator says."""

    def __init__(self, model=PLAIN, declared=100.0):
        self.now_s, self.declared, self.asked = 1000.0, declared, {}
        provider = OpenAI.Config(model=model, key_env=None)
        own = Deployment(name="d", provider=provider, output_speed=declared)
        group = Group(name="m", deployments=(own,), price=Price.of_dollars(0, 1))
        rules = DispatchRules(margin_s=MARGIN_S)
        self.dispatcher = Dispatcher([group], rules, http=object(), clock=lambda: self.now_s)
        [self.live] = self.dispatcher.lives()

    def begun(self, shape, stalls=()):
        self.now_s = math.ceil(self.now_s) + 10.0
        endpoint = "completions" if "prompt" in shape.body() else "chat"
        request = UpstreamRequest(endpoint, {**shape.body(), **self.asked}, prompt_tokens=5)
        plan, report = Plan(candidates=("m",), deadline=1e9), Report()
        ends = AttemptEnds(self.dispatcher, plan, request, report, self.now_s)
        attempt = Attempt(
            model="m",
            deployment="d",
            start_s=0.0,
            ticket=self.live.begin(self.now_s, 5),
            call=HttpCall("http://nowhere", {}, b"{}", is_sent=True),
            most=Usage(5, MOST, 0, True, tier=shape.tier),
        )
        run = SimpleNamespace(
            dispatcher=self.dispatcher,
            began=self.now_s,
            ends=ends,
            rules=self.dispatcher.rules,
            report=report,
            plan=plan,
        )
        return Opened(run, self.live, attempt, request, Reply(self, shape, stalls)), attempt, ends

    def whole(self, shape, stalls=()):
        """A whole stream, whose reader stalls for so long after each of its first blocks."""
        opened, attempt, _ = self.begun(shape, stalls)
        began = self.now_s
        done(opened.until_content())
        attempt.first_token_s = self.now_s - began
        self.live.heard(self.now_s)
        while not opened.is_done:
            if opened.reply.stalls:
                self.now_s += opened.reply.stalls.pop(0)
            opened.ready() or done(opened.next())
        opened.settle()
        return attempt.usage.completion

    def left(self, shape, after_s, stalls=()):
        """What somebody is charged who leaves a stream after so many seconds, and the bytes of it that came; see `whole`."""
        opened, attempt, ends = self.begun(shape)
        began = self.now_s
        reply = opened.reply
        reply.events = [(when, data) for when, data in reply.events if when <= after_s]
        if not any(b'content": "' in data for _, data in reply.events):
            self.now_s = began + after_s
            ends.lost(self.live, attempt, None)
            return attempt.usage.completion, 0
        done(opened.until_content())
        attempt.first_token_s = self.now_s - began
        self.live.heard(self.now_s)
        stalls = list(stalls)
        while reply.events and self.now_s < began + after_s:
            if stalls:
                self.now_s = min(self.now_s + stalls.pop(0), began + after_s)
            opened.ready() or (reply.events and done(opened.next()))
        self.now_s = began + after_s
        opened.drop()
        return attempt.usage.completion, opened.tally.text_bytes

    def unseen(self, answers, seconds):
        """The most that can be made in so many seconds, and what lies about it."""
        return math.ceil(self.declared * answers * (seconds + MARGIN_S)) + (FEW + 2) * answers


def done(work):
    """The result of what never waits."""
    try:
        work.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("it waits")


def plain(speed=100.0, seconds=3.0, **fields):
    return Shape((("wait", 0.3), ("write", seconds)), speed=speed, **fields)


def unseen(shape, after_s):
    """Seconds since something of its answer came, at the moment before the last: what came then may have been held back.

    And as many as it took until the first text: each may come as late.
    """
    came = [when for when, data in shape.events() if when <= after_s and b'content": "' in data]
    before = max((when for when in came if when < came[-1] - MOMENT_S - 1e-6), default=0.0)
    return after_s - before + (came[0] if came else 0.0)


THINKS = Shape((("wait", 0.2), ("think", 9.0)))


@pytest.mark.parametrize(
    "shape",
    [
        THINKS,
        Shape(THINKS.parts, n=8),
        Shape(THINKS.parts, n=2, best_of=8),
        Shape(THINKS.parts, n=2, best_of=2, prompts=3),
        Shape((("wait", 0.2), ("sum up", 4.0)), n=8),
        Shape((("wait", 0.2), ("write", 0.5), ("whole", 5.0)), n=3),
        plain(n=4, best_of=8, prompts=2),
        Shape((("think", 2.0), ("write", 0.5), ("think", 3.0))),
    ],
    ids=lambda shape: f"{shape.parts[-1][0]} {shape.n} {shape.best_of} {shape.prompts}",
)
@pytest.mark.parametrize("model", [PLAIN, UNKNOWN, "o3"])
def test_every_answer_and_every_thought_that_is_made_is_charged(shape, model):
    """S1 of R20: n answers were charged as one. One that is not said to think is asked to here."""
    world = World(model)
    world.asked = {"reasoning_effort": "low"} if model == PLAIN else {}
    charged, num_bytes = world.left(shape, 3.0)
    assert shape.made(3.0 + MARGIN_S) * shape.answers <= charged
    assert charged <= num_bytes * shape.answers // shape.shown + world.unseen(shape.answers, 3.0)


SLOW = Shape((("wait", 0.2), ("write", 0.05), ("wait", 1.2), ("write", 0.2)))
NEIGHBOURS = {
    # S2 of R20: one word, a search, and nineteen words.
    "pauses": [SLOW, Shape(SLOW.parts * 5), Shape((("write", 0.1), ("wait", 0.6)) * 9)],
    # F1 of R20: forty tokens in one event, and the end soon after; and likewise.
    "bursts": [
        Shape((("wait", 0.3), ("whole", 0.4), ("wait", 0.002))),
        plain(flush_s=2.0),
        plain(flush_s=1.0, reads=3),
    ],
    # S1 of R20b: much text for each token, and little; S2: the other way round, and a pause between.
    "ladder": [Shape((("write", 6.0, "=" * 100), ("write", 44.0, "=")))],
    "lean": [Shape((("write", 7.0, "="), ("wait", 20.0), ("write", 5.0, "=" * 50)))] * 3,
    # S3: what was held back, in two reads; what an upstream's cache gives at once; a wrong usage.
    "held": [Shape((("wait", 1.5), ("write", 6.0)), flush_s=1.5, reads=2)],
    "cache": [Shape((("wait", 0.6), ("give", 20.0)))],
    "wrong": [plain(told=10**6), plain(told=1), plain(told=0)],
    "several": [plain(n=8), plain(n=2, best_of=6), plain(prompts=5)],
    "thoughts": [Shape((("think", 20.0), ("write", 3.0))), Shape((("sum up", 20.0), ("write", 3.0)))],
}
LEFT = [
    (plain(seconds=30.0), 1.0),
    (plain(seconds=30.0, n=3), 2.0),
    (THINKS, 3.0),
    (Shape((("wait", 0.3), ("sum up", 9.0))), 4.0),
    (plain(tier="flex"), 2.0),
]


@pytest.mark.parametrize("neighbour", NEIGHBOURS)
@pytest.mark.parametrize("model", [PLAIN, "o3"])
def test_no_neighbour_changes_what_another_is_charged(neighbour, model):
    world, alone = World(model), World(model)
    for shape in NEIGHBOURS[neighbour]:
        world.whole(shape)
        world.left(shape, 0.7 * shape.seconds)
    # At the same time, so that fractions of seconds are the same.
    alone.now_s = world.now_s = 1e5
    assert [world.left(*one) for one in LEFT] == [alone.left(*one) for one in LEFT]


@pytest.mark.parametrize("every", [1.0, 2.0, 3.0, 5.0])
@pytest.mark.parametrize("reads", [1, 2])
@pytest.mark.parametrize("flushes", [1, 2, 4])
def test_what_comes_by_the_burst_is_charged_as_what_comes_evenly(every, reads, flushes):
    """F1 of R20b: up to 40 times what could be."""
    shape, after_s, world = plain(seconds=30.0, flush_s=every, reads=reads), every * flushes + 0.1, World()
    charged, num_bytes = world.left(shape, after_s)
    assert shape.made(after_s) <= charged <= num_bytes + world.unseen(1, unseen(shape, after_s))


@pytest.mark.parametrize(
    ("parts", "after_s"),
    [
        # A queue, and many words soon behind the first; a parameter that comes whole; a table, and a pause; two events of dense text.
        ((("wait", 5.0), ("write", 0.01), ("wait", 0.04), ("give", 1.2), ("wait", 99.0)), 8.0),
        ((("wait", 5.0), ("write", 0.01), ("whole", 4.0), ("wait", 99.0)), 20.0),
        ((("wait", 0.3), ("write", 3.0, TABLE), ("wait", 99.0)), 30.0),
        ((("wait", 0.3), ("write", 0.12, "=" * 64), ("wait", 99.0)), 10.0),
    ],
)
def test_what_a_plain_stream_showed_first_says_nothing_of_what_it_makes_later(parts, after_s):
    """F1 of R20b."""
    shape, world = Shape(parts), World()
    charged, num_bytes = world.left(shape, after_s)
    assert shape.made(after_s) <= charged <= num_bytes + world.unseen(1, unseen(shape, after_s))


def test_what_lies_behind_what_was_held_back_is_charged():
    """A proxy lets go each two seconds: a word, while a parameter is made that comes whole."""
    shape = Shape((("wait", 0.05), ("write", 0.04), ("whole", 4.0)), flush_s=2.0, reads=2)
    for after_s in (2.1, 3.9, 4.05):
        assert World().left(shape, after_s)[0] >= shape.made(after_s + MARGIN_S)


def test_what_a_cache_gives_is_charged_though_it_is_faster_than_is_declared():
    shape, world = Shape((("wait", 0.6), ("give", 20.0), ("wait", 9.0))), World()
    assert world.left(shape, 1.0)[0] >= 2000


def test_whole_streams_that_are_faster_than_is_declared_are_told_of():
    world = World()
    for shape in (plain(), plain(n=4), Shape((("wait", 9.0), ("give", 5.0))), plain(110.0)):
        world.whole(shape)
        assert world.live.state(world.now_s)["output_speed_exceeded"] == 0.0
    world.asked = {"prediction": {"content": "w" * 9999}}
    world.whole(plain(900.0))
    assert world.live.speed.exceeded(world.now_s) == 0.0
    world.asked = {}
    world.whole(plain(200.0, seconds=9.7))
    assert world.live.state(world.now_s)["output_speed_exceeded"] == pytest.approx(194, abs=1)


@pytest.mark.parametrize(("model", "made"), [(PLAIN, 1501), (UNKNOWN, 1501), ("o3", 1501)])
def test_a_whole_stream_that_tells_nothing_is_charged_its_text(model, made):
    shape, world = plain(told=0, tier="x"), World(model)
    assert world.whole(shape) == made + FEW


def test_one_that_may_have_thought_is_charged_its_time_where_it_tells_nothing():
    shape = Shape((("think", 20.0), ("write", 1.0)), told=0)
    assert World("o3").whole(shape) == 2100 + FEW
    assert World(PLAIN).whole(shape) == 501 + FEW


@pytest.mark.parametrize("text", [WORD, DIGIT])
@pytest.mark.parametrize("lag_s", [0.5, 1.0, 5.0])
@pytest.mark.parametrize("flush_s", [0.0, 2.0])
def test_what_is_shown_a_constant_time_after_it_was_made_is_charged(text, lag_s, flush_s):
    """S4 of R20c: 530 were charged of 1,067, and of digits a quarter."""
    shape = Shape((("write", 30.0, text),), lag_s=lag_s, flush_s=flush_s)
    for after_s in (lag_s + flush_s + 0.3, lag_s + flush_s + 7.9):
        charged, num_bytes = World().left(shape, after_s)
        assert shape.made(after_s + MARGIN_S) <= charged <= num_bytes + World().unseen(1, unseen(shape, after_s))


def test_nor_does_a_parameter_behind_what_was_shown_so_cost_less_than_it_is_billed():
    """What lets the first go at once, and holds the next; all of it comes later by a constant time."""
    shape, world = Shape((("wait", 0.01), ("write", 0.02), ("whole", 30.0)), at_once=1, lag_s=2.0), World()
    events = shape.events()
    [first, second] = [when for when, _ in events[:2]]
    object.__setattr__(shape, "events", lambda: [events[0], (second + 2.0, events[1][1]), *events[2:]])
    assert second - first < MOMENT_S
    after_s = second + 2.01
    assert world.left(shape, after_s)[0] >= shape.made(after_s + MARGIN_S)


@pytest.mark.parametrize("pings_s", [0.0, 2.8])
def test_no_comment_says_that_what_is_held_back_is_made_since(pings_s):
    """F1 of R20c: a word that came at 3 s, with a comment before it at 2.8 s, cost 106 of 320."""
    shape, world = Shape((("write", 0.01), ("whole", 9.0)), flush_s=3.0, pings_s=pings_s), World()
    charged, _ = world.left(shape, 3.2)
    assert charged >= shape.made(3.2 + MARGIN_S)


@pytest.mark.parametrize("pads", [0, 1])
@pytest.mark.parametrize("model", ["o3", UNKNOWN])
def test_a_whole_stream_that_does_not_tell_is_charged_to_its_end_however_much_comes_at_once(model, pads):
    """S3 of R20c: 810 of 2,020."""
    shape = Shape((("write", 0.01), ("think", 10.0), ("write", 0.01)), pads=pads, tells=False)
    assert World(model).whole(shape) >= shape.made(shape.seconds)


@pytest.mark.parametrize("reason", [None, ""])
def test_an_empty_reason_is_no_end(reason):
    """S1 of R20c: 29 of 1,849."""
    shape = Shape((("write", 0.5, DIGIT), ("think", 9.0)), reason=reason)
    assert World().left(shape, 4.0)[0] >= shape.made(4.0)


# Anything

TEXTS = st.sampled_from([WORD, CHINESE, DIGIT, TABLE])
SECONDS = st.sampled_from([0.03, 0.3, 0.8, 1.5, 4.0])
SHOWN = st.tuples(st.sampled_from(["wait", "write", "write", "whole", "give"]), SECONDS, TEXTS)
ANY = st.tuples(
    st.sampled_from(["wait", "think", "sum up", "aloud", "write", "write", "whole", "give"]), SECONDS, TEXTS
)
SLOWER = st.sampled_from([0.1, 0.6, 0.95, 1.0])
NUMBERS = st.sampled_from([1, 1, 1, 2, 5])
STALLS = st.lists(st.sampled_from([0.0, 0.0, 0.1, 2.0]), max_size=6)
DECLARED = st.sampled_from([20.0, 150.0])


@st.composite
def shapes(draw, declared, middles=ANY, numbers=NUMBERS):
    n = draw(numbers)
    return Shape(
        (
            ("wait", draw(st.sampled_from([0.05, 0.5, 3.0]))),
            *draw(st.lists(middles, min_size=1, max_size=6)),
            ("write", draw(st.sampled_from([0.1, 1.0, 3.0])), draw(TEXTS)),
        ),
        speed=declared * draw(SLOWER),
        at_once=draw(st.sampled_from([4, 30])),
        flush_s=draw(st.sampled_from([0.0, 0.0, 0.3, 2.0])),
        reads=draw(st.sampled_from([1, 2])),
        n=n,
        best_of=1 if n == 1 and numbers is not NUMBERS else draw(st.sampled_from([1, n, 8])),
        prompts=draw(st.sampled_from([1, 1, 2])) if numbers is NUMBERS else 1,
        tier=draw(st.sampled_from(["", "flex", "priority"])),
        lag_s=draw(st.sampled_from([0.0, 0.0, 0.4, 5.0])),
        pings_s=draw(st.sampled_from([0.0, 0.0, 0.15, 1.0])),
        pads=draw(st.sampled_from([0, 0, 0, 20])),
        reason=draw(st.sampled_from([None, None, ""])),
        tells=draw(st.sampled_from([True, True, False])),
    )


def gives(shape):
    """A cache of its upstream's has a part in it, which is no matter of time: that is charged once it is seen."""
    return any(what == "give" for what, *_ in shape.parts)


# Models that may think unseen, and those of which a part of what they make goes to tools of the provider.
HIDING = [
    (UNKNOWN, {}),
    ("o3", {}),
    (PLAIN, {"tools": [{"type": "function"}, {"type": "mcp"}]}),
    (PLAIN, {"mcp_servers": [{"type": "url"}]}),
]


def hidden(model, asked, declared):
    world = World(model, declared)
    world.asked = asked
    return world


@settings(max_examples=100, deadline=None)
@given(st.data(), DECLARED, st.sampled_from(HIDING))
def test_what_is_left_is_never_below_its_bill(data, declared, hiding):
    shape = data.draw(shapes(declared).filter(lambda one: not gives(one)))
    world, after_s = hidden(*hiding, declared), data.draw(st.floats(0.0, 1.0)) * shape.seconds
    charged, num_bytes = world.left(shape, after_s, data.draw(STALLS))
    assert charged >= shape.made(after_s + MARGIN_S) * shape.answers
    assert charged <= num_bytes * -(-shape.answers // shape.shown) + world.unseen(shape.answers, after_s)


@settings(max_examples=100, deadline=None)
@given(st.data(), DECLARED)
def test_nor_is_that_of_a_model_that_shows_what_it_makes(data, declared):
    shape = data.draw(shapes(declared, SHOWN, st.just(1)))
    world, after_s = World(PLAIN, declared), data.draw(st.floats(0.0, 1.0)) * shape.seconds
    charged, _ = world.left(shape, after_s, data.draw(STALLS))
    if not gives(shape):
        assert charged >= shape.made(after_s + MARGIN_S)
    elif not shape.flush_s and not shape.lag_s:
        assert charged >= shape.made(after_s)
    charged, num_bytes = world.left(shape, after_s)
    if not shape.pads:
        assert charged <= num_bytes + world.unseen(1, unseen(shape, after_s))


@settings(max_examples=60, deadline=None)
@given(st.data(), DECLARED, st.sampled_from(HIDING))
def test_nor_is_what_is_whole_and_does_not_tell(data, declared, hiding):
    shape = replace(data.draw(shapes(declared).filter(lambda one: not gives(one))), tells=False)
    charged = hidden(*hiding, declared).whole(shape, data.draw(STALLS))
    assert charged >= shape.made(shape.seconds) * shape.answers


@settings(max_examples=60, deadline=None)
@given(st.data(), DECLARED, st.sampled_from([PLAIN, UNKNOWN, "o3"]))
def test_whatever_streams_others_had_it_is_the_same(data, declared, model):
    world = World(model, declared)
    for shape, stalls, told in data.draw(st.lists(st.tuples(shapes(3 * declared), STALLS, st.booleans()), max_size=6)):
        world.whole(shape, stalls) if told else world.left(shape, 0.5 * shape.seconds, stalls)
    shape, stalls = data.draw(shapes(declared)), data.draw(STALLS)
    after_s = data.draw(st.floats(0.0, 1.0)) * shape.seconds
    alone = World(model, declared)
    # At the same time, so that fractions of seconds are the same.
    alone.now_s = world.now_s = 1e5
    assert world.left(shape, after_s, stalls) == alone.left(shape, after_s, stalls)
