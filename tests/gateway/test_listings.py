"""What a sender may look up: models that its key may use, and what is known of the key."""

import asyncio

import pytest

from anabranch.gateway.config import LimitsConfig
from anabranch.gateway.listings import key_facts, listed_model, listed_models
from anabranch.gateway.store import KeyRecord, LedgerRow, open_store
from anabranch.web.api_error import ApiError
from gateway_states import config, model

OF = config(model("small", aliases=("mini",)), model("large"), limits=LimitsConfig(rpm=9, tpm=1000))


def test_models_are_those_that_the_key_may_use_and_strategies_are_everybody_s():
    def names(record):
        return [one["id"] for one in listed_models(OF, record, 1.5)]

    assert {"small", "mini", "large", "auto", "auto/cheapest"} <= set(names(None))
    few = names(KeyRecord(id="k", models=("large",)))
    assert not {"small", "mini"} & set(few)
    assert {"large", "auto"} <= set(few)
    assert listed_model(OF, "mini", None, 1.5) == {
        "id": "mini",
        "object": "model",
        "created": 1,
        "owned_by": "anabranch",
    }
    with pytest.raises(ApiError, match=r"there is no model 'smal'; .*small") as caught:
        listed_model(OF, "smal", None, 1.5)
    assert caught.value.status == 404


def test_a_key_knows_its_own_budgets_and_what_it_spent_of_late(tmp_path):
    async def work():
        now = [1e9]
        async with open_store(str(tmp_path / "g.db"), clock=lambda: now[0]) as store:
            _, record = await store.create_key("ann's", tpm=5)
            await store.set_budget(f"key:{record.id}", 10**9, "day")
            await store.set_budget("global", 10**9)
            for id, days in (("old", 31), ("new", 0)):
                now[0] = 1e9 + 86_400 * (40 - days)
                held = await store.reserve(id, (f"key:{record.id}",), 5 * 10**8)
                await store.settle(held, LedgerRow(request_id=id, key_id=record.id, cost_nano=25 * 10**7))
            return record, await key_facts(store, OF, record, now[0])

    record, found = asyncio.run(work())
    assert (found["id"], found["name"], found["rpm"], found["tpm"]) == (record.id, "ann's", 9, 5)
    assert found["last_30_days"] == {"requests": 1, "spent_usd": 0.25}
    [budget] = found["budgets"]
    assert (budget["period"], budget["limit_usd"], budget["spent_usd"], budget["remaining_usd"]) == (
        "day",
        1.0,
        0.25,
        0.75,
    )
