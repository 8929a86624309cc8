"""What happened, in a `Store`: decisions, texts, what was collected, feedback, and the ledger and its sums."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any, Literal

from anabranch.bounds import finite
from anabranch.errors import InputError
from anabranch.gateway.store import queries, schema
from anabranch.gateway.store.calibration import Calibration, read_calibration
from anabranch.gateway.store.jobs import Insert
from anabranch.gateway.store.records import (
    DecisionRow,
    FeedbackRow,
    LedgerQuery,
    LedgerRow,
    PreferenceRow,
    SaidBeforeError,
    Spend,
    clean,
    listed,
)
from anabranch.gateway.store.store_access import StoreAccess
from anabranch.gateway.store.store_money import REQUEST_CHARACTERS

# Rows deleted in one transaction.
PRUNED = 2000


class StoreHistory(StoreAccess):
    """Rows that are written once, and read by whoever wants to know."""

    def append_decision(
        self, request_id: str, strategy: str, model: str, body: dict[str, Any]
    ) -> "asyncio.Future[Any]":
        """Keep why a model was chosen. What in ``body`` is not ready for JSON is written as text."""
        text = json.dumps(body, separators=(",", ":"), default=str)
        row = (request_id, self._now_us(), clean(strategy), clean(model), text)
        return self._writer.give(Insert("decisions", schema.DECISIONS, row), at_once=False)

    def append_texts(self, request_id: str, body: dict[str, Any]) -> "asyncio.Future[Any]":
        """Keep what was asked and answered."""
        row = (request_id, self._now_us(), json.dumps(body, separators=(",", ":"), default=str))
        return self._writer.give(Insert("texts", schema.TEXTS, row), at_once=False)

    async def told_of(self, request_ids: Sequence[str]) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
        """Of some requests, by their ids: why a model was chosen, and what was asked and answered, as far as they are kept."""
        request_ids = listed("request_ids", request_ids)
        return await self._read(
            lambda connection: (
                queries.read_bodies(connection, "decisions", request_ids),
                queries.read_bodies(connection, "texts", request_ids),
            )
        )

    async def collected(self, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Of calls that were collected, by their keys: what came of them."""
        keys = listed("keys", keys)
        return await self._read(lambda connection: queries.read_bodies(connection, "collected", keys, "key"))

    async def secret(self, name: str) -> str:
        """What this store alone knows, for draws that no sender is to work out: made once, and the same ever after.

        Args:
            name: of what it is for.

        Raises CapacityError if the store cannot write.
        """
        return await self._do(lambda connection: queries.made_secret(connection, name))

    async def decisions(self, request_id: str | None = None, limit: int = 100) -> list[DecisionRow]:
        """Of one request, or of all, newest first."""
        return await self._read(lambda connection: queries.read_decisions(connection, request_id, limit))

    # What was said of answers

    async def feedback(
        self,
        request_id: str,
        score: float,
        *,
        key_id: str | None = None,
        owner: str | None = None,
        comment: str = "",
        once: bool = False,
    ) -> LedgerRow:
        """Keep what somebody says of an answer, in the place of what the same key said of it before; the row it is about.

        Args:
            request_id: of the request.
            score: larger is better.
            key_id: who says so. None for an operator, who may judge any request.
            owner: whose request it must be; None for that of `key_id`.
            comment: in words.
            once: only if the key has said nothing of it before, whichever process it told.

        Raises InputError if there is no such request, or it was somebody else's (which is not told apart); SaidBeforeError.
        """
        score = finite("score", score, -1e9, 1e9)
        row = (request_id, self._now_us(), key_id or "", score, clean(comment, 2000))
        return await self._keep_said("feedback", row, key_id if owner is None else owner, once)

    async def preference(
        self,
        request_id: str,
        better: str,
        worse: str,
        *,
        key_id: str | None = None,
        owner: str | None = None,
        comment: str = "",
        once: bool = False,
    ) -> LedgerRow:
        """Keep whose answer somebody preferred to whose; all else is as of `feedback`. One of the two models answered the request."""
        row = (request_id, self._now_us(), key_id or "", clean(better), clean(worse), clean(comment, 2000))
        return await self._keep_said("preferences", row, key_id if owner is None else owner, once)

    async def _keep_said(
        self, table: Literal["feedback", "preferences"], row: tuple[Any, ...], whose: str | None, once: bool
    ) -> LedgerRow:
        found, is_kept = await self._do(lambda connection: queries.put_feedback(connection, row, whose, once, table))
        if found is None:
            raise InputError(f"there is no request {row[0][:REQUEST_CHARACTERS]!r}")
        if not is_kept:
            raise SaidBeforeError(f"this key has scored {row[0]!r} already; a request is scored once")
        return found

    async def preferences(self, request_id: str | None = None, limit: int = 100) -> list[PreferenceRow]:
        """Of one request, or of all, newest first."""
        return await self._read(lambda connection: queries.read_preferences(connection, request_id, limit))

    async def preferences_after(self, seq: int) -> list[tuple[int, str, str, str, str]]:
        """As `scores_after`: number, request, who said so, the better model, the worse."""
        return await self._read(lambda connection: queries.read_new_preferences(connection, seq))

    async def newest_preference(self) -> int:
        """The number of the newest preference; 0 if there is none."""
        return await self._read(queries.newest_preference)

    async def scores_after(self, seq: int) -> list[tuple[int, str, str, float]]:
        """Scores behind one in the order in which they were numbered, some thousand at most: number, request, who said so, score."""
        return await self._read(lambda connection: queries.read_scores(connection, seq))

    async def newest_score(self) -> int:
        """The number of the newest score; 0 if there is none."""
        return await self._read(queries.newest_score)

    async def feedbacks(self, request_id: str | None = None, limit: int = 100) -> list[FeedbackRow]:
        """Of one request, or of all, newest first."""
        return await self._read(lambda connection: queries.read_feedback(connection, request_id, limit))

    # The ledger

    async def ledger(self, query: LedgerQuery | None = None) -> list[LedgerRow]:
        """Rows that fit; without a query, the newest hundred."""
        query = query or LedgerQuery()
        return await self._read(lambda connection: queries.read_ledger_rows(connection, query))

    async def spend(
        self, by: str | Sequence[str] = (), *, since_s: float | None = None, until_s: float | None = None
    ) -> list[Spend]:
        """Totals of the ledger, grouped.

        Args:
            by: one or several of `queries.GROUPS`: key, user, team, model, tag, day, ...
            since_s, until_s: unix seconds, the second excluded.
        """
        names = (by,) if isinstance(by, str) else tuple(by)
        bounds = [None if bound is None else int(bound * 1e6) for bound in (since_s, until_s)]
        return await self._read(lambda connection: queries.read_spend(connection, names, *bounds))

    async def calibration(self, *, since_s: float | None = None) -> list[Calibration]:
        """What strategies expected beside what was said of the answers, by week and strategy, newest week first."""
        since_us = 0 if since_s is None else int(since_s * 1e6)
        return await self._read(lambda connection: read_calibration(connection, since_us))

    async def prune(self, before_s: float) -> int:
        """Delete what happened before unix second ``before_s`` (ledger, decisions, texts, what was collected of them, feedback, examples).

        Returns how many rows. Budgets stay.
        """
        before_us, count = int(before_s * 1e6), 0
        while deleted := await self._do(lambda connection: queries.delete_before(connection, before_us, PRUNED)):
            count += deleted
        return count
