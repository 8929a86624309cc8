"""``anabranch gateway keys``, ``budget`` and ``ledger``: what they do to a store, what ``--json`` promises, and what mistakes give."""

import asyncio
import csv
import json
import sys
import time

import pytest
from pyarrow import parquet

from anabranch.gateway.store import LedgerRow, open_store, subjects_of
from anabranch.routers.money import Price


@pytest.fixture
def store(tmp_path):
    """A store with three requests of two teams."""
    path = str(tmp_path / "g.db")

    async def fill():
        async with open_store(path) as opened:
            _, key = await opened.create_key("ci", team="ml", tags=["nightly"])
            for number, (cost, status) in enumerate([(1_500_000, "ok"), (0, "error"), (2_000_000_000, "ok")]):
                held = await opened.reserve(
                    f"r{number}", subjects_of(key if number < 2 else None, user="=ann"), 3 * 10**9
                )
                row = LedgerRow(
                    request_id=f"r{number}",
                    cost_nano=cost,
                    status=status,
                    model=f"m{number % 2}",
                    prompt_tokens=1000,
                    latency_us=1500,
                    candidates=("m0", "m1"),
                    price=Price(input=1_500),
                )
                await opened.settle(held, row)

    asyncio.run(fill())
    return path


@pytest.fixture
def run(here, store):
    """A command on that store: its output, which must be without error."""

    def command(*arguments):
        code, out, err = here("gateway", *arguments, "--store", store)
        assert code == 0, err
        return out

    return command


@pytest.fixture
def facts(run):
    return lambda *arguments: json.loads(run(*arguments, "--json"))


def test_a_key_lives_and_ends(run, facts, store):
    made = facts(
        "keys",
        "create",
        "web",
        "--user",
        "ann",
        "--tag",
        "a",
        "--tag",
        "b",
        "--model",
        "m0",
        "--rpm",
        60,
        "--expires",
        "90d",
        "--budget",
        25,
        "--period",
        "month",
        "--admin",
    )
    assert made["key"].startswith("sk-ab-")
    assert (made["name"], made["user"], made["tags"], made["models"], made["rpm"]) == (
        "web",
        "ann",
        ["a", "b"],
        ["m0"],
        60,
    )
    assert made["expires"] > made["created"]
    listed = facts("keys", "list")["keys"]
    assert [key["name"] for key in listed] == ["ci", "web"]
    assert "key" not in listed[1]
    assert made["key"] not in run("keys", "list")
    assert [(one["subject"], one["limit_usd"]) for one in facts("budget", "list")["budgets"]] == [
        (f"key:{made['id']}", 25.0)
    ]

    async def known():
        async with open_store(store, serves=False) as opened:
            return await opened.key_of(made["key"])

    assert asyncio.run(known()).id == made["id"]
    assert facts("keys", "revoke", made["id"])["revoked"]
    assert asyncio.run(known()) is None
    assert "revoked 20" in run("keys", "list")
    assert "web" in run("keys", "revoke", made["id"][:10])


def test_for_whom_a_key_speaks_is_said_and_taken_back(run, facts):
    made = facts("keys", "create", "app", "--speaks-for", "user:*", "--speaks-for", "tag:prod")
    assert made["speaks_for"] == ["user:*", "tag:prod"]
    assert "user:* tag:prod" in run("keys", "list")
    assert facts("keys", "edit", "app", "--speaks-for", "user:ann")["speaks_for"] == ["user:ann"]
    assert facts("keys", "edit", "app", "--clear", "speaks-for")["speaks_for"] == []


def test_a_key_is_shown_once(run):
    lines = run("keys", "create").splitlines()
    assert [line[:8].strip() for line in lines] == ["key", "id", "note"]


