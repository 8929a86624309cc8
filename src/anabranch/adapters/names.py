"""Which linear layer of ours one of transformers' is: adapters name layers as transformers does.

The reader of checkpoints knows which stored tensor is which rows of which of ours (`anabranch.lm.formats`), and the linear seam which rows
are a part of their own (``q`` of ``qkv``). Here the two are put together.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from anabranch.adapters.numbers import Numbers
from anabranch.config import configclass
from anabranch.errors import CheckpointError, ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.lm.formats import FAMILIES, choose
from anabranch.lm.tensors import Change, Layout, Piece, build_empty, state_once
from anabranch.nn import BuildContext, Count, ExpertPool, Linear
from anabranch.nn.linear import Added, Projection

__all__ = ["Names", "Place", "Stored", "names_of", "projections_of"]

N = TypeVar("N", bound=Numbers)

# Our tensor, number of the expert in it, first row, rows.
_Key = tuple[str, int | None, int, int]


@dataclass(frozen=True)
class Place:
    """One linear layer that can be adapted.

    Attributes:
        part: the name that patterns of ``linears`` know it by, ``blocks.3.attention.q``.
        in_dim, out_dim: its sizes.
        tensor: our tensor that holds its matrix, in a model without adapters, and ``where`` in it.
        change: where the rows of the matrix stand in another order in files, and so those of B.
    """

    part: str
    in_dim: int
    out_dim: int
    tensor: str
    where: tuple[int | slice, ...]
    change: Change | None = None

    def ours(self, numbers: N) -> N:
        """The numbers with outputs in our order."""
        return numbers if self.change is None else numbers.reordered(self.change.read)

    def theirs(self, numbers: N) -> N:
        """What `ours` takes, of what it gives."""
        return numbers if self.change is None else numbers.reordered(self.change.write)


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: ``piece`` of our ``tensor``, in a model without adapters; ``shape`` is that in the file."""

    tensor: str
    piece: Piece
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Names:
    """How a family of Hugging Face's names a model of ours.

    Attributes:
        family: its ``model_type``.
        places: linear layers, by the names of transformers' modules.
        tensors: by the names of transformers' tensors, in files and in memory.
        parts: of all linear layers of the model, those that transformers has no name for too.
    """

    family: str
    places: Mapping[str, Place]
    tensors: Mapping[str, Stored]
    parts: tuple[str, ...]

    def of_part(self, part: str) -> Place:
        """The place of one of our parts that transformers has a name for."""
        return self._of_part[part]

    @cached_property
    def _of_part(self) -> dict[str, Place]:
        return {place.part: place for place in self.places.values()}


class _Probe(Linear):
    """Stands beside a part and does nothing, so that every part of a model is found with its place."""

    @configclass
    class Config(Linear.Config):
        """Nothing to choose."""

        is_added: ClassVar[bool] = True

        def count(self, projection: Projection, context: BuildContext) -> Count:
            """Nothing."""
            return Count()

    def __init__(self, config: Config, projection: Projection, context: BuildContext) -> None:
        nn.Module.__init__(self)
        self.projection = projection

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        """A model that is only looked at is not called."""
        raise ConfigError("this model was built to be looked at, and cannot be run")


def names_of(config: Decoder.Config, wanted: Collection[str], family: str | None = None) -> Names:
    """How the layers of a model of ``config``, which has no ``linears``, are named in an adapter.

    Args:
        config: of the model.
        wanted: names of modules: of several families that can express the model, the first that has them all is taken.
        family: a ``model_type``, where it is known.

    Raises:
        CheckpointError: no family, or not the one asked for, can express the model; none can with routed heads.
        ConfigError: there is no such family.
    """
    # By its name: adapters stand beside heads, and neither imports the other.
    if config.attention.owner.kind == "routed_heads":
        raise CheckpointError(
            "the model has routed heads, and adapters of peft are put onto plain attention alone: put the adapter on and merge it "
            "(anabranch.adapters.merge) before put_heads, or take the heads off first (take_off_heads)"
        )
    parts, empty = dict(_parts(config)), build_empty(config)
    all_parts = tuple(projection.name for projection in parts.values())
    first = None
    for name in [family] if family else FAMILIES:
        try:
            chosen, ready = choose(empty, name)
        except CheckpointError:
            continue
        layout = chosen.sanitize(ready.config, ())
        tensors = _tensors(layout, state_once(empty))
        tensors |= _tensors(chosen.sanitize(ready.config, _in_memory(config.num_layers)), state_once(empty))
        made = Names(name, _places(layout, parts), tensors, all_parts)
        if made.places.keys() >= set(wanted):
            return made
        first = first or made
    if first is not None:
        return first
    try:
        choose(empty, family)
    except CheckpointError as error:
        raise CheckpointError(
            f"adapters of peft name the layers of a Hugging Face model, and this model is none: {error}"
        ) from None
    raise AssertionError("a family that no loop over all families finds")


