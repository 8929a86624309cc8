"""The right to erasure: what strategies keep of texts goes, in this process and all others on the store, and from what they have stored."""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from anabranch.gateway.learning.kept import Kept
from anabranch.gateway.learning.services import LearningServices
from anabranch.gateway.learning.waiting import Waited, Waiting
from anabranch.gateway.store import learned
from anabranch.gateway.store.database import Connection
from anabranch.routers.contract.strategy import is_meant

if TYPE_CHECKING:
    from anabranch.gateway.lane import Lane

logger = logging.getLogger(__name__)

# Of orders, after which all processes that are alive have seen them.
KEPT_US = 86_400 * 10**6


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

    async def start(self) -> None:
        """Orders of before concern what is stored; `Kept` sees to that."""
        self._seen = await self._services.store.look(learned.newest_erasure)

    async def order(
        self, *, tenant: str | None, user: str | None = None, decision: str | None = None, request_id: str | None = None
    ) -> tuple[int, int]:
        """Have forgotten what `Strategy.forget` says, and the texts of the requests it is about.

        On return it is in no row of the store. Other processes forget it within seconds.

        Args:
            tenant, user, decision: see there.
            request_id: of the request whose decision it is.

        Returns how many examples there were in this process, and how many texts in the store.
        """
        order = {"tenant": tenant, "user": user, "decision": decision}
        store, lanes = self._services.store, self._lanes()
        now_us, names = store.now_us(), [lane.name for lane in lanes]
        # First in the store, so that nothing is taken over from it again.
        self._seen, gone = await store.change(lambda connection: _order(connection, names, order, now_us))
        num_texts = await store.change(
            lambda connection: learned.erase_texts(connection, request_id=request_id, key_id=tenant, user=user)
        )
        count = await self._apply(order)
        # What this process has stored without it is newer.
        await self._kept.save(lanes, at_once=True)
        for name in (*names, *gone):
            await store.change(lambda connection: learned.delete_before(connection, name, now_us))  # noqa: B023
        return count, num_texts

    async def expire(self, before_s: float) -> None:
        """Erase what strategies keep of texts from before unix second ``before_s``, here and in the store."""
        count, lanes = 0, self._lanes()
        # First what others have written, or it would come back with what they have.
        await self._kept.save(lanes)
        for lane in lanes:
            count += await lane.alone(lambda: lane.strategy.expire(before_s))  # noqa: B023
        if count:
            logger.info("%d examples were too old, and are erased", count)
            await self._kept.save(lanes, at_once=True)

    async def catch_up(self) -> None:
        """Forget what other processes were told to."""
        orders = await self._services.store.look(lambda connection: learned.read_erasures(connection, self._seen))
        for seq, _, text in orders:
            await self._apply(json.loads(text))
            self._seen = seq
        if orders:
            await self._kept.save(self._lanes(), at_once=True)

    def _lanes(self) -> "list[Lane]":
        return [lane for lane in self._services.lanes.values() if lane.can_forget]

    async def _apply(self, order: Mapping[str, Any]) -> int:
        count = 0
        self._waiting.forget(lambda waited: _is_meant(waited, order))
        for lane in self._lanes():
            count += await lane.forget(order)
        return count


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
