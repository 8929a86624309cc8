"""How a `Store` reaches its database: one thread writes, a few read, and what cannot be had now is asked for again."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager
from itertools import chain, repeat
from pathlib import Path
from typing import Any, Self, TypeVar

from anabranch.errors import CapacityError, DataError
from anabranch.gateway.store import writer
from anabranch.gateway.store.batch import recover
from anabranch.gateway.store.database import BusyError, Connection, Database
from anabranch.gateway.store.jobs import Do
from anabranch.gateway.store.writer import Writer
from anabranch.web.turns import in_thread, plainly

T = TypeVar("T")
READERS = 4


class StoreAccess:
    """See the module. For one event loop; what is read sees what was written before.

    Attributes:
        recovered: requests of dead processes that were settled as this one came.

    Args:
        database: open.
        serves: it reserves money: what a process that is gone had reserved is settled first.
        clock: unix seconds.
    """

    def __init__(self, database: Database, *, serves: bool = True, clock: Callable[[], float] = time.time) -> None:
        self._database, self._clock, self._serves = database, clock, serves
        self.recovered = 0
        if serves:
            self._take_over()
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="anabranch-store-reader")
        self._local, self._connections = threading.local(), list[Connection]()
        self._background: set[asyncio.Future[Any]] = set()
        self._writer = Writer(database, self._now_us, serves)

    def _take_over(self) -> None:
        """Say that this process is alive, and settle what dead ones left."""
        connection = self._database.connect()
        try:
            self._database.hold()
            self.recovered = recover(self._database, connection, self._now_us())
        except BusyError as error:
            raise DataError(f"cannot open the store: {error}") from None
        finally:
            connection.close()

    def _now_us(self) -> int:
        return int(self._clock() * 1e6)

    def now_us(self) -> int:
        """Microseconds since 1970."""
        return self._now_us()

    async def look(self, work: Callable[[Connection], T]) -> T:
        """What ``work`` reads on a connection, everything written before among it."""
        return await self._read(work)

    async def change(self, work: Callable[[Connection], T]) -> T:
        """Run ``work`` in a transaction of its own; it is committed on return. Raises CapacityError if the store cannot write."""
        return await self._do(work)

    def alone(self, work: str) -> AbstractContextManager[bool]:
        """Whether nobody else does ``work`` on this store, in this process or another; then nobody can meanwhile."""
        return self._database.alone(work)

    @asynccontextmanager
    async def alone_beside(self, work: str) -> AsyncIterator[bool]:
        """`alone`, whose database may be far away, beside an event loop that serves."""
        held = self.alone(work)
        is_alone = await in_thread(held.__enter__)
        try:
            yield is_alone
        finally:
            await in_thread(held.__exit__, None, None, None)

    @property
    def replica(self) -> str:
        """Names this process among those on the same data, as long as the store is open."""
        return self._database.replica

    async def gone(self, replicas: Sequence[str]) -> list[str]:
        """Those of some processes, by their `replica`, that are not alive any more, as far as that can be told."""
        return await self._ask(lambda connection: self._database.gone(connection, replicas))

    async def _flush(self) -> None:
        """Until all that was given is committed."""
        await self._writer.done(Do(lambda connection: None, in_transaction=False))

    async def _do(self, work: Callable[[Connection], T]) -> T:
        return await self._writer.done(Do(work))

    async def _read(self, work: Callable[[Connection], T]) -> T:
        await self._flush()
        return await self._ask(work)

    async def _ask(self, work: Callable[[Connection], T]) -> T:
        """Run ``work``, which changes nothing, in a reader's thread. Raises CapacityError if the database does not answer."""

        def run() -> T:
            connection = getattr(self._local, "connection", None)
            if connection is None:
                connection = self._local.connection = self._database.connect()
                self._connections.append(connection)
            try:
                return work(connection)
            except BusyError:
                # Perhaps only this connection is broken.
                try:
                    return work(connection)
                except BusyError as error:
                    raise CapacityError(f"the store cannot be read: {error}") from error

        return await asyncio.get_running_loop().run_in_executor(self._readers, plainly, run)

    async def _patient(self, read: Callable[[], Awaitable[T]]) -> T:
        """What ``read`` gives, asked again while the database does not answer, for `PATIENCE_S`. Raises CapacityError."""
        refusal = CapacityError("the store cannot be read: it does not answer")
        try:
            async with asyncio.timeout(writer.PATIENCE_S):
                for wait_s in chain(writer.RETRY_S, repeat(writer.RETRY_S[-1])):
                    try:
                        return await read()
                    except CapacityError as error:
                        refusal = error
                    await asyncio.sleep(wait_s)
        except TimeoutError:
            pass
        raise refusal

    def _in_background(self, coroutine: Any) -> None:
        task = asyncio.ensure_future(coroutine)
        self._background.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Future[Any]") -> None:
        self._background.discard(task)
        if not task.cancelled():
            # What cannot be read now is read when the key is next used.
            task.exception()

    async def backup(self, path: str | Path) -> None:
        """Write a copy of one moment while all goes on. Raises BackendError for PostgreSQL, which has pg_dump."""
        await self._flush()
        await asyncio.get_running_loop().run_in_executor(self._readers, plainly, lambda: self._database.backup(path))

    async def vacuum(self) -> None:
        """Give the room of deleted rows back to the disk; writes wait meanwhile."""
        await self._writer.done(Do(self._database.vacuum, in_transaction=False))

    async def close(self) -> None:
        """Write what is left, and let go. Requests still under way are settled as crashed by whoever opens the store next."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await in_thread(self._writer.close)
        await in_thread(self._readers.shutdown)
        for connection in self._connections:
            connection.close()
        await in_thread(self._database.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()
