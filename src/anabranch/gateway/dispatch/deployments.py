"""What a `Dispatcher` is made from: groups of deployments and rules."""

from dataclasses import dataclass, field
from typing import Literal

from anabranch.config import Config, Field, configclass
from anabranch.errors import ConfigError
from anabranch.gateway.dispatch.breaker import BreakerRules
from anabranch.gateway.output_speeds import OUTPUT_SPEED
from anabranch.gateway.providers.provider import Provider
from anabranch.routers.money import Price

Balance = Literal["weighted", "least_in_flight", "latency", "tpm", "price"]
MidStream = Literal["error", "continue", "restart"]


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """One place where a model can be asked.

    Attributes:
        name: unlike any other.
        provider: config of what talks to it.
        weight: share of the requests, for ``weighted``.
        timeout_s: most seconds to a whole answer.
        first_token_timeout_s: most seconds to the first token of a stream.
        idle_timeout_s: most seconds between two signs of life of a stream (events, pings, comments); None for ``timeout_s``.
        rpm: most requests in a minute; None for no limit.
        tpm: most tokens in a minute, prompts and completions.
        max_in_flight: most requests at once.
        key_share: of those that other senders leave, the part that one may have in this process; 1 for all.
        price: if it differs from the group's.
        is_priced: what it costs is known; otherwise its price says nothing.
        output_speed: tokens a second of one answer, at most.
        thinks: it may think what it does not show; None if its name and the request are to tell, see `may_think`.
        stops_when_closed: it stops making a stream once the connection is closed; None if its provider is to tell.
    """

    name: str
    provider: Provider.Config
    weight: float = 1.0
    timeout_s: float = 120.0
    first_token_timeout_s: float = 30.0
    idle_timeout_s: float | None = None
    rpm: int | None = None
    tpm: int | None = None
    max_in_flight: int | None = None
    key_share: float = 1.0
    price: Price | None = None
    is_priced: bool = True
    output_speed: float = OUTPUT_SPEED
    thinks: bool | None = None
    stops_when_closed: bool | None = None

    @property
    def is_limited(self) -> bool:
        """It has a limit of its own."""
        return self.rpm is not None or self.tpm is not None or self.max_in_flight is not None

    @property
    def idle_s(self) -> float:
        """Most seconds between two events of a stream."""
        return self.timeout_s if self.idle_timeout_s is None else self.idle_timeout_s


@dataclass(frozen=True, kw_only=True)
class Group:
    """A model: one deployment or several that answer alike.

    Attributes:
        name: as strategies and plans know it.
        deployments: at least one.
        price: of its tokens.
        context: most prompt and completion tokens; None if unknown.
        parameters: billions; None if unknown.
        description: what it is good at.
        balance: how a deployment is chosen.
    """

    name: str
    deployments: tuple[Deployment, ...]
    price: Price = field(default_factory=Price)
    context: int | None = None
    parameters: float | None = None
    description: str = ""
    balance: Balance = "least_in_flight"

    def __post_init__(self) -> None:
        if not self.deployments:
            raise ConfigError(f"model {self.name!r} has no deployment; it needs at least one")


@configclass
class DispatchRules(Config):
    """How attempts follow one another.

    Attributes:
        retries: more attempts at one model before the next is asked.
        backoff_s: the first retry waits up to this long, each further one up to twice as long as the one before.
        max_backoff_s: most seconds a retry waits of itself.
        extra: share of requests in ``window_s`` that may be attempts beyond the first (retries, fallbacks, hedges).
        min_extra: extra attempts that any window may have, however quiet it is.
        window_s: the window of ``extra``, seconds.
        hedge: ask a second deployment when the first takes longer than most do.
        hedge_quantile, hedge_min_s, hedge_samples: how long that is: see `HedgeDelay`.
        mid_stream: what to do when a stream breaks after its first token. ``restart`` only happens to senders that opted in.
        heartbeat_s: a comment is sent when a stream has been silent for so long.
        read_on_s: most seconds that a whole answer which was given up is read on for what it costs; 0 for not at all.
        read_on: most answers that are read on at once.
        margin_s: seconds of tokens that an upstream may make after a stream was dropped.
        bytes_per_token: of text, at least, in the mean, where an upstream does not say how many tokens it was.
        breaker: when a deployment is left alone.
    """

    retries: int = Field(default=2, ge=0, le=20)
    backoff_s: float = Field(default=0.05, ge=0)
    max_backoff_s: float = Field(default=2.0, ge=0)
    extra: float = Field(default=0.2, ge=0, le=10)
    min_extra: int = Field(default=10, ge=0)
    window_s: float = Field(default=10.0, gt=0)
    hedge: bool = False
    hedge_quantile: float = Field(default=0.95, gt=0, lt=1)
    hedge_min_s: float = Field(default=0.0, ge=0)
    hedge_samples: int = Field(default=20, ge=1)
    mid_stream: MidStream = "error"
    heartbeat_s: float = Field(default=15.0, gt=0)
    read_on_s: float = Field(default=60.0, ge=0)
    read_on: int = Field(default=256, ge=0)
    margin_s: float = Field(default=1.0, ge=0)
    bytes_per_token: float = Field(default=1.0, ge=1, le=16)
    breaker: BreakerRules = BreakerRules()
