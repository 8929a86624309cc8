"""`SharedBreakers`: a deployment that one process found out of order is left alone by all.

Whoever opens a breaker writes a key that lives as long as the breaker is open; whoever closes it deletes the key. All read the keys
twice a second. Each process tries for itself whether a deployment is well again, and counts failures by itself.
"""

import json
from collections.abc import Iterable
from typing import Any

from anabranch.gateway.dispatch.deployment_state import Live
from anabranch.gateway.shared.link import Link

# What Redis gives as the time of what is not there.
GONE = -2

# Longer than any breaker is open.
LONGEST_S = 86_400.0


class SharedBreakers:
    """See the module.

    Args:
        link: to Redis.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        # That changed here, and have not been told.
        self._changed: dict[str, Live] = {}
        # Whose key was there when last looked.
        self._seen: set[str] = set()

    def changed(self, live: Live) -> None:
        """A breaker has changed in this process."""
        self._changed[live.name] = live

    async def exchange(self, lives: Iterable[Live], now: float) -> None:
        """Tell what has changed here, and take over what others told. Raises AwayError.

        Args:
            lives: all deployments.
            now: by the clock of their dispatcher.
        """
        lives = list(lives)
        await self._tell(now)
        names = [live.name for live in lives]
        found = await self._link.run(lambda client: self._read(client, names)) if names else []
        for live, pair in zip(lives, found, strict=True):
            if live.name in self._changed or pair is None:
                # What happened while it was asked is newer.
                continue
            body, left_ms = pair
            if body is not None and left_ms > 0:
                self._seen.add(live.name)
                live.told_open(min(left_ms / 1e3, LONGEST_S), _times(body), now)
            elif live.name in self._seen:
                self._seen.discard(live.name)
                live.told_well(now)

    async def _tell(self, now: float) -> None:
        changed, self._changed = self._changed, {}
        try:
            if changed:
                await self._link.run(lambda client: self._write(client, list(changed.values()), now))
        except BaseException:
            self._changed = {**changed, **self._changed}
            raise

    async def _write(self, client: Any, lives: list[Live], now: float) -> None:
        async with client.pipeline(transaction=False) as pipe:
            for live in lives:
                key, breaker = self._link.key("breaker", live.name), live.breaker
                left_ms = int((breaker.until - now) * 1e3)
                if breaker.phase == "open" and left_ms > 0:
                    pipe.set(key, json.dumps({"times": breaker.times}), px=left_ms)
                elif breaker.phase == "closed":
                    pipe.delete(key)
            await self._link.each(pipe)

    async def _read(self, client: Any, names: list[str]) -> list[tuple[bytes | None, int] | None]:
        """Of each name what lies there, and its milliseconds; None where that is nothing that can be read."""
        async with client.pipeline(transaction=False) as pipe:
            for name in names:
                key = self._link.key("breaker", name)
                pipe.get(key)
                pipe.pttl(key)
            found = await self._link.each(pipe)
        pairs = list(zip(found[0::2], found[1::2], strict=True))
        if len(pairs) != len(names) or not all(
            isinstance(body, bytes | None) and isinstance(left_ms, int | None) for body, left_ms in pairs
        ):
            raise ValueError("its answer on breakers is none of ours")
        # What is refused, as where something else lies there, has its time all the same.
        return [
            None if left_ms is None or (body is None and left_ms != GONE) else (body, left_ms)
            for body, left_ms in pairs
        ]


def _times(body: bytes) -> int:
    """How often it opened in a row, by what another process wrote; once where that cannot be read."""
    try:
        times = json.loads(body)["times"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return 1
    return times if type(times) is int and 1 <= times <= 60 else 1
