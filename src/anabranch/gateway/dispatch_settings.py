"""From what an operator writes to what the parts take: a `GatewayConfig` as groups of deployments and rules."""

from anabranch.gateway.config import GatewayConfig, HedgeConfig, ModelConfig
from anabranch.gateway.config.prices import deployment_price, model_price
from anabranch.gateway.dispatch import BreakerRules, Deployment, DispatchRules, Group
from anabranch.routers.money import Price

# Of the deadline: a silent upstream may take one of them, so that others get their turn.
SHARES = 3


def groups_of(config: GatewayConfig) -> tuple[Group, ...]:
    """Each model as the dispatcher knows it."""
    return tuple(_group(model, config) for model in config.models)


def rules_of(config: GatewayConfig) -> DispatchRules:
    """How attempts follow one another."""
    retries, breaker, hedge = config.retries, config.breaker, config.hedge or HedgeConfig()
    return DispatchRules(
        retries=retries.attempts - 1,
        backoff_s=retries.base_s,
        max_backoff_s=retries.cap_s,
        extra=retries.budget,
        min_extra=retries.least if retries.budget else 0,
        window_s=retries.window_s,
        hedge=config.hedge is not None,
        hedge_quantile=hedge.quantile,
        hedge_min_s=hedge.min_s,
        hedge_samples=hedge.samples,
        mid_stream=config.mid_stream,
        read_on_s=config.lost.read_on_s,
        read_on=config.lost.read_on,
        margin_s=config.lost.margin_s,
        bytes_per_token=config.lost.bytes_per_token,
        breaker=BreakerRules(
            failures=breaker.failures,
            rate=breaker.rate,
            window_s=breaker.window_s,
            open_s=breaker.open_s,
            max_open_s=breaker.max_open_s,
            probes=breaker.probes,
            successes=breaker.successes,
            senders=breaker.senders,
        ),
    )


def _group(model: ModelConfig, config: GatewayConfig) -> Group:
    deployments = tuple(_deployment(model, at, config) for at in range(len(model.deployments)))
    return Group(
        name=model.name,
        deployments=deployments,
        price=model_price(model) or Price(),
        context=model.context,
        parameters=model.parameters,
        description=model.description,
        balance=model.balance or config.balance,
    )


def _deployment(model: ModelConfig, at: int, config: GatewayConfig) -> Deployment:
    """What a deployment does not say of its times, its model says, and else the deadline of the request; likewise of its answers."""
    one, deadline_s, lost = model.deployments[at], model.deadline_s or config.deadline_s, config.lost
    price = deployment_price(model, one)
    timeout_s = one.timeout_s or model.timeout_s
    first_s = one.first_token_timeout_s or one.timeout_s or model.first_token_timeout_s or model.timeout_s
    return Deployment(
        name=model.deployment_name(at),
        provider=one.provider,
        weight=one.weight,
        timeout_s=timeout_s or deadline_s,
        first_token_timeout_s=first_s or deadline_s / SHARES,
        idle_timeout_s=one.idle_timeout_s or model.idle_timeout_s,
        rpm=one.rpm,
        tpm=one.tpm,
        max_in_flight=one.max_in_flight,
        key_share=config.limits.key_share,
        output_speed=one.output_speed or model.output_speed or lost.output_speed,
        thinks=model.thinks if one.thinks is None else one.thinks,
        stops_when_closed=one.stops_when_closed,
        price=price or Price(),
        is_priced=price is not None,
    )
