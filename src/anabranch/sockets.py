"""Where a server listens: a bound socket, or a clear word why not; what it is called here, and which names mean this machine.

And where one is asked: the parts of an address.
"""

import contextlib
import errno
import ipaddress
import re
import socket
from collections.abc import Iterator, Sequence
from urllib.parse import SplitResult, urlsplit

from anabranch.bounds import shown
from anabranch.errors import ConfigError, InputError

MOST_PORT = 65_535

# A name or an IPv4 address, or an IPv6 address in brackets, with or without a port. Names hold no sign that means something in a URL, and
# no space; which letters they may have besides is for whoever looks them up.
_HOST = re.compile(
    r"(?:\[(?P<inner>[^\[\]]+)\]|(?P<name>[^\x00-\x20\x7f\[\]@/?#\\:,;%\"'<>^`{|}]+))(?::(?P<port>[0-9]{0,5}))?"
)


@contextlib.contextmanager
def listening(host: str, port: int, *, shared: bool = False) -> Iterator[socket.socket]:
    """A bound socket; ``shared`` with others of this user that say so too (SO_REUSEPORT).

    Raises InputError if the address cannot be had.
    """
    if not 0 <= port <= MOST_PORT:
        raise InputError(f"port is {port}; it must be 0 (any free one) to {MOST_PORT}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise InputError(f"cannot listen at {host!r}: {getattr(error, 'strerror', None) or error}") from None
    with listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shared:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(address)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            # No port helps where the address is another machine's.
            other = "choose another port"
            if error.errno == errno.EADDRNOTAVAIL:
                other = "use an address of this machine, or 0.0.0.0 for all of them"
            raise InputError(f"cannot listen at {host}, port {port}: {reason}; {other}") from None
        yield listener


def kept_alive(sock: socket.socket, seconds: float) -> socket.socket:
    """A TCP connection whose other end must answer with its network, not with its program, within about ``seconds``.

    A machine that is cut off, or gone without a word, so ends the connection; one whose process stands still does not. Where the system
    has no such settings the connection stays as it was.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Asked first after half of the time, then four times more.
    settings = {
        "TCP_KEEPIDLE": max(round(seconds / 2), 1),
        "TCP_KEEPINTVL": max(round(seconds / 8), 1),
        "TCP_KEEPCNT": 4,
        # While something is on its way that was not taken nobody is asked, and the system would send it again for a quarter of an hour.
        "TCP_USER_TIMEOUT": round(seconds * 1000),
    }
    for name, value in settings.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return sock


def url_of(host: str, listener: socket.socket) -> str:
    """What a client on this machine calls it."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{listener.getsockname()[1]}"


def is_local(host: str) -> bool:
    """Whether a name or address means this machine, to this machine alone."""
    if host.lower().rstrip(".") == "localhost" or host.lower().endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def name_of(host: str) -> str | None:
    """The name or address in a ``Host`` header, in small letters; None for one that has none or is none.

    A header holds a name and perhaps a port, and nothing else that a URL may have: ``localhost#.page.example`` is no name of this machine.
    """
    found = _HOST.fullmatch(host)
    if found is None:
        return None
    name, port = (found["inner"] or found["name"]).lower(), found["port"]
    if found["inner"] is not None and not _is_ipv6(name):
        return None
    return name if not port or int(port) <= MOST_PORT else None


def check_names(field: str, names: Sequence[str], any_name: str = "*") -> None:
    """Raises ConfigError for what no request names as its host, such as a URL or a name with a port, so that it would let in nobody.

    Args:
        field: of a config, for errors.
        names: of hosts.
        any_name: that stands for all.
    """
    for place, name in enumerate(names):
        is_one = name_of(name) == name.lower() and any_name not in name
        if name != any_name and not is_one and not _is_ipv6(name):
            raise ConfigError(
                f"{field}.{place} is {shown(name)}; write a name such as gateway.example, without http:// and port, or {any_name} for all"
            )


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def http_parts(url: str) -> SplitResult | None:
    """The parts of an http or https URL with a host and, if it has one, a port; None for what is no such URL.

    No URL is one with brackets around what is no IPv6 address, as templates have it: ``https://[your-resource].openai.azure.com``.
    """
    try:
        parts = urlsplit(url)
        # Looked at only when it is read.
        _ = parts.port
    except ValueError:
        return None
    return parts if parts.scheme in ("http", "https") and parts.hostname else None
