"""`passing`: the context of a forward pass through a model that is not ours, whose modules hand none on; and layers beside its matrices.

    with passing(model, mask_BL=mask, labels=labelled_rows(expert_B, length)) as seen:
        logits = model(input_ids=token_BL).logits
        loss = cross_entropy(logits, target) + seen.loss()
        loss.backward()                     # inside: checkpointed parts run again and need the labels

Without it the model routes all the same; nothing is labelled, masked or emitted then. What rows are told in any pass of a block (`telling`,
as `on_tasks` has it) layers are told within and without it. Checkpointing must not be the reentrant kind, in
which nothing that is emitted has a gradient.
"""
# Shapes: B rows, L positions

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.errors import ConfigError, InputError
from anabranch.nn.linear import call_linear
from anabranch.routing import RoutingContext

__all__ = ["Beside", "Seen", "Told", "is_plain_product", "passing", "sizes_of", "told"]

_CURRENT: ContextVar["Seen | None"] = ContextVar("adapters_pass", default=None)


@dataclass(eq=False)
class Told:
    """What the rows of any pass of a model are told, see `told`.

    Attributes:
        model: whose passes they are.
        of_rows: the state of a pass of so many rows and positions, on a device. Raises InputError for other rows than are told something.
        for_all: all rows are told the same.
        shape: (B, L) of the pass that runs, or ran last; None before any.
    """

    model: nn.Module
    of_rows: Callable[[int, int, torch.device], dict[str, Any]]
    for_all: bool
    shape: tuple[int, int] | None = None
    _made: tuple[Any, dict[str, Any]] | None = None

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A pass begins: its first argument that is a tensor, ``[B, L, ...]``, says its shape."""
        found = next(
            (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim() > 1), None
        )
        self.shape = None if found is None else (found.shape[0], found.shape[1])

    def state_of(self, x: Tensor, place: str) -> dict[str, Any]:
        """What a layer is told that gets ``x``. Raises InputError where nobody knows which rows the items of ``x`` are of."""
        items = x.numel() // max(x.shape[-1], 1)
        rows = x.shape[0] if x.dim() > 2 else 1
        if not self.for_all and self.shape is not None:
            rows, length = self.shape
            if not (x.shape[0] == rows if x.dim() > 2 else items == rows * length):
                raise InputError(
                    f"{place} gets {list(x.shape)} in a pass of {rows} rows of {length}, and which of them these are nobody knows; leave "
                    "it out of what is put on, or tell all rows the same"
                )
        key = (rows, items // max(rows, 1), x.device)
        if self._made is None or self._made[0] != key:
            self._made = key, self.of_rows(*key)
        return self._made[1]


@contextmanager
def told(what: Told) -> Iterator[None]:
    """Layers of its model that stand beside matrices are told it, in any pass in this block and in what of it runs again."""
    handle = what.model.register_forward_pre_hook(what.begin, with_kwargs=True)
    places = [module for module in what.model.modules() if isinstance(module, Beside)]
    for place in places:
        place.told = (*place.told, what)
    try:
        yield
    finally:
        for place in places:
            place.told = tuple(one for one in place.told if one is not what)
        handle.remove()


@dataclass(eq=False)
class Seen:
    """What is seen of a forward pass.

    Attributes:
        context: which all mixed layers of the pass get.
        called: of them, those that ran.
    """

    context: RoutingContext
    called: set[int] = field(default_factory=set)
    _again: RoutingContext | None = None

    def losses(self) -> dict[str, Tensor]:
        """Each loss that layers emitted, the mean over layers. What is emitted from now on is dropped."""
        if self._again is None:
            self._again = self.context.fork()
        return self.context.mean_losses()

    def loss(self) -> Tensor:
        """The sum of `losses`; 0 where there are none."""
        return sum(self.losses().values(), start=torch.zeros(()))

    def of_call(self) -> RoutingContext:
        """The context for one layer. What runs again in the backward pass has emitted its losses before."""
        if self._again is None:
            return self.context
        self._again.losses, self._again.loads, self._again.parts, self._again.metrics = {}, [], [], {}
        return self._again


def sizes_of(matrix: nn.Module) -> tuple[int, int] | None:
    """(C, O) of a linear layer, or of a Conv1D of transformers' GPT-2, which is one whose weight is ``[C, O]``; None for others."""
    if isinstance(matrix, nn.Linear):
        return matrix.in_features, matrix.out_features
    if not _is_turned(matrix):
        return None
    turned: Any = matrix
    inputs, outputs = turned.weight.shape
    return inputs, outputs


def is_plain_product(matrix: nn.Module) -> bool:
    """Whether all that a linear layer or Conv1D does is what its kind does with ``weight`` and ``bias``, as they lie there."""
    kind: Any = type(matrix)
    own = next(one for one in kind.__mro__ if one is nn.Linear or _is_conv1d(one))
    hooks = (matrix._forward_hooks, matrix._forward_pre_hooks, getattr(matrix, "parametrizations", ()))
    is_held = all(name in matrix._parameters for name in ("weight", "bias"))
    return kind.forward is own.forward and is_held and not any(map(len, hooks)) and "forward" not in vars(matrix)


def _is_turned(matrix: nn.Module) -> bool:
    return any(map(_is_conv1d, type(matrix).__mro__))


def _is_conv1d(kind: type) -> bool:
    # By name: transformers need not be there.
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


