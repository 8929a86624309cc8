"""The contract of programs is checked: one that keeps it passes, and each way to break it is named."""

import asyncio

import pytest

from anabranch.errors import InputError
from anabranch.routers.checks import made_pool
from anabranch.routers.contract.program import Done, Program, Said, Step
from anabranch.routers.contract.query import Query
from anabranch.routers.program_checks import MadeModels, check_program
from anabranch.routers.strategies.cascade import Cascade
from anabranch.testing import check_strategy

QUERY, POOL = Query(text="why?"), made_pool()


class Plain(Program):
    """The first of its models that answers."""

    def __init__(self):
        super().__init__(None)

    async def run(self, request, ask):
        for name in request.names[:2]:
            try:
                answer = await ask(request.arm(name), request.messages)
            except Exception as error:
                yield Step("failed", {"error": type(error).__name__})
            else:
                yield Done.of(answer)
                return
        raise InputError("nobody answers")


class Streaming(Plain):
    async def run(self, request, ask):
        async for piece in ask.stream(request.names[-1], request.messages):
            yield piece if isinstance(piece, Said) else Done(model=piece.model)


class Remembering(Plain):
    """Keeps what is of one request on itself."""

    async def run(self, request, ask):
        self.seen = []
        for name in request.names[:2]:
            self.seen.append(await ask(name, request.messages))
        yield Step("seen", {"count": len(self.seen)})
        yield Done.of(self.seen[0])


class Endless(Plain):
    async def run(self, request, ask):
        yield Done(message={"content": "yes"})
        yield Said("and more")


class Mute(Plain):
    async def run(self, request, ask):
        yield Step("thought", {})


class Changing(Plain):
    async def run(self, request, ask):
        yield Said("no")
        yield Done(message={"content": "yes"})


class Odd(Plain):
    async def run(self, request, ask):
        yield Step("odd", {"value": float("nan")})
        yield Done(message={"content": "yes"})


class Stranger(Plain):
    async def run(self, request, ask):
        yield Done(message={"content": "yes"}, model="a stranger")


class Wordy(Plain):
    async def run(self, request, ask):
        yield "yes"


class Fragile(Plain):
    async def run(self, request, ask):
        yield Done.of(await ask(request.names[0], request.messages))


@pytest.mark.parametrize("kind", [Plain, Streaming])
def test_programs_that_keep_it(kind):
    check_program(kind(), QUERY, POOL)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Remembering, "runs beside one another disturb each other"),
        (Endless, "goes on after its end"),
        (Mute, "ends without an answer"),
        (Changing, "ends with another answer"),
        (Odd, "step 'odd' are not ready for JSON"),
        (Stranger, "names 'a stranger'"),
        (Wordy, "yields str"),
        (Fragile, "fails as soon as small does"),
    ],
)
def test_programs_that_break_it(broken, message):
    with pytest.raises(AssertionError, match=message):
        check_program(broken(), QUERY, POOL)


def test_made_models_say_the_same_whole_and_in_pieces():
    async def main():
        models = MadeModels()
        whole = await models("small", "why?", n=2)
        pieces = [piece async for piece in models.stream("small", "why?")]
        return whole, pieces

    whole, (*pieces, last) = asyncio.run(main())
    assert whole.texts == ("small says yes",) * 2
    assert "".join(piece.text for piece in pieces) == last.text == "small says yes"


def test_every_check_of_a_strategy_runs_its_program(monkeypatch):
    """A cascade that kept drafts on itself, as AutoMix once kept votes."""

    async def run(self, request, ask):
        self.draft_now = await ask(request.names[0], request.messages)
        await asyncio.sleep(0)
        yield Done.of(self.draft_now)
        yield Said("more")

    monkeypatch.setattr(Cascade, "run", run)
    with pytest.raises(AssertionError, match="goes on after its end"):
        check_strategy(Cascade.Config(max_length=2))
