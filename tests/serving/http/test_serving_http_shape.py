"""No answer holds up the loop while it is made, however its values are spread over choices, prompts, tokens and changes."""

import asyncio
import types
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.data import ByteTokenizer
from anabranch.serving.core.client import EngineInfo
from anabranch.serving.core.request import Finish, TokenLogprob
from anabranch.serving.http.choice import ChoiceDelta, TokenText
from anabranch.serving.http.generate import Generate
from anabranch.serving.http.generation_request import GenerationRequest
from anabranch.serving.http.reading import Reader
from anabranch.serving.http.shape import MOST_APART, MOST_AT_ONCE, ChatShape, CompletionShape
from anabranch.web.json_text import Rows, to_json
from anabranch.web.large_json import SLICE, is_light, json_slices
from anabranch.web.slices import sliced
from anabranch.web.turns import Turns

INFO = EngineInfo(
    model="m", vocab_size=257, max_positions=4096, block_tokens=16, num_blocks=256, routed_layers={1: 4}, num_layers=2
)
# A slice tells what weighs two slices at most, and one choice, or change, whose values are few is made at once.
MOST_TOLD = 2 * SLICE // 64 + 2 * MOST_AT_ONCE


class Counting(Reader):
    """A reader that counts the tokens it tells."""

    def __init__(self):
        super().__init__(ByteTokenizer())
        self.told = 0

    def token_name(self, token):
        self.told += 1
        return super().token_name(token)

    def token_text(self, token):
        self.told += 1
        return super().token_text(token)


class Asked:
    """A request for so many choices, of prompts of ``length`` tokens, that get ``num_new`` each.

    Attributes:
        reader: counts.
        kind: of the request.
    """

    def __init__(self, kind, *, num_choices, length, num_new, logprobs, is_routing=False):
        self.reader, self.kind, self.num_new = Counting(), kind, num_new
        self.is_routing, self.logprobs = is_routing, logprobs
        prompts = ((65,) * length,) * num_choices
        is_echo = kind is CompletionShape
        self.request = GenerationRequest(
            kind="chat" if kind is ChatShape else "completions",
            model="m",
            prompts=prompts,
            texts=("A" * length,) * num_choices,
            logprobs=logprobs,
            is_echo=is_echo,
            is_routing=is_routing,
        )
        self.row = (
            None
            if logprobs is None
            else TokenLogprob(token=65, logprob=-1.0, top=tuple((66 + at, -2.0) for at in range(logprobs)))
        )
        scores = types.SimpleNamespace(rows=[self.row] * (length - 1)) if is_echo and logprobs is not None else None
        self.choices = [
            types.SimpleNamespace(
                rewire_state=None,
                scores=scores,
                prompt_tokens=length,
                completion_tokens=num_new,
                cached_tokens=0,
                reasoning_tokens=0,
                experts={},
                adapters={},
                explained={},
                recorded=0,
                layers_run=0,
            )
            for _ in range(num_choices)
        ]

    def shape(self):
        made = self.kind(self.request, self.choices, self.reader, INFO)
        made._head |= {"id": "x", "created": 1}
        self.reader.told = 0
        return made

    def changes(self):
        """The whole answer of each choice at once."""
        route = {1: (0, 2)} if self.is_routing else None
        keeps = self.is_routing or self.logprobs is not None
        tokens = [TokenText(65, at, at + 1, self.row, route) for at in range(self.num_new)] if keeps else []
        return [ChoiceDelta(at, "A" * self.num_new, tokens, Finish.LENGTH) for at in range(len(self.choices))]

    def most_told(self, slices):
        """The slices together, and the most tokens that one of them tells."""
        parts, most = [], 0
        slices = iter(slices)
        while True:
            self.reader.told = 0
            part = next(slices, None)
            most = max(most, self.reader.told)
            if part is None:
                return b"".join(parts), most
            parts.append(part)


def asked():
    return st.builds(
        Asked,
        st.sampled_from([ChatShape, CompletionShape]),
        num_choices=st.integers(1, 12),
        length=st.integers(1, 120),
        num_new=st.integers(0, 120),
        logprobs=st.sampled_from([None, 0, 1, 5]),
        is_routing=st.booleans(),
    )


MANY_PROMPTS = {"num_choices": 12, "length": 160, "num_new": 1, "logprobs": 5}
MANY_CHOICES = {"num_choices": 12, "length": 1, "num_new": 160, "logprobs": 5}
MANY_ROUTES = {"num_choices": 12, "length": 1, "num_new": 160, "logprobs": None, "is_routing": True}


def check_whole(one):
    shape = one.shape()
    for change in one.changes():
        shape.take(change)
    told = shape.whole()
    assert one.reader.told <= MOST_TOLD
    if is_light(told):
        return 0
    raw, most = one.most_told(json_slices(told))
    assert most <= MOST_TOLD
    assert raw == to_json(told)
    return most


