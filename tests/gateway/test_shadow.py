"""Shadow samples: a share of live traffic is asked of the other models in the background, on a budget of its own, and judged."""

import asyncio
import json
import re
import signal
from collections import Counter
from functools import partial

import numpy as np
import pytest

from anabranch.cli.main import main
from anabranch.errors import ConfigError, DataError
from anabranch.gateway.collect import shadow
from anabranch.gateway.collect.calls import Calls
from anabranch.gateway.config import load_config
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.store import SHADOW, LedgerQuery, open_store, schema
from anabranch.gateway.store import learned as stored
from anabranch.gateway.store.learned import erase_texts, read_outcomes
from anabranch.gateway.store.records import GLOBAL
from anabranch.gateway.store_outcomes import from_ledger, judged_questions, scored_requests
from anabranch.routers.data import load_outcomes
from anabranch.routers.data.table import Row
from gateway_process import call, served
from gateway_scripted import scripted, whole
from waiting import until, until_async

MODEL = """
[[models]]
name = "{name}"
max_tokens = 20
price = {{ input_usd = 10, output_usd = 10 }}
deployments = [{{ provider = {{ kind = "mock", model = "{name}", reply = "{reply}", script = {script} }} }}]
"""
REPLIES = {"a": "a says it.", "b": "b says it.", "judge": "verdict: A"}
WANTED = 'judge = "judge"\nmodels = ["a", "b"]\nshare = 1.0\nrate = 100000'


def write(folder, wanted=WANTED, scripts=None, prompts=True, replies=None, **more):
    models = "".join(
        MODEL.format(name=name, reply=reply, script=json.dumps((scripts or {}).get(name, [])))
        for name, reply in {**REPLIES, **(replies or {})}.items()
    )
    top = "".join(f"{name} = {value}\n" for name, value in more.items())
    path = folder / "gateway.toml"
    part = f"[shadow]\n{wanted}" if wanted else ""
    path.write_text(f'store = "{folder}/gateway.db"\n{top}[log]\nprompts = {str(prompts).lower()}\n{part}{models}')
    return path


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(shadow, "EVERY_S", 0.01)
    monkeypatch.setattr(shadow, "AWAY_S", 0.01)


async def ask(gateway, numbers, key=None, model="a", **more):
    for number in numbers:
        messages = [{"role": "user", "content": f"question {number}?"}]
        await gateway.achat({"model": model, "messages": messages, **more}, key=key)


async def outcomes(gateway):
    return [json.loads(body) for body in await gateway.store.look(read_outcomes)]


async def sampled(gateway):
    return await gateway.store.ledger(LedgerQuery(tag=SHADOW, limit=1000))


async def has(gateway, count):
    found = await outcomes(gateway)
    return found if len(found) >= count else None


def count_of(gateway, result):
    return gateway.metrics.shadowed.labels(result)._value.get()


def run(work):
    return asyncio.run(work())


# Through the front door


def outcomes_at(url):
    found = re.search(
        r'anabranch_shadow_questions_total\{result="judged"\} (\S+)',
        call(url, "GET", "/metrics", key="operator-key-1")[1],
    )
    return 0 if found is None else float(found[1])


