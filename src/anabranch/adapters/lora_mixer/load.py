"""`load_mixture`: LoRA adapters of peft's as the experts of one mixture, onto a model of ours or any module of torch.

Adapters may have other ranks, scales and layers than each other. What an adapter does not adapt gets nothing of it. A router does not
choose an adapter that none of its layers has; one that some of them have keeps its weight at the others, and adds nothing there.
"""
# Shapes: E experts, C inputs, O outputs, R rank

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.adapters.base_name import BASE, is_one_base
from anabranch.adapters.beside import Beside, sizes_of
from anabranch.adapters.copies import same_numbers
from anabranch.adapters.graft import graft, layers_of, patterns_of, strip
from anabranch.adapters.lora_mixer.layer import MixedLowRank
from anabranch.adapters.lora_mixer.loss import SoftThenTopK, SpecialisationLoss, check_top_k
from anabranch.adapters.low_rank import Pair
from anabranch.adapters.names import names_of
from anabranch.adapters.onto_module import built_beside, put_beside
from anabranch.adapters.peft_folder import CONFIG, Adapter, read_peft
from anabranch.adapters.pooled import load_pool
from anabranch.adapters.put_on import built_alone
from anabranch.adapters.routed import RoutedLowRank
from anabranch.bounds import shown
from anabranch.errors import CheckpointError, ConfigError
from anabranch.files import read_json
from anabranch.lm.decoder import Decoder
from anabranch.lm.tensors import some
from anabranch.routing import LinearScore, Router

__all__ = ["load_mixture", "mixed_layers"]

# Which parts that stand beside each other read the same, by their last names, and what their router's group is called.
GROUPS: dict[str, tuple[str, ...]] = {
    "qkv": ("q", "k", "v", "q_proj", "k_proj", "v_proj", "query", "key", "value"),
    "gate_up": ("gate", "up", "gate_proj", "up_proj"),
}
# Fields of a config that tell of the model that an adapter was trained on.
_OF_BASE = (BASE, "revision", "task_type")
_NUMBER = re.compile(r"\d+")


def load_mixture(
    folders: Mapping[str, str | Path],
    model: nn.Module,
    *,
    top_k: int | None = None,
    loss: SpecialisationLoss.Config | None = None,
    router: Router.Config | None = None,
    groups: Mapping[str, Sequence[str]] = GROUPS,
    fused: Mapping[str, Sequence[tuple[str, int]]] | None = None,
    preserved: bool | Sequence[str] = False,
    family: str | None = None,
    seed: int = 0,
    draws: bool = True,
) -> Any:
    """Put adapters onto ``model`` as experts that routers choose for each token, in place, and return the model.

    Experts and model are frozen; routers are new and learn (`fit_router`). Rows may still be told their adapters by name (`rows_for`, of a
    model of ours), which then have precedence.

    Args:
        folders: of peft's, at least two, by name; one will do for a ``router`` that is given.
        model: one of ours, or a module of torch whose linear layers (or Conv1D of transformers' GPT-2) have the names that adapters say.
        top_k: experts of a token after training; None for 3, or all where there are fewer.
        loss: of the routers; None for the default, with the same ``top_k``.
        router: in the place of both.
        groups: layers that stand beside each other and have one router, by their last names; empty for a router each.
        fused: of a foreign model, linear layers that are several in one, with the parts' names in adapters and their rows:
            ``{"qkv_proj": (("q_proj", 32), ("k_proj", 16), ("v_proj", 16))}``.
        preserved: keep what experts were, for `preservation`: all (True), or those of these names.
        family: as for `load_peft`.
        seed: of the routers.
        draws: False for a ``router`` whose first numbers do not matter, since it will be given some: then of a model of ours nothing is
            built on the way but the layers.

    Raises:
        ConfigError: fewer than two folders, ``top_k`` above their number, and as `load_pool`.
        CheckpointError: as `load_pool`; an adapter whose layer the model has not, or with other sizes.

    Warns (UserWarning) where adapters say that they were trained on different models.
    """
    if len(folders) < (2 if router is None else 1):
        raise ConfigError(f"a router needs at least 2 experts to choose from, and there are {len(folders)}")
    if top_k is not None:
        check_top_k(top_k, len(folders))
    top_k = min(3, len(folders)) if top_k is None else top_k
    if router is None:
        balance = SpecialisationLoss.Config(top_k=top_k) if loss is None else loss
        score = LinearScore.Config(init="kaiming_uniform")
        router = Router.Config(score=score, select=SoftThenTopK.Config(top_k=top_k), balance=(balance,))
    shared = MixedLowRank.Config(
        ranks=(1,) * len(folders),
        router=router,
        preserved=bool(preserved),
        preserved_experts=() if isinstance(preserved, bool) else numbers_of_experts(preserved, tuple(folders)),
        experts=tuple(folders),
    )
    if isinstance(model, Decoder):
        _onto_decoder(folders, model, shared, groups, family, seed, draws=draws)
    else:
        _onto_module(folders, model, shared, groups, fused or {}, seed)
    _warn_of_bases(folders)
    return model


