"""The layers of a model in few bits, made from the tensors of a file or folder: as they are stored, or rounded."""
# Shapes: N rows (outputs), K depth (inputs), E experts, P panels of 16 rows

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from typing import Any, Literal

import torch
from torch import Tensor

from anabranch.lm.decoder import Decoder
from anabranch.lm.formats.few_bits import Dequantised
from anabranch.lm.formats.mxfp4 import Unpacked
from anabranch.lm.gguf import GgufFile
from anabranch.lm.gguf_blocks import is_mixed, kept_form, packed_rows
from anabranch.lm.quantized_form import Made, Quantized
from anabranch.lm.tensors import Layout, Piece, TensorSource
from anabranch.nn.packed import SHARE, Packed
from anabranch.nn.parted import PartedLinear
from anabranch.nn.parts import Form, Matrices, Parts, can_be_parts, empty_of, form_of
from anabranch.nn.pool import ExpertPool
from anabranch.nn.quantize import PackedEmbedding, QuantizedLinear, QuantizedPool, module_of, quantizable

__all__ = ["EMBEDDING", "Bits", "Layers", "Made"]

# ``stored``: what is in blocks or integers that kernels compute with stays so, and nothing is rounded.
Bits = Literal["int8", "int4", "stored"]
# Name of the table of vectors, which has few bits where it is stored in them.
EMBEDDING = "embedding"


