"""Whose scores move what a strategy learns: who may give them, how often, and how far one key's go against those of others."""

import asyncio
import json
import re
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import ConfigError
from anabranch.gateway.config import DeploymentConfig, FeedbackConfig, GatewayConfig, ModelConfig, StrategyConfig
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.lane import Lane
from anabranch.gateway.learning.fair import FairShare
from anabranch.gateway.learning.permission import may_score, may_teach
from anabranch.gateway.learning.waiting import Waiting
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.store import KeyRecord, open_store
from anabranch.routers.contract.query import Outcome, Query
from anabranch.routers.contract.strategy import Strategy
from anabranch.routers.embed.hashed import Hashed
from anabranch.routers.money import Price
from anabranch.routers.strategies import make
from anabranch.web.api_error import ApiError
from gateway_process import served

OWN, MATE = KeyRecord(id="own", team="red"), KeyRecord(id="mate", team="red")
OTHER, OPERATOR = KeyRecord(id="other", team="blue"), KeyRecord(id="operator", is_admin=True)


# Permission


@pytest.mark.parametrize(
    ("who", "teachers"),
    [
        ("own", {"own", "operator"}),
        ("team", {"own", "mate", "operator"}),
        ("any", {"own", "mate", "other", "nobody", "operator"}),
        ("admin", {"operator"}),
        ("none", set()),
    ],
)
def test_who_teaches_and_who_scores(who, teachers):
    givers = {"own": OWN, "mate": MATE, "other": OTHER, "nobody": None, "operator": OPERATOR}
    assert {name for name, giver in givers.items() if may_teach(who, giver, "own", "red")} == teachers
    # Whoever asked may say what it thinks of the answer, whether that teaches or not; and so may operators.
    assert {name for name, giver in givers.items() if may_score(who, giver, "own", "red")} == teachers | {
        "own",
        "operator",
    }


def test_keys_without_a_team_are_no_team_and_senders_without_a_key_are_one():
    assert not may_teach("team", KeyRecord(id="b"), "a", "")
    assert may_teach("own", None, "", "")
    assert not may_teach("own", None, "own", "red")


# Shares


class Clock:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


def test_shares_by_hand():
    clock = Clock()
    share = FairShare(FeedbackConfig(share=0.25, window=10, free=1), clock)
    assert [share.admit("a", 1) for _ in range(3)] == [True] * 3  # alone
    assert [share.admit("b", 2) for _ in range(3)] == [True, True, True]  # half of all
    assert share.admit("b", 2)  # its free one
    assert not share.admit("b", 2)
    assert share.admit("c", 3)  # a third: one of eight
    assert not share.admit("b", 3)  # has four of eight
    clock.now_s = 3600.0
    assert share.admit("b", 3)  # the free one of the next hour
    assert not share.admit("b", 3)
    assert [share.count(key) for key in "abc"] == [3, 5, 1]


@given(st.lists(st.sampled_from("hhhhhhabcde"), max_size=50), st.integers(0, 5), st.sampled_from([0.1, 0.2, 0.5, 1.0]))
def test_no_key_has_more_than_its_share_and_what_is_free(senders, free, share_of):
    config = FeedbackConfig(share=share_of, window=50, free=free)
    share = FairShare(config, Clock())
    admitted, beyond = [], Counter()
    for sender in senders:
        before = share.count(sender)
        if share.admit(sender, 6):
            admitted.append(sender)
            active = len(set(admitted[-50:]))
            most = max(share_of, 1 / max(2, active)) * len(share)
            if before + 1 > most + 1e-9:
                beyond[sender] += 1
        assert len(share) == min(50, len(admitted))
        assert share.count(sender) == admitted[-50:].count(sender)
    assert all(count <= free for count in beyond.values())


