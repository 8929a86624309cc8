"""The routers of a model: which there are, what traces call them, and how the decisions of foreign ones are read."""
# Shapes: N items, E destinations, K places per item

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import Tensor, nn

from anabranch.errors import ConfigError
from anabranch.routing.decision import Routing
from anabranch.routing.router import Router

Read = Callable[[nn.Module, Any], Routing]
FOREIGN = "TopKRouter"  # how transformers names the classes of its routers


@dataclass(frozen=True)
class RouterLayer:
    """A layer of traces: one router, in one of its passes.

    Attributes:
        number: of the layer.
        router_name: of the router in the model.
        router: the module.
        turn: which of its passes in a forward pass.
    """

    number: int
    router_name: str
    router: nn.Module
    turn: int = 0

    @property
    def name(self) -> str:
        """The router's, with ``.pass0`` and so on behind it where it routes several times in a forward pass."""
        return self.router_name if passes_of(self.router) == 1 else f"{self.router_name}.pass{self.turn}"


def find_routers(model: nn.Module) -> dict[str, nn.Module]:
    """Every `Router` in ``model`` by name, or where there is none, what transformers' mixtures of experts route with."""
    modules = dict(model.named_modules())
    return {name: module for name, module in modules.items() if isinstance(module, Router)} or {
        name: module for name, module in modules.items() if type(module).__name__.endswith(FOREIGN)
    }


def layer_numbers(routers: Mapping[str, nn.Module]) -> dict[str, int]:
    """The layer number of each router in traces, that of its first pass where it routes several times; see `record_routing`."""
    claimed = [getattr(module, "layer", None) for module in routers.values()]
    distinct = [number for number in claimed if isinstance(number, int)]
    passes = [passes_of(module) for module in routers.values()]
    if len(set(distinct)) != sum(passes):
        distinct = [0, *accumulate(passes[:-1])]
    return dict(zip(routers, distinct, strict=True))


def router_layers(routers: Mapping[str, nn.Module]) -> Iterator[RouterLayer]:
    """The layers of a trace of these routers, in order."""
    for (name, module), number in zip(routers.items(), layer_numbers(routers).values(), strict=True):
        for turn in range(passes_of(module)):
            yield RouterLayer(number + turn, name, module, turn)


def passes_of(module: nn.Module) -> int:
    """How often a router routes in one forward pass."""
    return getattr(module, "passes", 1)


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
