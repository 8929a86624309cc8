"""`record_routing`: a `RoutingTrace` of what the routers of a model decide.

It works from outside, with forward hooks, so a model that is not recorded runs exactly the code it always runs.
Inside the block compiled code runs eagerly (``torch.compiler.set_stance("force_eager")``), since a graph may have been traced
without the hooks; so it does not matter whether the model was compiled before or not. Forward passes repeated in a backward
pass (activation recompute) are not recorded again.
"""
# Shapes: N items, K choices per item, B sequences, L positions

import itertools
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anabranch.errors import ConfigError, DataError
from anabranch.routing.context import RoutingContext, argument_of
from anabranch.routing.decision import Routing
from anabranch.routing.destinations import Destinations
from anabranch.routing.discovery import Read, RouterLayer, read_routing, router_layers
from anabranch.routing.router import Router
from anabranch.routing.sequences import WHEN_DONE, ItemNumbers, items_state, items_to_record, sequence_names
from anabranch.routing.trace import RoutingTrace
from anabranch.routing.trace_builder import TraceBuilder, TraceWriter
from anabranch.routing.trace_schema import TraceLayer


class Recorder:
    """What `record_routing` yields. Set ``domain`` and ``tokens`` whenever they change, between forward passes.

    Attributes:
        domain: name of where the next items come from, or None; or a list of such names, one for each sequence (or item).
        tokens: int ``[N]`` or ``[B, L]``, ids of the tokens of the next forward pass, padding included, or None. Where a model does not
            say what its sequences are (one that is not ours), the shape of ``[B, L]`` does.
        mask: bool ``[N]`` or ``[B, L]``, False for padding of the next forward pass, where a model does not say it; or None.
    """

    def __init__(
        self, sink: TraceBuilder | TraceWriter, layers: Sequence[RouterLayer], read: Read, *, scores: bool = False
    ) -> None:
        self.domain: str | Sequence[str | None] | None = None
        self.tokens: Tensor | None = None
        self.mask: Tensor | None = None
        self._sink, self._read, self._scores = sink, read, scores
        self._layers: dict[nn.Module, list[RouterLayer]] = {}
        for layer in layers:
            self._layers.setdefault(layer.router, []).append(layer)
        self._numbers = ItemNumbers()
        self._foreign: dict[nn.Module, ItemNumbers] = {}
        # The domain of each sequence that has a name.
        self._told: dict[Hashable, str | None] = {}
        self._visits = {module: _Visits() for module in self._layers}
        self._visits_of = {layer.number: _Visits() for layer in layers}
        self._was_called = False
        # Engines in threads may share a model.
        self._lock = threading.Lock()

    def trace(self) -> RoutingTrace:
        """What was recorded. A recording to a file is read back from it, once its block has ended."""
        if isinstance(self._sink, TraceWriter):
            return RoutingTrace.read(self._sink.path)
        return self._sink.trace()

    @torch.no_grad()
    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # A forward pass inside a backward pass is a repetition.
        if torch._C._current_graph_task_id() != -1:
            return
        with self._lock:
            self._was_called = True
            self._add(module, args, kwargs, output)

    def _add(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        routing = self._read(module, output)
        numbers, context = self._numbers, argument_of(RoutingContext, args, kwargs)
        # Without a context nothing tells which calls of routers belong to one forward pass, so each router counts for
        # itself.
        if context is None:
            numbers = self._foreign.setdefault(module, ItemNumbers())
            context = self._outside(routing.num_items)
        keep_N = items_to_record(context, routing.num_items)
        visit, layers = next(context.once(self._visits[module], itertools.count)), self._layers[module]
        item_N, position_N = numbers.of(routing.num_items, context)
        token_N = self._token_N(routing.num_items, context)
        layer = layers[visit % len(layers)]
        visits = context.once(self._visits_of[layer.number], _Visited).add(item_N[keep_N], position_N[keep_N])
        add = partial(
            self._sink.add,
            _described(layer, routing, visits),
            _numpy(routing.index_NK)[keep_N],
            _numpy(routing.weight_NK.float())[keep_N],
            item_N=item_N[keep_N],
            position_N=position_N[keep_N],
            token_N=-1 if token_N is None else token_N[keep_N],
            domain=self._domain_N(routing.num_items, keep_N, context),
            **(_scored(routing, keep_N) if self._scores else {}),
        )
        # A pass that may fail and be run again tells when it has not.
        done = context.state.get(WHEN_DONE)
        if done is None:
            add()
        else:
            done.append(partial(self._locked, add))

    def _locked(self, add: Callable[[], None]) -> None:
        with self._lock:
            add()

    def _outside(self, num_items: int) -> RoutingContext:
        """What `tokens` and `mask` say of a forward pass whose routers get no context."""
        mask_N = None if self.mask is None else torch.as_tensor(self.mask).reshape(-1).bool()
        if mask_N is not None and len(mask_N) != num_items:
            raise DataError(f"recorder.mask has {len(mask_N)} places, but the forward pass routes {num_items} items")
        shapes = [value.shape for value in (self.tokens, self.mask) if value is not None and value.dim() == 2]
        return RoutingContext(item_mask_N=mask_N, sequence_length=shapes[0][1] if shapes else None)

    def _domain_N(
        self, num_items: int, keep_N: np.ndarray | slice, context: RoutingContext
    ) -> str | list[str | None] | None:
        if self.domain is None or isinstance(self.domain, str):
            return self.domain
        names, num_streams = sequence_names(context, num_items), context.num_streams
        # Rows may have left since their domains were said.
        if names is not None and all(name in self._told for name in names):
            domains = [self._told[name] for name in names]
        elif not self.domain or num_items % (len(self.domain) * num_streams):
            raise DataError(
                f"recorder.domain has {len(self.domain)} names for {num_items} items; give one name, or one for each sequence"
            )
        else:
            domains = [*self.domain] * num_streams
        domain_N = np.repeat(np.array(domains, object), num_items // len(domains))
        if names is not None:
            self._told.update(zip(names, domain_N[:: num_items // len(names)].tolist(), strict=True))
        return domain_N[keep_N].tolist()

    def _token_N(self, num_items: int, context: RoutingContext) -> np.ndarray | None:
        if self.tokens is None:
            return items_state(context, "token", num_items)
        token_N = _numpy(torch.as_tensor(self.tokens)).reshape(-1)
        if token_N.size != num_items:
            raise DataError(
                f"recorder.tokens has {token_N.size} tokens, but the forward pass routes {num_items} items; set it per pass"
            )
        return token_N


@contextmanager
def record_routing(
    model: nn.Module,
    *,
    path: str | Path | None = None,
    routers: Mapping[str, nn.Module] | None = None,
    read: Read | None = None,
    scores: bool = False,
) -> Iterator[Recorder]:
    """Record the decisions of ``model`` inside the block.

        with record_routing(model) as recorder:
            recorder.domain = "code"
            model(token_BL)
        trace = recorder.trace()

    Which item a row belongs to is taken from ``context.state``: ``item_N``, ``position_N`` and ``token_N``, each ``[N]``, or from
    ``context.position_BL`` and ``context.token_BL`` of a language model. Otherwise items are counted from 0, in sequences of
    ``context.sequence_length`` if that is known; with ``context.sequences`` (cached generation, serving) a sequence keeps its number
    when others leave the batch, and the domain of its first pass. Padding (``context.item_mask_N``) is not recorded, nor is what
    ``context.state`` calls a repetition (``repeated_N``, bool: an engine computes a request again that it preempted). A pass that may
    fail and be run again has a list ``when_done`` there: what is recorded waits in it, to be called once the pass has succeeded.

    An engine in this process is recorded as any other use of its model, in whatever thread it runs. Hooks do not reach copies of the
    model: an engine in a process of its own and an elastic group tell where tokens go per request (``Request.record_routing``).

    Args:
        model: whose routers to record.
        path: write to this file as it goes, in little memory, instead of keeping the trace; it appears when the block ends well.
        routers: the modules to record, by name, of a model that has no `Router`. Default: every `Router` in ``model`` and behind them
            what else decides (`anabranch.routing.discovery.TakesOverrides`: loop gates), or where there is nothing of it, what
            transformers' mixtures of experts route with (modules of a class ``...TopKRouter``).
        read: makes a `Routing` from a router and what its forward returned. Default: it is one already, or a tuple of logits, weights
            and indices as transformers' routers return it.
        scores: also keep the scores of all destinations, E floats for each decision, and with what probability a destination was drawn
            where a router draws (`Routing.propensity_NK`).

    Rows carry the router's ``layer``. Where two routers claim one layer (or have none), or a router routes several times in a forward
    pass (`anabranch.routing.discovery.RoutesInPasses`), layers are numbered in the model's order and names tell them apart.

    Raises ConfigError if there is nothing to record. Warns (UserWarning) if no router was called in a block that ended well.
    """
    layers = router_layers(model, routers)
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} has no Router to record; name the modules that route with routers={{...}}"
        )
    with ExitStack() as stack:
        sink = TraceBuilder(scores=scores) if path is None else stack.enter_context(TraceWriter(path, scores=scores))
        recorder = Recorder(sink, layers, read or read_routing, scores=scores)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in recorder._layers:
            handle = module.register_forward_hook(recorder._note, with_kwargs=True)
            stack.callback(handle.remove)
        yield recorder
        if not recorder._was_called:
            warnings.warn(_silence(model, len(recorder._layers)), stacklevel=3)


def _silence(model: nn.Module, num_routers: int) -> str:
    """What to say of a recording in which nothing was heard."""
    return (
        f"record_routing heard none of the {num_routers} routers of this {type(model).__name__}, so the trace is empty. Was another copy "
        "of the model called? An engine in a process of its own and an elastic group have copies; there ask for routes per request, "
        "with record_routing=True"
    )


class _Visits:
    """Owner, in a context's memo, of the count of one router's visits in a forward pass, or of a layer's `_Visited`."""


class _Visited:
    """Which items a layer decided in a forward pass, call by call: a call may be of some of the rows only."""

    def __init__(self) -> None:
        self._calls: list[np.ndarray] = []

    def add(self, item_N: np.ndarray, position_N: np.ndarray) -> int:
        """Of one call more: the most visits that any of its items has had with it."""
        key_N2 = np.stack([item_N, position_N], axis=1).astype(np.int64)
        key_N = np.ascontiguousarray(key_N2).view([("item", np.int64), ("position", np.int64)]).reshape(-1)
        before_N = np.zeros(len(key_N), np.int64)
        for earlier_N in self._calls:
            before_N += np.isin(key_N, earlier_N)
        self._calls.append(key_N)
        return int(before_N.max(initial=0)) + 1


def _described(layer: RouterLayer, routing: Routing, visits: int) -> TraceLayer:
    """What a trace says of a layer that gave ``routing``."""
    destinations = layer.router.destinations if isinstance(layer.router, Router) else Destinations()
    return TraceLayer(
        layer=layer.number,
        name=layer.name,
        num_destinations=routing.num_destinations,
        top_k=routing.num_choices,
        pool=destinations.pool or "",
        own_start=destinations.own_start,
        weight_dtype="float64" if routing.weight_NK.dtype == torch.float64 else "float32",
        visits=visits,
    )


def _scored(routing: Routing, keep_N: np.ndarray | slice) -> dict[str, np.ndarray]:
    """The optional columns of some of the items."""
    found = {"score_NE": _numpy(routing.score_NE.float())[keep_N]}
    if routing.propensity_NK is not None:
        found["propensity_NK"] = _numpy(routing.propensity_NK.float())[keep_N]
    return found


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
