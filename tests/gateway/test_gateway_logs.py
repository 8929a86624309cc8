"""A log as a gateway makes it, with what people do beside: the commands that learn from it and judge on it, by their own doors."""

import asyncio
import json

import numpy as np
import pytest

from anabranch.cli.gateway.options import read_data
from anabranch.cli.main import main
from anabranch.gateway.config import DeploymentConfig, GatewayConfig, LogConfig, ModelConfig, StrategyConfig
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.store import LedgerRow, open_store
from anabranch.routers.data import load_outcomes
from anabranch.routers.money import Price


def settings(folder, **fields):
    models = tuple(
        ModelConfig(
            name=name,
            price=Price.of_dollars(10, 10),
            max_tokens=20,
            deployments=(DeploymentConfig(provider=Mock.Config(model=name, reply=f"{name} it is")),),
        )
        for name in "ab"
    )
    held = {
        "log": LogConfig(prompts=True),
        "strategies": {"try": StrategyConfig(use="random")},
        "models": models,
        **fields,
    }
    return GatewayConfig(require_key=False, store=str(folder / "gateway.db"), **held)


async def rated(gateway, model, text, score, **fields):
    """One request and what its user thinks of the model that answered; that model."""
    body = {"model": model, "messages": [{"role": "user", "content": text}], **fields}
    reply = await gateway.handle("chat", body, headers={"x-cache": "deny"})
    answered = reply.headers["x-route-model"]
    await gateway.feedback({"request_id": reply.headers["x-request-id"], "score": score[answered]})
    return answered


def used(config, work):
    async def run():
        async with Gateway(config) as gateway:
            return await work(gateway)

    return asyncio.run(run())


def command(capsys, *arguments, code=0):
    capsys.readouterr()
    assert main(["gateway", *map(str, arguments), *([] if arguments[0] == "route" else ["--quiet"]), "--json"]) == code
    said = capsys.readouterr()
    return json.loads(said.out) if code == 0 else said.err


def test_eval_says_why_a_model_has_no_rows(tmp_path, capsys):
    """Of two that are drawn from, one is always too dear: R20 saw '0 rows', and not why."""

    async def work(gateway):
        key, made = await gateway.store.create_key("k")
        await gateway.store.set_budget(f"key:{made.id}", 10**7)
        for number in range(30):
            body = {"model": "auto/try", "messages": [{"role": "user", "content": f"question {number}"}]}
            reply = await gateway.handle("chat", body, headers={"x-cache": "deny"}, key=key)
            assert reply.headers["x-route-model"] == "a"
            await gateway.feedback({"request_id": reply.headers["x-request-id"], "score": number % 2}, key=key)

    dear = settings(tmp_path)
    a, b = dear.models
    used(dear.replace(models=(a, b.replace(price=Price.of_dollars(1000, 1000)))), work)
    main(["gateway", "eval", str(tmp_path / "gateway.db"), "--strategy", "ridge", "--quiet"])
    said = capsys.readouterr()
    assert "b has 0 rows: it answered none of these 30 questions" in said.out + said.err
    assert "whose worst case (max_tokens at its price) a budget has no room for" in said.out + said.err


@pytest.mark.parametrize("repeated", [1, 12])
def test_a_few_questions_that_every_model_answered_do_not_take_the_place_of_the_log(tmp_path, capsys, repeated):
    """By lot a earns 1 and b 0.2; of what users asked both, b was right. One such question made eval fail, fifteen decide it."""

    async def work(gateway):
        for number in range(60):
            await rated(gateway, "auto/try", f"question {number} about topic {number % 3}", {"a": 1.0, "b": 0.2})
        for number in range(repeated):
            for model in "ab":
                await rated(gateway, model, f"hello {number}", {"a": 0.0, "b": 1.0})

    used(settings(tmp_path), work)
    store, routers = tmp_path / "gateway.db", tmp_path / "routers"
    judged = command(capsys, "eval", store, "--strategy", "ridge")
    assert judged["estimated"] == "off_policy"
    by_name = {row["name"]: row for row in judged["strategies"]}
    assert by_name["always a"]["score"] == pytest.approx(1.0)
    assert by_name["always b"]["score"] == pytest.approx(0.2)
    if repeated == 1:
        assert "only 1 of" in command(
            capsys, "fit", store, "--out", routers, "--strategy", "sw_elo", "--hold-out", 0, code=2
        )
    fitted = command(capsys, "fit", store, "--out", routers, "--strategy", "ridge")
    assert fitted["learned"] + fitted["held_out"] == 60 + repeated
    assert command(capsys, "eval", store, "--router", routers)["estimated"] == "off_policy"


def test_questions_that_differ_in_a_sign_are_learned_apart(tmp_path, capsys):
    pairs = [
        ("What is 9 + 3?", 1.0),
        ("What is 9 - 3?", 0.0),
        ("is x < 4", 1.0),
        ("is x > 4", 0.0),
        ("C++?", 1.0),
        ("C?", 0.0),
    ]

    async def work(gateway):
        for text, score in pairs:
            await rated(gateway, "a", text, {"a": score})

    used(settings(tmp_path), work)
    fitted = command(capsys, "fit", tmp_path / "gateway.db", "--out", tmp_path / "routers")
    assert fitted["learned"] + fitted["held_out"] == len(pairs)


