"""Answers of chats of any shape, wherever one is read that is not the gateway's: an answer comes of it, or an error of ours."""

import asyncio
import contextlib
import json
import math
import tempfile
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.adapters.glider.endpoint import ChatWriter, EndpointEmbedder
from anabranch.errors import AnabranchError, BackendError, DataError
from anabranch.routers.contract.ask import Answered, Arm
from anabranch.routers.contract.choices import wrong_choices
from anabranch.routers.contract.program import Done
from anabranch.routers.router_r1.asked_pool import AskPool, Member
from anabranch.routers.router_r1.environment import Price
from anabranch.routers.scale import ClientAsk, Constant, Given, SelectiveReasoner
from anabranch.routers.scale.assess import Entropy
from anabranch.routers.scale.journal import Journal
from anabranch.routers.scale.records import Tokens
from anabranch.routers.scale.traces import Question, solve_all
from anabranch.routers.strategies.logprob import measured

TOKEN = {"token": "f", "logprob": -0.5, "bytes": [102], "top_logprobs": [{"token": "f", "logprob": -0.5}]}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
MESSAGE = {"role": "assistant", "content": r"\boxed{4}", "refusal": None, "tool_calls": [CALL]}
WHOLE = {
    "id": "x",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "message": MESSAGE, "finish_reason": "stop", "logprobs": {"content": [TOKEN]}}],
    "usage": {"prompt_tokens": 10, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}},
}
VECTORS = {"data": [{"index": 0, "embedding": [0.5, 1.0]}, {"index": 1, "embedding": [2.0, 0.0]}]}
# Numbers that need not be finite are JSON to Python. Each draw makes its own, which others do not change.
ODD = st.sampled_from(
    [
        "null",
        "true",
        "false",
        "0",
        "-1",
        "5",
        "1" + "0" * 400,
        "0.5",
        "1e300",
        "NaN",
        "Infinity",
        '""',
        '"x"',
        '"\\ud800"',
        '"\\u0000"',
        '"<think>"',
        f'"{"9" * 5000}"',
        "[]",
        "[null]",
        '["x"]',
        "[[]]",
        "[{}]",
        "{}",
        '{"x": null}',
        '{"content": null}',
        '{"message": null}',
        '{"content": [{"type": "text", "text": "hi"}]}',
        "[" * 500 + "]" * 500,
    ]
).map(json.loads)


def places(value, path=()):
    """Paths of all that stands in a body, itself first."""
    yield path
    if len(path) == 9:
        return
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, one in inner:
        yield from places(one, (*path, name))


@st.composite
def mutated(draw, whole):
    """A body with one to three of its parts taken away, or put in the place of something else."""
    body = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from(list(places(body)) or [()])) or [None]
        if last is None:
            body = draw(ODD)
            continue
        holder = body
        for name in path:
            holder = holder[name]
        if draw(st.booleans()):
            holder[last] = draw(ODD)
        else:
            del holder[last]
    return body


def client(*bodies):
    """An OpenAI client that gives these bodies, the last for ever."""
    coming = list(bodies)

    async def create(**_):
        return coming.pop(0) if len(coming) > 1 else coming[0]

    return SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))


def reasoner(**parts):
    parts = {"assessor": Constant.Config(difficulty=0.9).build()} | parts
    decomposer = Given.Config(steps=("Find it.", "Add one.")).build()
    return SelectiveReasoner(system1="small", system2="large", decomposer=decomposer, **parts)


@given(body=mutated(WHOLE), then=mutated(WHOLE))
def test_a_run_of_scale_ends_and_goes_on_at_an_endpoint_that_is_well(body, then):
    with tempfile.TemporaryDirectory() as folder:
        for assessor in (Constant.Config(difficulty=0.9).build(), Entropy.Config().build()):
            journals = Path(folder) / type(assessor).__name__
            journals.mkdir()
            for bodies in ((body, then), (WHOLE,), (WHOLE,)):
                [found] = asyncio.run(
                    solve_all(
                        reasoner(assessor=assessor),
                        [Question("2 + 2?", ("4",))],
                        lambda bodies=bodies: ClientAsk(client(*bodies)),
                        journals=journals,
                    )
                )
                assert (found.trace is None) == bool(found.error)
            # What a model answered without words is an answer, and is kept.
            assert not found.error or "neither system gave an answer to the last step" in found.error