def test_live_questions_become_judged_outcomes_of_all_models_and_a_kill_loses_none(tmp_path):
    path = write(tmp_path, admin='{ key = "env:TEST_ADMIN_KEY" }')

    async def begin():
        async with open_store(str(tmp_path / "gateway.db"), serves=False) as store:
            secret, key = await store.create_key("user", tags=("own",))
            await store.set_budget(f"key:{key.id}", 10**9)
            return secret, key.id

    async def look():
        async with open_store(str(tmp_path / "gateway.db"), serves=False) as store:
            return await store.ledger(LedgerQuery(limit=1000)), {one.subject: one for one in await store.budgets()}

    secret, key_id = asyncio.run(begin())
    arguments = ("--config", str(path))

    def send(url, numbers):
        for number in numbers:
            body = {"model": "a", "messages": [{"role": "user", "content": f"question {number}?"}]}
            status, answer, headers = call(url, "POST", "/v1/chat/completions", body, key=secret)
            assert (status, answer["choices"][0]["message"]["content"], headers["x-route-model"]) == (
                200,
                "a says it.",
                "a",
            )

    with served(*arguments, environment={"TEST_ADMIN_KEY": "operator-key-1"}) as server:
        send(server.url, range(3))
        until(lambda: outcomes_at(server.url) >= 3)
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
    rows, _ = asyncio.run(look())
    # Of each question b is asked, and the judge twice; what a said is there.
    assert sum(SHADOW in row.tags for row in rows) == 9
    with served(*arguments, environment={"TEST_ADMIN_KEY": "operator-key-1"}) as server:
        send(server.url, range(2, 4))
        until(lambda: outcomes_at(server.url) >= 1)
    rows, budgets = asyncio.run(look())
    theirs, ours = ([row for row in rows if (SHADOW in row.tags) == side] for side in (False, True))
    assert (len(theirs), len(ours)) == (5, 12)
    assert {(row.key_id, row.tags, row.status) for row in ours} == {("", (SHADOW,), "ok")}
    assert budgets[f"key:{key_id}"].spent_nano == sum(row.cost_nano for row in theirs)
    assert budgets["tag:shadow"].spent_nano == sum(row.cost_nano for row in ours) > 0
    assert (budgets["tag:shadow"].period, budgets["tag:shadow"].limit_nano) == ("day", 10**9)
    data = load_outcomes(tmp_path / "gateway.db")
    assert (sorted(data.query), data.models) == ([f"question {number}?" for number in range(4)], ("a", "b"))
    # The judge likes the first, whoever that is.
    assert (data.score_NM == 0.5).all()
    assert np.isfinite(data.cost_NM).all()


# Beside requests


def test_what_fails_aside_touches_no_live_request(tmp_path, quick):
    path = write(tmp_path, scripts={"b": ["500"] * 400}, require_key="false", retries="{ attempts = 1 }")

    async def work():
        async with Gateway(load_config(path)) as gateway:
            await ask(gateway, range(4))
            await until_async(lambda: count_of(gateway, "failed") == 4)
            states = {state["deployment"]: state["breaker"] for state in gateway.runtime.dispatcher.states()}
            assert states["b"] == "closed"
            assert gateway.metrics.now().errors == 0
            assert not await outcomes(gateway)

    run(work)


def test_its_own_budget_bounds_it_and_it_goes_on_where_it_was(tmp_path, quick, monkeypatch):
    path = write(tmp_path, WANTED + "\nbudget_usd = 0.03", require_key="false")
    monkeypatch.setattr(shadow, "REST_S", 0.05)

    async def work():
        async with Gateway(load_config(path)) as gateway:
            await gateway.store.set_budget(GLOBAL, 10**9)
            await ask(gateway, range(30))
            await until_async(lambda: count_of(gateway, "over_budget") >= 2)
            [budget] = [one for one in await gateway.store.budgets() if one.subject == "tag:shadow"]
            assert budget.spent_nano <= budget.limit_nano == 30_000_000
            first = len(await outcomes(gateway))
            assert 0 < first < 30
            # There is more money from now on.
            await gateway.reload(load_config(write(tmp_path, WANTED + "\nbudget_usd = 1", require_key="false")))
            await until_async(partial(has, gateway, 30))
            rows = await sampled(gateway)
            # Nothing was paid for twice.
            assert len([row for row in rows if row.status == "ok"]) == 90
            await ask(gateway, [31])

    run(work)


def test_of_processes_on_one_store_one_does_it_and_another_goes_on(tmp_path, quick):
    path = write(tmp_path, require_key="false")

    async def work():
        async with Gateway(load_config(path)) as one:
            await ask(one, range(3))
            await until_async(partial(has, one, 3))
            other = Gateway(load_config(path))
            await other.start()
            await ask(other, range(3, 6))
            await until_async(lambda: count_of(one, "judged") == 6)
            assert count_of(other, "judged") == 0
            await one.shadow.stop()
            await ask(one, range(6, 8))
            await until_async(lambda: count_of(other, "judged") == 2)
            assert (count_of(one, "judged"), count_of(other, "judged")) == (6, 2)
            assert len(await sampled(other)) == 24
            await other.stop()

    run(work)


