"""The routers of a model: which there are, what traces call them, and how the decisions of foreign ones are read."""
# Shapes: N items, E destinations, K choices per item

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

from torch import Tensor, nn

from anabranch.errors import ConfigError
from anabranch.routing.decision import Routing
from anabranch.routing.router import Router

Read = Callable[[nn.Module, Any], Routing]
# How transformers names the classes of its routers.
FOREIGN = "TopKRouter"


class RoutesInPasses(Protocol):
    """What a module declares whose routers do not each route once in a forward pass (a layer that loops over one router).

    Traces, overrides and meters ask for it by the name of its only member, so whatever has that is one.
    """

    @property
    def routing_order(self) -> Sequence[nn.Module]:
        """Its routers as they route in one forward pass; one stands as often as it routes."""


class TakesOverrides(Protocol):
    """What a module declares that decides and is no `Router` (a gate that says how often a layer runs).

    It gives a `Routing`, and asks its context what changes it (`anabranch.routing.override.overrides_of`). So it is recorded, overridden,
    and replayed as routers are; traces have its layers behind those of routers. Besides it has ``num_destinations``, ``num_choices`` and
    ``destinations``, as a router has them. One that needs its scores though a decision is given has a ``mixes_by_scores`` that is True.
    """

    @property
    def takes_overrides(self) -> bool:
        """Whether it decides now: what mixes all of its destinations in training has nothing to record there."""


@dataclass(frozen=True)
class RouterLayer:
    """A layer of traces: one router, in one of its passes.

    Attributes:
        number: of the layer.
        router_name: of the router in the model.
        router: the module.
        pass_index: which of its passes in a forward pass.
        num_passes: how many of them there are.
    """

    number: int
    router_name: str
    router: nn.Module
    pass_index: int = 0
    num_passes: int = 1

    @property
    def name(self) -> str:
        """The router's, with ``.pass0`` and so on behind it where it routes several times in a forward pass."""
        return self.router_name if self.num_passes == 1 else f"{self.router_name}.pass{self.pass_index}"


def find_routers(model: nn.Module) -> dict[str, nn.Module]:
    """What decides in ``model``, by name: every `Router`, and behind them what else `TakesOverrides`.

    Where there is neither it is what transformers' mixtures of experts route with.
    """
    modules = dict(model.named_modules())
    routers = {name: module for name, module in modules.items() if isinstance(module, Router)}
    others = {name: module for name, module in modules.items() if name not in routers and takes_overrides(module)}
    return {**routers, **others} or {
        name: module for name, module in modules.items() if type(module).__name__.endswith(FOREIGN)
    }


def takes_overrides(module: nn.Module) -> bool:
    """Whether a module asks its context for overrides: a `Router`, or what says so, see `TakesOverrides`."""
    return isinstance(module, Router) or getattr(module, "takes_overrides", False)


def router_layers(model: nn.Module, routers: Mapping[str, nn.Module] | None = None) -> list[RouterLayer]:
    """The layers of a trace of ``model``, in order. ``routers`` by name are all that it is about; default `find_routers`.

    Numbers are those that routers have (``layer``), or, where two have one or a router routes several times, the order of the layers. By
    default what is no `Router` is numbered behind the routers, whose numbers do not depend on it.
    """
    if routers is None:
        found = find_routers(model)
        real = {name: module for name, module in found.items() if isinstance(module, Router)}
        if not real:
            return _numbered(model, found)
        layers = _numbered(model, real)
        first = max(layer.number for layer in layers) + 1
        others = [item for item in found.items() if item[0] not in real]
        return [*layers, *(RouterLayer(first + place, *item) for place, item in enumerate(others))]
    return _numbered(model, routers)


def _numbered(model: nn.Module, routers: Mapping[str, nn.Module]) -> list[RouterLayer]:
    """The layers of these routers."""
    claimed = [getattr(module, "layer", None) for module in routers.values()]
    numbers = [number for number in claimed if isinstance(number, int)]
    declared = _declared_passes(model)
    num_passes = [declared.get(module) or _passes_of(module) for module in routers.values()]
    if len(set(numbers)) != sum(num_passes):
        numbers = [0, *accumulate(num_passes[:-1])]
    return [
        RouterLayer(number + pass_index, name, module, pass_index, count)
        for (name, module), number, count in zip(routers.items(), numbers, num_passes, strict=True)
        for pass_index in range(count)
    ]


def _declared_passes(model: nn.Module) -> dict[nn.Module, int]:
    """How often each router that a module of ``model`` declares routes in a forward pass."""
    found: dict[nn.Module, int] = {}
    for module in model.modules():
        found.update(Counter(getattr(module, "routing_order", ())))
    return found


def _passes_of(router: nn.Module) -> int:
    """How often a router routes as said on itself, the way of before."""
    passes = getattr(router, "passes", 1)
    if passes != 1:
        warnings.warn(
            "a router's `passes` is read for one more version; let the layer that runs it say so by `routing_order`",
            DeprecationWarning,
            stacklevel=3,
        )
    return passes


def read_routing(module: nn.Module, output: Any) -> Routing:
    """What the forward of ``module`` returned as a `Routing`: it is one, or as transformers' routers return it.

    Raises ConfigError if it is neither.
    """
    if isinstance(output, Routing):
        return output
    tensors = (
        [value for value in output if isinstance(value, Tensor) and value.dim() == 2]
        if isinstance(output, tuple)
        else []
    )
    index = [value for value in tensors if not value.is_floating_point()]
    weight = [value for value in tensors if value.is_floating_point() and index and value.shape == index[0].shape]
    score = [value for value in tensors if value.is_floating_point() and index and value.shape[1] > index[0].shape[1]]
    if not (len(index) == 1 and weight and score):
        raise ConfigError(
            f"{type(module).__name__} returned {type(output).__name__}, not a Routing, nor logits, weights and indices; pass read= to "
            f"record_routing"
        )
    return Routing(index[0].long(), weight[0], score[0])
