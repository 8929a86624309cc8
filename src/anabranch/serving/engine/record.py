"""`RoutingTap`: where chosen rows of a step are routed, by hooks that are there only while someone asks."""
# Shapes: N = P T items, P streams, T tokens of a step, K choices per item

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from anabranch.routing.decision import Routing
from anabranch.routing.discovery import find_routers, router_layers
from anabranch.routing.router import Router
from anabranch.serving.core.request import Route


class RoutingTap:
    """Listens to the routers of one model.

    Attributes:
        layers: {layer: number of destinations}; a router that routes several times in a pass has as many layers. Routers of the head are
            not among them: it sees the rows that are sampled alone.
    """

    def __init__(self, model: nn.Module) -> None:
        routers = {name: module for name, module in find_routers(model).items() if isinstance(module, Router)}
        head = getattr(model, "head", None)
        of_head = set() if head is None else set(head.modules())
        layers = [layer for layer in router_layers(model, routers) if layer.router not in of_head]
        self._routers: dict[nn.Module, int] = {layer.router: layer.number for layer in layers if layer.pass_index == 0}
        self._passes = Counter(layer.router for layer in layers)
        self.layers = {layer.number: routers[layer.router_name].num_destinations for layer in layers}

    @contextmanager
    def listen(self, rows: Sequence[int], num_rows: int) -> Iterator[list[Route]]:
        """{layer: destinations} of each of ``rows`` of a step of ``num_rows``, filled in while the block runs.

        With several streams it is where any of them goes, each destination once; so for a block that runs several times. A router that sees
        only some of the rows tells nothing.
        """
        routes: list[Route] = [{} for _ in rows]
        visits = dict.fromkeys(self._routers, 0)

        def note(router: nn.Module, args: tuple[Any, ...], routing: Routing) -> None:
            layer = self._routers[router] + visits[router] % self._passes[router]
            visits[router] += 1
            if routing.num_items % num_rows:
                return
            index_PTK = routing.index_NK.view(-1, num_rows, routing.num_choices)
            for route, index_PK in zip(routes, index_PTK[:, rows].transpose(0, 1).tolist(), strict=True):
                used = dict.fromkeys(index for index_K in index_PK for index in index_K if index >= 0)
                route[layer] = tuple(dict.fromkeys((*route.get(layer, ()), *used)))

        handles = [router.register_forward_hook(note) for router in self._routers]
        try:
            yield routes
        finally:
            for handle in handles:
                handle.remove()
