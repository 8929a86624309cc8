"""`load_peft`: an adapter of peft's onto a model of ours, in place, and back: taken off, merged, saved.

    model, tokenizer = load_model("SmolLM2-135M")
    load_peft("my-lora", model)             # the model now computes what peft's does
    merge(model)                            # its matrices hold the adapter, and it runs as quickly as before
    unmerge(model)
    save_peft("copy", model)
    unload(model)                           # the base again

The adapter stands beside matrices by the linear seam, so a model with one is a plain `Decoder` whose config names its `LowRank` layers.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.adapters.fits import check_fits
from anabranch.adapters.graft import check_pools, graft, layers_of, strip, with_layers
from anabranch.adapters.low_rank import LowRank, Pair, scale_of
from anabranch.adapters.names import Names, Place, names_of
from anabranch.adapters.peft_folder import Adapter, described, read_peft, write_peft
from anabranch.adapters.routed import RoutedLowRank, chosen_rows
from anabranch.adapters.stacked import Stack, expanded
from anabranch.errors import CheckpointError, ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.lm.tensors import build_empty, some
from anabranch.nn import Linear

__all__ = ["adapter_of", "load_peft", "load_pool", "merge", "rows_for", "save_peft", "unload", "unmerge"]

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# How a model remembers what was put onto it.
_ATTACHED = "_attached_adapter"
# In which weights of rows are multiplied.
_GREATEST = torch.finfo(torch.float32).max


@dataclass(eq=False)
class _Attached:
    """What was put onto a model.

    Attributes:
        adapters: as they were read, by name; several share a pool.
        names: of the model's layers.
        config: of the model before.
        before: what stood where the adapter's whole tensors are now, by the names of transformers.
        learned: which parameters of the base learned before.
        head: of the model before.
        merged: the adapter as it was added to the matrices; None where it stands beside them.
        is_pool: whether rows choose from the adapters, be it one.
        trainable: whether the adapter learns while it stands beside.
    """

    adapters: Mapping[str, Adapter]
    names: Names
    config: Decoder.Config
    before: dict[str, Tensor] = field(default_factory=dict)
    learned: list[str] = field(default_factory=list)
    head: Any = None
    merged: Adapter | None = None
    is_pool: bool = False
    trainable: bool = False

    @property
    def adapter(self) -> Adapter:
        """The one that there is for all rows. Raises ConfigError for a pool."""
        if self.is_pool:
            many = f"{len(self.adapters)} adapters" if len(self.adapters) > 1 else "a pool of one adapter"
            ways = "combine makes one of them" if len(self.adapters) > 1 else "load_peft puts it on for all"
            raise ConfigError(f"the model has {many} ({', '.join(self.adapters)}), for rows to choose from; {ways}")
        return next(iter(self.adapters.values()))


def load_peft(folder: str | Path, model: Decoder, *, family: str | None = None, trainable: bool = False) -> Decoder:
    """Put the LoRA adapter in a folder of peft's onto ``model``, in place, and return the model.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        model: whose layers a family of Hugging Face's has; it may be quantised.
        family: the ``model_type`` that the adapter was made with, where several could be the model's.
        trainable: whether the adapter learns. The base does not.

    Raises:
        CheckpointError: as `read_peft`, or the adapter is of another model: it has layers that this one lacks or widths that do not fit,
            or lacks layers that its config names.
        ConfigError: the model has an adapter, or other ``linears``, already; ``trainable`` for one that has dropout, brings whole tensors
            or adapts stacked experts, which do not learn here.
    """
    adapter = read_peft(folder)
    _check_bare(model)
    unties = model.config.tie_embeddings and _parts_head(adapter)
    config = model.config.replace(tie_embeddings=False) if unties else model.config
    names = names_of(config, adapter.pairs, family)
    check_fits(adapter, names, config, Path(folder))
    if trainable:
        _check_learns(adapter, folder)
    pairs = _ours(names, adapter, config)
    made = with_layers(config, _configs(pairs), names.parts)
    check_pools(model, made)
    for name in adapter.saved:
        # A head that is the embedding still becomes one of its own.
        if name != _HEAD or model.head is not None:
            _tensor(model, names.tensors[name].tensor)
    attached = _begin(model, {"default": adapter}, names, config)
    for name, tensor in adapter.saved.items():
        attached.before[name] = _exchange(model, names, name, tensor)
    attached.trainable = trainable
    _put_on(model, made, pairs, trainable=trainable)
    return model


def load_pool(folders: Mapping[str, str | Path], model: Decoder, *, family: str | None = None) -> Decoder:
    """Put several adapters onto ``model``, in place, of which each row of a batch uses those that `rows_for` says; and return the model.

    They share a `LowRankPool` beside each matrix: one grouped product for all rows. Rows that are told nothing get the base. Ranks, scales
    and layers may differ.

    Args:
        folders: of peft's, by the names that rows are told with.
        model: as for `load_peft`.
        family: likewise.

    Raises as `load_peft`; ConfigError also for no folder, and for adapters that bring whole tensors, which all rows would get.
    """
    if not folders:
        raise ConfigError("there is no adapter to put on; give at least one folder")
    adapters = {name: read_peft(folder) for name, folder in folders.items()}
    _check_bare(model)
    for name, adapter in adapters.items():
        if adapter.saved:
            raise ConfigError(
                f"adapter {name!r} brings {next(iter(adapter.saved))} whole, which all rows would get; load it alone, with load_peft"
            )
    unties = model.config.tie_embeddings and any(map(_parts_head, adapters.values()))
    config = model.config.replace(tie_embeddings=False) if unties else model.config
    modules = list(dict.fromkeys(module for adapter in adapters.values() for module in adapter.pairs))
    names = names_of(config, modules, family)
    for name, adapter in adapters.items():
        check_fits(adapter, names, config, Path(folders[name]))
    own = [_ours(names, adapter, config) for adapter in adapters.values()]
    pairs = {part: [one.get(part) for one in own] for part in dict.fromkeys(part for one in own for part in one)}
    made = with_layers(config, {part: RoutedLowRank.config_of(own) for part, own in pairs.items()}, names.parts)
    check_pools(model, made)
    _begin(model, adapters, names, config).is_pool = True
    device = model.embedding.weight.device
    graft(model, made, lambda part, layer: layer.put(pairs[part], device))
    return model


def rows_for(model: Decoder, rows: Sequence[str | Mapping[str, float] | None], length: int) -> dict[str, Tensor]:
    """The ``state`` of a forward pass whose rows use these adapters of `load_pool`.

    Args:
        model: with the adapters.
        rows: for each row a name, names with weights (a mixture), or None for the base.
        length: L of the pass.

    Raises ConfigError for a name that there is not, a model without a pool, and a weight that is not finite, be it only once it is
    multiplied by the scale of its adapter: what is not finite in one row can end the pass of all.
    """
    attached = _attached(model)
    if not attached.is_pool:
        raise ConfigError("the model has an adapter of load_peft, which all rows get; load_pool lets them choose")
    known = list(attached.adapters)
    told = [{row: 1.0} if isinstance(row, str) else dict(row or {}) for row in rows]
    unknown = [name for row in told for name in row if name not in known]
    if unknown:
        raise ConfigError(f"adapter {unknown[0]!r} is not on the model; there are {', '.join(map(repr, known))}")
    _check_weights(attached.adapters, told)
    most = max([1, *map(len, told)])
    index_BK = torch.tensor([[*map(known.index, row), *[-1] * (most - len(row))] for row in told]).view(-1, most)
    weight_BK = torch.tensor([[*row.values(), *[0.0] * (most - len(row))] for row in told]).view(-1, most)
    device = model.embedding.weight.device
    return chosen_rows(index_BK.to(device), length, weight_BK.to(device))


def _check_weights(adapters: Mapping[str, Adapter], told: Sequence[Mapping[str, float]]) -> None:
    """Raise ConfigError for a weight that is none in float32, alone or times a scale."""
    scales = {
        name: max([1.0, *(abs(scale_of(one.rank, one.alpha, one.rslora)) for one in _parts_of(adapters[name]))])
        for name in {name for row in told for name in row}
    }
    for number, row in enumerate(told):
        for name, weight in row.items():
            # A NaN is not less.
            if not abs(weight) * scales[name] <= _GREATEST:
                raise ConfigError(
                    f"row {number} has weight {weight} for adapter {name!r}, whose greatest scale is {scales[name]:g}; their product must "
                    f"be a number of at most {_GREATEST:.3g}"
                )


def _parts_of(adapter: Adapter) -> list[Pair | Stack]:
    return [*adapter.pairs.values(), *adapter.stacks.values()]


def adapter_of(model: Decoder) -> Adapter:
    """The adapter on ``model``, with its numbers as they are now. Raises ConfigError where there is none."""
    attached = _attached(model)
    only = attached.adapter
    if attached.merged is not None:
        return attached.merged
    found = {name: layer.pair() for name, layer in layers_of(model).items()}
    places = attached.names.places
    pairs = {module: places[module].theirs(found[places[module].part]) for module in only.pairs}
    # What is stacked does not learn.
    return Adapter(only.table, pairs, _saved(model, attached), only.stacks)


def save_peft(folder: str | Path, model: Decoder, *, family: str | None = None) -> None:
    """Write the adapter on ``model`` into a folder that peft reads; what its config said besides, known to us or not, is kept.

    Args:
        folder: not there, empty, or with an adapter and nothing else, which is replaced.
        model: one that `load_peft` was given, or that was built or loaded with `LowRank` layers.
        family: the ``model_type`` whose names are written, where the model has its layers not from `load_peft`.

    Raises:
        ConfigError: the model has no adapter, or one config cannot say what it has.
        CheckpointError: no family of Hugging Face's has such a model.
        DataError, CapacityError: as `write_peft`.
    """
    if getattr(model, _ATTACHED, None) is not None:
        write_peft(folder, adapter_of(model))
        return
    layers = {part: layer for part, layer in layers_of(model).items() if isinstance(layer, LowRank)}
    if not layers:
        raise ConfigError("the model has no adapter to save; put one onto it with load_peft")
    others = [kind for kind in model.config.linears.values() if not isinstance(kind, LowRank.Config)]
    if others:
        raise ConfigError(f"linears of the model has {others[0].owner.kind!r} too, which peft's LoRA has not")
    names = names_of(model.config.replace(linears={}), (), family)
    modules = {place.part: module for module, place in names.places.items()}
    homeless = [part for part in layers if part not in modules]
    if homeless:
        raise CheckpointError(f"Hugging Face's {names.family} has no linear layer for {some(homeless)}")
    pairs = {modules[part]: names.places[modules[part]].theirs(layer.pair()) for part, layer in layers.items()}
    usual = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "bias": "none",
        "inference_mode": True,
        "lora_dropout": 0.0,
    }
    try:
        table = described(usual, pairs)
    except ValueError as error:
        raise ConfigError(f"one adapter_config.json cannot say that {error}") from None
    write_peft(folder, Adapter(table, pairs))


@torch.no_grad()
def unload(model: Decoder) -> Decoder:
    """Take the adapter off, in place: the model computes what it did before `load_peft`.

    Raises ConfigError where there is none, or a matrix that must be given back is stored in few bits by now; the model is as it was then.
    """
    attached = _attached(model)
    # Nothing is taken off where one of them cannot be given back.
    for name in attached.before:
        _tensor(model, attached.names.tensors[name].tensor)
    if attached.merged is not None:
        unmerge(model)
    strip(model)
    for name, tensor in attached.before.items():
        _exchange(model, attached.names, name, tensor)
    model.head, model.config = attached.head, attached.config
    for name in attached.learned:
        model.get_parameter(name).requires_grad_(True)
    object.__delattr__(model, _ATTACHED)
    return model


@torch.no_grad()
def merge(model: Decoder) -> Decoder:
    """Add the adapter to the matrices that it stands beside, in place, in the types that they have; the layers beside them go.

    The model then runs, converts and saves as one that never had an adapter; `unmerge` takes the numbers out again, to the rounding of
    the matrices' type.

    What is added and taken out is rounded each time, relative to the greater of matrix and adapter: an adapter that is far greater than
    the matrices leaves little of them.

    Raises ConfigError where there is no adapter, it is merged already, a matrix is stored in few bits, or its type cannot hold the sum.
    """
    attached = _attached(model)
    if attached.merged is not None:
        raise ConfigError("the adapter is merged already")
    adapter = adapter_of(model)
    pairs = _ours(attached.names, adapter, model.config)
    _check_parts(model, attached.names, pairs)
    for part, pair in pairs.items():
        place = attached.names.of_part(part)
        found = _sum(model, place, pair.delta())
        if not found.isfinite().all():
            kind = str(found.dtype).removeprefix("torch.")
            raise ConfigError(
                f"{place.tensor} with the adapter in it has numbers that {kind} cannot hold; leave it beside, or load the model in float32"
            )
    strip(model)
    for part, pair in pairs.items():
        _add(model, attached.names.of_part(part), pair.delta())
    attached.merged = adapter
    return model


@torch.no_grad()
def unmerge(model: Decoder) -> Decoder:
    """Take what `merge` added out of the matrices, and put the adapter beside them again.

    Raises ConfigError where there is no adapter, it is not merged, or a matrix is stored in few bits by now; the model is as it was then.
    """
    attached = _attached(model)
    if attached.merged is None:
        raise ConfigError("the adapter is not merged")
    names = attached.names
    pairs = _ours(names, attached.merged, model.config)
    _check_parts(model, names, pairs)
    made = with_layers(model.config, _configs(pairs), names.parts)
    check_pools(model, made)
    for part, pair in pairs.items():
        _add(model, names.of_part(part), -pair.delta())
    _put_on(model, made, pairs, trainable=attached.trainable)
    attached.merged = None
    return model


def _check_learns(adapter: Adapter, folder: str | Path) -> None:
    """Raise ConfigError for what peft trains otherwise than we do: another training would be got than the config says."""
    if adapter.stacks:
        raise ConfigError(
            f"{folder} adapts experts that are stacked, whose gate and up share a matrix; such an adapter cannot learn here"
        )
    if adapter.table.get("lora_dropout"):
        raise ConfigError(
            f"{folder} says lora_dropout {adapter.table['lora_dropout']!r}, and adapters learn without dropout here; say 0 in its "
            "adapter_config.json to train it so"
        )
    if adapter.saved:
        raise ConfigError(
            f"{folder} brings {next(iter(adapter.saved))} whole, which does not learn here, as it does in peft; leave out trainable, or "
            "train an adapter of linear layers alone"
        )


def _attached(model: Decoder) -> _Attached:
    attached = getattr(model, _ATTACHED, None)
    if attached is None:
        raise ConfigError("the model has no adapter that load_peft put onto it")
    return attached


def _begin(model: Decoder, adapters: Mapping[str, Adapter], names: Names, config: Decoder.Config) -> _Attached:
    """Note what the model is, freeze it, and give it the head of its own that ``config`` may say."""
    attached = _Attached(adapters, names, model.config, head=model.head)
    attached.learned = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    if model.config.tie_embeddings and not config.tie_embeddings:
        _part_head(model, config)
    object.__setattr__(model, _ATTACHED, attached)
    return attached


def _ours(names: Names, adapter: Adapter, config: Decoder.Config) -> dict[str, Pair]:
    """The pairs by our parts, with rows in our order; those of stacked experts one by one."""
    own = {names.places[module].part: names.places[module].ours(pair) for module, pair in adapter.pairs.items()}
    return own | expanded(adapter.stacks, config, "the adapter")


def _configs(pairs: Mapping[str, Pair]) -> dict[str, Linear.Config]:
    return {
        part: LowRank.Config(rank=pair.rank, alpha=float(pair.alpha), rslora=pair.rslora)
        for part, pair in pairs.items()
    }


def _put_on(model: Decoder, made: Decoder, pairs: Mapping[str, Pair], *, trainable: bool = False) -> None:
    device = model.embedding.weight.device
    graft(model, made, lambda part, layer: layer.put(pairs[part], device, trainable=trainable))


def _check_bare(model: Decoder) -> None:
    """Raise ConfigError where something stands beside, or instead of, matrices of the model already."""
    if getattr(model, _ATTACHED, None) is not None:
        raise ConfigError("the model has an adapter already; unload it first, or make one adapter of both (combine)")
    if model.config.linears:
        first = next(iter(model.config.linears))
        raise ConfigError(
            f"linears of the model has {first!r} already, and an adapter is put onto plain matrices alone"
        )


def _parts_head(adapter: Adapter) -> bool:
    """Whether head and embedding, one matrix so far, are two with this adapter."""
    return bool({_HEAD, _EMBEDDING} & adapter.saved.keys()) or "lm_head" in adapter.pairs


@torch.no_grad()
def _part_head(model: Decoder, config: Decoder.Config) -> None:
    """Give a model whose head is its embedding a head of its own, with the same numbers."""
    if model.head is None:
        model.head = build_empty(config).head
        model.head.weight = nn.Parameter(model.embedding.weight.detach().clone(), requires_grad=False)
    model.config = config


def _tensor(model: Decoder, name: str) -> Tensor:
    """One of our tensors by its name in a model without adapters. Raises ConfigError where it is stored in few bits."""
    state = model.state_dict(keep_vars=True)
    owner, _, leaf = name.rpartition(".")
    found = state.get(name, state.get(f"{owner}.matrix.{leaf}"))
    if found is None or not found.is_floating_point():
        raise ConfigError(f"{name} is stored in few bits, which cannot be added to; dequantise the model first")
    return found


@torch.no_grad()
def _exchange(model: Decoder, names: Names, name: str, tensor: Tensor) -> Tensor:
    """Put ``tensor`` in the place that transformers calls ``name``, and return what was there."""
    stored = names.tensors[name]
    piece, target = stored.piece, _tensor(model, stored.tensor)
    before = piece.write(target).detach().clone()
    target[piece.where].copy_(piece.read(tensor))
    return before


def _saved(model: Decoder, attached: _Attached) -> dict[str, Tensor]:
    """The adapter's whole tensors as they are now."""
    found = {}
    for name in attached.adapter.saved:
        stored = attached.names.tensors[name]
        found[name] = stored.piece.write(_tensor(model, stored.tensor)).detach()
    return found


def _check_parts(model: Decoder, names: Names, parts: Iterable[str]) -> None:
    """Raise ConfigError where one of them cannot be added to, before any is."""
    for part in parts:
        _tensor(model, names.of_part(part).tensor)


def _add(model: Decoder, place: Place, delta_OC: Tensor) -> None:
    _tensor(model, place.tensor)[place.where].copy_(_sum(model, place, delta_OC))


def _sum(model: Decoder, place: Place, delta_OC: Tensor) -> Tensor:
    """What the matrix is with ``delta_OC``, summed in the wider type and rounded to its own."""
    part = _tensor(model, place.tensor)[place.where]
    wide = torch.promote_types(part.dtype, delta_OC.dtype)
    return (part.to(wide) + delta_OC.to(part.device, wide)).to(part.dtype)
