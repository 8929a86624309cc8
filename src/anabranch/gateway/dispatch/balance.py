"""Which deployment of a group gets the next attempt."""

import random
from collections.abc import Callable, Sequence

from anabranch.gateway.dispatch.deployment_state import Live
from anabranch.gateway.dispatch.deployments import Balance

# What a deployment's speed per token is weighed with.
EXPECTED_TOKENS = 200


def pick(policy: Balance, choices: Sequence[Live], now: float, rng: random.Random) -> Live:
    """One of ``choices`` (at least one)."""
    return choices[0] if len(choices) == 1 else POLICIES[policy](choices, now, rng)


def weighted(choices: Sequence[Live], now: float, rng: random.Random) -> Live:
    """In proportion to weight and to recent success; weight 0 only where all have it."""
    weights = [live.deployment.weight * (1.0 - live.failing) for live in choices]
    return rng.choices(choices, weights if sum(weights) > 0 else None)[0]


def least_in_flight(choices: Sequence[Live], now: float, rng: random.Random) -> Live:
    """The less busy of two drawn at random, for its weight (power of two choices); the healthier where they are equal."""
    first, second = rng.sample(choices, 2)

    def busy(live: Live) -> tuple[float, float]:
        return (live.in_flight + 1) / max(live.deployment.weight, 1e-9), live.failing

    return second if busy(second) < busy(first) else first


def latency(choices: Sequence[Live], now: float, rng: random.Random) -> Live:
    """Least smoothed time to an answer, times what waits there, over recent success. The unknown come first, so that they get known."""

    def expected_s(live: Live) -> float:
        if live.first_token_s is not None:
            whole = live.first_token_s + EXPECTED_TOKENS * (live.token_s or 0.0)
        else:
            whole = live.latency_s or 0.0
        return (whole + 1e-6) * (live.in_flight + 1) / max(1.0 - live.failing, 1e-3)

    return _least(choices, expected_s, rng)


def tpm(choices: Sequence[Live], now: float, rng: random.Random) -> Live:
    """Most tokens left in this minute; the unlimited first, by what is in flight."""

    def used(live: Live) -> tuple[float, float]:
        limit = live.deployment.tpm
        return (-limit + live.tokens.at(now) if limit is not None else -float("inf")), live.in_flight

    return _least(choices, used, rng)


def price(choices: Sequence[Live], now: float, rng: random.Random) -> Live:
    """Cheapest tokens, in and out taken together; the less busy where they cost the same. What has no price comes last."""

    def cost(live: Live) -> tuple[float, ...]:
        return not live.deployment.is_priced, live.price.input + live.price.output, live.in_flight

    return _least(choices, cost, rng)


def _least(choices: Sequence[Live], key: Callable[[Live], float | tuple[float, ...]], rng: random.Random) -> Live:
    keys = [key(live) for live in choices]
    least = min(keys)
    ties = [live for live, value in zip(choices, keys, strict=True) if value == least]
    return ties[0] if len(ties) == 1 else rng.choice(ties)


POLICIES: dict[Balance, Callable[[Sequence[Live], float, random.Random], Live]] = {
    "weighted": weighted,
    "least_in_flight": least_in_flight,
    "latency": latency,
    "tpm": tpm,
    "price": price,
}
