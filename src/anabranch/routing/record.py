"""How a `RoutingTrace` is made: `TraceBuilder` in memory, `TraceWriter` to a file, `record_routing` from a model's routers.

`record_routing` works from outside, with forward hooks, so a model that is not recorded runs exactly the code it always runs.
Inside the block compiled code runs eagerly (``torch.compiler.set_stance("force_eager")``), since a graph may have been traced
without the hooks; so it does not matter whether the model was compiled before or not. Forward passes repeated in a backward
pass (activation recompute) are not recorded again.
"""
# Shapes: N items, K places per item, R rows, B sequences, L positions

import itertools
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from anabranch.errors import ConfigError, DataError
from anabranch.files import atomic_file
from anabranch.routing.context import RoutingContext, argument_of
from anabranch.routing.decision import Routing
from anabranch.routing.router import Router
from anabranch.routing.sequences import SequenceNumbers, items_to_record, real_items, said_of_items, sequence_names
from anabranch.routing.trace import (
    METADATA_KEY,
    PARQUET_OPTIONS,
    ROWS_PER_GROUP,
    SCHEMA,
    UNKNOWN,
    RoutingTrace,
    TraceLayer,
    layers_to_json,
    merge_layers,
)

Read = Callable[[nn.Module, Any], Routing]
FOREIGN = "TopKRouter"  # how transformers names the classes of its routers


class TraceBuilder:
    """Collects decisions in memory, as whatever routes makes them."""

    def __init__(self) -> None:
        self.layers: dict[int, TraceLayer] = {}
        self.num_rows = 0
        self._parts: list[tuple[np.ndarray, ...]] = []
        self._domains: dict[str, int] = {}

    def add(
        self,
        layer: TraceLayer,
        index_NK: Any,
        weight_NK: Any,
        *,
        item_N: Any,
        position_N: Any = 0,
        token_N: Any = UNKNOWN,
        domain: str | Sequence[str | None] | None = None,
    ) -> None:
        """Add N decisions of one layer. ``position_N``, ``token_N`` and ``domain`` may be one value for all.

        Raises DataError if ``layer`` was added before as something else.
        """
        self.layers[layer.layer] = merge_layers(self.layers.get(layer.layer), layer)
        index_NK = np.asarray(index_NK)
        used_NK = index_NK >= 0
        used_NK[:, :1] |= ~used_NK.any(1, keepdims=True)  # an item with no used place keeps its first
        row_R, rank_R = np.nonzero(used_NK)
        domains = [domain] if domain is None or isinstance(domain, str) else domain
        code_N = [UNKNOWN if name is None else self._domains.setdefault(name, len(self._domains)) for name in domains]
        every = (len(index_NK),)
        columns = (
            np.broadcast_to(item_N, every)[row_R],
            np.broadcast_to(position_N, every)[row_R],
            np.full(len(row_R), layer.layer),
            rank_R,
            index_NK[row_R, rank_R],
            np.asarray(weight_NK)[row_R, rank_R],
            np.broadcast_to(token_N, every)[row_R],
        )
        types = [field.type.to_pandas_dtype() for field in SCHEMA if field.name != "domain"]
        part = [column.astype(dtype, copy=False) for column, dtype in zip(columns, types, strict=True)]
        self._parts.append((*part, np.broadcast_to(np.array(code_N, np.int32), every)[row_R]))
        self.num_rows += len(row_R)

    def trace(self) -> RoutingTrace:
        """What was added so far."""
        return RoutingTrace(self._table(), self.layers.values())

    def take(self) -> pa.Table:
        """What was added so far, as a table, which is then forgotten."""
        table = self._table()
        self._parts, self.num_rows = [], 0
        return table

    def _table(self) -> pa.Table:
        if not self._parts:
            return SCHEMA.empty_table()
        *columns, token, code = (np.concatenate(parts) for parts in zip(*self._parts, strict=True))
        domain = pa.DictionaryArray.from_arrays(
            pa.array(code, mask=code == UNKNOWN), pa.array(list(self._domains), pa.string())
        )
        return pa.Table.from_arrays(
            [*map(pa.array, columns), pa.array(token, mask=token == UNKNOWN), domain], schema=SCHEMA
        )


