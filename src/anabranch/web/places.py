"""`Places`: how many connections a server keeps open, in all and from one address.

Of IPv6 an address is one network of 64 bits, which is what a host is given; of IPv4 behind a translator (NAT64, 6to4) it is that of IPv4. A
site is given 48 bits, so 65,536 such networks, and who gives them out 32 bits or fewer, so as many sites again: all of one site have a part
together, which is larger, and all of one provider one that is larger still, so that others have room too.
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


# By which IPv4 hosts are seen from IPv6 (RFC 6052), and from which each network takes prefixes of its own for that (RFC 8215).
_NAT64, _OWN_NAT64 = ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("64:ff9b:1::/48")

# Bits of what is one site, and of what is one provider's; and how much of the rest beside the share of an address all of it may have.
_WIDER = ((48, 1 / 2), (32, 3 / 4))


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
    if found in _NAT64 or (found in _OWN_NAT64 and int(found) & 0xFF_FFFF):
        within = ipaddress.IPv4Address(int(found) & 0xFFFF_FFFF)
    elif found in _OWN_NAT64:
        # A shorter prefix than usual, behind which IPv4 stands further left, and zeros follow.
        return str(found)
    return str(ipaddress.IPv6Network((int(found) >> 64 << 64, 64)) if within is None else within)


@lru_cache(maxsize=4096)
def networks_of(host: str) -> tuple[str, ...]:
    """The wider networks that a `host_of` IPv6 belongs to, the narrower first; any other belongs to none."""
    if ":" not in host or not host.endswith("/64"):
        return ()
    return tuple(str(ipaddress.IPv6Network(host).supernet(new_prefix=bits)) for bits, _ in _WIDER)


class Places(Generic[T]):
    """For one thread (an event loop).

    Args:
        limit: connections; None for no limit.
        share: of what others leave, that one address may have; see `most_beside`. A first one is taken where there is a place, unless its
            site or its provider has too many: half of the rest beside that share, and three quarters.
    """

    def __init__(self, limit: int | None, share: float = 1.0) -> None:
        self._limit, self._share = limit, share
        # In the order of coming, with whose they are.
        self._open: dict[T, str] = {}
        # By address, and by each network that it belongs to.
        self._num: Counter[str] = Counter()
        self._beyond: dict[T, None] = {}

    def __len__(self) -> int:
        return len(self._open)

    def enter(self, connection: T, address: str) -> bool:
        """Whether there is a place for it. One that is idle makes place: of the same address where that has too many."""
        address = host_of(address)
        if self._limit is not None and (full := self._full(address)) is not None:
            gone = next((other for other, whose in self._open.items() if other.is_idle and _is_of(whose, full)), None)
            if gone is None:
                self._keep_beyond(connection)
                return False
            self.leave(gone)
            gone.force_close()
        self._open[connection] = address
        self._num.update((address, *networks_of(address)))
        return True

    def leave(self, connection: T) -> None:
        """It is closed. A second call does nothing."""
        self._beyond.pop(connection, None)
        address = self._open.pop(connection, None)
        if address is not None:
            for whose in (address, *networks_of(address)):
                self._num[whose] -= 1
                if not self._num[whose]:
                    del self._num[whose]

    def _full(self, address: str) -> str | None:
        """Who has too many for one more of an address: itself, or a network of it; "" for all together; None if nobody has."""
        assert self._limit is not None
        own, size = self._num[address], len(self._open)
        if own and own + 1 > most_beside(size - own, self._limit, self._share):
            return address
        narrower = own
        for network, (_, more) in zip(networks_of(address), _WIDER, strict=False):
            num = self._num[network]
            # Who is alone in it has had their part.
            if num > narrower and num + 1 > most_beside(
                size - num, self._limit, self._share + more * (1 - self._share)
            ):
                return network
            narrower = max(narrower, num)
        return "" if size >= self._limit else None

    def _keep_beyond(self, connection: T) -> None:
        self._beyond[connection] = None
        if len(self._beyond) > NUM_BEYOND:
            oldest = next(iter(self._beyond))
            self.leave(oldest)
            oldest.force_close()


def _is_of(address: str, whose: str) -> bool:
    return not whose or whose == address or whose in networks_of(address)


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
