"""`check_fits`: whether an adapter is one of this model, before anything of the model is touched."""

import re
from collections.abc import Collection
from pathlib import Path

from anabranch.adapters.low_rank import Pair
from anabranch.adapters.names import Names, Stored
from anabranch.adapters.peft_config import TargetTable
from anabranch.adapters.peft_folder import CONFIG, Adapter
from anabranch.adapters.peft_tables import table_of
from anabranch.adapters.stacked import PARAMETERS, expanded
from anabranch.errors import CheckpointError
from anabranch.lm.decoder import Decoder
from anabranch.lm.tensors import some

__all__ = ["check_fits"]

# Where a tensor stands that is all of one of ours.
_WHOLE = repr(())
_LAYER = re.compile(r"(?<=layers\.)\d+")


def check_fits(adapter: Adapter, names: Names, config: Decoder.Config, folder: Path) -> None:
    """Raise CheckpointError unless the adapter is one of this model: no layer too many, none missing, all of the right widths."""
    unknown = [module for module in adapter.layers if module not in names.places]
    routers = _routers(unknown, names)
    if routers:
        raise CheckpointError(
            f"{folder} adapts {some(routers)}, which chooses experts, and LoRA beside a router is not applied here; train it with the "
            "layers by name, as target_modules=['q_proj', 'k_proj', 'v_proj', 'o_proj'] and target_parameters="
            "['mlp.experts.gate_up_proj', 'mlp.experts.down_proj']: exclude_modules leaves no router out of peft's 'all-linear'"
        )
    if unknown:
        raise CheckpointError(
            f"{folder} adapts {some(unknown)}, for which the model, a {names.family}, has no linear layer; is it another model's adapter?"
        )
    for module, numbers in adapter.layers.items():
        place = names.places[module]
        given, wanted = numbers.sizes, (place.in_dim, place.out_dim)
        if any(size not in (None, own) for size, own in zip(given, wanted, strict=True)):
            said = [
                f"{size} {name}" for size, name in zip(given, ("inputs", "outputs"), strict=True) if size is not None
            ]
            raise CheckpointError(
                f"{folder} adapts {module} with {' and '.join(said)}, and the model's has {wanted[0]} and {wanted[1]}; is it an adapter of "
                "another model?"
            )
    _check_saved(adapter, names, folder)
    _check_stacks(adapter, names, config, folder)
    table: TargetTable = table_of(adapter.table, folder / CONFIG)
    missing = [module for module in sorted(table.targets(names.places)) if module not in adapter.layers]
    # Single experts that the file has; the rest of what is named may lack, see below.
    single = {module.rpartition(".")[2] for module in adapter.layers if ".experts." in module}
    missing = [module for module in missing if not _is_left_out(module, single)]
    if missing:
        named = "target_parameters" if table.parameters(missing[0], ["weight"]) else "target_modules"
        raise CheckpointError(
            f"{folder} lacks {_holds(adapter)} of {some(missing)}, which {named} in {table.path} names; copy it again, or is it an "
            "adapter of another model?"
        )


def _routers(modules: Collection[str], names: Names) -> list[str]:
    """Those of transformers' layers that choose experts, which are no linear layers of ours.

    The part around one may be called otherwise in files (``block_sparse_moe``) than in memory (``mlp``), and so in an adapter.
    """

    def place_of(module: str) -> tuple[str, ...]:
        words = module.split(".")
        return (*words[:-2], words[-1])

    choosing = [name.removesuffix(".weight") for name, stored in names.tensors.items() if ".router." in stored.tensor]
    places = {place_of(module) for module in choosing}
    return [module for module in modules if place_of(module) in places]


