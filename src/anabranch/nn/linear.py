"""Linear layers as parts of a model: every projection can be replaced, added to, or routed, by a pattern of its name.

    model = Decoder.Config(..., linears={"blocks.*.attention.q": MyLinear.Config(rank=8)})

A projection is one matrix product of the model. Fused ones hold several *parts* in the rows of one matrix (``q``, ``k``, ``v`` of
attention, ``gate`` and ``up`` of a feed-forward layer), and a pattern speaks of a part: ``blocks.3.attention.v``. What is not named stays
`Dense`, and a matrix no part of which is named stays one matrix.
"""
# Shapes: R rows (outputs), C columns (inputs); x is [..., C], y is [..., R]

import difflib
from collections.abc import Mapping, Sequence
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

if TYPE_CHECKING:
    from anabranch.nn.context import BuildContext

__all__ = [
    "Added",
    "Dense",
    "Linear",
    "Projection",
    "Split",
    "add_beside",
    "build_linear",
    "call_linear",
    "count_linear",
    "is_plain",
    "takes_context",
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
    """

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
        beside: the layers that add, by part.
    """

    def __init__(self, matrix: nn.Module, beside: Mapping[str, nn.Module], rows: Mapping[str, int]) -> None:
        nn.Module.__init__(self)
        self.matrix = matrix
        self.beside = nn.ModuleDict(beside)
        self.rows = dict(rows)

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        """y."""
        return add_beside(call_linear(self.matrix, x, context), x, self.beside, self.rows, context)


def add_beside(y: Tensor, x: Tensor, beside: Any, rows: Mapping[str, int], context: Any) -> Tensor:
    """``y`` with what the layers ``beside`` some of its parts make of ``x`` added to the rows of these parts; ``rows`` are of each part."""
    if len(rows) == 1:
        return y + call_linear(next(iter(beside.values())), x, context).to(y.dtype)
    parts = dict(zip(rows, y.split(list(rows.values()), dim=-1), strict=True))
    for name, layer in beside.items():
        parts[name] = parts[name] + call_linear(layer, x, context).to(y.dtype)
    return torch.cat(list(parts.values()), dim=-1)


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
    if type(layer) not in (Dense, nn.Linear) or "forward" in vars(layer):
        return False
    return not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
