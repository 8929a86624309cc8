"""What a gateway is told: models, strategies, limits; from TOML, YAML or Python."""

from anabranch.gateway.config.default import default_config
from anabranch.gateway.config.file import load_config
from anabranch.gateway.config.gateway import GatewayConfig
from anabranch.gateway.config.names import Target, find_target, names_of
from anabranch.gateway.config.parts import (
    AdminConfig,
    BreakerConfig,
    CacheConfig,
    DeploymentConfig,
    HedgeConfig,
    LimitsConfig,
    LogConfig,
    ModelConfig,
    RetryConfig,
    StrategyConfig,
)

__all__ = [
    "AdminConfig",
    "BreakerConfig",
    "CacheConfig",
    "DeploymentConfig",
    "GatewayConfig",
    "HedgeConfig",
    "LimitsConfig",
    "LogConfig",
    "ModelConfig",
    "RetryConfig",
    "StrategyConfig",
    "Target",
    "default_config",
    "find_target",
    "load_config",
    "names_of",
]