def _in_memory(num_layers: int) -> set[str]:
    """Names by which a layout is that of transformers 5 in memory, where experts are stacked, and ``block_sparse_moe`` is ``mlp``.

    Adapters that peft saves from there have these.
    """
    stacks = {f"model.layers.{layer}.mlp.experts.gate_up_proj" for layer in range(num_layers)}
    return {"model.layers.0.mlp.gate.weight", *stacks}


def projections_of(config: Decoder.Config) -> list[Projection]:
    """Each part of each linear layer of a model of ``config``, with its sizes; an expert's as often as there are experts."""
    return [projection for _, projection in _parts(config.replace(linears={}))]


def _parts(config: Decoder.Config) -> Iterator[tuple[_Key, Projection]]:
    """Each part of each linear layer."""
    try:
        probed = build_empty(config.replace(linears={"*": _Probe.Config()}))
    except ConfigError:
        # Experts with biases have no layers of their own.
        probed = build_empty(config.replace(linears={"*.attention.*": _Probe.Config()}))
    for name, module in probed.named_modules():
        if isinstance(module, Added):
            yield from _of_rows(f"{name}.weight", None, module.rows, module.beside)
        elif isinstance(module, ExpertPool) and module.layers is not None:
            stacks = ("w13", module.layers.w13), ("w2", module.layers.w2)
            for (stack, experts), rows in zip(stacks, module.layers.rows, strict=True):
                for number, beside in experts.items():
                    yield from _of_rows(f"{name}.{stack}", int(number), rows, beside)


def _of_rows(tensor: str, number: int | None, rows: Mapping[str, int], beside: Any) -> Iterator[Any]:
    start = 0
    for part, size in rows.items():
        yield (tensor, number, start, size), beside[part].projection
        start += size


def _key(tensor: str, piece: Piece, parts_of: Mapping[tuple[str, int | None], list[_Key]]) -> _Key | None:
    """The key of the part that a piece is; None where it is none, or several at once."""
    numbers = [one for one in piece.where if isinstance(one, int)]
    rows = [one for one in piece.where if isinstance(one, slice)]
    if max(len(numbers), len(rows)) > 1:
        return None
    number = numbers[0] if numbers else None
    if rows:
        return tensor, number, rows[0].start, rows[0].stop - rows[0].start
    keys = parts_of.get((tensor, number), [])
    return keys[0] if len(keys) == 1 else None


def _places(layout: Layout, parts: Mapping[_Key, Projection]) -> dict[str, Place]:
    parts_of: dict[tuple[str, int | None], list[Any]] = {}
    for key in parts:
        parts_of.setdefault(key[:2], []).append(key)
    places = {}
    for tensor, pieces in layout.items():
        for piece in pieces:
            module, _, kind = piece.name.rpartition(".")
            found = _key(tensor, piece, parts_of)
            if kind != "weight" or found is None or found not in parts:
                continue
            projection = parts[found]
            sizes = projection.in_dim, projection.out_dim
            # A change of columns, or of more than their order, would change A, or both halves.
            if piece.change is None or _is_of_rows(piece.change, *sizes):
                places[module] = Place(projection.name, *sizes, tensor, tuple(piece.where), piece.change)
    return places


def _is_of_rows(change: Change, in_dim: int, out_dim: int) -> bool:
    """Whether it puts the rows of a matrix in another order, and does nothing else: then it does the same to one column."""
    row_O1 = torch.arange(out_dim, dtype=torch.float64).unsqueeze(1)
    column_1C = torch.arange(in_dim, dtype=torch.float64).unsqueeze(0)
    order_O1 = change.read(row_O1)
    if order_O1.shape != row_O1.shape or not torch.equal(order_O1.sort(0).values, row_O1):
        return False
    changed = change.read(row_O1 * in_dim + column_1C)
    return changed.shape == (out_dim, in_dim) and torch.equal(changed, order_O1 * in_dim + column_1C)


def _tensors(layout: Layout, state: Mapping[str, Tensor]) -> dict[str, Stored]:
    return {
        piece.name: Stored(tensor, piece, piece.stored_shape(state[tensor]))
        for tensor, pieces in layout.items()
        if tensor in state
        for piece in pieces
    }
