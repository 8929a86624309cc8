"""Feedback beside scores: thumbs and preferences, through HTTP to the strategy that learns of them."""

import asyncio

import aiohttp
import pytest

from anabranch.gateway.config import DeploymentConfig, GatewayConfig, LogConfig, ModelConfig, StrategyConfig
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.http.app import App
from anabranch.gateway.learning.said import Said, read
from anabranch.gateway.providers.mock import Mock
from anabranch.routers.embed.hashed import Hashed
from anabranch.routers.ic_cache import ICCache, ICCacheRouting
from anabranch.routers.ic_cache.critic import Critic
from anabranch.routers.ic_cache.router import Router
from anabranch.routers.money import Price
from anabranch.web.api_error import ApiError


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"score": 0.25}, {"score": 0.25}),
        ({"score": 1, "comment": "so"}, {"score": 1.0, "comment": "so"}),
        # As float32 gives them.
        ({"score": 1.0000001192092896}, {"score": 1.0}),
        ({"score": -1e-7}, {"score": 0.0}),
        ({"thumb": "up", "comment": None}, {"score": 1.0}),
        ({"thumb": "down"}, {"score": 0.0}),
        ({"preferred": ["a", "b"]}, {"preferred": ("a", "b")}),
    ],
)
def test_what_is_said(given, told):
    body = {"request_id": "r", **given}
    assert read(body) == Said(id="r", **told)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({}, "score"),
        ({"comment": "x"}, "score"),
        ({"score": 1.5}, "score"),
        ({"score": 1.000002}, "score"),
        ({"score": -0.000002}, "score"),
        ({"score": 10**400}, "score"),
        ({"score": float("nan")}, "score"),
        ({"score": None}, "score"),
        ({"score": True}, "score"),
        ({"thumb": "sideways"}, "thumb"),
        ({"thumb": True}, "thumb"),
        ({"thumb": ["up"]}, "thumb"),
        ({"thumb": "up", "score": 1}, "thumb"),
        ({"preferred": ["a", "b"], "score": None}, "preferred"),
        ({"preferred": "ab"}, "preferred"),
        ({"preferred": ["a"]}, "preferred"),
        ({"preferred": ["a", "b", "c"]}, "preferred"),
        ({"preferred": ["a", 1]}, "preferred"),
        ({"preferred": ["a", ""]}, "preferred"),
        ({"preferred": {"better": "a"}}, "preferred"),
        ({"score": 1, "rating": "up"}, "rating"),
        ({"score": 1, "comment": 1}, "comment"),
        ({"score": 1, "request_id": "é"}, "request_id"),
    ],
)
def test_what_says_nothing_is_refused_by_its_name(given, param):
    body = {"request_id": "r", **given}
    with pytest.raises(ApiError) as caught:
        read(body)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_a_score_beyond_is_told():
    with pytest.raises(ApiError, match=r"score is 1\.000002; it must be a number from 0 to 1"):
        read({"request_id": "r", "score": 1.000002})


CACHE = ICCache.Config(router=Router.Config(critic=Critic.Config(hidden=(8,)), temperature=0.0, explore=0.0))


def served(tmp_path, work):
    """What ``work(gateway, ask, say, strategy)`` gives; each of the two goes through HTTP, with a key by its name."""
    strategy = ICCacheRouting.Config(cache=CACHE, domains=("",)).build()
    models = tuple(
        ModelConfig(
            name=name,
            price=Price.of_dollars(dollars, dollars),
            max_tokens=50,
            deployments=(DeploymentConfig(provider=Mock.Config(model=name)),),
        )
        for name, dollars in (("small", 1), ("middle", 5), ("large", 10))
    )
    config = GatewayConfig(
        models=models,
        store=str(tmp_path / "g.db"),
        embedder=Hashed.Config(dim=64),
        log=LogConfig(prompts=True),
        strategies={"ic": StrategyConfig(use="ic_cache", timeout_s=5.0), "cheapest": StrategyConfig(use="cheapest")},
    )

    async def main():
        async with Gateway(config, strategies={"ic": strategy}) as gateway, aiohttp.ClientSession() as session:
            made = {"a": {}, "b": {}, "narrow": {"models": ("small",)}, "boss": {"is_admin": True}}
            keys = {name: (await gateway.store.create_key(name, **fields))[0] for name, fields in made.items()}
            listener = await asyncio.get_running_loop().create_server(App(gateway).server(), "127.0.0.1", 0)
            url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"

            async def post(path, body, key):
                headers = {"authorization": f"Bearer {keys[key]}"}
                async with session.post(url + path, json=body, headers=headers) as answer:
                    return answer.status, await answer.json(), answer.headers

            async def ask(key="a", model="auto/ic"):
                body = {"model": model, "messages": [{"role": "user", "content": "list the files"}]}
                status, told, headers = await post("/v1/chat/completions", body, key)
                assert status == 200, told
                await gateway.settled()
                return headers["x-request-id"], headers["x-route-model"]

            async def say(id, key="a", **said):
                status, told, _ = await post("/v1/feedback", {"request_id": id, **said}, key)
                lane = gateway.runtime.decider.lanes["ic"]
                await lane.alone(lambda: None)
                return status, told

            found = await work(gateway, ask, say, strategy)
            listener.close()
            return found

    return asyncio.run(main())


