"""`override_routing`: the decisions of a model changed from outside, layer by layer.

    no_first = Override(open_NE=[False, True, True, True])
    with override_routing(model, {0: no_first, "blocks.1.feed_forward.router": Override(index_NK=[3])}):
        model(token_BL)

Hooks do it, as with `record_routing`: a model whose decisions are its own runs the code it always runs, and inside the block compiled
code runs eagerly. A forward pass that begins in the block is changed to its end: also where a backward pass repeats parts of it later.
"""
# Shapes: N items, D width

import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.errors import ConfigError
from anabranch.routing.context import RoutingContext, argument_of
from anabranch.routing.discovery import RouterLayer, router_layers, takes_overrides
from anabranch.routing.override import Override, Overrides

# Blocks in the order in which they were entered: the inner ones have the higher numbers.
_DEPTH = itertools.count()
_depths: dict[int, int] = {}


class LayerOverrides:
    """The same overrides in every forward pass, of some layers: for ``context.routing``.

    Args:
        model: whose layers they are.
        layers: overrides by the layer's number or by its name, as traces of ``model`` have them. The name of a router that routes several
            times in a pass, without ``.pass0`` behind it, stands for all its passes. Modules that decide and are no `Router`, as loop
            gates, go by their names.

    Raises ConfigError for a layer that the model does not have, and for a model without a `Router`.
    """

    def __init__(self, model: nn.Module, layers: Mapping[int | str, Override]) -> None:
        self._found = find_overrides(own_layers(model), layers)

    def of(self, router: nn.Module, visit: int, x_ND: Tensor, context: RoutingContext) -> Override | None:
        """See `Overrides`."""
        of_passes = self._found.get(router)
        return of_passes[visit % len(of_passes)] if of_passes else None


def find_overrides(
    known: Sequence[RouterLayer], layers: Mapping[int | str, Override]
) -> dict[nn.Module, list[Override | None]]:
    """{router: the override of each of its passes} of overrides by number or name, see `LayerOverrides`."""
    found: dict[nn.Module, list[Override | None]] = {}
    for key, override in layers.items():
        meant = [layer for layer in known if key in (layer.number, layer.name, layer.router_name)]
        if not meant:
            names = ", ".join(f"{layer.number} ({layer.name})" for layer in known)
            raise ConfigError(f"the model has no routed layer {key!r}; it has {names}")
        for layer in meant:
            found.setdefault(layer.router, [None] * layer.num_passes)[layer.pass_index] = override
    return found


@contextmanager
def override_routing(model: nn.Module, layers: Mapping[int | str, Override] | Overrides) -> Iterator[None]:
    """Change the decisions of ``model`` inside the block.

    Args:
        model: whose routers to override. Copies of it are not reached, see `record_routing`.
        layers: overrides by layer, see `LayerOverrides`; or an object that says them for each pass, see `Overrides`.

    Blocks may be nested: biases add up, what any of them closes is closed, and of several forced decisions the inner one holds.

    Around an engine it overrides all requests, and what the prefix cache keeps is not told apart: use one with ``prefix_cache=False``, or
    a hook for single requests (`anabranch.serving.core.hooks.OverrideHook`).

    Raises ConfigError as `LayerOverrides` does, and in the block as `Override.check_fit`. Warns (UserWarning) if no router was called in a
    block that ended well.
    """
    source = LayerOverrides(model, layers) if isinstance(layers, Mapping) else layers
    with overriding(model, source):
        yield


@contextmanager
def overriding(model: nn.Module, source: Overrides, routers: Mapping[str, nn.Module] | None = None) -> Iterator[None]:
    """Every forward pass that reaches a router of ``model`` in the block carries ``source``. Warns (UserWarning) if none did."""
    # A dictionary holds each router once, in order.
    known = {layer.router: None for layer in own_layers(model, routers)}
    # The first router of a pass must know of all that overrides some router behind it: see `Override.of_all_routers`.
    every = known | {layer.router: None for layer in router_layers(model) if takes_overrides(layer.router)}
    was_called = False

    def join(router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal was_called
        was_called = was_called or router in known
        context = argument_of(RoutingContext, args, kwargs)
        # The list is one for the whole pass, and what recomputes parts of it later has it too.
        if context is not None and not any(other is source for other in context.routing):
            # A pass may come to a router of an inner block first. What was there when it began is outside of all.
            outer = sum(_depths.get(id(other), -1) < depth for other in context.routing)
            context.routing.insert(outer, source)

    depth = _depths[id(source)] = next(_DEPTH)
    with ExitStack() as stack:
        stack.callback(_depths.pop, id(source), None)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for router in every:
            handle = router.register_forward_pre_hook(join, with_kwargs=True)
            stack.callback(handle.remove)
        yield
        if not was_called:
            warnings.warn(
                f"none of the {len(known)} routers of this {type(model).__name__} was called, so nothing was overridden. Was it another "
                "copy of the model? An engine in a process of its own and an elastic group have copies",
                stacklevel=5,
            )


def own_layers(model: nn.Module, routers: Mapping[str, nn.Module] | None = None) -> list[RouterLayer]:
    """The layers of ``model`` that a `Router` decides in, as traces have them, and behind them what else takes overrides.

    ``routers`` by name are all that it is about, numbered as traces of them are. Raises ConfigError if there is none, or one of them
    does not take overrides.
    """
    if routers is not None:
        odd = [name for name, module in routers.items() if not takes_overrides(module)]
        if odd or not routers:
            raise ConfigError(
                f"routers has {odd[0]}, whose decisions cannot be overridden" if odd else "routers is empty"
            )
        return router_layers(model, routers)
    layers = [layer for layer in router_layers(model) if takes_overrides(layer.router)]
    if not layers:
        raise ConfigError(f"{type(model).__name__} has no Router, so there is no decision to override")
    return layers
