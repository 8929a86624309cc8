"""What a rank has of a model: flat weights of its stage's layers, its slice of each with the optimizer's state, snapshots of neighbours.

A step never changes what is there: it makes the next version beside it (`anabranch.cluster.elastic.updating`), so taking a step back is
forgetting it.
"""
# Shapes: N numbers of a layer's parameters

import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.cluster.elastic.links import pack, unpack
from anabranch.cluster.elastic.wire import Body
from anabranch.errors import ConfigError, InputError

__all__ = [
    "Slice",
    "Snapshot",
    "State",
    "apart",
    "check_layers",
    "digest_of",
    "flat_of",
    "install",
    "snapshot_of",
    "together",
    "weights_digest",
]

PARAM = "param"
# Among the scalars: which parameters of a layer the optimizer keeps anything of, where it does of some.
HAS_STATE = "has state"


@dataclass(frozen=True)
class Slice:
    """Numbers ``first`` to ``end`` of one layer.

    Attributes:
        tensors: ``param`` and the optimizer's state of each number, all ``[end - first]``.
        scalars: what the optimizer keeps once, such as its count of steps. One number each while the layer's parameters have all had a part
            in the same steps; else one for each of them, ``[P]``, also for those of which no number is here, with `HAS_STATE` where the
            optimizer has not met all.
    """

    first: int
    end: int
    tensors: dict[str, Tensor]
    scalars: dict[str, Tensor] = field(default_factory=dict)

    def piece(self, first: int, end: int) -> "Slice":
        """A part, as views. Raises InputError for numbers that are not here."""
        if not self.first <= first <= end <= self.end:
            raise InputError(
                f"the slice has the numbers {self.first} to {self.end}, and {first} to {end} are asked for"
            )
        at = slice(first - self.first, end - self.first)
        return Slice(first, end, {name: tensor[at] for name, tensor in self.tensors.items()}, self.scalars)

    @staticmethod
    def joined(first: int, end: int, pieces: Sequence["Slice"]) -> "Slice":
        """One slice of pieces that are all of it. Raises InputError where they are not, or their scalars differ."""
        ordered = sorted(pieces, key=lambda piece: piece.first)
        place = first
        for piece in ordered:
            if piece.first != place or piece.tensors.keys() != ordered[0].tensors.keys():
                raise InputError(f"pieces of the numbers {first} to {end} do not fit together at {place}")
            if any(not torch.equal(piece.scalars[name], value) for name, value in ordered[0].scalars.items()):
                raise InputError(f"pieces of the numbers {first} to {end} are of different steps")
            place = piece.end
        if place != end:
            raise InputError(f"of the numbers {first} to {end} those from {place} on are missing")
        names = ordered[0].tensors
        return Slice(
            first,
            end,
            {name: torch.cat([piece.tensors[name] for piece in ordered]) for name in names},
            {name: value.clone() for name, value in ordered[0].scalars.items()},
        )

    def told(self) -> tuple[list[Any], list[Tensor]]:
        """(JSON-ready names, tensors in their order), for a message."""
        names, scalars = sorted(self.tensors), sorted(self.scalars)
        return [self.first, self.end, names, scalars], [
            *(self.tensors[n] for n in names),
            *(self.scalars[n] for n in scalars),
        ]

    @staticmethod
    def heard(told: Sequence[Any], tensors: Sequence[Tensor]) -> "Slice":
        """What `told` gave."""
        first, end, names, scalars = told
        parts = dict(zip(names, tensors[: len(names)], strict=True))
        rest = dict(zip(scalars, tensors[len(names) :], strict=True))
        return Slice(int(first), int(end), parts, rest)


@dataclass(frozen=True)
class State:
    """One version of what a rank has: ``flat [N]`` of each layer of its stage, and its slices, by layer."""

    flat: dict[int, Tensor]
    slices: dict[int, Slice]

    def digest(self) -> str:
        """Of the slices, to the bit."""
        return digest_of(self.slices, 0)


@dataclass(frozen=True)
class Snapshot:
    """A neighbour's slices, as bytes.

    Attributes:
        version: committed steps.
        layers: (layer, told, spec of tensors) of each slice.
        body: bytes of all.
        digest: as the owner computed it.
    """

    version: int
    layers: tuple[tuple[int, list[Any], list[Any]], ...]
    body: Body
    digest: str

    def slices(self) -> dict[int, Slice]:
        """The slices. Raises InputError where bytes are not those that the owner sent."""
        found, place = {}, 0
        try:
            for layer, told, spec in self.layers:
                size = sum(_size(one) for one in spec)
                found[layer] = Slice.heard(told, unpack(spec, memoryview(self.body)[place : place + size]))
                place += size
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"a snapshot of version {self.version} makes no sense: {error}") from None
        if place != len(self.body) or digest_of(found, self.version) != self.digest:
            raise InputError(f"a snapshot of version {self.version} has another checksum than its owner gave")
        return found


def snapshot_of(slices: Mapping[int, Slice], version: int) -> Snapshot:
    """A copy of slices, with their checksum."""
    layers, bodies = [], []
    for layer in sorted(slices):
        told, tensors = slices[layer].told()
        spec, body = pack(tensors)
        layers.append((layer, told, spec))
        bodies.append(body)
    return Snapshot(version, tuple(layers), b"".join(bodies), digest_of(slices, version))


def _size(spec: Sequence[Any]) -> int:
    name, shape = spec
    count = getattr(torch, name).itemsize
    for size in shape:
        count *= int(size)
    return int(count)


