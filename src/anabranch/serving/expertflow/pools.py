"""What of a model has a budget: its pools of experts, or of adapters (`anabranch.serving.expertflow.adapter_pools`), by the layers that use
them."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from anabranch.errors import ConfigError
from anabranch.nn.context import set_unregistered
from anabranch.nn.moe import MoE
from anabranch.nn.offloaded import ExpertSlots, OffloadedPool, Waves
from anabranch.nn.pool import ExpertPool
from anabranch.nn.quantize import QuantizedPool
from anabranch.routing.router import Router
from anabranch.serving.expertflow.arena import Kind
from anabranch.serving.expertflow.layout import Layout
from anabranch.serving.expertflow.policy import Policy, make_policy
from anabranch.serving.expertflow.predictors.base import Fingerprint, sketch

__all__ = ["Pools", "find_pools", "pools_of", "sketches", "weights_of"]


def weights_of(pool: Any) -> tuple[Tensor, Tensor]:
    """What of a pool goes into slots: (w13_EFD, w2_EDF), or its panels, both [E, P, bytes]; of adapters A and B."""
    return (pool.data13, pool.data2) if isinstance(pool, QuantizedPool) else pool.stacks


class Pools:
    """The pools of a model and the layers that use them.

    Attributes:
        layers: routed layers in the order they run.
        pools: distinct ones, by number.
        layout: see `Layout`.
        kinds: of experts.
    """

    # Of a pool, the names of what goes into slots; what its experts are called; whether routers ahead tell which are wanted.
    parts: ClassVar[tuple[str, str]] = ("w13", "w2")
    what: ClassVar[str] = "experts"
    predicts: ClassVar[bool] = True

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = list(layers)
        self.pools: list[Any] = []
        self.kinds: list[Kind] = []
        numbers: dict[int, int] = {}
        kind_of_pool = []
        for layer in self.layers:
            pool = self.pool_of(layer)
            if id(pool) in numbers:
                continue
            numbers[id(pool)] = len(self.pools)
            self.pools.append(pool)
            kind = self.kind_of(pool)
            if kind not in self.kinds:
                self.kinds.append(kind)
            kind_of_pool.append(self.kinds.index(kind))
        self.layout = Layout(
            tuple(numbers[id(self.pool_of(layer))] for layer in self.layers),
            tuple(map(self.choices_of, self.layers)),
            tuple(pool.num_experts for pool in self.pools),
            tuple(kind_of_pool),
            tuple(kind.bytes for kind in self.kinds),
        )

    def pool_of(self, layer: Any) -> Any:
        """The pool that a layer has."""
        return layer.experts

    def choices_of(self, layer: Any) -> int:
        """Most experts that have to be there at a time."""
        return int(min(layer.config.num_choices, layer.experts.num_experts))

    def kind_of(self, pool: Any) -> Kind:
        """Of its experts."""
        return Kind.of(pool)

    def offloaded(self, number: int, slots: ExpertSlots, waves: Waves, is_watched: bool) -> OffloadedPool:
        """What takes the place of the pool of a layer by its number."""
        pool = self.pool_of(self.layers[number])
        backend = pool.backend if isinstance(pool, ExpertPool) else "auto"
        sizes = (pool.num_experts, pool.dim, pool.hidden_dim, backend)
        biases = None if pool.b13 is None or pool.b2 is None else (pool.b13, pool.b2)
        return OffloadedPool(number, *sizes, slots, waves, is_watched, activation=pool.activation, biases=biases)

    def put(self, layer: Any, pool: nn.Module) -> None:
        """Give a layer another pool."""
        if "experts" in layer._modules:
            layer.experts = pool
        else:
            set_unregistered(layer, "experts", pool)

    def slots(self, budget_bytes: int, policy: str | Policy) -> list[int]:
        """Slots of each kind. Raises ConfigError for a budget that is too small, with the least that suffices, and for a policy that
        divides slots among layers where nobody predicts."""
        made = make_policy(policy)
        if not self.predicts and made.name in ("cache_moe", "se_moe"):
            raise ConfigError(
                f"experts.policy is {made.name!r}, which divides its room among layers; {self.what} share it (plec, lru, lfu or random)"
            )
        return self.layout.slots(budget_bytes, per_layer=made.per_layer)

    def fingerprint(self, tokenizer: str) -> Fingerprint:
        """What predictors must have been made for; without the routers where their weights are not there yet."""
        layout = self.layout
        sizes = tuple(layout.num_experts[pool] for pool in layout.pool_of_layer)
        return Fingerprint(sizes, layout.top_k, tokenizer, sketches(self.layers))


def sketches(layers: Sequence[MoE]) -> tuple[tuple[float, ...], ...] | None:
    """See `Fingerprint.routers`: of the matrices of the routers of these layers, in order, each once; None if one is not there yet.

    They stay in floating point where a model is rounded to few bits.
    """
    routers = [part for layer in layers for part in layer.modules() if isinstance(part, Router)]
    weights = [weight for router in routers for weight in router.score.parameters(recurse=False) if weight.dim() == 2]
    distinct = list({id(weight): weight for weight in weights}.values())
    return None if any(weight.is_meta for weight in distinct) else tuple(map(sketch, distinct))


def find_pools(model: nn.Module, name: str = "") -> Pools:
    """The expert pools of a model. Raises ConfigError, with its ``name``, if it has none that can be offloaded."""
    known = (ExpertPool, QuantizedPool)
    layers = [module for module in model.modules() if isinstance(module, MoE) and type(module.experts) in known]
    if not layers:
        raise ConfigError(
            f"{name or type(model).__name__} has no layers of experts ('moe' and designs on it) to offload"
        )
    if any(layer.experts.layers is not None for layer in layers):
        raise ConfigError(
            "experts have layers beside their stacked matrices, or instead of them (linears), so they cannot be offloaded"
        )
    return Pools(layers)


def pools_of(model: nn.Module, name: str = "") -> Pools:
    """What a budget is for: `find_pools`, or the adapters of mixtures of a model that has no other experts. Raises ConfigError as that."""
    if not any(isinstance(module, MoE) for module in model.modules()):
        # What it imports nobody else needs.
        from anabranch.serving.expertflow.adapter_pools import adapter_pools

        found = adapter_pools(model)
        if found is not None:
            return found
    return find_pools(model, name)