class TraceWriter:
    """Streams decisions to a file in row groups, so that a long recording needs little memory.

    A context manager; the file appears when it is left without an error, and not at all otherwise.

        with TraceWriter("trace.parquet") as writer:
            writer.add(layer, index_NK, weight_NK, item_N=item_N)
    """

    def __init__(self, path: str | Path, *, rows_per_group: int = ROWS_PER_GROUP) -> None:
        self.path = Path(path)
        self._rows_per_group = rows_per_group
        self._builder = TraceBuilder()

    def __enter__(self) -> Self:
        self._place = atomic_file(self.path)
        self._file = pq.ParquetWriter(self._place.__enter__(), SCHEMA, **PARQUET_OPTIONS)
        return self

    def add(self, layer: TraceLayer, index_NK: Any, weight_NK: Any, **columns: Any) -> None:
        """Add N decisions of one layer, see `TraceBuilder.add`."""
        self._builder.add(layer, index_NK, weight_NK, **columns)
        if self._builder.num_rows >= self._rows_per_group:
            self._file.write_table(self._builder.take())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        if error is not None:
            self._file.close()
            # Not the caller's error: an OSError of the caller would be taken for a failure to write here.
            with suppress(_Abandoned):
                self._place.__exit__(_Abandoned, _Abandoned(), None)
            return
        layers = tuple(sorted(self._builder.layers.values(), key=lambda layer: layer.layer))
        self._file.write_table(self._builder.take())
        self._file.add_key_value_metadata({METADATA_KEY: layers_to_json(layers)})
        self._file.close()
        self._place.__exit__(None, None, None)


class _Abandoned(Exception):  # noqa: N818
    """Tells `atomic_file` to drop the file."""


