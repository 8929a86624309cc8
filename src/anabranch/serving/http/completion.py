"""`Completion`: the choices of one request while they are made, and what is new of them on its way to one reader.

Each choice brings its next change when that before has been taken: what waits for a slow reader waits in the engine's client
(`anabranch.serving.core.stream`), and nowhere else.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from types import TracebackType
from typing import Self

from anabranch.errors import InputError
from anabranch.serving.core.admission import Ticket
from anabranch.serving.core.client import BusyError, FieldInputError
from anabranch.serving.core.request import Output, Request
from anabranch.serving.http.choice import Choice, ChoiceDelta
from anabranch.web.api_error import ApiError


class Completion:
    """Runs the choices of a request side by side. Use it as ``async with``: at its end those that still run are aborted.

    Args:
        submit: runs one sequence, see `Frontend.submit`.
        choices: to run; one that fails fails all.
        tickets: the place of each, which is given back at its end.
        param: field of the request that the engine may find it cannot do.
    """

    def __init__(
        self,
        submit: Callable[[Request], AsyncGenerator[Output]],
        choices: Sequence[Choice],
        tickets: Sequence[Ticket],
        param: str | None = None,
    ) -> None:
        self._submit, self.choices, self._tickets, self._param = submit, choices, tickets, param
        self._held: deque[ChoiceDelta] = deque()
        self._news, self._room = asyncio.Event(), asyncio.Event()
        self._open = len(choices)
        self._error: BaseException | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        both = zip(self.choices, self._tickets, strict=True)
        self._tasks = [loop.create_task(self._run(choice, ticket)) for choice, ticket in both]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def ids(self) -> tuple[str, ...]:
        """Of its sequences."""
        return tuple(choice.request.id for choice in self.choices)

    def fail(self, error: BaseException) -> None:
        """End with this error once what is held has been taken."""
        self._error = self._error or error
        self._news.set()
        self._room.set()

    async def take(self, timeout_s: float | None = None) -> list[ChoiceDelta] | None:
        """All that is there, at least one; [] when nothing has come in time, None at the end. Raises ApiError where a choice failed."""
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

    async def _run(self, choice: Choice, ticket: Ticket) -> None:
        try:
            async with contextlib.aclosing(self._submit(choice.request)) as outputs:
                async for output in outputs:
                    if self._error is not None:
                        return
                    ticket.prepared(output.is_prepared)
                    if output.is_bare:
                        continue
                    change = choice.push(output)
                    if choice.scores is not None and not choice.scores.is_complete:
                        # There is nothing new to show before the last of them.
                        if choice.brings_scores:
                            continue
                        await choice.scores.wait()
                    if change is not None:
                        ticket.started()
                        await self._hand(change)
                    if choice.finish is not None:
                        return
            self.fail(ApiError(500, "engine_failed", "the engine ended a request without a reason"))
        except asyncio.CancelledError:
            raise
        except InputError as error:
            # What the engine says can never run is the client's mistake.
            param = error.field if isinstance(error, FieldInputError) else self._param
            self.fail(ApiError(400, "invalid_value", str(error), param=param))
        except BusyError as error:
            self.fail(ApiError(503, "busy", str(error), param=self._param, headers={"Retry-After": "1"}))
        except Exception as error:
            # Told to whoever takes.
            self.fail(error)
        finally:
            ticket.close()
            self._open -= 1
            self._news.set()

    async def _hand(self, change: ChoiceDelta) -> None:
        """Hand on what is new, and wait until it has been taken."""
        self._held.append(change)
        self._news.set()
        while any(held is change for held in self._held) and self._error is None:
            self._room.clear()
            await self._room.wait()
