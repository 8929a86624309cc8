"""An OpenAI client as an `Ask`: what it is given, what is read of its answers, and what it may fail with."""

import asyncio
import threading
from types import SimpleNamespace

import pytest

from anabranch.errors import BackendError
from anabranch.routers.contract.ask import Answered, Arm, Said, Spent
from anabranch.routers.money import Price
from anabranch.routers.scale import ClientAsk

ANSWER = {
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "four"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 10, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}},
}


class Client:
    """What has a client's ``chat.completions.create``."""

    def __init__(self, *answers, is_async=False):
        self.answers, self.asked, self.threads = list(answers), [], []
        create = self._acreate if is_async else self._create
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=create))

    def _create(self, **body):
        self.asked.append(body)
        self.threads.append(threading.current_thread())
        answer = self.answers[min(len(self.asked), len(self.answers)) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer() if callable(answer) else answer

    async def _acreate(self, **body):
        return self._create(**body)


def ask(client, *arguments, prices=None, **how):
    made = ClientAsk(client, prices=prices)
    return asyncio.run(made(*arguments, **how)), made


@pytest.mark.parametrize("is_async", [False, True])
def test_an_answer(is_async):
    client = Client(ANSWER, is_async=is_async)
    price = {"m": Price.of_dollars(1, 2, cached_input=0.5)}
    found, made = ask(client, Arm("m", {"top_p": 0.5}), "hello", max_tokens=5, seed=3, prices=price)
    assert client.asked == [
        {"top_p": 0.5, "max_tokens": 5, "seed": 3, "model": "m", "messages": [{"role": "user", "content": "hello"}]}
    ]
    assert (found.text, found.model, found.prompt_tokens, found.completion_tokens, found.cached_tokens) == (
        "four",
        "m",
        10,
        3,
        4,
    )
    assert found.is_counted
    # 6 at 1, 4 at .5 and 3 at 2 dollars a million.
    assert found.cost == pytest.approx(14e-6)
    assert made.spent == Spent(prompt_tokens=10, completion_tokens=3, cost=found.cost)
    assert (client.threads[0] is threading.current_thread()) == is_async


def test_what_a_client_is_given():
    client = Client(ANSWER)
    arm = Arm(
        "m",
        {
            "chat_template_kwargs": {"enable_thinking": True},
            "top_k": 5,
            "extra_body": {"a": 1},
            "max_completion_tokens": 9,
        },
        system="Be brief.",
        samples=2,
    )
    messages = [{"role": "system", "content": "old"}, {"role": "user", "content": "x"}]
    ask(client, arm, messages, max_tokens=4, logprobs=2, stop=("END",), temperature=0.0)
    [body] = client.asked
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x"}]
    assert body["extra_body"] == {"a": 1, "chat_template_kwargs": {"enable_thinking": True}, "top_k": 5}
    assert (body["n"], body["logprobs"], body["top_logprobs"], body["stop"], body["temperature"]) == (
        2,
        True,
        2,
        ["END"],
        0.0,
    )
    assert "max_completion_tokens" not in body
    assert messages[0]["content"] == "old"
    ask(client, arm, "x", n=1)
    assert ("n" in client.asked[1], client.asked[1]["max_completion_tokens"]) == (False, 9)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (ValueError("it broke"), "m did not answer: ValueError: it broke"),
        ({}, "choices are no objects"),
        (None, "choices are no objects"),
        ("text", "choices are no objects"),
        ({"choices": "x"}, "choices are no objects"),
        ({"choices": [None]}, "choices are no objects"),
    ],
)
def test_what_is_no_answer(answer, message):
    with pytest.raises(BackendError, match=message):
        ask(Client(answer), "m", "x")


@pytest.mark.parametrize(
    "usage",
    [
        None,
        "x",
        {},
        {"prompt_tokens": "9"},
        {"prompt_tokens": -1, "completion_tokens": True},
        {"prompt_tokens": 10**400},
        {"prompt_tokens_details": []},
    ],
)
def test_tokens_that_are_not_told_are_none(usage):
    found, made = ask(Client({**ANSWER, "usage": usage}), "m", "x")
    assert not found.is_counted
    assert (found.prompt_tokens, found.completion_tokens, found.cached_tokens) == (0, 0, 0)
    assert made.spent == Spent()


def test_a_stream_is_the_whole_at_once():
    async def main():
        return [piece async for piece in ClientAsk(Client(ANSWER)).stream("m", "x")]

    said, whole = asyncio.run(main())
    assert (said, whole.text) == (Said("four"), "four")
    assert isinstance(whole, Answered)


def test_no_more_calls_at_a_time_than_there_may_be():
    at_once, most = [0], [0]
    lock = threading.Lock()
    go = threading.Event()

    def answer():
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        if most[0] == 2:
            go.set()
        go.wait(60)
        with lock:
            at_once[0] -= 1
        return ANSWER

    async def main(made):
        await asyncio.gather(*(made("m", "x") for _ in range(6)))

    made = ClientAsk(Client(answer), concurrency=2)
    asyncio.run(main(made))
    # Another loop has room of its own.
    asyncio.run(main(made))
    assert most == [2]
    assert made.spent.completion_tokens == 36


def test_a_client_that_hangs_holds_up_nobody_who_has_left():
    release = threading.Event()

    async def main():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await ClientAsk(Client(lambda: release.wait(60) and ANSWER))("m", "x")

    asyncio.run(main())
    assert not release.is_set()
    release.set()