def _check_stacks(adapter: Adapter, names: Names, config: Decoder.Config, folder: Path) -> None:
    """The same of experts that are stacked: each once, and each parameter in all layers that are named, or in none."""
    parts = expanded(adapter.stacks, config, str(folder))
    places = {place.part for place in names.places.values()}
    homeless = [part for part in parts if part not in places]
    if homeless:
        raise CheckpointError(
            f"{folder} adapts {some(homeless)} ({some(list(adapter.stacks))} in its file), beside which nothing can stand in this model: "
            "where experts have biases, as in gpt-oss, or are no matrices of their own, leave target_parameters out"
        )
    twice = [module for module in adapter.layers if names.places[module].part in parts]
    if twice:
        raise CheckpointError(
            f"{folder} adapts {some(twice)} alone and in a stack of all experts; it must be one of the two"
        )
    routed = {str(layer) for layer in range(config.num_layers) if config.feed_forward_of(layer).is_routed}
    table: TargetTable = table_of(adapter.table, folder / CONFIG)
    for parameter in PARAMETERS:
        held = [name.removesuffix(f".{parameter}") for name in adapter.stacks if name.endswith(f".{parameter}")]
        layers = {module.split("layers.")[1].split(".")[0]: module for module in held}
        # target_parameters may name some layers alone, as its words are endings of whole names.
        missing = [
            layer
            for layer in (sorted(routed - layers.keys(), key=int) if held else [])
            if table.parameters(_LAYER.sub(layer, held[0], count=1), [parameter])
        ]
        if missing:
            raise CheckpointError(
                f"{folder} lacks lora_A and lora_B of {parameter} in layer {missing[0]}, which target_parameters names; copy it again, or "
                "is it an adapter of another model?"
            )


def _holds(adapter: Adapter) -> str:
    """What the tensors of a layer are called."""
    return next((numbers.holds for numbers in adapter.layers.values()), Pair.holds)


def _stands(stored: Stored) -> tuple[str, str]:
    """Our tensor, and where in it."""
    return stored.tensor, repr(stored.piece.where)


def _check_saved(adapter: Adapter, names: Names, folder: Path) -> None:
    brought = {**adapter.saved, **adapter.copies}
    # By where they stand in the model: a head that is tied to the embedding is there once one of them is.
    held: dict[tuple[str, str], str] = {}
    for name in brought:
        if name not in names.tensors:
            raise CheckpointError(f"{folder} brings {name}, for which the model, a {names.family}, has no place")
        other = held.setdefault(_stands(names.tensors[name]), name)
        if other != name:
            raise CheckpointError(f"{folder} brings {other} and {name}, which are one tensor of the model")
    parts: dict[str, set[tuple[str, str]]] = {}
    for stored in names.tensors.values():
        if stored.piece.where:
            parts.setdefault(stored.tensor, set()).add(_stands(stored))
    for name in brought:
        stored = names.tensors[name]
        if stored.piece.where and (whole := held.get((stored.tensor, _WHOLE))):
            raise CheckpointError(f"{folder} brings {name} and {whole}, of which that is a part")

    def is_held(stored: Stored) -> bool:
        """Also as a part of a whole, or in all its parts, which experts are one by one."""
        own = parts.get(stored.tensor, set())
        return bool({_stands(stored), (stored.tensor, _WHOLE)} & held.keys()) or (
            not stored.piece.where and bool(own) and own <= held.keys()
        )

    table: TargetTable = table_of(adapter.table, folder / CONFIG)
    for word in table.modules_to_save:
        # A word that no module of this model has asks for nothing: peft adds those of classifiers by itself.
        lacking = {
            _stands(stored): name
            for name, stored in names.tensors.items()
            if f".{word}." in f".{name}" and not is_held(stored)
        }
        if lacking:
            raise CheckpointError(
                f"{folder} lacks {some(list(lacking.values()))}, which modules_to_save names; copy it, or save it again from the trained "
                "model"
            )
    for name, tensor in brought.items():
        shape = names.tensors[name].shape
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{folder} brings {name} of shape {list(tensor.shape)}, and the model's is {list(shape)}; is its vocabulary another?"
            )


def _is_left_out(module: str, single: Collection[str]) -> bool:
    """Whether a layer may lack though it is named: experts that peft saw as one stacked tensor, in which it adapts no single one.

    It does so in all layers of a model, so that no expert of the file has a layer of this last word, which ``single`` are.
    """
    return ".experts." in module and module.rpartition(".")[2] not in single
