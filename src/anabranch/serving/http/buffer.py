"""`Buffer`: news of several choices on their way to one reader.

Each choice brings its next when that before has been taken: what waits for a slow reader waits in the engine's client
(`anabranch.serving.core.stream`), and nowhere else.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class Buffer(Generic[T]):
    """Runs several sources at once and gives out their pieces as they come.

    Use it as ``async with``: at its end every source is closed.

    Args:
        sources: async iterators; one that fails fails all.
    """

    def __init__(self, sources: Sequence[AsyncIterator[T]]) -> None:
        self._sources = sources
        self._held: deque[T] = deque()
        self._news, self._room = asyncio.Event(), asyncio.Event()
        self._open = len(sources)
        self._error: BaseException | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.get_running_loop().create_task(self._read(source)) for source in self._sources]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def fail(self, error: BaseException) -> None:
        """End with this error once what is held has been taken."""
        self._error = self._error or error
        self._news.set()
        self._room.set()

    async def take(self, timeout_s: float | None = None) -> list[T] | None:
        """All that is there, at least one; [] when nothing has come in time, None at the end. Raises what a source raised."""
        if not self._held:
            self._news.clear()
            if self._error is None and self._open:
                try:
                    async with asyncio.timeout(timeout_s):
                        await self._news.wait()
                except TimeoutError:
                    return []
        if self._held:
            taken = list(self._held)
            self._held.clear()
            self._room.set()
            return taken
        if self._error is not None:
            raise self._error
        return None if not self._open else []

    async def _read(self, source: AsyncIterator[T]) -> None:
        try:
            async for piece in source:
                self._held.append(piece)
                self._news.set()
                while any(held is piece for held in self._held) and self._error is None:
                    self._room.clear()
                    await self._room.wait()
        except asyncio.CancelledError:
            raise
        except Exception as error:
            # Told to whoever takes.
            self.fail(error)
        finally:
            self._open -= 1
            self._news.set()
            await source.aclose()  # type: ignore[attr-defined]
