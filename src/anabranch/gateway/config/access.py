"""Who may do what, in the config: keys, and the admin interface."""

from anabranch.config import Config, Field, configclass
from anabranch.errors import ConfigError, InputError
from anabranch.gateway.config.secret import Secret
from anabranch.gateway.store.speaking import check_speaks_for


@configclass
class KeysConfig(Config):
    """What holds of keys that say nothing else.

    Attributes:
        speaks_for: whose users and tags requests may name (``user``, ``x-tags``), so that they spend their budgets and stand in their
            records: ``user:NAME``, ``tag:NAME``, ``user:*``, ``tag:*``, ``*``. Other names are the key's own: ``KEY/NAME``. None is nobody
            for a key; a request without one may name everybody as long as the store has no keys.
    """

    speaks_for: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.speaks_for is not None:
            try:
                check_speaks_for("keys.speaks_for", self.speaks_for)
            except InputError as error:
                raise ConfigError(str(error)) from None


@configclass
class AdminConfig(Config):
    """The admin interface, apart from the one for requests.

    Attributes:
        key: what opens it; None leaves it closed but for the page on a loopback address.
        host, port: where it listens; port None shares the port of requests (a key is needed then).
    """

    key: Secret | None = None
    host: str = "127.0.0.1"
    port: int | None = Field(default=None, ge=0, le=65535)
