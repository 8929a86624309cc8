"""What processes share on Redis, in the config."""

import re
from urllib.parse import urlsplit

from anabranch.config import Config, Field, configclass
from anabranch.errors import ConfigError
from anabranch.gateway.config.secret import Secret, is_reference

# Its number, or nothing.
_DATABASE = re.compile(r"/?|/\d{1,9}/?")


@configclass
class SharedConfig(Config):
    """Where processes count together: rates and what is under way of keys and deployments, breakers, answers of the caches.

    Needs the extra ``redis``. While Redis is away each process goes on with its own.

    Attributes:
        url: ``redis://HOST:PORT/DATABASE``, ``rediss://`` (TLS) or ``unix://PATH``; ``env:VARIABLE`` where it holds a password.
        prefix: of all keys, so that several gateways can share one Redis and nothing else.
        timeout_s: longest that a request waits for it.
        answers: of the exact and the semantic cache are shared; those of more than ``answer_bytes`` are not.
    """

    url: str
    prefix: str = "anabranch"
    timeout_s: float = Field(default=0.2, gt=0, le=5)
    answers: bool = True
    answer_bytes: int = Field(default=1 << 20, ge=1)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", self.prefix):
            raise ConfigError(f"prefix is {self.prefix!r:.100}; it must be 1 to 64 of letters, digits and _ . -")
        if not is_reference(self.url):
            check_redis_url(self.url)

    def revealed(self) -> str:
        """The URL. Raises ConfigError for a variable that is not set, or that holds no such URL."""
        if not is_reference(self.url):
            return self.url
        url = Secret(self.url, "shared.url").reveal()
        check_redis_url(url)
        return url


def check_redis_url(url: str) -> None:
    """Raises ConfigError, without the URL, which may hold a password, for one that leads to no Redis."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ConfigError("url cannot be read; write redis://HOST:6379/0, or env:VARIABLE") from None
    is_one = (
        bool(parts.hostname) and _DATABASE.fullmatch(parts.path) is not None
        if parts.scheme in ("redis", "rediss")
        else parts.scheme == "unix" and bool(parts.path)
    )
    if not is_one:
        raise ConfigError("url must be redis://HOST:6379/0, rediss://HOST:6379/0 or unix://PATH, or env:VARIABLE")
