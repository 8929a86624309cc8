"""What the tensors of a layer in a file of peft's are, by kind of adapter: read and checked against the config.

Each kind has a table of the names behind a module's (`ENDINGS`), and a reader that makes `Numbers` of them.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from anabranch.adapters.dora import Decomposed
from anabranch.adapters.low_rank import Pair
from anabranch.adapters.numbers import Numbers
from anabranch.adapters.patterns import ends_with
from anabranch.adapters.peft_config import LoraTable, TargetTable
from anabranch.adapters.peft_file import INNER, AdapterFile, Sorted
from anabranch.adapters.peft_tables import Ia3Table, PolyTable
from anabranch.adapters.scaling import Scale
from anabranch.adapters.skills import Skills
from anabranch.adapters.stacked import PARAMETERS, Stack
from anabranch.errors import CheckpointError

__all__ = ["endings_of", "read_layers", "read_wrongly", "stacked_tensors"]

_A, _B, _MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
_POLY = ("poly_lora_A", "poly_lora_B", "poly_router.module_logits")


def endings_of(table: TargetTable) -> Sequence[str]:
    """What stands behind a module's name in the names of its tensors."""
    if isinstance(table, LoraTable):
        return (_A, _B, _MAGNITUDE) if table.is_dora else (_A, _B)
    return ("ia3_l",) if isinstance(table, Ia3Table) else _POLY


def read_layers(file: AdapterFile, found: Sorted, table: TargetTable) -> tuple[dict[str, Numbers], dict[str, Stack]]:
    """(numbers by module, experts that are stacked by parameter).

    Raises CheckpointError for no layer at all, one that lacks a tensor, and tensors of sizes that the config does not say.
    """
    endings, stacks = endings_of(table), {}
    if not found.layers:
        told = "pair of lora_A and lora_B" if isinstance(table, LoraTable) else endings[0]
        raise CheckpointError(f"{file.path} holds no {told}, so there is nothing to put onto a model")
    parameters = _parameters(found.layers, table, file.path)
    if parameters and endings != (_A, _B):
        raise CheckpointError(
            f"{file.path} adapts {next(iter(parameters.values()))}, experts that are stacked, for which peft has plain LoRA alone"
        )
    reader = _reader(table, [parameters.get(module, module) for module in found.layers], file.path)
    layers: dict[str, Numbers] = {}
    for module, names in found.layers.items():
        key = parameters.get(module, module)
        lacking = [ending for ending in endings if ending not in names]
        if lacking:
            rest = "whose other half it has" if len(endings) == 2 else "of which it has the rest"
            raise CheckpointError(f"{file.path} lacks {lacking[0].removesuffix('.weight')} of {key}, {rest}")
        tensors = file.read_all(names)
        if module in parameters:
            assert isinstance(reader, _Lora)
            stacks[key] = reader.stack(key, tensors)
        else:
            layers[module] = reader(key, tensors)
    return layers, stacks


def _reader(table: TargetTable, keys: Sequence[str], where: Path) -> Callable[[str, Mapping[str, Tensor]], Numbers]:
    """What makes numbers of the tensors of one of the layers ``keys``."""
    if isinstance(table, Ia3Table):
        inputs = table.of_inputs(keys)
        return lambda key, tensors: _scale(key, tensors["ia3_l"], key in inputs, where)
    if isinstance(table, PolyTable):
        return lambda key, tensors: _skills(key, tensors, table, where)
    assert isinstance(table, LoraTable)
    return _Lora(table, where, table.ranks(keys), table.alphas(keys))


@dataclass(frozen=True)
class _Lora:
    """Makes pairs, those of DoRA and of stacked experts too, whose ranks and alphas are looked up at once."""

    table: LoraTable
    where: Path
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]

    def __call__(self, key: str, tensors: Mapping[str, Tensor]) -> Numbers:
        """The numbers of a linear layer."""
        a_RC, b_OR = tensors[_A], tensors[_B]
        _check_pair(key, a_RC, b_OR, self.where)
        if a_RC.shape[0] != self.ranks[key]:
            raise CheckpointError(
                f"lora_A of {key} in {self.where} has rank {a_RC.shape[0]}, and adapter_config.json says {self.ranks[key]} (r, or "
                "rank_pattern)"
            )
        pair = Pair(a_RC, b_OR, float(self.alphas[key]), self.table.rslora)
        return _decomposed(key, pair, tensors[_MAGNITUDE], self.where) if self.table.is_dora else pair

    def stack(self, key: str, tensors: Mapping[str, Tensor]) -> Stack:
        """Those of a parameter in which experts are stacked."""
        a_SC, b_OS, rank = tensors[_A], tensors[_B], self.ranks[key]
        _check_pair(key, a_SC, b_OS, self.where)
        if a_SC.shape[0] % rank:
            raise CheckpointError(
                f"lora_A of {key} in {self.where} has {a_SC.shape[0]} rows, and adapter_config.json says {rank} for each expert"
            )
        return Stack(a_SC, b_OS, rank, float(self.alphas[key]), self.table.rslora)


