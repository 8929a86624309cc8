"""`LoadMeter`: how evenly a model routes, counted while it trains or is evaluated."""
# Shapes: E destinations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from anabranch.routing import Router, Routing, RoutingContext
from anabranch.routing.context import argument_of
from anabranch.routing.measure import idle_fraction, max_violation
from anabranch.routing.nan import count_nan, is_seen_at_once

# What `LoadMeter.read` may give.
MEASURES = ("max_violation", "max_violation_by_layer", "idle_fraction", "pool_max_violation", "candidates_open")


class LoadMeter:
    """Counts where every router of ``model`` sends its items, with forward hooks that emit into the forward context.

    Loads then reach the counters once per forward pass, compiled or recomputed or not. `close` takes the hooks away.
    """

    def __init__(self, model: nn.Module) -> None:
        self._routers = [module for module in model.modules() if isinstance(module, Router)]
        # A router need not have parameters or buffers, as one that hashes tokens has none.
        self._counters = [_Counter(router.num_destinations, _device_of(router, model)) for router in self._routers]
        self._hooks = [
            router.register_forward_hook(partial(_emit, counter), with_kwargs=True)
            for router, counter in zip(self._routers, self._counters, strict=True)
        ]

    def reset(self) -> None:
        """Forget what was counted."""
        for counter in self._counters:
            counter.load_E.zero_()
            counter.nan.count.zero_()

    def layers_with_nan(self) -> list[int]:
        """Layers whose routers had NaN scores since `reset` in any process, which must all ask; see `anabranch.routing.nan`."""
        if not self._counters:
            return []
        count = torch.stack([counter.nan.count for counter in self._counters])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(count)
        return [router.layer for router, found in zip(self._routers, count.tolist(), strict=True) if found]

    def read(self, *, training: bool) -> dict[str, Any]:
        """The `Counted.measures` of what was counted since `reset`, over all ranks; empty for a model that does not route."""
        return self.count(training=training).measures()

    def count(self, *, training: bool) -> "Counted":
        """What was counted since `reset`, over all ranks, which must all ask. In training, closed destinations do not count as idle."""
        if not self._routers:
            return Counted((), (), ())
        masks = [_open(router, training) for router in self._routers]
        return Counted(self._routers, self._loads(), masks)

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _loads(self) -> list[np.ndarray]:
        flat = torch.cat([counter.load_E for counter in self._counters])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(flat)
        sizes = [router.num_destinations for router in self._routers]
        return [load.numpy() for load in flat.cpu().split(sizes)]


@dataclass(frozen=True)
class Counted:
    """Loads of routers.

    Attributes:
        routers: of the model, in its order.
        loads: int64 ``[E]`` of each.
        masks: which of its destinations were open: bool ``[E]``, or ``[1, E]`` where each item had a mask of its own; None for all.
    """

    routers: Sequence[Router]
    loads: Sequence[np.ndarray]
    masks: Sequence[np.ndarray | None]

    def measures(self) -> dict[str, Any]:
        """JSON-ready; empty without routers.

        ``max_violation``: MaxVio (arXiv 2408.15664), mean over layers, and ``max_violation_by_layer``. ``idle_fraction``: destinations
        with less than a tenth of the mean load. ``pool_max_violation``: the largest MaxVio of a pool that layers share.
        ``candidates_open``: open destinations of each layer, if any layer has a schedule of them.
        """
        if not self.routers:
            return {}
        pairs = list(zip(self.loads, self.masks, strict=True))
        seen = [load if mask is None or mask.ndim > 1 else load[mask] for load, mask in pairs]
        by_layer = [float(max_violation(load)) for load in seen]
        result: dict[str, Any] = {
            "max_violation": float(np.mean(by_layer)),
            "max_violation_by_layer": by_layer,
            "idle_fraction": float(np.mean([idle_fraction(load) for load in seen])),
        }
        pools = [
            sum(self.loads[at] for at in members) for pool, members in self._holders().items() if pool[0] == "pool"
        ]
        if pools:
            result["pool_max_violation"] = max(float(max_violation(load)) for load in pools)
        if any(router.candidates is not None for router in self.routers):
            result["candidates_open"] = [load.size if mask is None else int(mask.sum()) for load, mask in pairs]
        return result

    def loads_while_open(self) -> dict[str, np.ndarray]:
        """What each expert got for each layer that might pick it, by the layers that hold these experts together; closed ones are left out.

        Experts of a pool that layers share are busy if one of the layers uses them.
        """
        found = {}
        for members in self._holders().values():
            load_E = np.sum([self.loads[at] for at in members], 0)
            open_E = np.sum([_openness(self.masks[at], load_E.size) for at in members], 0)
            layers = sorted({self.routers[at].layer for at in members})
            name = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
            found[name] = load_E[open_E > 0] / open_E[open_E > 0]
        return found

    def _holders(self) -> dict[tuple[str, Any], list[int]]:
        """Places of the routers of each pool, and of each router that shares none."""
        holders: dict[tuple[str, Any], list[int]] = {}
        for place, router in enumerate(self.routers):
            pool = router.destinations.pool
            holders.setdefault(("router", place) if pool is None else ("pool", pool), []).append(place)
        return holders


def _openness(mask: np.ndarray | None, size: int) -> np.ndarray:
    return np.ones(size) if mask is None or mask.ndim > 1 else mask.astype(float)


def _device_of(*modules: nn.Module) -> torch.device:
    """Where the first of these is that has a tensor; the CPU if none has."""
    tensors = chain.from_iterable(chain(module.parameters(), module.buffers()) for module in modules)
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


class _Counter:
    def __init__(self, num_destinations: int, device: torch.device) -> None:
        self.load_E = torch.zeros(num_destinations, dtype=torch.int64, device=device)
        self.nan = _NaNCounter(device)

    def add_load(self, load_E: Tensor, open_E: Tensor | None = None) -> None:
        self.load_E += load_E


class _NaNCounter:
    """Items with NaN scores; takes their number as a load."""

    def __init__(self, device: torch.device) -> None:
        self.count = torch.zeros((), dtype=torch.int64, device=device)

    def add_load(self, load_E: Tensor, open_E: Tensor | None = None) -> None:
        self.count += load_E


def _emit(
    counter: _Counter, router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], routing: Routing
) -> None:
    context = argument_of(RoutingContext, args, kwargs)
    assert context is not None, "a router is called with a context"
    context.emit_load(counter, routing.load_E())
    if not is_seen_at_once(routing.score_NE):
        context.emit_load(counter.nan, count_nan(routing.score_NE, context.item_mask_N))


def _open(router: Router, training: bool) -> np.ndarray | None:
    """bool ``[E]``, or ``[1, E]`` where each item has a mask of its own; None if all are open."""
    if router.candidates is None:
        return None
    open_NE = router.candidates.open_NE(1, RoutingContext(training=training))
    return None if open_NE is None else open_NE.cpu().numpy()
