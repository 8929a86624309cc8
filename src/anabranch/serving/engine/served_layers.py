"""`ServedLayers`: layers beside matrices, for the rows of some requests alone: routers over pools of adapters, and adapters by task.

A router sees the rows of its own requests and no other, with a forward context of theirs, so that what it decides is what it decides for
each of them alone. What a request says beside, its task and what it asks for, is put into that context (`BoundLayers`).
"""
# Shapes: M rows, E adapters, K choices of a row, C inputs, O outputs

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.adapters.glider import bias_rows
from anabranch.adapters.glider.score import seen_by
from anabranch.adapters.tasks import AVERAGE, numbers_of, told_tasks
from anabranch.bounds import shown
from anabranch.errors import InputError
from anabranch.routing import Router, Routing, RoutingContext
from anabranch.routing.context import argument_of
from anabranch.routing.sequences import ITEMS
from anabranch.serving.core.client import FieldInputError
from anabranch.serving.engine.adapter_parts import PartRows
from anabranch.serving.engine.asking import Asking, Terms
from anabranch.serving.engine.pass_adapters import ROUTES

__all__ = ["BoundLayers", "LayerPart", "ServedLayers", "number_of"]


@dataclass(frozen=True, eq=False)
class ServedLayers:
    """Layers in memory, of one model's sizes.

    Attributes:
        parts: the layer of each part of a linear layer that it adds to, by our names (``blocks.3.attention.q``).
        version: equal where all is that decides what requests get: numbers, tasks, and of a pool its kind and the instructions, if it
            compares requests with them.
        nbytes: of them.
        kind: of pools ``glider``, ``phatgoose`` or ``arrow``, else of the layers.
        experts: the adapters that routers choose among, in the order of their numbers; none where a task says who is used.
        tasks: that they go by, in the order of their numbers; none where they do not.
        needs_task: whether a request must say its task.
        asked: what compares a request with the instructions of adapters; None where nobody does.
    """

    parts: Mapping[str, nn.Module]
    version: str
    nbytes: int
    kind: str
    experts: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    needs_task: bool = False
    asked: Asking | None = None

    def __post_init__(self) -> None:
        closed = {id(getattr(layer, "router", None)): getattr(layer, "config", None) for layer in self.parts.values()}
        for router in self.routers.values():
            open_E = torch.ones(len(self.experts), dtype=torch.float64)
            open_E[list(getattr(closed[id(router)], "closed", ()))] = 0
            # Of names alone: what knew these layers would keep them in memory.
            router.register_forward_hook(partial(_note, self.experts, open_E), with_kwargs=True)

    @cached_property
    def routers(self) -> dict[str, Router]:
        """By the first matrix beside which each chooses."""
        found = [getattr(layer, "router", None) for layer in self.parts.values()]
        return {router.matrix or str(place): router for place, router in enumerate(found) if isinstance(router, Router)}

    @property
    def is_watched(self) -> bool:
        """Whether anyone but us listens to its routers at the moment (`anabranch.routing.record_routing`)."""
        return any(len(router._forward_hooks) > 1 or router._forward_pre_hooks for router in self.routers.values())

    @property
    def told(self) -> dict[str, Any]:
        """For whoever asks what there is."""
        told: dict[str, Any] = {"kind": self.kind}
        if self.experts:
            told["experts"] = list(self.experts)
        if self.tasks:
            told["tasks"] = list(self.tasks)
        return told

    @property
    def compares(self) -> bool:
        """Whether what a request asks for has a part in who is chosen."""
        return self.asked is not None and self.asked.compares

    def terms(self, query: str | None, instruction: str | None = None, *, asker: str = "") -> Terms | None:
        """What a request that asks for this says of each adapter, see `Asking.terms`; None where nobody compares it."""
        return None if self.asked is None else self.asked.terms(query, instruction, asker=asker)

    def bound(self, name: str, task: str | None, terms: Terms | None) -> "BoundLayers":
        """With what a request says. Raises `FieldInputError` for a task that it must name, or that there is not.

        Args:
            name: that the request calls it by.
            task: of the request; None where it says none.
            terms: see `terms`.
        """
        number = None
        if self.tasks:
            number = number_of(task, self.tasks, needs_task=self.needs_task, who=f"adapter {name!r}")
        return BoundLayers(self, number, terms, name)


