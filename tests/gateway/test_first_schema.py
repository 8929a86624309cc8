"""From the schema of the first release to the present one, with the rows of a store that was in use."""

import asyncio
import hashlib

import pytest

from anabranch.gateway.store import CollectedRow, LedgerQuery, LedgerRow, open_store, schema
from anabranch.gateway.store.queries import spent_by_key
from gateway_process import ask, call, mock_config, served

NOW_US = 1_700_000_000 * 10**6

KEYS = (
    "id",
    "hash",
    "name",
    "hint",
    "owner",
    "team",
    "tags",
    "models",
    "rpm",
    "tpm",
    "is_admin",
    "created_us",
    "expires_us",
    "revoked_us",
)
LEDGER = schema.LEDGER[: schema.LEDGER.index("parent_id")]
ROWS = {
    "keys": (
        KEYS,
        [
            ("k1", "hash1", "web", "abcd", "", "ml", ",prod,", ",small,", 60, None, 0, 1, None, None),
            ("k2", "hash2", "web", "efgh", "ann", "", "", "", None, None, 1, 2, None, None),
            ("k3", "hash3", "gone", "ijkl", "", "", "", "", None, None, 0, 3, None, 4),
        ],
    ),
    "budgets": (
        schema.BUDGETS[1:],
        [("key:k1", "total", 10**9, 20, 7, 0), ("user:ann", "total", 500, 30, 0, 0)],
    ),
    "reservations": (
        schema.RESERVATIONS,
        [("open", "a process that is gone", NOW_US, 7, ",global,key:k1,", "small", "")],
    ),
    "ledger": (
        LEDGER,
        [
            (
                f"r{number}",
                NOW_US - number * 10**6,
                key,
                owner,
                "",
                ",prod,",
                "small",
                "",
                ",small,",
                "small",
                "small-1",
                1,
                5,
                6,
                0,
                0,
                100,
                200,
                None,
                10,
                10,
                1000,
                None,
                50,
                "ok",
                "",
                "",
                "",
            )
            for number, (key, owner) in enumerate((("k1", ""), ("k1", "bob"), ("k2", "ann")))
        ],
    ),
    "decisions": (schema.DECISIONS, [("r0", NOW_US, "cheapest", "small", "{}")]),
    "feedback": (schema.FEEDBACK, [("r0", NOW_US, "k1", 0.5, "fine")]),
}


def known_up_to(patch, steps):
    """Have stores opened by a version that knows these migrations."""
    for module in ("sqlite", "postgres"):
        patch.setattr(f"anabranch.gateway.store.{module}.MIGRATIONS", steps)


def at_first(url, monkeypatch, changes=None, version=1):
    """A store as the first release left it, or one of that version."""

    async def fill():
        async with open_store(url, serves=False) as store:

            def work(connection):
                for table, (columns, rows) in {**ROWS, **(changes or {})}.items():
                    assert connection.insert(table, columns, rows) == len(rows)

            await store._do(work)

    with monkeypatch.context() as patch:
        known_up_to(patch, schema.MIGRATIONS[:version])
        asyncio.run(fill())


def test_a_store_of_the_first_release_is_taken_on_whole(url, monkeypatch):
    at_first(url, monkeypatch)

    async def look():
        async with open_store(url, clock=lambda: NOW_US / 1e6) as store:
            keys = {key.id: key for key in await store.keys()}
            assert [(key.name, key.speaks_for) for key in keys.values()] == [
                ("web", ("*",)),
                ("web k2", ("tag:*",)),
                ("gone", ("*",)),
            ]
            web = keys["k1"]
            assert (web.team, web.tags, web.models, web.rpm, web.max_in_flight) == (
                "ml",
                ("prod",),
                ("small",),
                60,
                None,
            )
            # What the process that is gone had reserved is charged as ever.
            budgets = {
                one.subject: (one.limit_nano, one.spent_nano, one.reserved_nano) for one in await store.budgets()
            }
            assert budgets == {"key:k1": (10**9, 27, 0), "user:ann": (500, 30, 0)}
            rows = await store.ledger(LedgerQuery(calls=True))
            assert sorted((row.request_id, row.user, row.cost_nano, row.status) for row in rows) == [
                ("open", "", 7, "crashed"),
                ("r0", "", 10, "ok"),
                ("r1", "bob", 10, "ok"),
                ("r2", "ann", 10, "ok"),
            ]
            assert next(row.quality for row in rows if row.request_id == "r0") == 0.5
            assert len(await store.decisions("r0")) == 1
            assert await store.look(lambda connection: spent_by_key(connection, "k1", 0)) == (3, 27)
            assert (await store.create_key("new"))[1].speaks_for == ()

    asyncio.run(look())
    # A second time there is nothing to do.
    asyncio.run(look_again(url))


