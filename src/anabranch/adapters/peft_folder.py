"""Folders of the package peft: adapter_config.json and adapter_model.safetensors, read without peft and written as it reads them.

    adapter = read_peft("my-lora")              # an Adapter: numbers by layer, no model needed
    write_peft("copy", adapter)

Layers have the names that transformers gives them. Fields of the config that nobody here knows go along as they are.
"""
# Shapes: M virtual tokens, W numbers of each

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from anabranch.adapters.base_name import BASE
from anabranch.adapters.folder_files import PEFT_FORM, adapter_folder
from anabranch.adapters.low_rank import Pair
from anabranch.adapters.numbers import Numbers
from anabranch.adapters.peft_config import TargetTable
from anabranch.adapters.peft_described import described
from anabranch.adapters.peft_file import INNER, PREFIX, WEIGHTS, AdapterFile, check_numbers
from anabranch.adapters.peft_kinds import ByPeftTable
from anabranch.adapters.peft_layers import endings_of, read_layers, read_wrongly, stacked_tensors
from anabranch.adapters.peft_place import CONFIG, check_there
from anabranch.adapters.peft_tables import VirtualTable, table_of
from anabranch.adapters.stacked import Stack
from anabranch.errors import CheckpointError, ConfigError
from anabranch.files import atomic_write_json, read_json
from anabranch.lm.shards import write_file
from anabranch.lm.tensors import some

__all__ = ["CONFIG", "WEIGHTS", "Adapter", "described", "read_peft", "write_peft"]

