"""A gateway without a config: three models that are scripted, and strategies that need no learning."""

from anabranch.gateway.config.gateway import GatewayConfig
from anabranch.gateway.config.parts import DeploymentConfig, ModelConfig, StrategyConfig
from anabranch.gateway.money import Price
from anabranch.gateway.providers.mock import Mock


def default_config() -> GatewayConfig:
    """A mock pool: small, medium and large."""
    return GatewayConfig(
        models=(
            _model("small", 0.02, 400, Price.of_dollars(0.05, 0.2), 3),
            _model("medium", 0.06, 200, Price.of_dollars(0.4, 1.6), 14),
            _model("large", 0.15, 100, Price.of_dollars(2.5, 10), 70),
        ),
        strategies={
            name: StrategyConfig(use=name) for name in ("rules", "cheapest", "least_latency", "round_robin", "random")
        },
        require_key=False,
        store="gateway.db",
    )


def _model(name: str, latency_s: float, tokens_per_s: float, price: Price, parameters: float) -> ModelConfig:
    provider = Mock.Config(model=name, latency_s=latency_s, tokens_per_s=tokens_per_s)
    return ModelConfig(
        name=name, price=price, parameters=parameters, deployments=(DeploymentConfig(provider=provider),)
    )
