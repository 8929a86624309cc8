"""The contract of providers: ours keep it, and each way of breaking it is found."""

import json
from dataclasses import replace

import pytest

from anabranch.gateway.providers.anthropic import Anthropic
from anabranch.gateway.providers.engine import Engine
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.providers.openai import OpenAI
from anabranch.gateway.providers.provider import Failure, HttpCall, hidden
from anabranch.gateway.providers.recorded import Replay
from anabranch.testing import check_provider

SECRET = "sk-test-0123456789abcdef"
ANSWER = json.dumps(
    {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
    }
).encode()
MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude",
    "content": [{"type": "text", "text": "hi"}],
    "stop_reason": "end_turn",
    "usage": {"input_tokens": 3, "output_tokens": 1},
}
EVENTS = (
    {"type": "message_start", "message": {**MESSAGE, "content": []}},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hi"}},
    {"type": "content_block_stop", "index": 0},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 1}},
    {"type": "message_stop"},
)


@pytest.fixture(autouse=True)
def key(monkeypatch):
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.setenv(name, SECRET)


def test_ours_keep_it():
    check_provider(OpenAI.Config(model="m"), secret=SECRET, answer=ANSWER, text="hi")
    check_provider(Engine.Config(model="m"), answer=ANSWER, text="hi")
    events = [json.dumps(event).encode() for event in EVENTS]
    check_provider(
        Anthropic.Config(model="m"), secret=SECRET, answer=json.dumps(MESSAGE).encode(), text="hi", events=events
    )


def test_those_that_make_answers_up_keep_it_too(tmp_path):
    path = tmp_path / "recorded.jsonl"
    path.write_text("")
    check_provider(Mock.Config(model="m"), answer=ANSWER, text="hi")
    check_provider(Replay.Config(path=str(path), model="m"), answer=ANSWER, text="hi")
    theirs = Replay.Config(path=str(path), provider=Anthropic.Config(model="m"))
    check_provider(theirs, answer=json.dumps(MESSAGE).encode(), text="hi")


class Obliging(OpenAI):
    endpoints = ("chat",)

    def build(self, request):
        self.endpoints = OpenAI.endpoints
        call = super().build(request)
        del self.endpoints
        return call


class Meddling(OpenAI):
    def build(self, request):
        request.body["temperature"] = 0
        return super().build(request)


class Telling(OpenAI):
    def build(self, request):
        call = super().build(request)
        return HttpCall(f"{call.url}?key={SECRET}", call.headers, call.body)


class Relative(OpenAI):
    def build(self, request):
        call = super().build(request)
        return HttpCall("/v1/chat", call.headers, call.body)


class Splitting(OpenAI):
    def build(self, request):
        call = super().build(request)
        return HttpCall(call.url, {**call.headers, "x-user": "a\r\nx-admin: 1"}, call.body)


class Chatty(OpenAI):
    def error(self, status, headers, body):
        return Failure(kind="server" if status >= 500 else "auth", message=f"{status} {body[:80]!r}", status=status)


class Hasty(OpenAI):
    def error(self, status, headers, body):
        return self.redacted(Failure(kind="server", message="oops", status=status))


class Misplacing(OpenAI):
    def error(self, status, headers, body):
        return replace(super().error(status, headers, body), status=200)


class Boundless(OpenAI):
    context = 0


class Starting(OpenAI):
    """Knows its context once it has started."""

    info = None

    @property
    def context(self):
        return self.info["context"]


class Trusting(OpenAI):
    def parse(self, request, body):
        try:
            return super().parse(request, body)
        except Exception:
            return super().parse(request, b'{"choices": [], "data": []}')


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (Meddling, "changes the sender's body"),
        (Telling, "the key is in the URL"),
        (Relative, "no absolute URL"),
        (Splitting, "line break"),
        (Chatty, "shows the key|must be"),
        (Hasty, "must be 'auth'"),
        (Misplacing, "has status 200; it must be that of the answer"),
        (Boundless, "context is 0; it must be a whole number of tokens"),
        (Trusting, "taken for an answer"),
        (Obliging, "a request to completions, which is none of its endpoints, is built"),
    ],
)
def test_what_breaks_it_is_found(broken, said):
    config = OpenAI.Config(model="m")
    object.__setattr__(config, "build", lambda: broken(config))
    with pytest.raises(AssertionError, match=said):
        check_provider(config, secret=SECRET, answer=ANSWER)


def test_one_that_knows_its_context_once_it_has_started_keeps_it():
    config = OpenAI.Config(model="m")
    object.__setattr__(config, "build", lambda: Starting(config))
    check_provider(config, secret=SECRET, answer=ANSWER)


def test_what_an_answer_says_and_how_a_stream_ends():
    with pytest.raises(AssertionError, match="must be 'bye'"):
        check_provider(OpenAI.Config(model="m"), answer=ANSWER, text="bye")
    with pytest.raises(AssertionError, match="does not say so"):
        check_provider(Anthropic.Config(model="m"), events=[json.dumps(event).encode() for event in EVENTS[:-1]])
    with pytest.raises(AssertionError, match="passes streams on"):
        check_provider(OpenAI.Config(model="m"), events=[b"{}"])


@pytest.mark.parametrize("key", ["a", "none", "local", ""])
def test_a_word_that_is_no_real_key_is_left_in_messages(key):
    failure = Failure(kind="request", message="a local model has none of these")
    assert hidden(failure, key).message == failure.message
    assert hidden(failure, "has none of").message == "a local model [key] these"
