"""Keys as operators name, change and renew them, on both databases."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import InputError
from anabranch.gateway.store import open_store, schema, subjects_of
from anabranch.gateway.store.key_rows import FIELDS, checked
from anabranch.gateway.store.records import check_tags, listed

NOON = 1_700_000_000.0


def on(url, work):
    async def main():
        async with open_store(url, clock=lambda: NOON) as store:
            return await work(store)

    return asyncio.run(main())


def test_names_of_keys_differ(url):
    async def work(store):
        _, first = await store.create_key("ci")
        with pytest.raises(InputError, match="name is 'ci', as that of another key"):
            await store.create_key(" ci ")
        _, second = await store.create_key("web")
        with pytest.raises(InputError, match="names of keys must differ"):
            await store.edit_key("web", name="ci")
        await store.edit_key("web", name="web", team="t")  # its own
        for _ in range(2):
            await store.create_key()  # without a name
        await store.revoke_key("ci")
        assert (await store.edit_key(second.id, name="ci")).name == "ci"
        assert [key.name for key in await store.keys() if key.name] == ["ci", "ci"]
        assert (await store.revoke_key("ci")).id == second.id
        assert first.id != second.id

    on(url, work)


def test_a_key_is_edited_and_keeps_its_secret_and_its_place_in_the_ledger(url):
    async def work(store):
        secret, key = await store.create_key("ci", team="ml", rpm=5, tags=["a"], models=["m"], expires_s=NOON + 60)
        edited = await store.edit_key(
            key.id[:8], team="research", rpm=None, tpm=7, tags=[], models=["m", "n"], expires_s=None, is_admin=True
        )
        assert (edited.id, edited.hint, edited.name) == (key.id, key.hint, "ci")
        assert (
            edited.team,
            edited.rpm,
            edited.tpm,
            edited.tags,
            edited.models,
            edited.expires_us,
            edited.is_admin,
        ) == (
            "research",
            None,
            7,
            (),
            ("m", "n"),
            None,
            True,
        )
        assert await store.key_of(secret) == edited
        assert subjects_of(edited)[-1] == "team:research"
        assert await store.edit_key("ci") == edited
        await store.revoke_key("ci")
        with pytest.raises(InputError, match="was revoked, which is for good"):
            await store.edit_key(key.id, team="x")

    on(url, work)


def test_a_rotated_key_is_the_same_with_another_secret(url):
    async def work(store):
        old, key = await store.create_key("ci", user="ann")
        new, rotated = await store.rotate_key("ci")
        assert old != new
        assert await store.key_of(old) is None
        assert await store.key_of(new) == rotated
        assert rotated.hint == new[-4:]
        assert {**vars_of(key), "hint": ""} == {**vars_of(rotated), "hint": ""}
        await store.revoke_key(key.id)
        with pytest.raises(InputError, match="was revoked"):
            await store.rotate_key(key.id)
        for bad in ("", "nobody"):
            with pytest.raises(InputError, match="or an id that begins so"):
                await store.rotate_key(bad)

    on(url, work)


def vars_of(record):
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


def test_two_processes_cannot_take_one_name(url):
    async def main():
        async with open_store(url) as one, open_store(url, serves=False) as two:
            made = [store.create_key("same") for store in (one, two) for _ in range(5)]
            found = await asyncio.gather(*made, return_exceptions=True)
            assert [isinstance(item, InputError) for item in found].count(False) == 1
            assert len(await one.keys()) == 1

    asyncio.run(main())


def test_whether_there_are_keys(url, monkeypatch):
    async def main():
        async with open_store(url) as store, open_store(url, serves=False) as tool:
            assert not await store.has_keys()
            _, key = await store.create_key()
            assert await store.has_keys()
            await store.revoke_key(key.id)
            assert await store.has_keys()
            assert await tool.has_keys()

    asyncio.run(main())


WRONG = {
    "name": [5, None, ["x"]],
    "user": [5, None],
    "team": [["t"], {}],
    "tags": ["prod", b"prod", None, 5, {"a": 1}, ["a", 5], [["a"]], ["collect"], ["a b"]],
    "models": ["gpt-4o", b"m", None, 5, {"m": 1}, ["m", None]],
    "rpm": [0, -1, 1.5, "5", True, 10**30, float("inf"), float("nan"), []],
    "tpm": [0, "5", False, 1e400],
    "max_in_flight": [0, -5, "1", True],
    "expires_s": [NOON, 0, "tomorrow", True, float("inf"), float("nan"), 1e300, 10**400, []],
    "is_admin": [1, 0, None, "yes", []],
    "speaks_for": ["*", None, 5, ["team:a"], ["user:"], ["tag:a b"], [5], [["*"]]],
}


@pytest.mark.parametrize("field", FIELDS)
def test_what_may_not_be_is_refused_with_its_field(tmp_path, field):
    assert set(WRONG) == set(FIELDS)

    async def work(store):
        _, key = await store.create_key("good")
        for value in WRONG[field]:
            for made in (store.create_key(**{field: value}), store.edit_key(key.id, **{field: value})):
                with pytest.raises(InputError, match=rf"\b{field}\b|tag"):
                    await made
        assert await store.keys() == [key]

    on(str(tmp_path / "g.db"), work)


@given(
    st.dictionaries(
        st.sampled_from([*FIELDS, "other"]),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text()),
    )
)
def test_fields_are_taken_or_refused_whatever_they_are(fields):
    try:
        columns = checked(fields, int(NOON * 1e6))
    except InputError:
        return
    assert "other" not in fields
    for name, value in columns.items():
        assert value is None or isinstance(
            value, int if name in ("rpm", "tpm", "max_in_flight", "expires_us", "is_admin") else str
        )


@pytest.mark.parametrize("text", ["gpt-4o", b"gpt-4o", "", {"a": 1}, 5, None])
def test_a_text_is_no_list(tmp_path, text):
    """It was taken letter by letter."""

    async def work(store):
        for refused in (
            store.reserve("r", text, 1),
            store.told_of(text),
            store.collected(text),
            store.create_key(models=text),
        ):
            with pytest.raises(InputError, match="must be a list of texts"):
                await refused
        assert await store.spend("model") == []  # by one name is by one group

    on(str(tmp_path / "g.db"), work)
    for refuse in (check_tags, lambda items: listed("x", items), lambda items: subjects_of(tags=items)):
        with pytest.raises(InputError, match="must be a list of texts"):
            refuse(text)
    assert listed("x", iter(["a", "b"])) == ("a", "b")


def test_keys_of_a_store_of_before_whose_names_are_alike_are_told_apart(url, monkeypatch):
    number = next(
        at for at, step in enumerate(schema.MIGRATIONS) if any("keys_by_name" in statement for statement in step)
    )

    async def old(store):
        rows = [
            ("k1", "twice", None),
            ("k2", "twice", None),
            ("k3", "twice", 5),
            ("k4", "", None),
            ("k5", "", None),
            ("k6", "once", None),
        ]
        columns = (
            "id",
            "hash",
            "name",
            "hint",
            "owner",
            "team",
            "tags",
            "models",
            "is_admin",
            "created_us",
            "revoked_us",
        )
        values = [
            (id, f"hash of {id}", name, "abcd", "", "", "", "", 0, at, ended)
            for at, (id, name, ended) in enumerate(rows)
        ]
        await store._do(lambda connection: connection.insert("keys", columns, values))

    with monkeypatch.context() as patch:
        for module in ("sqlite", "postgres"):
            patch.setattr(f"anabranch.gateway.store.{module}.MIGRATIONS", schema.MIGRATIONS[:number])
        on(url, old)

    async def names(store):
        return [key.name for key in await store.keys()]

    assert on(url, names) == ["twice", "twice k2", "twice", "", "", "once"]


def test_a_key_that_was_revoked_is_told_to_be_so_under_its_name_too(url):
    async def work(store):
        _, key = await store.create_key("ci")
        await store.revoke_key("ci")
        for change in (store.edit_key("ci", team="x"), store.rotate_key("ci"), store.revoke_key("ci")):
            with pytest.raises(InputError, match=rf"the key 'ci' \({key.id}\) was revoked, which is for good"):
                await change
        # Its name is free.
        _, other = await store.create_key("ci")
        assert (await store.edit_key("ci", team="x")).id == other.id
        with pytest.raises(InputError, match="no keys have the name 'web'"):
            await store.edit_key("web")

    on(url, work)
