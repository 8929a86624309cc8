"""Pairs that a person judges: asked for by `collect`, judged at the page, found by the next run, forgotten with their questions."""

import asyncio
import json

import aiohttp
import pytest

from anabranch.errors import InputError
from anabranch.gateway.collect.collector import Collector, for_collecting
from anabranch.gateway.collect.labels import SAID, Labels, Pair
from anabranch.gateway.config import (
    ABConfig,
    AdminConfig,
    DeploymentConfig,
    GatewayConfig,
    LogConfig,
    ModelConfig,
    StrategyConfig,
)
from anabranch.gateway.config.secret import Secret
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.http.app import App
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.store import open_store
from anabranch.gateway.store.learned import erase_texts
from anabranch.gateway.ui.label import render_label
from anabranch.routers.data import load_outcomes
from anabranch.routers.judges import HumanJudge
from page_html import NASTY, Parsed

ADMIN = "the-admin-key"


def config(tmp_path):
    models = tuple(
        ModelConfig(
            name=name,
            max_tokens=20,
            deployments=(DeploymentConfig(provider=Mock.Config(model=name, reply=f"{name} says it")),),
        )
        for name in ("a", "b", "c")
    )
    return GatewayConfig(
        models=models,
        ab={"try": ABConfig(a="cheapest", b="draws")},
        strategies={"cheapest": StrategyConfig(use="cheapest"), "draws": StrategyConfig(use="random")},
        require_key=False,
        store=str(tmp_path / "g.db"),
        log=LogConfig(prompts=True),
        admin=AdminConfig(key=Secret("env:LABEL_TEST_KEY")),
    )


@pytest.fixture(autouse=True)
def admin_key(monkeypatch):
    monkeypatch.setenv("LABEL_TEST_KEY", ADMIN)


async def asked(made, num):
    async with Gateway(made) as gateway:
        for number in range(num):
            await gateway.achat({"model": "a", "messages": [{"role": "user", "content": f"question {number}?"}]})


async def collected(made, out):
    async with Gateway(for_collecting(made)) as gateway:
        return await Collector(gateway, ["a", "b", "c"], HumanJudge("a"), per_minute=1e6).run(out)


def test_questions_go_to_a_person_and_come_back_as_a_table(tmp_path):
    """Two of three are judged; the third waits, through another run, and nothing is asked of a model again."""
    made, out = config(tmp_path), tmp_path / "outcomes.jsonl"

    async def judged(num, wanted):
        async with Gateway(made) as gateway, aiohttp.ClientSession() as session:
            server = App(gateway).server()
            listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
            url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/ui/label"
            key = {"authorization": f"Bearer {ADMIN}"}
            async with session.get(url) as answer:
                assert answer.status == 401  # texts of users are shown to operators alone, from wherever they ask
            for _ in range(num):
                pair = await Labels(gateway.store).next()
                async with session.get(url, headers=key) as answer:
                    text = await answer.text()
                    Parsed(text)
                assert pair.id in text
                assert (pair.first in text, pair.second in text) == (True, True)
                body = {"id": pair.id, "verdict": wanted(pair)}
                async with session.post(url, json=body, headers={**key, "origin": "http://evil.example"}) as answer:
                    assert answer.status == 403
                async with session.post(url, json={**body, "verdict": "both"}, headers=key) as answer:
                    assert answer.status == 400
                for status in (200, 409):  # once
                    async with session.post(url, json=body, headers=key) as answer:
                        assert answer.status == status
            counts = await Labels(gateway.store).counts()
            listener.close()
            await server.shutdown(0.1)
            return counts

    asyncio.run(asked(made, 3))
    first = asyncio.run(collected(made, out))
    assert (first.questions, first.waiting, first.calls, first.unjudged) == (0, 3, 6, 0)
    # b is better than the anchor, a, and c is not.
    assert asyncio.run(
        judged(4, lambda pair: "first" if pair.first.startswith("b") or pair.second.startswith("c") else "second")
    ) == (2, 4)
    second = asyncio.run(collected(made, out))
    assert (second.questions, second.waiting, second.calls) == (2, 1, 0)
    assert load_outcomes(out).score_NM.tolist() == [[0.5, 1.0, 0.0]] * 2
    assert asyncio.run(judged(2, lambda pair: "tie")) == (0, 6)
    assert asyncio.run(collected(made, out)).questions == 1
    assert load_outcomes(out).score_NM[-1].tolist() == [0.5, 0.5, 0.5]
    assert json.loads(out.read_text().splitlines()[0])["judge"] == "human against a"


