"""`Leases`: what is under way in this process and counts in all of them, and what they are told when there is time.

Whatever is under way holds a lease, which its process renews while it lives; those of a process that is gone end by themselves.
"""

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable
from typing import Any

from anabranch.gateway.shared.link import Link, RefusedError, Script

# Of what is under way, and when leases are renewed.
LEASE_S, RENEW_S = 15.0, 5.0

# What waits to be told while Redis is away; more is left out, and ends by itself (leases) or is worked off (tokens).
MOST_UNTOLD = 10_000

# Told, or renewed, in one go.
MANY = 500

# Of other programs: lets go of leases that have ended. Those that end later than any made now, since the clock once ran ahead, end as one
# made now does.
ENDED = """
local function let_go(key, now, lease)
  redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
  local last = now + lease
  for _, name in ipairs(redis.call('ZRANGEBYSCORE', key, '(' .. string.format('%.17g', last), '+inf')) do
    redis.call('ZADD', key, last, name)
  end
end
"""

# How long Redis remembers up to where it was told: longer than anything is told twice.
TOLD_MS = 3_600_000

# Of other programs: whether this was told before. What came too late to be answered is told again, in the same order, though Redis may have
# done it; the numbers of what a process tells only rise.
ONCE = f"""
local function was_told(key, number)
  local last = tonumber(redis.call('GET', key) or '')
  if last and tonumber(number) <= last then return true end
  redis.call('SET', key, number, 'PX', {TOLD_MS})
  return false
end
"""

# KEYS: what is under way of one owner. ARGV: milliseconds of a lease, then names. Makes those anew that a restart forgot.
RENEW = Script("""
local time = redis.call('TIME')
local until_ms = time[1] * 1000 + time[2] / 1000 + ARGV[1]
for place = 2, #ARGV do redis.call('ZADD', KEYS[1], until_ms, ARGV[place]) end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return 1
""")


class Leases:
    """Of one kind of thing, by whose they are. Says how it is counted: `_held_key` and `_write`.

    Args:
        link: to Redis.
        wake: called where something waits to be told.
        clock: seconds, rising.
    """

    def __init__(self, link: Link, wake: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._link, self._wake, self._clock = link, wake, clock
        self._process = uuid.uuid4().hex[:12]
        # Of this process, by whose they are, what has a lease, or may have.
        self._leased: dict[str, set[str]] = {}
        self._untold: list[tuple[str, ...]] = []
        self._num_told = 0
        self._renewed_at = clock()

    def _held_key(self, whose: str) -> str:
        """Where leases lie."""
        raise NotImplementedError

    def _told_key(self, whose: str) -> str:
        """Where it lies up to which number this process has told of one owner; in one place of a cluster with all that is his."""
        raise NotImplementedError

    def _write(self, pipe: Any, kind: str, whose: str, values: list[str]) -> None:
        """Put what was told of into a pipeline; ``leave`` is done here. The first of ``values`` is its number (`ONCE`)."""
        raise NotImplementedError

    def _name(self, id: str) -> str:
        return f"{self._process}:{id}"

    def _hold(self, whose: str, id: str) -> None:
        """Have a lease renewed from now on."""
        self._leased.setdefault(whose, set()).add(id)

    def _drop(self, whose: str, id: str) -> bool:
        """Renew it no more; whether it may have had one."""
        ids = self._leased.get(whose)
        if ids is None or id not in ids:
            return False
        ids.discard(id)
        if not ids:
            del self._leased[whose]
        return True

    def leave(self, whose: str, id: str) -> None:
        """It is under way no more."""
        if self._drop(whose, id):
            self._tell("leave", whose, self._name(id))

    def _tell(self, *what: str) -> None:
        """What kind it is of, whose, and more: for `tell`."""
        if len(self._untold) < MOST_UNTOLD:
            kind, whose, *values = what
            self._num_told += 1
            self._untold.append((kind, whose, str(self._num_told), *values))
            self._wake()

    async def tell(self) -> None:
        """Tell what has changed, and renew leases where it is time. Raises AwayError; what was not told is told later."""
        while self._untold:
            some = self._untold[:MANY]
            await self._link.run(lambda client: self._told(client, some))  # noqa: B023
            del self._untold[: len(some)]
        if self._clock() - self._renewed_at >= RENEW_S:
            await self._renew()
            self._renewed_at = self._clock()

    async def _told(self, client: Any, some: list[tuple[str, ...]]) -> None:
        async with client.pipeline(transaction=False) as pipe:
            for kind, whose, *values in some:
                if kind == "leave":
                    # Again, it changes nothing.
                    pipe.zrem(self._held_key(whose), *values[1:])
                else:
                    self._write(pipe, kind, whose, values)
            # One that is refused would be refused again.
            await self._link.each(pipe)

    async def _renew(self) -> None:
        lease_ms = int(LEASE_S * 1e3)
        for whose, ids in list(self._leased.items()):
            names = [self._name(id) for id in ids]
            for start in range(0, len(names), MANY):
                some = (lease_ms, *names[start : start + MANY])
                # Those of others can still be renewed.
                with contextlib.suppress(RefusedError):
                    await self._link.script(RENEW, (self._held_key(whose),), some, lambda found: None)
            # Others have their turn.
            await asyncio.sleep(0)
