"""From the gateway's own ledger to a router that serves: everything by HTTP and the command line, no row written by hand."""

import asyncio
import json
import urllib.request

import numpy as np
import openai
import pytest

from anabranch.cli.main import main
from anabranch.gateway.config import DeploymentConfig, GatewayConfig, LogConfig, ModelConfig, StrategyConfig
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.store import open_store
from anabranch.routers.data import load_outcomes
from anabranch.routers.money import Price
from gateway_process import served

ADMIN = "admin-key-of-this-test"
MODELS = ("small", "medium", "large")
TOPICS = {"maths": "add up the numbers", "poetry": "write some verses about"}
# What a person thinks of each model's answers: which one is right depends on the topic.
SCORE = {
    "maths": {"small": 0.9, "medium": 0.2, "large": 0.5},
    "poetry": {"small": 0.1, "medium": 0.9, "large": 0.6},
}
CLIENT = openai.OpenAI(base_url="http://127.0.0.1:1/v1", api_key="none", max_retries=0)
TEMPLATE = """
require_key = false
store = "{folder}/gateway.db"
default_strategy = "try"
[log]
prompts = {prompts}
[cache]
exact = false
[admin]
key = "env:TEST_ADMIN_KEY"
{models}
[strategies.try]
kind = "random"
{strategies}
"""


def config(folder, strategies="", prompts=True):
    models = "\n".join(
        f'[[models]]\nname = "{name}"\nprice = {{ input_usd = {usd}, output_usd = {usd} }}\n'
        f'deployments = [{{ provider = {{ kind = "mock", model = "{name}", reply = "{name} says so" }} }}]'
        for usd, name in enumerate(MODELS, 1)
    )
    path = folder / "gateway.toml"
    path.write_text(TEMPLATE.format(folder=folder, prompts=str(prompts).lower(), models=models, strategies=strategies))
    return str(path)


def running(path):
    return served("--config", path, environment={"TEST_ADMIN_KEY": ADMIN})


