"""What the field ``model`` of a request may say.

small                       a model, or a group of deployments
gpt-4o-mini                 an alias of one
auto                        the default strategy
auto/knn?lambda=2           a strategy, with knobs
auto/try                    an A/B test, which is one of two strategies
router-mf-0.116             RouteLLM's form of auto/mf?threshold=0.116
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl

from anabranch.errors import InputError, UnknownModelError
from anabranch.gateway.config.gateway import GatewayConfig
from anabranch.gateway.config.suggestions import near

AUTO = "auto"
MAX_KNOBS = 16
# What a fitted router may be called: no way to another folder. `seen` is none, see `anabranch.routers.fitted`.
_ROUTER = re.compile(r"[A-Za-z0-9_-]{1,64}")
_ROUTELLM = re.compile(r"router-(?P<name>.+)-(?P<threshold>(?:0(?:\.\d+)?|1(?:\.0+)?|\.\d+))")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a request wants to go: to a model, where a strategy sends it, or where that of its arm of a test does.

    ``model`` or ``strategy`` is None; both are until the arm is known.

    Attributes:
        model: the model's own name, whatever alias was used.
        strategy: name of the strategy.
        test: name of the A/B test; None for none.
        knobs: what the sender set for it.
    """

    model: str | None = None
    strategy: str | None = None
    test: str | None = None
    knobs: Mapping[str, str] = field(default_factory=dict)


def names_of(config: GatewayConfig, allows: Callable[[str], bool] = lambda model: True) -> list[str]:
    """Every name a request may use but for knobs: of the models that it may use and their aliases, of strategies and of A/B tests."""
    models = [name for model in config.models if allows(model.name) for name in (model.name, *model.aliases)]
    return [*models, AUTO, *(f"{AUTO}/{name}" for name in (*config.strategies, *config.ab))]


def find_target(config: GatewayConfig, name: str, allows: Callable[[str], bool] = lambda model: True) -> Target:
    """What ``name`` means.

    Args:
        config: of the gateway.
        name: as it was sent.
        allows: whether the sender may use a model; one that it may not is not told of.

    Raises UnknownModelError, with near names, if nothing is called so, and InputError for knobs that cannot be read.
    """
    for model in config.models:
        if name == model.name or name in model.aliases:
            return Target(model=model.name)
    head, mark, query = name.partition("?")
    if head == AUTO:
        return Target(strategy=config.default, knobs=_knobs(query, mark))
    if head.removeprefix(f"{AUTO}/") in config.strategies and head.startswith(f"{AUTO}/"):
        return Target(strategy=head.removeprefix(f"{AUTO}/"), knobs=_knobs(query, mark))
    if head.removeprefix(f"{AUTO}/") in config.ab and head.startswith(f"{AUTO}/"):
        return Target(test=head.removeprefix(f"{AUTO}/"), knobs=_knobs(query, mark))
    routellm = _ROUTELLM.fullmatch(name)
    if routellm and routellm["name"] in config.strategies:
        return Target(strategy=routellm["name"], knobs={"threshold": routellm["threshold"]})
    raise UnknownModelError(name[:200], near(head[:200], names_of(config, allows)), _beside(config, head))


def _beside(config: GatewayConfig, head: str) -> str:
    """What is said of a router that lies beside one which a strategy serves, and is not served itself; "" if it is none."""
    name = head.removeprefix(f"{AUTO}/")
    if name == head or _ROUTER.fullmatch(name) is None or name == "seen":
        return ""
    folders = [(own, Path(one.router)) for own, one in config.strategies.items() if one.router is not None]
    beside = [own for own, folder in folders if (folder / f"{name}.safetensors").is_file()]
    if not beside:
        return ""
    asked = AUTO if beside[0] == config.default else f"{AUTO}/{beside[0]}"
    return (
        f"a router {name} was fitted beside the one that {asked} is, and is not served by its name; whoever runs the gateway can name it: "
        f"[strategies.{name}] with the same router"
    )


def _knobs(query: str, mark: str) -> dict[str, str]:
    if not mark or not query:
        return {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True, max_num_fields=MAX_KNOBS)
    except ValueError:
        raise InputError(
            f"model: what follows ? is {query[:100]!r}; write knob=value&knob=value, {MAX_KNOBS} at most"
        ) from None
    knobs = dict(pairs)
    if len(knobs) < len(pairs):
        twice = next(knob for knob in knobs if sum(other == knob for other, _ in pairs) > 1)
        raise InputError(f"model: the knob {twice!r} is set twice")
    return knobs