def mean_of(lane, query):
    strategy = lane.strategy
    place = strategy.models.index("small")
    return float(strategy.theta_MD[place] @ strategy.features(query.vector_D[None])[0])


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 6), st.integers(5, 60), st.randoms(use_true_random=False))
def test_a_key_that_floods_moves_what_others_are_told_by_no_more_than_its_share(num_honest, each, random):
    """All score one answer: the others 1, the flood 0. What is expected of it then is the mean of what was taken in."""
    query = Query(text="x", vector_D=np.eye(4, dtype=np.float32)[0])
    config = FeedbackConfig(free=2)
    share = FairShare(config, Clock())
    lane = Lane("l", StrategyConfig(use="linucb"), make("linucb", ridge=1e-9), None)
    coming = [f"honest{at}" for at in range(num_honest)] * each + ["flood"] * 40 * num_honest
    random.shuffle(coming)
    # What they may each have is had before the flood begins, so that it is theirs that the bound is about.
    for sender in [f"honest{at}" for at in range(num_honest)] + coming:
        if share.admit(sender, num_honest + 1):
            outcome = Outcome(query=query, model="small", quality=float(sender != "flood"))
            lane._learn(lambda outcome=outcome: lane.strategy.observe(outcome))
    lane.close()
    taken = share.count("flood")
    most = max(config.share, 1 / (num_honest + 1))
    assert taken <= most * len(share) + config.free
    assert mean_of(lane, query) >= 1 - most - config.free / len(share) - 1e-6


def test_what_waits_for_scores_is_not_pushed_out_by_others():
    waiting = Waiting(most=100, most_characters=10_000)
    outcome = Outcome(query=Query(text="x"), model="m")
    for number in range(20):
        waiting.put(f"quiet{number}", "s", "quiet", "", outcome)
    for number in range(1000):
        waiting.put(f"loud{number}", "s", "loud", "", outcome)
    assert len(waiting) == 100
    assert all(f"quiet{number}" in waiting for number in range(20))
    assert "loud999" in waiting
    waiting.put("long", "s", "loud", "", Outcome(query=Query(text="y" * 9_970), model="m"))
    assert "long" in waiting
    assert all(f"quiet{number}" in waiting for number in range(20))
    waiting.put("longer", "s", "new", "", Outcome(query=Query(text="y" * 20_000), model="m"))
    assert "longer" not in waiting
    assert waiting.take("quiet3").key_id == "quiet"
    assert waiting.take("quiet3") is None


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40), st.booleans()), max_size=80))
def test_what_waits_is_bounded_and_counted(steps):
    waiting, held = Waiting(most=7, most_characters=60), {}
    for number, (key, length, is_taken) in enumerate(steps):
        name = str(number)
        waiting.put(name, "s", f"k{key}", "", Outcome(query=Query(text="x" * length), model="m"))
        held[name] = length
        if is_taken:
            waiting.take(next(iter(held)))
        held = {one: size for one, size in held.items() if one in waiting}
        assert len(waiting) == len(held) <= 7
        assert sum(held.values()) == waiting._all_characters <= 60


# A gateway


def model(name):
    deployment = DeploymentConfig(provider=Mock.Config(model=name, reply=f"{name}!"))
    return ModelConfig(name=name, price=Price.of_dollars(1, 1), max_tokens=50, deployments=(deployment,))


def run(tmp_path, work, strategies=None, made=None, **fields):
    # A store makes no folder.
    tmp_path.mkdir(exist_ok=True)
    config = GatewayConfig(
        models=(model("small"), model("large")),
        store=str(tmp_path / "g.db"),
        embedder=Hashed.Config(dim=8),
        strategies=strategies or {"ucb": StrategyConfig(use="linucb", timeout_s=5.0)},
        **fields,
    )

    async def main():
        async with Gateway(config, strategies=made) as gateway:
            return await work(gateway)

    return asyncio.run(main())


async def keys_of(gateway, **teams):
    return {name: (await gateway.store.create_key(name, **fields))[0] for name, fields in teams.items()}


async def ask(gateway, key, text="hello", strategy="ucb"):
    body = {"model": f"auto/{strategy}", "messages": [{"role": "user", "content": text}]}
    return (await gateway.handle("chat", body, key=key)).headers["x-request-id"]


async def score(gateway, key, id, value=1.0):
    """Whether it was learned from, or the status of the refusal."""
    try:
        return (await gateway.feedback({"request_id": id, "score": value}, key=key))["learned"]
    except ApiError as error:
        return error.status


async def steps(gateway, strategy="ucb"):
    lane = gateway.runtime.decider.lanes[strategy]
    return await lane.alone(lambda: lane.strategy.steps)


