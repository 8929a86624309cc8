"""A gateway for code without an event loop: what it is asked runs on a loop of its own, in a thread."""

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any, Self, TypeVar

from anabranch.routers.contract.query import Decision
from anabranch.web.api_error import ApiError

T = TypeVar("T")


class SyncGateway:
    """The plain methods of a `Gateway`. It starts by itself, and ends with `close` or as a ``with`` block does."""

    def __init__(self) -> None:
        self._worker: _Worker | None = None

    # What the gateway itself has

    @property
    def is_started(self) -> bool:
        """Whether `start` was called, and `stop` was not."""
        raise NotImplementedError

    async def start(self) -> Self:  # noqa: D102
        raise NotImplementedError

    async def stop(self) -> None:  # noqa: D102
        raise NotImplementedError

    async def achat(self, body: dict[str, Any] | None = None, *, key: str | None = None) -> Any:  # noqa: D102
        raise NotImplementedError

    async def aroute(self, body: dict[str, Any] | None = None, *, key: str | None = None) -> Decision:  # noqa: D102
        raise NotImplementedError

    # What it has of here

    def chat(self, body: dict[str, Any] | None = None, *, key: str | None = None, **fields: Any) -> Any:
        """`achat` for code without an event loop; with ``stream``, an iterator. The gateway starts by itself and ends with `close`."""
        answer = self._called(self._started(self.achat, {**(body or {}), **fields}, key))
        return self._iterated(answer) if isinstance(answer, AsyncIterator) else answer

    def route(self, body: dict[str, Any] | None = None, *, key: str | None = None, **fields: Any) -> Decision:
        """`aroute` for code without an event loop."""
        decision: Decision = self._called(self._started(self.aroute, {**(body or {}), **fields}, key))
        return decision

    def close(self) -> None:
        """End what `chat` and `route` started."""
        if self._worker is not None:
            self._worker.run(self.stop())
            self._worker.close()
            self._worker = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _started(self, ask: Any, body: dict[str, Any], key: str | None) -> Any:
        if not self.is_started:
            await self.start()
        return await ask(body, key=key)

    def _called(self, work: Coroutine[Any, Any, T]) -> T:
        if self._worker is None:
            self._worker = _Worker()
        return self._worker.run(work)

    def _iterated(self, chunks: AsyncIterator[T]) -> Iterator[T]:
        done = object()
        try:
            while (chunk := self._called(_next(chunks, done))) is not done:
                yield chunk
        finally:
            self._called(chunks.aclose())  # type: ignore[attr-defined]


async def _next(items: AsyncIterator[T], done: Any) -> Any:
    return await anext(items, done)


class _Worker:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gateway", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine. Raises what it raises; a refusal without the path that it took through the gateway."""
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop).result()
        except ApiError as error:
            raise error.with_traceback(None) from None

    def close(self) -> None:
        """End the loop."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
