"""SCALE in a gateway in this process: what changes under it while it runs, and what a request may have in all."""

import json

import pytest

from anabranch.errors import InputError
from anabranch.gateway.config import (
    DeploymentConfig,
    GatewayConfig,
    LimitsConfig,
    LostConfig,
    ModelConfig,
    RetryConfig,
    StrategyConfig,
)
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.store import LedgerQuery
from anabranch.routers.money import Price, nano_dollars
from anabranch.routers.scale import Scale
from anabranch.web.api_error import ApiError
from paced_time import run_paced

BODY = {"model": "auto/scale", "messages": [{"role": "user", "content": "Why?"}], "max_tokens": 20}
# What small says: an outline, a choice of it and a score in one, however little sense it makes as an answer.
OUTLINE = '{"step1": "Find a.", "step2": "Add it."}'


def config(tmp_path, *, dollars=1, limits=None, small=OUTLINE, deadline_s=120.0, **behaviour):
    def model(name, price, reply, **more):
        provider = Mock.Config(model=name, reply=reply, **more)
        return ModelConfig(name=name, price=price, max_tokens=100, deployments=(DeploymentConfig(provider=provider),))

    return GatewayConfig(
        models=(
            model("small", Price.of_dollars(dollars, dollars), small, **behaviour),
            model("large", Price.of_dollars(10 * dollars, 10 * dollars), r"It is \boxed{4}", **behaviour),
        ),
        strategies={
            "cheapest": StrategyConfig(use="cheapest"),
            "scale": StrategyConfig(use="scale", fields={"decomposer": {"kind": "prompt", "k": 2}}),
        },
        default_strategy="cheapest",
        require_key=False,
        store=str(tmp_path / "g.db"),
        retries=RetryConfig(attempts=1),
        lost=LostConfig(read_on_s=0),
        limits=limits or LimitsConfig(),
        deadline_s=deadline_s,
    )


def run(config, work, **strategies):
    """What ``work(gateway)`` gives, the rows of the ledger, and the trace of the last decision; the books are even."""

    async def main():
        async with Gateway(config, strategies=strategies) as gateway:
            await gateway.store.set_budget("global", nano_dollars(1))
            found = await work(gateway)
            await gateway.settled()
            rows = await gateway.store.ledger(LedgerQuery(calls=True, limit=1000, newest_first=False))
            [budget] = await gateway.store.budgets()
            assert (budget.reserved_nano, budget.spent_nano) == (0, sum(row.cost_nano for row in rows))
            [decision, *_] = await gateway.store.decisions()
            return found, rows, decision.body["details"].get("trace", [])

    return run_paced(main())


def test_a_price_that_changes_meanwhile_is_that_of_the_next_request(tmp_path):
    """The config is read anew, at ten times the price, while the first request is at its second step."""
    dear = config(tmp_path, dollars=10)

    class Reloading(Scale):
        async def run(self, request, ask):
            async for event in super().run(request, ask):
                yield event
                if getattr(event, "name", "") == "outline" and not done:
                    done.append(event)
                    await gateways[0].reload(dear)

    done, gateways = [], []

    async def work(gateway):
        gateways.append(gateway)
        return [await gateway.achat(BODY) for _ in range(2)]

    made = Reloading(gateway_fields(config(tmp_path)))
    found, rows, trace = run(config(tmp_path), work, scale=made)
    assert [one["choices"][0]["message"]["content"] for one in found] == [r"It is \boxed{4}"] * 2
    first, second = ([row for row in rows if row.parent_id == one.request_id] for one in rows if not one.parent_id)
    assert len(first) == len(second) > 0
    assert [10 * row.cost_nano for row in first] == [row.cost_nano for row in second]
    told = [trace[-1][part] for part in ("overhead", "solving", "lost")]
    assert sum(one["cost"] for one in told) == pytest.approx(sum(row.cost_nano for row in second) / 1e9)


def gateway_fields(made):
    from anabranch.gateway.config import make_strategy

    return make_strategy(made.strategies["scale"]).config


def test_a_request_may_not_cost_more_than_it_may(tmp_path):
    """A request may cost as much as the outlines, a score and a step of System 1; for System 2 nothing is left."""

    async def work(gateway):
        return await gateway.achat(BODY)

    limits = LimitsConfig(request_usd=0.002)
    found, rows, trace = run(config(tmp_path, limits=limits), work)
    assert sum(row.cost_nano for row in rows) <= nano_dollars(0.002)
    assert {row.model for row in rows if row.parent_id} == {"small"}
    assert trace[-1]["is_degraded"] is True
    assert found["choices"][0]["message"]["content"]


def test_a_request_is_answered_within_its_time_however_slow_models_are(tmp_path):
    """All that could be asked takes longer than there is: scores that cannot be read are given up, and System 1 does the rest."""

    async def work(gateway):
        return await gateway.achat(BODY)

    found, rows, trace = run(config(tmp_path, latency_s=0.25, deadline_s=2.0), work)
    assert found["choices"][0]["message"]["content"]
    assert trace[-1]["is_degraded"] is True
    assert len(rows) <= 8


def test_few_calls_are_shared_out(tmp_path):
    """Of four calls two are outlines, one is a step and one the answer; no more are made."""

    async def work(gateway):
        return await gateway.achat(BODY)

    found, rows, trace = run(config(tmp_path, limits=LimitsConfig(strategy_calls=4)), work)
    assert sum(bool(row.parent_id) for row in rows) == 4
    assert found["choices"][0]["message"]["content"] == r"It is \boxed{4}"
    assert (trace[-1]["is_degraded"], trace[-1]["is_whole"]) == (True, True)


def test_without_any_calls_a_model_answers(tmp_path):
    async def work(gateway):
        return await gateway.achat(BODY)

    found, _, _ = run(config(tmp_path, limits=LimitsConfig(strategy_calls=0)), work)
    assert found["choices"][0]["message"]["content"] == r"It is \boxed{4}"


def test_what_it_is_and_would_do_is_told(tmp_path):
    async def work(gateway):
        with pytest.raises(ApiError, match="a program"):
            await gateway.achat({**BODY, "n": 2})
        await gateway.achat(BODY)
        return await gateway.runtime.decider.lanes["scale"].explain(*asked(gateway))

    found, _, _ = run(config(tmp_path), work)
    assert json.loads(json.dumps(found))["details"] == {"system1": "small", "system2": "large", "tau": 0.5}


def asked(gateway):
    from anabranch.routers.contract.query import Model, Pool, Query

    models = tuple(Model(name=one.name, price=one.price) for one in gateway.config.models)
    return Query(text="x"), Pool(models)


def test_a_picture_alone_is_answered_by_a_model(tmp_path):
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}

    async def work(gateway):
        try:
            return await gateway.achat({**BODY, "messages": [{"role": "user", "content": [picture]}]})
        except (ApiError, InputError) as error:
            return str(error)

    # The scripted models take no pictures, which they say themselves: the program did not stand in their way.
    found, _, _ = run(config(tmp_path), work)
    assert "mock" in str(found) or r"\boxed{4}" in str(found)
