"""`ServedAdapters`: the adapters of an engine, from the folder to the rows of a step."""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from anabranch.errors import CapacityError
from anabranch.lm.decoder import Decoder
from anabranch.serving.adapters import AdaptersConfig
from anabranch.serving.core.adapter_shelf import AdapterShelf
from anabranch.serving.core.batch import Chunk
from anabranch.serving.core.client import BusyError
from anabranch.serving.core.request import Request
from anabranch.serving.engine.adapter_parts import LowRankPart, PartRows
from anabranch.serving.engine.adapter_reader import AdapterReader, kept_as
from anabranch.serving.engine.adapter_rows import HEAD, Sites
from anabranch.serving.engine.pass_adapters import Mixed, PassAdapters, ServedAdapter
from anabranch.serving.fast.adapters import AdapterTable, AdapterTables, AdapterUses
from anabranch.sizes import parse_bytes

__all__ = ["OPTION", "ServedAdapters"]

# In `Request.options`, where it keeps keys and values of other adapters apart.
OPTION = "adapters"


class ServedAdapters:
    """What an engine's loop and its runner have of adapters.

    Attributes:
        shelf: which there are.

    Args:
        model: as the runner runs it.
        config: which are there from the start, and how much memory there is.
        tables: what the runner's compiled step is told of adapters; None where it has none.

    Raises as `AdapterReader` for one that cannot be had.
    """

    def __init__(self, model: Decoder, config: AdaptersConfig, tables: AdapterTables | None = None) -> None:
        self._model, self._device = model, model.embedding.weight.device
        self._tables = tables
        self.shelf: AdapterShelf[ServedAdapter] = AdapterShelf(self._read, parse_bytes(config.memory))
        # Of requests that the runner has, by id; in its thread alone.
        self._mixed: dict[str, Mixed] = {}
        # The same for the compiled step, of requests whose adapters it can all add.
        self._used: dict[str, tuple[tuple[AdapterTable, float], ...]] = {}
        self._table_of: WeakKeyDictionary[ServedAdapter, AdapterTable] = WeakKeyDictionary()
        for name, folder in config.folders:
            try:
                self.shelf.load_now(name, folder, is_pinned=True)
            except BusyError as error:
                raise CapacityError(str(error)) from None

    # Made when the first adapter comes: an engine without pays for nothing.

    @functools.cached_property
    def _sites(self) -> Sites:
        return Sites(self._model)

    @functools.cached_property
    def _reader(self) -> AdapterReader:
        weight = self._model.embedding.weight
        return AdapterReader(self._model.config, self._sites, self._device, kept_as(weight.dtype))

    def _read(self, folder: str, root: str | None, check: Callable[[int], None]) -> ServedAdapter:
        return self._reader(folder, root, check)

    # In the loop's thread

    @property
    def controls(self) -> dict[str, Callable[..., Any]]:
        """Commands of an operator's; they call an adapter's name ``adapter``, as a command has a name too."""
        return {
            "adapters": self.shelf.facts,
            "load_adapter": lambda adapter, folder, root=None: self.shelf.load(adapter, folder, root),
            "register_adapter": lambda adapter, folder, root=None: self.shelf.register(adapter, folder, root),
            "remove_adapter": lambda adapter: self.shelf.remove(adapter),
        }

    def prepare(self, request: Request) -> "Future[None] | None":
        """Begin a request: its adapters stay until `release`. See `AdapterShelf.lease`."""
        # One without a weight is checked, and then of no account.
        return self.shelf.lease(request.id, request.adapters) if request.adapters else None

    def bind(self, request: Request) -> Request:
        """The request with the numbers of its adapters, and their versions among its options."""
        if not request.adapters:
            return request
        # In an order of their own, so that the sum is the same to the bit however they were named.
        found = sorted(self.shelf.held_by(request.id), key=lambda pair: pair[0].version)
        mixed = tuple((held, float(weight)) for held, weight in found if weight)
        if not mixed:
            return request
        names = ",".join(f"{held.version}*{weight!r}" for held, weight in mixed)
        return replace(request, bound=mixed, options=(*request.options, (OPTION, names)))

    def release(self, id: str) -> None:
        """A request has ended."""
        self.shelf.release(id)

    # In the runner's

    def add(self, request: Request) -> None:
        """Note a request that appears in a step."""
        if not request.bound:
            return
        self._mixed[request.id] = request.bound
        tables = [self._table(adapter) for adapter, _ in request.bound]
        used = [(table, weight) for table, (_, weight) in zip(tables, request.bound, strict=True) if table is not None]
        if len(used) == len(tables):
            self._used[request.id] = tuple(used)

    def forget(self, id: str) -> None:
        """Drop what is kept of it."""
        self._mixed.pop(id, None)
        self._used.pop(id, None)

    def _table(self, adapter: ServedAdapter) -> AdapterTable | None:
        """What the compiled step is told of an adapter; None where it cannot add all of it."""
        # The head is behind the step.
        own = {name: part for name, part in adapter.parts.items() if name != HEAD}
        parts = {name: part for name, part in own.items() if isinstance(part, LowRankPart)}
        if self._tables is None or len(parts) < len(own) or not self._tables.takes(parts):
            return None
        if adapter not in self._table_of:
            self._table_of[adapter] = self._tables.table(parts, adapter.version)
        return self._table_of[adapter]

    @property
    def is_used(self) -> bool:
        """Whether any request that the runner has uses adapters."""
        return bool(self._mixed)

    def is_of(self, id: str) -> bool:
        """Whether a request uses adapters."""
        return id in self._mixed

    def is_compiled(self, chunk: Chunk) -> bool:
        """Whether the compiled step can add all that the request's adapters do."""
        return chunk.id in self._used

    def uses(self, chunks: Sequence[Chunk]) -> AdapterUses | None:
        """What the compiled step is told of these chunks; None where none uses adapters."""
        used = [self._used.get(chunk.id, ()) for chunk in chunks]
        return AdapterUses(used, [len(chunk.tokens) for chunk in chunks]) if any(used) else None

    def of_pass(self, chunks: Sequence[Chunk]) -> PassAdapters:
        """The adapters of a forward pass of these chunks."""
        return PassAdapters.of(
            [self._mixed.get(chunk.id, ()) for chunk in chunks], [len(chunk.tokens) for chunk in chunks]
        )

    def on(self) -> AbstractContextManager[None]:
        """The model runs with the adapters of the pass's context."""
        return self._sites.on()

    def add_to_head(self, logits_RV: Tensor, x_RD: Tensor, ids: Sequence[str]) -> Tensor:
        """Logits of rows with what the adapters of each add to the head; ``ids`` are the requests of the rows."""
        if not any(HEAD in adapter.parts for id in set(ids) for adapter, _ in self._mixed.get(id, ())):
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
