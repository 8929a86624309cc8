"""`RedisCounts`: rates and requests under way of each key, counted for all processes in one place.

One script decides on a request, in one step that nothing comes between: the same token buckets as `anabranch.gateway.store.limits`, by
the clock of Redis, and the requests under way as leases.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from anabranch.errors import RateError
from anabranch.gateway.core.admission import Limits
from anabranch.gateway.in_flight import refusal_of_many
from anabranch.gateway.shared import leases
from anabranch.gateway.shared.link import AwayError, Link, Script
from anabranch.gateway.store.limits import REMEMBERED, Bucket, rate_refusal, refill

# Who has no key.
NOBODY = "-"

# Of the programs below: what a bucket holds now. What was written at a time that is still to come, since the clock once ran ahead, is as of
# now; nobody waits longer than a bucket is kept (LONGEST_MS); and what is no number is no bucket.
LONGEST_MS = 10**9
REFILL = f"""
local function refill(key, now, full)
  local held = redis.call('HMGET', key, 'level', 'at')
  local level, at = tonumber(held[1] or ''), tonumber(held[2] or '')
  if not level or not at then return full end
  if at > now then
    redis.call('HSET', key, 'at', string.format('%.17g', now))
    at = now
  end
  return math.max(full - full * {LONGEST_MS} / 60000, math.min(full, level + (now - at) * full / 60000))
end
"""

# KEYS: buckets of requests and of tokens, requests under way. ARGV: rpm, tpm, most at a time (0 for no limit), tokens, the name of the
# request, milliseconds of its lease, 1 to take or 0 to look. Gives the limit that is in the way and the milliseconds to wait (-1 for
# ever, 0 until one ends); if none is, "" and what the buckets hold after it, each "" where it has no limit; nothing where it only looked.
ADMIT = Script(
    f"""
{leases.ENDED}{REFILL}
"""
    + """
local time = redis.call('TIME')
local now = time[1] * 1000 + time[2] / 1000
local most, takes = tonumber(ARGV[3]), ARGV[7] == '1'
if most > 0 then
  let_go(KEYS[3], now, ARGV[6])
  if redis.call('ZCARD', KEYS[3]) >= most then return {'max_in_flight', 0} end
end
local levels = {}
for place, amount in ipairs({1, tonumber(ARGV[4])}) do
  local full = tonumber(ARGV[place])
  if full > 0 then
    local level = refill(KEYS[place], now, full)
    local name = place == 1 and 'rpm' or 'tpm'
    if amount > level + 1e-9 then
      if amount > full then return {name, -1} end
      return {name, math.ceil((amount - level) * 60000 / full)}
    end
    levels[place] = level - amount
  end
end
if takes then
  for place = 1, 2 do
    if levels[place] then
      local full = tonumber(ARGV[place])
      redis.call('HSET', KEYS[place], 'level', string.format('%.17g', levels[place]), 'at', string.format('%.17g', now))
      redis.call('PEXPIRE', KEYS[place], math.min(math.ceil((full - levels[place]) * 60000 / full) + 1000, 1000000000))
    end
  end
  if most > 0 then
    redis.call('ZADD', KEYS[3], now + ARGV[6], ARGV[5])
    redis.call('PEXPIRE', KEYS[3], ARGV[6])
  end
  return {'', levels[1] and string.format('%.17g', levels[1]) or '', levels[2] and string.format('%.17g', levels[2]) or ''}
end
return {}
"""
)

# KEYS: a bucket of tokens, up to where it was told. ARGV: the number of this, tpm, tokens used beyond what was taken.
CORRECT = Script(
    f"""
{leases.ONCE}{REFILL}
"""
    + """
