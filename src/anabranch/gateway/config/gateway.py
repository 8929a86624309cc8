"""`GatewayConfig`: everything one gateway is told, checked as a whole."""

import re
from collections.abc import Iterator
from typing import Any, Literal

from anabranch.config import Config, Field, configclass
from anabranch.errors import ConfigError
from anabranch.gateway.config.ab import ABConfig
from anabranch.gateway.config.access import AdminConfig, KeysConfig
from anabranch.gateway.config.attempts import BreakerConfig, HedgeConfig, LostConfig, RetryConfig
from anabranch.gateway.config.cache import CacheConfig
from anabranch.gateway.config.default_models import KINDS
from anabranch.gateway.config.limits import LimitsConfig
from anabranch.gateway.config.models import Balance, ModelConfig
from anabranch.gateway.config.observe import LogConfig, MetricsConfig, OtelConfig, WebhookConfig
from anabranch.gateway.config.prices import model_price
from anabranch.gateway.config.shadow import ShadowConfig
from anabranch.gateway.config.shared import SharedConfig
from anabranch.gateway.config.strategies import FeedbackConfig, LearningConfig, StrategyConfig
from anabranch.gateway.config.suggestions import hint
from anabranch.gateway.providers.provider import FailureKind
from anabranch.registry import kinds
from anabranch.routers.contract.query import Model, Pool
from anabranch.routers.embed import Embedder
from anabranch.routers.money import Price
from anabranch.sockets import check_names

# As browsers send it: nothing behind the host and the port.
ORIGIN = re.compile(r"https?://[a-z0-9.-]+(:\d{1,5})?|https?://\[[0-9a-f:]+\](:\d{1,5})?")

# Fields of strategies that name models: by a name, a list of names, or a number for each name.
MODEL_FIELDS = frozenset({"assisted", "fallback", "model", "models", "strong", "trust", "trusted", "weak", "weights"})


def _cheapest() -> dict[str, StrategyConfig]:
    return {"cheapest": StrategyConfig(use="cheapest")}


