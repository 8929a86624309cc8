"""Attempts in the config: when another follows, what lost ones are charged, and when a deployment is left alone."""

from anabranch.config import Config, Field, configclass
from anabranch.gateway.output_speeds import MOST_SPEED, OUTPUT_SPEED


@configclass
class RetryConfig(Config):
    """When an attempt fails in a way that another may not.

    Attributes:
        attempts: most calls of one model for one request, the first included.
        base_s, cap_s: the wait before retry k is uniform in 0 .. min(cap, base * 2^k) seconds.
        budget: most retries, fallbacks and hedges as a share of requests, over ``window_s`` seconds, so that an outage does not
            multiply load; 0 for none at all, 1 for as many again as there are requests. Each sender has a right to that share of its own.
            A fallback for what is the request's own (too long, refused by a filter, not supported there, an answer too large to be read)
            is not charged: three in one request, or one where words alone say what it was refused for.
        least: so many there may be in any window, however quiet it is; of several senders each has its part.
        window_s: see ``budget``.
    """

    attempts: int = Field(default=3, ge=1, le=20)
    base_s: float = Field(default=0.25, ge=0)
    cap_s: float = Field(default=8.0, ge=0)
    budget: float = Field(default=0.2, ge=0, le=1)
    least: int = Field(default=10, ge=0)
    window_s: float = Field(default=10.0, gt=0)


@configclass
class HedgeConfig(Config):
    """A second attempt elsewhere while the first is slow; the first to bring a token wins, both are paid.

    Attributes:
        quantile: of recent times to the first token, after which it starts.
        min_s: never earlier than this.
        samples: times that must be known first.
    """

    quantile: float = Field(default=0.95, gt=0, lt=1)
    min_s: float = Field(default=0.05, ge=0)
    samples: int = Field(default=20, ge=1)


@configclass
class LostConfig(Config):
    """What calls are charged that brought nothing: attempts that took too long, hedges that lost, answers whose client has gone.

    Providers bill them. They are charged the most that may be billed, until the provider says less.

    Attributes:
        read_on_s: seconds that a whole answer is read on for what it costs, while what was set aside for it stays so; 0 for not at all.
        read_on: most answers that are read on at a time.
        margin_s: seconds of tokens that a provider may make after a stream was dropped.
        bytes_per_token: what text is charged by whose tokens the provider did not tell. No tokenizer makes a token of less than a byte, so
            that 1 covers every bill; English has four, and numbers or code may have little more than one.
        output_speed: tokens a second of one answer, at most, of deployments that declare none of their own: what was not seen of a stream
            that is left is charged by the time in which it can have been made. A bill is covered by what is not below the truth.
    """

    read_on_s: float = Field(default=60.0, ge=0)
    read_on: int = Field(default=256, ge=0)
    margin_s: float = Field(default=1.0, ge=0)
    bytes_per_token: float = Field(default=1.0, ge=1, le=16)
    output_speed: float = Field(default=OUTPUT_SPEED, gt=0, le=MOST_SPEED)


@configclass
class BreakerConfig(Config):
    """When a deployment is left alone.

    Attributes:
        failures: at least so many in the window,
        rate: and at least this share of its calls, open the breaker.
        window_s: sliding.
        open_s, max_open_s: open for min(open_s * 2^n, max_open_s) seconds the n-th time in a row.
        probes: requests let through at once when half open.
        successes: of probes that close it.
        senders: whose attempts took too long count as failures of a deployment that answers others once they are so many; teams, else
            users, else keys.
    """

    failures: int = Field(default=5, ge=1)
    rate: float = Field(default=0.5, gt=0, le=1)
    window_s: float = Field(default=30.0, gt=0)
    open_s: float = Field(default=5.0, gt=0)
    max_open_s: float = Field(default=300.0, gt=0)
    probes: int = Field(default=1, ge=1)
    successes: int = Field(default=2, ge=1)
    senders: int = Field(default=8, ge=1)
