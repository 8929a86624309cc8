"""`Shared`: all that this process shares with others, and the task that keeps it so."""

import asyncio
import contextlib
from collections.abc import Callable

from anabranch.gateway.config.shared import SharedConfig
from anabranch.gateway.dispatch import Dispatcher
from anabranch.gateway.metrics import Metrics
from anabranch.gateway.shared.answers import SharedAnswers
from anabranch.gateway.shared.breakers import SharedBreakers
from anabranch.gateway.shared.clears import SharedClears
from anabranch.gateway.shared.counts import RedisCounts
from anabranch.gateway.shared.link import AwayError, Link
from anabranch.gateway.shared.meanings import SharedMeanings
from anabranch.gateway.shared.rooms import RedisRooms

# Between looks at what others told.
LOOK_S = 0.5


class Shared:
    """What one process shares.

    Args:
        config: where.
        metrics: where it is told whether that answers.

    Raises MissingExtraError, ConfigError: see `Link`.
    """

    def __init__(self, config: SharedConfig, metrics: Metrics) -> None:
        self.link, self._wake = Link(config, metrics), asyncio.Event()
        self.counts = RedisCounts(self.link, self._wake.set)
        self.rooms = RedisRooms(self.link, self._wake.set)
        self.breakers = SharedBreakers(self.link)
        self.clears = SharedClears(self.link)
        self.answers = SharedAnswers(self.link, config.answer_bytes) if config.answers else None
        self.meanings = SharedMeanings(self.link, config.answer_bytes) if config.answers else None

    async def start(self) -> None:
        """Look whether it is there. Where it is not, that is said once, and all goes on."""
        await self.link.start()
        # What was cleared before this process was there it has not kept.
        with contextlib.suppress(AwayError):
            await self.clears.news()

    async def watch(self, dispatcher: Callable[[], Dispatcher], forget: Callable[[str | None], object]) -> None:
        """Until it is cancelled: tell what happens here, and take over what others tell.

        Args:
            dispatcher: in use now.
            forget: called with a key whose kept answers an operator cleared elsewhere, or with None for those of all.
        """
        time, look_at = asyncio.get_running_loop().time, 0.0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, look_at - time())):
                    await self._wake.wait()
            self._wake.clear()
            if time() >= look_at:
                await self._exchange(dispatcher(), forget)
                look_at = time() + LOOK_S
            try:
                await self.counts.tell()
                await self.rooms.tell()
            except AwayError:
                # Nothing wakes this before somebody has looked whether it is back.
                await asyncio.sleep(max(0.0, look_at - time()))

    async def clear(self, tenant: str | None = None) -> None:
        """Forget the answers of a key, or all: those that are shared, and those that other processes hold. Raises AwayError."""
        for kept in (self.answers, self.meanings):
            if kept is not None:
                await kept.clear(tenant)
        # Afterwards: who has forgotten them must not find them there again.
        await self.clears.tell(tenant)

    async def _exchange(self, dispatcher: Dispatcher, forget: Callable[[str | None], object]) -> None:
        await self.link.look()
        with contextlib.suppress(AwayError):
            for tenant in await self.clears.news():
                forget(tenant)
        # Whatever is wrong with the one, the other goes on. Without it, its own breakers are all that it has.
        with contextlib.suppress(AwayError):
            await self.breakers.exchange(dispatcher.lives(), dispatcher.now())

    async def close(self) -> None:
        """Let go of it. What is under way is over, or ends by its lease."""
        for kept in (self.answers, self.meanings):
            if kept is not None:
                await kept.close()
        # Else its leases end by themselves.
        with contextlib.suppress(AwayError):
            await self.counts.tell()
            await self.rooms.tell()
        await self.link.close()
