"""Linear layers as parts of a model: every projection can be replaced, added to, or routed, by a pattern of its name.

    model = Decoder.Config(..., linears={"blocks.*.attention.q": MyLinear.Config(rank=8)})

A projection is one matrix product of the model. Fused ones hold several *parts* in the rows of one matrix (``q``, ``k``, ``v`` of
attention, ``gate`` and ``up`` of a feed-forward layer), and a pattern speaks of a part: ``blocks.3.attention.v``. What is not named stays
`Dense`, and a matrix no part of which is named stays one matrix.
"""
# Shapes: R rows (outputs), C columns (inputs); x is [..., C], y is [..., R]

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.config import Config as BaseConfig
from anabranch.config import Part, configclass
from anabranch.errors import ConfigError
from anabranch.nn.count import Count
from anabranch.nn.kernels.operands import is_transformed

if TYPE_CHECKING:
    from anabranch.nn.context import BuildContext

__all__ = [
    "Added",
    "Dense",
    "Linear",
    "Product",
    "Projection",
    "Rows",
    "Split",
    "add_beside",
    "build_linear",
    "call_linear",
    "count_linear",
    "is_hooked",
    "is_plain",
    "numbers_of",
    "takes_context",
    "told_names",
]


@dataclass(frozen=True)
class Projection:
    """A linear layer before it is built.

    Attributes:
        name: of the module in its model, ``blocks.3.attention.qkv``.
        in_dim: C.
        out_dim: R.
        bias: whether it has one.
        residual: whether it writes to the residual stream, whose weights start smaller.
        parts: rows of each part by its name, in order; they add up to R.
    """

    name: str
    in_dim: int
    out_dim: int
    bias: bool = False
    residual: bool = False
    parts: Mapping[str, int] = field(default_factory=dict)

    def part(self, name: str) -> "Projection":
        """One part alone, under the name that patterns know it by."""
        return replace(self, name=self.part_name(name), out_dim=self.parts[name], parts={name: self.parts[name]})

    def part_name(self, name: str) -> str:
        """``blocks.3.attention.q`` for part ``q`` of ``blocks.3.attention.qkv``."""
        return ".".join([*self.name.split(".")[:-1], name])

    def chosen(self, patterns: Mapping[str, "Linear.Config"]) -> dict[str, "Linear.Config"]:
        """The config of each part that a pattern names; the first pattern that fits counts."""
        found = {}
        for part in self.parts:
            name = self.part_name(part)
            config = next((config for pattern, config in patterns.items() if fnmatchcase(name, pattern)), None)
            if config is not None:
                found[part] = config
        return found


class Linear(Part, nn.Module, family="linear", default="dense"):
    """Interface of a projection: ``(x, context) -> y``, from ``[..., C]`` to ``[..., R]``.

    A design is a subclass whose config has ``build(projection, context)``. ``context`` is the forward context, or None where a layer is
    called outside a model.

    Attributes:
        told_by: names in the context's state of what the layer follows, ``[B, L, ...]``, the same for all positions of a row.
    """

    told_by: ClassVar[tuple[str, ...]] = ()

    @configclass
    class Config(BaseConfig):
        """Base of linear configs. ``is_added`` says whether it stands beside the matrix, which stays, and their outputs add up."""

        is_added: ClassVar[bool] = False

        def count(self, projection: Projection, context: "BuildContext") -> Count:
            """Sizes of this layer; those of the matrix it stands beside not counted."""
            raise NotImplementedError  # abstract

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        """y."""
        raise NotImplementedError  # abstract

    def around(self, rows: "Rows", context: Any = None) -> Tensor:
        """y of the part that this layer stands beside: what the matrix makes of x, and added to it what the layer makes of x.

        A layer that does not add says here what it does instead.
        """
        return rows.y + self(rows.x, context).to(rows.y.dtype)

    def add_to(self, y: Tensor, x: Tensor, context: Any = None) -> None:
        """Add to ``y``, in place, what the layer makes of x: `around`, where no gradient is asked for and y is nobody else's."""
        y.add_(self(x, context))

    @classmethod
    def together(
        cls, product: "Product", beside: Mapping[str, nn.Module], rows: Mapping[str, int], context: Any
    ) -> Tensor | None:
        """y of a matrix with layers of this class ``beside`` some of its parts, all in one; None where each adds for itself."""
        return None

    @classmethod
    def only_adds(cls) -> bool:
        """Whether `around` gives what the matrix makes of x and added to it `forward` of x, of each row by itself; it may be faster."""
        return cls.around is Linear.around and cls.start is Linear.start

    def start(self, weight_RC: Tensor) -> None:
        """Begin beside a matrix with these numbers, which a layer may start from; nothing unless it says so."""


