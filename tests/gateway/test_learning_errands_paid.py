"""What strategies have asked beside requests costs as much as what requests ask: lost calls are in the ledger and the budget."""

import asyncio

import pytest

from anabranch.errors import BudgetError, CapacityError
from anabranch.gateway.config import (
    BreakerConfig,
    DeploymentConfig,
    GatewayConfig,
    LearningConfig,
    LostConfig,
    ModelConfig,
    RetryConfig,
    StrategyConfig,
)
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.store import LedgerQuery
from anabranch.routers.contract.query import Candidate, Decision
from anabranch.routers.contract.strategy import Strategy
from anabranch.routers.money import Price
from paced_time import run_paced

PRICE = Price.of_dollars(1, 20)
MESSAGES = [{"role": "user", "content": "hello"}]

# Of one attempt: at most 12 tokens of prompt and 100 of an answer. Of what the mock gives: a word, and four tokens.
MOST, TOLD = 12 * 1_000 + 100 * 20_000, 1_000 + 4 * 20_000


def config(tmp_path, script, **fields):
    provider = Mock.Config(model="judge", tokens=4, script=script)
    deployment = DeploymentConfig(provider=provider, timeout_s=0.05)
    fields = {"retries": RetryConfig(base_s=0.0), "lost": LostConfig(read_on_s=0), **fields}
    return GatewayConfig(
        models=(ModelConfig(name="judge", price=PRICE, max_tokens=100, deployments=(deployment,)),),
        require_key=False,
        store=str(tmp_path / "g.db"),
        strategies={"s": StrategyConfig(use="cheapest")},
        default_strategy="s",
        **{"learning": LearningConfig(judge="judge", budget_usd=1.0), **fields},
    )


def run(config, work, strategies=None):
    """What ``work(gateway)`` gives, the rows of errands and the budget of them; nothing may be left held."""

    async def main():
        async with Gateway(config, strategies=strategies) as gateway:
            found = await work(gateway)
            await gateway.settled()
            rows = await gateway.store.ledger(LedgerQuery(newest_first=False))
            [budget] = await gateway.store.budgets()
            assert gateway.runtime.users == 0
            assert (budget.reserved_nano, budget.spent_nano) == (0, sum(row.cost_nano for row in rows))
            assert all(row.tags == ("learning",) and row.cost_nano <= row.reserved_nano for row in rows)
            return found, rows, budget

    return run_paced(main())


async def ask(gateway):
    lane = gateway.errands.of(gateway.runtime.decider.lanes["s"])
    return await lane.ask("judge", MESSAGES, temperature=0)


def test_what_an_errand_loses_is_charged_its_worst(tmp_path):
    """As of a request: two attempts that timed out, and the answer of the third."""
    _, [row], _ = run(config(tmp_path, ("hang", "hang", "ok")), ask)
    assert (row.attempts, row.status, row.cost_nano, row.reserved_nano) == (3, "ok", 2 * MOST + TOLD, 3 * MOST)


def test_an_errand_that_is_read_on_is_written_once_it_is_known_what_it_cost(tmp_path):
    async def work(gateway):
        await ask(gateway)
        assert await gateway.store.ledger() == []

    made = config(tmp_path, ("slow:0.3", "ok"), lost=LostConfig(read_on_s=5))
    _, [row], _ = run(made, work)
    assert (row.attempts, row.cost_nano, row.is_estimated) == (2, 2 * TOLD, False)


def test_attempts_of_errands_do_not_pass_their_budget(tmp_path):
    """Two fit in it; the third is not made, and no further errand."""

    refused = []

    class Asks(Strategy):
        def route(self, query, pool):
            return Decision(candidates=(Candidate(model="judge", score=1),), strategy="s", reason="so")

        async def errands(self, run):
            try:
                await run.ask("judge", MESSAGES, temperature=0)
            except (BudgetError, CapacityError) as error:
                refused.append(type(error))
                raise

    async def work(gateway):
        for _ in range(3):
            await gateway.errands.once()

    learning = LearningConfig(judge="judge", budget_usd=(2 * MOST + 1) / 1e9)
    made = config(
        tmp_path,
        ("hang",) * 9,
        learning=learning,
        retries=RetryConfig(attempts=3, base_s=0, budget=1),
        breaker=BreakerConfig(failures=1000),
    )
    _, [row], budget = run(made, work, {"s": Asks(None)})
    assert (row.attempts, row.status, row.cost_nano) == (2, "error", 2 * MOST)
    assert budget.spent_nano <= budget.limit_nano
    assert refused == [CapacityError, BudgetError, BudgetError]


@pytest.mark.parametrize("after_s", [0.0, 0.02])
def test_an_errand_that_is_cancelled_leaves_nothing_held(tmp_path, after_s):
    """Before its money is there, or while its model is asked."""

    async def work(gateway):
        task = asyncio.create_task(ask(gateway))
        await asyncio.sleep(after_s)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.05)

    _, rows, _ = run(config(tmp_path, ("hang",)), work)
    assert [row.status for row in rows] in ([], ["cancelled"])
    if after_s:
        assert rows[0].cost_nano == MOST


def test_a_model_of_an_errand_ends_before_its_config_is_closed(tmp_path):
    async def work(gateway):
        task = asyncio.create_task(ask(gateway))
        await asyncio.sleep(0.01)
        old = gateway.runtime
        assert old.users == 1
        await gateway.reload(gateway.config.replace(deadline_s=gateway.config.deadline_s + 1))
        return await task, old.users

    (text, users), [row], _ = run(config(tmp_path, ("slow:0.04",)), work)
    assert (row.status, users) == ("ok", 0)
    assert text