def test_every_strategy_that_can_learn_is_written(tmp_path, capsys):
    """ic_cache fitted and then could not be saved, which took all others with it."""
    rows = [
        {"query": f"question {n} on {n % 5}", "scores": {"a": n % 2, "b": 1 - n % 2}, "cost": {"a": 0.1, "b": 0.2}}
        for n in range(30)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = [word for name in ("ic_cache", "ridge") for word in ("--strategy", name)]
    assert set(command(capsys, "fit", data, "--out", tmp_path / "r", *names)["routers"]) == {"ic_cache", "ridge"}
    routed = command(capsys, "route", "question 3 on 3", "--router", tmp_path / "r", "--strategy", "ic_cache")
    assert {one["model"] for one in routed["candidates"]} == {"a", "b"}


def test_a_model_that_no_budget_had_room_for_is_not_told_what_another_earned(tmp_path, capsys):
    """b is drawn half of the time and never asked: its estimate was a's score."""
    a, b = settings(tmp_path).models
    config = settings(tmp_path, models=(a, b.replace(price=Price.of_dollars(100_000, 100_000))))

    async def work(gateway):
        await gateway.store.set_budget("global", 10**9)
        return [await rated(gateway, "auto/try", f"question number {n}", {"a": 0.9, "b": 0.1}) for n in range(80)]

    assert set(used(config, work)) == {"a"}
    log = load_outcomes(tmp_path / "gateway.db", by_choice=True)
    chance_NM = log.only(["a", "b"]).signals["probability"]
    drawn_M = np.isfinite(chance_NM).sum(0)
    assert drawn_M.sum() == 80
    assert min(drawn_M) > 20
    by_name = {
        row["name"]: row
        for row in command(capsys, "eval", tmp_path / "gateway.db", "--strategy", "ridge")["strategies"]
    }
    assert (by_name["always b"]["matched"], by_name["always b"]["score"]) == (0, None)
    assert by_name["always a"]["score"] == pytest.approx(0.9)
    # Those of the 16 rows that are held out where a was drawn, each weighing two: as it should be of all that were drawn.
    assert by_name["always a"]["support"] == pytest.approx(2 * by_name["always a"]["matched"] / 16)
    assert by_name["always a"]["ips"] == pytest.approx(0.9 * by_name["always a"]["support"])
    assert by_name["always a"]["gain"] == pytest.approx(0)
    # To learn from, the answers are a's.
    assert np.isfinite(load_outcomes(tmp_path / "gateway.db").only(["a"]).score_NM).all()


def asking(folder, reply, prompts=True):
    """A strategy that asks b where to go, which says ``reply``."""
    path = folder / "gateway.toml"
    models = "".join(
        f'[[models]]\nname = "{name}"\nmax_tokens = 20\nprice = {{ input_usd = {usd}, output_usd = {usd} }}\n'
        f'deployments = [{{ provider = {{ kind = "mock", model = "{name}", reply = "{said}" }} }}]\n'
        for name, usd, said in (("a", 10, "fine"), ("b", 5, reply))
    )
    path.write_text(
        f'require_key = false\nstore = "{folder}/gateway.db"\n[log]\nprompts = {str(prompts).lower()}\n'
        f'[strategies.ask]\nkind = "prompt"\nmodel = "b"\n{models}'
    )
    return path


def test_what_a_strategy_asked_others_is_no_cost_of_the_model_it_chose(tmp_path):
    async def work(gateway):
        for model in ("auto/ask", "a"):
            assert await rated(gateway, model, "question?", {"a": 1.0}) == "a"
        return await gateway.store.ledger()

    named, chosen = used(asking(tmp_path, "5"), work)
    assert chosen.total_nano > named.total_nano
    costs = load_outcomes(tmp_path / "gateway.db").cost_NM[:, 0] * 1e9
    np.testing.assert_allclose(costs, named.cost_nano)


def test_rows_from_before_calls_had_their_own_hold_what_others_cost(tmp_path):
    async def main():
        async with open_store(str(tmp_path / "g.db")) as store:
            held = await store.reserve("a", ["global"], 100)
            store.settle(held, LedgerRow(request_id="a", cost_nano=70, model="m", strategy="s"))
            store.append_texts("a", {"query": "q?", "asked_nano": 40})
            await store.feedback("a", 1.0)

    asyncio.run(main())
    np.testing.assert_allclose(load_outcomes(tmp_path / "g.db").cost_NM * 1e9, [[30]])


def test_without_prompts_nothing_that_was_asked_or_said_is_on_the_disk(tmp_path):
    """A routing model's own words were kept with its decision."""

    async def work(gateway):
        for model in ("auto/ask", "a", "b"):
            body = {"model": model, "messages": [{"role": "user", "content": "CANARY has it, what now?"}]}
            await gateway.handle("chat", body, headers={"x-task": "CANARY", "authorization": "CANARY"})
        return await gateway.store.decisions()

    decisions = used(asking(tmp_path, "2, as CANARY has it", prompts=False), work)
    [asked] = [row.body["details"] for row in decisions if row.strategy == "ask"]
    assert asked == {"asked": "b", "read": None, "is_cached": False}
    assert not any(b"CANARY" in path.read_bytes() for path in tmp_path.iterdir() if path.name != "gateway.toml")


def test_a_table_of_few_questions_goes_from_fit_to_eval(tmp_path, capsys):
    """As the guide goes; of 18, none was held out, and the last command refused."""
    rows = [
        {"query": f"question {n}", "scores": {"a": n % 2, "b": 1 - n % 2}, "cost": {"a": 0.1, "b": 0.2}}
        for n in range(18)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert command(capsys, "fit", data, "--out", tmp_path / "r")["held_out"] == 4
    assert command(capsys, "eval", data, "--router", tmp_path / "r")["num_test"] == 4


def test_copies_that_were_scored_apart_are_one_question_with_all_their_scores(tmp_path, capsys):
    """Conversations that end alike: a router sees the same text, and of the two the first alone was learned from."""
    rows = [{"query": "yes", "scores": {"a": float(n), "b": 0.5}} for n in range(2)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read, _ = read_data(str(data), None, None)
    assert (read.query, read.score_NM.tolist()) == (("yes",), [[0.5, 0.5]])