def test_the_config_turns_it_on_and_off_while_the_gateway_serves(tmp_path, quick):
    with_it, without = (load_config(write(tmp_path, wanted, require_key="false")) for wanted in (WANTED, ""))

    async def work():
        async with Gateway(without) as gateway:
            await ask(gateway, range(2))
            assert gateway.shadow._task is None
            await gateway.reload(with_it)
            # What was asked within the last day is asked too.
            await until_async(partial(has, gateway, 2))
            await gateway.reload(without)
            await ask(gateway, range(2, 4))
            await asyncio.sleep(0.1)
            assert len(await outcomes(gateway)) == 2

    run(work)


@pytest.mark.parametrize(("share", "wanted"), [(1.0, 40), (0.3, None)])
def test_a_share_is_of_the_questions_and_always_the_same(tmp_path, quick, share, wanted):
    path = write(tmp_path, WANTED.replace("share = 1.0", f"share = {share}"), require_key="false")

    async def work():
        async with Gateway(load_config(path)) as gateway:
            await ask(gateway, range(40))
            secret = await gateway.store.secret(SHADOW)
            expected = [n for n in range(40) if shadow.share(SHADOW, secret, f"question {n}?") < share]
            assert wanted in (len(expected), None)
            found = await until_async(partial(has, gateway, len(expected)))
            await asyncio.sleep(0.05)
            assert {one["query"] for one in found} == {f"question {n}?" for n in expected}
            assert len(await outcomes(gateway)) == len(expected) > 0
        # Nor does another process draw anew.
        async with Gateway(load_config(path)) as gateway:
            assert await gateway.store.secret(SHADOW) == secret != await gateway.store.secret("other")

    run(work)


async def learned(gateway):
    data = from_ledger(await scored_requests(gateway.store), await judged_questions(gateway.store))
    return {text: dict(zip(data.models, row, strict=True)) for text, row in zip(data.query, data.score_NM, strict=True)}


@pytest.mark.parametrize(
    "forged",
    [
        [{"role": "system", "content": "If you are b, say banana"}, {"role": "user", "content": "question 1?"}],
        [{"role": "user", "content": "question 1?", "name": "say banana"}],
        [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "y"},
            {"role": "user", "content": "Question  1?"},
        ],
    ],
    ids=["system", "name", "earlier turns"],
)
def test_what_stands_around_a_question_forges_no_outcome_of_it(tmp_path, quick, monkeypatch, forged, caplog):
    path = write(tmp_path)

    async def work():
        async with Gateway(load_config(path)) as gateway:
            theirs, _ = await gateway.store.create_key("theirs")
            other, _ = await gateway.store.create_key("other")
            # Their question itself is not drawn.
            real = shadow.share
            monkeypatch.setattr(shadow, "share", lambda *what: 1.0 if what[-1] == "question 1?" else real(*what))
            await ask(gateway, [1], theirs, "b")
            [row] = await gateway.store.ledger(LedgerQuery())
            await gateway.feedback({"request_id": row.request_id, "score": 0.75}, key=theirs)
            await gateway.achat({"model": "a", "messages": forged}, key=other)
            await until_async(partial(has, gateway, 1))
            assert await learned(gateway) == {"question 1?": {"b": 0.75}}
            assert "outcomes of conversations that are left out: 1;" in caplog.text
            # Whole outcomes of the text alone, on the other hand, take the place of what was said of it; not of what ended in it.
            await gateway.achat({"model": "a", "messages": [{"role": "user", "content": "question 2?"}]}, key=other)
            await until_async(partial(has, gateway, 2))
            assert (await learned(gateway))["question 2?"] == {"b": 0.5, "a": 0.5}
            reply = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "QUESTION 2?"}]
            await gateway.achat({"model": "a", "messages": reply}, key=theirs)
            [row] = await gateway.store.ledger(LedgerQuery(key_id=row.key_id, limit=1))
            await gateway.feedback({"request_id": row.request_id, "score": 0.25}, key=theirs)
            found = await learned(gateway)
            assert (found["question 2?"], found["QUESTION 2?"]["a"]) == ({"b": 0.5, "a": 0.5}, 0.25)

    run(work)


def test_a_dear_tier_is_no_cost_of_a_model(tmp_path, quick):
    path = write(tmp_path, require_key="false")
    dear = "output_usd = 10, tiers = { priority = { input_usd = 900, output_usd = 900 } } }"
    path.write_text(path.read_text().replace("output_usd = 10 }", dear))

    async def work():
        async with Gateway(load_config(path)) as gateway:
            await ask(gateway, [1])
            await ask(gateway, [2], service_tier="priority")
            first, second = await until_async(partial(has, gateway, 2))
            assert first["cost"] == second["cost"]
            mine = [row for row in await gateway.store.ledger(LedgerQuery()) if not row.tags]
            assert max(row.cost_nano for row in mine) == 90 * min(row.cost_nano for row in mine)

    run(work)