def beliefs(strategy):
    router = strategy.cache.router
    return [array.tobytes() for array in router.state()[0].values()]


def counted(gateway, kind):
    text = gateway.metrics_text().decode()
    found = [one for one in text.splitlines() if "ic_cache_feedback_total{" in one and f'kind="{kind}"' in one]
    return sum(float(one.split()[-1]) for one in found)


def test_preferences_reach_the_strategy_and_the_store_once_and_beside_a_score(tmp_path):
    async def work(gateway, ask, say, strategy):
        id, model = await ask()
        assert model != "middle"
        other = "small" if model == "large" else "large"
        before = beliefs(strategy)
        status, told = await say(id, preferred=[other, model], comment="shorter")
        assert (status, told["preferred"], told["model"], told["learned"]) == (200, [other, model], model, True)
        assert "score" not in told
        after = beliefs(strategy)
        assert after != before
        assert counted(gateway, "preference") == 1
        # Once, whichever way; a score has a place of its own.
        assert (await say(id, preferred=[model, other]))[0] == 409
        assert beliefs(strategy) == after
        status, told = await say(id, thumb="down")
        assert (status, told["score"], told["learned"]) == (200, 0.0, True)
        assert (await say(id, score=1.0))[0] == 409
        assert counted(gateway, "score") == 1
        [row] = await gateway.store.preferences(id)
        assert (row.better, row.worse, row.comment) == (other, model, "shorter")
        [row] = await gateway.store.feedbacks(id)
        assert row.score == 0.0
        # Another process is told the same by the store, and this one learns nothing of it twice.
        await gateway.teaching.catch_up()
        assert (counted(gateway, "preference"), counted(gateway, "score")) == (1, 1)

    served(tmp_path, work)


def test_requests_stand_for_the_models_that_answered_them(tmp_path):
    async def work(gateway, ask, say, strategy):
        id, model = await ask()
        assert model != "middle"
        other = "small" if model == "large" else "large"
        compared, _ = await ask(model=other)
        theirs, _ = await ask(key="b", model=other)
        # Of somebody else's request nothing is told, nor of one that is not there.
        for name in (theirs, "req_none", "a\nb", "nobody"):
            status, told = await say(id, preferred=[name, model])
            assert (status, told["error"]["param"]) == (400, "preferred"), told
        assert (await say(id, key="b", preferred=[other, model]))[0] == 404
        # Twice the same, and two others than its own.
        for pair in ([model, model], [id, model], [compared, "middle"]):
            assert (await say(id, preferred=pair))[0] == 400
        assert await gateway.store.preferences() == []
        status, told = await say(id, preferred=[compared, id])
        assert (status, told["preferred"], told["learned"]) == (200, [other, model], True)
        # An operator may say so of anybody's; it teaches once.
        status, told = await say(id, key="boss", preferred=[model, theirs])
        assert (status, told["learned"]) == (200, False)
        assert counted(gateway, "preference") == 1

    served(tmp_path, work)


def test_what_learns_nothing_of_comparisons_keeps_its_place_for_a_score_and_closed_models_are_not_named(tmp_path):
    async def work(gateway, ask, say, strategy):
        id, model = await ask(key="narrow", model="auto/cheapest")
        assert model == "small"
        assert (await say(id, key="narrow", preferred=["small", "large"]))[0] == 400
        id, _ = await ask(model="auto/cheapest")
        status, told = await say(id, preferred=["small", "large"])
        assert (status, told["learned"]) == (200, False)
        assert len(await gateway.store.preferences(id)) == 1

    served(tmp_path, work)


def test_preferences_sent_to_another_process_are_learned_here(tmp_path):
    async def work(gateway, ask, say, strategy):
        id, model = await ask()
        assert model != "middle"
        other = "small" if model == "large" else "large"
        key = next(one for one in await gateway.store.keys() if one.name == "a")
        await gateway.teaching.read_keys()
        await gateway.store.preference(id, other, model, key_id=key.id, owner=key.id, once=True)
        for _ in range(2):
            await gateway.teaching.catch_up()
            lane = gateway.runtime.decider.lanes["ic"]
            await lane.alone(lambda: None)
            assert counted(gateway, "preference") == 1

    served(tmp_path, work)


def test_old_preferences_are_deleted_with_all_that_happened(tmp_path):
    async def work(gateway, ask, say, strategy):
        id, _ = await ask()
        assert (await say(id, preferred=["small", "large"]))[0] == 200
        await gateway.store.prune(gateway.now_s() + 60)
        assert await gateway.store.preferences() == []

    served(tmp_path, work)