class Product:
    """A matrix and what goes into it, as what stands beside its parts sees it; the product is made when it is first asked for.

    Args:
        x: what goes in.
        run: makes y of an x.
        numbers: gives ``(weight_RC, bias_R)``, see `numbers_of`.
        matrix: the layer that ``run`` calls; None where it is not that alone.
    """

    def __init__(
        self,
        x: Tensor,
        run: Callable[[Tensor], Tensor],
        numbers: Callable[[], tuple[Tensor, Tensor | None]],
        matrix: nn.Module | None = None,
    ) -> None:
        self.x, self.run, self.numbers, self.matrix = x, run, numbers, matrix
        self._y: Tensor | None = None

    @property
    def y(self) -> Tensor:
        """What the matrix makes of x."""
        if self._y is None:
            self._y = self.run(self.x)
        return self._y


@dataclass(frozen=True)
class Rows:
    """The rows of one part of a `Product`; ``first`` and ``size`` are None for all."""

    product: Product
    first: int | None = None
    size: int | None = None

    @property
    def x(self) -> Tensor:
        """What goes in."""
        return self.product.x

    @property
    def y(self) -> Tensor:
        """What these rows make of it."""
        return self._of(self.product.y)

    def of(self, x: Tensor) -> Tensor:
        """What these rows make of another x."""
        return self._of(self.product.run(x))

    def numbers(self) -> tuple[Tensor, Tensor | None]:
        """(weight_RC, bias_R). Raises ConfigError where the matrix is none that can be read."""
        weight, bias = self.product.numbers()
        if self.first is None or self.size is None:
            return weight, bias
        own = slice(self.first, self.first + self.size)
        return weight[own], None if bias is None else bias[own]

    def frozen(self) -> tuple[Tensor, Tensor | None] | None:
        """(weight_RC, bias_R) where these are all rows of a plain matrix, in which nothing learns and whose y nobody watches: whoever adds
        to the product may make it itself. None for any other.
        """
        matrix = self.product.matrix
        if self.first is not None or not isinstance(matrix, nn.Linear) or not is_plain(matrix):
            return None
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in matrix.parameters()):
            return None
        return matrix.weight, matrix.bias

    def _of(self, y: Tensor) -> Tensor:
        return y if self.first is None or self.size is None else y.narrow(-1, self.first, self.size)


class Dense(Linear, nn.Linear, kind="dense"):
    """y = W x + b, one matrix; with initial weights N(0, std) truncated at 3 std, bias zero."""

    @configclass
    class Config(Linear.Config):
        """Nothing to choose."""

        def count(self, projection: Projection, context: "BuildContext") -> Count:
            """R C weights, and R of a bias."""
            bias = projection.out_dim * projection.bias
            return Count.dense(projection.in_dim * projection.out_dim) + Count(bias, bias, 0)

    def __init__(self, config: Config, projection: Projection, context: "BuildContext") -> None:
        nn.Linear.__init__(self, projection.in_dim, projection.out_dim, bias=projection.bias)
        context.init(self.weight, residual=projection.residual)
        if projection.bias:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        """y."""
        return F.linear(x, self.weight, self.bias)


