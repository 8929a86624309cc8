"""From the schema of the first release to the present one, with the rows of a store that was in use."""

import asyncio

from anabranch.gateway.store import LedgerQuery, open_store, schema
from anabranch.gateway.store.queries import spent_by_key

NOW_US = 1_700_000_000 * 10**6

KEYS = (
    "id", "hash", "name", "hint", "owner", "team", "tags", "models", "rpm", "tpm", "is_admin", "created_us", "expires_us", "revoked_us",
)  # fmt: skip
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
                f"r{number}", NOW_US - number * 10**6, key, owner, "", ",prod,", "small", "", ",small,", "small", "small-1", 1, 5, 6, 0, 0,
                100, 200, None, 10, 10, 1000, None, 50, "ok", "", "", "",
            )
            for number, (key, owner) in enumerate((("k1", ""), ("k1", "bob"), ("k2", "ann")))
        ],
    ),
    "decisions": (schema.DECISIONS, [("r0", NOW_US, "cheapest", "small", "{}")]),
    "feedback": (schema.FEEDBACK, [("r0", NOW_US, "k1", 0.5, "fine")]),
}  # fmt: skip


def at_first(url, monkeypatch):
    """A store as the first release left it."""

    async def fill():
        async with open_store(url, serves=False) as store:

            def work(connection):
                for table, (columns, rows) in ROWS.items():
                    assert connection.insert(table, columns, rows) == len(rows)

            await store._do(work)

    with monkeypatch.context() as patch:
        for module in ("sqlite", "postgres"):
            patch.setattr(f"anabranch.gateway.store.{module}.MIGRATIONS", schema.MIGRATIONS[:1])
        asyncio.run(fill())


def test_a_store_of_the_first_release_is_taken_on_whole(url, monkeypatch):
    at_first(url, monkeypatch)

    async def look():
        async with open_store(url, clock=lambda: NOW_US / 1e6) as store:
            keys = {key.id: key for key in await store.keys()}
            assert [(key.name, key.speaks_for) for key in keys.values()] == [
                ("web", ("*",)), ("web k2", ("tag:*",)), ("gone", ("*",)),
            ]  # fmt: skip
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
                ("open", "", 7, "crashed"), ("r0", "", 10, "ok"), ("r1", "bob", 10, "ok"), ("r2", "ann", 10, "ok"),
            ]  # fmt: skip
            assert next(row.quality for row in rows if row.request_id == "r0") == 0.5
            assert len(await store.decisions("r0")) == 1
            assert await store.look(lambda connection: spent_by_key(connection, "k1", 0)) == (3, 27)
            assert (await store.create_key("new"))[1].speaks_for == ()

    asyncio.run(look())
    # A second time there is nothing to do.
    asyncio.run(look_again(url))


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