def _check_pair(key: str, a_RC: Tensor, b_OR: Tensor, where: Path) -> None:
    for half, tensor in (("A", a_RC), ("B", b_OR)):
        if tensor.dim() != 2 or 0 in tensor.shape:
            raise CheckpointError(
                f"lora_{half} of {key} in {where} has shape {list(tensor.shape)}; it must be a matrix of at least one row and column"
            )
    if a_RC.shape[0] != b_OR.shape[1]:
        raise CheckpointError(
            f"lora_A of {key} in {where} has rank {a_RC.shape[0]}, and lora_B {b_OR.shape[1]}; they must have one"
        )


def _decomposed(key: str, pair: Pair, magnitude: Tensor, where: Path) -> Decomposed:
    outputs = pair.sizes[1]
    if tuple(magnitude.shape) != (outputs,):
        raise CheckpointError(
            f"lora_magnitude_vector of {key} in {where} has shape {list(magnitude.shape)}; it must have one number for each of the "
            f"{outputs} outputs"
        )
    return Decomposed(pair, magnitude)


def _scale(key: str, factor: Tensor, is_input: bool, where: Path) -> Scale:
    if factor.dim() != 2 or factor.shape[0 if is_input else 1] != 1 or 0 in factor.shape:
        wanted = "[1, inputs], as feedforward_modules names it" if is_input else "[outputs, 1]"
        raise CheckpointError(f"ia3_l of {key} in {where} has shape {list(factor.shape)}; it must be {wanted}")
    return Scale(factor.flatten(), is_input)


def _skills(key: str, tensors: Mapping[str, Tensor], table: PolyTable, where: Path) -> Skills:
    splits, skills, rank, tasks = table.num_splits, table.num_skills, table.rank, table.num_tasks
    a_SKPR, b_SKRQ, logit_TX = (tensors[ending] for ending in _POLY)
    wanted = {
        "poly_lora_A": (a_SKPR, (splits, skills, None, rank), f"[{splits}, {skills}, inputs / {splits}, {rank}]"),
        "poly_lora_B": (b_SKRQ, (splits, skills, rank, None), f"[{splits}, {skills}, {rank}, outputs / {splits}]"),
        "poly_router.module_logits": (logit_TX, (tasks, splits * skills), f"[{tasks}, {splits * skills}]"),
    }
    for name, (tensor, sizes, told) in wanted.items():
        fits = tensor.dim() == len(sizes) and all(
            size == (wanted_size or size) for size, wanted_size in zip(tensor.shape, sizes, strict=True)
        )
        if not fits or 0 in tensor.shape:
            raise CheckpointError(
                f"{name} of {key} in {where} has shape {list(tensor.shape)}; by adapter_config.json (n_splits, n_skills, r, n_tasks) it "
                f"must be {told}"
            )
    return Skills(a_SKPR, b_SKRQ, logit_TX)


def _parameters(modules: Collection[str], table: Any, where: Path) -> dict[str, str]:
    """The stacked parameter that each of ``modules`` adapts, of those that adapt one.

    peft puts one layer around another for each parameter of a module, and the inner ones are called ``base_layer``. Raises CheckpointError
    where there are not as many of them as parameters that the config names.
    """
    around: dict[str, list[str]] = {}
    for module in modules:
        inner = module
        while inner.endswith(INNER):
            inner = inner.removesuffix(INNER)
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


def read_wrongly(layers: Mapping[str, Numbers], stacks: Mapping[str, Stack], table: TargetTable) -> list[str]:
    """The layers, and the parameters of stacks, that who reads ``table`` would take for something else than they are."""
    if isinstance(table, LoraTable):
        kind: type[Numbers] = Decomposed if table.is_dora else Pair
        keys = [*layers, *stacks]
        ranks, alphas = table.ranks(keys), table.alphas(keys)
        everything: dict[str, Any] = {**layers, **stacks}
        return [
            key
            for key, one in everything.items()
            if not isinstance(one, kind | Stack) or (ranks[key], float(alphas[key]), table.rslora) != _scaling_of(one)
        ]
    if isinstance(table, Ia3Table):
        inputs = table.of_inputs(layers)
        return [key for key, one in layers.items() if not isinstance(one, Scale) or one.is_input != (key in inputs)]
    assert isinstance(table, PolyTable)
    sizes = (table.num_splits, table.num_skills, table.rank, table.num_tasks)
    return [
        key
        for key, one in layers.items()
        if not isinstance(one, Skills) or (*one.b_SKRQ.shape[:3], len(one.logit_TX)) != sizes
    ]


def _scaling_of(one: Any) -> tuple[int, float, bool]:
    """Rank, alpha and whether the scale is rank-stabilised."""
    return one.rank, float(one.alpha), one.rslora


def stacked_tensors(stacks: Mapping[str, Stack]) -> dict[str, Tensor]:
    """The tensors of stacks under the names of peft, see `_parameters`."""
    tensors = {}
    for name, stack in stacks.items():
        module, _, parameter = name.rpartition(".")
        # A layer stands around this one for each parameter that comes later.
        later = PARAMETERS[PARAMETERS.index(parameter) + 1 :]
        depth = sum(f"{module}.{other}" in stacks for other in later)
        for ending, tensor in ((_A, stack.a_SC), (_B, stack.b_OS)):
            tensors[f"{module}{INNER * depth}.{ending}"] = tensor
    return tensors
