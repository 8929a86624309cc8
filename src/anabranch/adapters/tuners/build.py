"""Adapters of kinds that peft alone computes: made anew for a model of ours, read from a folder, and written.

peft stands around linear layers of torch, which it finds by their names in a model. It is given a model of names alone (`_Skeleton`): the
linear layers of ours by the names that transformers has for them, and nothing else. What it puts around them is then put around ours.
"""
# Shapes: O outputs, C inputs

import json
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.adapters.low_rank import Pair
from anabranch.adapters.names import Names, Place, names_of
from anabranch.adapters.peft_file import PREFIX, AdapterFile
from anabranch.adapters.peft_folder import CONFIG, Adapter
from anabranch.adapters.peft_kinds import ByPeftTable
from anabranch.adapters.tuners.layer import Stand, TunerNumbers
from anabranch.bounds import shown
from anabranch.errors import CheckpointError, ConfigError
from anabranch.extras import require
from anabranch.lm.decoder import Decoder
from anabranch.lm.tensors import some
from anabranch.nn.linear import Added, numbers_of

__all__ = ["TunedAdapter", "fresh_tuned", "read_tuned", "started_pairs"]

_NAME = "default"
# As of numbers in files of adapters.
_MOST_ALPHA = 1e30
# Gives (weight_OC, bias_O) of a place.
_Weights = Callable[[Place], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, eq=False)
class TunedAdapter(Adapter):
    """An adapter whose layers are peft's, around the matrices of one model; ``tuned`` is peft's model of them all."""

    tuned: Any = None

    @property
    def what(self) -> str:
        """The kind, for people."""
        return ByPeftTable(self.table, Path(CONFIG)).kind.name

    def tensors(self) -> dict[str, Tensor]:
        """All of them, by their names in a file."""
        from peft import get_peft_model_state_dict

        with _quiet():
            found = get_peft_model_state_dict(self.tuned, adapter_name=_NAME, save_embedding_layers=False)
        return {name: tensor.detach() for name, tensor in found.items()}

    def stored(self) -> dict[str, Tensor]:
        """As `tensors`: of tables that layers share the names have other words in front."""
        return self.tensors()


class _Skeleton(nn.Module):
    """The linear layers of a model by the names of transformers.

    Attributes:
        config: what peft asks a model for.
    """

    def __init__(self, family: str) -> None:
        super().__init__()
        self.config = {"model_type": family, "tie_word_embeddings": False}

    def put(self, name: str, layer: nn.Module) -> None:
        """Put a layer at a name, which may have dots."""
        *owners, leaf = name.split(".")
        place: Any = self
        for word in owners:
            if word not in place._modules:
                place.add_module(word, nn.Module())
            place = place._modules[word]
        place.add_module(leaf, layer)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """peft keeps it, and nobody calls it."""
        raise AssertionError("a model of names alone generates nothing")


def fresh_tuned(model: Decoder, config: Any, parts: Collection[str], *, seed: int) -> tuple[TunedAdapter, Names]:
    """A new adapter for ``model``, not on it yet, and the names of the model's layers.

    Args:
        model: without adapters.
        config: of peft's; which layers are adapted is set here.
        parts: of linear layers of ours.
        seed: of the first numbers.

    Raises CheckpointError for a model that no family of Hugging Face's has; ConfigError for parts of experts, and for what peft refuses.
    """
    names, modules = _chosen(model, config, parts)
    tuned = _injected_by(model, config, modules, names, seed)
    config.inference_mode = True
    return TunedAdapter(_table_of(config), _layers(model, tuned, names, modules, config), tuned=tuned), names


def _chosen(model: Decoder, config: Any, parts: Collection[str]) -> tuple[Names, list[str]]:
    """The names of the model's layers, and those that are adapted, which the config is told."""
    names = names_of(model.config, ())
    modules = [module for module, place in names.places.items() if place.part in set(parts)]
    lacking = sorted(set(parts) - {names.places[module].part for module in modules})
    if lacking:
        raise ConfigError(
            f"peft has no name for {some(lacking)} of a {names.family}; leave these layers out of targets"
        )
    config.target_modules = _as_words(modules, names.places)
    return names, modules