@pytest.mark.slow
def test_a_key_is_edited_and_renewed(run, facts, here, store):
    made = facts("keys", "create", "web", "--team", "ml", "--rpm", 60, "--tag", "a", "--expires", "90d")
    changed = facts(
        "keys",
        "edit",
        "web",
        "--team",
        "research",
        "--tpm",
        5,
        "--clear",
        "expires",
        "--clear",
        "tags",
        "--model",
        "m0",
    )
    assert (
        changed["id"],
        changed["team"],
        changed["rpm"],
        changed["tpm"],
        changed["expires"],
        changed["tags"],
        changed["models"],
    ) == (
        made["id"],
        "research",
        60,
        5,
        None,
        [],
        ["m0"],
    )
    assert made["id"] in run("keys", "edit", made["id"][:9], "--name", "site", "--clear", "rpm")
    renewed = facts("keys", "rotate", "site")
    assert renewed["key"] != made["key"]
    assert (renewed["id"], renewed["name"], renewed["rpm"]) == (made["id"], "site", None)
    assert [line[:8].strip() for line in run("keys", "rotate", "site").splitlines()] == ["key", "id", "note"]
    for line, says in (
        ("keys create site", "name is 'site', as that of another key; names of keys must differ"),
        ("keys edit ci --name site", "name is 'site', as that of another key"),
        ("keys edit ci", "nothing is to be changed"),
        ("keys edit ci --clear id", "--clear is 'id'; it takes name, user,"),
        ("keys edit ci --rpm 5 --clear rpm", "rpm is both given and cleared"),
        ("keys edit kx --rpm 5", "no keys have the name 'kx'"),
        ("keys rotate kx", "no keys have the name 'kx'"),
    ):
        code, out, err = here("gateway", *line.split(), "--store", store)
        assert (code, out) == (2, "")
        assert says in err
        assert len(err.strip().splitlines()) == 1