def post(url, path, body):
    request = urllib.request.Request(
        url + path, json.dumps(body).encode(), {"content-type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def admin(url, path):
    request = urllib.request.Request(url + path, headers={"authorization": f"Bearer {ADMIN}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def use(url, number, *, model="auto/try", topic=None, **fields):
    """One request of an app, and what its user thinks of the answer; the id of the request and the model that answered."""
    topic = topic or list(TOPICS)[number % 2]
    raw = CLIENT.with_options(base_url=f"{url}/v1").chat.completions.with_raw_response.create(
        model=model,
        messages=[{"role": "user", "content": f"{TOPICS[topic]} {number}"}],
        extra_headers={"x-task": topic},
        **fields,
    )
    answer = raw.parse()
    if fields.get("stream"):
        text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
    else:
        text = answer.choices[0].message.content
    chosen, id = raw.headers["x-route-model"], raw.headers["x-request-id"]
    assert text == f"{chosen} says so"
    post(url, "/v1/feedback", {"request_id": id, "score": SCORE[topic][chosen]})
    return id, chosen


def command(capsys, *arguments):
    capsys.readouterr()
    assert main(["gateway", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_from_requests_and_feedback_to_a_router_that_serves(tmp_path, capsys, monkeypatch):
    store, routers, table = tmp_path / "gateway.db", tmp_path / "routers", tmp_path / "outcomes.jsonl"
    monkeypatch.setenv("TEST_ADMIN_KEY", ADMIN)
    with running(config(tmp_path)) as gateway:
        for number in range(75):
            use(gateway.url, number, stream=number % 5 == 0)
        id, _ = use(gateway.url, 998, model="large")
        use(gateway.url, 999, store=False)
        decisions = admin(gateway.url, "/admin/decisions?limit=200")["decisions"]
        assert {row["body"]["probability"] for row in decisions if row["strategy"] == "try"} == {1 / 3}
        named = next(row for row in decisions if row["request_id"] == id)
        assert (named["strategy"], named["body"]["probability"]) == ("", None)
        assert not any("numbers" in json.dumps(row) for row in decisions)  # texts lie elsewhere

        fitted = command(
            capsys, "fit", store, "--out", routers, "--strategy", "knn", "--set", "knn.k=25"
        )  # of 10 near ones one in sixty has none of a model
        assert fitted["learned"] + fitted["held_out"] == 76  # all but the one that was not to be stored
        judged = command(capsys, "eval", store, "--router", routers)
        replayed = command(capsys, "replay", store, "--router", routers)
        assert replayed["strategies"] == [row for row in judged["strategies"] if row["name"] == "knn"]
        # Beside the gateway, on the store that it has open.
        options = ("--judge", "large", "--limit", 4, "--rate", 100_000, "--out", table)
        # The judge says nothing clear, which is not paid for without end.
        capsys.readouterr()
        assert main(["gateway", "collect", "-c", str(tmp_path / "gateway.toml"), *map(str, options), "--json"]) == 2
        said = capsys.readouterr().err
        assert "10 questions in a row came to nothing (0 of all were not answered, 10 not judged)" in said
        assert use(gateway.url, 997)[1] in MODELS
    assert judged["estimated"] == "off_policy"
    by_name = {row["name"]: row for row in judged["strategies"]}
    assert by_name["knn"]["score"] == pytest.approx(0.9)  # every topic goes to the model that is right
    # Which rows match is left to chance, and so is what is estimated of the others.
    assert all(row["score"] is None or row["score"] < 0.9 + 1e-9 for row in by_name.values())

    with running(config(tmp_path, f'[strategies.knn]\nrouter = "{routers}"')) as gateway:
        for number, (topic, best) in enumerate((("maths", "small"), ("poetry", "medium"))):
            id, chosen = use(gateway.url, 2000 + number, model="auto/knn", topic=topic)
            assert chosen == best
            [decision] = admin(gateway.url, f"/admin/decisions/{id}")["decisions"]
            assert decision["body"]["candidates"][0]["model"] == best
            assert decision["body"]["candidates"][0]["quality"] == pytest.approx(0.9, abs=0.1)
            assert decision["body"]["probability"] == 1.0
            assert best in decision["body"]["reason"]
    shown = command(capsys, "route", "add up the numbers 7", "--router", routers)
    assert "small" in json.dumps(shown)

    data = load_outcomes(store)
    assert (set(data.models), set(data.task)) == (set(MODELS), set(TOPICS))
    assert {text for of_model in data.answers for text in of_model.values()} == {f"{name} says so" for name in MODELS}
    np.testing.assert_allclose(np.nansum(data.cost_NM, axis=1) > 0, True)


def test_without_prompts_it_is_said_what_to_set(tmp_path, capsys):
    with running(config(tmp_path, prompts=False)) as gateway:
        for number in range(3):
            use(gateway.url, number)
    assert main(["gateway", "fit", str(tmp_path / "gateway.db"), "--out", str(tmp_path / "routers"), "--quiet"]) == 2
    said = capsys.readouterr().err
    assert "3 answers were scored, but their texts are not kept" in said
    assert "prompts = true under [log]" in said
    assert b"add up the numbers" not in (tmp_path / "gateway.db").read_bytes()


# Within one process, by the same doors


def small(tmp_path, failing="", **fields):
    def model(name):
        provider = Mock.Config(model=name, reply=f"{name}!", fails=float(name == failing))
        return ModelConfig(
            name=name,
            price=Price.of_dollars(1, 2),
            context=1000 if name == "a" else None,
            deployments=(DeploymentConfig(provider=provider),),
        )

    return GatewayConfig(
        models=tuple(map(model, "abcd")),
        strategies={"try": StrategyConfig(use="random")},
        require_key=False,
        store=str(tmp_path / "g.db"),
        **{"log": LogConfig(prompts=True), **fields},
    )


def played(config, work):
    async def main():
        async with Gateway(config) as gateway:
            return await work(gateway)

    return asyncio.run(main())


async def ask(gateway, text="hello", key=None, **fields):
    body = {"model": "auto/try", "messages": [{"role": "user", "content": text}], **fields}
    reply = await gateway.handle("chat", body, key=key)
    id = reply.headers["x-request-id"]
    decisions, texts = await gateway.store.told_of([id])
    return decisions.get(id), texts.get(id), id


def test_a_model_that_may_not_be_given_was_never_drawn(tmp_path):
    async def work(gateway):
        secret, _ = await gateway.store.create_key("bound", models=["a", "b"])
        some = [(await ask(gateway, f"hello {number}", secret))[0] for number in range(30)]
        long = [(await ask(gateway, "word " * 2000 + str(number)))[0] for number in range(30)]
        return some, long

    some, long = played(small(tmp_path), work)
    assert {decision["candidates"][0]["model"] for decision in some} == {"a", "b"}
    assert {decision["probability"] for decision in some} == {0.5}
    # The prompt does not fit into a.
    assert {decision["candidates"][0]["model"] for decision in long} == {"b", "c", "d"}
    assert {round(decision["probability"], 9) for decision in long} == {round(1 / 3, 9)}


def test_what_a_choice_led_to_is_put_under_it_for_estimates_and_under_who_answered_to_learn_from(tmp_path):
    """c always fails: whoever answers in its place is what choosing c leads to."""

    async def work(gateway):
        for number in range(40):
            decision, _, id = await ask(gateway, f"hello {number}")
            await gateway.feedback(
                {"request_id": id, "score": 1.0 if decision["candidates"][0]["model"] == "c" else 0.0}
            )

    played(small(tmp_path, failing="c"), work)
    answered, chosen = load_outcomes(tmp_path / "g.db"), load_outcomes(tmp_path / "g.db", by_choice=True)
    assert "c" not in answered.models
    assert chosen.only(["c"]).score_NM[np.isfinite(chosen.only(["c"]).score_NM)].mean() == 1.0
    assert np.nansum(chosen.score_NM) == np.nansum(answered.score_NM) > 0
    # Of those that another model answered nothing is known of the chance that it would.
    assert np.isfinite(answered.signals["probability"]).sum() < np.isfinite(chosen.signals["probability"]).sum() == 40


def test_texts_are_kept_as_far_as_another_model_could_be_asked_with_them(tmp_path):
    async def work(gateway):
        plain = await ask(gateway, "short")
        talk = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi \ud800"}]
        longer = await ask(gateway, messages=talk, tools=[{"type": "function", "function": {"name": "f"}}])
        huge = await ask(gateway, messages=[talk[0], {"role": "user", "content": "x" * 200_000}], model="d")
        forbidden = await ask(gateway, store=False)
        return plain[1], longer[1], huge[1], forbidden[1]

    plain, longer, huge, forbidden = played(small(tmp_path), work)
    assert (plain["query"], plain["answer"][1:], "messages" in plain) == ("short", "!", False)
    assert (longer["query"], longer["messages"][0]["content"], longer["has_tools"]) == ("hi ?", "be kind", True)
    assert (len(huge["query"]), huge["messages"], huge["answer"]) == (100_000, None, "d!")
    assert forbidden is None


def test_nothing_is_kept_unless_the_config_says_so(tmp_path):
    def kept(**log):
        return played(small(tmp_path, log=LogConfig(**log)), ask)[:2]

    decision, texts = kept()
    assert decision["probability"] == 0.25
    assert texts is None
    decision, texts = kept(decisions=False, prompts=True)
    assert decision is None
    assert texts["query"] == "hello"


@pytest.mark.parametrize("prompts", [True, False])
def test_a_response_says_whether_its_text_is_stored(tmp_path, prompts):
    with running(config(tmp_path, prompts=prompts)) as gateway:
        client = CLIENT.with_options(base_url=f"{gateway.url}/v1")
        for wish, kept in (({}, prompts), ({"store": False}, False), ({"store": True}, prompts)):
            assert client.responses.create(model="small", input=f"hello {wish}", **wish).store == kept
        events = list(client.responses.create(model="small", input="hello", stream=True))
        assert events[-1].response.store == prompts

    async def texts():
        async with open_store(str(tmp_path / "gateway.db"), serves=False) as store:
            rows = await store.ledger()
            return (await store.told_of([row.request_id for row in rows]))[1]

    assert len(asyncio.run(texts())) == (3 if prompts else 0)
