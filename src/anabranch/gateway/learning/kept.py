"""What strategies learn, kept in the store: it outlives the process, and processes on one store learn from one another.

Each process has a row of its own for each strategy, written when something was learned since, every few seconds at most. What adds up
(`Strategy.adds_up`) is kept as the part that the process observed; each reads the parts of all others and takes them in, so that all know
what one process would that was told everything. A process that ends leaves its part to nobody's row. One that was killed leaves its own
row, which counts on; the first of the others that finds it dead makes it part of nobody's, and who comes second finds none. One that was
only taken for dead sees that its row is gone, and goes on with what it has not told yet. Of what does not add up, each goes on from the
newest row that there is when it starts; but what is kept one by one (`Strategy.keeps_examples`) has a row for each, which all processes
take over, and which is as its last writer has it.

Rows are found by what a strategy is made from: its config, its embedder, and what it knew before it served. One of another make is not
read, one that is damaged is left out, and one of other vectors is `set_aside`; all are said in the log, and none stops a start.
"""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from anabranch.errors import AnabranchError, CapacityError
from anabranch.gateway.learning import kept_bytes
from anabranch.gateway.learning.kept_bytes import Part
from anabranch.gateway.learning.set_aside import fitting, given_dim, set_aside
from anabranch.gateway.logged_error import raised, words
from anabranch.gateway.store import Store, learned
from anabranch.gateway.store.learned import LearnedRow
from anabranch.routers.contract.strategy import Arrays
from anabranch.web.turns import in_thread, plainly

if TYPE_CHECKING:
    from anabranch.gateway.lane import Lane

logger = logging.getLogger(__name__)

# Between looks at what changed, and between two writes of one strategy for each megabyte of what it learned.
EVERY_S = 5.0
MEGABYTE_S = 5.0

# Of reading again because others wrote meanwhile; then the next round tries.
TRIES = 3

# As above, of making a row part of nobody's, which each process that ends does: where one is late, another has come through.
LEAVES = 100

# What does not add up and was written before, by processes that are gone, is deleted when it is so old.
OLD_US = 86_400 * 10**6

# That an example is gone is known for so long, to whoever still has it.
GONE_US = 30 * 86_400 * 10**6

# Examples looked at or written at a time.
MOST_EXAMPLES = 500

# What was written so shortly after an order to forget may not know of it yet.
OVERLAP_US = 60 * 10**6


@dataclass(slots=True)
class _Held:
    """How the rows of one strategy stand.

    Attributes:
        made: see `made_from`.
        dim: of the vectors that it is given, see `given_dim`.
        writer: of the own row: the process (`Store.replica`), a dot, and what tells it from others of that. What was written before for
            the same make is another's.
        body: of the own row, of what adds up; empty if none was written.
        told: outcomes that it had been told of by then.
        seen: versions of the rows of others, as read last; None before the first time.
        examples: version of the last example that was read.
        unwritten: examples that the store could not take yet.
        next_s: not written before.
    """

    made: str
    dim: int | None
    writer: str
    body: bytes = b""
    told: int = 0
    seen: dict[str, int] | None = None
    examples: int = 0
    unwritten: list[tuple[str, str, bytes]] = field(default_factory=list)
    next_s: float = 0.0
    damaged: set[tuple[str, int]] = field(default_factory=set)
    unfolded: set[str] = field(default_factory=set)