def test_a_request_is_scored_once_by_each_who_may(tmp_path):
    async def work(gateway):
        keys = await keys_of(gateway, a={"team": "red"}, b={"team": "red"}, c={}, boss={"is_admin": True})
        id = await ask(gateway, keys["a"])
        told = [await score(gateway, keys[who], id) for who in ("c", "b", "a", "a", "boss")]
        at_once = await ask(gateway, keys["a"])
        both = await asyncio.gather(*(score(gateway, keys["a"], at_once) for _ in range(2)))
        kept = [await gateway.store.feedbacks(one) for one in (id, at_once)]
        return told, both, [len(rows) for rows in kept], await steps(gateway)

    told, both, kept, learned = run(tmp_path, work)
    assert told == [404, 404, True, 409, False]
    assert sorted(both) == [True, 409]
    assert (kept, learned) == ([2, 1], 2)


@pytest.mark.parametrize(
    ("settings_", "expected"),
    [
        ({"feedback": FeedbackConfig(who="team")}, {"a": True, "mate": True, "c": 404}),
        ({"feedback": FeedbackConfig(who="any")}, {"a": True, "mate": True, "c": True}),
        ({"feedback": FeedbackConfig(who="admin")}, {"a": False, "mate": 404, "c": 404, "boss": True}),
        ({"feedback": FeedbackConfig(who="none")}, {"a": False, "boss": False}),
        (
            {"strategies": {"ucb": StrategyConfig(use="linucb", timeout_s=5.0, learns_from="team")}},
            {"a": True, "mate": True, "c": 404},
        ),
        ({"strategies": {"ucb": StrategyConfig(use="linucb", timeout_s=5.0, learns_of=("team:blue",))}}, {"a": False}),
        (
            {"strategies": {"ucb": StrategyConfig(use="linucb", timeout_s=5.0, learns_of=("team:red", "key:x"))}},
            {"a": True},
        ),
    ],
)
def test_settings_say_whose_scores_move_it(tmp_path, settings_, expected):
    async def work(gateway):
        keys = await keys_of(gateway, a={"team": "red"}, mate={"team": "red"}, c={}, boss={"is_admin": True})
        found = {}
        for who in expected:
            before = await steps(gateway)
            found[who] = await score(gateway, keys[who], await ask(gateway, keys["a"], who))
            assert await steps(gateway) - before == (found[who] is True)
        return found

    assert run(tmp_path, work, **settings_) == expected


def test_what_nobody_scored_teaches_costs_under_the_same_settings(tmp_path):
    async def calls(gateway, keys, name):
        await ask(gateway, keys[name])
        lane = gateway.runtime.decider.lanes["ucb"]
        return await lane.alone(lambda: float(lane.strategy.calls_M.sum()))

    async def work(gateway):
        keys = await keys_of(gateway, a={"team": "red"}, b={"team": "blue"}, boss={"is_admin": True})
        await gateway.teaching.read_keys()
        return [await calls(gateway, keys, name) for name in ("a", "b", "boss")]

    def with_(folder, **fields):
        return run(tmp_path / folder, work, strategies={"ucb": StrategyConfig(use="linucb", timeout_s=5.0, **fields)})

    assert with_("all") == [1, 2, 3]
    assert with_("few", learns_from="admin") == [0, 0, 1]
    assert run(tmp_path / "b", work, feedback=FeedbackConfig(who="none")) == [0, 0, 0]
    assert run(tmp_path / "c", work, feedback=FeedbackConfig(free=1)) == [1, 2, 3]


def test_senders_are_counted_when_keys_are_read_and_not_for_each_outcome(tmp_path):
    class Unread(dict):
        def values(self):
            raise AssertionError("all keys are looked at")

    async def work(gateway):
        teaching = gateway.teaching
        keys = await keys_of(gateway, a={}, b={}, boss={"is_admin": True})
        await teaching.read_keys()
        teaching._keys = Unread(teaching._keys)
        before = await steps(gateway)
        assert await score(gateway, keys["a"], await ask(gateway, keys["a"]))
        return teaching.num_senders - (not gateway.config.require_key), await steps(gateway) - before

    assert run(tmp_path, work) == (2, 1)


