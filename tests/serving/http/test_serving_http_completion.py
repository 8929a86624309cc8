"""Choices of one request on their way to one reader: one change of each waits, the others wait in the engine's client."""

import asyncio

import pytest

from anabranch.data.tokenizer import ByteTokenizer
from anabranch.errors import InputError
from anabranch.serving.core.client import BusyError
from anabranch.serving.core.request import Finish, Output, Request, Sampling, TokenLogprob
from anabranch.serving.http.answer_text import AnswerText
from anabranch.serving.http.choice import Choice
from anabranch.serving.http.completion import Completion
from anabranch.serving.http.reading import Reader
from anabranch.serving.http.scores import PromptScores
from anabranch.web.api_error import ApiError
from paced_time import run_paced
from waiting import until_async

READER = Reader(ByteTokenizer())


class Ticket:
    def __init__(self):
        self.log = []

    def started(self):
        self.log.append("started")

    def prepared(self, is_prepared):
        if is_prepared is not None:
            self.log.append(is_prepared)

    def close(self):
        self.log.append("closed")


class Engine:
    """Tells the bytes of each request's text, one by one, then ends it; ``error`` comes instead of the end of the last."""

    def __init__(self, *texts, error=None, waits=False):
        self.texts, self.error, self.waits = texts, error, waits
        self.told, self.closed = [0] * len(texts), []

    async def submit(self, request):
        at = int(request.id)
        try:
            for byte in self.texts[at].encode():
                self.told[at] += 1
                yield Output(id=request.id, tokens=(byte,))
            if self.waits:
                await asyncio.Event().wait()
            if self.error is not None and at == len(self.texts) - 1:
                raise self.error
            yield Output(id=request.id, finish=Finish.LENGTH)
        finally:
            self.closed.append(at)


def completion_of(engine, *, param=None, choices=None):
    count = len(engine.texts)
    choices = choices or [Choice(at, Request(id=str(at), prompt=(1,)), AnswerText(READER, ())) for at in range(count)]
    tickets = [Ticket() for _ in choices]
    return Completion(engine.submit, choices, tickets, param), tickets


async def read(completion):
    texts = [""] * len(completion.choices)
    async with completion:
        while (taken := await completion.take()) is not None:
            for change in taken:
                texts[change.index] += change.text
    return texts


def test_every_choice_is_told_to_its_end_and_gives_its_place_back():
    engine = Engine("one", "and two", "x")
    completion, tickets = completion_of(engine)
    assert run_paced(read(completion)) == ["one", "and two", "x"]
    assert [choice.finish for choice in completion.choices] == [Finish.LENGTH] * 3
    assert all(ticket.log[0] == "started" and ticket.log[-1] == "closed" for ticket in tickets)
    assert sorted(engine.closed) == [0, 1, 2]


@pytest.mark.parametrize("is_joined", [False, True])
def test_what_is_made_ready_for_a_choice_is_told_to_its_place_and_is_no_news(is_joined):
    class Preparing(Engine):
        async def submit(self, request):
            yield Output(id=request.id, is_prepared=False)
            if not is_joined:
                yield Output(id=request.id, is_prepared=True)
            yield Output(id=request.id, tokens=(65,), is_prepared=True if is_joined else None)
            yield Output(id=request.id, finish=Finish.LENGTH)

    completion, [ticket] = completion_of(Preparing("A"))
    assert run_paced(read(completion)) == ["A"]
    assert ticket.log[:3] == [False, True, "started"]


def test_of_a_choice_that_nobody_reads_one_change_waits_and_no_more_are_asked_for():
    engine = Engine("a long text", "another")

    async def run():
        completion, _ = completion_of(engine)
        async with completion:
            await until_async(lambda: engine.told == [1, 1])
            await asyncio.sleep(0.02)
            assert engine.told == [1, 1]
            assert [change.text for change in await completion.take()] == ["a", "a"]
            await until_async(lambda: engine.told == [2, 2])
            await asyncio.sleep(0.02)
            assert engine.told == [2, 2]

    run_paced(run())
    assert sorted(engine.closed) == [0, 1]


def test_nothing_in_time_is_nothing_and_what_is_left_is_aborted():
    engine = Engine("", waits=True)

    async def run():
        completion, tickets = completion_of(engine)
        async with completion:
            assert await completion.take(0.01) == []
        return tickets

    [ticket] = run_paced(run())
    assert engine.closed == [0]
    assert ticket.log == ["closed"]


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (InputError("too long"), 400, "invalid_value"),
        (BusyError("no room"), 503, "busy"),
        (ApiError(500, "engine_failed", "it failed"), 500, "engine_failed"),
    ],
)
def test_one_that_fails_fails_all_and_says_which_field_it_was(error, status, code):
    completion, _ = completion_of(Engine("", "b", error=error), param="tools")
    with pytest.raises(ApiError) as raised:
        run_paced(read(completion))
    assert (raised.value.status, raised.value.code) == (status, code)
    assert raised.value.param == (None if status == 500 else "tools")


def test_an_engine_that_ends_without_a_reason_has_failed():
    class Mute(Engine):
        async def submit(self, request):
            return
            yield

    completion, _ = completion_of(Mute("a"))
    with pytest.raises(ApiError, match="ended a request without a reason"):
        run_paced(read(completion))


def test_what_is_told_from_outside_comes_after_what_is_held():
    async def run():
        completion, _ = completion_of(Engine("ab", waits=True))
        async with completion:
            await asyncio.sleep(0.01)
            completion.fail(ApiError(503, "shutting_down", "stopped"))
            assert [change.text for change in await completion.take()] == ["a"]
            await asyncio.sleep(0.01)
            with pytest.raises(ApiError, match="stopped"):
                await completion.take()

    run_paced(run())


def test_choices_wait_for_the_scores_that_the_first_brings():
    scores, row = PromptScores(3), TokenLogprob(token=1, logprob=-1.0)
    first = Request(id="0", prompt=(1, 2, 3), sampling=Sampling(prompt_logprobs=0))
    second = Request(id="1", prompt=(1, 2, 3))
    choices = [Choice(at, request, AnswerText(READER, ()), scores) for at, request in enumerate((first, second))]
    gate = asyncio.Event()

    class Scoring(Engine):
        async def submit(self, request):
            if request.id == "0":
                yield Output(id="0", prompt_logprobs=(row,))
                await gate.wait()
                yield Output(id="0", prompt_logprobs=(row,))
            yield Output(id=request.id, tokens=(65,), finish=Finish.LENGTH)

    async def run():
        completion, _ = completion_of(Scoring("", ""), choices=choices)
        async with completion:
            assert await completion.take(0.02) == []
            gate.set()
            texts = {}
            while (taken := await completion.take()) is not None:
                texts |= {change.index: texts.get(change.index, "") + change.text for change in taken}
        return texts

    assert run_paced(run()) == {0: "A", 1: "A"}
    assert scores.rows == [row, row]