class Kept:
    """See the module. Of one gateway, on its event loop; what takes long runs in the threads of strategies and others.

    Args:
        store: gives the store.
        clock: seconds, never running back.
    """

    def __init__(self, store: Callable[[], Store], clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._clock = store, clock
        self._held: dict[str, _Held] = {}
        self._busy = asyncio.Lock()

    async def load(self, lanes: Iterable["Lane"]) -> None:
        """Give strategies that have just been made what was learned before. What cannot be read is said, and learned anew."""
        for lane in lanes:
            if not lane.learns or not lane.made:
                continue
            held = self._held[lane.name] = _Held(lane.made, given_dim(lane), self._writer())
            try:
                is_anew = await set_aside(self._store(), lane, held.dim)
                if lane.strategy.adds_up:
                    await lane.alone(lambda lane=lane: lane.strategy.hear({}, {}))  # type: ignore[misc]
                    await self._hear(lane, held)
                else:
                    await self._take_newest(lane, held)
                    await self._forget_since(lane, await self._take_examples(lane, held))
                if not is_anew:
                    await self._say(lane)
            except AnabranchError as error:
                logger.warning("what strategy %s learned before cannot be read: %s", lane.name, words(error))
            except Exception as error:
                logger.error("what strategy %s learned before cannot be read", lane.name, exc_info=error)

    async def save(self, lanes: Iterable["Lane"], *, at_once: bool = False, is_last: bool = False) -> None:
        """Write what was learned since, and take in what others did.

        Args:
            lanes: strategies.
            at_once: though some were written a moment ago.
            is_last: this process learns no more.
        """
        async with self._busy:
            for lane in lanes:
                held = self._held.get(lane.name)
                if held is None or held.made != lane.made:
                    continue
                try:
                    _check_owed(lane)
                    if at_once or is_last:
                        # What waits for the strategy's thread is learned first: `told` does not know of it yet.
                        await lane.alone(lambda: None)
                    await self._round(lane, held, at_once or is_last)
                    if is_last:
                        await self._leave(lane, held)
                except AnabranchError as error:
                    logger.warning("what strategy %s learned is not in the store yet: %s", lane.name, words(error))
                except Exception as error:
                    logger.error("what strategy %s learned cannot be kept", lane.name, exc_info=error)

    @asynccontextmanager
    async def handed_over(self, lanes: Sequence["Lane"]) -> AsyncIterator[set[str]]:
        """Write what these have learned, and leave it alone until the block ends.

        Of those whose names are added to what it gives, nothing is written any more until `load` is told of their successors: what they
        have learned is found under another make. Raises AnabranchError if the store cannot write.
        """
        async with self._busy:
            for lane in lanes:
                held = self._held.get(lane.name)
                if held is not None and held.made == lane.made:
                    await self._round(lane, held, True)
            names: set[str] = set()
            yield names
            for name in names:
                self._held.pop(name, None)

    # One strategy

    async def _round(self, lane: "Lane", held: _Held, at_once: bool) -> None:
        _check_owed(lane)
        if lane.strategy.keeps_examples:
            await self._take_examples(lane, held)
            await self._give_examples(lane, held)
        for _ in range(TRIES):
            if lane.strategy.adds_up:
                await self._hear(lane, held)
            if lane.told == held.told or (self._clock() < held.next_s and not at_once):
                return
            told, part = await lane.alone(lambda: (lane.told, _copy(lane)))
            body = await in_thread(kept_bytes.packed_ready, part, lane.name)
            row = LearnedRow(
                strategy=lane.name,
                made=held.made,
                writer=held.writer,
                kind=lane.strategy.name,
                version=1,
                ts_us=self._store().now_us(),
                body=body,
            )
            seen = held.seen if lane.strategy.adds_up else None
            if await self._store().change(lambda connection: learned.put_learned(connection, row, seen)):  # noqa: B023
                held.told = told
                held.next_s = self._clock() + max(EVERY_S, MEGABYTE_S * len(body) / 1e6)
                if lane.strategy.adds_up:
                    held.body = body
                    await lane.alone(lane.strategy.published)
                return

    async def _begin_anew(self, lane: "Lane", held: _Held) -> None:
        """The own row is nobody's by now: what it tells of is heard of again like that of others."""
        logger.warning("this process was taken for dead; strategy %s goes on beside what it had told", lane.name)
        part = await in_thread(kept_bytes.read_part, held.body, lane.name)
        await lane.alone(lambda: lane.strategy.disown(*part))
        held.writer, held.body, held.seen = self._writer(), b"", None

    def _writer(self) -> str:
        return f"{self._store().replica}.{uuid.uuid4().hex}"

    async def _fold(self, lane: "Lane", held: _Held, marks: Iterable[str]) -> bool:
        """Make rows of processes that are gone part of nobody's; whether there were any.

        A row from before rows said whose they are stays as it is, and so does a damaged one.
        """
        store = self._store()
        replica_of = {
            writer: writer.partition(".")[0] for writer in marks if "." in writer and writer not in held.unfolded
        }
        others = sorted(set(replica_of.values()) - {store.replica})
        gone = await store.gone(others) if others else []
        dead = [writer for writer, replica in replica_of.items() if replica in gone]
        for writer in dead:
            try:
                await self._leave_to_nobody(lane, held, writer)
            except CapacityError:
                raise
            except Exception as error:
                held.unfolded.add(writer)
                logger.debug("the row of %s stays apart: %s", writer, words(error))
        return bool(dead)

    async def _hear(self, lane: "Lane", held: _Held) -> None:
        """Take in what others observed, if that is more than was read last."""
        store, name = self._store(), lane.name
        marks = await store.look(lambda connection: learned.read_marks(connection, name, held.made))
        if await self._fold(lane, held, marks):
            marks = await store.look(lambda connection: learned.read_marks(connection, name, held.made))
        if held.body and held.writer not in marks:
            await self._begin_anew(lane, held)
        marks.pop(held.writer, None)
        if marks == (held.seen or {}):
            held.seen = marks
            return
        rows = await store.look(lambda connection: learned.read_learned(connection, name, held.made))
        rows = [row for row in rows if row.writer != held.writer]
        whole = await in_thread(self._joined, lane, held, rows)
        await lane.alone(lambda: lane.strategy.hear(*whole))
        held.seen = {row.writer: row.version for row in rows}

    def _joined(self, lane: "Lane", held: _Held, rows: Sequence[LearnedRow]) -> Part:
        """All that can be read of them, as one."""

        def join(parts: Sequence[Part]) -> Part:
            return plainly(lambda: lane.strategy.joined(parts))

        try:
            return join([fitting(lane, held.dim, kept_bytes.part_of(row)) for row in rows])
        except Exception:
            logger.debug("some of %d rows cannot be read", len(rows))
        # One of them is at fault: find it.
        parts: list[Part] = []
        for row in rows:
            try:
                part = fitting(lane, held.dim, kept_bytes.part_of(row))
                join([*parts, part])
                parts.append(part)
            except Exception as error:
                self._left_out(row, held, error)
        return join(parts)

    async def _take_newest(self, lane: "Lane", held: _Held) -> None:
        store, name = self._store(), lane.name
        rows = await store.look(lambda connection: learned.read_learned(connection, name, held.made))
        start = await lane.alone(lambda: _copy(lane))
        begun: Part = (start[0], json.loads(start[1]))
        for row in reversed(rows):
            try:
                part = fitting(lane, held.dim, await in_thread(kept_bytes.part_of, row))
                await lane.alone(lambda: lane.strategy.load_kept(*part))  # noqa: B023
                await self._forget_since(lane, [row.ts_us])
                return
            except Exception as error:
                self._left_out(row, held, error)
                await lane.alone(lambda: lane.strategy.load_kept(*begun))

    async def _forget_since(self, lane: "Lane", written_us: Sequence[int]) -> None:
        """What was ordered to be forgotten while something was written by who did not know of it yet."""
        if not written_us or not lane.can_forget:
            return
        orders = await self._store().look(lambda connection: learned.read_erasures(connection, 0))
        for _, ordered_us, order in orders:
            if any(ordered_us <= ts_us <= ordered_us + OVERLAP_US for ts_us in written_us):
                try:
                    await lane.forget(json.loads(order))
                except Exception as error:
                    # It owes this one, and is told of the others all the same.
                    logger.error("strategy %s could not forget: %s", lane.name, raised(error))

    async def _take_examples(self, lane: "Lane", held: _Held) -> list[int]:
        """Take over what others wrote since; when they wrote it."""
        store, name, written_us = self._store(), lane.name, []
        while lane.strategy.keeps_examples:
            rows = await store.look(
                lambda connection: learned.read_examples(connection, name, held.made, held.examples)
            )
            others = [row for row in rows if row[1] != held.writer]
            if others:
                examples = await in_thread(kept_bytes.read_examples, others)
                await lane.alone(lambda: lane.strategy.take_examples(examples))  # noqa: B023
                written_us += [ts_us for _, _, _, ts_us, body, _ in others if body]
            if rows:
                held.examples = rows[-1][2]
            if len(rows) < learned.EXAMPLES:
                break
        return written_us

    async def _give_examples(self, lane: "Lane", held: _Held) -> None:
        """Write what has changed."""
        while True:
            if not held.unwritten:
                changed = await lane.alone(lambda: lane.strategy.changed_examples(MOST_EXAMPLES))
                held.unwritten = await in_thread(kept_bytes.example_rows, changed)
            if not held.unwritten:
                return
            await self._put_examples(lane.name, held)

    async def _put_examples(self, name: str, held: _Held) -> None:
        store, rows = self._store(), held.unwritten
        now_us = store.now_us()
        await store.change(
            lambda connection: learned.put_examples(connection, name, held.made, held.writer, rows, now_us)
        )
        held.unwritten = []

    async def _leave_to_nobody(self, lane: "Lane", held: _Held, writer: str) -> None:
        """Have the row of a writer that learns no more join that of nobody."""
        store, name = self._store(), lane.name
        now_us = store.now_us()

        def join(bodies: Sequence[bytes]) -> bytes:
            parts = [fitting(lane, held.dim, kept_bytes.read_part(body, name)) for body in bodies]
            return kept_bytes.packed_ready(kept_bytes.ready(*lane.strategy.joined(parts)), name)

        for _ in range(LEAVES):
            rows = await store.look(lambda connection: learned.read_leaving(connection, name, held.made, writer))
            if not any(row.writer == writer for row in rows):
                return
            # Beside the store's transaction: what a strategy does there, and how long, would be everybody's.
            body = await in_thread(join, [row.body for row in rows])
            if await store.change(lambda connection: learned.leave_learned(connection, rows, writer, body, now_us)):  # noqa: B023
                return
        raise CapacityError(f"others write the rows of strategy {name} all the time")

    async def _leave(self, lane: "Lane", held: _Held) -> None:
        store, name = self._store(), lane.name
        now_us = store.now_us()
        if lane.strategy.adds_up:
            await self._leave_to_nobody(lane, held, held.writer)
        else:
            await store.change(lambda connection: learned.delete_older(connection, name, held.made, now_us - OLD_US))
            await store.change(lambda connection: learned.delete_gone(connection, now_us - GONE_US))

    def _left_out(self, row: LearnedRow, held: _Held, error: Exception) -> None:
        if (row.writer, row.version) not in held.damaged:
            held.damaged.add((row.writer, row.version))
            logger.warning(
                "what strategy %s learned (row of %s) is left out: %s",
                row.strategy,
                row.writer or "nobody",
                words(error),
            )

    async def _say(self, lane: "Lane") -> None:
        """That there is something which is of another make."""
        name = lane.name
        count, marks = await self._store().look(
            lambda connection: (learned.others_of(connection, name), learned.read_marks(connection, name, lane.made))
        )
        if count and not marks:
            logger.warning(
                "strategy %s begins anew: what it learned when it was made otherwise (%d rows) is not read", name, count
            )


def _check_owed(lane: "Lane") -> None:
    """Raises CapacityError for one whose strategy keeps what it was told to forget."""
    if lane.owed:
        raise CapacityError("it has not forgotten yet what it was told to")


def _copy(lane: "Lane") -> tuple[Arrays, str]:
    """What is to be written, apart from what goes on changing."""
    strategy = lane.strategy
    return kept_bytes.ready(*(strategy.part() if strategy.adds_up else strategy.kept_state()))
