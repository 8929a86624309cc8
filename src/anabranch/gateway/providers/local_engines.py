"""`LocalEngines`: the engines in this process. Who asks for the same is lent the same one, and the last to give it back ends it."""

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from anabranch.serving.http.inside import Inside

logger = logging.getLogger(__name__)


class Lent:
    """An engine, and how many have it.

    Attributes:
        inside: the engine; ready for who was lent it.
    """

    def __init__(self, inside: "Inside") -> None:
        self.inside, self.users = inside, 0
        self.starting = asyncio.get_running_loop().create_task(inside.start())


class LocalEngines:
    """Those of one event loop, by what they were made from."""

    def __init__(self) -> None:
        self._lent: dict[str, Lent] = {}

    async def lend(self, name: str, make: Callable[[], "Inside"]) -> Lent:
        """One that is loaded; made if nobody has it, or if it was given up after it had died too often.

        Args:
            name: of all that it is made from.
            make: makes it, not started.

        Raises AnabranchError if it cannot be loaded.
        """
        lent = self._lent.get(name)
        if lent is None or lent.inside.has_failed:
            lent = self._lent[name] = Lent(make())
        lent.users += 1
        try:
            # Others may wait for it too.
            await asyncio.shield(lent.starting)
        except BaseException:
            await self.give_back(name, lent)
            raise
        return lent

    async def give_back(self, name: str, lent: Lent) -> None:
        """Whoever was lent it needs it no longer."""
        lent.users -= 1
        if lent.users:
            return
        if self._lent.get(name) is lent:
            del self._lent[name]
        if not lent.starting.done():
            lent.starting.cancel()
            await asyncio.wait({lent.starting})
        elif not lent.starting.cancelled() and lent.starting.exception() is None:
            await lent.inside.close()


_ENGINES: "WeakKeyDictionary[asyncio.AbstractEventLoop, LocalEngines]" = WeakKeyDictionary()


def local_engines() -> LocalEngines:
    """Those of the event loop that runs."""
    return _ENGINES.setdefault(asyncio.get_running_loop(), LocalEngines())
