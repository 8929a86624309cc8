"""The right to erasure: what strategies keep of texts goes, in this process and all others on the store, and from what they have stored."""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from anabranch.errors import AnabranchError
from anabranch.gateway.learning.kept import Kept
from anabranch.gateway.learning.services import LearningServices
from anabranch.gateway.learning.waiting import Waited, Waiting
from anabranch.gateway.logged_error import raised, words
from anabranch.gateway.owed import FORGETTING_S, MOST
from anabranch.gateway.store import learned
from anabranch.gateway.store.database import Connection
from anabranch.routers.contract.strategy import is_meant

if TYPE_CHECKING:
    from anabranch.gateway.lane import Lane

logger = logging.getLogger(__name__)

# Of orders, after which all processes that are alive have seen them.
KEPT_US = 86_400 * 10**6


class NotForgottenError(AnabranchError):
    """A strategy failed at an order to forget; it is told again."""


class Erasures:
    """Orders to forget. Of one gateway, on its event loop.

    Args:
        services: of the gateway.
        kept: what its strategies have stored.
        waiting: outcomes that a score may still come for.
    """

    def __init__(self, services: LearningServices, kept: Kept, waiting: Waiting) -> None:
        self._services, self._kept, self._waiting = services, kept, waiting
        self._seen = 0
        # Numbers of orders of this process, beyond those: between two of them there may be one of another process.
        self._own: set[int] = set()

    async def start(self) -> None:
        """Orders of before concern what is stored; `Kept` sees to that."""
        self._seen = await self._services.store.look(learned.newest_erasure)

    async def order(
        self, *, tenant: str | None, user: str | None = None, decision: str | None = None, request_id: str | None = None
    ) -> tuple[int, int]:
        """Have forgotten what `Strategy.forget` says, and the texts of the requests it is about.

        On return it is in no row of the store. Other processes forget it within seconds. A strategy that fails keeps no other from it;
        it is told again every few seconds, and until it has obeyed nothing of it is stored.

        Args:
            tenant, user, decision: see there.
            request_id: of the request whose decision it is.

        Returns how many examples there were in this process, and how many texts in the store. Raises NotForgottenError, once all else is
        done, where a strategy has not obeyed yet.
        """
        order = {"tenant": tenant, "user": user, "decision": decision}
        store, lanes = self._services.store, self._lanes()
        now_us, names = store.now_us(), [lane.name for lane in lanes]
        # First in the store, so that nothing is taken over from it again.
        number, gone = await store.change(lambda connection: _order(connection, names, order, now_us))
        self._own.add(number)
        num_texts = await store.change(
            lambda connection: learned.erase_texts(connection, request_id=request_id, key_id=tenant, user=user)
        )
        count, failed = await self._apply(order)
        # What this process has stored without it is newer.
        await self._kept.save(lanes, at_once=True)
        owing = [lane.name for lane in lanes if lane.owed]
        for name in (*names, *gone):
            await store.change(lambda connection: learned.delete_before(connection, name, now_us))  # noqa: B023
            if name in owing:
                # It may have been written here when the order came. What others wrote since, who have obeyed, is theirs.
                await store.change(lambda connection: learned.delete_own(connection, name, store.replica))  # noqa: B023
        if failed:
            raise NotForgottenError(_not_forgotten(failed, order))
        return count, num_texts

    async def expire(self, before_s: float) -> None:
        """Erase what strategies keep of texts from before unix second ``before_s``, here and in the store."""
        count, lanes = 0, self._lanes()
        # First what others have written, or it would come back with what they have.
        await self._kept.save(lanes)
        for lane in lanes:
            count += await _told(lane, lane.expire(before_s), "erase what is too old") or 0
        if count:
            logger.info("%d examples were too old, and are erased", count)
            await self._kept.save(lanes, at_once=True)

    async def catch_up(self) -> None:
        """Forget what other processes were told to, and what strategies failed to forget before."""
        orders = await self._services.store.look(lambda connection: learned.read_erasures(connection, self._seen))
        found = [json.loads(text) for number, _, text in orders if number not in self._own]
        for order in found:
            self._waiting.forget(lambda waited: _is_meant(waited, order))  # noqa: B023
        await asyncio.gather(*(_round(lane, found) for lane in self._lanes()))
        if orders:
            self._seen = orders[-1][0]
            self._own = {number for number in self._own if number > self._seen}
        if found:
            await self._kept.save(self._lanes(), at_once=True)

    def _lanes(self) -> "list[Lane]":
        return [lane for lane in self._services.lanes.values() if lane.can_forget]

    async def _apply(self, order: Mapping[str, Any]) -> "tuple[int, list[Lane]]":
        """How many examples there were, and the strategies that failed."""
        self._waiting.forget(lambda waited: _is_meant(waited, order))
        lanes = self._lanes()
        # Beside one another: nobody waits for what takes another long.
        counts = await asyncio.gather(*(_told(lane, lane.forget(order), "forget") for lane in lanes))
        failed = [lane for lane, count in zip(lanes, counts, strict=True) if count is None]
        return sum(count or 0 for count in counts), failed


async def _round(lane: "Lane", orders: Sequence[Mapping[str, Any]]) -> None:
    """What one strategy owes, and orders that are new to it, in the time of one round; what there is none left for it owes."""
    end_s = time.monotonic() + FORGETTING_S
    await _told(lane, lane.obey(), "forget")
    for order in orders:
        await _told(lane, lane.forget(order, end_s - time.monotonic()), "forget")


async def _told(lane: "Lane", work: Awaitable[int], what: str) -> int | None:
    """What one strategy says it forgot; None where it failed, which keeps the others from nothing."""
    try:
        return await work
    except AnabranchError as error:
        logger.warning("strategy %s could not %s: %s", lane.name, what, words(error))
    except Exception as error:
        logger.error("strategy %s could not %s: %s", lane.name, what, raised(error))
    return None


def _not_forgotten(failed: "Sequence[Lane]", order: Mapping[str, Any]) -> str:
    """What is told of an order that strategies failed at."""
    names, full = ", ".join(lane.name for lane in failed), [lane.name for lane in failed if lane.owed.is_over]
    text = f"strategy {names} has not forgotten yet what it was told to: it failed, as the log says, and is told again every few seconds; "
    if full:
        text += (
            f"but {', '.join(full)} owes {MOST} orders by now, and is not told again of more: send this one again once it can forget, or "
            "start the gateway anew, since nothing of it is stored until then; "
        )
    return text + "all else is forgotten"


def _order(
    connection: Connection, strategies: Sequence[str], order: Mapping[str, Any], now_us: int
) -> tuple[int, list[str]]:
    """Write an order, and erase what it is about; its number, and strategies with examples that are not among ``strategies``."""

    def is_theirs(body: str) -> bool:
        try:
            return is_meant(json.loads(body), **order)
        except (ValueError, AttributeError, RecursionError):
            # Damaged: nobody can say whose it is.
            return True

    found = learned.with_examples(connection)
    for strategy in found:
        learned.erase_examples(connection, strategy, is_theirs, now_us)
    number = learned.put_erasure(connection, json.dumps(order), now_us, now_us - KEPT_US)
    return number, [name for name in found if name not in strategies]


def _is_meant(waited: Waited, order: Mapping[str, Any]) -> bool:
    decision = waited.outcome.decision
    if order["decision"] is not None:
        return decision is not None and decision.details.get("id") == order["decision"]
    if order["tenant"] is None:
        return True
    return waited.key_id == order["tenant"] and order["user"] in (None, waited.outcome.query.user)