def check_stream(one):
    shape, changes = one.shape(), one.changes()
    if shape.is_long(changes):
        raw, most = one.most_told(shape.long_events(changes))
        assert most <= MOST_TOLD
    else:
        raw = b"".join(map(shape.events, changes))
        assert one.reader.told <= MOST_TOLD
    again = one.shape()
    assert raw == b"".join(map(again.events, changes))


@settings(max_examples=4, deadline=None)
@given(asked())
def test_no_answer_is_told_in_one_go_beyond_what_takes_no_time(one):
    check_whole(one)
    check_stream(one)


@pytest.mark.parametrize(
    ("kind", "fields"), [(CompletionShape, MANY_PROMPTS), (ChatShape, MANY_CHOICES), (ChatShape, MANY_ROUTES)]
)
def test_many_choices_that_are_each_short_are_long_together(kind, fields):
    """They were told in one go, for each was looked at alone: 128 prompts of 160 tokens held everybody up for a tenth of a second."""
    one = Asked(kind, **fields)
    check_whole(one)
    check_stream(one)
    shape = one.shape()
    assert shape.is_long(one.changes())
    for change in one.changes():
        assert not shape.is_long([change])
        shape.take(change)
    assert isinstance(shape.whole()["choices"], Rows)


def test_a_stream_tells_many_short_changes_that_came_together_in_turns():
    one, most = Asked(CompletionShape, **MANY_PROMPTS), []
    coming, turns = [one.changes(), None], Turns()

    async def take(timeout_s):
        return coming.pop(0)

    frontend = types.SimpleNamespace(metrics=None, config=types.SimpleNamespace(keep_alive_s=1.0))
    context = types.SimpleNamespace(
        sliced=lambda slices: sliced(turns, "", slices), begin_reading=lambda: None, close=lambda: None
    )

    async def main():
        blocks = []
        events = Generate(frontend)._events(context, one.shape(), types.SimpleNamespace(take=take), None)
        async for block in events:
            blocks.append(block)
            most.append(one.reader.told)
            one.reader.told = 0
        return b"".join(blocks)

    # What has been told of prompts is let go of.
    raw, again = asyncio.run(main()), Asked(CompletionShape, **MANY_PROMPTS).shape()
    assert max(most) <= MOST_TOLD
    assert not any(choice.scores for choice in one.choices)
    assert raw == b"".join(map(again.events, one.changes()))


def test_long_texts_are_long():
    one = Asked(ChatShape, num_choices=2, length=1, num_new=1_000_000, logprobs=None)
    assert one.shape().is_long(one.changes())
    check_stream(one)


def test_a_short_answer_is_a_list_that_is_told_at_once():
    one = Asked(CompletionShape, num_choices=3, length=9, num_new=3, logprobs=2)
    shape = one.shape()
    assert not shape.is_long(one.changes())
    for change in one.changes():
        shape.take(change)
    assert is_light(shape.whole())


@pytest.mark.parametrize("kind", [ChatShape, CompletionShape])
def test_states_of_turned_routers_are_told_and_counted_where_choices_end(kind):
    one = Asked(kind, num_choices=2, length=1, num_new=1, logprobs=None)
    for choice in one.choices:
        choice.rewire_state = {"delta": [[0.5] * (MOST_AT_ONCE // 4)] * 3}
    shape, ends = one.shape(), one.changes()
    goes_on = [replace(change, finish=None) for change in ends]
    assert [shape.is_long(changes) for changes in (ends, ends[:1], goes_on, [ends[0], goes_on[1]])] == [
        True,
        False,
        False,
        False,
    ]
    assert [b"rewire_state" in shape.events(change) for change in (ends[0], goes_on[0])] == [True, False]
    check_stream(one)
    check_whole(one)


@pytest.mark.parametrize("kind", [ChatShape, CompletionShape])
@pytest.mark.parametrize("logprobs", [None, 1])
def test_what_comes_token_by_token_is_kept_together_and_told_the_same(kind, logprobs):
    """Each token's change took half a kilobyte, a hundred times its text."""
    one = Asked(kind, num_choices=2, length=3, num_new=3 * MOST_APART, logprobs=logprobs)
    at_once, apart = one.shape(), one.shape()
    for change in one.changes():
        at_once.take(change)
        size = len(change.text)
        for at in range(size):
            finish = change.finish if at == size - 1 else None
            apart.take(ChoiceDelta(change.index, change.text[at], change.tokens[at : at + 1], finish))
    assert all(len(taken) <= MOST_APART for taken in apart._taken)
    assert all(len(parts) <= MOST_APART for parts in getattr(apart, "_parts", ()))
    assert to_json(apart.whole()) == to_json(at_once.whole())
