"""`Places`: how many connections a server keeps open, in all and from one address.

Of IPv6 an address is one network of 64 bits, which is what a host is given; of IPv4 behind a translator (NAT64, 6to4) it is that of IPv4. A
site is given 48 bits, so 65,536 such networks: all of one have a part together, which is larger, and leaves others room too.
"""

import ipaddress
from collections import Counter
from functools import lru_cache
from typing import Generic, Protocol, TypeVar

from anabranch.sharing import most_beside

__all__ = ["Places", "host_of", "room_for_files"]

# Beyond the limit, so that who asks whether the server lives is told; the one that came first makes place for the next.
NUM_BEYOND = 64
# Files that a server opens for other things than connections: its engine, its model, its logs.
_OTHER_FILES = 256


# By which IPv4 hosts are seen from IPv6 (RFC 6052).
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class Closable(Protocol):
    """A connection."""

    @property
    def is_idle(self) -> bool: ...
    def force_close(self) -> None: ...


T = TypeVar("T", bound=Closable)


@lru_cache(maxsize=4096)
def host_of(address: str) -> str:
    """Whose an address is: itself; of IPv6 the network of its first 64 bits, in which a host may take any; what is none as it is.

    IPv4 that was written as IPv6, or translated to it by the known prefixes, is IPv4.
    """
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return address
    within = found.ipv4_mapped or found.sixtofour
    if found in _NAT64:
        within = ipaddress.IPv4Address(int(found) & 0xFFFF_FFFF)
    return str(ipaddress.IPv6Network((int(found) >> 64 << 64, 64)) if within is None else within)


@lru_cache(maxsize=4096)
def site_of(host: str) -> str:
    """The network of 48 bits that a `host_of` IPv6 belongs to; any other is a site of its own."""
    if ":" not in host or not host.endswith("/64"):
        return host
    return str(ipaddress.IPv6Network(host).supernet(new_prefix=48))


class Places(Generic[T]):
    """For one thread (an event loop).

    Args:
        limit: connections; None for no limit.
        share: of what others leave, that one address may have; see `most_beside`. A first one is taken where there is a place, unless its
            site has too many: half as much of the rest beside that share.
    """

    def __init__(self, limit: int | None, share: float = 1.0) -> None:
        self._limit, self._share = limit, share
        # In the order of coming, with whose they are.
        self._open: dict[T, str] = {}
        self._of_address: Counter[str] = Counter()
        self._of_site: Counter[str] = Counter()
        self._beyond: dict[T, None] = {}

    def __len__(self) -> int:
        return len(self._open)

    def enter(self, connection: T, address: str) -> bool:
        """Whether there is a place for it. One that is idle makes place: of the same address where that has too many."""
        address = host_of(address)
        if self._limit is not None and (why_not := self._why_not(address)) is not None:
            site = site_of(address)
            is_theirs = {
                "limit": lambda whose: True,
                "share": lambda whose: whose == address,
                "site": lambda whose: site_of(whose) == site,
            }[why_not]
            gone = next((other for other, whose in self._open.items() if is_theirs(whose) and other.is_idle), None)
            if gone is None:
                self._keep_beyond(connection)
                return False
            self.leave(gone)
            gone.force_close()
        self._open[connection] = address
        self._of_address[address] += 1
        self._of_site[site_of(address)] += 1
        return True

    def leave(self, connection: T) -> None:
        """It is closed. A second call does nothing."""
        self._beyond.pop(connection, None)
        address = self._open.pop(connection, None)
        if address is not None:
            for counts, whose in ((self._of_address, address), (self._of_site, site_of(address))):
                counts[whose] -= 1
                if not counts[whose]:
                    del counts[whose]

    def _why_not(self, address: str) -> str | None:
        assert self._limit is not None
        own = self._of_address[address]
        if own and own + 1 > most_beside(len(self._open) - own, self._limit, self._share):
            return "share"
        of_site = self._of_site[site_of(address)]
        if of_site > own and of_site + 1 > most_beside(len(self._open) - of_site, self._limit, (1 + self._share) / 2):
            return "site"
        return "limit" if len(self._open) >= self._limit else None

    def _keep_beyond(self, connection: T) -> None:
        self._beyond[connection] = None
        if len(self._beyond) > NUM_BEYOND:
            oldest = next(iter(self._beyond))
            self.leave(oldest)
            oldest.force_close()


def room_for_files(connections: int) -> int:
    """How many of so many connections this process can have open, once it is allowed as many files as it may have."""
    try:
        import resource
    except ImportError:
        # Windows has no such limit.
        return connections
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + NUM_BEYOND + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return connections
    return max(1, min(connections, soft - NUM_BEYOND - _OTHER_FILES))