def test_where_nobody_can_say_the_question_is_left_out(tmp_path):
    made, out = config(tmp_path), tmp_path / "outcomes.jsonl"

    async def skip_all():
        async with open_store(made.store, serves=False) as store:
            labels = Labels(store)
            while pair := await labels.next():
                await labels.say(pair.id, "skip")

    asyncio.run(asked(made, 1))
    asyncio.run(collected(made, out))
    asyncio.run(skip_all())
    done = asyncio.run(collected(made, out))
    assert (done.questions, done.waiting, done.unjudged, done.unreadable) == (0, 0, 1, [])


@pytest.mark.parametrize("said", SAID)
def test_the_order_in_which_answers_are_shown_makes_no_difference(url, said):
    """What is kept is which answer is better, and not which place."""

    async def work():
        async with open_store(url) as store:
            labels, kept, turned = Labels(store), set(), set()
            for number in range(12):
                pair = json.dumps({"asked": f"q{number}", "A": "of a model", "B": "of the anchor"})
                assert await labels.ask(pair, 1, f"r{number}") == ""
                assert await labels.ask(pair, 1, f"r{number}") == ""
                shown = await labels.next()
                turned.add(shown.first == "of the anchor")
                is_second = (shown.first == "of the anchor") and said in ("first", "second")
                word = {"first": "second", "second": "first"}[said] if is_second else said
                assert await labels.say(shown.id, word)
                assert not await labels.say(shown.id, word)
                kept.add(await labels.ask(pair, 1, f"r{number}"))
            with pytest.raises(InputError, match="it must be one of first, second, tie, skip"):
                await labels.say(shown.id, "A")
            assert not await labels.say("of nobody", "tie")
            return kept, turned

    kept, turned = asyncio.run(work())
    assert kept == {{"first": "verdict: A", "second": "verdict: B", "tie": "verdict: tie", "skip": "skip"}[said]}
    assert turned == {True, False}


def test_a_pair_goes_with_the_question_that_it_is_about(tmp_path):
    made = config(tmp_path)
    asyncio.run(asked(made, 2))
    asyncio.run(collected(made, tmp_path / "o.jsonl"))

    async def work():
        async with open_store(made.store) as store:
            labels = Labels(store)
            rows = [row for row in await store.ledger() if not row.tags]
            counts = [await labels.counts()]
            await store.change(lambda connection: erase_texts(connection, request_id=rows[0].request_id))
            counts.append(await labels.counts())
            await store.change(lambda connection: erase_texts(connection, key_id="nobody"))
            counts.append(await labels.counts())
            await store.change(lambda connection: erase_texts(connection, key_id=""))
            counts.append(await labels.counts())
            return counts

    assert asyncio.run(work()) == [(4, 0), (2, 0), (2, 0), (0, 0)]


def test_the_page_runs_nothing_that_a_text_brings_and_says_when_there_is_nothing_to_do():
    for words in (
        NASTY,
        [
            {"role": NASTY, "content": NASTY},
            {"role": "user", "content": [{"type": "text", "text": NASTY}, {"type": "image_url"}]},
        ],
    ):
        text = render_label(Pair("p", words, NASTY, NASTY), 3, 1)
        Parsed(text)
        assert "<script>alert" not in text
        assert "1 of 4 pairs judged" in text
    assert "collect --judge human" in render_label(None, 0, 0)
    assert "collect</code> again" in render_label(None, 0, 5)