def test_what_is_over_the_share_is_told_without_what_all_would_learn_from(tmp_path):
    class Notes(Strategy):
        keeps_answers = True

        def __init__(self):
            super().__init__(None)
            self.heard = []

        def route(self, query, pool):
            return make("static", model="small").route(query, pool)

        def observe(self, outcome):
            self.heard.append((outcome.answer, outcome.cost is None, outcome.latency_s is None, outcome.quality))

    notes = Notes()

    async def work(gateway):
        keys = await keys_of(gateway, a={}, b={})
        await gateway.teaching.read_keys()
        for number in range(3):
            await score(gateway, keys["a"], await ask(gateway, keys["a"], str(number)))
        return gateway.metrics.text().decode()

    text = run(tmp_path, work, made={"ucb": notes}, feedback=FeedbackConfig(free=1))
    assert (
        notes.heard == [("small!", False, False, None), (None, False, False, 1.0)] + [("small!", True, True, None)] * 2
    )
    assert 'anabranch_outcomes_total{result="over_share",strategy="ucb"} 4.0' in text
    assert 'anabranch_outcomes_total{result="scored",strategy="ucb"} 1.0' in text


def test_operators_have_no_limit_and_are_no_senders_to_share_with(tmp_path):
    async def scores(gateway, names, by):
        keys = await keys_of(gateway, **{name: {"is_admin": name == "boss"} for name in names})
        ids = [await ask(gateway, keys["a"], str(number)) for number in range(5)]
        return [await score(gateway, keys[by], id) for id in ids]

    def told(folder, *arguments, **fields):
        return run(tmp_path / folder, lambda gateway: scores(gateway, *arguments), **fields)

    strict = FeedbackConfig(free=0)
    assert told("a", ("a", "b", "boss"), "boss", feedback=strict.replace(who="admin")) == [True] * 5
    assert told("b", ("a", "boss"), "a", feedback=strict) == [True] * 5
    assert told("c", ("a", "b"), "a", feedback=strict) == [False] * 5


def test_without_keys_all_are_one_and_nothing_is_held_back(tmp_path):
    async def work(gateway):
        return [await score(gateway, None, await ask(gateway, None, str(number))) for number in range(8)]

    assert run(tmp_path, work, require_key=False, feedback=FeedbackConfig(free=0)) == [True] * 8


def test_a_score_that_another_process_was_sent_is_learned_from_where_it_was_decided(tmp_path):
    async def work(gateway):
        keys = await keys_of(gateway, a={}, b={})
        other = Gateway(gateway.config)
        async with other:
            ids = [await ask(gateway, keys["a"], str(number)) for number in range(3)]
            await gateway.store.ledger()  # they are in the store
            told = [await score(other, keys["a"], id) for id in ids[:2]]
            assert [await score(other, keys["b"], id) for id in ids] == [404] * 3
            assert await score(other, keys["a"], ids[0]) == 409
            await gateway.teaching.read_keys()
            for _ in range(2):  # what is seen again is not learned again
                await gateway.teaching.catch_up()
            return told, await steps(gateway)

    assert run(tmp_path, work) == ([False, False], 2)


def test_a_score_that_was_refused_is_looked_at_once_and_stays_refused(tmp_path):
    """Whether it came here or to another process: not each time it is read, nor once other settings would let it in."""

    def refused(gateway):
        lines = gateway.metrics_text().decode().splitlines()
        return [float(line.rpartition(" ")[2]) for line in lines if "outcomes_total{" in line and "not_allowed" in line]

    async def work(gateway):
        keys = await keys_of(gateway, a={}, boss={"is_admin": True})
        async with Gateway(gateway.config) as other:
            ids = [await ask(gateway, keys["a"], str(number)) for number in range(2)]
            await gateway.store.ledger()
            told = [await score(gateway, keys["a"], ids[0]), await score(other, keys["a"], ids[1])]
            await gateway.teaching.read_keys()
            for _ in range(3):
                await gateway.teaching.catch_up()
            counted = refused(gateway)
            await gateway.reload(replace(gateway.config, feedback=FeedbackConfig(who="any")))
            await gateway.teaching.catch_up()
            # Another's word for the same request counts.
            return told, counted, refused(gateway), await steps(gateway), await score(gateway, keys["boss"], ids[0])

    assert run(tmp_path, work, feedback=FeedbackConfig(who="admin")) == ([False, False], [2.0], [2.0], 0, True)


