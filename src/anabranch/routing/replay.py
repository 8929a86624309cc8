"""`replay_routing`: the decisions of a `RoutingTrace` taken again, item by item.

    with record_routing(model) as recorder:
        rollout = generate(model, prompts)
    with replay_routing(model, recorder.trace(), weights="own"):
        loss = model(token_BL, target_BL).loss        # the experts of the rollout, weighed by the router that learns

Items are numbered as `record_routing` numbers them, so the same passes find the same decisions; other passes do where they say which items
they have (``item_N`` and ``position_N`` in ``context.state``) or come to the same numbers: a training pass over whole sequences is sequence
0, 1, ... from position 0 on, as batched generation was. With the recorded weights no router runs, and the same tokens give the same outputs
to the bit. With ``weights="own"`` only the destinations are replayed, which is what training on rollouts needs (an engine and a trainer
round differently, and near-ties between experts then go other ways): weights are made of the router's own scores, with their gradient.

Where only some routers are replayed, or other overrides hold besides, a score that hands a state on to the next router (`Score.hands_on`)
still runs: what decides freely behind it goes on from that state.
"""
# Shapes: N items, K choices per item, R decisions of a layer

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from anabranch.errors import AnabranchError, ConfigError, DataError
from anabranch.routing.context import RoutingContext
from anabranch.routing.decision import UNUSED
from anabranch.routing.discovery import RouterLayer, router_layers
from anabranch.routing.layer_overrides import overriding, own_layers
from anabranch.routing.override import Override
from anabranch.routing.router import Router
from anabranch.routing.sequences import WHEN_DONE, ItemNumbers, real_items
from anabranch.routing.trace import RoutingTrace
from anabranch.routing.trace_schema import TraceLayer

Weights = Literal["recorded", "own"]


@contextmanager
def replay_routing(
    model: nn.Module,
    trace: RoutingTrace,
    *,
    weights: Weights = "recorded",
    learn: bool = False,
    routers: Mapping[str, nn.Module] | None = None,
) -> Iterator["Replay"]:
    """Decide inside the block as ``trace`` says.

    Args:
        model: one with the routers that were recorded. Names may have more in front on either side (a wrapper's).
        trace: of its layers; one that was skipped all the time may be missing.
        weights: ``recorded``, and no router runs; or ``own``: the router's scores weigh the recorded destinations, as its select does.
        learn: balancers see the decisions, in losses and loads. Routers run for that.
        routers: those that were recorded, where `record_routing` was given some of them by names of its own; the others decide
            themselves. Not needed for a trace of all routers, with or without loop gates and the like, nor for one of those alone.

    A decision that was recorded several times for one item and position is taken in that order, and from the first again when all were
    taken: a block that a pass visits twice, and a second epoch over items that ``context.state`` names. What is not named is counted on,
    so an epoch over counted items needs a block of its own. A pass visits a layer as often as it was recorded to, or
    not at all.

    Raises ConfigError for a model without a `Router`. Raises DataError for a trace of other layers, destinations or numbers of choices, and
    in the block for a layer, an item or a visit that was not recorded, for a visit that was recorded and is missing (in the next pass, or
    where the block ends), and for weights that were recorded in another precision than this pass has.
    Warnings and engines: see `override_routing`.
    """
    replay = Replay(model, trace, weights=weights, learn=learn, routers=routers)
    with overriding(model, replay, routers):
        yield replay
    replay.check_whole()


