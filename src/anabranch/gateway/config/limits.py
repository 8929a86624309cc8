"""Limits in the config: what one request, and one sender, may ask for."""

from anabranch.config import Config, Field, configclass
from anabranch.errors import ConfigError


@configclass
class LimitsConfig(Config):
    """What one request, and one sender, may ask for.

    Attributes:
        body_bytes: of a request.
        bodies_bytes: of all bodies that come, and of large ones (over 256 KiB) until their requests end, in one process; more get 429. A
            key may have half of what others leave. At least four times ``body_bytes``, so that beside a key that takes all it may there is
            room for one of any size. None is 256 MiB, or four times ``body_bytes`` if that is more.
        connections: that are open at once, of one process, at the port of requests. On those beyond it only ``/health`` answers, all else
            is 503. Read at the start, as are the next two.
        address_share: of the connections that others leave, the part that one address may have; 1 behind a proxy, where all come from one.
        header_timeout_s: seconds in which the head of a connection's first request must have come.
        body_timeout_s: seconds in which a body must have come.
        max_tokens: completion tokens reserved for a request that names none, of a model that says nothing.
        most_tokens: largest ``max_tokens`` a request may name.
        in_flight: requests at a time; more get 429.
        key_share: of the requests that others leave of those, the part that one key may have at a time; 1 for all. Likewise of a
            deployment's ``max_in_flight``.
        rpm, tpm: requests and tokens a minute of a key that has no limits of its own; None is no limit.
        max_in_flight: requests at a time of such a key; None is no limit but ``in_flight``, which is of all together.
        strategy_calls: calls of models that a strategy may make for one request, to decide or to judge an answer.
        strategy_calls_s: seconds of a request in which such calls may be under way; the rest is for the answer.
        request_usd: dollars that one request may cost in all, those calls among them; None leaves that to budgets.
        allow_unpriced: take requests of which it is not known what they cost: fields that change a price that the config does not name
            (``service_tier``, searches of the web, sound), and models without a price where a budget applies. They are charged what is
            known, which may be less than the bill.
    """

    body_bytes: int = Field(default=16 << 20, ge=1)
    bodies_bytes: int | None = Field(default=None, ge=4)
    connections: int = Field(default=2048, ge=1)
    address_share: float = Field(default=0.5, gt=0, le=1)
    header_timeout_s: float = Field(default=10.0, gt=0)
    body_timeout_s: float = Field(default=30.0, gt=0)
    max_tokens: int = Field(default=4096, ge=1)
    most_tokens: int = Field(default=1_000_000, ge=1)
    in_flight: int = Field(default=1024, ge=1)
    key_share: float = Field(default=0.75, gt=0, le=1)
    rpm: int | None = Field(default=None, ge=1)
    tpm: int | None = Field(default=None, ge=1)
    strategy_calls: int = Field(default=64, ge=0)
    strategy_calls_s: float = Field(default=60.0, gt=0)
    request_usd: float | None = Field(default=None, gt=0, le=1e6)
    max_in_flight: int | None = Field(default=None, ge=1)
    allow_unpriced: bool = False

    def __post_init__(self) -> None:
        least = 4 * self.body_bytes
        if self.bodies_bytes is not None and self.bodies_bytes < least:
            raise ConfigError(
                f"bodies_bytes is {self.bodies_bytes:,}; it needs at least {least:,}, four times body_bytes ({self.body_bytes:,}), so that "
                "a key that takes all it may leaves room for a body of another"
            )

    @property
    def room_for_bodies(self) -> int:
        """``bodies_bytes``, or what stands in place of it."""
        return max(256 << 20, 4 * self.body_bytes) if self.bodies_bytes is None else self.bodies_bytes
