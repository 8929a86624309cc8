"""For whom a request speaks: what a sender writes into ``user`` and ``x-tags`` spends nobody's budget but those it may name."""

import asyncio
import sqlite3

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import ConfigError, InputError
from anabranch.gateway.config import DeploymentConfig, GatewayConfig, ModelConfig
from anabranch.gateway.config.access import KeysConfig
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.http.app import App
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.store import KeyRecord, LedgerQuery, open_store, schema, subjects_of
from anabranch.gateway.store.records import check_subject
from anabranch.gateway.store.speaking import check_speaks_for, own_name, speaks_for, spoken
from anabranch.routers.money import Price, nano_dollars

ID = "k0123456789ab"
KEY = KeyRecord(id=ID)


def config(tmp_path, **fields):
    """A model at $1 and $2 for a million tokens: a request of `ask` reserves some cents of a cent."""
    models = (
        ModelConfig(
            name="small",
            price=Price.of_dollars(1, 2),
            deployments=(DeploymentConfig(name="small", provider=Mock.Config(model="small", tokens=4)),),
        ),
    )
    return GatewayConfig(models=models, store=str(tmp_path / "g.db"), **fields)


def served(config, work):
    """What ``work(gateway, post)`` gives; ``post(key, user, tags)`` asks over HTTP and gives status and error code."""

    async def main():
        async with Gateway(config) as gateway, aiohttp.ClientSession() as session:
            server = App(gateway).server()
            listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
            url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1/chat/completions"

            async def post(key=None, user=None, tags=None):
                body = {"model": "small", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
                headers = ({} if key is None else {"authorization": f"Bearer {key}"}) | (
                    {} if tags is None else {"x-tags": tags}
                )
                body |= {} if user is None else {"user": user}
                async with session.post(url, json=body, headers=headers) as answer:
                    told = await answer.json()
                    return answer.status, told.get("error", {}).get("code")

            try:
                return await work(gateway, post)
            finally:
                listener.close()
                await server.shutdown(0.1)

    return asyncio.run(main())


async def spent(gateway):
    """Nano-dollars by subject of budgets."""
    await gateway.settled()
    return {budget.subject: budget.spent_nano + budget.reserved_nano for budget in await gateway.store.budgets()}


def test_a_hostile_neighbour_spends_nothing_of_a_user_or_a_tag_that_it_names(tmp_path):
    async def work(gateway, post):
        store = gateway.store
        ann, _ = await store.create_key("ann", user="ann", tags=["prod"])
        evil, record = await store.create_key("evil")
        # Room for one request of hers and no more.
        await store.set_budget("user:ann", nano_dollars("0.00006"))
        await store.set_budget("tag:prod", nano_dollars("0.00006"))
        for user, tags in (("ann", "prod"), (" ann", "prod, x"), ("ann\x00", None), (f"{record.id}/../ann", None)):
            assert await post(evil, user, tags) == (200, None)
        assert await spent(gateway) == {"user:ann": 0, "tag:prod": 0}
        assert await post(ann) == (200, None)
        after = await spent(gateway)
        assert after["user:ann"] == after["tag:prod"] > 0
        # Nor do its rows stand among hers, also where the budget is set later.
        assert len(await store.ledger(LedgerQuery(user="ann"))) == len(await store.ledger(LedgerQuery(tag="prod"))) == 1
        await store.remove_budget("user:ann")
        assert (await store.set_budget("user:ann", 10**9)).spent_nano == after["user:ann"]
        # What it named is its own, which a budget may be for.
        assert (await store.set_budget(f"user:{record.id}/ann", 10**9)).spent_nano > 0
        assert (await store.set_budget(f"tag:{record.id}/prod", 10**9)).spent_nano > 0

    served(config(tmp_path), work)


def test_a_budget_of_a_keys_own_user_holds(tmp_path):
    async def work(gateway, post):
        app, record = await gateway.store.create_key("app")
        await gateway.store.set_budget(f"user:{record.id}/bob", 1)
        await gateway.store.set_budget(f"tag:{record.id}/" + "t" * 64, 1)
        assert await post(app, "bob") == (429, "insufficient_quota")
        assert await post(app, None, "t" * 64) == (429, "insufficient_quota")
        assert await post(app, "carol") == (200, None)

    served(config(tmp_path), work)


def test_who_may_speak_for_users_spends_their_budgets(tmp_path):
    async def work(gateway, post):
        store = gateway.store
        every, _ = await store.create_key("every", speaks_for=["user:*", "tag:*"])
        one, _ = await store.create_key("one", speaks_for=["user:ann", "tag:prod"])
        for subject in ("user:ann", "user:bob", "tag:prod"):
            await store.set_budget(subject, 1)
        assert (
            await post(every, "ann")
            == await post(every, "bob")
            == await post(one, "ann")
            == (429, "insufficient_quota")
        )
        assert await post(every, None, "prod") == await post(one, None, "prod") == (429, "insufficient_quota")
        assert await post(one, "bob", "x") == (200, None)
        await store.edit_key("one", speaks_for=[])
        assert await post(one, "ann", "prod") == (200, None)

    served(config(tmp_path), work)


def test_the_config_says_for_whom_keys_speak_that_say_nothing(tmp_path):
    async def work(gateway, post):
        secret, _ = await gateway.store.create_key("k")
        narrow, _ = await gateway.store.create_key("n", speaks_for=["user:bob"])
        await gateway.store.set_budget("user:ann", 1)
        assert await post(secret, "ann") == (429, "insufficient_quota")
        assert await post(narrow, "ann") == (200, None)

    served(config(tmp_path, keys=KeysConfig(speaks_for=("user:*",))), work)


def test_without_a_key_everybody_may_be_named_until_there_are_keys(tmp_path):
    async def work(gateway, post):
        await gateway.store.set_budget("user:ann", 1)
        await gateway.store.set_budget("user:anonymous/bob", 1)
        assert await post(None, "ann") == (429, "insufficient_quota")
        await gateway.store.create_key("ann", user="ann")
        assert await post(None, "ann") == (200, None)
        assert await post(None, "bob") == (429, "insufficient_quota")

    served(config(tmp_path, require_key=False), work)


def test_texts_of_a_user_that_a_key_named_are_erased_by_that_name(tmp_path):
    async def work(gateway, post):
        app, record = await gateway.store.create_key("app")
        other, _ = await gateway.store.create_key("other")
        for key in (app, other):
            assert await post(key, "bob") == (200, None)
        await gateway.settled()
        _, num_texts = await gateway.erasures.order(tenant=record.id, user="bob")
        assert num_texts == 1

    from anabranch.gateway.config.observe import LogConfig

    served(config(tmp_path, log=LogConfig(prompts=True)), work)


NAMES = st.text(max_size=40) | st.sampled_from(["ann", "prod", "*", "user:*", f"{ID}/ann", "anonymous/x"])


@given(NAMES, st.lists(NAMES, max_size=4))
def test_whatever_is_named_stays_the_keys_own(user, tags):
    try:
        found = spoken(KEY, (), user=user, tags=tags)
    except InputError:
        return
    assert found.user == "" or found.user.startswith(f"{ID}/")
    assert all(tag.startswith(f"{ID}/") for tag in found.tags)
    subjects = subjects_of(KEY, user=found.user, tags=found.tags)
    assert all(f"{ID}/" in subject for subject in subjects if subject.startswith(("user:", "tag:")))
    for subject in subjects:
        # A budget can be set for each.
        assert check_subject(subject) == subject


def test_the_operators_words_count_as_they_stand():
    own = KeyRecord(id=ID, user="ann", tags=("prod",))
    assert spoken(own, (), user="bob", tags=["prod", "x"]) == spoken(own, (), tags=["x"])
    assert spoken(own, ()).user == "ann"
    assert spoken(own, (), tags=["x"]).tags == ("prod", own_name(ID, "x"))
    assert spoken(None, (), user="ann").user == "anonymous/ann"


@pytest.mark.parametrize("has_keys", [False, True])
def test_for_whom_somebody_speaks(has_keys):
    own = KeyRecord(id=ID, speaks_for=("user:ann",))
    assert speaks_for(own, ("*",), has_keys=has_keys) == ("user:ann",)
    assert speaks_for(KEY, None, has_keys=has_keys) == ()
    assert (
        speaks_for(KEY, ("tag:*",), has_keys=has_keys) == speaks_for(None, ("tag:*",), has_keys=has_keys) == ("tag:*",)
    )
    assert speaks_for(None, (), has_keys=has_keys) == ()
    assert speaks_for(None, None, has_keys=has_keys) == (() if has_keys else ("*",))


def test_what_may_be_spoken_for():
    good = ["user:ann", "user:a:b", "tag:a.b", "user:*", "tag:*", "*"]
    assert check_speaks_for("x", [*good, "user:ann"]) == tuple(good)
    assert check_speaks_for("x", ["user: a,b "]) == ("user:a;b",)
    for bad in ("", "user", "user:", "tag:", "tag:a b", "team:a", "key:a", "global", "**"):
        with pytest.raises(InputError):
            check_speaks_for("x", [bad])
    with pytest.raises(InputError, match="must be a list"):
        check_speaks_for("x", "user:*")
    with pytest.raises(ConfigError, match=r"keys\.speaks_for has 'team:a'"):
        KeysConfig(speaks_for=("team:a",))


def test_keys_of_a_store_of_before_still_name_whom_they_named(url, monkeypatch):
    """Budgets of users may rest on it: an upgrade lifts none of them. New keys name nobody."""
    number = next(at for at, step in enumerate(schema.MIGRATIONS) if any("speaks_for" in line for line in step))
    columns = ("id", "hash", "name", "hint", "owner", "team", "tags", "models", "is_admin", "created_us")
    rows = [(id, f"hash of {id}", id, "abcd", owner, "", "", "", 0, 1) for id, owner in (("k1", ""), ("k2", "ann"))]

    async def old():
        async with open_store(url) as store:
            await store._do(lambda connection: connection.insert("keys", columns, rows))

    async def new():
        async with open_store(url) as store:
            await store.create_key("k3")
            return {key.name: key.speaks_for for key in await store.keys()}

    with monkeypatch.context() as patch:
        for module in ("sqlite", "postgres"):
            patch.setattr(f"anabranch.gateway.store.{module}.MIGRATIONS", schema.MIGRATIONS[:number])
        asyncio.run(old())
    assert asyncio.run(new()) == {"k1": ("*",), "k2": ("tag:*",), "k3": ()}


def test_a_damaged_list_of_whom_a_key_speaks_for_names_nobody(tmp_path):
    async def made():
        async with open_store(str(tmp_path / "g.db")) as store:
            return await store.create_key("k", speaks_for=["user:ann"])

    asyncio.run(made())
    with sqlite3.connect(tmp_path / "g.db") as raw:
        raw.execute("UPDATE keys SET speaks_for = 'x'")
    raw.close()

    async def read():
        async with open_store(str(tmp_path / "g.db")) as store:
            [key] = await store.keys()
            return spoken(key, key.speaks_for, user="ann").user

    assert asyncio.run(read()).endswith("/ann")
