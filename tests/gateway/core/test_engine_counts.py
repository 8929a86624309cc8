"""Prompts as engines of this process read them: what is reserved is what the engine would bill, where it has all of a model or a part."""

import asyncio
from types import SimpleNamespace

import pytest

from anabranch.gateway.core.engine_counts import engine_count
from anabranch.gateway.prompt_tokens import PromptCount
from anabranch.gateway.providers.provider import Failure, HttpCall, UpstreamError, UpstreamRequest

TEXTS = PromptCount(tokens=10, at_most=40, is_estimate=True, audio=3, images=2)


class Engine:
    """A provider that reads a prompt as so many tokens; None where it would refuse it. ``fails``: it cannot even put it into its form."""

    def __init__(self, tokens, *, fails=False):
        self.tokens, self.fails, self.senders = tokens, fails, []

    def build(self, request):
        if self.fails:
            raise UpstreamError(Failure(kind="unsupported", message="no"))
        return HttpCall("/chat", {}, b"{}")

    async def prompt_tokens(self, call):
        self.senders.append(call.sender)
        return self.tokens


ELSEWHERE = SimpleNamespace(prompt_tokens=None)


def counted(*providers, price=1, **fields):
    """What is counted for a model of these deployments, each token of which costs so much."""
    lives = [SimpleNamespace(name=f"m#{at}", provider=one) for at, one in enumerate(providers)]
    group = SimpleNamespace(lives=lives, worst_nano=lambda usage: price * (usage.prompt + usage.completion))
    runtime = SimpleNamespace(dispatcher=SimpleNamespace(groups={"m": group}, turns=None))
    request = UpstreamRequest("chat", {"model": "m", "messages": []}, prompt_tokens=10)
    return asyncio.run(engine_count(runtime, "m", request, TEXTS, "key:k", **fields))


def test_where_no_engine_is_here_texts_count():
    assert counted(ELSEWHERE) is TEXTS


def test_what_costs_nothing_is_not_read_twice_unless_somebody_asks_how_much_it_is():
    engine = Engine(300)
    assert counted(engine, price=0) is TEXTS
    assert engine.senders == []
    assert counted(engine, price=0, is_free_too=True).tokens == 300
    assert engine.senders == ["key:k"]


def test_of_several_engines_the_longest_prompt_counts_and_is_exact():
    found = counted(Engine(300), Engine(200))
    assert found == PromptCount(tokens=300, at_most=300, is_estimate=False, audio=3, images=2)
    # Fewer than the texts are, too.
    assert counted(Engine(5)).at_most == 5


def test_beside_deployments_elsewhere_the_engine_only_says_how_long_it_may_be():
    found = counted(ELSEWHERE, Engine(300))
    assert found == PromptCount(tokens=10, at_most=300, is_estimate=True, audio=3, images=2)
    assert counted(ELSEWHERE, Engine(30)) == TEXTS


@pytest.mark.parametrize("refusing", [Engine(None), Engine(7, fails=True)])
def test_what_an_engine_would_refuse_tells_nothing(refusing):
    assert counted(refusing) is TEXTS
    assert counted(refusing, Engine(300)).tokens == 300
