"""Layers beside the matrices of a model that is there: put on by the linear seam, and taken off again, in place.

A model with an adapter is what its config builds, with the matrices of the model before. So the config says which layers there are, the
seam builds them empty, and what it built is put around the matrices.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import Tensor, nn

from anabranch.adapters.beside import Beside
from anabranch.adapters.ladder import LADDERED
from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.lm.tensors import build_empty
from anabranch.nn import ExpertPool, Linear
from anabranch.nn.expert_layers import layers_beside
from anabranch.nn.linear import Added, numbers_of, start_beside
from anabranch.nn.quantize import QuantizedPool
from anabranch.routing.fixed import fix, release

__all__ = [
    "check_decoder",
    "check_pools",
    "graft",
    "layers_of",
    "patterns_of",
    "start_layers",
    "strip",
    "unstrip",
    "with_layers",
]

_BESIDE = "layers beside matrices"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_LAST_NUMBER = re.compile(r"(?<=\.)\d+(?=\.[^.]*$)")


def check_decoder(model: object) -> None:
    """Raise ConfigError for a model that is none of ours, onto which nothing can be put."""
    if not isinstance(model, Decoder):
        raise ConfigError(
            f"the model is a {type(model).__name__}, and this is put onto a Decoder of anabranch.lm: load_model reads models of "
            "transformers, and put_on, load_mixture and apply_peft take these as they are"
        )


def with_layers(config: Decoder.Config, configs: Mapping[str, Linear.Config], parts: Collection[str]) -> Decoder:
    """An empty model of ``config`` with a layer of ``configs`` beside each part that they name; ``parts`` are all that it has."""
    return build_empty(config.replace(linears=patterns_of(configs, parts)))


def patterns_of(configs: Mapping[str, Linear.Config], parts: Collection[str]) -> dict[str, Linear.Config]:
    """As few patterns as say the same: one for all layers, or for all experts of a layer, where they are alike."""
    found: dict[str, Linear.Config] = {}
    left = dict(configs)
    for numbers in (_NUMBER, _LAST_NUMBER):
        groups: dict[str, list[str]] = {}
        for part in parts:
            groups.setdefault(numbers.sub("*", part), []).append(part)
        for pattern, members in groups.items():
            first = left.get(members[0])
            if len(members) == 1 or first is None or any(left.get(part) != first for part in members):
                continue
            if sum(fnmatchcase(part, pattern) for part in parts) == len(members):
                found[pattern] = first
                left = {part: config for part, config in left.items() if part not in set(members)}
    return found | left


def check_pools(model: Decoder, made: Decoder) -> None:
    """Raise ConfigError where ``made`` has layers beside experts that are not stacked matrices in the memory of ``model``."""
    for name, _ in _pools(made):
        pool: Any = model.get_submodule(name)
        is_here = isinstance(pool, ExpertPool | QuantizedPool) and pool.layers is None
        if not is_here or getattr(pool, "exchange", None) is not None:
            raise ConfigError(
                f"experts of {name} are a {type(pool).__name__}, which nothing can stand beside; load the model with all its experts in "
                "memory"
            )


def graft(model: Decoder, made: Decoder, put: Callable[[str, Any], None]) -> None:
    """Put the layers of ``made`` beside the matrices of ``model``, and take over its config; ``put`` gives each its numbers, by part.

    The base is fixed until `strip`; which parameters learn is left to who calls.
    """
    fix(model, _BESIDE)
    for part, layer in layers_of(made).items():
        put(part, layer)
    for name, added in [(name, module) for name, module in made.named_modules() if isinstance(module, Added)]:
        # Before it has the matrix of the model, which keeps its mode.
        added.train(model.training)
        added.matrix = model.get_submodule(name)
        _set(model, name, added)
    for name, layers in _pools(made):
        pool: Any = model.get_submodule(name)
        pool.layers = layers.train(model.training)
    model.config = made.config


def start_layers(model: Decoder) -> None:
    """Let new layers begin from the matrices that they stand beside by now: what they were built beside had other numbers, or none."""
    for module in model.modules():
        if isinstance(module, Added):
            start_beside(module.beside, module.rows, partial(_weight_of, module.matrix))
        elif (layers := layers_beside(module)) is not None:
            pool: Any = module
            layers.start(*(pool.packed if isinstance(pool, QuantizedPool) else (pool.w13, pool.w2)))


def _weight_of(matrix: nn.Module) -> Tensor:
    return numbers_of(matrix)[0]


def strip(model: Decoder) -> dict[str, Any]:
    """Take the layers off that `graft` put on, and return them by the names of where they stood; the base may be balanced again, if nothing
    else is on it."""
    release(model, _BESIDE)
    taken: dict[str, Any] = {}
    for name, added in [(name, module) for name, module in model.named_modules() if isinstance(module, Added)]:
        _set(model, name, added.matrix)
        taken[name] = added
    for name, layers in list(_pools(model)):
        pool: Any = model.get_submodule(name)
        pool.layers = None
        taken[name] = layers
    model.config = model.config.replace(linears={})
    return taken


def unstrip(model: Decoder, taken: Mapping[str, Any]) -> None:
    """Put back what `strip` took off, beside the matrices that there are now; the config is left to who calls."""
    fix(model, _BESIDE)
    for name, layers in taken.items():
        place: Any = model.get_submodule(name)
        if isinstance(layers, Added):
            layers.matrix = place
            _set(model, name, layers.train(model.training))
        else:
            place.layers = layers.train(model.training)


def layers_of(model: nn.Module) -> dict[str, Any]:
    """The layers that stand beside parts of matrices, by the names of the parts, which are the same along a ladder; in a model that is not
    ours by the names of the matrices."""
    found: dict[str, Any] = {}
    for name, module in ((name.replace(LADDERED, "."), module) for name, module in model.named_modules()):
        if isinstance(module, Added):
            found |= {".".join([*name.split(".")[:-1], part]): layer for part, layer in module.beside.items()}
        elif isinstance(module, Beside):
            found[module.name] = module.beside
        elif (layers := layers_beside(module)) is not None:
            for experts in (layers.w13, layers.w2):
                for number, beside in experts.items():
                    parts = beside.items() if isinstance(beside, nn.ModuleDict) else ()
                    found |= {f"{name}.{number}.{part}": layer for part, layer in parts}
    return found


def _pools(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layers) of pools whose experts have layers of their own."""
    for name, module in model.named_modules():
        layers = layers_beside(module)
        if layers is not None:
            yield name, layers


def _set(model: nn.Module, name: str, module: Any) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)