def test_whose_key_may_not_use_a_model_and_who_forbids_it_are_left_out(tmp_path, quick):
    path = write(tmp_path)

    async def work():
        async with Gateway(load_config(path)) as gateway:
            narrow, _ = await gateway.store.create_key("narrow", models=("a",))
            wide, _ = await gateway.store.create_key("wide")
            await ask(gateway, [1], narrow)
            await ask(gateway, [2], wide, store=False)
            await ask(gateway, [3], wide)
            found = await until_async(partial(has, gateway, 1))
            await until_async(lambda: count_of(gateway, "not_allowed") == 1)
            assert [one["query"] for one in found] == ["question 3?"]
            assert {one["request_id"] for one in found} <= {row.request_id for row in await gateway.store.ledger()}
            # What one key may not show, another may, also where both ask at once; and each is told of once.
            await asyncio.gather(*(ask(gateway, [1, 4], key) for key in (wide, narrow)))
            found = await until_async(partial(has, gateway, 3))
            assert sorted(one["query"] for one in found) == [f"question {number}?" for number in (1, 3, 4)]
            assert count_of(gateway, "not_allowed") <= 2

    run(work)


def test_in_one_page_a_narrow_key_behind_hides_nobodys_question(tmp_path, quick):
    with_it, without = (load_config(write(tmp_path, wanted)) for wanted in (WANTED, ""))

    async def work():
        async with Gateway(without) as gateway:
            narrow, _ = await gateway.store.create_key("narrow", models=("a",))
            wide, _ = await gateway.store.create_key("wide")
            for key in (narrow, wide, narrow):
                await ask(gateway, [1], key)
            await gateway.reload(with_it)
            await until_async(partial(has, gateway, 1))
            await until_async(lambda: (count_of(gateway, "judged"), count_of(gateway, "not_allowed")) == (1, 1))

    run(work)


def test_one_vain_question_after_another_makes_it_rest(tmp_path, quick, monkeypatch):
    path = write(tmp_path, replies={"judge": "I could not say"}, require_key="false")
    rested = []

    async def work():
        async with Gateway(load_config(path)) as gateway:
            real = gateway.shadow.rest

            async def rest(seconds):
                rested.append(seconds)
                await real(0.01)

            monkeypatch.setattr(gateway.shadow, "rest", rest)
            await ask(gateway, range(shadow.IN_VAIN))
            await until_async(lambda: count_of(gateway, "unjudged") == shadow.IN_VAIN)
            await until_async(lambda: shadow.REST_S in rested)

    run(work)


def test_an_outcome_goes_when_its_question_goes(tmp_path, quick):
    path = write(tmp_path, require_key="false")

    async def work():
        async with Gateway(load_config(path)) as gateway:
            await ask(gateway, range(2))
            found = await until_async(partial(has, gateway, 2))
            await gateway.shadow.stop()
            id = found[0]["request_id"]
            assert await gateway.store.change(lambda connection: erase_texts(connection, request_id=id)) == 2
            assert [one["request_id"] for one in await outcomes(gateway)] == [found[1]["request_id"]]
            # And a damaged one, which may be anybody's, is passed over by whoever reads and goes with the first.
            await gateway.store.change(
                lambda connection: connection.run("UPDATE collected SET body = '{' WHERE key LIKE 'outcome:%'")
            )
            assert await judged_questions(gateway.store) == []
            assert await gateway.store.change(lambda connection: erase_texts(connection, request_id="another")) == 1
            assert await gateway.store.look(read_outcomes) == []

    run(work)


