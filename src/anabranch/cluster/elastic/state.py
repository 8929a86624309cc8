"""What a rank has of a model: flat weights of its stage's layers, its slice of each with the optimizer's state, snapshots of neighbours.

A step never changes what is there: it makes the next version beside it (`Updater.next_slices`), so taking a step back is forgetting it.
"""
# Shapes: N numbers of a layer's parameters

import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.cluster.elastic.links import pack, unpack
from anabranch.cluster.elastic.wire import Body
from anabranch.errors import ConfigError, InputError

__all__ = [
    "OptimizerFactory",
    "Slice",
    "Snapshot",
    "State",
    "Updater",
    "check_layers",
    "digest_of",
    "flat_of",
    "install",
    "snapshot_of",
    "weights_digest",
]

# Of parameters; or, where runs of numbers learn otherwise, of groups of them, as torch's optimizers take both.
OptimizerFactory = Callable[[list[Any]], torch.optim.Optimizer]
# By layer, (first, end, options of the optimizer's group) of runs of its numbers that learn alike.
Groups = Mapping[int, Sequence[tuple[int, int, dict[str, Any]]]]
PARAM = "param"


@dataclass(frozen=True)
class Slice:
    """Numbers ``first`` to ``end`` of one layer.

    Attributes:
        tensors: ``param`` and the optimizer's state of each number, all ``[end - first]``.
        scalars: what the optimizer keeps once, such as its count of steps.
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


class Updater:
    """Steps an optimizer on slices, without changing them.

    Args:
        factory: makes the optimizer of a list of flat parameters, or of groups of them where there are ``groups``. It must treat each
            number by itself (SGD, Adam, AdamW, RMSprop, ... do), or slices would not be the whole.
        learning_rate: factor of the factory's learning rate, by committed steps; default 1.
        groups: runs of numbers with options of their own, such as a weight decay; a layer that is not there has none.

    Raises ConfigError for an optimizer that gives slices other results than the whole.
    """

    def __init__(
        self,
        factory: OptimizerFactory,
        learning_rate: Callable[[int], float] | None = None,
        groups: Groups | None = None,
    ) -> None:
        self._factory, self._learning_rate = factory, learning_rate
        self._groups: Groups = {}
        self._check()
        self._groups = groups or {}

    def next_slices(
        self,
        slices: Mapping[int, Slice],
        gradients: Mapping[int, Tensor],
        version: int,
        *,
        layers: Mapping[int, int] | None = None,
    ) -> dict[int, Slice]:
        """The slices after one more step.

        Args:
            slices: by layer; or by any number, where ``layers`` says of what layer each is.
            gradients: likewise, of each slice.
            version: committed steps.
        """
        if not slices:
            return {}
        runs = {key: self._runs(key if layers is None else layers[key], own) for key, own in sorted(slices.items())}
        parameters: dict[int, list[nn.Parameter]] = {}
        made: list[dict[str, Any]] = []
        for key, cut in runs.items():
            own = slices[key]
            parts = [own.piece(first, end) for first, end, _ in cut]
            parameters[key] = [nn.Parameter(part.tensors[PARAM].clone()) for part in parts]
            made += [{"params": [one], **options} for one, (_, _, options) in zip(parameters[key], cut, strict=True)]
        # Where nothing learns otherwise they are parameters, as a plain function takes them.
        plain = [one for group in made for one in group["params"]]
        optimizer = self._factory(made if self._groups else plain)
        for key, cut in runs.items():
            own = slices[key]
            for parameter, (first, end, _) in zip(parameters[key], cut, strict=True):
                part = own.piece(first, end)
                state = {
                    name: value.clone() for name, value in {**part.tensors, **own.scalars}.items() if name != PARAM
                }
                if state:
                    optimizer.state[parameter] = state
                parameter.grad = gradients[key][first - own.first : end - own.first].to(parameter.dtype)
        if self._learning_rate is not None:
            for group in optimizer.param_groups:
                # Not in place: a rate may be a tensor, which the factory gives each time.
                group["lr"] = group["lr"] * self._learning_rate(version)
        optimizer.step()
        return {
            key: Slice.joined(
                own.first,
                own.end,
                [
                    self._after(first, end, parameter, optimizer)
                    for parameter, (first, end, _) in zip(parameters[key], runs[key], strict=True)
                ],
            )
            for key, own in sorted(slices.items())
        }

    def _runs(self, layer: int, own: Slice) -> list[tuple[int, int, dict[str, Any]]]:
        """A slice's numbers that learn alike."""
        groups = self._groups.get(layer, ((0, own.end, {}),))
        cut = ((max(first, own.first), min(end, own.end), options) for first, end, options in groups)
        # An empty slice is one run.
        return [run for run in cut if run[0] < run[1]] or [(own.first, own.end, {})]

    def _after(self, first: int, end: int, parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> Slice:
        tensors, scalars = {PARAM: parameter.detach()}, {}
        for name, value in optimizer.state[parameter].items():
            kept = value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)
            if kept.shape == parameter.shape and kept.ndim == 1:
                tensors[name] = kept
            elif kept.ndim == 0:
                scalars[name] = kept
            elif value is not None:
                raise ConfigError(
                    f"{type(optimizer).__name__} keeps {name!r} of shape {list(kept.shape)} for {list(parameter.shape)} numbers; "
                    "an optimizer of slices must treat each number by itself"
                )
        return Slice(first, end, tensors, scalars)

    def _check(self) -> None:
        """Two steps on seven numbers, whole and in two slices."""
        generator = torch.Generator().manual_seed(0)
        value, *gradients = (torch.randn(7, generator=generator) for _ in range(3))
        whole, cut = (
            {0: Slice(0, 7, {PARAM: value})},
            {0: Slice(0, 3, {PARAM: value[:3]}), 1: Slice(3, 7, {PARAM: value[3:]})},
        )
        try:
            for gradient in gradients:
                whole = self.next_slices(whole, {0: gradient}, 0)
                cut = self.next_slices(cut, {0: gradient[:3], 1: gradient[3:]}, 0)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                f"optimizer_factory does not make an optimizer of a flat slice: {type(error).__name__}: {error}"
            ) from error
        joined = torch.cat([cut[0].tensors[PARAM], cut[1].tensors[PARAM]])
        if not torch.equal(whole[0].tensors[PARAM], joined):
            raise ConfigError(
                "optimizer_factory makes an optimizer that does not treat each number by itself, so slices are not the whole"
            )


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


def gradient_of(layer: nn.Module) -> Tensor:
    """``[N]``, with 0 where nothing came; the layer's own gradients are cleared."""
    parameters = learning(layer)
    if not parameters:
        return torch.empty(0)
    parts = [torch.zeros(p.numel(), dtype=p.dtype) if p.grad is None else p.grad.reshape(-1) for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return torch.cat(parts)


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
