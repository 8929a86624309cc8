"""What an operator writes reaches the part that acts on it."""

import pytest

from anabranch.gateway.config import (
    BreakerConfig,
    DeploymentConfig,
    GatewayConfig,
    HedgeConfig,
    LimitsConfig,
    LostConfig,
    ModelConfig,
    RetryConfig,
)
from anabranch.gateway.dispatch import Deployment
from anabranch.gateway.dispatch_settings import groups_of, rules_of
from anabranch.gateway.providers.mock import Mock


def config(*deployments, **fields):
    model = ModelConfig(name="m", deployments=deployments or (DeploymentConfig(provider=Mock.Config()),))
    return GatewayConfig(models=(model,), **fields)


def test_rules_are_those_of_the_config():
    made = rules_of(
        config(
            retries=RetryConfig(attempts=4, base_s=0.1, cap_s=3.0, budget=0.5, least=3, window_s=7.0),
            breaker=BreakerConfig(
                failures=2, rate=0.7, window_s=9.0, open_s=1.0, max_open_s=8.0, probes=3, successes=4, senders=5
            ),
            hedge=HedgeConfig(quantile=0.8, min_s=0.3, samples=5),
            lost=LostConfig(read_on_s=4.0, read_on=6, margin_s=0.5, bytes_per_token=2.0),
            mid_stream="continue",
        )
    )
    assert (made.read_on_s, made.read_on, made.margin_s, made.bytes_per_token) == (4.0, 6, 0.5, 2.0)
    assert (made.retries, made.backoff_s, made.max_backoff_s, made.extra, made.window_s) == (3, 0.1, 3.0, 0.5, 7.0)
    assert (made.hedge, made.hedge_quantile, made.hedge_min_s, made.hedge_samples) == (True, 0.8, 0.3, 5)
    breaker = made.breaker
    assert (breaker.failures, breaker.rate, breaker.window_s, breaker.open_s) == (2, 0.7, 9.0, 1.0)
    assert (breaker.max_open_s, breaker.probes, breaker.successes, made.mid_stream) == (8.0, 3, 4, "continue")
    assert (made.min_extra, breaker.senders) == (3, 5)
    assert not rules_of(config()).hedge
    # None is none.
    assert (rules_of(config(retries=RetryConfig(budget=0.0))).min_extra, rules_of(config()).min_extra) == (0, 10)


def test_a_deployments_places_are_shared_out_as_the_gateways_are():
    written = DeploymentConfig(provider=Mock.Config(), max_in_flight=8)
    for limits, share in ((LimitsConfig(), 0.75), (LimitsConfig(key_share=0.5), 0.5)):
        [made] = groups_of(config(written, limits=limits))[0].deployments
        assert (made.max_in_flight, made.key_share) == (8, share)


def test_a_silent_upstream_leaves_time_for_others():
    [group] = groups_of(config(deadline_s=60.0))
    assert (group.deployments[0].timeout_s, group.deployments[0].first_token_timeout_s) == (60.0, 20.0)


def test_how_answers_are_made_is_told_by_the_deployment_its_model_and_else_by_what_holds_for_all():
    written = (
        DeploymentConfig(provider=Mock.Config(), output_speed=30.0, thinks=False),
        DeploymentConfig(provider=Mock.Config()),
    )
    for fields, found in (
        ({}, [(30.0, False), (500.0, None)]),
        ({"output_speed": 70.0, "thinks": True}, [(30.0, False), (70.0, True)]),
    ):
        made = config(*written)
        model = made.models[0].replace(**fields)
        [group] = groups_of(made.replace(models=(model,)))
        assert [(one.output_speed, one.thinks) for one in group.deployments] == found
    [group] = groups_of(config(lost=LostConfig(output_speed=9.0)))
    assert group.deployments[0].output_speed == 9.0
    assert Deployment(name="d", provider=Mock.Config()).output_speed == LostConfig().output_speed


@pytest.mark.parametrize("stops", [None, True, False])
def test_whether_its_provider_stops_is_told_by_the_deployment(stops):
    [group] = groups_of(config(DeploymentConfig(provider=Mock.Config(), stops_when_closed=stops)))
    assert group.deployments[0].stops_when_closed is stops


def test_times_that_are_written_are_kept():
    written = (
        DeploymentConfig(provider=Mock.Config(), timeout_s=50.0),
        DeploymentConfig(provider=Mock.Config(), timeout_s=50.0, first_token_timeout_s=2.0),
    )
    [group] = groups_of(config(*written))
    assert [one.first_token_timeout_s for one in group.deployments] == [50.0, 2.0]
    assert [one.name for one in group.deployments] == ["m#0", "m#1"]