def test_a_key_of_a_store_that_is_made_for_it_says_where(here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ANABRANCH_STORE", raising=False)
    code, out, err = here("gateway", "keys", "create", "--json")
    assert (code, set(json.loads(out)) >= {"key", "id"}) == (0, True)
    assert f"there is no store at {tmp_path / 'gateway.db'}: making one" in err
    assert here("gateway", "keys", "create")[2] == ""


def test_budgets(run, facts):
    made = facts("budget", "set", "team:ml", "0.005", "--period", "day")
    assert (made["limit_nano"], made["spent_nano"], made["remaining_nano"]) == (5_000_000, 1_500_000, 3_500_000)
    assert made["resets"].endswith("T00:00:00Z")
    shown = run("budget", "set", "global", "25").splitlines()
    assert shown[-1].split() == ["global", "total", "-", "25.00", "2.0015", "0.00", "22.9985"]
    assert [one["subject"] for one in facts("budget", "list")["budgets"]] == ["global", "team:ml"]
    assert facts("budget", "remove", "team:ml", "--period", "day") == {"removed": "team:ml", "period": "day"}
    assert [one["subject"] for one in facts("budget", "list")["budgets"]] == ["global"]


@pytest.mark.slow
def test_a_budget_of_a_key_is_set_and_lifted_by_its_name_too(run, facts, here, store):
    """A limit under a name that no request carries would never apply."""
    id = facts("keys", "list")["keys"][0]["id"]
    for named in ("ci", id, id[:8]):
        assert facts("budget", "set", f"key:{named}", 3, "--period", "day")["subject"] == f"key:{id}"
    assert len(facts("budget", "list")["budgets"]) == 1
    code, _, err = here("gateway", "budget", "remove", "key:ci", "--store", store)
    assert code == 2
    assert "there is no total budget of key:ci; there is one of a day: --period day" in err
    assert run("budget", "remove", "key:ci", "--period", "day")
    assert facts("budget", "list")["budgets"] == []

    async def never_there():
        async with open_store(store, serves=False) as opened:
            await opened.set_budget("key:gone", 5)

    asyncio.run(never_there())
    assert run("budget", "remove", "key:gone")
    assert facts("budget", "list")["budgets"] == []


@pytest.mark.slow
def test_a_key_is_edited_with_a_budget_and_told_how_a_limit_is_lifted(facts, here, store):
    facts("keys", "edit", "ci", "--budget", 2, "--period", "week")
    assert [(one["period"], one["limit_usd"]) for one in facts("budget", "list")["budgets"]] == [("week", 2.0)]
    for line, says in (
        (["keys", "edit", "ci", "--rpm", "0"], "--clear rpm lifts the limit"),
        (["keys", "edit", "ci", "--max-in-flight", "0"], "--clear max-in-flight lifts the limit"),
        (["keys", "edit", "ci", "--budget", "2", "--period", "year"], "the period is 'year'"),
        (["keys", "create", ""], "the name is empty"),
        (["keys", "create", " "], "the name is empty"),
    ):
        code, out, err = here("gateway", *line, "--store", store)
        assert (code, out) == (2, "")
        assert says in err
    assert len(facts("keys", "list")["keys"]) == 1


def test_ledger_list_and_spend(run, facts):
    rows = facts("ledger", "list")["rows"]
    assert [row["request_id"] for row in rows] == ["r2", "r1", "r0"]
    assert rows[2]["cost_nano"] == 1_500_000
    assert (rows[2]["team"], rows[2]["tags"], rows[2]["price_input"]) == ("ml", ["nightly"], 1_500)
    assert [row["request_id"] for row in facts("ledger", "list", "--team", "ml", "--status", "ok")["rows"]] == ["r0"]
    assert facts("ledger", "list", "--until", "1h")["rows"] == []
    assert len(facts("ledger", "list", "--since", "1h", "--limit", 2)["rows"]) == 2
    assert len(facts("ledger", "list", "--since", "2020-01-01")["rows"]) == 3
    last = run("ledger", "list").splitlines()[-1].split()
    assert last[-5:] == ["ok", "1,000", "0", "0.0015", "1.5"]
    groups = facts("ledger", "spend", "--by", "team", "--by", "model")["groups"]
    assert [(one["team"], one["model"], one["cost_nano"]) for one in groups] == [
        ("", "m0", 2 * 10**9),
        ("ml", "m0", 1_500_000),
        ("ml", "m1", 0),
    ]
    assert run("ledger", "spend").splitlines()[-1].split() == ["m1", "1", "1", "1,000", "0", "0.00"]


@pytest.mark.slow
def test_calls_of_strategies_are_listed_where_they_are_asked_for(run, facts, store, tmp_path):
    async def add():
        async with open_store(store) as opened:
            held = await opened.reserve("r3", ["global"], 10**9)
            call = LedgerRow(
                request_id="r3.1", cost_nano=2_000_000, purpose="judge", requested="m1", model="m1", strategy="s"
            )
            await opened.settle(held, LedgerRow(request_id="r3", cost_nano=1_000_000, requested="auto/s"), calls=[call])

    asyncio.run(add())
    rows = facts("ledger", "list", "--limit", 1)["rows"]
    assert [(row["request_id"], row["cost_nano"], row["calls"], row["calls_nano"]) for row in rows] == [
        ("r3", 1_000_000, 1, 2_000_000)
    ]
    assert run("ledger", "list", "--limit", 1).splitlines()[-1].split()[-2] == "0.003"
    rows = facts("ledger", "list", "--limit", 2, "--calls")["rows"]
    assert [(row["request_id"], row["parent_id"], row["cost_nano"]) for row in rows] == [
        ("r3", "", 1_000_000),
        ("r3.1", "r3", 2_000_000),
    ]
    *_, request, call = run("ledger", "list", "--limit", 2, "--calls").splitlines()
    assert (request.split()[-2], call.split()[-2]) == ("0.001", "0.002")
    assert "judge: m1" in call
    groups = facts("ledger", "spend", "--by", "purpose")["groups"]
    assert [(one["purpose"], one["requests"], one["calls"], one["cost_nano"]) for one in groups] == [
        ("", 4, 0, 2_002_500_000),
        ("judge", 0, 1, 2_000_000),
    ]
    assert facts("ledger", "export", "--out", tmp_path / "l.parquet")["rows"] == 5
    table = parquet.read_table(tmp_path / "l.parquet")
    assert sum(table["cost_nano"].to_pylist()) == 2_004_500_000
    assert table["parent_id"].to_pylist()[-2:] == ["r3", ""]
    assert str(table.schema.field("calls").type) == "int64"


def test_export(run, facts, tmp_path):
    assert facts("ledger", "export", "--out", tmp_path / "l.csv") == {"rows": 3, "wrote": str(tmp_path / "l.csv")}
    with (tmp_path / "l.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["request_id"] for row in rows] == ["r0", "r1", "r2"]
    assert (rows[0]["candidates"], rows[0]["cost_nano"], rows[0]["user"]) == ("m0 m1", "1500000", "'=ann")  # no formula
    run("ledger", "export", "--out", tmp_path / "l.parquet", "--status", "ok")
    table = parquet.read_table(tmp_path / "l.parquet")
    assert table["cost_nano"].to_pylist() == [1_500_000, 2_000_000_000]
    assert str(table.schema.field("cost_nano").type) == "int64"
    assert table["user"].to_pylist() == ["=ann", "=ann"]
    assert table["first_token_us"].null_count == 2


def test_export_goes_page_by_page(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["anabranch.cli.gateway.ledger"], "PAGE", 2)
    run("ledger", "export", "--out", tmp_path / "l.parquet")
    assert parquet.read_table(tmp_path / "l.parquet")["request_id"].to_pylist() == ["r0", "r1", "r2"]


def test_prune_and_backup(facts, here, store, tmp_path):
    assert facts("ledger", "backup", tmp_path / "copy.db") == {"wrote": str(tmp_path / "copy.db")}
    assert facts("ledger", "backup", tmp_path / "copy.db") == {
        "wrote": str(tmp_path / "copy.db")
    }  # a copy may be renewed
    # A disk that is not mounted is not replaced by a folder of its name.
    code, _, err = here("gateway", "ledger", "backup", tmp_path / "disk/daily/copy.db", "--store", store)
    assert (code, f"there is no folder {tmp_path / 'disk/daily'}; make it, or name another" in err) == (2, True)
    assert not (tmp_path / "disk").exists()
    (tmp_path / "thesis.txt").write_text("years of work")
    code, _, err = here("gateway", "ledger", "backup", tmp_path / "thesis.txt", "--store", store)
    assert (code, "thesis.txt is no SQLite store of a gateway, and would be lost" in err) == (2, True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert facts("ledger", "prune", "1d") == {"deleted": 0}
    time.sleep(1.1)
    assert facts("ledger", "prune", "1s") == {"deleted": 3}
    assert facts("ledger", "list")["rows"] == []
    assert facts("ledger", "list", "--store", tmp_path / "copy.db") is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("keys list --store nothing.db", "no store at nothing.db; give its place with --store, or make one"),
        (
            "keys revoke kx",
            "no keys have the name 'kx' or an id that begins so; anabranch gateway keys list shows them",
        ),
        ("keys create --period yearly", "the period is 'yearly'; use one of total, hour, day, week, month"),
        ("keys create --expires soon", "--expires is 'soon'; write a number and s, m, h, d or w, such as 90d"),
        ("keys create --tag ,", "the tag ',' may not be"),
        ("keys create --rpm 0", "--rpm is '0': it must be 1 or more"),
        ("budget set team:ml much", "'much' is no amount of dollars; write a number such as 0.25"),
        ("budget set team:ml -- -3", "a limit is -3000000000; it must be whole nano-dollars"),
        ("budget set everyone 3", "a budget is for 'everyone'; it must be global, key:ID, user:NAME"),
        ("budget set key:kx 3", "no keys have the name 'kx' or an id that begins so"),
        (
            "budget remove global",
            "there is no total budget of global; anabranch gateway budget list shows what there is",
        ),
        ("ledger list --since yesterday", "--since is 'yesterday'; write a date (2026-11-25, in UTC) or how long ago"),
        ("ledger spend --by tea", "spend by 'tea' is not known; use key, user, team"),
        ("ledger export --out rows.txt", "--out is 'rows.txt'; it must end in .csv or .parquet"),
        ("ledger export --out nowhere/x/../rows.csv --store nothing.db", "no store at nothing.db"),
        ("ledger list --store mysql://x/y", "the URL of the store cannot be read"),
        ("keys creat", "no such command 'creat'; did you mean 'create'?"),
    ],
)
def test_mistakes(here, store, monkeypatch, arguments, message):
    monkeypatch.setenv("ANABRANCH_STORE", store)
    code, out, err = here("gateway", *arguments.split())
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_spend_by_key_shows_names_beside_ids(run, facts, store):
    """Keys are known to all other commands by name; here they were ids alone."""

    async def more():
        async with open_store(store) as opened:
            _, key = await opened.create_key("web")
            held = await opened.reserve("r9", subjects_of(key), 10**9)
            await opened.settle(held, LedgerRow(request_id="r9", key_id=key.id, cost_nano=5 * 10**9, model="m0"))
            return key.id

    id = asyncio.run(more())
    groups = facts("ledger", "spend", "--by", "model", "--by", "key")["groups"]
    assert {one["key"]: one["key_name"] for one in groups}[id] == "web"
    assert {one["key_name"] for one in groups if one["key"]} == {"web", "ci"}
    assert {one["key_name"] for one in groups if not one["key"]} == {""}
    assert f"web ({id})" in run("ledger", "spend", "--by", "key")
    assert "key_name" not in facts("ledger", "spend")["groups"][0]