class Layers:
    """Makes the quantised layers of a model from the stored tensors.

    Args:
        source, layout: the tensors, and how they make up the model's; ``source`` may be None where all is rounded and only sizes are asked
            for: it says what is kept.
        dtype: that weights are rounded to first, and of what stays in floating point.
        bits: that are asked for; None for none.
    """

    def __init__(self, source: TensorSource | None, layout: Layout, dtype: torch.dtype, bits: Bits | None) -> None:
        self._source: Any = source
        self._layout, self._dtype, self._bits = layout, dtype, bits
        self._known: dict[str, tuple[Any, int] | None] = {}
        self._known_apart: dict[str, list[tuple[int, Packed]] | None] = {}

    def chosen(self, model: Decoder, group: int | None = None) -> dict[str, tuple[Any, int | None]]:
        """(bits, group) that are asked for, of each layer that will be in few bits. Raises ConfigError as `quantizable`."""
        if self._bits is None:
            return {}
        if self._bits != "stored":
            return dict(quantizable(model, self._bits, group=group)) | self._odd_pools(model)
        found: dict[str, tuple[Any, int | None]] = {
            name: own
            for name, own in quantizable(model, "int4").items()
            if all(
                self._stays(weight, module_of(model, name)) for weight in self._weights(name, module_of(model, name))
            )
        }
        found |= self._odd_pools(model)
        # A head that is the embedding reads the same memory.
        is_shared = model.head is not None or "head" in found
        if is_shared and isinstance(self._source, GgufFile) and self._kept(f"{EMBEDDING}.weight") is not None:
            found[EMBEDDING] = ("int4", None)
        return found

    def _odd_pools(self, model: Decoder) -> dict[str, tuple[Any, int | None]]:
        """Pools with biases or another activation that stay as they are stored; no weights are rounded for them."""
        return {
            name: ("int4", None)
            for name, module in model.named_modules()
            if isinstance(module, ExpertPool)
            and not module.is_plain
            and module.layers is None
            and all(
                self._kept(weight) is not None or self._apart(weight, module.num_experts) is not None
                for weight in self._weights(name, module)
            )
        }

    def tensors_of(self, name: str) -> list[str]:
        """Names of the stored tensors that a layer is made of."""
        layout = self._layout
        return [piece.name for key, part in layout.items() if key.startswith(f"{name}.") for piece in part]

    def empties(self, model: Decoder, chosen: Mapping[str, tuple[Any, int | None]]) -> dict[str, Made]:
        """What stands in place of the layers ``chosen`` of a model, by name, without weights (on the device ``meta``)."""
        made: dict[str, Made] = {}
        for name in chosen:
            if name != EMBEDDING:
                made[name] = self.empty(name, module_of(model, name), *chosen[name])
        if EMBEDDING in chosen:
            tied: Any = made.get("head") if model.head is None else None
            like = (
                self._like(f"{EMBEDDING}.weight", (1, *model.embedding.weight.shape), "int4", None)
                if tied is None
                else tied.packed
            )
            made[EMBEDDING] = PackedEmbedding(like, self._dtype)
        return made

    def table(self, model: Any, like: Any, *, is_tied: bool) -> PackedEmbedding:
        """The embedding that ``like`` tells the sizes of; of a head that it is too, which is there, it has the memory."""
        if is_tied:
            return PackedEmbedding(model.head.packed, self._dtype)
        weight = f"{EMBEDDING}.weight"
        return PackedEmbedding(self._packed(weight, like.packed, [_of_one(self._layout[weight])]), self._dtype)

    def experts(self, name: str, pool: Any) -> list[list[Callable[[], Tensor]]]:
        """Reads each matrix of each expert of ``pool``, alone: panels ``[P, bytes]`` of one in few bits, else its numbers ``[N, K]``."""
        is_few = isinstance(pool, QuantizedPool)
        likes: Any = pool.packed if is_few else [tuple(stack.shape[1:]) for stack in pool.stacks]
        made: list[list[Callable[[], Tensor]]] = [[] for _ in range(pool.num_experts)]
        for weight, like in zip(self._weights(name, pool), likes, strict=True):
            for reads, parts in zip(made, _of_experts(self._layout[weight], pool.num_experts), strict=True):
                reads.append(partial(self._panels, weight, like, parts) if is_few else partial(self._read, parts, like))
        return made

    def _weights(self, name: str, module: Any) -> list[str]:
        """The stored weights of a layer."""
        if isinstance(module, ExpertPool | QuantizedPool):
            return [f"{name}.{part}" for part in ("w13", "w2")]
        return [self._weight(name)]

    def _stays(self, weight: str, module: Any) -> bool:
        """Whether the matrices of a weight of ``module`` have few bits where nothing is rounded that is stored in more."""
        num = module.num_experts if isinstance(module, ExpertPool) else None
        return self._kept(weight) is not None or self._apart(weight, num) is not None or self._is_mixed(weight)

    def _apart(self, weight: str, num_experts: int | None = None) -> list[tuple[int, Packed]] | None:
        """The parts of a weight's matrices that stay as they are stored, by how many tensors and sizes; None for one, or if not all do.

        The weight is a linear layer's, or a pool's of so many experts.
        """
        if weight not in self._known_apart:
            self._known_apart[weight] = self._parts_of(weight, num_experts)
        return self._known_apart[weight]

    def _parts_of(self, weight: str, num_experts: int | None) -> list[tuple[int, Packed]] | None:
        if self._bits == "int8" or self._source is None or self._kept(weight) is not None:
            return None
        pieces = self._layout[weight]
        matrices = [_of_one(pieces)] if num_experts is None else _of_experts(pieces, num_experts)
        made = [self._parts_of_one(parts) for parts in matrices]
        # In slots, and in a stack, experts are alike.
        forms = {None if each is None else tuple((count, form_of(like)) for count, like in each) for each in made}
        return made[0] if len(forms) == 1 else None

    def _parts_of_one(self, parts: Sequence["_Part"]) -> list[tuple[int, Packed]] | None:
        """`_apart` of a single matrix."""
        found: list[tuple[int, Packed]] = []
        # Neighbours that are alike are one part.
        for kept, group in groupby(parts, lambda part: self._kept_form([part.piece])):
            alike = list(group)
            if kept is None or any(part.index is not None for part in alike):
                return None
            shapes = [self._source.shape(part.piece.name) for part in alike]
            rows = sum(shape[0] for shape in shapes)
            found.append((len(alike), Packed.empty(1, rows, shapes[0][1], *kept, device="meta")))
        return found if can_be_parts([like for _, like in found]) else None

    def _is_mixed(self, weight: str) -> bool:
        pieces, source = self._layout[weight], self._source
        is_whole = not any(piece.change for piece in pieces)
        return isinstance(source, GgufFile) and is_whole and is_mixed(source, [piece.name for piece in pieces])

    def maker(self, name: str, module: Any, bits: Any, group: int | None) -> Callable[[], Quantized]:
        """Makes the layer ``name``, whose sizes are those of ``module``."""
        if isinstance(module, ExpertPool):
            return partial(self._pool, name, self.empty(name, module, bits, group))
        return partial(self._linear, name, self.empty(name, module, bits, group))

    def empty(self, name: str, module: Any, bits: Any, group: int | None) -> Any:
        """The layer without its weights, on the device ``meta``."""
        if isinstance(module, ExpertPool):
            w13, w2 = [
                self._of_pool(f"{name}.{part}", getattr(module, part).shape, bits, group) for part in ("w13", "w2")
            ]
            b13, b2 = [
                None if given is None else torch.empty(given.shape, dtype=self._dtype, device="meta")
                for given in (module.b13, module.b2)
            ]
            return QuantizedPool(w13, w2, b13, b2, activation=module.activation)
        bias = None if module.bias is None else torch.empty(module.bias.shape, dtype=self._dtype, device="meta")
        apart = self._apart(self._weight(name))
        if apart is not None:
            return PartedLinear([like for _, like in apart], bias)
        return QuantizedLinear(self._like(self._weight(name), (1, *module.weight.shape), bits, group), bias)

    def _of_pool(self, weight: str, shape: Sequence[int], bits: Any, group: int | None) -> Matrices:
        """Sizes of the matrices ``[E, N, K]`` of a pool's weight."""
        num, _, depth = shape
        apart = self._apart(weight, num)
        if apart is None:
            return self._like(weight, shape, bits, group)
        form: Form = tuple(part for _, like in apart for part in form_of(like))
        return empty_of(num, depth, form, device="meta")

    def _like(self, weight: str, shape: Sequence[int], bits: Any, group: int | None) -> Packed:
        """Sizes of the matrices ``[E, N, K]`` of a weight: as they are stored where they stay so, else as they are asked for."""
        kept = self._kept(weight)
        kind, size = (bits, group) if kept is None else kept
        if kept is None and self._is_mixed(weight):
            # Rounding what has six bits to four would lose what the file was made to keep.
            kind, size = "int8", SHARE
        num, rows, depth = shape
        return Packed.empty(num, rows, depth, kind, size or depth, device="meta")

    def _kept(self, weight: str) -> tuple[Any, int] | None:
        """(kind, group) of a weight that stays as it is stored; None for another. Looked at once: experts are read over and over."""
        if weight not in self._known:
            self._known[weight] = self._kept_form(self._layout[weight])
        return self._known[weight]

    def _kept_form(self, pieces: Sequence[Piece]) -> tuple[Any, int] | None:
        names, source = [piece.name for piece in pieces], self._source
        if isinstance(source, Unpacked):
            # Their order alone is changed. Eight bits are not what is stored.
            return ("fp4", SHARE) if self._bits != "int8" and set(names) <= set(source.packed) else None
        if any(piece.change for piece in pieces):
            return None
        if isinstance(source, Dequantised) and self._bits != "int8":
            groups = {source.group_of(name) for name in names}
            group = groups.pop()
            return None if groups or group is None else ("int4", group)
        return kept_form(source, names, self._bits or "int4") if isinstance(source, GgufFile) else None

    def _weight(self, name: str) -> str:
        """The stored weight of a linear layer: the embedding's for a head that is one with it."""
        weight = f"{name}.weight"
        return weight if weight in self._layout else "embedding.weight"

    @torch.no_grad()
    def _linear(self, name: str, like: QuantizedLinear | PartedLinear) -> QuantizedLinear | PartedLinear:
        weight = self._weight(name)
        bias = None if like.bias is None else self._read(_of_one(self._layout[f"{name}.bias"]), tuple(like.bias.shape))
        if isinstance(like, QuantizedLinear):
            return QuantizedLinear(self._packed(weight, like.packed, [_of_one(self._layout[weight])]), bias)
        made = []
        for panels, size in self._stored_parts(weight, _of_one(self._layout[weight])):
            made.append(Packed.empty(1, size.rows, size.depth, size.kind, size.group))
            made[-1].data[0] = panels
        return PartedLinear(made, bias)

    def _stored_parts(self, weight: str, parts: Sequence["_Part"]) -> Iterator[tuple[Tensor, Packed]]:
        """(panels, sizes) of each part of a matrix, whose weight is `_apart`."""
        names = iter(part.piece.name for part in parts)
        for count, size in self._known_apart[weight] or ():
            yield self._stored_panels(list(islice(names, count)), size), size

    @torch.no_grad()
    def _pool(self, name: str, like: QuantizedPool) -> QuantizedPool:
        weights = [f"{name}.{part}" for part in ("w13", "w2")]
        w13, w2 = [
            self._packed(weight, packed, _of_experts(self._layout[weight], packed.num_experts))
            for weight, packed in zip(weights, like.packed, strict=True)
        ]
        b13, b2 = [
            None if given is None else self._read(_whole(self._layout[f"{name}.{part}"]), tuple(given.shape))
            for part, given in (("b13", like.b13), ("b2", like.b2))
        ]
        return QuantizedPool(w13, w2, b13, b2, activation=like.activation)

    def _packed(self, weight: str, like: Any, parts: Sequence[Sequence["_Part"]]) -> Any:
        """The matrices of a weight, each put together of its parts."""
        made = empty_of(like.num_experts, like.depth, form_of(like))
        for number, pieces in enumerate(parts):
            made.data[number] = self._panels(weight, like, pieces)
        return made

    @torch.no_grad()
    def _panels(self, weight: str, like: Matrices, parts: Sequence["_Part"]) -> Tensor:
        """The panels of one of the matrices of a weight."""
        if isinstance(like, Parts):
            return torch.cat([panels.flatten() for panels, _ in self._stored_parts(weight, parts)])
        if self._kept(weight) is not None:
            if isinstance(self._source, Unpacked):
                return self._of_stack(parts[0], like)
            return self._stored_panels([part.piece.name for part in parts], like)
        made = Packed.empty(1, like.rows, like.depth, like.kind, like.group)
        made.put(0, self._read(parts, (like.rows, like.depth)))
        return made.data[0]

    def _stored_panels(self, names: Sequence[str], like: Packed) -> Tensor:
        """The panels of a matrix whose rows stay as these tensors are stored."""
        source = self._source
        if isinstance(source, GgufFile):
            return packed_rows(source, names, like)
        number_NK, scale_NG, least_NG = map(torch.cat, zip(*map(source.integers, names), strict=True))
        return Packed.of_integers(number_NK, scale_NG, least_NG, "int4").data[0]

    def _of_stack(self, part: "_Part", like: Packed) -> Tensor:
        """The panels of a matrix of a stack in MXFP4, whose rows may stand in another order than ours."""
        assert part.index is not None, "such tensors are stacks"
        code_NK, scale_NG = self._source.integers(part.piece.name, part.index)
        if part.piece.change is not None:
            # Told by where each goes: columns of the stack as it is shown.
            row_N = part.piece.change.read(torch.arange(len(code_NK)).view(1, 1, -1)).reshape(-1)
            code_NK, scale_NG = code_NK[row_N], scale_NG[row_N]
        return Packed.of_integers(code_NK, scale_NG, None, like.kind).data[0]

    def _read(self, parts: Sequence["_Part"], shape: tuple[int, ...]) -> Tensor:
        """A tensor of ours in the type that weights are rounded to first."""
        if len(parts) == 1 and not parts[0].where:
            return parts[0].read(self._source).to(self._dtype)
        value = torch.empty(shape, dtype=self._dtype)
        for part in parts:
            value[part.where].copy_(part.read(self._source))
        return value


