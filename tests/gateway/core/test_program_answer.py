"""Where a program answers: what it is given, how long it has, and when a model is asked in its place."""

import pytest

from anabranch.errors import LimitError
from anabranch.gateway.core import choice
from anabranch.gateway.core.program_answer import ask_program
from anabranch.gateway.core.program_run import ProgramRun
from anabranch.gateway.providers.provider import Answer
from anabranch.routers.contract.program import Done, Program
from anabranch.routers.contract.query import Candidate, Decision
from anabranch.web.api_error import ApiError
from gateway_states import begun, config, model, run, services, state_of


class Says(Program):
    """Says what it is given to say."""

    def __init__(self, work, beside=()):
        super().__init__(None)
        self.work, self.requests, self.beside = work, [], beside

    def route(self, query, pool):
        return Decision(candidates=(Candidate(model="small", score=0),), strategy="says", reason="", beside=self.beside)

    async def run(self, request, ask):
        self.requests.append(request)
        async for event in self.work(request, ask):
            yield event


async def says_yes(request, ask):
    yield Done(message={"content": "yes"}, model="small")


async def fails(request, ask):
    raise ValueError("a secret of the sender's")
    yield


async def decided(work, body=None, *, of=None, beside=(), **fields):
    from anabranch.gateway.runtime import Runtime

    state = state_of({"model": "auto/cheapest", **(body or {})}, lent=services()[0], of=of, **fields)
    program = Says(work, beside)
    state.runtime = Runtime(of or config(), strategies={"cheapest": program})
    begun(state)
    await choice.decide(state)
    return state, program


def test_a_program_s_answer_is_whole_or_a_stream_past_its_first_piece():
    async def work():
        state, program = await decided(says_yes, {"temperature": 0.5, "user": "ann", "store": False})
        answer = await ask_program(state)
        assert isinstance(answer, Answer)
        assert (answer.text, state.program.report, state.report.model) == ("yes", state.report, "small")
        [request] = program.requests
        assert (dict(request.settings), request.is_streamed) == ({"temperature": 0.5, "user": "ann"}, False)
        assert state.calls.purpose == "draft"
        state, program = await decided(says_yes, {"stream": True})
        running = await ask_program(state)
        assert isinstance(running, ProgramRun)
        assert program.requests[0].is_streamed
        await running.aclose()

    run(work)


def test_a_model_answers_where_there_is_no_program_or_it_failed_before_it_said_anything():
    async def work():
        state, _ = await decided(says_yes, {"model": "small"})
        assert await ask_program(state) is None
        state, program = await decided(fails)
        assert await ask_program(state) is None
        assert state.decided.bypassed == "ValueError in the program"
        assert state.program is None
        # It was passed over, and is not asked again.
        assert await ask_program(state) is None
        assert len(program.requests) == 1

    run(work)


@pytest.mark.parametrize(
    ("error", "does_last"),
    [(LimitError("the config's"), True), (LimitError("slow", retry_after_s=1.0), False), (ValueError(), False)],
)
def test_it_is_known_whether_it_fails_of_what_lasts(error, does_last):
    async def raises(request, ask):
        raise error
        yield

    async def work():
        state, _ = await decided(raises)
        assert await ask_program(state) is None
        return bool(state.decided.bypassed), state.decided.lasts

    assert run(work) == (True, does_last)


@pytest.mark.parametrize(("body", "endpoint"), [({"n": 2}, "chat"), ({"prompt": "x"}, "completions")])
def test_a_program_answers_chats_with_one_choice(body, endpoint):
    async def work():
        state, _ = await decided(says_yes, body, endpoint=endpoint)
        await ask_program(state)

    with pytest.raises(ApiError, match="is a program"):
        run(work)


@pytest.mark.parametrize(
    ("small_s", "large_s", "beside", "most_s"),
    [
        (900.0, None, (), 900.0),
        # One that it asks and that is no candidate: rounds of a slow router were cut off.
        (None, 900.0, ("large",), 900.0),
        (None, 900.0, (), 60.0),
        (300.0, 2.0, ("large",), 300.0),
    ],
)
def test_a_program_has_the_time_of_the_slowest_model_that_it_may_ask(small_s, large_s, beside, most_s):
    of = config(model("small", deadline_s=small_s), model("large", deadline_s=large_s), deadline_s=60.0)

    async def work():
        state, _ = await decided(says_yes, of=of, beside=beside)
        await ask_program(state)
        return state.calls.deadline_s, state.calls.limit_s

    assert run(work) == (most_s, most_s)