class Recorder:
    """What `record_routing` yields. Set ``domain`` and ``tokens`` whenever they change, between forward passes.

    Attributes:
        domain: name of where the next items come from, or None; or a list of such names, one for each sequence (or item).
        tokens: int ``[N]`` or ``[B, L]``, ids of the tokens of the next forward pass, padding included, or None. Where a model does not
            say what its sequences are (one that is not ours), the shape of ``[B, L]`` does.
        mask: bool ``[N]`` or ``[B, L]``, False for padding of the next forward pass, where a model does not say it; or None.
    """

    def __init__(
        self, sink: TraceBuilder | TraceWriter, layers: Mapping[nn.Module, tuple[int, str]], read: Read
    ) -> None:
        self.domain: str | Sequence[str | None] | None = None
        self.tokens: Tensor | None = None
        self.mask: Tensor | None = None
        self._sink, self._layers, self._read = sink, layers, read
        # By router and how many times it had routed in a forward pass, so that all of them number alike.
        self._numbers: dict[tuple[nn.Module, int], SequenceNumbers] = {}
        self._told: dict[Hashable, str | None] = {}  # the domain of each sequence that has a name
        self._turns = {module: _Turns() for module in layers}
        self._was_called = False
        self._lock = threading.Lock()  # engines in threads may share a model

    def trace(self) -> RoutingTrace:
        """What was recorded. A recording to a file is read back from it, once its block has ended."""
        if isinstance(self._sink, TraceWriter):
            return RoutingTrace.read(self._sink.path)
        return self._sink.trace()

    @torch.no_grad()
    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch._C._current_graph_task_id() != -1:  # in a backward pass, so this forward pass is a repetition
            return
        with self._lock:
            self._was_called = True
            self._add(module, args, kwargs, output)

    def _add(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        routing = self._read(module, output)
        context = argument_of(RoutingContext, args, kwargs) or self._outside(routing.num_items)
        keep_N = items_to_record(context, routing.num_items)
        turn = next(context.once(self._turns[module], itertools.count)) if _passes(module) > 1 else 0
        names = sequence_names(context, routing.num_items)
        item_N, position_N = self._places((module, turn), routing.num_items, context, names)
        token_N = self._token_N(routing.num_items, context)
        self._sink.add(
            self._describe(module, turn, routing),
            _numpy(routing.index_NK)[keep_N],
            _numpy(routing.weight_NK.float())[keep_N],
            item_N=item_N[keep_N],
            position_N=position_N[keep_N],
            token_N=-1 if token_N is None else token_N[keep_N],
            domain=self._domain_N(routing.num_items, keep_N, names, context.num_streams),
        )

    def _outside(self, num_items: int) -> RoutingContext:
        """What `tokens` and `mask` say of a forward pass whose routers get no context."""
        mask_N = None if self.mask is None else torch.as_tensor(self.mask).reshape(-1).bool()
        if mask_N is not None and len(mask_N) != num_items:
            raise DataError(f"recorder.mask has {len(mask_N)} places, but the forward pass routes {num_items} items")
        shapes = [value.shape for value in (self.tokens, self.mask) if value is not None and value.dim() == 2]
        return RoutingContext(item_mask_N=mask_N, sequence_length=shapes[0][1] if shapes else None)

    def _describe(self, module: nn.Module, turn: int, routing: Routing) -> TraceLayer:
        number, name = self._layers[module]
        return TraceLayer(
            layer=number + turn,
            name=name if _passes(module) == 1 else f"{name}.pass{turn}",
            num_destinations=routing.num_destinations,
            top_k=routing.num_places,
            pool=getattr(module, "pool", None) or "",
            own_start=getattr(module, "own_start", 0),
        )

    def _places(
        self, key: tuple[nn.Module, int], num_items: int, context: RoutingContext, names: list[Hashable] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Item id and position of each of the N items: as the context says, else counted from the start of the recording."""
        length = context.sequence_length or 1  # no sequences: every item is one of its own
        count_N = np.arange(num_items)
        position_N = said_of_items(context, "position", num_items)
        item_N = said_of_items(context, "item", num_items)
        if item_N is None:
            numbers = self._numbers.setdefault(key, SequenceNumbers())
            if names is not None:
                item_N = numbers.of(names).repeat(length)
            else:
                # A pass that begins behind position 0 goes on with the sequences of the pass before (cached decoding).
                goes_on = position_N is not None and num_items > 0 and not (position_N[real_items(context)] == 0).any()
                item_N = numbers.counted(-(-num_items // length), goes_on) + count_N // length
        return item_N, count_N % length if position_N is None else position_N

    def _domain_N(
        self, num_items: int, keep_N: np.ndarray | slice, names: list[Hashable] | None, num_streams: int
    ) -> str | list[str | None] | None:
        if self.domain is None or isinstance(self.domain, str):
            return self.domain
        if names is not None and all(name in self._told for name in names):  # rows may have left since it was told
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
            return said_of_items(context, "token", num_items)
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
    ``context.state`` calls a repetition (``repeated_N``, bool: an engine computes a request again that it preempted).

    An engine in this process is recorded as any other use of its model, in whatever thread it runs. Hooks do not reach copies of the
    model: an engine in a process of its own and an elastic group tell where tokens go per request (``Request.record_routing``).

    Args:
        model: whose routers to record.
        path: write to this file as it goes, in little memory, instead of keeping the trace; it appears when the block ends well.
        routers: the modules to record, by name, of a model that has no `Router`. Default: every `Router` in ``model``, or where there is
            none, what transformers' mixtures of experts route with (modules of a class ``...TopKRouter``).
        read: makes a `Routing` from a router and what its forward returned. Default: it is one already, or a tuple of logits, weights
            and indices as transformers' routers return it.

    Rows carry the router's ``layer``. Where two routers claim one layer (or have none), or a router routes several times in a forward
    pass (`Router.passes`), layers are numbered in the model's order and names tell them apart.

    Raises ConfigError if there is nothing to record. Warns (UserWarning) if no router was called in a block that ended well.
    """
    routers = find_routers(model) if routers is None else routers
    if not routers:
        raise ConfigError(
            f"{type(model).__name__} has no Router to record; name the modules that route with routers={{...}}"
        )
    numbers = layer_numbers(routers).values()
    layers = {module: (number, name) for (name, module), number in zip(routers.items(), numbers, strict=True)}
    with ExitStack() as stack:
        sink = TraceBuilder() if path is None else stack.enter_context(TraceWriter(path))
        recorder = Recorder(sink, layers, read or _is_routing)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in layers:
            handle = module.register_forward_hook(recorder._note, with_kwargs=True)
            stack.callback(handle.remove)
        yield recorder
        if not recorder._was_called:
            warnings.warn(_silence(model, len(layers)), stacklevel=3)


def _silence(model: nn.Module, num_routers: int) -> str:
    """What to say of a recording in which nothing was heard."""
    return (
        f"record_routing heard none of the {num_routers} routers of this {type(model).__name__}, so the trace is empty. Was another copy "
        "of the model called? An engine in a process of its own and an elastic group have copies; there ask for routes per request, "
        "with record_routing=True"
    )


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
    passes = [_passes(module) for module in routers.values()]
    if len(set(distinct)) != sum(passes):
        distinct = [0, *itertools.accumulate(passes[:-1])]
    return dict(zip(routers, distinct, strict=True))


def _passes(module: nn.Module) -> int:
    return getattr(module, "passes", 1)


class _Turns:
    """Owner, in a context's memo, of the count of one router's turns in a forward pass."""


def _is_routing(module: nn.Module, output: Any) -> Routing:
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


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