def digest_of(slices: Mapping[int, Slice], version: int) -> str:
    """A checksum of slices, to the bit, of where they are cut, and of the version."""
    found = hashlib.blake2b(struct.pack("<q", version), digest_size=16)
    for layer in sorted(slices):
        told, tensors = slices[layer].told()
        found.update(repr((layer, told)).encode())
        found.update(pack(tensors)[1])
    return found.hexdigest()


def apart(own: Slice, sizes: Sequence[int]) -> list[Slice]:
    """What a slice has of each parameter of its layer, of those without a number here an empty slice with the optimizer's scalars.

    Args:
        sizes: numbers of each of the layer's parameters.

    Raises InputError for a slice that is of other parameters.
    """
    kept = [value for value in own.scalars.values() if value.ndim]
    if own.end > sum(sizes) or any(len(value) != len(sizes) for value in kept):
        raise InputError(
            f"a slice to the number {own.end} with state of {[len(value) for value in kept]} parameters is none of a layer "
            f"with {len(sizes)} of {sum(sizes)} numbers"
        )
    parts, place = [], 0
    for number, size in enumerate(sizes):
        low, high = max(place, own.first), min(place + size, own.end)
        # One that lies elsewhere is empty, and where it is.
        first, end = (low, high) if low < high else (place, place)
        at = slice(low - own.first, high - own.first) if low < high else slice(0, 0)
        has_state = bool(own.scalars[HAS_STATE][number]) if HAS_STATE in own.scalars else True
        tensors = {name: tensor[at] for name, tensor in own.tensors.items() if has_state or name == PARAM}
        scalars = {
            name: value[number] if value.ndim else value
            for name, value in own.scalars.items()
            if has_state and name != HAS_STATE
        }
        parts.append(Slice(first, end, tensors, scalars))
        place += size
    return parts


def together(first: int, end: int, parts: Sequence[Slice]) -> Slice:
    """The slice of which `apart` makes these parts; its scalars are one number each where all parts have the same."""
    names = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    kinds = {name: value for part in parts for name, value in part.scalars.items()}
    have = [len(part.tensors) > 1 or bool(part.scalars) for part in parts]
    tensors = {
        # What is not there yet is never looked at.
        name: torch.cat([part.tensors.get(name, like.new_zeros(part.end - part.first)) for part in parts])
        for name, like in names.items()
    }
    scalars = {
        name: torch.stack([part.scalars.get(name, torch.zeros_like(like)) for part in parts])
        for name, like in kinds.items()
    }
    if all(have) or not any(have):
        if all(torch.equal(value, value[:1].expand_as(value)) for value in scalars.values()):
            scalars = {name: value[0].clone() for name, value in scalars.items()}
    else:
        scalars[HAS_STATE] = torch.tensor(have)
    return Slice(first, end, tensors, scalars)


# Layers as flat tensors


def learning(layer: nn.Module) -> list[nn.Parameter]:
    """Parameters that learn, in order, each once."""
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]


def flat_of(layer: nn.Module) -> Tensor:
    """A copy of a layer's parameters that learn, ``[N]``."""
    parameters = learning(layer)
    return torch.cat([p.detach().reshape(-1) for p in parameters]) if parameters else torch.empty(0)


def install(layer: nn.Module, flat: Tensor) -> None:
    """Make a layer's parameters views of ``flat``."""
    place = 0
    for parameter in learning(layer):
        parameter.data = flat[place : place + parameter.numel()].view(parameter.shape)
        place += parameter.numel()


def gradient_of(layer: nn.Module) -> tuple[Tensor, frozenset[int]]:
    """(``[N]``, with 0 where nothing came; the parameters, by their place, to which nothing did). The layer's own gradients are cleared."""
    parameters = learning(layer)
    if not parameters:
        return torch.empty(0), frozenset()
    without = frozenset(number for number, p in enumerate(parameters) if p.grad is None)
    parts = [
        torch.zeros(p.numel(), dtype=p.dtype) if p.grad is None else p.grad.to_dense().reshape(-1) for p in parameters
    ]
    for parameter in parameters:
        parameter.grad = None
    return torch.cat(parts), without


def check_layers(layers: Sequence[nn.Module]) -> None:
    """Raise ConfigError for layers that cannot be moved one by one: shared parameters, mixed types, running statistics, renormed tables."""
    if not layers:
        raise ConfigError("layers is empty; give the layers of a model, in order")
    homes: dict[int, int] = {}
    for number, layer in enumerate(layers):
        if not isinstance(layer, nn.Module):
            raise ConfigError(f"layer {number} is a {type(layer).__name__}, and layers are torch modules")
        for name, parameter in layer.named_parameters():
            if homes.setdefault(id(parameter), number) != number:
                raise ConfigError(
                    f"layers {homes[id(parameter)]} and {number} share the parameter {name!r}; "
                    "make them one layer, or two parameters: shared ones would come apart when a layer moves"
                )
        if len(types := {parameter.dtype for parameter in learning(layer)}) > 1:
            raise ConfigError(f"layer {number} has parameters of {sorted(map(str, types))}; one type a layer")
        for name, module in layer.named_modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
                raise ConfigError(
                    f"layer {number} has running statistics ({name or type(module).__name__}), which depend on who saw which samples; "
                    "use a norm without them"
                )
            if getattr(module, "max_norm", None) is not None:
                raise ConfigError(
                    f"layer {number} writes into its weights in the forward pass ({name or type(module).__name__} has max_norm), "
                    "so what it learns depends on who saw which samples; leave max_norm out"
                )


def weights_digest(layers: Sequence[nn.Module]) -> str:
    """A hash of what all begin with."""
    found = hashlib.blake2b(digest_size=16)
    for layer in layers:
        flat = flat_of(layer).contiguous()
        found.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return found.hexdigest()
