"""No answer of the operators' interface holds up the requests beside it, however many rows it has, and however much is in one."""

import asyncio
import dataclasses
import json
import sys

import aiohttp
import pytest

from anabranch.gateway.config import AdminConfig, DeploymentConfig, GatewayConfig, ModelConfig, StrategyConfig
from anabranch.gateway.config.secret import Secret
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.http import admin
from anabranch.gateway.http.app import App
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.store import Budget, KeyRecord, LedgerRow, Spend, Store
from anabranch.gateway.store.records import DecisionRow, FeedbackRow, PreferenceRow
from anabranch.routers.money import Price
from anabranch.web.large_json import SLICE, is_light

ADMIN = {"authorization": "Bearer the-admin-key"}
# Calls of Python's functions between two turns of the loop: a slice of a thousand values takes some thousands, of two many thousands.
MOST_CALLS = 40_000
HEAVY = {
    "candidates": [{"model": f"model-{at}", "quality": 0.5, "cost": 0.1, "score": 0.3} for at in range(60)],
    "details": {"features": [0.25] * 384},
}


def filled(kind, at, **fields):
    """A record with a value for every field."""
    plain = {
        field.name: f"{field.name} {at}" if "str" in str(field.type) else 10**9 + at
        for field in dataclasses.fields(kind)
    }
    return kind(**{**plain, **fields})


def key(at):
    return KeyRecord(id=f"k{at}", name=f"key {at}", tags=("a", "b"), models=("small",))


def ledger_row(at):
    price = Price(input=1, output=2, tiers={"priority": Price(input=2, output=4)})
    return LedgerRow(request_id=f"r{at}", candidates=("small",), price=price, tags=("a",))


# By path: the methods of the store that it asks, and a row of each.
LISTS = {
    "keys": {"keys": key},
    "budgets": {"budgets": lambda at: filled(Budget, at)},
    "decisions": {"decisions": lambda at: filled(DecisionRow, at, body=HEAVY)},
    "feedback": {
        "feedbacks": lambda at: filled(FeedbackRow, at),
        "preferences": lambda at: filled(PreferenceRow, at),
    },
    "ledger": {"ledger": ledger_row},
    "spend": {"spend": lambda at: filled(Spend, at, group=(f"model {at}",))},
}
# As many as a config has deployments, strategies and words.
OF_CONFIG = {"providers", "strategies", "config"}


def counted(monkeypatch):
    """The most calls between two turns of a loop, as they grow."""
    found, now, run = [0], [0], asyncio.Handle._run

    def count(frame, event, argument):
        now[0] += event in ("call", "c_call")

    def counting(self):
        now[0] = 0
        sys.setprofile(count)
        try:
            run(self)
        finally:
            sys.setprofile(None)
            found[0] = max(found[0], now[0])

    monkeypatch.setattr(asyncio.Handle, "_run", counting)
    return found


def asked(tmp_path, monkeypatch, thing, num_rows):
    """What ``GET /admin/THING`` says, and the most calls between two turns while it does."""
    monkeypatch.setenv("ADMIN_TEST_KEY", "the-admin-key")
    config = GatewayConfig(
        models=(ModelConfig(name="small", deployments=(DeploymentConfig(provider=Mock.Config(model="small")),)),),
        strategies={"cheapest": StrategyConfig(use="cheapest")},
        admin=AdminConfig(key=Secret("env:ADMIN_TEST_KEY")),
        store=str(tmp_path / "g.db"),
    )

    def reads(rows):
        async def read(self, *given, **named):
            return rows

        return read

    async def main():
        async with Gateway(config) as gateway, aiohttp.ClientSession() as session:
            for name, row in LISTS.get(thing, {}).items():
                monkeypatch.setattr(Store, name, reads([row(at) for at in range(num_rows)]))
            server = App(gateway).server()
            listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
            url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/admin/{thing}"
            try:
                with monkeypatch.context() as patch:
                    most = counted(patch)
                    async with session.get(url, headers=ADMIN) as answer:
                        assert answer.status == 200
                        return json.loads(await answer.read()), most[0]
            finally:
                listener.close()
                await server.shutdown(0.1)

    return asyncio.run(main())


def told_at_once(monkeypatch):
    """What is told in one go, as it is."""
    found, told = [], admin.json_response

    def noted(value, *given):
        found.append(value)
        return told(value, *given)

    monkeypatch.setattr(admin, "json_response", noted)
    return found


def test_every_list_is_looked_at():
    routes = admin.AdminRoutes(None, None)._table
    assert {thing for thing, methods in routes.items() if "GET" in methods} == LISTS.keys() | OF_CONFIG


@pytest.mark.parametrize("thing", sorted(LISTS))
@pytest.mark.parametrize("num_rows", [admin.AT_ONCE, 1_500])
def test_no_list_is_told_in_one_go(tmp_path, monkeypatch, thing, num_rows):
    """Budgets were, however many there are, and any fifty rows, however much is in them: decisions hold all that a strategy saw."""
    at_once = told_at_once(monkeypatch)
    # So many decisions are as much as many rows of others.
    num_rows = min(num_rows, 100) if thing == "decisions" else num_rows
    told, most = asked(tmp_path, monkeypatch, thing, num_rows)
    assert all(is_light(value) for value in at_once)
    assert most < MOST_CALLS
    made = list(LISTS[thing].values())
    assert [len(rows) for rows in told.values()] == [num_rows] * len(made)
    for rows, row in zip(told.values(), made, strict=True):
        as_is = json.loads(json.dumps(dataclasses.asdict(row(num_rows - 1))))
        assert as_is.items() <= rows[-1].items()


@pytest.mark.parametrize("thing", sorted(OF_CONFIG))
def test_what_a_config_says_is_told(tmp_path, monkeypatch, thing):
    at_once = told_at_once(monkeypatch)
    asked(tmp_path, monkeypatch, thing, 0)
    assert all(is_light(value) for value in at_once)


def test_a_record_is_told_with_the_records_in_it_and_no_copy_of_the_rest():
    row = ledger_row(1)
    assert admin._fields(row) == dataclasses.asdict(row)
    decision = filled(DecisionRow, 1, body=HEAVY)
    assert admin._fields(decision)["body"] is HEAVY
    assert SLICE < len(json.dumps([HEAVY] * admin.AT_ONCE))