@dataclass(frozen=True, eq=False)
class BoundLayers:
    """Layers with what one request tells them.

    Attributes:
        layers: which.
        task: number of its task; None where they do not go by tasks.
        terms: what it asks for says of each adapter; None where nobody compares it.
        name: that the request calls them by.
    """

    layers: ServedLayers
    task: int | None = None
    terms: Terms | None = None
    name: str = ""

    @cached_property
    def bias(self) -> tuple[float, ...] | None:
        """Added to the logits of each adapter; None for nothing."""
        return None if self.terms is None else self.terms.bias

    @cached_property
    def parts(self) -> Mapping[str, "LayerPart"]:
        """Of the layers."""
        return {name: LayerPart(layer, self) for name, layer in self.layers.parts.items()}

    @property
    def version(self) -> str:
        """Equal where rows get the same."""
        if self.task is None and self.bias is None:
            return self.layers.version
        told = f"{self.layers.version} {self.task} {self.bias!r}"
        return hashlib.sha256(told.encode()).hexdigest()

    @property
    def key(self) -> Hashable:
        """Rows that differ in their biases alone go through a router together; those of one task are merged once."""
        return id(self.layers), self.task

    @property
    def pools(self) -> frozenset[str]:
        """None: experts have no such layers."""
        return frozenset()

    @property
    def has_layers(self) -> bool:
        """All are."""
        return True

    def state(self, uses: Sequence[Any], request_M: Tensor) -> dict[str, Any]:
        """See `anabranch.serving.engine.pass_adapters.Use`."""
        state: dict[str, Any] = {}
        if self.task is not None:
            state |= told_tasks(request_M.new_full((1,), self.task), len(request_M))
        own = {request: uses[request].bias for request in sorted(set(request_M.tolist()))}
        if any(bias is not None for bias in own.values()):
            nothing = (0.0,) * len(self.layers.experts)
            row_of = {request: row for row, request in enumerate(own)}
            bias_QE = torch.tensor([nothing if bias is None else bias for bias in own.values()], dtype=torch.float32)
            row_M = torch.tensor([row_of[request] for request in request_M.tolist()])
            state |= bias_rows(bias_QE[row_M].to(request_M.device), 1)
        return state


@dataclass(frozen=True, eq=False)
class LayerPart:
    """A layer beside one part of a matrix, see `anabranch.serving.engine.adapter_parts.ServedPart`.

    Attributes:
        layer: which.
        bound: what it is of.
    """

    layer: nn.Module
    bound: BoundLayers

    @property
    def nbytes(self) -> int:
        """Counted where the layers are: parts share tables."""
        return 0

    def added(self, rows: PartRows) -> Tensor:
        """See `ServedPart`."""
        assert rows.group is not None
        assert rows.x_1MC is not None
        y_MO: Tensor = self.layer(rows.x_1MC, rows.group.context(self.bound))[0]
        return y_MO


def number_of(task: str | None, tasks: Sequence[str], *, needs_task: bool, who: str) -> int:
    """The number of a request's task; that of the average of all skills where none is said and none is needed.

    Args:
        task: the name; None where the request says none.
        tasks: that there are. Of one alone it is meant where none is said.
        needs_task: whether none is an error.
        who: goes by tasks, for messages.

    Raises `FieldInputError` (``task``).
    """
    if task is None:
        if len(tasks) == 1:
            return 0
        if not needs_task:
            return AVERAGE
        known = ", ".join(map(repr, tasks[:6])) + (", ..." if len(tasks) > 6 else "")
        raise FieldInputError(f"{who} goes by task, and the request names none; say task, one of {known}", "task")
    if not isinstance(task, str):
        raise FieldInputError(f"task is {shown(task)}; it must be the name of a task", "task")
    try:
        return numbers_of([task], tasks)[0]
    except InputError as error:
        raise FieldInputError(f"{error} ({who})", "task") from None


def _note(
    names: Sequence[str],
    open_E: Tensor,
    router: Router,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    routing: Routing,
) -> None:
    """Leave a decision where the pass wants it."""
    context = argument_of(RoutingContext, args, kwargs)
    routes = None if context is None else context.state.get(ROUTES)
    if context is not None and routes is not None:
        local_ME = seen_by(router.score, context.state)
        local = None if local_ME is None else (local_ME, open_E)
        routes.value.note(router.matrix or "", names, context.state[ITEMS], routing, local)