@given(body=mutated(WHOLE))
def test_an_answer_of_a_client_can_be_read_in_every_way(body):
    ask = ClientAsk(client(body))
    if wrong_choices(body.get("choices") if isinstance(body, dict) else None):
        with pytest.raises(BackendError, match="gave an answer whose "):
            asyncio.run(ask("m", "x"))
    else:
        read(asyncio.run(ask("m", "x")))


@given(choices=st.lists(mutated(WHOLE["choices"][0]).filter(lambda one: isinstance(one, dict)), min_size=1, max_size=2))
def test_an_answer_of_anybody_can_be_read_in_every_way(choices):
    """An ask of somebody's own need not have looked."""
    read(Answered(model="m", choices=tuple(choices)))


def read(found):
    """As strategies and programs do."""
    assert all(isinstance(text, str) for text in found.texts)
    for at in range(len(found.choices)):
        for measure in ("logprob", "entropy", "quantile"):
            assert isinstance(measured(found.logprobs(at), measure), float)
        json.dumps(Done.of(found, at).message, allow_nan=False)


@given(body=mutated(WHOLE))
def test_a_pool_that_an_agent_learns_with_has_a_reply_or_an_error(body):
    pool = AskPool({"small": Member(ClientAsk(client(body)), Arm("m"), Price(completion=1, prompt=1))})
    try:
        assert isinstance(pool.reply("small", "2 + 2?").text, str)
    except AnabranchError:
        # It is asked the same once more, and still there.
        with pytest.raises(AnabranchError):
            pool.reply("small", "2 + 2?")
    finally:
        pool.close()


@given(body=mutated(WHOLE).filter(lambda body: isinstance(body, dict)))
def test_a_writer_of_instructions_writes_text_or_says_that_there_is_none(body):
    writer = ChatWriter("http://127.0.0.1:9/v1", "m")
    writer.post = lambda path, asked: body
    with contextlib.suppress(DataError):
        assert writer("2 + 2?").strip()


@given(body=mutated(VECTORS).filter(lambda body: isinstance(body, dict)))
def test_vectors_of_an_endpoint_are_numbers_or_an_error(body):
    embedder = EndpointEmbedder("http://127.0.0.1:9/v1", "m")
    embedder.post = lambda path, asked: body
    try:
        found = embedder.embed(["a", "b"])
    except DataError:
        return
    assert found.shape[0] == 2
    assert np.isfinite(found).all()


# What a journal has of earlier versions


def test_an_answer_that_is_none_is_not_kept_and_ends_its_run_alone(tmp_path):
    """It was noted before it was read: the folder never went on, at whatever endpoint."""
    questions = [Question("2 + 2?", ("4",)), Question("3 + 1?", ("4",))]
    asked = [client({**WHOLE, "choices": [{"message": None}]}), client(WHOLE)]
    runs = asyncio.run(solve_all(reasoner(), questions, lambda: ClientAsk(asked.pop(0)), at_once=1, journals=tmp_path))
    assert "gave an answer whose message is no object" in runs[0].error
    assert runs[1].is_right
    asked = [client(WHOLE), client(WHOLE)]
    runs = asyncio.run(solve_all(reasoner(), questions, lambda: ClientAsk(asked.pop()), journals=tmp_path))
    assert [one.is_right for one in runs] == [True, True]


class Careless:
    """An ask of somebody's own that gives whatever came."""

    left = math.inf

    async def __call__(self, arm, messages, **how):
        return Answered(model="m", choices=({"message": None},), prompt_tokens=7)


def test_an_ask_of_anybody_fills_no_journal_with_what_is_none(tmp_path):
    path = tmp_path / "run.jsonl"
    with pytest.raises(BackendError, match="message is no object"):
        asyncio.run(reasoner().solve("2 + 2?", Careless(), journal=path))
    assert asyncio.run(reasoner().solve("2 + 2?", ClientAsk(client(WHOLE)), journal=path)).is_whole


