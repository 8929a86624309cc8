"""Pairs of answers that a person judges: where they wait, and what was said of them.

A pair is a row of the table of what was collected, as the verdict of a judging model is: it is asked for once, goes with the request that
it is about, and is there for whichever run of ``gateway collect`` comes next.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anabranch.errors import InputError
from anabranch.gateway.store import schema
from anabranch.gateway.store.database import Connection
from anabranch.gateway.store.learned import LABEL
from anabranch.gateway.store.store import Store

# What a person may say of two answers, in the order in which they are shown.
SAID = ("first", "second", "tie", "skip")

# How the row of a pair ends that nobody has judged.
_OPEN = '"verdict":null}'


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers as they are shown: in an order drawn for the pair, without a word of whose they are.

    Attributes:
        id: of the pair.
        asked: the question, or the messages of a conversation.
        first, second: the answers.
    """

    id: str
    asked: str | Sequence[Mapping[str, Any]]
    first: str
    second: str


class Labels:
    """The pairs of one store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def ask(self, pair: str, asked_us: int, request_id: str) -> str:
        """What was said of a pair: a line as judging models end in, ``skip``, or "" while it waits, as it does from now on.

        Args:
            pair: JSON of ``asked``, ``A`` and ``B``.
            asked_us: microseconds since 1970, when the question came; the pair is kept no longer than it.
            request_id: of the question.
        """
        id = f"{LABEL}{hashlib.sha256(pair.encode('utf-8', 'surrogatepass')).hexdigest()}"
        body = (await self._store.collected([id])).get(id)
        if body is None:
            made = json.dumps(
                {"request_id": request_id, "pair": json.loads(pair), "verdict": None}, separators=(",", ":")
            )
            await self._store.change(
                lambda connection: connection.insert("collected", schema.COLLECTED, [(id, asked_us, made)])
            )
            return ""
        said = body.get("verdict")
        return "" if said is None else "skip" if said == "skip" else f"verdict: {said}"

    async def next(self) -> Pair | None:
        """The oldest one that nobody has judged."""
        sql = "SELECT key, body FROM collected WHERE key LIKE :ours AND body LIKE :open ORDER BY ts_us, key LIMIT 1"
        rows = await self._store.look(lambda connection: connection.rows(sql, ours=f"{LABEL}%", open=f"%{_OPEN}"))
        if not rows:
            return None
        id, pair = rows[0][0], json.loads(rows[0][1])["pair"]
        answers = (pair["B"], pair["A"]) if _is_turned(id) else (pair["A"], pair["B"])
        return Pair(id.removeprefix(LABEL), pair["asked"], *answers)

    async def counts(self) -> tuple[int, int]:
        """How many wait, and how many do not any more."""
        sql = "SELECT count(*) FROM collected WHERE key LIKE :ours"

        def work(connection: Connection) -> tuple[int, int]:
            of_all = int(connection.rows(sql, ours=f"{LABEL}%")[0][0])
            waiting = int(connection.rows(f"{sql} AND body LIKE :open", ours=f"{LABEL}%", open=f"%{_OPEN}")[0][0])
            return waiting, of_all - waiting

        return await self._store.look(work)

    async def say(self, id: str, said: str) -> bool:
        """Keep what a person says of a pair; whether it still waited for that. Raises InputError for a word that is none of `SAID`."""
        if said not in SAID:
            raise InputError(f"verdict is {said!r:.40}; it must be one of {', '.join(SAID)}")
        key = f"{LABEL}{id}"
        sides = ("B", "A") if _is_turned(key) else ("A", "B")
        verdict = {"first": sides[0], "second": sides[1]}.get(said, said)

        def work(connection: Connection) -> bool:
            rows = connection.rows("SELECT body FROM collected WHERE key = :key", key=key)
            if not rows or not rows[0][0].endswith(_OPEN):
                return False
            body = f'{rows[0][0].removesuffix(_OPEN)}"verdict":{json.dumps(verdict)}}}'
            # Of two who say something at once, the first one counts.
            sql = "UPDATE collected SET body = :body WHERE key = :key AND body LIKE :open"
            return bool(connection.run(sql, body=body, key=key, open=f"%{_OPEN}"))

        return await self._store.change(work)


def _is_turned(key: str) -> bool:
    """Whether B is shown first: by a bit of the hash, so that it is the same whoever looks."""
    return key[-1:] in "13579bdf"