@pytest.mark.parametrize("version", range(1, len(schema.MIGRATIONS)))
def test_a_store_of_every_older_schema_is_taken_on(url, monkeypatch, version):
    # Names differ from one of the steps on.
    keys = [(*row[:2], f"key {row[0]}", *row[3:]) for row in ROWS["keys"][1]]
    at_first(url, monkeypatch, {"keys": (KEYS, keys)}, version)

    async def main():
        async with open_store(url, makes=False) as store:
            held = await store.reserve("r", ["global"], 10)
            made = LedgerRow(request_id="r", cost_nano=5)
            store.settle(held, made, CollectedRow("k", 1, {"answer": "x"}))
            assert await store.collected(["k"]) == {"k": {"answer": "x"}}
            assert sorted(key.name for key in await store.keys()) == ["key k1", "key k2", "key k3"]
            assert len(await store.secret("s")) == 64
            return {row.request_id: row.cost_nano for row in await store.ledger(LedgerQuery())}

    assert asyncio.run(main()) == {"open": 7, "r0": 10, "r1": 10, "r2": 10, "r": 5}


def test_an_upgrade_that_breaks_off_leaves_the_store_as_it_was(url, monkeypatch):
    """A step that cannot be done takes those before it back, and a later version goes on from where the store was."""
    at_first(url, monkeypatch)
    broken = [*schema.MIGRATIONS[:4], ["ALTER TABLE feedback ADD COLUMN mood TEXT", "INSERT INTO nowhere VALUES (1)"]]

    async def columns():
        async with open_store(url, serves=False, makes=False) as store:
            for table, column in (("feedback", "mood"), ("texts", "body")):
                try:
                    await store.look(lambda connection, t=table, c=column: connection.rows(f"SELECT {c} FROM {t}"))
                    yield f"{table}.{column}"
                except Exception:
                    continue

    async def listed():
        return [name async for name in columns()]

    with monkeypatch.context() as patch:
        known_up_to(patch, broken)
        for _ in range(2):
            with pytest.raises(Exception, match="nowhere"):
                open_store(url)
    with monkeypatch.context() as patch:
        # Whoever knows the first schema alone can go on with it.
        known_up_to(patch, schema.MIGRATIONS[:1])
        assert asyncio.run(listed()) == []
    assert asyncio.run(listed()) == ["texts.body"]


def test_a_gateway_that_is_started_on_it_serves_the_keys_of_then(url, monkeypatch, tmp_path):
    secret = "sk-anabranch-of-the-first-release"
    kept = [("k1", hashlib.sha256(secret.encode()).hexdigest(), *ROWS["keys"][1][0][2:]), *ROWS["keys"][1][1:]]
    at_first(url, monkeypatch, {"keys": (KEYS, kept)})
    path = mock_config(tmp_path / "gateway.toml", top='[admin]\nkey = "env:ADMIN"\n')
    text = (tmp_path / "gateway.toml").read_text()
    (tmp_path / "gateway.toml").write_text(text.replace(text.splitlines()[0], f'store = "{url}"'))
    with served("--config", path, environment={"ADMIN": "admin"}) as running:
        assert ask(running.url, key=secret)[0] == 200
        assert ask(running.url, key="sk-of-nobody")[0] == 401
        _, told, _ = call(running.url, "GET", "/admin/ledger?limit=100", key="admin")
        rows = {row["request_id"]: row for row in told["rows"]}
        assert {"open", "r0", "r1", "r2"} < set(rows)
        [new] = [row for id, row in rows.items() if id not in ("open", "r0", "r1", "r2")]
        assert (new["key_id"], new["team"], new["status"]) == ("k1", "ml", "ok")


async def look_again(url):
    async with open_store(url, serves=False, makes=False) as store:
        assert len(await store.keys()) == 4


def test_what_a_key_has_spent_is_found_in_an_index_alone(tmp_path):
    """However long the ledger is, and whoever else has rows in it."""
    asked = []

    class Explained:
        def __init__(self, connection):
            self._connection = connection

        def rows(self, sql, **values):
            asked.append(self._connection.rows(f"EXPLAIN QUERY PLAN {sql}", **values))
            return self._connection.rows(sql, **values)

    async def main():
        async with open_store(str(tmp_path / "g.db")) as store:
            await store.look(lambda connection: spent_by_key(Explained(connection), "k1", 5))
            sql = "EXPLAIN QUERY PLAN SELECT id FROM budgets WHERE subject = 'x' ORDER BY subject, period"
            [budgets] = await store.look(lambda connection: connection.rows(sql))
        [[plan]] = asked
        assert "SEARCH ledger USING COVERING INDEX ledger_by_key (key_id=? AND ts_us>?)" in plan[-1]
        assert "SEARCH budgets USING" in budgets[-1]

    asyncio.run(main())


def test_what_a_key_may_know_reads_no_other_keys_budgets(tmp_path):
    async def main():
        async with open_store(str(tmp_path / "g.db")) as store:
            for name in ("a", "b"):
                await store.set_budget(f"key:{name}", 10)
            assert [one.subject for one in await store.budgets("key:a")] == ["key:a"]
            assert len(await store.budgets()) == 2

    asyncio.run(main())