@pytest.mark.parametrize("choices", [[{"message": None}], [], None, 5, "x", {}, [None], [{}]])
def test_a_journal_that_has_an_answer_that_is_none_goes_on_and_says_so(tmp_path, choices):
    path = tmp_path / "run.jsonl"
    asyncio.run(reasoner().solve("2 + 2?", ClientAsk(client(WHOLE)), journal=path))
    first, *lines = path.read_text().splitlines()
    bad = json.loads(lines[0])
    bad["answer"] |= {"choices": choices, "cost": 0.25}
    # A run of then counted it among those that came.
    path.write_text("\n".join([first, json.dumps(bad), json.dumps({"lost": [1, 2, 0.5, 1]}), *lines[1:], ""]))
    calls = []

    async def create(**body):
        calls.append(body)
        return WHOLE

    told = SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))
    for asked in (1, 1, 1):
        trace = asyncio.run(reasoner().solve("2 + 2?", ClientAsk(told), journal=path))
        assert (len(calls), trace.is_whole, trace.is_degraded) == (asked, True, False)
        assert trace.notes == ("journal: answers that are none were dropped (1)",)
        # Paid once, however often it is read.
        assert trace.lost == Tokens(11, 5, 0.75, 2)


def test_of_an_answer_that_is_none_a_later_one_at_its_place_is_kept(tmp_path):
    path = tmp_path / "run.jsonl"
    with Journal(path, "run") as journal:
        journal.note("solve/0/0/1", "d", Answered.saying("four"))
    first, line = path.read_text().splitlines()
    bad = json.loads(line)
    bad["answer"]["choices"] = [{"message": None}]
    path.write_text("\n".join([first, json.dumps(bad), line, ""]))
    for _ in range(2):
        with Journal(path, "run") as journal:
            assert journal.find("solve/0/0/1", "d").text == "four"
            assert (journal.dropped, journal.lost.calls) == (1, 1)


# What nobody reads, and what need be no dict


@pytest.mark.parametrize(
    "unread", [{"index": None}, {"index": 0.0}, {"index": "x"}, {"logprobs": []}, {"logprobs": "x"}, {"own": {1}}]
)
def test_what_nobody_reads_refuses_no_answer(unread):
    choice = {**WHOLE["choices"][0], **unread}
    assert wrong_choices([choice]) == ""
    read(Answered(model="m", choices=(choice,)))


@pytest.mark.parametrize("unread", [{"index": None}, {"index": 0.0}, {"logprobs": []}])
def test_a_journal_keeps_answers_whatever_stands_where_nobody_reads(tmp_path, unread):
    """A whole run of an earlier version was dropped, paid again, and never went on."""
    path = tmp_path / "run.jsonl"
    body = {**WHOLE, "choices": [{**WHOLE["choices"][0], **unread}]}
    first = asyncio.run(reasoner().solve("2 + 2?", ClientAsk(client(body)), journal=path))

    async def never(**_):
        raise AssertionError("all of it is there")

    nobody = SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=never)))
    again = asyncio.run(reasoner().solve("2 + 2?", ClientAsk(nobody), journal=path))
    assert first.is_whole
    assert again.is_whole
    assert again.answer == first.answer


def mapping(value):
    """The same of Mappings that are no dicts, all through."""
    if isinstance(value, dict):
        return MappingProxyType({name: mapping(one) for name, one in value.items()})
    return [mapping(one) for one in value] if isinstance(value, list) else value


def test_an_ask_of_anybody_may_answer_in_mappings(tmp_path):
    """As `Answered.choices` says, in what a journal keeps too."""

    class Own:
        left, calls = math.inf, 0

        async def __call__(self, arm, messages, **how):
            type(self).calls += 1
            return Answered(model="m", choices=(mapping(WHOLE["choices"][0]),), prompt_tokens=7)

    read(Answered(model="m", choices=(mapping(WHOLE["choices"][0]),)))
    counts = []
    for _ in range(2):
        assert asyncio.run(reasoner().solve("2 + 2?", Own(), journal=tmp_path / "run.jsonl")).is_whole
        counts.append(Own.calls)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    ("choice", "what"),
    [({"index": None}, "index is no number"), ({"logprobs": []}, "logprobs are no object")],
)
def test_what_goes_out_to_clients_is_as_they_know_it(choice, what):
    choice = {**WHOLE["choices"][0], **choice}
    assert wrong_choices([choice], is_passed_on=True) == what
    assert wrong_choices([mapping(WHOLE["choices"][0])], is_passed_on=True) == "choices are no objects"
    assert wrong_choices(WHOLE["choices"], is_passed_on=True) == ""