def mixed_layers(model: nn.Module) -> dict[str, MixedLowRank]:
    """The mixed layers of a model by the names of what they stand beside. Raises ConfigError where there are none."""
    found = layers_of(model)
    mixed = {name: layer for name, layer in found.items() if isinstance(layer, MixedLowRank)}
    if not mixed:
        raise ConfigError(f"{type(model).__name__} has no mixed layers; put some on with load_mixture")
    return mixed


def numbers_of_experts(names: Sequence[str], experts: Sequence[str]) -> tuple[int, ...]:
    """Of the ``experts`` that ``names`` says. Raises ConfigError for one that there is not, or that is said twice."""
    for name in names:
        if name not in experts:
            there = f"they are {', '.join(map(shown, experts))}" if experts else "they have no names"
            raise ConfigError(f"preserved has {name!r}, which no expert is called; {there}")
        if list(names).count(name) > 1:
            raise ConfigError(f"preserved has {name!r} twice; name it once")
    return tuple(list(experts).index(name) for name in names)


# A model of ours


def _onto_decoder(
    folders: Mapping[str, str | Path],
    model: Decoder,
    shared: MixedLowRank.Config,
    groups: Mapping[str, Sequence[str]],
    family: str | None,
    seed: int,
    *,
    draws: bool,
) -> None:
    load_pool(folders, model, family=family)
    pooled: dict[str, RoutedLowRank] = layers_of(model)
    plain = model.config.replace(linears={})
    lacking = {part: layer.lacking for part, layer in pooled.items()}
    configs = _configs(
        shared, {part: (layer.config.ranks, layer.config.alphas) for part, layer in pooled.items()}, lacking, groups
    )
    parts = names_of(plain, (), family).parts
    linears = patterns_of(configs, parts)
    made = plain.replace(linears=linears).build(seed=seed) if draws else built_alone(plain, linears, seed=seed)
    strip(model)
    # As it says of itself, in names that others look up.
    made.config = plain.replace(linears=linears)
    device = model.embedding.weight.device
    graft(model, made, lambda part, layer: _take(layer.to(device), pooled[part].pool.a, pooled[part].pool.b))


def _take(layer: MixedLowRank, a_ERC: Tensor, b_EOR: Tensor) -> None:
    """Let a new layer have these experts, frozen."""
    layer.pool.a = nn.Parameter(a_ERC.detach(), requires_grad=False)
    layer.pool.b = nn.Parameter(b_EOR.detach(), requires_grad=False)
    if layer.config.preserved:
        layer.kept_a, layer.kept_b = a_ERC.detach().clone(), b_EOR.detach().clone()


def _configs(
    shared: MixedLowRank.Config,
    sizes: Mapping[str, tuple[tuple[int, ...], tuple[float, ...] | None]],
    lacking: Mapping[str, tuple[int, ...]],
    groups: Mapping[str, Sequence[str]],
) -> dict[str, MixedLowRank.Config]:
    """The config of each layer. A router of several is closed for what none of them has; what one of them lacks is zero there."""
    group = {part: _group_of(part, groups) for part in sizes}
    members: dict[tuple[str, str | None], list[str]] = {}
    for part, name in group.items():
        key = (part.rpartition(".")[0], name) if name else (part, None)
        members.setdefault(key, []).append(part)
    configs = {}
    for parts in members.values():
        closed = tuple(sorted(set.intersection(*(set(lacking[part]) for part in parts))))
        for part in parts:
            ranks, alphas = sizes[part]
            # Where all of them add nothing it does not matter who is chosen.
            closed = () if len(closed) == len(ranks) else closed
            configs[part] = shared.replace(
                ranks=ranks, alphas=alphas, closed=closed, router_group=group[part] if len(parts) > 1 else None
            )
    # In the order of the model.
    return {part: configs[part] for part in sizes}


def _group_of(part: str, groups: Mapping[str, Sequence[str]]) -> str | None:
    last = part.rpartition(".")[2]
    return next((name for name, words in groups.items() if last in words), None)


# Any module


def _onto_module(
    folders: Mapping[str, str | Path],
    model: nn.Module,
    shared: MixedLowRank.Config,
    groups: Mapping[str, Sequence[str]],
    fused: Mapping[str, Sequence[tuple[str, int]]],
    seed: int,
) -> None:
    if any(isinstance(module, Beside) for module in model.modules()):
        raise ConfigError("the model has a mixture already; start from one without")
    adapters = {name: read_peft(folder) for name, folder in folders.items()}
    for name, adapter in adapters.items():
        adapter.check_low_rank("routers choose among plain LoRA alone", f"adapter {name!r}")
    pairs: dict[str, list[Pair | None]] = {}
    for number, (name, adapter) in enumerate(adapters.items()):
        for place, pair in _placed(adapter, model, fused, folders[name]).items():
            pairs.setdefault(place, [None] * len(adapters))[number] = pair
    order = [name for name, _ in model.named_modules() if name in pairs]
    sizes = {
        place: (
            tuple(1 if pair is None else pair.rank for pair in pairs[place]),
            tuple(1.0 if pair is None else pair.scale * pair.rank for pair in pairs[place]),
        )
        for place in order
    }
    lacking = {place: tuple(number for number, pair in enumerate(pairs[place]) if pair is None) for place in order}
    configs = _configs(shared, sizes, lacking, groups)
    generator = torch.Generator().manual_seed(seed)
    made, modules = built_beside(model, configs, lambda place: generator)
    for place, layer in made.items():
        layer.put(pairs[place], layer.pool.a.device)
        _take(layer, layer.pool.a, layer.pool.b)
    put_beside(model, made, modules)