def _injected_by(
    model: Decoder, config: Any, modules: Collection[str], names: Names, seed: int, weights: _Weights | None = None
) -> Any:
    """`_injected` with first numbers by a seed. Raises ConfigError for what peft refuses."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _injected(model, config, modules, names, weights)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ConfigError(f"peft refuses {config.peft_type.value}: {_line(error)}") from None


def started_pairs(
    model: Decoder, config: Any, parts: Collection[str], *, seed: int
) -> tuple[dict[str, Pair], tuple[str, ...]]:
    """LoRA's numbers as peft starts them by ``config``, by our parts; and all parts that ``model`` has. The model stays as it is.

    Raises as `fresh_tuned`.
    """
    names, modules = _chosen(model, config, parts)
    read = _reader(model)

    def copied(place: Place) -> tuple[Tensor, Tensor | None]:
        # peft changes them.
        weight_OC, bias_O = read(place)
        return weight_OC.to(torch.float32, copy=True), bias_O

    tuned = _injected_by(model, config, modules, names, seed, copied)
    skeleton, found = tuned.get_base_model(), {}
    for module in modules:
        place, layer = names.places[module], skeleton.get_submodule(module)
        a_RC, b_OR = (half[_NAME].weight.detach() for half in (layer.lora_A, layer.lora_B))
        found[place.part] = place.ours(Pair(a_RC, b_OR, float(layer.scaling[_NAME] * len(a_RC))))
    return found, names.parts


def read_tuned(
    folder: Path,
    model: Decoder,
    table: ByPeftTable,
    *,
    family: str | None = None,
    trainable: bool = False,
    weights: _Weights | None = None,
) -> TunedAdapter:
    """The adapter in a folder of peft's, for ``model``, not on it yet.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        model: without adapters.
        table: its config, checked.
        family: as of `names_of`.
        trainable: whether it is to learn.
        weights: the numbers of a matrix, where ``model`` has none.

    Raises MissingExtraError without peft; CheckpointError for a damaged folder, one of another model, or one that peft refuses.
    """
    require("peft", by=f"an adapter of {table.kind.name} ({folder})")
    from peft import PeftConfig, set_peft_model_state_dict

    file = AdapterFile(folder)
    tensors = {name: file.read(name) for name in file.names}
    named = [name.removeprefix(PREFIX) for name in tensors]
    names = names_of(model.config, (), family)
    modules = sorted(table.targets(names.places), key=list(names.places).index)
    strangers = [name for name in named if not name.startswith("base_model.") and not _is_of(name, modules)]
    if strangers or not modules:
        raise CheckpointError(
            f"{folder} adapts {some(strangers) if strangers else 'nothing'} of the model, a {names.family}; is it another model's adapter?"
        )
    places = [names.places[module] for module in modules]
    widest = max(max(place.in_dim, place.out_dim) for place in places)
    _check_sizes(table, sum(tensor.numel() for tensor in tensors.values()), widest)
    try:
        with _quiet():
            config = PeftConfig.from_pretrained(str(folder))
            config.inference_mode, config.target_modules = not trainable, modules
            tuned = _injected(model, config, modules, names, weights, weights)
            set_peft_model_state_dict(tuned, tensors, adapter_name=_NAME)
    except (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError) as error:
        raise CheckpointError(
            f"{folder} is no adapter of {table.kind.name} for this model that peft reads: {_line(error)}"
        ) from None
    made = TunedAdapter(table.table, _layers(model, tuned, names, modules, config), tuned=tuned)
    _check_whole(made, tensors, folder)
    return made


def _check_sizes(table: ByPeftTable, held: int, widest: int) -> None:
    """Raise CheckpointError for a size that no adapter of so many numbers has, before peft makes one; a few words may ask for any."""
    sizes = {name: value for name, value in table.table.items() if type(value) is int}
    great = [name for name, value in sizes.items() if value > max(held, 2**20) and not name.endswith(("seed", "key"))]
    if great:
        raise CheckpointError(
            f"{great[0]} in {table.path} is {sizes[great[0]]}, and the file has {held:,} numbers; copy the folder again"
        )
    for name, value in _told(table.table, "r", "rank_pattern"):
        if type(value) is not int or value < 0:
            raise CheckpointError(f"{name} in {table.path} is {shown(value)}; it must be a whole number")
        # LoKr's says from where on a whole matrix is kept, and nothing is made of it.
        if value > widest and table.kind.name != "LOKR":
            raise CheckpointError(
                f"{name} in {table.path} is {shown(value)}; no adapted matrix is wider than {widest:,}"
            )
    for name, value in _told(table.table, "alpha", "lora_alpha", "alpha_pattern"):
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _MOST_ALPHA:
            raise CheckpointError(
                f"{name} in {table.path} is {shown(value)}; it must be a number of size {_MOST_ALPHA:g} at most"
            )


def _told(table: Mapping[str, Any], *names: str) -> Iterator[tuple[str, Any]]:
    """Values of these fields, and of those that are patterns each value by its matrices. Raises CheckpointError for no such pattern."""
    for name in (name for name in names if name in table):
        value = table[name]
        if not name.endswith("_pattern"):
            yield name, value
        elif value is not None:
            if not isinstance(value, Mapping):
                raise CheckpointError(f"{name} is {shown(value)}; it must say a number for names of matrices")
            yield from ((f"{name} of {shown(pattern)}", one) for pattern, one in value.items())


def _check_whole(made: TunedAdapter, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Raise CheckpointError where the file lacks what the adapter has, or has what it lacks."""
    wanted = made.tensors()
    lacking, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if lacking or extra:
        what = f"lacks {some(lacking)}" if lacking else f"has {some(extra)}, for which the model has no place"
        raise CheckpointError(f"{folder} {what}; copy it again, or is it an adapter of another model?")


