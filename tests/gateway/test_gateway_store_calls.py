"""Rows of what strategies asked for a request: written with its settlement, paid from its reservation, and no requests themselves."""

import asyncio

from anabranch.gateway.store import LedgerQuery, LedgerRow, Spend, open_store, schema, subjects_of
from anabranch.gateway.store.ledger_rows import ledger_values
from anabranch.routers.money import Price

STEP = next(at for at, step in enumerate(schema.MIGRATIONS) if any("parent_id" in statement for statement in step))


def call(number, cost, parent="a", **fields):
    fields = {"purpose": "judge", "requested": "small", "model": "small", **fields}
    return LedgerRow(request_id=f"{parent}.{number}", cost_nano=cost, **fields)


async def told(store, query):
    return [row.request_id for row in await store.ledger(query)]


def test_calls_are_settled_with_their_request(url):
    """Of 100 held, 30 go for the answer and 20 and 15 for calls: 65 are spent, in every budget, once."""

    async def main():
        async with open_store(url) as store:
            _, key = await store.create_key("k", team="ml", tags=["x"])
            subjects = subjects_of(key)
            for subject in ("global", "team:ml", "tag:x", "tag:other"):
                await store.set_budget(subject, 1_000)
            held = await store.reserve("a", subjects, 100)
            calls = [
                call(1, 20, reserved_nano=50, price=Price(input=1, output=2)),
                call(2, 15, model="", status="error"),
            ]
            for _ in range(2):  # the second one is ignored, its calls too
                await store.settle(held, LedgerRow(request_id="a", cost_nano=30, model="large"), calls=calls)
            assert {one.subject: (one.spent_nano, one.reserved_nano) for one in await store.budgets()} == {
                "global": (65, 0),
                "team:ml": (65, 0),
                "tag:x": (65, 0),
                "tag:other": (0, 0),
            }
            [request] = await store.ledger()
            assert (request.cost_nano, request.calls, request.calls_nano, request.total_nano) == (30, 2, 35, 65)
            assert (request.parent_id, request.purpose, request.flags, request.reserved_nano) == ("", "", (), 100)
            second, first = await store.ledger(LedgerQuery(parent_id="a"))
            assert (first.request_id, first.parent_id, first.purpose, first.cost_nano) == ("a.1", "a", "judge", 20)
            assert (first.reserved_nano, first.price, first.ts_us) == (50, Price(input=1, output=2), request.ts_us)
            assert (first.key_id, first.team, first.tags) == (key.id, "ml", ("x",))
            assert (second.request_id, second.status, second.calls) == ("a.2", "error", 0)
            # A budget made later counts them too.
            assert (await store.set_budget(f"key:{key.id}", 1_000)).spent_nano == 65

    asyncio.run(main())


def test_calls_are_listed_where_they_are_asked_for(url):
    async def main():
        async with open_store(url) as store:
            for parent in ("a", "b"):
                held = await store.reserve(parent, ["global"], 100)
                store.settle(held, LedgerRow(request_id=parent, model="large"), calls=[call(1, 5, parent)])
            await store.append(LedgerRow(request_id="c", cache="exact"))
            assert await told(store, LedgerQuery()) == ["c", "b", "a"]
            assert await told(store, LedgerQuery(calls=True)) == ["c", "b", "b.1", "a", "a.1"]
            assert await told(store, LedgerQuery(calls=True, limit=2, newest_first=False)) == ["a.1", "a"]
            assert await told(store, LedgerQuery(model="small")) == []
            assert await told(store, LedgerQuery(model="small", calls=True)) == ["b.1", "a.1"]
            assert await told(store, LedgerQuery(parent_id="b")) == ["b.1"]
            assert await told(store, LedgerQuery(parent_id="")) == []
            assert await told(store, LedgerQuery(request_id="b.1")) == []
            assert await told(store, LedgerQuery(request_id="b.1", calls=True)) == ["b.1"]
            assert await store.prune(2**40) == 5

    asyncio.run(main())


