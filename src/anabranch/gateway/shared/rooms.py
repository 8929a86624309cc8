"""`RedisRooms`: requests, tokens and attempts at a time of each deployment that has limits of its own, counted for all processes.

One script decides on an attempt, in one step: sums over the last minute, as each process keeps them for itself (`SlidingSum`), by the
clock of Redis, and the attempts under way as leases.
"""

from typing import Any

from anabranch.gateway.dispatch.deployments import Deployment
from anabranch.gateway.dispatch.senders import OWN
from anabranch.gateway.dispatch.shared_rooms import Full, mark_of
from anabranch.gateway.shared import leases
from anabranch.gateway.shared.link import AwayError, Script

# Of the window, and of the parts of it that are kept as one.
MINUTE_MS = 60_000
PARTS = 64

# KEYS: sums of requests and of tokens by parts of the minute, attempts under way. ARGV: rpm, tpm, most at a time (0 for no limit), tokens,
# the name of the attempt, milliseconds of its lease, of the window, and of a part of it, what the names of its sender's attempts end with
# ("" shares nothing out) and the sender's part of what others leave of the attempts at a time. Gives the limit that is in the way and the
# milliseconds to wait (0 until an attempt ends, -1 for ever); nothing if none is. A part counts until all of it is older than the window.
# Parts of a time that is still to come, since the clock once ran ahead, are the newest there are: they count as of now. What is no part is
# let go of.
TAKE = Script(
    f"""
{leases.ENDED}
local OURS = '@{OWN}'
local function whole(text) return #text <= 15 and string.find(text, '^-?%d+$') and tonumber(text) end
"""
    + """
local time = redis.call('TIME')
local now = time[1] * 1000 + time[2] / 1000
local most, window, grain = tonumber(ARGV[3]), tonumber(ARGV[7]), tonumber(ARGV[8])
local here = math.floor(now / grain)
if most > 0 then
  let_go(KEYS[3], now, ARGV[6])
  local held, mark, own = redis.call('ZCARD', KEYS[3]), ARGV[9], 0
  if held >= most or (mark == OURS and held > 0 and held + 1 >= most) then return {'max_in_flight', 0} end
  if mark ~= '' and held > 0 then
    for _, name in ipairs(redis.call('ZRANGE', KEYS[3], 0, -1)) do
      if string.sub(name, -#mark) == mark then own = own + 1 end
    end
    if own > 0 and own + 1 > tonumber(ARGV[10]) * (most - held + own) then return {'max_in_flight', 0} end
  end
end
for place, amount in ipairs({1, tonumber(ARGV[4])}) do
  local full = tonumber(ARGV[place])
  if full > 0 then
    local name = place == 1 and 'rpm' or 'tpm'
    if amount > full then return {name, -1} end
    local held, parts, sum, early = redis.call('HGETALL', KEYS[place]), {}, 0, 0
    for at = 1, #held, 2 do
      local part, value = whole(held[at]), whole(held[at + 1])
      if not part or not value or part > here or (part + 1) * grain + window <= now then
        redis.call('HDEL', KEYS[place], held[at])
        if part and value and part > here then early = math.min(early + value, 1e14) end
      else
        parts[#parts + 1] = {part, value}
        sum = sum + value
      end
    end
    if early > 0 then
      redis.call('HINCRBY', KEYS[place], here, early)
      parts[#parts + 1] = {here, early}
      sum = sum + early
    end
    if sum + amount > full then
      table.sort(parts, function(one, other) return one[1] < other[1] end)
      local over = sum + amount - full
      for _, part in ipairs(parts) do
        over = over - part[2]
        if over <= 0 then return {name, math.ceil((part[1] + 1) * grain + window - now)} end
      end
      return {name, window}
    end
  end
end
for place, amount in ipairs({1, tonumber(ARGV[4])}) do
  if tonumber(ARGV[place]) > 0 then
    redis.call('HINCRBY', KEYS[place], here, amount)
    redis.call('PEXPIRE', KEYS[place], window + 2 * math.ceil(grain))
  end
end
if most > 0 then
  redis.call('ZADD', KEYS[3], now + ARGV[6], ARGV[5])
  redis.call('PEXPIRE', KEYS[3], ARGV[6])
end
return {}
"""
)

# KEYS: sums of tokens, up to where it was told. ARGV: the number of this, tokens, milliseconds of the window and of a part of it.
SPEND = Script(
    leases.ONCE
    + """
if was_told(KEYS[2], ARGV[1]) then return 0 end
local time = redis.call('TIME')
local now = time[1] * 1000 + time[2] / 1000
redis.call('HINCRBY', KEYS[1], math.floor(now / tonumber(ARGV[4])), tonumber(ARGV[2]))
redis.call('PEXPIRE', KEYS[1], tonumber(ARGV[3]) + 2 * math.ceil(tonumber(ARGV[4])))
return 1
"""
)

