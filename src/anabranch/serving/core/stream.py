"""`Stream`: outputs of one request on their way to whoever reads them, and what becomes of a request whose reader is slow.

    fewer than BUFFER wait        the request runs
    BUFFER wait                   it is paused; what was on its way then is joined to the last output, so nothing is lost
    BUFFER / 2 wait               it is resumed
    paused for STALL_S            it is aborted

Every engine client has one per request, so a slow reader is the same everywhere. How a request is paused is the client's business.
"""

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Self

from anabranch.serving.core.request import Output

logger = logging.getLogger(__name__)

# Outputs that wait for a reader before its request is paused.
BUFFER = 256

# A reader that leaves its request paused for so long has it ended.
STALL_S = 30.0


def joined(first: Output, second: Output) -> Output:
    """Two outputs of one request as one."""
    return replace(
        second,
        tokens=first.tokens + second.tokens,
        logprobs=first.logprobs + second.logprobs,
        routing=first.routing + second.routing,
        explained=second.explained or first.explained,
        prompt_logprobs=first.prompt_logprobs + second.prompt_logprobs,
        cached_tokens=second.cached_tokens if first.cached_tokens is None else first.cached_tokens,
        embedding=second.embedding or first.embedding,
        rewiring=first.rewiring + second.rewiring,
        rewire_state=second.rewire_state or first.rewire_state,
        path=second.path if first.path is None else first.path,
        computed=second.computed if first.computed is None else first.computed,
        queue_s=second.queue_s if first.queue_s is None else first.queue_s,
        is_prepared=first.is_prepared if second.is_prepared is None else second.is_prepared,
    )


class Stream:
    """See the module. Use it as ``with``: one that is left before the request has ended aborts it. For the event loop's thread.

    Args:
        id: the request's.
        pause, resume, abort: told the id when that is to happen. Each may come too late, for a request that has ended.
        buffer, stall_s: instead of `BUFFER` and `STALL_S`, see `Request`.
    """

    def __init__(
        self,
        id: str,
        *,
        pause: Callable[[str], None],
        resume: Callable[[str], None],
        abort: Callable[[str], None],
        buffer: int | None = None,
        stall_s: float | None = None,
    ) -> None:
        self.id = id
        # For whoever runs it to say.
        self.has_begun = self.has_ended = False
        self._pause, self._resume, self._abort = pause, resume, abort
        self._buffer, self._stall_s = buffer or BUFFER, STALL_S if stall_s is None else stall_s
        self._is_paused = False
        self._held: deque[Output | Exception] = deque()
        self._news = asyncio.Event()
        # While the request is paused.
        self._stall: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._unstall()
        if not self.has_ended:
            self._abort(self.id)

    @property
    def is_over(self) -> bool:
        """Whether the request has ended and its last output has been taken."""
        return self.has_ended and not self._held

    def push(self, output: Output) -> None:
        """Add an output. The one with a reason to finish is the last."""
        last = self._held[-1] if len(self._held) >= self._buffer else None
        if isinstance(last, Output):
            self._held[-1] = joined(last, output)
        else:
            self._held.append(output)
        if output.finish is not None:
            self.has_ended = True
            self._unstall()
        elif len(self._held) >= self._buffer and not self._is_paused:
            self._is_paused = True
            if self._stall_s < math.inf:
                self._stall = asyncio.get_running_loop().call_later(self._stall_s, self._give_up)
            self._pause(self.id)
        self._news.set()

    def refuse(self, error: Exception) -> None:
        """End it: the request cannot run; `take` raises why."""
        self.has_ended = True
        self._held.append(error)
        self._news.set()

    async def take(self) -> Output:
        """The next output, when there is one. Raises what `refuse` was given."""
        while not self._held:
            self._news.clear()
            await self._news.wait()
        output = self._held.popleft()
        if isinstance(output, Exception):
            raise output
        if len(self._held) <= self._buffer // 2 and self._unstall():
            self._resume(self.id)
        return output

    def _unstall(self) -> bool:
        """Nobody waits for the reader any longer; whether somebody did."""
        stall, self._stall = self._stall, None
        if stall is not None:
            stall.cancel()
        was_paused, self._is_paused = self._is_paused, False
        return was_paused

    def _give_up(self) -> None:
        logger.warning("request %s is ended: nobody has read its output for %g s", self.id, self._stall_s)
        self._abort(self.id)