class Replay:
    """What `replay_routing` puts into forward passes: an `Overrides` for ``context.routing``. Arguments and errors are the same."""

    def __init__(
        self,
        model: nn.Module,
        trace: RoutingTrace,
        *,
        weights: Weights = "recorded",
        learn: bool = False,
        routers: Mapping[str, nn.Module] | None = None,
    ) -> None:
        if weights not in ("recorded", "own"):
            raise ConfigError(f"weights is {weights!r}; use recorded or own")
        known = {layer.layer for layer in trace.layers}
        layers = _layers_of(model, trace) if routers is None else own_layers(model, routers)
        _check_layers(layers, trace)
        self._num_passes = {layer.router: layer.num_passes for layer in layers}
        self._names = {(layer.router, layer.pass_index): f"layer {layer.number} ({layer.name})" for layer in layers}
        self._is_of_all = all(each in self._num_passes for each in model.modules() if isinstance(each, Router))
        self._weights, self._learn = weights, learn
        self._recorded = {
            (layer.router, layer.pass_index): _Recorded(trace, layer.number)
            for layer in layers
            if layer.number in known
        }
        self._numbers = ItemNumbers()
        self._owners: dict[tuple[nn.Module, int], object] = {}
        self._passes = itertools.count()
        # What passes have taken that may fail and be run again, by the list that tells when they have not.
        self._unsure: dict[int, _Unsure] = {}
        # Engines in threads may share a model.
        self._lock = threading.Lock()

    def of(self, router: nn.Module, visit: int, x_ND: Tensor, context: RoutingContext) -> Override | None:
        """See `Overrides`."""
        if router not in self._num_passes:
            return None
        with self._lock:
            owner = self._owners.setdefault((router, visit), object())
            return context.once(owner, lambda: self._find(router, visit, x_ND, context))

    def check_whole(self) -> None:
        """Raise DataError if a pass has visited a layer less often than was recorded; one that has failed counts for nothing."""
        with self._lock:
            for unsure in self._unsure.values():
                unsure.undo()
            self._unsure.clear()
        for recorded in self._recorded.values():
            recorded.check_whole()

    def _find(self, router: nn.Module, visit: int, x_ND: Tensor, context: RoutingContext) -> Override:
        """The recorded decisions of the next N items."""
        if torch._C._current_graph_task_id() != -1:
            raise AnabranchError(
                "a backward pass repeats a router whose context does not tell which visit this is; recompute in context.fork(carry), with "
                "the carry that the layer was given"
            )
        visited = router, visit % self._num_passes[router]
        recorded, num_items = self._recorded.get(visited), len(x_ND)
        if recorded is None:
            raise DataError(f"the trace does not have {self._names[visited]}, in which this pass routes")
        item_N, position_N = self._numbers.of(num_items, context)
        real_N = real_items(context)
        unsure = self._unsure_of(context.state.get(WHEN_DONE))
        row_N = recorded.rows(
            item_N[real_N],
            position_N[real_N],
            context.once(self._passes, lambda: next(self._passes)),
            None if unsure is None else unsure.undos,
        )
        index_NK = np.full((num_items, recorded.layer.top_k), UNUSED, np.int64)
        index_NK[real_N] = recorded.decisions.index_NK[row_N]
        weight_NK = None
        if self._weights == "recorded":
            recorded.check_precision(x_ND.dtype)
            weight_NK = np.zeros(index_NK.shape, np.float32)
            weight_NK[real_N] = recorded.decisions.weight_NK[row_N]
        return Override(
            index_NK=torch.from_numpy(index_NK),
            weight_NK=None if weight_NK is None else torch.from_numpy(weight_NK),
            learn=self._learn,
            # Another source may let a router that we decided for ask its score, which goes on from the state before.
            of_all_routers=self._is_of_all and len(context.routing) == 1,
        )

    def _unsure_of(self, done: list[Callable[[], None]] | None) -> "_Unsure | None":
        """Where to note what a pass takes; None for one that is not run again. What a pass took that has failed is given back."""
        if done is None:
            return None
        unsure = self._unsure.get(id(done))
        if unsure is not None and not any(each is unsure.keep for each in done):
            # The list was emptied, and nobody was called: that pass has failed.
            unsure.undo()
            unsure = None
        if unsure is None:
            unsure = self._unsure[id(done)] = _Unsure(partial(self._sure, id(done)))
            done.append(unsure.keep)
        return unsure

    def _sure(self, key: int) -> None:
        with self._lock:
            self._unsure.pop(key, None)


class _Unsure:
    """What is taken of a trace by a pass that may yet fail.

    Attributes:
        keep: to be called when it has not.
        undos: give it back, the last one first.
    """

    def __init__(self, keep: Callable[[], None]) -> None:
        self.keep = keep
        self.undos: list[Callable[[], None]] = []

    def undo(self) -> None:
        """The pass has failed."""
        while self.undos:
            self.undos.pop()()