@dataclass(frozen=True)
class _Part:
    """A stored tensor, or one of a stored stack, that is a part of a matrix.

    Attributes:
        piece: the stored tensor.
        where: which part of the matrix.
        index: which of the stack; None for all of the tensor.
    """

    piece: Piece
    where: tuple[int | slice, ...] = ()
    index: int | None = None

    def read(self, source: TensorSource) -> Tensor:
        name = self.piece.name
        # What stands in another order does so in each matrix of a stack.
        return self.piece.read(source.read(name) if self.index is None else source.read_one(name, self.index))


def _whole(pieces: Sequence[Piece]) -> list[_Part]:
    """The parts of a tensor of ours."""
    return [_Part(piece, piece.where) for piece in pieces]


def _of_one(pieces: Sequence[Piece]) -> list[_Part]:
    """The parts of a matrix, from the first row on."""
    return sorted((_Part(piece, piece.where) for piece in pieces), key=_first_row)


def _of_experts(pieces: Sequence[Piece], num_experts: int) -> list[list[_Part]]:
    """The parts of each expert's matrix. A stored tensor is of one expert, or stacked as ours."""
    found: list[list[_Part]] = [[] for _ in range(num_experts)]
    for piece in pieces:
        if piece.where and isinstance(piece.where[0], int):
            found[piece.where[0]].append(_Part(piece, piece.where[1:]))
            continue
        for expert, parts in enumerate(found):
            parts.append(_Part(piece, piece.where[1:], expert))
    return [sorted(parts, key=_first_row) for parts in found]


def _first_row(part: _Part) -> int:
    rows = part.where[0] if part.where else None
    return rows.start or 0 if isinstance(rows, slice) else 0