_PROMPT = "prompt_embeddings"


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter of a whole model, apart from any, of whatever kind.

    Attributes:
        table: its adapter_config.json.
        layers: the numbers, by the names of the linear layers they are for (``model.layers.0.self_attn.q_proj``), all of one kind.
        saved: tensors that it brings whole (``modules_to_save``, biases), by the names that transformers gives them.
        stacks: of experts that are stacked in one parameter, by its name (``model.layers.0.mlp.experts.down_proj``).
        prompt_MW: virtual tokens in front of every sequence, as peft has them; None where there are none.
        copies: tensors of the base that lie beside it though it did not learn them, likewise; see `anabranch.adapters.copies`.
    """

    table: Mapping[str, Any]
    layers: Mapping[str, Numbers]
    saved: Mapping[str, Tensor] = field(default_factory=dict)
    stacks: Mapping[str, Stack] = field(default_factory=dict)
    prompt_MW: Tensor | None = None
    copies: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def what(self) -> str:
        """The kind, for people."""
        if self.prompt_MW is not None:
            found: str = table_of(self.table, Path(CONFIG)).what
            return found
        return next((numbers.what for numbers in self.layers.values()), Pair.what)

    @property
    def pairs(self) -> Mapping[str, Pair]:
        """The layers of plain LoRA. Raises ConfigError for another kind, which has none."""
        self.check_low_rank("this needs plain LoRA")
        return self.layers  # type: ignore[return-value]

    def check_low_rank(self, why: str, name: str = "the adapter") -> None:
        """Raise ConfigError unless its layers are plain LoRA; ``why`` says what for."""
        if self.prompt_MW is not None or any(not isinstance(numbers, Pair) for numbers in self.layers.values()):
            raise ConfigError(f"{name} is {self.what}, and {why}")

    def of_base(self, base: str | None) -> Self:
        """The same, whose table names the base, by a path or a name, where it named none. Information for people and other programs."""
        if base is None or self.table.get(BASE):
            return self
        return replace(self, table={**self.table, BASE: base})

    @property
    def num_parameters(self) -> int:
        """Numbers in all of its tensors, but for those of the base."""
        return sum(tensor.numel() for tensor in replace(self, copies={}).tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """All of them, by their names in a file, without the words that peft has in front of all."""
        if self.prompt_MW is not None:
            return {_PROMPT: self.prompt_MW}
        found = {
            f"{module}.{ending}": tensor
            for module, numbers in self.layers.items()
            for ending, tensor in numbers.tensors().items()
        }
        found |= stacked_tensors(self.stacks)
        return found | {_in_peft(name, self.layers): tensor for name, tensor in {**self.saved, **self.copies}.items()}

    def stored(self) -> dict[str, Tensor]:
        """`tensors` by their whole names in a file."""
        prefix = PREFIX if self.prompt_MW is None else ""
        return {f"{prefix}{name}": tensor for name, tensor in self.tensors().items()}


def read_peft(folder: str | Path) -> Adapter:
    """The adapter in ``folder``, on the CPU, in the types that are stored.

    Raises CheckpointError where there is none, it is of a kind that is not known here, a file cannot be read, a tensor holds NaN or
    infinity, is half of a pair, or does not have the sizes that the config says, and for layers that it does not name.
    """
    place = Path(folder)
    check_there(place)
    table = table_of(read_json(place / CONFIG), place / CONFIG)
    if isinstance(table, ByPeftTable):
        raise CheckpointError(
            f"{place} is {table.kind.name}, which peft computes around the matrices of a model; it has no numbers for one layer alone that "
            "could be combined, pooled or exported as LoRA (eval, generate, chat, serve and adapters fuse take it as it is)"
        )
    file = AdapterFile(place)
    if isinstance(table, VirtualTable):
        return Adapter(table.table, {}, prompt_MW=_prompt(file, table))
    found = file.sorted(endings_of(table))
    layers, stacks = read_layers(file, found, table)
    table.check_named(layers, place)
    saved: dict[str, Tensor] = {}
    copies: dict[str, Tensor] = {}
    for name, tensor in file.read_all(found.saved).items():
        (saved if table.is_learned(name) else copies)[name] = tensor
    return Adapter(table.table, layers, saved, stacks, copies=copies)


def _prompt(file: AdapterFile, table: VirtualTable) -> Tensor:
    """Virtual tokens, of the number that the config says."""
    others = [name for name in sorted(file.names) if name != _PROMPT]
    if others or _PROMPT not in file.names:
        told = f"holds {some(others)}" if others else "holds nothing"
        raise CheckpointError(f"{file.path} {told}; {table.peft_type} of peft has {_PROMPT} alone")
    prompt = file.read(_PROMPT)
    if prompt.dim() != 2 or len(prompt) != table.num_tokens or not prompt.shape[1]:
        raise CheckpointError(
            f"{_PROMPT} in {file.path} has shape {list(prompt.shape)}; it must be a row for each of the {table.num_tokens} virtual tokens "
            "that adapter_config.json says (num_virtual_tokens)"
        )
    return prompt


def write_peft(folder: str | Path, adapter: Adapter) -> None:
    """Write ``adapter`` as peft reads it, all or nothing.

    Args:
        folder: the place: not there, empty, or with an adapter of peft's, whose settings and numbers are replaced; what people said of it
            (README.md, glider.json) stays, and gates of other numbers are set aside, see `anabranch.adapters.folder_files`.
        adapter: its table must say the ranks and scales that its pairs have, see `described`.

    Raises:
        CheckpointError: a table that says something else, and numbers that `read_peft` refuses.
        DataError: the folder holds something else, or cannot be written.
        CapacityError: the disk is full.
    """
    _check_told(adapter, Path(folder) / CONFIG)
    tensors = adapter.stored()
    for name, tensor in tensors.items():
        check_numbers(name, tensor, f"what would go to {folder}")
    with adapter_folder(folder, [PEFT_FORM]) as temporary:
        atomic_write_json(temporary / CONFIG, dict(adapter.table))
        write_file(temporary / WEIGHTS, tensors)


def _in_peft(name: str, modules: Collection[str]) -> str:
    """The name of a tensor that is brought whole, where the layer around it may be an adapted one, in which its own stands apart."""
    module, _, leaf = name.rpartition(".")
    return f"{module}{INNER}.{leaf}" if module in modules else name


def _check_told(adapter: Adapter, path: Path) -> None:
    """Raise CheckpointError unless whoever reads the table finds what is there, with its sizes and scales."""
    table = table_of(adapter.table, path)
    if not isinstance(table, TargetTable) or isinstance(table, ByPeftTable):
        return
    wrong = read_wrongly(adapter.layers, adapter.stacks, table)
    targets = table.targets(adapter.layers)
    wrong += [module for module in adapter.layers if module not in wrong and module not in targets]
    if wrong:
        raise CheckpointError(
            f"the config that would go to {path} says something else of {some(wrong)} than its numbers"
        )
