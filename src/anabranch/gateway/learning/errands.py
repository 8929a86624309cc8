"""What strategies have asked beside requests: calls with a reservation, a row in the ledger and a budget of their own."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from anabranch.errors import AnabranchError, CapacityError, InputError, LimitError
from anabranch.gateway.core import settlement
from anabranch.gateway.core.call_bodies import CallBodies
from anabranch.gateway.core.ledger_row import told_by
from anabranch.gateway.core.model_calls import bounded, check_priced, paid_plan, upstream_request, worst_nano
from anabranch.gateway.core.purse import Purse
from anabranch.gateway.dispatch import Report
from anabranch.gateway.dispatch.senders import own_sender
from anabranch.gateway.learning.services import LearningServices
from anabranch.gateway.logged_error import words
from anabranch.gateway.providers.provider import UpstreamError
from anabranch.gateway.store import LEARNING, KeyRecord, LedgerRow, Reservation
from anabranch.gateway.store.records import GLOBAL
from anabranch.routers.contract.strategy import Strategy
from anabranch.routers.money import Price, nano_dollars
from anabranch.web.ids import new_id
from anabranch.web.turns import in_task

if TYPE_CHECKING:
    from anabranch.gateway.lane import Lane

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Between two rounds.
EVERY_S = 10.0

# Of a call: nobody waits for it.
LONGEST_S = 120.0

# Of one round of errands of one strategy.
ROUND_S = 600.0

# Whose budgets pay.
SUBJECTS = (GLOBAL, f"tag:{LEARNING}")


class LaneErrands:
    """The `Errands` of one strategy.

    Attributes:
        asked: calls made.

    Args:
        services: of a gateway that is started.
        lane: of the strategy.
        key: a valid key, by its id; None for one that is not there.
    """

    def __init__(self, services: LearningServices, lane: "Lane", key: Callable[[str], KeyRecord | None]) -> None:
        self._services, self._lane, self._key = services, lane, key
        self.judge, self.asked = services.config.learning.judge, 0

    async def alone(self, work: Callable[[], T]) -> T:
        """See `Errands`."""
        return await self._lane.alone(work)

    def may_ask(self, tenant: str, models: Sequence[str]) -> bool:
        """Whether the key of the tenant is valid and may use them all; without keys, anybody may."""
        if not tenant:
            return not self._services.config.require_key
        key = self._key(tenant)
        return key is not None and all(key.allows(model) for model in models)

    async def ask(self, model: str, messages: Sequence[Mapping[str, Any]], *, temperature: float) -> str:
        """See `Errands`: charged to the tag ``learning``, and to no key."""
        store, runtime = self._services.store, self._services.runtime
        if model not in runtime.models:
            raise InputError(f"strategy {self._lane.name} asks for model {model!r}, which is not in the config")
        body: dict[str, Any] = {"model": model, "messages": list(messages), "temperature": temperature}
        id, report, began = new_id(), Report(), time.perf_counter()
        purse = Purse(
            lambda nano: store.reserve(id, SUBJECTS, nano, requested=model, strategy=self._lane.name),
            store.grow,
            has_budget=lambda: store.has_budget(SUBJECTS),
        )
        status = "cancelled"
        with runtime.used():
            looked = await CallBodies(runtime, LEARNING).look(body)
            body, most = bounded(runtime, body, looked)
            request = upstream_request(body, id, looked)
            try:
                await check_priced(runtime, purse, model, looked.asked)
                async with purse.holding(worst_nano(runtime, model, most)) as hold:
                    self.asked += 1
                    deadline = runtime.dispatcher.now() + LONGEST_S
                    plan = paid_plan(runtime, purse, hold, model, most, report, deadline, own_sender(LEARNING))
                    try:
                        answer = await runtime.dispatcher.complete(plan, request)
                        status = "ok"
                    finally:
                        hold.cost_nano = report.cost
            except UpstreamError as error:
                status = "error"
                raise CapacityError(f"{model} gave no answer: {error}") from None
            finally:
                if not purse.is_empty:
                    self._settle(
                        id,
                        purse,
                        report,
                        runtime.dispatcher.price_of(model, report.deployment),
                        model,
                        status,
                        time.perf_counter() - began,
                    )
        return answer.text

    def _settle(
        self, id: str, purse: Purse, report: Report, price: Price | None, model: str, status: str, took_s: float
    ) -> None:
        """Write its row, as soon as it is known what it cost."""
        services = self._services

        def known() -> LedgerRow:
            return LedgerRow(
                request_id=id,
                tags=(LEARNING,),
                requested=model,
                strategy=self._lane.name,
                **told_by(report),
                price=price if report.model else None,
                latency_us=round(took_s * 1e6),
                status=status,
            )

        def write(held: Reservation | None) -> None:
            # Whoever asked was gone before there was money, and then there was none.
            if held is not None:
                settlement.write(services.store, held, known())
            services.unsettled.discard(id)

        services.unsettled.add(id, known())
        settlement.settle(purse, [report], write)


class ErrandRounds:
    """Those of all strategies of a gateway.

    Args:
        services: of a gateway that is started.
        key: see `LaneErrands`.
    """

    def __init__(self, services: LearningServices, key: Callable[[str], KeyRecord | None]) -> None:
        self._services, self._key = services, key

    async def start(self) -> None:
        """Set the budget of the config, where there is a judge to spend it."""
        config = self._services.config.learning
        if config.judge:
            await self._services.store.set_budget(SUBJECTS[1], nano_dollars(config.budget_usd), "day")

    def of(self, lane: "Lane") -> LaneErrands:
        """Those of one strategy."""
        return LaneErrands(self._services, lane, self._key)

    async def once(self) -> None:
        """One round of each strategy, one after another."""
        for lane in list(self._services.lanes.values()):
            await self._round(lane)

    async def forever(self) -> None:
        """A round of each strategy every few seconds, beside those of others; none while its last one goes on."""
        running: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                await asyncio.sleep(EVERY_S)
                running = {name: task for name, task in running.items() if not task.done()}
                for name, lane in self._services.lanes.items():
                    if name not in running:
                        running[name] = asyncio.ensure_future(self._round(lane))
        finally:
            for task in running.values():
                task.cancel()
            await asyncio.gather(*running.values(), return_exceptions=True)

    async def _round(self, lane: "Lane") -> None:
        """Upkeep of one strategy, and its errands. What cannot be had is left to the next round."""
        strategy, pool = lane.strategy, self._services.runtime.dispatcher.pool()
        try:
            if type(strategy).upkeep is not Strategy.upkeep:
                await lane.alone(lambda: strategy.upkeep(pool))
            if type(strategy).errands is not Strategy.errands:
                await _run(strategy, self.of(lane), lane)
        except LimitError as error:
            logger.info("strategy %s asks no more for now: %s", lane.name, words(error))
        except TimeoutError:
            logger.warning(
                "strategy %s is not done with its errands within %g s; they are given up", lane.name, ROUND_S
            )
        except AnabranchError as error:
            logger.warning("strategy %s could not have asked what it wanted: %s", lane.name, words(error))
        except Exception as error:
            logger.error("the upkeep of strategy %s failed: %s", lane.name, type(error).__name__, exc_info=error)


async def _run(strategy: Strategy, errands: LaneErrands, lane: "Lane") -> None:
    try:
        await in_task(lambda: strategy.errands(errands), ROUND_S)
    finally:
        if errands.asked:
            lane.touch()