@configclass
class GatewayConfig(Config):
    """A gateway.

    Attributes:
        models: at least one, in the order in which strategies see them.
        strategies: by the name requests use: ``auto/NAME``.
        ab: A/B tests by the name requests use: ``auto/NAME`` goes to one of two strategies.
        default_strategy: what ``auto`` alone means, and what decides where a strategy fails; None takes the first.
        fallbacks: models to try, in order, when one that was asked for by name cannot answer.
        context_fallbacks, filter_fallbacks: likewise, before those, and only where the prompt is too long for it, or was refused by a
            provider's content filter.
        default_models: by ``moderations`` and ``images``, the model of such requests that name none; without it, the only one that is
            called as models of that kind are.
        embedder: of queries, for strategies and caches that need vectors; None if nothing does.
        deadline_s: seconds a request may take in all, retries and fallbacks included.
        retries, breaker: what happens on failures.
        hedge: second attempts while the first is slow; None for none.
        lost: what calls are charged that brought nothing.
        balance: how requests are spread over the deployments of a model.
        mid_stream: what follows when a stream breaks after its first token: an error event, a continuation by another model, or a
            fresh answer, for who sends ``x-mid-stream: restart`` (others get the error event).
        limits, keys, cache, feedback, learning, admin, log, metrics: see there.
        shadow: what share of live traffic other models are asked too; None for none.
        webhooks: who is told of budgets, by name.
        otel: where spans go; None for none.
        shared: where processes count together; None has each count by itself.
        require_key: requests need a key of the store (``anabranch gateway keys create``).
        cors_origins: pages of these origins (``https://app.example``; ``*`` for all) may call ``/v1`` from a browser, with a key.
        hosts: names beside those of this machine that requests may be for (``*`` for all), where it listens on this machine only and
            ``require_key`` is false: such as that which a proxy before it passes on. No web page may reach it by a name of its own.
        store: path of a SQLite file, or a URL: ``sqlite:///gateway.db``, ``postgresql://user@host/name``.

    Raises ConfigError that names the field if names are there twice or lead nowhere.
    """

    models: tuple[ModelConfig, ...] = Field(min_length=1)
    strategies: dict[str, StrategyConfig] = Field(default_factory=_cheapest, min_length=1)
    ab: dict[str, ABConfig] = Field(default_factory=dict)
    default_strategy: str | None = None
    fallbacks: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    context_fallbacks: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    filter_fallbacks: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    default_models: dict[str, str] = Field(default_factory=dict)
    embedder: Embedder.Config | None = None
    deadline_s: float = Field(default=120.0, gt=0)
    retries: RetryConfig = RetryConfig()
    breaker: BreakerConfig = BreakerConfig()
    hedge: HedgeConfig | None = None
    lost: LostConfig = LostConfig()
    balance: Balance = "weighted"
    mid_stream: Literal["error", "continue", "restart"] = "error"
    limits: LimitsConfig = LimitsConfig()
    keys: KeysConfig = KeysConfig()
    cache: CacheConfig = CacheConfig()
    feedback: FeedbackConfig = FeedbackConfig()
    learning: LearningConfig = LearningConfig()
    shadow: ShadowConfig | None = None
    admin: AdminConfig = AdminConfig()
    log: LogConfig = LogConfig()
    metrics: MetricsConfig = MetricsConfig()
    otel: OtelConfig | None = None
    shared: SharedConfig | None = None
    webhooks: dict[str, WebhookConfig] = Field(default_factory=dict)
    require_key: bool = True
    cors_origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    store: str = Field(default="gateway.db", min_length=1)

    def __post_init__(self) -> None:
        _check_names(self)
        _check_strategies(self)
        _check_tests(self)
        _check_fallbacks(self)
        _check_default_models(self)
        for place, origin in enumerate(self.cors_origins):
            if origin != "*" and not ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"cors_origins.{place} is {origin!r}; write https://HOST, with its port if it has one, or *"
                )
        check_names("hosts", self.hosts)
        if self.learning.judge and self.learning.judge not in (names := [model.name for model in self.models]):
            raise ConfigError(
                f"learning.judge is {self.learning.judge!r}, and there is no such model; {hint(self.learning.judge, names)}"
            )
        _check_shadow(self)
        if self.cache.semantic and self.embedder is None:
            raise ConfigError(
                f"cache.semantic is true, which needs an embedder; set embedder.kind: {' or '.join(kinds('embedder'))}"
            )

    @property
    def default(self) -> str:
        """Name of the default strategy."""
        return self.default_strategy or next(iter(self.strategies))

    @property
    def longest_deadline_s(self) -> float:
        """Seconds that any request may take."""
        return max([self.deadline_s, *(model.deadline_s or 0.0 for model in self.models)])

    @property
    def aliases(self) -> dict[str, str]:
        """Other names of models, with the model's own."""
        return {alias: model.name for model in self.models for alias in model.aliases}

    def model(self, name: str) -> ModelConfig:
        """By its name or an alias. Raises KeyError if there is none."""
        return _by_name(self)[name]

    def chain(self, name: str) -> tuple[str, ...]:
        """A model that is asked for by name, and all that may be tried after it, each once."""
        tables = (self.context_fallbacks, self.filter_fallbacks, self.fallbacks)
        return tuple(dict.fromkeys((name, *(other for table in tables for other in table.get(name, ())))))

    def only_after(self, name: str, *, is_too_long: bool) -> dict[str, frozenset[FailureKind]]:
        """Of the models of a chain that are for some failures alone, which: none for those that a prompt meets in any case.

        Args:
            name: of the first.
            is_too_long: it is known already that the prompt is, for that.
        """
        kinds: dict[str, set[FailureKind]] = {}
        tables: tuple[tuple[FailureKind, Any], ...] = (
            ("context", self.context_fallbacks),
            ("filter", self.filter_fallbacks),
        )
        for kind, table in tables:
            for other in table.get(name, ()):
                kinds.setdefault(other, set()).add(kind)
        free = self.fallbacks.get(name, ())
        return {
            other: frozenset(found)
            for other, found in kinds.items()
            if other not in free and not (is_too_long and "context" in found)
        }

    def pool(self) -> Pool:
        """The models as strategies see them before anything is known of how they are doing."""
        return Pool(
            tuple(
                Model(
                    name=one.name,
                    price=model_price(one) or Price(),
                    parameters=one.parameters,
                    description=one.description,
                    context=one.context,
                    is_priced=model_price(one) is not None,
                )
                for one in self.models
            )
        )


def _by_name(config: GatewayConfig) -> dict[str, ModelConfig]:
    return {name: model for model in config.models for name in (model.name, *model.aliases)}


def _named(config: GatewayConfig) -> Iterator[tuple[str, str]]:
    """Each name that requests may use, with the field that gives it."""
    for at, model in enumerate(config.models):
        yield f"models.{at}.name", model.name
        yield from ((f"models.{at}.aliases.{place}", alias) for place, alias in enumerate(model.aliases))