def _injected(
    model: Decoder,
    config: Any,
    modules: Collection[str],
    names: Names,
    weights: _Weights | None = None,
    stands: _Weights | None = None,
) -> Any:
    """peft's model of names, with its layers around a `Stand` for each matrix.

    They are made around ``weights``, and stand around ``stands`` then; None for the model's.
    """
    from peft import PeftModel

    skeleton = _Skeleton(names.family)
    read = weights or _reader(model)
    for module in modules:
        place = names.places[module]
        skeleton.put(module, _copy_of(*read(place), _theirs(place)))
    with _quiet():
        tuned = PeftModel(skeleton, config, adapter_name=_NAME)
    for module in modules:
        place, layer = names.places[module], skeleton.get_submodule(module)
        if not hasattr(layer, "base_layer"):
            raise ValueError(f"nothing was put around {module}")
        layer.base_layer = _stand(model, place, stands)
    return tuned


def _reader(model: Decoder) -> _Weights:
    return lambda place: _numbers_at(_matrix(model, place), tuple(place.where))


def _matrix(model: Decoder, place: Place) -> Any:
    if ".experts." in place.part or not place.tensor.endswith(".weight"):
        raise ConfigError(
            f"{place.part} is of an expert, around which peft's layers cannot stand here; adapt attention and dense layers"
        )
    owner = place.tensor.removesuffix(".weight")
    if owner == "head" and model.head is None:
        raise ConfigError("the head is the embedding, which cannot be adapted alone; leave it out")
    found = model.get_submodule(owner)
    return found.matrix if isinstance(found, Added) else found


def _numbers_at(matrix: Any, where: tuple[Any, ...]) -> tuple[Tensor, Tensor | None]:
    weight, bias = numbers_of(matrix)
    return weight[where], None if bias is None else bias[where]


def _stand(model: Decoder, place: Place, weights: _Weights | None) -> Stand:
    read = (
        partial(_numbers_at, _matrix(model, place), tuple(place.where)) if weights is None else partial(weights, place)
    )
    return Stand(read, _theirs(place), place.in_dim, place.out_dim)


def _theirs(place: Place) -> Tensor | None:
    """Of each of transformers' outputs, which of ours it is; None where they are the same."""
    if place.change is None:
        return None
    ours_O = place.change.read(torch.arange(place.out_dim).unsqueeze(1)).squeeze(1)
    return None if torch.equal(ours_O, torch.arange(place.out_dim)) else ours_O.argsort()


def _copy_of(weight_OC: Tensor, bias_O: Tensor | None, order_O: Tensor | None) -> nn.Linear:
    """A linear layer with these numbers, which are shared where their order is the same."""
    made = nn.Linear(weight_OC.shape[1], weight_OC.shape[0], bias=bias_O is not None, device="meta")
    made.weight = nn.Parameter((weight_OC if order_O is None else weight_OC[order_O]).detach(), requires_grad=False)
    if bias_O is not None:
        made.bias = nn.Parameter((bias_O if order_O is None else bias_O[order_O]).detach(), requires_grad=False)
    return made


def _layers(model: Decoder, tuned: Any, names: Names, modules: Collection[str], config: Any) -> dict[str, TunerNumbers]:
    kind = ByPeftTable({**_table_of(config), "target_modules": list(modules)}, Path(CONFIG)).kind
    skeleton, seen = tuned.get_base_model(), set[int]()
    found = {}
    for module in modules:
        layer = skeleton.get_submodule(module)
        # What layers share is counted once.
        new = [one for one in layer.parameters() if id(one) not in seen]
        seen |= {id(one) for one in new}
        found[module] = TunerNumbers(layer, kind, sum(one.numel() for one in new))
    return found


def _as_words(modules: list[str], places: Collection[str]) -> list[str]:
    """The last words of their names, where these are the names of no others."""
    words = {module.rpartition(".")[2] for module in modules}
    others = {place.rpartition(".")[2] for place in places if place not in set(modules)}
    return sorted(words) if not words & others else list(modules)


def _table_of(config: Any) -> dict[str, Any]:
    """adapter_config.json of a config of peft's."""
    told = config.to_dict()
    found: dict[str, Any] = json.loads(
        json.dumps(told, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    )
    return found


def _is_of(name: str, modules: Collection[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]


@contextmanager
def _quiet() -> Iterator[None]:
    """What peft warns of is of models of transformers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
