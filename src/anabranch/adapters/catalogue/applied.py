"""`apply`: a method of the catalogue put onto a model of ours, in place, and off again; merged, saved and loaded by itself.

    applied = apply(model, "shira", rank=4, targets=("q", "v"))
    ...                                     # train: only what the method says learns
    applied.save("my-shira")
    load_applied("my-shira", another_model)
    applied.merge()

What stands beside matrices does so by the linear seam: the model's config says it, and the whole model saves, loads, trains as any other.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.adapters.around import around_config, put_around, take_around
from anabranch.adapters.catalogue.card import Card
from anabranch.adapters.catalogue.cost import estimate, settings
from anabranch.adapters.catalogue.shape import Shape
from anabranch.adapters.catalogue.table import CARDS, find
from anabranch.adapters.graft import check_decoder, layers_of, patterns_of
from anabranch.adapters.ladder import LADDERED
from anabranch.adapters.put_on import added_names, put_on, take_off
from anabranch.adapters.sparse_bottleneck import SparseBottleneck, settle
from anabranch.adapters.sparse_delta import SparseDelta
from anabranch.adapters.taking_in import take_in
from anabranch.bounds import shown
from anabranch.config import to_dict
from anabranch.errors import CheckpointError, ConfigError
from anabranch.files import atomic_folder, atomic_write_json, read_json
from anabranch.lm.decoder import Decoder
from anabranch.lm.shards import write_file
from anabranch.lm.tensors import SafetensorsFiles, build_empty, some
from anabranch.nn.quantize import FewBitLinear, PackedEmbedding, QuantizedPool

__all__ = ["TABLE", "WEIGHTS", "Applied", "apply", "load_applied"]

TABLE, WEIGHTS = "catalogue_adapter.json", "catalogue_adapter.safetensors"


@dataclass(eq=False)
class Applied:
    """A method on a model.

    Attributes:
        model: that has it.
        card: the method.
        options: what was set.
        matched: linear layers that are adapted, or whose parameters learn.
        skipped: the others.
        trainable: names of the parameters that learn.
    """

    model: Decoder
    card: Card
    options: Mapping[str, Any]
    matched: tuple[str, ...]
    skipped: tuple[str, ...]
    trainable: tuple[str, ...]
    _before: dict[str, bool]
    _config: Decoder.Config
    _base: dict[str, Tensor]
    _held: frozenset[str]

    @property
    def num_trainable(self) -> int:
        """Numbers that learn."""
        return sum(parameter.numel() for parameter in self._learning())

    def _learning(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def state(self) -> dict[str, Tensor]:
        """What the method has made of the model, by the model's names: layers beside it, or the parameters of the base that learn and its
        buffers, such as biases of routers, which move in a training too."""
        return {name: value for name, value in _state(self.model).items() if name in self._held}

    def merge(self) -> Decoder:
        """Add what was learned to the matrices, take the layers off, and return the model, which is a plain one.

        Raises ConfigError for a method that cannot be merged, a matrix that is stored in few bits, and one whose type cannot hold the sum;
        the model is as it was then.
        """
        if self.card.merges == "per task":
            raise ConfigError(
                f"{self.card.id} is another adapter for each task, and matrices can hold one; leave it beside"
            )
        if self.card.merges == "no":
            raise ConfigError(
                f"{self.card.id} cannot be merged: {self.card.limits or 'no matrix computes what it does'}"
            )
        take_in(self.model)
        self._take_off(keeps_base=True)
        return self.model

    def remove(self) -> Decoder:
        """Take it off: the model is what it was before `apply`.

        Raises ConfigError for a method that trained the model's own matrices, of which nobody has kept a copy.
        """
        if self.card.trains_base and not self.card.trains_little:
            raise ConfigError(
                f"{self.card.id} trains the model's own matrices; load the model again to have it as it was"
            )
        self._take_off(keeps_base=False)
        return self.model

    def _take_off(self, *, keeps_base: bool) -> None:
        if self.card.front is not None or self.card.ladder is not None:
            take_around(self.model)
        if layers_of(self.model):
            take_off(self.model)
        named, state = _named(self.model), _state(self.model)
        with torch.no_grad():
            for name, value in ({} if keeps_base else self._base).items():
                state[name].copy_(value)
        for name, learned in self._before.items():
            named[name].requires_grad_(learned)

    def save(self, folder: str | Path) -> None:
        """Write it into a folder, all or nothing; `load_applied` puts it onto a model like this one.

        Raises DataError for a folder that holds something else, CapacityError for a full disk.
        """
        replaced = f"{TABLE}|{WEIGHTS}" if (Path(folder) / TABLE).exists() else ""
        table = {
            "method": self.card.id,
            "options": {
                name: list(value) if isinstance(value, tuple) else value for name, value in self.options.items()
            },
            "base": _fingerprint(self._config),
        }
        with atomic_folder(folder, replacing=replaced) as temporary:
            atomic_write_json(temporary / TABLE, table)
            write_file(temporary / WEIGHTS, {name: value.contiguous() for name, value in self.state().items()})


def apply(model: Decoder, id: str, *, seed: int = 0, **options: Any) -> Applied:
    """Put a method onto ``model``, in place: nothing but what it says learns from then on.

    Args:
        model: without adapters.
        id: of a card whose backend is ``own``; those of ``peft`` are put on by `put_by_peft`.
        seed: of what is drawn.
        options: of the card, such as ``rank`` and ``targets``.

    Raises ConfigError: no such method or option, a method that nobody runs here or that is another backend's, targets that name nothing,
    a model that has layers beside its matrices already, and a method that would train nothing on it.
    """
    card = find(id)
    if card.backend != "own":
        way = (
            "put_by_peft puts it on, apply_peft onto a model of transformers"
            if card.backend == "peft"
            else "its card tells what it is"
        )
        raise ConfigError(f"{card.id} is not one of our own methods; {way}")
    check_decoder(model)
    if model.config.linears:
        raise ConfigError(f"linears of the model has {next(iter(model.config.linears))!r} already; take that off first")
    shape = Shape.of(model.config)
    found = estimate(card, shape, options)
    chosen = [matrix for matrix in shape.matrices if matrix.part in set(found.matched)]
    before = {name: parameter.requires_grad for name, parameter in _named(model).items()}
    config = model.config
    if card.trains_base:
        learns = {name for name in before if card.trains(name)}
        _check_all_learn(model, card, learns)
        held = learns | _moving(model)
    else:
        parts = [matrix.part for matrix in shape.matrices]
        make = card.layer
        layers = {} if make is None else {matrix.part: make(matrix, shape, found.options) for matrix in chosen}
        front = None if card.front is None else card.front(shape, found.options)
        ladder = None if card.ladder is None else card.ladder(shape, found.options)
        # What the model cannot have is told while it has nothing.
        around_config(model.config, front, ladder)
        if layers:
            put_on(model, patterns_of(layers, parts), seed=seed)
        put_around(model, front=front, ladder=ladder, seed=seed)
        held = {name.replace(LADDERED, ".") for name in added_names(model)}
        learns = {name for name in held if card.learns(name)}
    for name, parameter in _named(model).items():
        parameter.requires_grad_(name in learns)
    kept = held if card.trains_little else ()
    base = {name: value.detach().clone() for name, value in _state(model).items() if name in kept}
    trainable = tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    told = (found.options, found.matched, found.skipped, trainable)
    return Applied(model, card, *told, before, config, base, frozenset(held))


def load_applied(folder: str | Path, model: Decoder) -> Applied:
    """Put what `Applied.save` wrote onto ``model``, in place.

    Raises CheckpointError: no such folder, a damaged one, one of another base, or NaN in it; ConfigError as `apply`.
    """
    check_decoder(model)
    place = Path(folder)
    if not (place / TABLE).is_file():
        raise CheckpointError(f"no adapter of the catalogue at {place}: it holds no {TABLE}")
    table = read_json(place / TABLE)
    method, options = table.get("method"), table.get("options")
    if not isinstance(method, str) or method not in CARDS or not isinstance(options, dict):
        raise CheckpointError(
            f"{place / TABLE} names method {shown(method)}, of which there is no card, or has no options"
        )
    if table.get("base") != _fingerprint(model.config):
        raise CheckpointError(f"{place} is of another base: a model of other sizes or parts than this one")
    source = SafetensorsFiles([place / WEIGHTS])
    held = {name: source.read(name).clone() for name in source.names}
    wrong = [name for name, value in held.items() if value.is_floating_point() and not value.isfinite().all()]
    if wrong:
        raise CheckpointError(f"{place / WEIGHTS} holds NaN or infinity in {some(wrong)}")
    made = settings(find(method), options)
    # A few words may ask for any number of numbers; the file has them.
    asked = estimate(find(method), Shape.of(model.config), made).trainable
    if asked > sum(value.numel() for value in held.values()):
        raise CheckpointError(f"{place / WEIGHTS} does not hold the {asked} numbers that its options say")
    applied = apply(model, method, **made)
    state = applied.state()
    # Of a version in which single numbers had no axis.
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    held = {
        name: value.reshape(1) if value.ndim == 0 and shapes.get(name) == (1,) else value
        for name, value in held.items()
    }
    if {name: tuple(value.shape) for name, value in held.items()} != shapes:
        _drop(applied)
        odd = sorted(shapes.keys() ^ held.keys()) or [
            name for name in shapes if tuple(held[name].shape) != shapes[name]
        ]
        raise CheckpointError(f"{place / WEIGHTS} does not hold what its options say in this version: {some(odd)}")
    try:
        _check_places(applied, held, place / WEIGHTS)
    except CheckpointError:
        _drop(applied)
        raise
    with torch.no_grad():
        for name, value in held.items():
            state[name].copy_(value)
    settle(model)
    return applied


def _named(model: Decoder) -> dict[str, nn.Parameter]:
    """The parameters by the names that they have without a ladder, which may be put along the model, or taken off, meanwhile."""
    return {name.replace(LADDERED, "."): parameter for name, parameter in model.named_parameters()}


def _state(model: Decoder) -> dict[str, Tensor]:
    """Parameters and buffers by these names."""
    return {name.replace(LADDERED, "."): value for name, value in model.state_dict().items()}


def _drop(applied: Applied) -> None:
    """Take off what was just put on and has changed nothing."""
    applied._take_off(keeps_base=True)


def _check_places(applied: Applied, held: Mapping[str, Tensor], path: Path) -> None:
    """Raise CheckpointError for places of entries that a matrix has not, or has twice."""
    for part, layer in layers_of(applied.model).items():
        if isinstance(layer, SparseDelta | SparseBottleneck):
            name = next(name for name, value in applied.state().items() if value.data_ptr() == layer.index.data_ptr())
            index_K = held[name]
            is_in = index_K.dtype == torch.int64 and 0 <= int(index_K.min()) and int(index_K.max()) < layer.num_weights
            if not is_in or bool((index_K.diff() <= 0).any()):
                raise CheckpointError(f"{path} names places of {part} that the matrix has not, or not in order")


def _fingerprint(config: Decoder.Config) -> str:
    """What an adapter's base must be like; the same for all models of these sizes and parts."""
    told = to_dict(config.replace(linears={}))
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _check_all_learn(model: Decoder, card: Card, learns: Collection[str]) -> None:
    """Raise ConfigError where some of what a method trains is kept in few bits, or beside such a matrix, and cannot learn."""
    wanted = {name: one.numel() for name, one in build_empty(model.config).named_parameters() if card.trains(name)}
    lacking = [name for name in wanted if name not in learns]
    if lacking:
        number, total = sum(wanted[name] for name in lacking), sum(wanted.values())
        what = "would train nothing" if number == total else f"would train {total - number:,} of its {total:,} numbers"
        raise ConfigError(
            f"{card.id} {what}: matrices of this model are in few bits, in which neither they nor their biases learn ({some(lacking)}); "
            "take the model as it was before it was quantized, or a method whose layers stand beside it, such as lora"
        )


def _moving(model: Decoder) -> set[str]:
    """Buffers of the base that a training may move, such as biases of routers: those that are saved with it, but matrices in few bits."""
    saved = model.state_dict().keys()
    packed = {
        f"{place}.{name}"
        for place, module in model.named_modules()
        if isinstance(module, FewBitLinear | PackedEmbedding | QuantizedPool)
        for name, _ in module.named_buffers(recurse=False)
    }
    return {name.replace(LADDERED, ".") for name, _ in model.named_buffers() if name in saved and name not in packed}