def _check_names(config: GatewayConfig) -> None:
    seen: dict[str, str] = {}
    for field, name in _named(config):
        if not name or name != name.strip() or not name.isprintable():
            raise ConfigError(f"{field} is {name!r}; it must be visible text without spaces around it")
        if name == "auto" or name.startswith("auto/"):
            raise ConfigError(f"{field} is {name!r}; names that begin with auto are for strategies")
        if name in seen:
            raise ConfigError(f"{field} is {name!r}, which {seen[name]} is too; names must differ")
        seen[name] = field
    deployments: dict[str, str] = {}
    for at, model in enumerate(config.models):
        for place in range(len(model.deployments)):
            field, name = f"models.{at}.deployments.{place}.name", model.deployment_name(place)
            if name in deployments:
                raise ConfigError(f"{field} is {name!r}, which {deployments[name]} is too; names must differ")
            deployments[name] = field


def _check_strategies(config: GatewayConfig) -> None:
    for name, strategy in config.strategies.items():
        _check_name(f"strategies.{name}", name)
        for place, model in enumerate(strategy.models):
            _check_model(config, f"strategies.{name}.models.{place}", model)
        _check_models_of(config, f"strategies.{name}", strategy.fields)
    default = config.default_strategy
    if default is not None and default not in config.strategies:
        raise ConfigError(f"default_strategy is {default!r}; {hint(default, config.strategies)}")


def _check_models_of(config: GatewayConfig, path: str, fields: Any) -> None:
    """Models that a strategy's own fields name, however deep, are there: it would be bypassed at every request otherwise."""
    if isinstance(fields, list | tuple):
        for place, item in enumerate(fields):
            _check_models_of(config, f"{path}.{place}", item)
    if not isinstance(fields, dict):
        return
    for field, value in fields.items():
        if field not in MODEL_FIELDS or value is None:
            _check_models_of(config, f"{path}.{field}", value)
            continue
        for name in (value,) if isinstance(value, str) else value if isinstance(value, list | tuple | dict) else ():
            if isinstance(name, str) and name not in (names := [model.name for model in config.models]):
                raise ConfigError(f"{path}.{field} has {name!r}, and there is no such model; {hint(name, names)}")


def _check_name(field: str, name: str) -> None:
    if not name or any(sign in name for sign in "?&=/# ") or not name.isprintable():
        raise ConfigError(f"{field}: a name of a strategy has no spaces and none of ? & = / #")


def _check_tests(config: GatewayConfig) -> None:
    for name, test in config.ab.items():
        _check_name(f"ab.{name}", name)
        if name in config.strategies:
            raise ConfigError(f"ab.{name} is called as strategies.{name}; names must differ")
        for side in ("a", "b"):
            strategy = getattr(test, side)
            if strategy not in config.strategies:
                raise ConfigError(f"ab.{name}.{side} is {strategy!r}; {hint(strategy, config.strategies)}")
        if not config.log.decisions:
            raise ConfigError(f"ab.{name}: a test is read from decisions; set decisions = true under [log]")


def _check_shadow(config: GatewayConfig) -> None:
    shadow, names = config.shadow, [model.name for model in config.models]
    if shadow is None:
        return
    named = [("shadow.judge", shadow.judge), *((f"shadow.models.{at}", name) for at, name in enumerate(shadow.models))]
    for field, name in named:
        _check_model(config, field, name)
    if not shadow.models and len(names) < 2:
        raise ConfigError(f"shadow compares models, and there is only {names[0]!r}; leave it out")
    if not config.log.prompts:
        raise ConfigError(
            "shadow asks other models what users asked; set log.prompts = true to let it, or leave it out"
        )


def _check_fallbacks(config: GatewayConfig) -> None:
    for field in ("fallbacks", "context_fallbacks", "filter_fallbacks"):
        for name, others in getattr(config, field).items():
            _check_model(config, f"{field}.{name}", name)
            for place, other in enumerate(others):
                _check_model(config, f"{field}.{name}.{place}", other)
                if other == name or other in others[:place]:
                    raise ConfigError(
                        f"{field}.{name}.{place} is {other!r}, which was tried before; name each model once"
                    )


def _check_default_models(config: GatewayConfig) -> None:
    for kind, name in config.default_models.items():
        if kind not in KINDS:
            raise ConfigError(f"default_models has {kind!r}; it may have {' and '.join(KINDS)}")
        _check_model(config, f"default_models.{kind}", name)


def _check_model(config: GatewayConfig, field: str, name: str) -> None:
    known = [model.name for model in config.models]
    if name not in known:
        raise ConfigError(f"{field} is {name!r}, which is no name of a model; {hint(name, known)}")
