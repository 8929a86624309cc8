"""`ServedAdapters`: the adapters of an engine, from the folder to the rows of a step; and the tasks that its model goes by."""

import functools
import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from anabranch.adapters.glider import HiddenStates
from anabranch.adapters.tasks import goes_by_task, needs_task, task_names, told_tasks
from anabranch.errors import CapacityError, InputError
from anabranch.lm.decoder import Decoder
from anabranch.routing import Router
from anabranch.serving.adapters import AdaptersConfig
from anabranch.serving.core.adapter_memory import NoRoomError
from anabranch.serving.core.adapter_shelf import AdapterShelf
from anabranch.serving.core.batch import Chunk
from anabranch.serving.core.client import BusyError, FieldInputError
from anabranch.serving.core.request import Request, Route
from anabranch.serving.engine.adapter_parts import LowRankPart, PartRows
from anabranch.serving.engine.adapter_reader import AdapterReader, Served, kept_as
from anabranch.serving.engine.adapter_rows import HEAD, Sites
from anabranch.serving.engine.asking import Either, Terms, Threads
from anabranch.serving.engine.explained import Tally, TokenRoute, explained
from anabranch.serving.engine.futures import after
from anabranch.serving.engine.pass_adapters import Mixed, PassAdapters, ServedAdapter
from anabranch.serving.engine.served_layers import BoundLayers, ServedLayers, number_of
from anabranch.serving.fast.adapters import AdapterTable, AdapterTables, AdapterUses
from anabranch.sizes import parse_bytes

__all__ = ["OPTION", "TASK_OPTION", "Bound", "ServedAdapters", "load_first"]

logger = logging.getLogger(__name__)

# In `Request.options`, where they keep keys and values of other adapters, and of other tasks, apart.
OPTION, TASK_OPTION = "adapters", "task"


@dataclass(frozen=True, slots=True)
class Bound:
    """What the engine has found for a request.

    Attributes:
        mixed: its adapters with their weights.
        task: the number of its task among those of the model itself; None where that goes by none.
    """

    mixed: Mixed = ()
    task: int | None = None


def load_first(shelf: AdapterShelf[Any], config: AdaptersConfig) -> None:
    """Load those that an engine has from the start.

    Raises what the shelf's reader raises, and CapacityError where they have no room; for one that has a version in ``config`` neither.
    """
    for name, folder in config.folders:
        version = config.versions.get(name, "")
        try:
            shelf.load_now(name, folder, is_pinned=True, version=version)
        except (BusyError, CapacityError) as error:
            if not version:
                raise CapacityError(str(error)) from None
            # It is one of several, and all that is served beside it is what it was. Why it cannot be read is in the log already.
            if not isinstance(error, BusyError) or isinstance(error, NoRoomError):
                logger.error("%s", error)
            shelf.register(name, folder, version=version, is_pinned=True)