class Split(Linear):
    """A fused projection whose parts are layers of their own, since one of them was replaced: their outputs, side by side."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        nn.Module.__init__(self)
        self.parts = nn.ModuleDict(parts)

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        """y."""
        made = [call_linear(part, x, context) for part in self.parts.values()]
        return made[0] if len(made) == 1 else torch.cat(made, dim=-1)


class Added(Linear):
    """A matrix and what stands beside some of its parts: y = matrix(x), and added to the rows of a part what its layer makes of x.

    Attributes:
        matrix: the layer of before, whole.
        beside: the layers that add, or do otherwise (`Linear.around`), by part.
    """

    def __init__(self, matrix: nn.Module, beside: Mapping[str, nn.Module], rows: Mapping[str, int]) -> None:
        nn.Module.__init__(self)
        self.matrix = matrix
        self.beside = nn.ModuleDict(beside)
        self.rows = dict(rows)
        start_beside(self.beside, self.rows, lambda: numbers_of(matrix)[0])

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        """y."""
        product = Product(
            x, lambda x: call_linear(self.matrix, x, context), lambda: numbers_of(self.matrix), self.matrix
        )
        return add_beside(product, self.beside, self.rows, context)


def add_beside(product: Product, beside: Any, rows: Mapping[str, int], context: Any) -> Tensor:
    """y of a matrix with the layers ``beside`` some of its parts; ``rows`` are of each part."""
    if _is_added_in_place(product, beside):
        first, y = 0, product.y
        for name, size in rows.items():
            if name in beside:
                beside[name].add_to(y.narrow(-1, first, size), product.x, context)
            first += size
        return y
    kinds = {type(layer) for layer in beside.values()}
    if len(kinds) == 1 and issubclass(kind := kinds.pop(), Linear):
        y_or_none = kind.together(product, beside, rows, context)
        if y_or_none is not None:
            return y_or_none
    if len(rows) == 1:
        return _around(next(iter(beside.values())), Rows(product), context)
    made, first = [], 0
    for name, size in rows.items():
        part = Rows(product, first, size)
        made.append(_around(beside[name], part, context) if name in beside else part.y)
        first += size
    return torch.cat(made, dim=-1)


def _is_added_in_place(product: Product, beside: Any) -> bool:
    """Whether what layers make may be added to what the matrix made where it lies, which saves passes over numbers as wide as y."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or is_transformed():
        return False
    if product.matrix is None or not is_plain(product.matrix):
        return False
    return all(isinstance(layer, Linear) and layer.only_adds() for layer in beside.values())


def _around(layer: nn.Module, rows: Rows, context: Any) -> Tensor:
    """y of one part; what somebody put beside it may be any module, which adds."""
    return layer.around(rows, context) if isinstance(layer, Linear) else rows.y + layer(rows.x).to(rows.y.dtype)


def start_beside(beside: Any, rows: Mapping[str, int], weight_of: Callable[[], Tensor]) -> None:
    """Tell the layers ``beside`` the parts of a matrix that start from its numbers what these are."""
    first = 0
    for name, size in rows.items():
        layer = beside[name] if name in beside else None
        if isinstance(layer, Linear) and type(layer).start is not Linear.start:
            weight_RC = weight_of()
            # A matrix that is only looked at has no numbers.
            if not weight_RC.is_meta:
                layer.start(weight_RC[first : first + size])
        first += size


