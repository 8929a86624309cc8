"""The files in use, and how new ones take their place.

`Holder.current` is one reference. A request reads it once and keeps what it read, so a swap is an assignment: requests under
way end with the old files, which are freed when the last of them is done; both are in memory for that time. New files are
read, checked and tried in a thread before they count; if they cannot be used, the old ones stay.
"""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from anabranch.errors import AnabranchError
from anabranch.graph.serve.sources import Loaded, Sources

logger = logging.getLogger(__name__)


class Holder:
    """Holds what is served. All methods run in the event loop.

    Args:
        sources: the files.
        loaded: called with the outcome of each attempt: True for a swap, False for files that could not be used.
    """

    def __init__(self, sources: Sources, loaded: Callable[[bool], None] = lambda worked: None) -> None:
        self.sources = sources
        self.current: Loaded | None = None
        # Of the newest attempt.
        self.failure: AnabranchError | None = None
        self._seen = sources.signature()
        self._loaded, self._lock = loaded, asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="load")

    async def reload(self) -> Loaded:
        """Read the files and swap. One attempt at a time; others wait for their own turn.

        Raises AnabranchError where they cannot be used; what was served before still is.
        """
        async with self._lock:
            generation = 1 if self.current is None else self.current.generation + 1
            self._seen = self.sources.signature()
            try:
                new = await asyncio.get_running_loop().run_in_executor(self._thread, self.sources.load, generation)
            except AnabranchError as error:
                self.failure = error
                self._loaded(False)
                raise
            self.current, self.failure = new, None
            self._loaded(True)
            return new

    async def watch(self, every_s: float) -> None:
        """Reload whenever files have changed and then stayed the same for ``every_s`` seconds. Runs until it is cancelled."""
        last = self._seen
        while True:
            await asyncio.sleep(every_s)
            now = self.sources.signature()
            if now == last and now != self._seen:
                try:
                    new = await self.reload()
                    logger.info("files changed: generation %d is served", new.generation)
                except AnabranchError as error:
                    logger.warning("files changed but cannot be used, the old ones are still served: %s", error)
                except Exception:
                    # A bug of ours must not end the watch without a word.
                    logger.exception("files changed and reading them failed")
            last = now

    def close(self) -> None:
        """End the thread, and take no changes any more."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self.sources.close()
