"""`load_peft`: an adapter of peft's onto a model of ours, in place, and back: taken off, merged, saved.

    model, tokenizer = load_model("SmolLM2-135M")
    load_peft("my-lora", model)             # the model now computes what peft's does
    merge(model)                            # its matrices hold the adapter, and it runs as quickly as before
    unmerge(model)
    save_peft("copy", model)
    unload(model)                           # the base again

The adapter stands beside matrices by the linear seam, so a model with one is a plain `Decoder` whose config names its `LowRank` layers.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.adapters.graft import check_pools, graft, layers_of, strip, with_layers
from anabranch.adapters.low_rank import LowRank, Pair
from anabranch.adapters.names import Names, Place, names_of
from anabranch.adapters.peft_config import LoraTable
from anabranch.adapters.peft_folder import CONFIG, Adapter, described, read_peft, write_peft
from anabranch.errors import CheckpointError, ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.lm.tensors import build_empty, some

__all__ = ["adapter_of", "load_peft", "merge", "save_peft", "unload", "unmerge"]

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# How a model remembers what was put onto it.
_ATTACHED = "_attached_adapter"


@dataclass(eq=False)
class _Attached:
    """What was put onto a model.

    Attributes:
        adapter: as it was read.
        names: of the model's layers.
        config: of the model before.
        before: what stood where the adapter's whole tensors are now, by the names of transformers.
        learned: which parameters of the base learned before.
        head: of the model before.
        merged: the pairs as they were added to the matrices; None where they stand beside them.
    """

    adapter: Adapter
    names: Names
    config: Decoder.Config
    before: dict[str, Tensor] = field(default_factory=dict)
    learned: list[str] = field(default_factory=list)
    head: Any = None
    merged: Mapping[str, Pair] | None = None


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
        ConfigError: the model has an adapter, or other ``linears``, already.
    """
    adapter = read_peft(folder)
    _check_bare(model)
    unties = model.config.tie_embeddings and _parts_head(adapter)
    config = model.config.replace(tie_embeddings=False) if unties else model.config
    names = names_of(config, adapter.pairs, family)
    _check_fits(adapter, names, Path(folder))
    pairs = {names.places[module].part: pair for module, pair in adapter.pairs.items()}
    made = with_layers(config, pairs, names.parts)
    check_pools(model, made)
    for name in adapter.saved:
        if not (unties and name == _HEAD):
            _tensor(model, names.tensors[name].tensor)
    attached = _Attached(adapter, names, model.config, head=model.head)
    attached.learned = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    if unties:
        _part_head(model, config)
    for name, tensor in adapter.saved.items():
        attached.before[name] = _exchange(model, names, name, tensor)
    graft(model, made, pairs, trainable=trainable)
    object.__setattr__(model, _ATTACHED, attached)
    return model


def adapter_of(model: Decoder) -> Adapter:
    """The adapter on ``model``, with its numbers as they are now. Raises ConfigError where there is none."""
    attached = _attached(model)
    if attached.merged is not None:
        return Adapter(attached.adapter.table, attached.merged, _saved(model, attached))
    found = {name: layer.pair() for name, layer in layers_of(model).items()}
    pairs = {module: found[attached.names.places[module].part] for module in attached.adapter.pairs}
    return Adapter(attached.adapter.table, pairs, _saved(model, attached))


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
    layers = layers_of(model)
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
    pairs = {modules[part]: layer.pair() for part, layer in layers.items()}
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
    """Take the adapter off, in place: the model computes what it did before `load_peft`. Raises ConfigError where there is none."""
    attached = _attached(model)
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

    Raises ConfigError where there is no adapter, it is merged already, or a matrix is stored in few bits.
    """
    attached = _attached(model)
    if attached.merged is not None:
        raise ConfigError("the adapter is merged already")
    pairs = adapter_of(model).pairs
    # Nothing is added where one of them cannot be.
    for module in pairs:
        _tensor(model, attached.names.places[module].tensor)
    strip(model)
    for module, pair in pairs.items():
        _add(model, attached.names.places[module], pair.delta())
    attached.merged = dict(pairs)
    return model


@torch.no_grad()
def unmerge(model: Decoder) -> Decoder:
    """Take what `merge` added out of the matrices, and put the adapter beside them again.

    Raises ConfigError where there is no adapter, or it is not merged.
    """
    attached = _attached(model)
    if attached.merged is None:
        raise ConfigError("the adapter is not merged")
    pairs, names = attached.merged, attached.names
    for module, pair in pairs.items():
        _add(model, names.places[module], -pair.delta())
    own = {names.places[module].part: pair for module, pair in pairs.items()}
    graft(model, with_layers(model.config, own, names.parts), own)
    attached.merged = None
    return model


def _attached(model: Decoder) -> _Attached:
    attached = getattr(model, _ATTACHED, None)
    if attached is None:
        raise ConfigError("the model has no adapter that load_peft put onto it")
    return attached


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


def _check_fits(adapter: Adapter, names: Names, folder: Path) -> None:
    """Raise CheckpointError unless the adapter is one of this model: no layer too many, none missing, all of the right widths."""
    unknown = [module for module in adapter.pairs if module not in names.places]
    if unknown:
        raise CheckpointError(
            f"{folder} adapts {some(unknown)}, for which the model, a {names.family}, has no linear layer; is it another model's adapter?"
        )
    for module, pair in adapter.pairs.items():
        place = names.places[module]
        given, wanted = (pair.a_RC.shape[1], pair.b_OR.shape[0]), (place.in_dim, place.out_dim)
        if given != wanted:
            raise CheckpointError(
                f"{folder} adapts {module} with {given[0]} inputs and {given[1]} outputs, and the model's has {wanted[0]} and {wanted[1]}; "
                "is it an adapter of another model?"
            )
    _check_saved(adapter, names, folder)
    table = LoraTable(adapter.table, folder / CONFIG)
    outside = [module for module in adapter.pairs if module not in table.targets(adapter.pairs)]
    if outside:
        raise CheckpointError(
            f"{folder} holds numbers for {some(outside)}, which target_modules in {table.path} does not name"
        )
    missing = [module for module in sorted(table.targets(names.places)) if module not in adapter.pairs]
    missing = [module for module in missing if not _is_left_out(module, table, adapter.pairs)]
    if missing:
        raise CheckpointError(
            f"{folder} lacks lora_A and lora_B of {some(missing)}, which target_modules in {table.path} names; copy it again, or is it an "
            "adapter of another model?"
        )


def _check_saved(adapter: Adapter, names: Names, folder: Path) -> None:
    for name, tensor in adapter.saved.items():
        if name not in names.tensors:
            raise CheckpointError(f"{folder} brings {name}, for which the model, a {names.family}, has no place")
        shape = names.tensors[name].shape
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{folder} brings {name} of shape {list(tensor.shape)}, and the model's is {list(shape)}; is its vocabulary another?"
            )


def _is_left_out(module: str, table: LoraTable, pairs: Collection[str]) -> bool:
    """Whether a layer may lack though it is named: experts that peft saw as one stacked tensor, in which it adapts no single one."""
    before, is_expert, after = module.partition(".experts.")
    if not is_expert:
        return table.target_modules is None
    last = after.rpartition(".")[2]
    return not any(other.startswith(f"{before}.experts.") and other.endswith(f".{last}") for other in pairs)


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


def _add(model: Decoder, place: Place, delta_OC: Tensor) -> None:
    part = _tensor(model, place.tensor)[place.where]
    wide = torch.promote_types(part.dtype, delta_OC.dtype)
    part.copy_(part.to(wide) + delta_OC.to(part.device, wide))