def numbers_of(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(weight_RC, bias_R) of what makes the product of a matrix, as they count where they are stored in few bits.

    Raises ConfigError for a layer that is no matrix.
    """
    if isinstance(layer, nn.Linear):
        return layer.weight, layer.bias
    if isinstance(layer, Split):
        found = [numbers_of(part) for part in layer.parts.values()]
        if all(bias is None for _, bias in found):
            return torch.cat([weight for weight, _ in found]), None
        biases = [weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in found]
        return torch.cat([weight for weight, _ in found]), torch.cat(biases)
    unpacked = getattr(layer, "numbers", None)
    if unpacked is None:
        raise ConfigError(
            f"a layer beside a {type(layer).__name__} needs the numbers of a matrix, and that has none to read"
        )
    found_now: tuple[Tensor, Tensor | None] = unpacked()
    return found_now


def build_linear(projection: Projection, context: "BuildContext") -> Any:
    """The layer of a projection: `Dense`, or what ``context.linears`` says of its parts."""
    context.projections += [projection.part_name(part) for part in projection.parts]
    chosen = projection.chosen(context.linears)
    replaced = {part: config for part, config in chosen.items() if not config.is_added}
    if replaced:
        made: nn.Module = Split(
            {
                part: replaced.get(part, Dense.Config()).build(projection.part(part), context)
                for part in projection.parts
            }
        )
    else:
        made = Dense(Dense.Config(), projection, context)
    added = {part: config for part, config in chosen.items() if config.is_added}
    if not added:
        return made
    beside = {part: config.build(projection.part(part), context) for part, config in added.items()}
    return Added(made, beside, projection.parts)


def call_linear(layer: nn.Module, x: Tensor, context: Any) -> Tensor:
    """What ``layer`` makes of ``x``. The context goes to layers that take it; what somebody put in their place may be any module."""
    return layer(x, context) if isinstance(layer, Linear) else layer(x)


def takes_context(layer: Any) -> bool:
    """Whether `call_linear` gives it a context that it may look at, as what routes must.

    `Dense` does not, nor what derives from it where it holds no other module and computes the same way; of `Split` and `Added` the layers
    inside count.
    """
    if isinstance(layer, Split):
        return any(takes_context(part) for part in layer.parts.values())
    if isinstance(layer, Added):
        return takes_context(layer.matrix) or any(takes_context(part) for part in layer.beside.values())
    if isinstance(layer, Dense):
        # A router is a module.
        return type(layer).forward is not Dense.forward or any(True for _ in layer.children())
    return isinstance(layer, Linear)


def told_names(layer: nn.Module) -> tuple[str, ...]:
    """`Linear.told_by` of a layer and all that stands in it."""
    found = (module.told_by for module in layer.modules() if isinstance(module, Linear))
    return tuple(dict.fromkeys(name for names in found for name in names))


def count_linear(projection: Projection, context: "BuildContext") -> Count:
    """Sizes of what `build_linear` makes."""
    chosen, total = projection.chosen(context.linears), Count()
    for part in projection.parts or {"": projection.out_dim}:
        own = projection.part(part) if part else projection
        config = chosen.get(part)
        if config is not None:
            total += config.count(own, context)
        if config is None or config.is_added:
            total += Dense.Config().count(own, context)
    return total


def check_patterns(patterns: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise ConfigError for a pattern that fits none of ``names``, with the nearest of them, or none that earlier ones leave to it."""
    for pattern in patterns:
        fitting = [name for name in names if fnmatchcase(name, pattern)]
        if not fitting:
            raise ConfigError(
                f"linears has {pattern!r}, which fits no linear layer of this model; {_hint(pattern, names)}"
            )
        taken = [next(first for first in patterns if fnmatchcase(name, first)) for name in fitting]
        if pattern not in taken:
            raise ConfigError(
                f"linears has {pattern!r}, but earlier patterns take every layer that it fits ({taken[0]!r} takes {fitting[0]}), and "
                "the first that fits counts; put the narrower pattern first, or leave this one out"
            )


def _hint(pattern: str, names: Sequence[str]) -> str:
    last = pattern.rpartition(".")[2]
    alike = [name for name in names if fnmatchcase(name.rpartition(".")[2], last)]
    near = difflib.get_close_matches(pattern, alike or names, n=1, cutoff=0.4)
    known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
    return f"did you mean {near[0]!r}?" if near else f"the last word of a name is one of {known}"


def is_plain(layer: nn.Module) -> bool:
    """Whether it is one dense matrix and nothing else, which compiled paths may read instead of calling it."""
    return type(layer) in (Dense, nn.Linear) and not is_hooked(layer)


def is_hooked(layer: nn.Module) -> bool:
    """Whether somebody listens to it, or took the place of what it computes, so that it must be called as a module."""
    if "forward" in vars(layer):
        return True
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    return any(hooks)