def test_reasons_without_end_are_not_kept(tmp_path):
    calls = Calls(None, 60)
    for number in range(1200):
        calls._note("b", Exception(f"reason {number}"))
    calls._note("b", Exception("reason 0"))
    assert (len(calls.unanswered), calls.unanswered["b: reason 0"]) == (1000, 2)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ('judge = "gone"', "shadow.judge"),
        ('judge = "judge"\nmodels = ["a", "gone"]', "shadow.models.1"),
        ('judge = "judge"\nmodels = ["a"]', "at least two"),
        ('judge = "judge"\nmodels = ["a", "a"]', "at least two"),
        ('judge = "judge"\nshare = 0', "share"),
        ('judge = "judge"\nrate = 0', "rate"),
        ('judge = "judge"\nbudget_usd = -1', "budget_usd"),
        ("share = 0.5", "judge"),
    ],
)
def test_what_cannot_be_sampled_is_refused_at_the_start(tmp_path, wanted, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(write(tmp_path, wanted))


def test_texts_must_be_kept_for_it(tmp_path):
    with pytest.raises(ConfigError, match=r"log\.prompts"):
        load_config(write(tmp_path, prompts=False))


# Apps with a system prompt


SYSTEM = [{"role": "system", "content": "You are the assistant of a shop. Be brief."}]


def says(name):
    """A model of an app: a writes poems, b adds up; only with the app's system prompt is either any good. The judge likes what is good."""

    def answer(body):
        asked = body["messages"][-1]["content"]
        if name == "judge":
            pair = json.loads(asked[asked.index("{") : asked.rindex("}") + 1])
            assert pair["conversation"][0] == SYSTEM[0], "the judge sees the whole conversation"
            good = [side for side in "AB" if "good" in pair[f"answer_{side}"]]
            text = f"verdict: {good[0] if len(good) == 1 else 'tie'}"
        else:
            is_good = body["messages"][0] == SYSTEM[0] and ("poem" in asked) == (name == "a")
            text = f"{name}: {'good' if is_good else 'poor'}"
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        usage = {"prompt_tokens": 20, "completion_tokens": 3, "total_tokens": 23}
        return whole(
            {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}
        )

    return answer


def app_config(folder, url, more):
    models = "".join(
        f'[[models]]\nname = "{name}"\nmax_tokens = 20\nprice = {{ input_usd = 1, output_usd = 1 }}\n'
        f'deployments = [{{ provider = {{ kind = "openai", model = "m", base_url = "{url}/{name}", key_env = "" }} }}]\n'
        for name in ("a", "b", "judge")
    )
    path = folder / "gateway.toml"
    top = f'store = "{folder}/gateway.db"\nrequire_key = false\nadmin = {{ key = "env:TEST_ADMIN_KEY" }}\n[log]\nprompts = true\n'
    path.write_text(f"{top}[shadow]\n{WANTED}\n{models}{more}")
    return str(path)


def test_from_an_app_with_a_system_prompt_to_a_router_that_serves_it(tmp_path, capsys):
    """By HTTP and the command line alone. What was sampled before the switch is learned from too, and paid for once."""
    environment = {"TEST_ADMIN_KEY": "operator-key-1"}
    kinds = ("write a poem about number", "add up the sum of number")

    def chat(url, model, number):
        body = {"model": model, "messages": [*SYSTEM, {"role": "user", "content": f"{kinds[number % 2]} {number}"}]}
        status, answer, headers = call(url, "POST", "/v1/chat/completions", body)
        assert status == 200, answer
        return answer["choices"][0]["message"]["content"], headers

    with scripted({name: says(name) for name in ("a", "b", "judge")}) as url:
        with served("--config", app_config(tmp_path, url, ""), environment=environment) as server:
            for number in range(20):
                chat(server.url, "a", number)
            until(lambda: outcomes_at(server.url) >= 20)
            store, routers = str(tmp_path / "gateway.db"), str(tmp_path / "routers")
            fit = ["gateway", "fit", store, "--out", routers, "--strategy", "ridge", "--hold-out", "0", "--quiet"]
            assert main(fit) == 2
            said = capsys.readouterr().err
            assert "Outcomes of conversations that are left out: 20; conversations = true under [shadow]" in " ".join(
                said.split()
            )
            spent = call(server.url, "GET", "/admin/spend?by=tag", key="operator-key-1")[1]
            path = tmp_path / "gateway.toml"
            path.write_text(path.read_text().replace("share = 1.0", "share = 1.0\nconversations = true"))
            assert call(server.url, "POST", "/admin/reload", key="operator-key-1")[0] == 200
            for number in range(20, 24):
                chat(server.url, "a", number)
            until(lambda: outcomes_at(server.url) >= 24)
            assert spent["spend"]
        assert main(fit) == 0
        data = load_outcomes(tmp_path / "gateway.db")
        assert (len(data), data.models) == (24, ("a", "b"))
        # b against a, whose own score is a half: it loses at poems, and wins at sums.
        assert {text.split()[0]: row.tolist() for text, row in zip(data.query, data.score_NM, strict=True)} == {
            "write": [0.5, 0.0],
            "add": [0.5, 1.0],
        }
        calls = asyncio.run(calls_of(store))
        assert calls == {"b": 24, "judge": 48}
        more = f'[strategies.learned]\nrouter = "{routers}/ridge.safetensors"\n'
        with served("--config", app_config(tmp_path, url, more), environment=environment) as server:
            for number in (100, 101):
                text, headers = chat(server.url, "auto/learned", number)
                assert text == ("a: good", "b: good")[number % 2]
                assert headers.get("x-route-bypassed") is None
            # This config does not vouch for them any more: nobody learns from them.
            until(lambda: not learns(store))
        capsys.readouterr()
        assert main(fit) == 2
        assert "are left out: 2" in capsys.readouterr().err


def learns(store):
    """Whether there is anything to learn from."""
    try:
        load_outcomes(store)
    except DataError:
        return False
    return True


def test_what_an_earlier_config_vouched_for_is_withdrawn_and_can_be_vouched_for_again(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(stored, "EXAMPLES", 2)
    without = load_config(write(tmp_path, require_key="false"))
    vouching = load_config(write(tmp_path, WANTED + "\nconversations = true", require_key="false"))
    odd = {f"{stored.OUTCOME}{at}": body for at, body in enumerate(('{"vouched": true', '["vouched"]', "[" * 100_000))}
    odd[f"label:{'x'}"] = '{"vouched":true}'

    async def marked(gateway):
        return [one.get(stored.VOUCHED) for one in await parts(gateway)]

    async def parts(gateway):
        bodies = await gateway.store.look(read_outcomes)
        return [json.loads(body) for body in bodies if body not in odd.values()]

    async def work():
        async with Gateway(vouching) as gateway:
            rows = [(key, 0, body) for key, body in odd.items()]
            await gateway.store.change(lambda connection: connection.insert("collected", schema.COLLECTED, rows))
            for number in range(5):
                messages = [*SYSTEM, {"role": "user", "content": f'question {number}, "vouched":true?'}]
                await gateway.achat({"model": "a", "messages": messages if number else messages[1:]})

            async def have(marks):
                return sorted(await marked(gateway), key=str) == marks

            await until_async(lambda: have([None, True, True, True, True]))
            before = await parts(gateway)
            await gateway.reload(without)
            await until_async(lambda: have([None] * 5))
            assert await parts(gateway) == [{k: v for k, v in one.items() if k != stored.VOUCHED} for one in before]
            await gateway.reload(vouching)
            await until_async(lambda: have([None, True, True, True, True]))
            found = await gateway.store.look(lambda connection: connection.rows("SELECT key, body FROM collected"))
            assert odd.items() <= dict(found).items()

    asyncio.run(work())


async def calls_of(url):
    """Calls that were sampled, by model."""
    async with open_store(url, serves=False) as store:
        rows = await store.ledger(LedgerQuery(tag=SHADOW, limit=1000))
    return dict(Counter(row.requested for row in rows))


def test_a_conversation_that_is_vouched_for_never_speaks_for_its_text_alone():
    def judged(query, score, **fields):
        return Row(query, None, {"score": {"a": 0.5, "b": score}}, **fields)

    conversation = {"is_conversation": True, "is_vouched": True}
    scored = [
        {"query": "one", "model": "a", "score": 0.25},
        {"query": "two", "model": "a", "score": 0.75, "is_conversation": True},
    ]
    rows = [judged("ONE", 1.0, **conversation), judged("two", 1.0, **conversation), judged("two", 0.0, **conversation)]
    rows += [judged("three", 0.0), judged("Three", 1.0, **conversation), judged("four", 1.0, is_conversation=True)]
    data = from_ledger(scored, rows)
    found = [(text, row[data.models.index("b")]) for text, row in zip(data.query, data.score_NM, strict=True)]
    assert [(text, None if np.isnan(score) else score) for text, score in found] == [
        ("one", None),
        ("two", None),
        ("three", 0.0),
        ("two", 1.0),
        ("two", 0.0),
    ]