class _Recorded:
    """The decisions of one layer, found by item and position."""

    def __init__(self, trace: RoutingTrace, number: int) -> None:
        self.layer, self.decisions = trace.layer(number), trace.decisions(number)
        self._item, numbered_R = np.unique(self.decisions.item_N, return_inverse=True)
        self._stride = int(self.decisions.position_N.max(initial=0)) + 1
        key_R = numbered_R * self._stride + self.decisions.position_N
        # Decisions of one key in the order in which they were recorded.
        self._order_R = np.argsort(key_R, kind="stable")
        self._key_R = key_R[self._order_R]
        # Of a key, kept at the first of its decisions: how often it was asked for, in which pass last, and how often in that.
        self._taken_R, self._visit_R = np.zeros((2, len(key_R)), np.int64)
        self._pass_R = np.full(len(key_R), -1)

    def rows(
        self, item_N: np.ndarray, position_N: np.ndarray, number: int, undos: list[Callable[[], None]] | None = None
    ) -> np.ndarray:
        """Which decision is the next of each item, in pass ``number``; how to give them back is put into ``undos``.

        Raises DataError if one was not recorded, or was recorded in another visit of its pass.
        """
        place_N = np.searchsorted(self._item, item_N).clip(max=max(len(self._item) - 1, 0))
        key_N = place_N * self._stride + position_N
        first_N = np.searchsorted(self._key_R, key_N, "left")
        count_N = np.searchsorted(self._key_R, key_N, "right") - first_N
        if len(self._item):
            known_N = (self._item[place_N] == item_N) & (position_N >= 0) & (position_N < self._stride) & (count_N > 0)
        else:
            known_N = np.zeros(len(item_N), bool)
        if not known_N.all():
            wrong = int(np.flatnonzero(~known_N)[0])
            raise DataError(
                f"the trace has no decision of item {item_N[wrong]} at position {position_N[wrong]} in layer {self.layer.layer} "
                f"({self.layer.name}); of this pass's {len(item_N)} items it lacks {int((~known_N).sum())}. Items that context.state does "
                "not name are counted from the start of the block"
            )
        before = self._visit_R[first_N], self._pass_R[first_N]
        self._count_visits(first_N, count_N, number)
        if undos is not None:
            undos.append(partial(self._give_back, first_N, *before))
        before_N = self._taken_R[first_N] + _rank_among_equals(first_N)
        np.add.at(self._taken_R, first_N, 1)
        return self._order_R[first_N + before_N % count_N]

    def _give_back(self, first_N: np.ndarray, visit_N: np.ndarray, pass_N: np.ndarray) -> None:
        np.subtract.at(self._taken_R, first_N, 1)
        self._visit_R[first_N], self._pass_R[first_N] = visit_N, pass_N

    def _count_visits(self, first_N: np.ndarray, count_N: np.ndarray, number: int) -> None:
        """One visit more of keys in pass ``number``. Raises DataError for one that was not recorded, or where the pass before lacks one."""
        visit_N = np.where(self._pass_R[first_N] == number, self._visit_R[first_N], 0)
        most_N = np.minimum(count_N, self.layer.visits) if self.layer.visits > 1 else count_N
        if (visit_N >= most_N).any():
            most = int(most_N[visit_N >= most_N][0])
            raise DataError(
                f"a pass visits layer {self.layer.layer} ({self.layer.name}) more often than it was recorded to: {most + 1} times, "
                f"not {most}"
            )
        self._check_whole(first_N[visit_N == 0], count_N[visit_N == 0])
        self._pass_R[first_N], self._visit_R[first_N] = number, visit_N + 1

    def check_whole(self) -> None:
        """Raise DataError if a pass lacks visits that were recorded."""
        first_A, count_A = np.unique(self._key_R, return_index=True, return_counts=True)[1:]
        self._check_whole(first_A, count_A)

    def _check_whole(self, first_N: np.ndarray, count_N: np.ndarray) -> None:
        # Decisions of several passes cannot be told from those of several visits where there are more than any pass has.
        one_pass_N = count_N <= self.layer.visits
        wanting_N = one_pass_N & (self._taken_R[first_N] % count_N != 0)
        if wanting_N.any():
            place = int(np.flatnonzero(wanting_N)[0])
            seen, recorded = self._taken_R[first_N[place]] % count_N[place], count_N[place]
            raise DataError(
                f"a pass visited layer {self.layer.layer} ({self.layer.name}) less often than it was recorded to: {seen} of {recorded} "
                "times"
            )

    def check_precision(self, dtype: torch.dtype) -> None:
        """Raise DataError unless weights of a pass of this type are kept exactly."""
        needed = "float64" if dtype == torch.float64 else "float32"
        if needed != self.layer.weight_dtype or needed == "float64":
            raise DataError(
                f"weights of layer {self.layer.layer} ({self.layer.name}) were recorded of {self.layer.weight_dtype} and kept as float32, "
                f"but this pass has weights of {needed}; replay the destinations alone, with weights='own'"
            )