if was_told(KEYS[2], ARGV[1]) then return 0 end
local time = redis.call('TIME')
local now = time[1] * 1000 + time[2] / 1000
local full = tonumber(ARGV[2])
local level = math.min(full, refill(KEYS[1], now, full) - ARGV[3])
redis.call('HSET', KEYS[1], 'level', string.format('%.17g', level), 'at', string.format('%.17g', now))
redis.call('PEXPIRE', KEYS[1], math.min(math.ceil((full - level) * 60000 / full) + 1000, 1000000000))
return 1
"""
)


class RedisCounts(leases.Leases):
    """See `anabranch.gateway.core.admission.SharedCounts`; for arguments, `Leases`."""

    def __init__(self, link: Link, wake: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(link, wake, clock)
        # As Redis told of them last; of those seen last.
        self._levels: OrderedDict[tuple[str, str], Bucket] = OrderedDict()

    def _keys(self, whose: str) -> tuple[str, str, str]:
        # In braces what must lie together in a cluster.
        rpm, tpm, held = (self._link.key(kind, f"{{{whose or NOBODY}}}") for kind in ("rpm", "tpm", "held"))
        return rpm, tpm, held

    def _held_key(self, whose: str) -> str:
        return self._keys(whose)[2]

    def _told_key(self, whose: str) -> str:
        return self._link.key("told", f"{{{whose or NOBODY}}}", self._process)

    async def admit(self, whose: str, id: str, tokens: int, limits: Limits) -> bool:
        """See there."""
        if limits.most is not None:
            # Before it is asked: who is cancelled meanwhile may have a lease. And while it is away, so that it learns of it later.
            self._hold(whose, id)
        try:
            return await self._decide(whose, id, tokens, limits, takes=True)
        except RateError:
            self._drop(whose, id)
            raise
        except BaseException:
            self.leave(whose, id)
            raise

    async def look(self, whose: str, limits: Limits) -> None:
        """See there."""
        await self._decide(whose, "", 0, limits, takes=False)

    async def _decide(self, whose: str, id: str, tokens: int, limits: Limits, *, takes: bool) -> bool:
        """Whether tokens were taken."""
        asked = (limits.rpm or 0, limits.tpm or 0, limits.most or 0, tokens)
        lease_ms = int(leases.LEASE_S * 1e3)
        keys, values = self._keys(whose), (*asked, self._name(id), lease_ms, int(takes))
        try:
            refused, levels = await self._link.script(
                ADMIT, keys, values, lambda found: _decided(found, limits, tokens)
            )
        except AwayError:
            # The counts of this process have let it through.
            return False
        for limit, level in levels.items():
            self._levels[whose, limit] = Bucket(level, self._clock())
            self._levels.move_to_end((whose, limit))
        while len(self._levels) > REMEMBERED:
            self._levels.popitem(last=False)
        if refused is not None:
            raise _refusal(*refused, tokens, limits)
        return takes and limits.tpm is not None

    def level(self, whose: str, limit: str, per_minute: int) -> float | None:
        """See there."""
        told = self._levels.get((whose, limit))
        return None if told is None else refill(told, per_minute, self._clock()).level

    def correct(self, whose: str, tokens: int, tpm: int) -> None:
        """See there."""
        if tokens:
            known = self._levels.get((whose, "tpm"))
            if known is not None:
                now = refill(known, tpm, self._clock())
                self._levels[whose, "tpm"] = Bucket(min(float(tpm), now.level - tokens), now.at_s)
            self._tell("correct", whose, str(tpm), str(tokens))

    def _write(self, pipe: Any, kind: str, whose: str, values: list[str]) -> None:
        pipe.eval(CORRECT.text, 2, self._keys(whose)[1], self._told_key(whose), *values)


def _decided(found: Any, limits: Limits, tokens: int) -> tuple[tuple[str, int] | None, dict[str, float]]:
    """What `ADMIT` gives: the limit that is in the way and the milliseconds to wait, None if none is; and what buckets hold, by limit.

    Raises ValueError for all else.
    """
    asked = {b"rpm": limits.rpm, b"tpm": limits.tpm, b"max_in_flight": limits.most}
    if found == []:
        return None, {}
    if isinstance(found, list) and len(found) == 3 and found[0] == b"":
        levels = dict(zip(("rpm", "tpm"), map(_number, found[1:]), strict=True))
        return None, {limit: level for limit, level in levels.items() if level is not None}
    is_one = isinstance(found, list) and len(found) == 2 and isinstance(found[0], bytes) and type(found[1]) is int
    if not is_one or (per_minute := asked.get(found[0])) is None:
        raise ValueError("its answer on a limit is none of the program's")
    limit, wait_ms = found[0].decode(), found[1]
    amount = 1 if limit == "rpm" else tokens
    is_told = limit != "max_in_flight" and wait_ms >= 0
    return (limit, wait_ms), {limit: amount - wait_ms * per_minute / 60_000} if is_told else {}


def _number(told: Any) -> float | None:
    """What a bucket holds; None where there is none."""
    if not isinstance(told, bytes):
        raise ValueError("what it says that a bucket holds is no text")
    return float(told) if told else None


def _refusal(limit: str, wait_ms: int, tokens: int, limits: Limits) -> RateError:
    if limit == "max_in_flight":
        assert limits.most is not None
        return refusal_of_many(limits.most)
    amount, per_minute = (1, limits.rpm) if limit == "rpm" else (tokens, limits.tpm)
    assert per_minute is not None
    return rate_refusal(limit, amount, per_minute, None if wait_ms < 0 else wait_ms / 1e3)
