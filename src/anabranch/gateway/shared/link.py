"""`Link`: the way to Redis. Whatever is wrong with it, nobody waits for it longer than ``timeout_s``."""

import asyncio
import contextlib
import hashlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from anabranch.errors import AnabranchError, ConfigError
from anabranch.extras import require
from anabranch.gateway.config.shared import SharedConfig
from anabranch.gateway.metrics import Metrics
from anabranch.redaction import hide_passwords

T = TypeVar("T")
logger = logging.getLogger(__name__)

# After a failure nobody asks for so long, but for one who looks whether it is back; after each look in vain twice as long, up to this. Not
# more often: a name that cannot be resolved holds a thread for seconds.
RETRY_S, LONGEST_RETRY_S = 1.0, 15.0

# Between lines of the log that say it is away: a link that comes and goes is not told each time.
SAID_S = 60.0

# What reading an answer raises that is of another kind than what was asked for: something else sits at the other end, or in between.
UNREAD = (AttributeError, LookupError, TypeError, ValueError)

# More connections than this do not make one Redis faster.
CONNECTIONS = 16


class Script:
    """A program in Lua that Redis runs in one step; it is sent once and then named by its SHA-1.

    Args:
        text: of the program.
    """

    def __init__(self, text: str) -> None:
        self.text, self.sha = text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


class AwayError(AnabranchError):
    """Redis does not answer, or not in time, or not what was asked."""


class RefusedError(AwayError):
    """Redis is there, and refuses this one command, as where something else lies under the name: all others go on."""


class Link:
    """One connection pool, which knows whether there is somebody at its end.

    Args:
        config: see there.
        metrics: where it is told.
        clock: seconds, rising.

    Raises MissingExtraError without the package ``redis``, ConfigError for a URL that names a variable that is not set.
    """

    def __init__(self, config: SharedConfig, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        require("redis", by="shared", of="redis")
        self._config, self._clock, self._metrics = config, clock, metrics.shared()
        self._url, self._client = config.revealed(), None
        self._errors: tuple[type[BaseException], ...] = (OSError, TimeoutError, *UNREAD)
        # What the server says of one command.
        self._refusals: tuple[type[BaseException], ...] = ()
        self._retry_at, self._said_at, self._refused_at = -math.inf, -math.inf, -math.inf
        self._retry_s, self._is_said = RETRY_S, False
        self.is_up = False

    def key(self, *parts: str) -> str:
        """Of something that is shared; the first part names what kind it is of."""
        return ":".join((self._config.prefix, "1", *parts))

    async def start(self) -> None:
        """Look whether it is there; if not, that is said, and all goes on without it."""
        if self._client is None:
            self._client = self._made()
        await self.look()

    def _made(self) -> Any:
        from redis.asyncio import BlockingConnectionPool, Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
        from redis.exceptions import RedisError, ResponseError

        self._errors, self._refusals = (*self._errors, RedisError), (ResponseError,)
        timeout_s = self._config.timeout_s
        try:
            pool = BlockingConnectionPool.from_url(
                self._url,
                max_connections=CONNECTIONS,
                timeout=timeout_s,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                retry=Retry(NoBackoff(), 0),
                client_name="anabranch-gateway",
                # What Redis 5 speaks too.
                protocol=2,
            )
            # Options of the URL are looked at when a connection is made.
            pool.make_connection()
        except (TypeError, ValueError) as error:
            raise ConfigError(f"shared.url has an option that cannot be: {error}") from None
        return Redis(connection_pool=pool)

    async def look(self) -> None:
        """Ask whether it is back, if it was away and nobody has asked of late."""
        if self.is_up or self._client is None or self._clock() < self._retry_at:
            return
        try:
            await self._within(_answers)
        except AwayError:
            self._retry_at = self._clock() + self._retry_s
            self._retry_s = min(2 * self._retry_s, LONGEST_RETRY_S)
            return
        self.is_up = True
        self._metrics.up.set(1)
        if self._is_said:
            self._is_said = False
            logger.warning("Redis answers again: limits, breakers and answers are shared")

    async def run(self, work: Callable[[Any], Awaitable[T]]) -> T:
        """What ``work`` brings of the client, which it reads too: an answer of another kind than what was asked is as good as none.

        Raises AwayError at once while it is away, else within ``timeout_s``; RefusedError where it is there, and refuses.
        """
        if not self.is_up:
            raise AwayError("Redis is away")
        return await self._within(work)

    async def script(self, script: Script, keys: Sequence[str], values: Sequence[Any], read: Callable[[Any], T]) -> T:
        """What ``read`` makes of what a script gives. Raises AwayError as `run` does."""

        async def work(client: Any) -> T:
            from redis.exceptions import NoScriptError

            try:
                found = await client.evalsha(script.sha, len(keys), *keys, *values)
            except NoScriptError:
                # It has been started anew.
                found = await client.eval(script.text, len(keys), *keys, *values)
            return read(found)

        return await self.run(work)

    async def each(self, pipe: Any) -> list[Any]:
        """What each command of a pipeline that is no transaction gives; None for one that was refused, which the others do not mind."""
        found = []
        for one in await pipe.execute(raise_on_error=False):
            is_refused = isinstance(one, self._refusals)
            if is_refused:
                self._refused(one)
            found.append(None if is_refused else one)
        return found

    async def _within(self, work: Callable[[Any], Awaitable[T]]) -> T:
        try:
            async with asyncio.timeout(self._config.timeout_s):
                return await work(self._client)
        except self._refusals as error:
            self._refused(error)
            raise RefusedError("Redis refuses a command") from None
        except self._errors as error:
            self._lost(error)
            raise AwayError("Redis is away") from None

    def _refused(self, error: BaseException) -> None:
        self._metrics.refused.inc()
        now = self._clock()
        if now - self._refused_at >= SAID_S:
            self._refused_at = now
            why = hide_passwords(str(error), is_url=True)[:200]
            logger.warning("Redis refuses a command (%s: %s): what it was for is not shared", type(error).__name__, why)

    def _lost(self, error: BaseException) -> None:
        now = self._clock()
        if self.is_up:
            self.is_up, self._retry_s, self._retry_at = False, RETRY_S, now + RETRY_S
        self._metrics.up.set(0)
        self._metrics.lost.inc()
        if now - self._said_at >= SAID_S:
            self._said_at, self._is_said = now, True
            why = hide_passwords(str(error), is_url=True)[:200] or "no answer in time"
            logger.warning(
                "Redis is away (%s: %s): each process goes on with limits, breakers and answers of its own",
                type(error).__name__,
                why,
            )

    async def close(self) -> None:
        """End all connections."""
        client, self._client, self.is_up = self._client, None, False
        if client is not None:
            # Whoever does not answer is not waited for.
            with contextlib.suppress(*self._errors):
                async with asyncio.timeout(self._config.timeout_s):
                    await client.aclose(close_connection_pool=True)


async def _answers(client: Any) -> None:
    """Raises ValueError where somebody else answers in its place."""
    if await client.ping() is not True:
        raise ValueError("its answer to PING is none of Redis")