class Beside(nn.Module):
    """A linear layer of somebody's model with a layer of ours beside it: y = matrix(x) + beside(x).

    Attributes:
        matrix: the layer of before.
        beside: ours.
        name: of the place in its model.
        told: what its rows are told in the blocks of `told` that are open.
    """

    def __init__(self, matrix: nn.Module, beside: nn.Module, name: str) -> None:
        super().__init__()
        self.matrix, self.beside, self.name = matrix, beside, name
        self.told: tuple[Told, ...] = ()

    def forward(self, *given: Any, **named: Any) -> Tensor:
        """y. What the layer of before is called with is its own affair; the first of it is x."""
        x = given[0] if given else next(iter(named.values()))
        return self.added(self.matrix(*given, **named), x)

    def added(self, y: Tensor, x: Tensor) -> Tensor:
        """``y`` with what ours makes of ``x``."""
        seen, context = _CURRENT.get(), RoutingContext()
        if seen is not None:
            seen.called.add(id(self))
            context = seen.of_call()
        for one in self.told:
            # What it emits is still that of the pass.
            context = replace(context, state={**context.state, **one.state_of(x, self.name)})
        return y + call_linear(self.beside, x, context).to(y.dtype)

    @property
    def weight(self) -> Tensor:
        """The matrix, for code that multiplies by it in the place of calling the layer: two such products have ours added, too, and for
        any other a ConfigError is raised, see `_Matrix`."""
        return _Matrix.of(self)

    @property
    def bias(self) -> Tensor | None:
        """That of the matrix."""
        return self.matrix.bias  # type: ignore[return-value]

    @property
    def in_features(self) -> int:
        """C."""
        return sizes_of(self.matrix)[0]  # type: ignore[index]

    @property
    def out_features(self) -> int:
        """O."""
        return sizes_of(self.matrix)[1]  # type: ignore[index]


class _Matrix(Tensor):
    """A matrix whose products with inputs, ``W @ x`` of columns and ``linear(x, W)`` of rows, have added what stands beside it.

    transformers' Mamba multiplies by ``dt_proj.weight`` and never calls ``dt_proj``. What is asked of it is answered (its shape, its type,
    whether it learns). Whatever else would compute with it raises ConfigError: torch's `nn.MultiheadAttention` hands it to a function of
    its own, others multiply by what it is turned, and what stands beside would add nothing, and learn nothing, without a word.
    """

    _place: Beside

    @classmethod
    def of(cls, place: Beside) -> "_Matrix":
        plain: Any = place.matrix.weight
        made = plain.as_subclass(cls)
        made._place = place
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _BY_COLUMNS and len(args) == 2 and not kwargs and isinstance(args[0], cls) and args[0].is_upright:
            matrix, x = args
            place, plain = matrix._place, matrix.as_subclass(Tensor)
            y = plain @ x
            if x.dim() == 1:
                return place.added(y.unsqueeze(0), x.unsqueeze(0)).squeeze(0)
            return place.added(y.transpose(-1, -2), x.transpose(-1, -2)).transpose(-1, -2)
        if func is F.linear:
            named = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            matrix = named["weight"]
            if isinstance(matrix, cls) and matrix.is_upright:
                y = F.linear(**(named | {"weight": matrix.as_subclass(Tensor)}))
                return matrix._place.added(y, named["input"])
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
        if func in _THE_SAME and isinstance(args[0], cls):
            made = found.as_subclass(cls)
            made._place = args[0]._place
            return made
        if any(isinstance(one, Tensor) for one in (found if isinstance(found, tuple | list) else [found])):
            name = next(one._place.name for one in _all_in((args, kwargs)) if isinstance(one, cls))
            called = getattr(func, "__name__", str(func))
            raise ConfigError(
                f"the model reads the matrix of {name} and does not call it ({called}), as fused kernels do, so that nothing can stand "
                "beside it; switch them off, or leave the layer out of the mixture or of what is put on"
            )
        return found

    @property
    def is_upright(self) -> bool:
        """Whether it is ``[O, C]``."""
        with torch._C.DisableTorchFunctionSubclass():
            return not _is_turned(self._place.matrix)


def _all_in(value: Any) -> Iterator[Any]:
    """What stands in arguments, lists and tables of a call."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        for one in value:
            yield from _all_in(one)
    else:
        yield value


# What gives the same matrix, in another type or place.
_THE_SAME = tuple(
    getattr(Tensor, name)
    for name in ("to", "float", "half", "bfloat16", "double", "cpu", "cuda", "contiguous", "type_as")
)
_BY_COLUMNS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


@contextmanager
def passing(
    model: nn.Module,
    *,
    mask_BL: Tensor | None = None,
    labels: Mapping[str, Any] | None = None,
    length: int | None = None,
) -> Iterator[Seen]:
    """One forward pass of ``model``, and its backward pass.

    Args:
        model: with mixed layers.
        mask_BL: bool, False for padding, which neither routes nor counts.
        labels: of `labelled_rows`.
        length: L, where there is no mask to tell it.

    Raises ConfigError where some mixed layers ran and others were passed by: code that reads their matrix, as fused kernels do, leaves the
    experts out without a word.
    """
    length = mask_BL.shape[1] if mask_BL is not None else length
    context = RoutingContext(
        item_mask_N=None if mask_BL is None else mask_BL.reshape(-1).bool(),
        sequence_length=length,
        training=model.training,
        state=dict(labels or {}),
    )
    seen = Seen(context)
    token = _CURRENT.set(seen)
    try:
        yield seen
    finally:
        _CURRENT.reset(token)
    context.commit()
    places = [module for module in model.modules() if isinstance(module, Beside)]
    missed = [place.name for place in places if id(place) not in seen.called]
    if seen.called and missed:
        raise ConfigError(
            f"the model computed past the experts beside {missed[0]}: it reads that matrix and does not call the layer, as fused kernels "
            "do; switch them off, or leave the layer out of the mixture"
        )
