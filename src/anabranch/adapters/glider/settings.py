"""``pool.json``: how a pool chooses, what makes vectors of its texts, and who writes instructions of queries; the same for all commands.

    {"threshold": 0.4, "embedder": "hidden-states"}
    {"embedder": {"url": "http://127.0.0.1:9000/v1", "model": "nomic-embed-text-v1.5"},
     "writer": {"url": "https://api.example.com/v1", "model": "small", "key_env": "EXAMPLE_KEY"}, "wait_s": 0.5}

Vectors are in no file. Those of the experts are made by the same embedder as those of queries each time a pool is read.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from ipaddress import ip_address
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from anabranch.adapters.glider.choosing import GliderConfig
from anabranch.adapters.glider.embed import TextEmbedder
from anabranch.adapters.glider.endpoint import ChatWriter, EndpointEmbedder
from anabranch.bounds import shown
from anabranch.config import Config, Field, configclass, from_dict
from anabranch.errors import ConfigError
from anabranch.web.endpoint import Endpoint

__all__ = ["ALLOWED", "KEYS", "Plugins", "PoolSettings", "TextEndpoint", "read_settings"]

E = TypeVar("E", bound=Endpoint)

# What may stand in the place of an endpoint.
_WORDS: dict[str, tuple[str | None, ...]] = {"embedder": ("tfidf", "hidden-states"), "writer": (None,)}

# Environment variable: addresses beyond this machine that files of pools may name, with commas between them.
ALLOWED = "ANABRANCH_POOL_ENDPOINTS"
# And variables whose values they may send as keys, likewise: a file from elsewhere could name any.
KEYS = "ANABRANCH_POOL_KEYS"


@configclass
class TextEndpoint(Config):
    """An address that speaks OpenAI's API.

    Attributes:
        url: up to and with the version. One that is not of this machine must stand in the environment variable `ALLOWED`: a pool may come
            from elsewhere, and queries, and the key, go there.
        model: its name there.
        key_env: environment variable that holds the key, one that `KEYS` names, wherever the endpoint is; None for an endpoint that wants
            none.
        timeout_s: of a call.
    """

    url: str
    model: str
    key_env: str | None = None
    timeout_s: float = Field(default=10.0, gt=0, le=600)

    def build(self, kind: Callable[..., E]) -> E:
        """An `anabranch.web.endpoint.Endpoint` of a kind. Raises ConfigError as that, and for an address or a key that is not allowed."""
        # First: whether a variable is set is nothing that a file should learn either.
        if self.key_env is not None and self.key_env not in _said(KEYS):
            raise ConfigError(
                f"key_env is {shown(self.key_env)}, and the value of that variable would be sent to the endpoint; if you trust the pool "
                f"with it, set {KEYS}={self.key_env if self.key_env.isidentifier() else 'NAME'} in the environment"
            )
        made = kind(self.url, self.model, key_env=self.key_env, timeout_s=self.timeout_s)
        if not (_is_here(made.url) or made.url in {one.rstrip("/") for one in _said(ALLOWED)}):
            raise ConfigError(
                f"the endpoint {made.url} is not on this machine, and queries would go there; if you trust it, set "
                f"{ALLOWED}={made.url} in the environment"
            )
        return made


@configclass
class PoolSettings(GliderConfig):
    """Fields of ``pool.json``, beside those of `GliderConfig`.

    Attributes:
        embedder: ``tfidf`` (`TextFeatures`), ``hidden-states`` (`HiddenStates` of the model that the pool is on), or an endpoint.
        writer: an endpoint that writes instructions of queries; None compares queries themselves.
        wait_s: how long a request to a server waits for what endpoints make of its query, after which it goes by its tokens alone, and
            the next one with the same query by what has come meanwhile; None for as long as they take. While eight calls are under way
            no request waits for another, and endpoints that made eight in a row wait in vain are left alone for ten seconds.
    """

    embedder: Literal["tfidf", "hidden-states"] | TextEndpoint = "tfidf"
    writer: TextEndpoint | None = None
    wait_s: float | None = Field(default=None, ge=0, le=600)

    def __post_init__(self) -> None:
        GliderConfig.__post_init__(self)
        if self.wait_s is not None and not self.is_remote:
            raise ConfigError(f"wait_s is {self.wait_s}, and no endpoint is waited for; leave it out")

    @property
    def choice(self) -> GliderConfig:
        """How experts are chosen, alone."""
        return GliderConfig(**{one.name: getattr(self, one.name) for one in fields(GliderConfig)})

    @property
    def is_remote(self) -> bool:
        """Whether endpoints have a part in what a query says."""
        return self.writer is not None or isinstance(self.embedder, TextEndpoint)

    @property
    def needs_model(self) -> bool:
        """Whether queries are compared by states of the model."""
        return self.instruction and self.embedder == "hidden-states"

    def plugins(
        self, states: TextEmbedder | Callable[[Sequence[str]], Any] | None = None, given: "Plugins | None" = None
    ) -> "Plugins":
        """What the file names; nothing where no text is compared (``instruction`` is False).

        Args:
            states: the `HiddenStates` of the model; None where there is none.
            given: what goes before it.

        Raises ConfigError for an endpoint that is none, or is not allowed, a variable that is not set, and ``hidden-states`` of no model.
        """
        given = Plugins() if given is None else given
        if not self.instruction:
            return given
        embedder, writer = given.embedder, given.writer
        if embedder is None and isinstance(self.embedder, TextEndpoint):
            embedder = _named("embedder", self.embedder, EndpointEmbedder)
        elif embedder is None and self.needs_model:
            if states is None:
                raise ConfigError("embedder is 'hidden-states', of the model that the pool is on, and none is given")
            embedder = states
        if writer is None and self.writer is not None:
            writer = _named("writer", self.writer, ChatWriter)
        return Plugins(embedder, writer)


@dataclass(frozen=True)
class Plugins:
    """Arguments of `GliderPool`.

    Attributes:
        embedder, writer: see there.
    """

    embedder: Any = None
    writer: Callable[[str], str] | None = None


def read_settings(said: Mapping[str, Any], decided: Mapping[str, Any], num_experts: int) -> PoolSettings:
    """The settings of a pool: what its file ``said``, and before that what was ``decided``.

    Raises ConfigError for a field that there is not, a value that cannot be, and more than the experts allow.
    """
    for name, words in _WORDS.items():
        value = said.get(name, words[0])
        if not isinstance(value, dict) and not any(value is word or value == word for word in words):
            choice = "" if words == (None,) else f"{', '.join(map(repr, words))} or "
            raise ConfigError(
                f"{name} is {shown(value)}; it must be {choice}a table of an endpoint: url, model, key_env, timeout_s"
            )
    settings = from_dict(PoolSettings, {**said, **decided})
    settings.router(num_experts)
    return settings


def _named(what: str, said: TextEndpoint, kind: Callable[..., E]) -> E:
    try:
        return said.build(kind)
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}") from None


def _said(variable: str) -> set[str]:
    """What an environment variable lists."""
    return {one.strip() for one in os.environ.get(variable, "").split(",") if one.strip()}


def _is_here(url: str) -> bool:
    """Whether an address is of this machine; what is no address is told by the endpoint."""
    try:
        host = urlsplit(url).hostname or ""
        return host in ("", "localhost") or ip_address(host).is_loopback
    except ValueError:
        return False