def _placed(
    adapter: Adapter, model: nn.Module, fused: Mapping[str, Sequence[tuple[str, int]]], folder: str | Path
) -> dict[str, Pair]:
    """The pairs of one adapter by the linear layers of ``model``, those of parts of a fused one in one.

    Raises CheckpointError for what the model has no layer for, and other sizes; ConfigError for what has no place in a mixture.
    """
    if adapter.saved or adapter.stacks:
        name = next(iter([*adapter.saved, *adapter.stacks]))
        raise ConfigError(f"{folder} brings {name}, which has no place in a mixture of low-rank experts")
    # Also those that are one with another.
    own = dict(model.named_parameters(remove_duplicate=False))
    other = [name for name, copy in adapter.copies.items() if name not in own or not same_numbers(own[name], copy)]
    if other:
        raise ConfigError(
            f"{folder} brings {other[0]} whole, with other numbers than the model's; is it of another model?"
        )
    modules = dict(model.named_modules())
    within = {
        f"{owner}{part}": (f"{owner}{whole}", row, rows, sum(size for _, size in parts))
        for whole, parts in fused.items()
        for owner in {name[: -len(whole)] for name in modules if name == whole or name.endswith(f".{whole}")}
        for row, (part, rows) in zip(_starts(parts), parts, strict=True)
    }
    unknown = [name for name in adapter.pairs if name not in modules and name not in within]
    if unknown:
        raise CheckpointError(
            f"{folder} adapts {some(unknown)}, which the model has not; is it another model's adapter?"
        )
    placed: dict[str, list[Pair]] = {}
    for name, pair in adapter.pairs.items():
        place, row, rows, total = within.get(name, (name, 0, pair.b_OR.shape[0], pair.b_OR.shape[0]))
        _check_linear(modules[place], name, pair, rows, total, folder)
        b_OR = pair.b_OR.new_zeros(total, pair.rank)
        b_OR[row : row + rows] = pair.b_OR
        placed.setdefault(place, []).append(replace(pair, b_OR=b_OR))
    return {place: _stacked(parts) for place, parts in placed.items()}


def _check_linear(module: Any, name: str, pair: Pair, rows: int, total: int, folder: str | Path) -> None:
    sizes_CO = sizes_of(module)
    if sizes_CO is None:
        raise CheckpointError(
            f"{folder} adapts {name}, which is a {type(module).__name__} in the model and no linear layer"
        )
    given = (pair.a_RC.shape[1], pair.b_OR.shape[0])
    if given != (sizes_CO[0], rows) or total != sizes_CO[1]:
        wanted = (sizes_CO[0], rows if total == sizes_CO[1] else sizes_CO[1])
        raise CheckpointError(
            f"{folder} adapts {name} with {given[0]} inputs and {given[1]} outputs, and the model's has {wanted[0]} and {wanted[1]}"
        )


def _stacked(pairs: Sequence[Pair]) -> Pair:
    """One pair that adds what all do: ranks one after the other."""
    if len(pairs) == 1:
        return pairs[0]
    a_RC = torch.cat([pair.a_RC for pair in pairs])
    b_OR = torch.cat([pair.b_OR * pair.scale for pair in pairs], dim=1)
    return Pair(a_RC, b_OR, float(len(a_RC)))


def _starts(parts: Sequence[tuple[str, int]]) -> list[int]:
    return [sum(rows for _, rows in parts[:number]) for number in range(len(parts))]


def _layer_number(place: str) -> int:
    """The first number in a name, which counts blocks."""
    found = _NUMBER.search(place)
    return int(found[0]) if found else 0


def _warn_of_bases(folders: Mapping[str, str | Path]) -> None:
    tables = {name: read_json(Path(folder) / CONFIG) for name, folder in folders.items()}
    for field in _OF_BASE:
        told = {name: table.get(field) for name, table in tables.items() if table.get(field) is not None}
        if field == BASE and is_one_base(told.values()):
            continue
        if len({str(value) for value in told.values()}) > 1:
            each = ", ".join(f"{name}: {value!r}" for name, value in told.items())
            warnings.warn(
                f"experts say different things of {field} ({each}); were they trained on one model?", stacklevel=3
            )
