"""What strategies are told of how requests ended and of what was said of them, as far as whoever says it may teach them."""

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from anabranch.errors import AnabranchError
from anabranch.gateway.config.strategies import Who
from anabranch.gateway.learning import said
from anabranch.gateway.learning.fair import FairShare
from anabranch.gateway.learning.permission import is_learned_of, may_score, may_teach
from anabranch.gateway.learning.said import Said
from anabranch.gateway.learning.services import LearningServices
from anabranch.gateway.learning.waiting import Waiting
from anabranch.gateway.logged_error import words
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
        # Of them, those that are no operator's: each outcome asks for it, and there may be many thousands.
        self._num_keys = 0
        self._keys_read_s = 0.0
        # Requests that are being scored now, by whom, and how.
        self._scoring: set[tuple[str, str, str]] = set()
        # Scores that wait for the row of their request.
        self._later: set[asyncio.Task[None]] = set()
        self._last_seq = self._last_preference = 0

    async def start(self) -> None:
        """Learn which keys there are, and what is no news."""
        await self.read_keys()
        self._last_seq = await self._services.store.newest_score()
        self._last_preference = await self._services.store.newest_preference()

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

    async def score(self, body: Mapping[str, Any], giver: KeyRecord | None) -> tuple[LedgerRow, Said, bool]:
        """Take ``POST /v1/feedback``: the store keeps it, and the strategy that chose may learn from it.

        Returns the request, what was said of it, two models where it was a preference, and whether the strategy was told. Raises ApiError.
        """
        told = said.read(body)
        id, whose = told.id, "" if giver is None else giver.id
        mark = (id, whose, _kind(told))
        if mark in self._scoring:
            raise said.scored_before(id)
        self._scoring.add(mark)
        is_written = True
        try:
            row, is_written = await self._row(id, giver)
            if told.preferred is not None:
                told = replace(told, preferred=await self._models(row, told.preferred, giver))
            if is_written:
                await self._keep(row, told, whose)
            else:
                self._keep_later(row, told, whose)
            # Where one key is new, others may be.
            await self.read_keys(0.0 if giver is not None and giver.id not in self._keys else FRESH_S)
        except SaidBeforeError:
            raise said.scored_before(id) from None
        except ApiError:
            # Nothing will be written later.
            is_written = True
            raise
        finally:
            if is_written:
                self._scoring.discard(mark)
        return row, told, self._learn(told, giver)

    async def _models(self, row: LedgerRow, pair: tuple[str, str], giver: KeyRecord | None) -> tuple[str, str]:
        """The models of a preference, where each may be named by a request that it answered. Raises ApiError (400)."""
        better, worse = [await self._model(name, giver) for name in pair]
        if better == worse:
            raise wrong("preferred", f"preferred names {better!r} twice; it must be [better, worse] of two models")
        if row.model not in (better, worse):
            raise wrong("preferred", f"preferred must name the model of this request, {row.model!r}, and another one")
        return better, worse

    async def _model(self, name: str, giver: KeyRecord | None) -> str:
        # What a key may not use is not told from what is not there.
        if name in self._services.runtime.models and (giver is None or giver.is_admin or giver.allows(name)):
            return name
        try:
            row = (await self._row(name, giver))[0] if said.is_id(name) else None
        except ApiError:
            row = None
        if row is None or not row.model:
            raise wrong(
                "preferred", f"preferred names {name!r}, which is no model and no answered request that you may score"
            )
        return row.model

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

    async def _keep(self, row: LedgerRow, told: Said, whose: str) -> None:
        """Have the store keep what was said. Raises SaidBeforeError, CapacityError."""
        store, how = self._services.store, {"key_id": whose, "owner": row.key_id, "comment": told.comment}
        if told.preferred is not None:
            await store.preference(row.request_id, *told.preferred, **how, once=True)
        else:
            assert told.score is not None
            await store.feedback(row.request_id, told.score, **how, once=True)

    def _keep_later(self, row: LedgerRow, told: Said, whose: str) -> None:
        """Have the store keep what was said of a request as soon as it has its row."""

        async def later() -> None:
            try:
                await self._services.unsettled.wait(row.request_id)
                await self._keep(row, told, whose)
            except AnabranchError as error:
                logger.warning("feedback of request %s is not kept: %s", row.request_id, words(error))
            finally:
                self._scoring.discard((row.request_id, whose, _kind(told)))

        task = asyncio.ensure_future(later())
        self._later.add(task)
        task.add_done_callback(self._later.discard)

    async def close(self) -> None:
        """Wait until all scores are kept: before the store closes, once nothing is read on any more."""
        if self._later:
            await asyncio.wait(list(self._later))

    async def catch_up(self) -> None:
        """Learn from what other processes on the same store were sent of requests that were decided here."""
        store = self._services.store
        for seq, id, key_id, score in await store.scores_after(self._last_seq - OVERLAP):
            self._last_seq = max(self._last_seq, seq)
            self._learn_of_another(Said(id=id, score=score), key_id)
        for seq, id, key_id, better, worse in await store.preferences_after(self._last_preference - OVERLAP):
            self._last_preference = max(self._last_preference, seq)
            self._learn_of_another(Said(id=id, preferred=(better, worse)), key_id)

    def _learn_of_another(self, told: Said, key_id: str) -> None:
        giver = self._keys.get(key_id)
        # A key that is not known, or has ended, is not nobody.
        is_known = giver is not None or not key_id
        if is_known and told.id in self.waiting and (told.id, key_id, _kind(told)) not in self._scoring:
            self._learn(told, giver)

    def _learn(self, told: Said, giver: KeyRecord | None) -> bool:
        """Tell the strategy, once for each request, and once of a preference; whether it was told."""
        waited = self.waiting.get(told.id)
        lane = None if waited is None else self._lane(waited.strategy)
        whose = "" if giver is None else giver.id
        # What was refused stays so, also where it is read from the store again, or the settings have changed since.
        if waited is None or lane is None or whose in waited.refused or _kind(told) in waited.told:
            return False
        if told.preferred is not None and not lane.compares:
            return False
        may = may_teach(self._who(lane), giver, waited.key_id, waited.team)
        if not may or not is_learned_of(lane.settings, waited.key_id, waited.team):
            waited.refused.add(whose)
            self._count(lane, "not_allowed")
            return False
        if lane.compares:
            # The other kind may still come.
            waited.told.add(_kind(told))
        else:
            self.waiting.take(told.id)
        if not self._admit(lane, whose, giver, is_scored=True):
            return False
        if told.preferred is not None:
            lane.prefer(waited.outcome, *told.preferred)
        else:
            lane.observe(replace(waited.outcome, quality=told.score))
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
        return self._num_keys + (not self._services.config.require_key)

    async def read_keys(self, fresh_s: float = 0.0) -> None:
        """Learn which keys there are, unless that was read so few seconds ago."""
        if time.monotonic() - self._keys_read_s < fresh_s:
            return
        now_us = int(time.time() * 1e6)
        self._keys = {key.id: key for key in await self._services.store.keys() if key.is_valid(now_us)}
        self._num_keys = sum(not key.is_admin for key in self._keys.values())
        self._keys_read_s = time.monotonic()

    def _lane(self, strategy: str) -> "Lane | None":
        """A strategy that learns."""
        lane = self._services.lanes.get(strategy)
        return lane if lane is not None and lane.learns else None

    def _who(self, lane: "Lane") -> Who:
        return lane.settings.learns_from or self._services.config.feedback.who

    def _count(self, lane: "Lane", result: str) -> None:
        self._services.metrics.outcomes.labels(lane.name, result).inc()


def _kind(told: Said) -> str:
    return "score" if told.preferred is None else "preferred"
