"""One file is one gateway: its models, deployments, strategies and limits, checked as a whole."""

from anabranch.gateway.config.ab import ABConfig
from anabranch.gateway.config.access import AdminConfig
from anabranch.gateway.config.attempts import BreakerConfig, HedgeConfig, LostConfig, RetryConfig
from anabranch.gateway.config.cache import CacheConfig
from anabranch.gateway.config.defaults import default_config
from anabranch.gateway.config.file import load_config, make_strategy
from anabranch.gateway.config.gateway import GatewayConfig
from anabranch.gateway.config.limits import LimitsConfig
from anabranch.gateway.config.litellm import Imported, import_litellm
from anabranch.gateway.config.models import DeploymentConfig, ModelConfig
from anabranch.gateway.config.names import Target, find_target, names_of
from anabranch.gateway.config.observe import LogConfig, MetricsConfig, OtelConfig, WebhookConfig
from anabranch.gateway.config.secret import Secret
from anabranch.gateway.config.strategies import FeedbackConfig, LearningConfig, StrategyConfig

__all__ = [
    "ABConfig",
    "AdminConfig",
    "BreakerConfig",
    "CacheConfig",
    "DeploymentConfig",
    "FeedbackConfig",
    "GatewayConfig",
    "HedgeConfig",
    "Imported",
    "LearningConfig",
    "LimitsConfig",
    "LogConfig",
    "LostConfig",
    "MetricsConfig",
    "ModelConfig",
    "OtelConfig",
    "RetryConfig",
    "Secret",
    "StrategyConfig",
    "Target",
    "WebhookConfig",
    "default_config",
    "find_target",
    "import_litellm",
    "load_config",
    "make_strategy",
    "names_of",
]
