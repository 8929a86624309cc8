"""What strategies are told of how requests ended and of what was said of them, as far as whoever says it may teach them."""

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from anabranch.errors import AnabranchError
from anabranch.gateway.config.strategies import Who
from anabranch.gateway.learning.fair import FairShare
from anabranch.gateway.learning.permission import is_learned_of, may_score, may_teach
from anabranch.gateway.learning.services import LearningServices
from anabranch.gateway.learning.waiting import Waiting
from anabranch.gateway.store import KeyRecord, LedgerQuery, LedgerRow, SaidBeforeError
from anabranch.routers.contract.query import Outcome
from anabranch.web.api_error import ApiError, wrong

if TYPE_CHECKING:
    from anabranch.gateway.lane import Lane

logger = logging.getLogger(__name__)

# How long the number of keys is taken to be what it was, while scores come.
FRESH_S = 1.0

# Scores that are looked at again, since they may become visible in another order than that of their numbers.
OVERLAP = 200


class Teaching:
    """See the module. Of one gateway, on its event loop.

    Attributes:
        waiting: outcomes that a score may still come for.

    Args:
        services: of a gateway that is started before anything is taught.
    """

    def __init__(self, services: LearningServices) -> None:
        self._services = services
        self.waiting = Waiting()
        # By strategy, and whether the outcomes are scored: what comes by itself leaves the room for scores as it is.
        self._shares: dict[tuple[str, bool], FairShare] = {}
        self._keys: dict[str, KeyRecord] = {}
        self._keys_read_s = 0.0
        # Requests that are being scored now, and by whom.
        self._scoring: set[tuple[str, str]] = set()
        # Scores that wait for the row of their request.
        self._later: set[asyncio.Task[None]] = set()
        self._last_seq = 0

    async def start(self) -> None:
        """Learn which keys there are, and what is no news."""
        await self.read_keys()
        self._last_seq = await self._services.store.newest_score()

    # Requests that end

    def ended(self, strategy: str, row: LedgerRow, outcome: Outcome) -> None:
        """Remember what came of a decision until somebody scores it; what it cost may not be known yet."""
        if self._lane(strategy) is not None:
            self.waiting.put(row.request_id, strategy, row.key_id, row.team, outcome)

    def priced(self, strategy: str, row: LedgerRow, outcome: Outcome) -> None:
        """Tell a strategy what came of its decision, now that it is known what it cost."""
        lane = self._lane(strategy)
        if lane is None:
            return
        self.waiting.price(row.request_id, outcome.cost)
        if self._is_taught_by_request(lane, row) and self._admit(
            lane, row.key_id, self.key(row.key_id), is_scored=False
        ):
            lane.observe(outcome)
        elif lane.strategy.keeps_answers:
            # What it keeps is the sender's own. What would move what all share is left out.
            lane.observe(replace(outcome, cost=None, latency_s=None))

    def _is_taught_by_request(self, lane: "Lane", row: LedgerRow) -> bool:
        """Whether what a request cost and how long it took may teach a strategy: as if its key said so."""
        who = self._who(lane)
        if who in ("admin", "none"):
            key = self._keys.get(row.key_id)
            return who == "admin" and key is not None and key.is_admin
        return is_learned_of(lane.settings, row.key_id, row.team)

    # Scores

    async def score(self, body: Mapping[str, Any], giver: KeyRecord | None) -> tuple[LedgerRow, float, bool]:
        """Take ``POST /v1/feedback``: the store keeps it, and the strategy that chose may learn from it.

        Returns the request, its score, and whether the strategy was told. Raises ApiError.
        """
        id, score, comment = _read(body)
        whose = "" if giver is None else giver.id
        if (id, whose) in self._scoring:
            raise _scored_before(id)
        self._scoring.add((id, whose))
        is_written = True
        try:
            row, is_written = await self._row(id, giver)
            if is_written:
                await self._keep(row, score, whose, comment)
            else:
                self._keep_later(row, score, whose, comment)
            # Where one key is new, others may be.
            await self.read_keys(0.0 if giver is not None and giver.id not in self._keys else FRESH_S)
        except SaidBeforeError:
            raise _scored_before(id) from None
        finally:
            if is_written:
                self._scoring.discard((id, whose))
        return row, score, self._learn(id, score, giver)

    async def _row(self, id: str, giver: KeyRecord | None) -> tuple[LedgerRow, bool]:
        """The request, and whether it is in the store already, if the giver may say something of it.

        What it may not, is not told from what is not there. Raises ApiError (404).
        """
        # Its row may still wait for what a call costs that was given up; whose it is, is known.
        row = await self._services.unsettled.row(id)
        is_written = row is None
        if row is None:
            row = next(iter(await self._services.store.ledger(LedgerQuery(request_id=id))), None)
        lane = None if row is None else self._lane(row.strategy)
        who = self._services.config.feedback.who if lane is None else self._who(lane)
        if row is None or not may_score(who, giver, row.key_id, row.team):
            raise ApiError(404, "unknown_request", f"there is no request {id!r}", param="request_id")
        return row, is_written

    async def _keep(self, row: LedgerRow, score: float, whose: str, comment: str) -> None:
        """Have the store keep a score. Raises SaidBeforeError, CapacityError."""
        await self._services.store.feedback(
            row.request_id, score, key_id=whose, owner=row.key_id, comment=comment, once=True
        )

    def _keep_later(self, row: LedgerRow, score: float, whose: str, comment: str) -> None:
        """Have the store keep a score of a request as soon as it has its row."""

        async def later() -> None:
            try:
                await self._services.unsettled.wait(row.request_id)
                await self._keep(row, score, whose, comment)
            except AnabranchError as error:
                logger.warning("a score of request %s is not kept: %s", row.request_id, error)
            finally:
                self._scoring.discard((row.request_id, whose))

        task = asyncio.ensure_future(later())
        self._later.add(task)
        task.add_done_callback(self._later.discard)

    async def close(self) -> None:
        """Wait until all scores are kept: before the store closes, once nothing is read on any more."""
        if self._later:
            await asyncio.wait(list(self._later))

    async def catch_up(self) -> None:
        """Learn from scores that other processes on the same store were sent for requests that were decided here."""
        store = self._services.store
        for seq, id, key_id, score in await store.scores_after(self._last_seq - OVERLAP):
            self._last_seq = max(self._last_seq, seq)
            giver = self._keys.get(key_id)
            # A key that is not known, or has ended, is not nobody.
            is_known = giver is not None or not key_id
            if is_known and id in self.waiting and (id, key_id) not in self._scoring:
                self._learn(id, score, giver)

    def _learn(self, id: str, score: float, giver: KeyRecord | None) -> bool:
        """Tell the strategy, once for each request; whether it was told."""
        waited = self.waiting.get(id)
        lane = None if waited is None else self._lane(waited.strategy)
        whose = "" if giver is None else giver.id
        # What was refused stays so, also where it is read from the store again, or the settings have changed since.
        if waited is None or lane is None or whose in waited.refused:
            return False
        may = may_teach(self._who(lane), giver, waited.key_id, waited.team)
        if not may or not is_learned_of(lane.settings, waited.key_id, waited.team):
            waited.refused.add(whose)
            self._count(lane, "not_allowed")
            return False
        self.waiting.take(id)
        if not self._admit(lane, whose, giver, is_scored=True):
            return False
        lane.observe(replace(waited.outcome, quality=score))
        return True

    # Limits

    def _admit(self, lane: "Lane", key_id: str, key: KeyRecord | None, *, is_scored: bool) -> bool:
        """Whether an outcome is within the share of whoever says it; operators have no limit."""
        config = self._services.config.feedback
        share = self._shares.get((lane.name, is_scored))
        if share is None or share.config != config:
            share = self._shares[lane.name, is_scored] = FairShare(config)
        is_in = (key is not None and key.is_admin) or share.admit(key_id, self.num_senders)
        self._count(lane, ("scored" if is_scored else "told") if is_in else "over_share")
        return is_in

    def key(self, id: str) -> KeyRecord | None:
        """A valid key, as it was a few seconds ago."""
        return self._keys.get(id)

    @property
    def num_senders(self) -> int:
        """Keys that requests may come with, as far as known, but for operators'; all who need none are one."""
        return sum(not key.is_admin for key in self._keys.values()) + (not self._services.config.require_key)

    async def read_keys(self, fresh_s: float = 0.0) -> None:
        """Learn which keys there are, unless that was read so few seconds ago."""
        if time.monotonic() - self._keys_read_s < fresh_s:
            return
        now_us = int(time.time() * 1e6)
        self._keys = {key.id: key for key in await self._services.store.keys() if key.is_valid(now_us)}
        self._keys_read_s = time.monotonic()

    def _lane(self, strategy: str) -> "Lane | None":
        """A strategy that learns."""
        lane = self._services.lanes.get(strategy)
        return lane if lane is not None and lane.learns else None

    def _who(self, lane: "Lane") -> Who:
        return lane.settings.learns_from or self._services.config.feedback.who

    def _count(self, lane: "Lane", result: str) -> None:
        self._services.metrics.outcomes.labels(lane.name, result).inc()


def _read(body: Mapping[str, Any]) -> tuple[str, float, str]:
    """Request, score and comment. Raises ApiError."""
    id, score, comment = body.get("request_id"), body.get("score"), body.get("comment")
    if not (isinstance(id, str) and 0 < len(id) <= 128 and id.isascii() and id.isprintable()):
        raise wrong("request_id", "request_id must be that of an answer (its header x-request-id)")
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
        raise wrong("score", "score must be a number from 0 to 1")
    if comment is not None and (not isinstance(comment, str) or len(comment) > 2000):
        raise wrong("comment", "comment must be text of at most 2,000 characters")
    return id, float(score), comment or ""


def _scored_before(id: str) -> ApiError:
    return ApiError(
        409, "scored_before", f"this key has scored {id!r} already; a request is scored once", param="request_id"
    )