def test_wrong_settings_say_what_is_allowed():
    with pytest.raises(ConfigError, match=r"learns_of has 'red'; write key:ID or team:NAME"):
        StrategyConfig(use="linucb", timeout_s=5.0, learns_of=("red",))
    with pytest.raises(ConfigError, match=r"who"):
        FeedbackConfig(who="everybody")
    with pytest.raises(ConfigError, match=r"share"):
        FeedbackConfig(share=0.0)


# Over HTTP

CONFIG = """
store = "{folder}/gateway.db"
default_strategy = "all"
feedback = {{ free = 5 }}
admin = {{ key = "env:TEST_ADMIN_KEY" }}
embedder = {{ kind = "hashed", dim = 16 }}
{models}
[strategies.all]
kind = "linucb"
timeout_s = 5
[strategies.red]
kind = "linucb"
timeout_s = 5
learns_of = ["team:red"]
"""
MODEL = """[[models]]
name = "{name}"
price = {{ input_usd = 1, output_usd = 1 }}
deployments = [{{ provider = {{ kind = "mock", model = "{name}", reply = "so" }} }}]
"""


def call(url, path, body=None, key=None):
    request = urllib.request.Request(
        url + path,
        None if body is None else json.dumps(body).encode(),
        {"content-type": "application/json", "authorization": f"Bearer {key}"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return dict(answer.headers), answer.read()


def test_a_hostile_key_cannot_steer_the_router_of_another(tmp_path, monkeypatch):
    """Both ask the same. One is honest: small is right. The other says the opposite, five times as often."""
    monkeypatch.setenv("TEST_ADMIN_KEY", "operator")
    path = tmp_path / "gateway.toml"
    path.write_text(
        CONFIG.format(folder=tmp_path, models="".join(MODEL.format(name=name) for name in ("small", "large")))
    )

    async def keys():
        async with open_store(str(tmp_path / "gateway.db"), serves=False) as store:
            return [(await store.create_key(team, team=team))[0] for team in ("red", "blue")]

    red, blue = asyncio.run(keys())

    def use(url, key, strategy, right):
        body = {"model": f"auto/{strategy}", "messages": [{"role": "user", "content": "add the numbers"}]}
        headers, _ = call(url, "/v1/chat/completions", body, key)
        value = float((headers["x-route-model"] == "small") == right)
        _, told = call(url, "/v1/feedback", {"request_id": headers["x-request-id"], "score": value}, key)
        return json.loads(told)["learned"]

    with served("--config", str(path), environment={"TEST_ADMIN_KEY": "operator"}) as gateway:
        honest = [use(gateway.url, red, "all", True) for _ in range(10)]
        flood = [use(gateway.url, blue, "all", False) for _ in range(50)]
        # With two keys, a key that alone says something has what is free.
        assert sum(honest) == 5
        assert sum(flood) <= sum(honest) + 5
        # A strategy that learns of one team alone is not moved at all.
        mine = [use(gateway.url, red, "red", True) for _ in range(6)]
        assert not any(use(gateway.url, blue, "red", False) for _ in range(6))
        for _ in range(3):
            headers, _ = call(
                gateway.url,
                "/v1/chat/completions",
                {"model": "auto/red", "messages": [{"role": "user", "content": "add the numbers"}]},
                red,
            )
            assert headers["x-route-model"] == "small"
        with pytest.raises(urllib.error.HTTPError) as refused:
            call(gateway.url, "/v1/feedback", {"request_id": headers["x-request-id"], "score": 0}, blue)
        refused.value.close()
        assert refused.value.code == 404
        text = call(gateway.url, "/metrics", key="operator")[1].decode()
    counted = {
        (strategy, result): float(count)
        for result, strategy, count in re.findall(
            r'anabranch_outcomes_total\{result="(\w+)",strategy="(\w+)"\} ([\d.]+)', text
        )
    }
    assert counted["all", "scored"] == sum(honest) + sum(flood)
    assert counted["all", "over_share"] >= 50 - sum(flood)
    assert counted["red", "scored"] == sum(mine)
    assert counted["red", "not_allowed"] == 6
