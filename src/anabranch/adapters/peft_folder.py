"""Folders of the package peft: adapter_config.json and adapter_model.safetensors, read without peft and written as it reads them.

    adapter = read_peft("my-lora")              # an Adapter: numbers by layer, no model needed
    write_peft("copy", adapter)

Layers have the names that transformers gives them. Fields of the config that nobody here knows go along as they are.
"""
# Shapes: C inputs, O outputs, R rank

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anabranch.adapters.low_rank import Pair
from anabranch.adapters.patterns import ends_with
from anabranch.adapters.peft_config import LoraTable
from anabranch.adapters.stacked import PARAMETERS, Stack
from anabranch.bounds import shown
from anabranch.errors import CheckpointError
from anabranch.files import atomic_folder, atomic_write_json
from anabranch.lm.shards import write_file
from anabranch.lm.tensors import FLOATS, PickleFiles, SafetensorsFiles, TensorSource, read_json, some

__all__ = ["CONFIG", "WEIGHTS", "Adapter", "described", "read_peft", "write_peft"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_PREFIX = "base_model.model."
_INNER = ".base_layer"
_HALF = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])\.weight")
# What else an adapter of the kind LORA may hold, by what is in the names, and what that is.
_OTHER = {
    ".lora_magnitude_vector": "DoRA",
    ".lora_embedding_": "adapters of embeddings",
    ".lora_A.": "parts of lora_A",
    ".lora_B.": "parts of lora_B",
    ".token_adapter.": "single learned tokens",
}
# What may lie in a folder that another adapter takes the place of.
_OURS = re.compile(rf"{re.escape(CONFIG)}|{re.escape(WEIGHTS)}|README\.md")


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter of a whole model, apart from any.

    Attributes:
        table: its adapter_config.json.
        pairs: the numbers, by the names of the linear layers they adapt (``model.layers.0.self_attn.q_proj``).
        saved: tensors that it brings whole (``modules_to_save``, biases), by the names that transformers gives them.
        stacks: of experts that are stacked in one parameter, by its name (``model.layers.0.mlp.experts.down_proj``).
    """

    table: Mapping[str, Any]
    pairs: Mapping[str, Pair]
    saved: Mapping[str, Tensor] = field(default_factory=dict)
    stacks: Mapping[str, Stack] = field(default_factory=dict)

    @property
    def num_parameters(self) -> int:
        """Numbers in all of its tensors."""
        halves = (half for pair in self.pairs.values() for half in (pair.a_RC, pair.b_OR))
        stacked = (half for stack in self.stacks.values() for half in (stack.a_SC, stack.b_OS))
        return sum(tensor.numel() for tensor in (*halves, *stacked, *self.saved.values()))


def read_peft(folder: str | Path) -> Adapter:
    """The adapter in ``folder``, on the CPU, in the types that are stored.

    Raises CheckpointError where there is none, it is of another kind than LoRA, a file cannot be read, a tensor holds NaN or infinity, is
    half of a pair, or does not have the rank that the config says.
    """
    place = Path(folder)
    if not (place / CONFIG).is_file():
        what = "is a file" if place.is_file() else "holds no adapter_config.json" if place.is_dir() else "is not there"
        raise CheckpointError(f"no adapter at {place}: it {what}; give a folder that peft's save_pretrained wrote")
    table = LoraTable(read_json(place / CONFIG), place / CONFIG)
    source, where = _open(place)
    halves: dict[str, dict[str, str]] = {}
    saved: dict[str, str] = {}
    for name in sorted(source.names):
        _put(name, halves, saved, where)
    if not halves:
        raise CheckpointError(f"{where} holds no pair of lora_A and lora_B, so there is nothing to add to a model")
    parameters = _parameters(halves, table, where)
    keys = [parameters.get(module, module) for module in halves]
    ranks, alphas = table.ranks(keys), table.alphas(keys)
    pairs, stacks = {}, {}
    for (module, names), key in zip(halves.items(), keys, strict=True):
        lacking = [f"lora_{half}" for half in "AB" if half not in names]
        if lacking:
            raise CheckpointError(f"{where} lacks {lacking[0]} of {key}, whose other half it has")
        a_RC, b_OR = (_read(source, names[half], where) for half in "AB")
        _check_pair(key, a_RC, b_OR, ranks[key], where, is_stack=module in parameters)
        if module in parameters:
            stacks[key] = Stack(a_RC, b_OR, ranks[key], float(alphas[key]), table.rslora)
        else:
            pairs[key] = Pair(a_RC, b_OR, float(alphas[key]), table.rslora)
    return Adapter(table.table, pairs, {name: _read(source, stored, where) for name, stored in saved.items()}, stacks)


def _parameters(modules: Collection[str], table: LoraTable, where: Path) -> dict[str, str]:
    """The stacked parameter that each of ``modules`` adapts, of those that adapt one.

    peft puts one layer around another for each parameter of a module, and the inner ones are called ``base_layer``. Raises CheckpointError
    where there are not as many of them as parameters that the config names.
    """
    around: dict[str, list[str]] = {}
    for module in modules:
        inner = module
        while inner.endswith(_INNER):
            inner = inner.removesuffix(_INNER)
        around.setdefault(inner, []).append(module)
    found = {}
    for inner, layers in around.items():
        # A word like down_proj alone fits a parameter of any module; those of experts are stacked.
        names = table.parameters(inner, PARAMETERS) if ends_with(inner, "experts") else []
        if not names and layers == [inner]:
            continue
        if len(names) != len(layers):
            told = f"names {', '.join(names)}" if names else "names none"
            raise CheckpointError(
                f"{where} holds {len(layers)} pairs for {inner}, of whose parameters target_parameters {told}"
            )
        for module, name in zip(sorted(layers, key=len, reverse=True), names, strict=True):
            found[module] = f"{inner}.{name}"
    return found


def _open(place: Path) -> tuple[TensorSource, Path]:
    if (place / WEIGHTS).is_file():
        return SafetensorsFiles([place / WEIGHTS]), place / WEIGHTS
    if (place / _PICKLE).is_file():
        return PickleFiles([place / _PICKLE]), place / _PICKLE
    raise CheckpointError(f"no weights in {place} (looked for {WEIGHTS} and {_PICKLE})")


def _put(stored: str, halves: dict[str, dict[str, str]], saved: dict[str, str], where: Path) -> None:
    """Sort one tensor in: half of a pair, or one that is brought whole."""
    name = stored.removeprefix(_PREFIX)
    found = _HALF.fullmatch(name)
    if found:
        before = halves.setdefault(found["module"], {}).setdefault(found["half"], stored)
        if before != stored:
            raise CheckpointError(f"{where} holds {shown(stored)} and {shown(before)}, which are of one tensor")
        return
    other = next((what for part, what in _OTHER.items() if part in name), None)
    if other is not None:
        raise CheckpointError(f"{where} holds {shown(stored)}: {other}, which cannot be computed here")
    name = name.replace(".modules_to_save.", ".").replace(".base_layer.", ".")
    if name in saved:
        raise CheckpointError(f"{where} holds {shown(stored)} and {shown(saved[name])}, which are of one tensor")
    saved[name] = stored


def _read(source: TensorSource, name: str, where: Path) -> Tensor:
    """A tensor of finite numbers, as a copy that needs the file no longer."""
    if source.dtype(name) not in FLOATS:
        kind = str(source.dtype(name)).removeprefix("torch.")
        raise CheckpointError(f"{shown(name)} in {where} is stored as {kind}; it must be float32, float16 or bfloat16")
    tensor = source.read(name)
    # A pickled file of a few bytes may say a tensor of any size: one number for all places, or none.
    is_plain = tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_nested
    if not is_plain or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        raise CheckpointError(
            f"{shown(name)} in {where} is no plain tensor with a number for each of its places; save it again, as safetensors"
        )
    tensor = tensor.clone()
    if not torch.isfinite(tensor).all():
        raise CheckpointError(
            f"{shown(name)} in {where} holds NaN or infinity; the adapter is damaged, or its training failed"
        )
    return tensor


def _check_pair(module: str, a_RC: Tensor, b_OR: Tensor, rank: int, where: Path, *, is_stack: bool = False) -> None:
    for half, tensor in (("A", a_RC), ("B", b_OR)):
        if tensor.dim() != 2 or 0 in tensor.shape:
            raise CheckpointError(
                f"lora_{half} of {module} in {where} has shape {list(tensor.shape)}; it must be a matrix of at least one row and column"
            )
    if a_RC.shape[0] != b_OR.shape[1]:
        raise CheckpointError(
            f"lora_A of {module} in {where} has rank {a_RC.shape[0]}, and lora_B {b_OR.shape[1]}; they must have one"
        )
    if is_stack and a_RC.shape[0] % rank:
        raise CheckpointError(
            f"lora_A of {module} in {where} has {a_RC.shape[0]} rows, and adapter_config.json says {rank} for each expert"
        )
    if not is_stack and a_RC.shape[0] != rank:
        raise CheckpointError(
            f"lora_A of {module} in {where} has rank {a_RC.shape[0]}, and adapter_config.json says {rank} (r, or rank_pattern)"
        )


def write_peft(folder: str | Path, adapter: Adapter) -> None:
    """Write ``adapter`` as peft reads it, all or nothing.

    Args:
        folder: the place: not there, empty, or with an adapter and nothing else, which is replaced.
        adapter: its table must say the ranks and scales that its pairs have, see `described`.

    Raises:
        CheckpointError: a table that says something else.
        DataError: the folder holds something else, or cannot be written.
        CapacityError: the disk is full.
    """
    _check_told(adapter, Path(folder) / CONFIG)
    tensors = {}
    for module, pair in adapter.pairs.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = pair.a_RC
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = pair.b_OR
    tensors |= _stacked(adapter.stacks)
    tensors |= {f"{_PREFIX}{_in_peft(name, adapter.pairs)}": tensor for name, tensor in adapter.saved.items()}
    # A README.md alone is somebody's page, and no card of an adapter.
    replaced = _OURS.pattern if (Path(folder) / CONFIG).exists() else ""
    with atomic_folder(folder, replacing=replaced) as temporary:
        atomic_write_json(temporary / CONFIG, dict(adapter.table))
        write_file(temporary / WEIGHTS, tensors)


def _stacked(stacks: Mapping[str, Stack]) -> dict[str, Tensor]:
    """The tensors of stacks under the names of peft, see `_parameters`."""
    tensors = {}
    for name, stack in stacks.items():
        module, _, parameter = name.rpartition(".")
        # A layer stands around this one for each parameter that comes later.
        later = PARAMETERS[PARAMETERS.index(parameter) + 1 :]
        depth = sum(f"{module}.{other}" in stacks for other in later)
        for half, tensor in (("A", stack.a_SC), ("B", stack.b_OS)):
            tensors[f"{_PREFIX}{module}{_INNER * depth}.lora_{half}.weight"] = tensor
    return tensors


def _in_peft(name: str, modules: Collection[str]) -> str:
    """The name of a tensor that is brought whole, where the layer around it may be an adapted one, in which its own stands apart."""
    module, _, leaf = name.rpartition(".")
    return f"{module}.base_layer.{leaf}" if module in modules else name


def _check_told(adapter: Adapter, path: Path) -> None:
    """Raise CheckpointError unless whoever reads the table finds the pairs that are there, with their scales."""
    table = LoraTable(adapter.table, path)
    ranks, alphas = table.ranks(adapter.pairs), table.alphas(adapter.pairs)
    wrong = [
        module
        for module, pair in adapter.pairs.items()
        if (ranks[module], float(alphas[module]), table.rslora) != (pair.rank, float(pair.alpha), pair.rslora)
    ]
    ranks, alphas = table.ranks(adapter.stacks), table.alphas(adapter.stacks)
    wrong += [
        name
        for name, stack in adapter.stacks.items()
        if (ranks[name], float(alphas[name]), table.rslora) != (stack.rank, float(stack.alpha), stack.rslora)
    ]
    wrong += [module for module in adapter.pairs if module not in wrong and module not in table.targets([module])]
    if wrong:
        raise CheckpointError(
            f"the config that would go to {path} says something else of {some(wrong)} than its numbers"
        )


def described(table: Mapping[str, Any], pairs: Mapping[str, Pair]) -> dict[str, Any]:
    """``table`` with what it says of ranks, scales and layers made true of ``pairs``; the rest, known or not, stays.

    Raises ValueError where some scales are rank-stabilised and others are not, which one config cannot say.
    """
    stabilised = {pair.rslora for pair in pairs.values()}
    if len(stabilised) > 1:
        raise ValueError("some scales are alpha / rank and others alpha / sqrt(rank)")
    ranks = {module: pair.rank for module, pair in pairs.items()}
    alphas = {module: pair.alpha for module, pair in pairs.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    # Nothing that is left over from another set of layers may take one away.
    rest = {
        name: value
        for name, value in table.items()
        if name not in ("exclude_modules", "layers_to_transform", "layers_pattern")
    }
    return {
        **rest,
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {module: value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {module: _plain(value) for module, value in alphas.items() if value != alpha},
        "use_rslora": stabilised.pop(),
        "target_modules": sorted(pairs),
    }


def _plain(value: float) -> float | int:
    """Without ``.0``: peft's lora_alpha is a whole number wherever it can be."""
    return int(value) if value == int(value) else value
