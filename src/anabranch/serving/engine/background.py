"""`Background`: an engine in a thread of its own, whose tokens are read as they come, without an event loop.

with closing(Background(engine)) as running:
    for output in running.stream(prompt, Sampling(max_tokens=64)):
        output.tokens
"""

import functools
import itertools
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from anabranch.errors import AnabranchError, BackendError
from anabranch.serving.core.client import EngineInfo
from anabranch.serving.core.request import Finish, Output, Request, Sampling
from anabranch.serving.engine.at_exit import end_before_exit
from anabranch.serving.engine.engine import Engine
from anabranch.serving.engine.messages import Abort, Add, Close, Closed, Event, Refused

__all__ = ["Background"]

# Seconds that a step under way has to end when everything does.
END_S = 10.0


class Background:
    """Runs an engine beside whoever reads from it: an interrupt of the reader leaves the engine whole.

    Attributes:
        info: what the engine serves.

    Args:
        engine: loaded, and nobody else's.
    """

    def __init__(self, engine: Engine) -> None:
        self.info: EngineInfo = engine.info
        self._events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
        self._loop = engine.loop(self._events.put)
        self._numbers = itertools.count()
        self._error: str | None = None
        self._thread = threading.Thread(target=self._loop.run, name="anabranch-engine", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            raise BackendError(f"the engine's thread cannot be started: {error}") from error
        end_before_exit(self._thread, functools.partial(self._loop.put, Close()))

    def stream(self, prompt: Sequence[int], sampling: Sampling, **request: Any) -> Iterator[Output]:
        """Continue a prompt of token ids; each output as it is made, the last with its `Output.finish`. One at a time.

        Whoever reads no further ends the request. ``request``: further fields of `Request`.

        Raises InputError for a request that can never run, and AnabranchError if the engine, or this row of it, failed.
        """
        id, is_over = f"stream-{next(self._numbers)}", False
        self._check_open()
        self._loop.put(Add(Request(id=id, prompt=tuple(prompt), sampling=sampling, **request)))
        try:
            while not is_over:
                for event in self._events.get():
                    if isinstance(event, Closed):
                        is_over, self._error = True, event.error or "it was closed"
                        self._check_open()
                    output = self._of(id, event)
                    if output is not None:
                        is_over = is_over or output.finish is not None
                        yield output
        finally:
            if not is_over:
                self._loop.put(Abort(id))

    def _check_open(self) -> None:
        if self._error is not None:
            raise AnabranchError(f"the engine has ended: {self._error}; make a new one")

    @staticmethod
    def _of(id: str, event: Event) -> Output | None:
        """The request's output that an event is; None for anything else, such as what was left of one that was given up."""
        if isinstance(event, Refused) and event.id == id:
            raise event.reason
        if not isinstance(event, Output) or event.id != id:
            return None
        if event.finish is Finish.ERROR:
            raise AnabranchError(event.error or "the engine gave no reason for an error")
        return event

    def close(self) -> None:
        """End the engine, and wait a while for its last step."""
        self._loop.put(Close())
        self._thread.join(END_S)
        self._error = self._error or "it was closed"