def _rank_among_equals(value_N: np.ndarray) -> np.ndarray:
    """How many of the same value stand before each."""
    order_N = np.argsort(value_N, kind="stable")
    sorted_N = value_N[order_N]
    rank_N = np.empty(len(value_N), np.int64)
    rank_N[order_N] = np.arange(len(value_N)) - np.searchsorted(sorted_N, sorted_N, "left")
    return rank_N


def _layers_of(model: nn.Module, trace: RoutingTrace) -> list[RouterLayer]:
    """The layers of ``model`` that a trace of it is about: its routers, and what else decides where that was recorded.

    A trace of nothing but what else decides (`record_difficulty`) numbers that from 0 on, as if there were no routers; they decide freely.
    """
    layers = own_layers(model)
    others = {layer.router_name: layer.router for layer in layers if not isinstance(layer.router, Router)}
    alone = router_layers(model, others) if others else []
    if trace.layers and all(any(_is_of(layer, recorded) for layer in alone) for recorded in trace.layers):
        return alone
    known = {layer.layer for layer in trace.layers}
    return [layer for layer in layers if isinstance(layer.router, Router) or layer.number in known]


def _is_of(layer: RouterLayer, recorded: TraceLayer) -> bool:
    return layer.number == recorded.layer and _is_one_name(layer.name, recorded.name)


def _check_layers(layers: list[RouterLayer], trace: RoutingTrace) -> None:
    """Raise DataError unless the trace is of these layers, or of those of them that were not skipped."""
    ours = {layer.number: layer for layer in layers}
    if not trace.layers:
        raise DataError("the trace has no layer, so there is no decision to replay")
    for recorded in trace.layers:
        if recorded.layer not in ours:
            raise DataError(f"the trace has a layer {recorded.layer}, the model routes in {', '.join(map(str, ours))}")
    for recorded in trace.layers:
        _check_layer(ours[recorded.layer], recorded)


def _check_layer(layer: RouterLayer, recorded: TraceLayer) -> None:
    if not _is_one_name(layer.name, recorded.name):
        raise DataError(
            f"layer {layer.number} is {layer.name} in the model, but {recorded.name} in the trace; it must be a trace of this model"
        )
    router = layer.router
    destinations: Any = router.destinations
    facts = {
        "num_destinations": (router.num_destinations, recorded.num_destinations),
        "top_k": (router.num_choices, recorded.top_k),
        "pool": (destinations.pool, recorded.pool),
        "own_start": (destinations.own_start, recorded.own_start),
    }
    for name, (here, there) in facts.items():
        if here is not None and here != there:
            raise DataError(
                f"{name} of layer {layer.number} ({layer.name}) is {here} in the model, but {there} in the trace"
            )


def _is_one_name(ours: str, theirs: str) -> bool:
    """Whether two names are of one module, with a wrapper's prefix in front of one of them."""
    # torch.compile puts this into names.
    ours, theirs = (name.replace("_orig_mod.", "") for name in (ours, theirs))
    return ours == theirs or ours.endswith(f".{theirs}") or theirs.endswith(f".{ours}")