# KEYS: sums of tokens, up to where it was told. ARGV: the number of this, tokens to take back, milliseconds since they were taken, of the
# window and of a part of it. They are in the part of that time or in one beside it: it is told a little later than it is measured. What has
# passed by now stays passed.
BACK = Script(
    leases.ONCE
    + """
if was_told(KEYS[2], ARGV[1]) then return 0 end
local time = redis.call('TIME')
local now = time[1] * 1000 + time[2] / 1000
local left, grain = tonumber(ARGV[2]), tonumber(ARGV[5])
local first = math.floor((now - tonumber(ARGV[3])) / grain) - 1
for part = first, math.min(first + 3, math.floor(now / grain)) do
  local held = tonumber(redis.call('HGET', KEYS[1], part) or 0) or 0
  local taken = math.min(held, left)
  if taken > 0 then
    redis.call('HINCRBY', KEYS[1], part, -taken)
    left = left - taken
  end
end
return 1
"""
)

# What is said of an attempt that would never fit; it is looked at again after this, for other processes may have other limits.
AGAIN_S = 1.0


class RedisRooms(leases.Leases):
    """See `anabranch.gateway.dispatch.shared_rooms.SharedRooms`; for arguments, `Leases`."""

    def _keys(self, whose: str) -> tuple[str, str, str]:
        # In braces what must lie together in a cluster.
        rpm, tpm, held = (self._link.key("room", kind, f"{{{whose}}}") for kind in ("rpm", "tpm", "held"))
        return rpm, tpm, held

    def _held_key(self, whose: str) -> str:
        return self._keys(whose)[2]

    def _told_key(self, whose: str) -> str:
        return self._link.key("room", "told", f"{{{whose}}}", self._process)

    async def take(self, deployment: Deployment, id: str, tokens: int) -> Full | None:
        """See there."""
        name = deployment.name
        if deployment.max_in_flight is not None:
            # Before it is asked: who is cancelled meanwhile may have a lease. And while it is away, so that it learns of it later.
            self._hold(name, id)
        limits = (deployment.rpm or 0, deployment.tpm or 0, deployment.max_in_flight or 0, tokens)
        times = (int(leases.LEASE_S * 1e3), MINUTE_MS, MINUTE_MS / PARTS)
        values = (*limits, self._name(id), *times, mark_of(id), deployment.key_share)
        try:
            full = await self._link.script(TAKE, self._keys(name), values, lambda found: _full(found, tokens))
        except AwayError:
            # The counts of this process have let it through.
            return None
        except BaseException:
            self.leave(name, id)
            raise
        if full is not None:
            self._drop(name, id)
        return full

    def spent(self, deployment: Deployment, tokens: int) -> None:
        """See there."""
        if tokens and deployment.tpm is not None:
            self._tell("spent", deployment.name, str(tokens))

    def corrected(self, deployment: Deployment, by: int, ago_s: float) -> None:
        """See there."""
        ago_ms = int(ago_s * 1e3)
        if deployment.tpm is None:
            return
        if by > 0:
            # More than all there is fills it no more.
            self._tell("spent", deployment.name, str(min(by, deployment.tpm)))
        elif by and ago_ms < MINUTE_MS:
            self._tell("back", deployment.name, str(-by), str(ago_ms))

    def _write(self, pipe: Any, kind: str, whose: str, values: list[str]) -> None:
        script = BACK if kind == "back" else SPEND
        pipe.eval(script.text, 2, self._keys(whose)[1], self._told_key(whose), *values, MINUTE_MS, MINUTE_MS / PARTS)


def _full(found: Any, tokens: int) -> Full | None:
    """What `TAKE` says; None if there is room. Raises ValueError for what it does not say."""
    if found == []:
        return None
    if not (isinstance(found, list) and len(found) == 2 and type(found[1]) is int):
        raise ValueError("its answer on a limit is none of the program's")
    limit, wait_ms = found
    if limit == b"max_in_flight":
        return Full(None)
    if limit not in (b"rpm", b"tpm"):
        raise ValueError("its answer on a limit is none of the program's")
    wait_s = AGAIN_S if wait_ms < 0 else min(wait_ms, MINUTE_MS) / 1e3
    return Full(wait_s, 0 if limit == b"rpm" else tokens)