class ServedAdapters:
    """What an engine's loop and its runner have of adapters.

    Attributes:
        shelf: which there are.
        tasks: that the model itself goes by; none where it does not.

    Args:
        model: as the runner runs it.
        config: which are there from the start, and how much memory there is.
        tables: what the runner's compiled step is told of adapters; None where it has none.
        is_steady: see `ServingConfig.deterministic`.
        states: embeds texts by the model, for pools that want it; None for nobody.

    Raises as `AdapterReader` for one that cannot be had and has no version in ``config``.
    """

    def __init__(
        self,
        model: Decoder,
        config: AdaptersConfig,
        tables: AdapterTables | None = None,
        *,
        is_steady: bool = False,
        states: HiddenStates | None = None,
    ) -> None:
        self._model, self._device, self._states = model, model.embedding.weight.device, states
        self._tables, self._is_steady = tables, is_steady
        self.tasks = task_names(model) if goes_by_task(model) else ()
        self._needs_task = needs_task(model)
        self.shelf: AdapterShelf[Served] = AdapterShelf(self._read, parse_bytes(config.memory))
        # Of requests that the runner has, by id; in its thread alone.
        self._mixed: dict[str, Mixed] = {}
        self._task: dict[str, int] = {}
        # What pools went by for those whose routes are recorded, by the key of their use.
        self._tallies: dict[str, dict[Hashable, Tally]] = {}
        # The same for the compiled step, of requests whose adapters it can all add.
        self._used: dict[str, tuple[tuple[AdapterTable, float], ...]] = {}
        self._table_of: WeakKeyDictionary[ServedAdapter, AdapterTable] = WeakKeyDictionary()
        # What requests ask for, compared with the instructions of adapters beside the loop: by request, of each of its pools.
        self._terms: dict[str, dict[str, Terms | None]] = {}
        self._near: ThreadPoolExecutor | None = None
        self._far = Threads()
        load_first(self.shelf, config)

    # Made when the first adapter comes: an engine without pays for nothing.

    @functools.cached_property
    def _sites(self) -> Sites:
        return Sites(self._model)

    @functools.cached_property
    def _reader(self) -> AdapterReader:
        model = self._model
        dtype = kept_as(model.embedding.weight.dtype)
        more: dict[str, Any] = {"is_steady": self._is_steady, "states": self._states}
        return AdapterReader(model.config, self._sites, self._device, dtype, **more)

    def _read(self, folder: str, root: str | None, check: Callable[[int], None]) -> Served:
        return self._reader(folder, root, check)

    def routers(self, name: str) -> Mapping[str, Router]:
        """The routers of an adapter that is in memory, by matrix: for ``record_routing(model, routers=...)`` around an engine.

        Raises InputError for one that there is not, or that has none.
        """
        held = self.shelf.peek(name)
        found = held.routers if isinstance(held, ServedLayers) else {}
        if not found:
            raise InputError(f"adapter {name!r} is not in memory, or has no routers that choose for each token")
        return found

    # In the loop's thread

    @property
    def controls(self) -> dict[str, Callable[..., Any]]:
        """Commands of an operator's; they call an adapter's name ``adapter``, as a command has a name too."""
        return {
            "adapters": self.shelf.facts,
            "load_adapter": lambda adapter, folder, root=None: self.shelf.load(adapter, folder, root),
            "register_adapter": lambda adapter, folder, root=None, version="": self.shelf.register(
                adapter, folder, root, version
            ),
            "remove_adapter": lambda adapter: self.shelf.remove(adapter),
        }

    def prepare(self, request: Request) -> "Future[None] | None":
        """Begin a request: its adapters stay until `release`. See `AdapterShelf.lease`."""
        if not request.adapters:
            return None
        # One without a weight is checked, and then of no account.
        reading = self.shelf.lease(request.id, request.adapters, request.key)
        says_nothing = request.query is None and request.instruction is None
        if says_nothing or (reading is None and not self._pools(request)):
            return reading
        if self._near is None:
            self._near = ThreadPoolExecutor(1, "anabranch-instructions")
        executor = Either(lambda: self._is_far(request), self._far, self._near)
        return after(reading, executor, lambda: self._compare(request))

    def _pools(self, request: Request) -> dict[str, ServedLayers]:
        held = self.shelf.held_by(request.id)
        return {name: one for name, one, weight in held if isinstance(one, ServedLayers) and one.compares and weight}

    def _is_far(self, request: Request) -> bool:
        """Whether what a request asks for goes to endpoints, for which no other request is to wait."""
        return any(one.asked is not None and one.asked.is_remote for one in self._pools(request).values())

    def _compare(self, request: Request) -> None:
        """In another thread: what a request asks for may be long, and the embedder slow."""
        pools = self._pools(request)
        found = {
            name: one.terms(request.query, request.instruction, asker=request.cache_salt) for name, one in pools.items()
        }
        # It may have been aborted meanwhile.
        if self._pools(request):
            self._terms[request.id] = found

    def bind(self, request: Request) -> Request:
        """The request with what its adapters add, and their versions among its options; with the number of its task.

        Raises `FieldInputError` for a task that there is not, or that must be said.
        """
        terms = self._terms.pop(request.id, {})
        # In an order of their own, so that the sum is the same to the bit however they were named.
        found = sorted(
            (
                (self._bound(name, held, request, terms.get(name)), float(weight))
                for name, held, weight in self.shelf.held_by(request.id)
                if weight
            ),
            key=lambda pair: pair[0].version,
        )
        takes_task = bool(self.tasks) or any(isinstance(use, BoundLayers) and use.layers.tasks for use, _ in found)
        if request.task is not None and not takes_task:
            what = "what it adds goes" if found else "the model goes"
            raise FieldInputError(f"task is {request.task!r:.80}, and nothing in {what} by tasks; leave it out", "task")
        options, task = request.options, None
        if self.tasks:
            task = number_of(request.task, self.tasks, needs_task=self._needs_task, who="the model")
            options = (*options, (TASK_OPTION, str(task)))
        if found:
            names = ",".join(f"{use.version}*{weight!r}" for use, weight in found)
            options = (*options, (OPTION, names))
        if not found and task is None:
            return request
        return replace(request, bound=Bound(tuple(found), task), options=options)

    @staticmethod
    def _bound(name: str, held: Served, request: Request, terms: Terms | None) -> ServedAdapter | BoundLayers:
        return held.bound(name, request.task, terms) if isinstance(held, ServedLayers) else held

    def release(self, id: str) -> None:
        """A request has ended."""
        self._terms.pop(id, None)
        self.shelf.release(id)

    # In the runner's

    def add(self, request: Request) -> None:
        """Note a request that appears in a step."""
        bound: Bound | None = request.bound
        if bound is None:
            return
        if bound.task is not None:
            self._task[request.id] = bound.task
        if not bound.mixed:
            return
        self._mixed[request.id] = bound.mixed
        tables = [self._table(use) for use, _ in bound.mixed]
        used = [(table, weight) for table, (_, weight) in zip(tables, bound.mixed, strict=True) if table is not None]
        if len(used) == len(tables):
            self._used[request.id] = tuple(used)

    def forget(self, id: str) -> None:
        """Drop what is kept of it."""
        self._mixed.pop(id, None)
        self._task.pop(id, None)
        self._used.pop(id, None)
        self._tallies.pop(id, None)

    def explain(self, id: str, route: TokenRoute) -> dict[str, Any]:
        """Of a request of whose tokens one went this way: what its pools went by so far, by their names; see `explained`."""
        if not route.pools:
            return {}
        tallies = self._tallies.setdefault(id, {})
        for key, tally in route.pools.items():
            if key in tallies:
                tallies[key].add(tally)
            else:
                tallies[key] = tally
        pools = [use for use, _ in self._mixed.get(id, ()) if isinstance(use, BoundLayers) and use.key in tallies]
        return {use.name: explained(tallies[use.key], use.terms, use.layers.experts) for use in pools}

    def _table(self, use: Any) -> AdapterTable | None:
        """What the compiled step is told of an adapter; None where it cannot add all of it."""
        if self._tables is None or not isinstance(use, ServedAdapter):
            return None
        # The head is behind the step.
        own = {name: part for name, part in use.parts.items() if name != HEAD}
        parts = {name: part for name, part in own.items() if isinstance(part, LowRankPart)}
        if len(parts) < len(own) or not self._tables.takes(parts):
            return None
        if use not in self._table_of:
            self._table_of[use] = self._tables.table(parts, use.version)
        return self._table_of[use]

    @property
    def is_used(self) -> bool:
        """Whether any request that the runner has uses adapters."""
        return bool(self._mixed)

    def is_of(self, id: str) -> bool:
        """Whether a request uses adapters."""
        return id in self._mixed

    def task_of(self, id: str) -> int | None:
        """The number of a request's task, where the model goes by tasks: one that was told none is of the first, as what warms it up."""
        return self._task.get(id, 0) if self.tasks else None

    def told(self, task: int, num_streams: int, length: int) -> dict[str, Any]:
        """For the context of a pass of one task."""
        return told_tasks(torch.full((num_streams,), task, dtype=torch.int64, device=self._device), length)

    @property
    def is_watched(self) -> bool:
        """Whether anyone listens to routers that requests use."""
        held = {
            id(use.layers): use.layers
            for mixed in self._mixed.values()
            for use, _ in mixed
            if isinstance(use, BoundLayers)
        }
        return any(layers.is_watched for layers in held.values())

    def is_compiled(self, chunk: Chunk) -> bool:
        """Whether the compiled step can add all that the request's adapters do."""
        return chunk.id in self._used

    def uses(self, chunks: Sequence[Chunk]) -> AdapterUses | None:
        """What the compiled step is told of these chunks; None where none uses adapters."""
        used = [self._used.get(chunk.id, ()) for chunk in chunks]
        return AdapterUses(used, [len(chunk.tokens) for chunk in chunks]) if any(used) else None

    def of_pass(self, chunks: Sequence[Chunk], routes: Mapping[int, Route] | None = None) -> PassAdapters:
        """The adapters of a forward pass of these chunks; ``routes`` by row are filled in with what their routers choose."""
        mixed, counts = [self._mixed.get(chunk.id, ()) for chunk in chunks], [len(chunk.tokens) for chunk in chunks]
        return PassAdapters.of(mixed, counts, routes)

    def on(self) -> AbstractContextManager[None]:
        """The model runs with the adapters of the pass's context."""
        return self._sites.on()

    def add_to_head(self, logits_RV: Tensor, x_RD: Tensor, ids: Sequence[str]) -> Tensor:
        """Logits of rows with what the adapters of each add to the head; ``ids`` are the requests of the rows."""
        if not any(HEAD in use.parts for id in set(ids) for use, _ in self._mixed.get(id, ())):
            return logits_RV
        adapters = PassAdapters.of([self._mixed.get(id, ()) for id in ids], [1] * len(ids))
        made_RV = logits_RV.clone()
        for number, row_M in adapters.groups(torch.tensor(adapters.number_T, device=x_RD.device)):
            rows = slice(None) if row_M is None else row_M
            delta_MV = adapters.delta(
                number, HEAD, PartRows(x_RD[rows], functools.partial(logits_RV.__getitem__, rows))
            )
            if delta_MV is not None:
                made_RV[rows] = made_RV[rows] + delta_MV.to(made_RV.dtype)
        return made_RV

    def close(self) -> None:
        """The engine ends."""
        self.shelf.close()
        if self._near is not None:
            self._near.shutdown(wait=False, cancel_futures=True)