def test_spending_holds_calls_and_counts_them_apart(url):
    def total(group, requests, calls, cost, errors=0, tokens=0):
        return Spend(
            group=group,
            requests=requests,
            errors=errors,
            cost_nano=cost,
            prompt_tokens=tokens,
            completion_tokens=0,
            cached_tokens=0,
            calls=calls,
        )

    async def main():
        async with open_store(url) as store:
            held = await store.reserve("a", ["global"], 100)
            calls = [call(1, 20, prompt_tokens=7), call(2, 15, status="error"), call(3, 0, purpose="route")]
            store.settle(held, LedgerRow(request_id="a", cost_nano=30, model="large", status="error"), calls=calls)
            assert await store.spend() == [total((), 1, 3, 65, 1, 7)]
            assert await store.spend("model") == [total(("small",), 0, 3, 35, 0, 7), total(("large",), 1, 0, 30, 1)]
            assert await store.spend("purpose") == [
                total(("judge",), 0, 2, 35, 0, 7),
                total(("",), 1, 0, 30, 1),
                total(("route",), 0, 1, 0),
            ]

    asyncio.run(main())


def test_what_calls_cost_above_the_reservation_is_flagged_at_the_request(url):
    async def main():
        async with open_store(url) as store:
            await store.set_budget("global", 100)
            held = await store.reserve("a", ["global"], 10)
            await store.settle(held, LedgerRow(request_id="a", cost_nano=6), calls=[call(1, 5)])
            assert [row.flags for row in await store.ledger(LedgerQuery(calls=True))] == [("over_reserved",), ()]
            [budget] = await store.budgets()
            assert (budget.spent_nano, budget.reserved_nano) == (11, 0)

    asyncio.run(main())


def test_a_store_from_before_calls_had_rows_is_taken_on(url, monkeypatch):
    """Its rows are requests that asked nothing, and what they cost still counts."""
    columns = schema.LEDGER[: schema.LEDGER.index("parent_id")]
    price = Price(input=1, output=2)

    async def old():
        async with open_store(url) as store:
            rows = [LedgerRow(request_id=f"old{number}", ts_us=10**6, cost_nano=5, price=price) for number in range(3)]
            values = [ledger_values(one)[: len(columns)] for one in rows]
            await store._do(lambda connection: connection.insert("ledger", columns, values))

    async def new():
        async with open_store(url) as store:
            rows = await store.ledger()
            assert [row.request_id for row in rows] == ["old2", "old1", "old0"]
            assert {(row.parent_id, row.purpose, row.calls, row.calls_nano, row.total_nano) for row in rows} == {
                ("", "", 0, 0, 5)
            }
            assert rows[0].price == price
            assert (await store.set_budget("global", 1_000)).spent_nano == 15
            held = await store.reserve("a", ["global"], 100)
            await store.settle(held, LedgerRow(request_id="a", cost_nano=30), calls=[call(1, 20)])
            [budget] = await store.budgets()
            assert (budget.spent_nano, budget.reserved_nano) == (65, 0)
            assert await told(store, LedgerQuery(parent_id="a")) == ["a.1"]

    with monkeypatch.context() as patch:
        for module in ("schema", "sqlite", "postgres"):
            patch.setattr(f"anabranch.gateway.store.{module}.MIGRATIONS", schema.MIGRATIONS[:STEP])
        asyncio.run(old())
    asyncio.run(new())
    asyncio.run(_looked(url))


async def _looked(url):
    async with open_store(url, serves=False, makes=False) as store:
        assert len(await store.ledger(LedgerQuery(calls=True))) == 5


def test_calls_of_a_request_are_found_by_an_index(tmp_path):
    async def main():
        async with open_store(str(tmp_path / "g.db")) as store:
            sql = "EXPLAIN QUERY PLAN SELECT seq FROM ledger WHERE parent_id = :parent_id AND parent_id <> ''"
            [plan] = await store._read(lambda connection: connection.rows(sql, parent_id="a"))
            assert "ledger_by_parent" in plan[-1]

    asyncio.run(main())
