"""Routed heads on a whole model: put on, taken off, reported, saved beside a model that is not ours.

model = put_heads(model, num_shared=6)                              # a Decoder becomes another, with the same weights
put_heads(whisper, 4, where="model.decoder.layers.*.encoder_attn")  # others are changed in place
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from anabranch.bounds import MOST_LAYERS, whole
from anabranch.config import from_dict, to_dict
from anabranch.errors import AnabranchError, CheckpointError, ConfigError
from anabranch.files import atomic_folder, atomic_write_json, read_json
from anabranch.heads.config import HeadRouting
from anabranch.heads.form import form_of
from anabranch.heads.own import RoutedAttention
from anabranch.heads.routed_heads import RoutedHeads
from anabranch.lm.decoder import Decoder
from anabranch.lm.recipes import Material, recipe
from anabranch.lm.shards import write_file

__all__ = [
    "head_losses",
    "head_report",
    "load_heads",
    "put_heads",
    "routed_heads_of",
    "save_heads",
    "take_off_heads",
    "with_heads",
]

M = TypeVar("M", bound=nn.Module)

CONFIG, NUMBERS, FORMAT = "heads.json", "heads.safetensors", "anabranch-heads"
SCHEMA = 1
# Numbers of each tensor by which a base is known again.
_SAMPLED = 64


def put_heads(
    model: M, num_shared: int, *, where: str | Sequence[str] | None = None, seed: int = 0, **settings: Any
) -> M:
    """``model`` with routed heads, whose weights are those of ``model``.

    Args:
        model: a `Decoder`, of which another is made that shares its weights; or any other, changed in place: its attentions of torch and of
            transformers, see `RoutedHeads`.
        num_shared: heads of each attention that are always on.
        where: patterns of names of attentions (``*`` spans dots), of a model that is no `Decoder`; None for all there are.
        seed: of weights that are drawn.
        settings: as of `HeadRouting`.

    Raises ConfigError for settings that cannot be, and where nothing is found or something has routed heads already.
    """
    config = HeadRouting(num_shared=num_shared, **settings)
    if isinstance(model, Decoder):
        if where is not None:
            raise ConfigError("where is for other models; all blocks of a Decoder get routed heads")
        return with_heads(model, config, seed=seed)  # type: ignore[return-value]
    patterns = [where] if isinstance(where, str) else where
    found = _attentions(model)
    chosen = [name for name in found if patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)]
    if not chosen:
        there = f"it has {', '.join(list(found)[:4])}{' ...' if len(found) > 4 else ''}" if found else "it has none"
        raise ConfigError(f"no attention of this {type(model).__name__} fits where={where!r}; {there}")
    # All are looked at before any is changed.
    for name in chosen:
        config.check(form_of(found[name]).shape(found[name]).num_heads)
    for place, name in enumerate(chosen):
        _put(model, name, RoutedHeads.of(found[name], config, layer=place, seed=seed + place))
    return model


def take_off_heads(model: M) -> M:
    """``model`` as it was before `put_heads`: a `Decoder` is made anew, others are changed in place."""
    if isinstance(model, Decoder):
        changes: dict[str, Any] = {}
        for name in ("attention", "local_attention"):
            part = getattr(model.config, name)
            if isinstance(part, RoutedAttention.Config):
                changes[name] = part.attention
        return _moved(model, model.config.replace(**changes)) if changes else model  # type: ignore[return-value]
    for name, heads in routed_heads_of(model).items():
        _put(model, name, heads.unwrap())
    return model


def routed_heads_of(model: nn.Module) -> dict[str, RoutedHeads]:
    """Every attention with routed heads, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RoutedHeads)}


def head_losses(model: nn.Module) -> Tensor:
    """`RoutedHeads.losses` of all of them, added up. Raises ConfigError where there is none."""
    found = routed_heads_of(model)
    if not found:
        raise ConfigError(f"this {type(model).__name__} has no routed heads")
    return torch.stack([heads.losses() for heads in found.values()]).sum()


def head_report(model: nn.Module) -> list[dict[str, Any]]:
    """`RoutedHeads.report` of each, with its ``name``."""
    return [{"name": name, **heads.report()} for name, heads in routed_heads_of(model).items()]


def with_heads(model: Decoder, config: HeadRouting, *, seed: int = 0) -> Decoder:
    """A decoder like ``model``, whose weights it shares, with routed heads in every block."""
    held = model.config
    if isinstance(held.attention, RoutedAttention.Config):
        raise ConfigError("the model has routed heads already; take them off first, or go on with them")
    return _moved(model, decoder_config(held, config), seed=seed)


def decoder_config(config: Decoder.Config, heads: HeadRouting) -> Decoder.Config:
    """``config`` with routed heads in every block."""
    local = config.local_attention
    return config.replace(
        attention=RoutedAttention.Config(attention=config.attention, heads=heads),
        local_attention=None if local is None else RoutedAttention.Config(attention=local, heads=heads),
    )


def _moved(model: Decoder, config: Decoder.Config, *, seed: int = 0) -> Decoder:
    """A decoder of ``config`` with the weights of ``model``, whose attentions are routed where those are not, or the other way."""
    made = Decoder(config, seed=seed)
    state, fresh = model.state_dict(), made.state_dict()
    before, after = (list(routed_heads_of(one)) for one in (model, made))
    renamed = {_renamed(name, before, after): value for name, value in state.items()}
    gates = {name for name in renamed if name not in fresh}
    lacking = {name for name in fresh if name not in renamed}
    wrong = [name for name in (gates | lacking) if ".gate." not in name]
    if wrong:
        raise ConfigError(
            f"{sorted(wrong)[0]} of this model is not what its config says, so its heads cannot be routed; save and load it as it is first"
        )
    kind = model.embedding.weight.dtype
    kept = {name: value for name, value in renamed.items() if name not in gates}
    added = {
        name: value.to(kind) if isinstance(_held(made, name), nn.Parameter) else value
        for name, value in fresh.items()
        if name in lacking
    }
    made.load_state_dict(kept | added, assign=True)
    learns = dict(model.named_parameters())
    for name, parameter in made.named_parameters():
        old = learns.get(_renamed(name, after, before))
        parameter.requires_grad_(True if old is None else old.requires_grad)
    return made.to(model.embedding.weight.device).train(model.training)


def _held(model: nn.Module, name: str) -> Any:
    """The parameter or buffer of a name in the state dict."""
    owner, _, last = name.rpartition(".")
    return getattr(model.get_submodule(owner), last)


def _renamed(name: str, before: Sequence[str], after: Sequence[str]) -> str:
    """The name of a weight in a model whose attentions are routed at ``after``, of one where they are at ``before``."""
    for place in before:
        if name.startswith(f"{place}.attention."):
            name = f"{place}.{name.removeprefix(f'{place}.attention.')}"
            break
    for place in after:
        if name.startswith(f"{place}.") and not name.startswith(f"{place}.gate."):
            return f"{place}.attention.{name.removeprefix(f'{place}.')}"
    return name


def _attentions(model: nn.Module) -> dict[str, nn.Module]:
    """What heads can be put on, by name; no part of another."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not name or any(name.startswith(f"{other}.") for other in found):
            continue
        if isinstance(module, RoutedHeads):
            raise ConfigError(f"{name} has routed heads already; take them off first, or go on with them")
        if _can(module):
            found[name] = module
    return found


def _can(module: nn.Module) -> bool:
    try:
        form_of(module)
    except ConfigError:
        return False
    # What holds layers has a config as well.
    return not isinstance(module, nn.ModuleList | nn.Sequential)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, last = name.rpartition(".")
    parent = model.get_submodule(owner)
    module.train(parent.training)
    setattr(parent, last, module)


# Beside a model that is not ours


def save_heads(folder: str | Path, model: nn.Module) -> None:
    """Write what routed heads of ``model`` added: ``heads.json`` and ``heads.safetensors``, all or nothing.

    A `Decoder` saves them itself (`anabranch.lm.save_model`). Raises ConfigError where there are none, DataError for a folder that holds
    anything else.
    """
    found = routed_heads_of(model)
    gates = {name: heads for name, heads in found.items() if heads.gate is not None}
    if not gates:
        raise ConfigError(f"this {type(model).__name__} has no routed heads to save")
    tensors = {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, heads in gates.items()
        for key, value in _state(heads).items()
    }
    modules = {name: {"layer": heads.layer, "heads": to_dict(heads.routing)} for name, heads in gates.items()}
    table = {"schema": SCHEMA, "format": FORMAT, "base": fingerprint(model), "modules": modules}
    with atomic_folder(folder, replacing=rf"{re.escape(CONFIG)}|{re.escape(NUMBERS)}") as temporary:
        write_file(temporary / NUMBERS, tensors)
        atomic_write_json(temporary / CONFIG, table)


def load_heads(folder: str | Path, model: M) -> M:
    """Put the routed heads of `save_heads` onto ``model``, in place, as they were.

    Raises CheckpointError for a folder that holds none, a model that is another, and numbers that do not fit, or are none.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    place = Path(folder)
    if not (place / CONFIG).is_file():
        raise CheckpointError(f"{place} holds no routed heads ({CONFIG} is not there)")
    table = read_json(place / CONFIG)
    if table.get("format") != FORMAT or table.get("schema") != SCHEMA or not isinstance(table.get("modules"), dict):
        raise CheckpointError(f"{place / CONFIG} is not of routed heads that this program knows")
    if not table["modules"]:
        raise CheckpointError(f"{place / CONFIG} names no attention, so there are no routed heads to put on")
    if table.get("base") != fingerprint(model):
        raise CheckpointError(f"the routed heads in {place} are of another model than this {type(model).__name__}")
    try:
        tensors = load_file(place / NUMBERS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{place / NUMBERS} cannot be read: {error}") from None
    made = dict(_made(table["modules"], model, place))
    for name, heads in made.items():
        assert heads.gate is not None
        own = {key: tensors.get(f"{name}.{key}") for key in _state(heads)}
        for key, value in own.items():
            like = _state(heads)[key]
            found = _wrong_with(value, like)
            if found is not None:
                for other in made.values():
                    other.unwrap()
                raise CheckpointError(f"{name}.{key} in {place / NUMBERS} is {found}")
        heads.gate.load_state_dict({key.removeprefix("gate."): value for key, value in own.items()})
    for name, heads in made.items():
        _put(model, name, heads)
    return model


def _wrong_with(value: Tensor | None, like: Tensor) -> str | None:
    """What a tensor of the file is that cannot take the place of ``like``; None for one that can."""
    if value is None:
        return "not there"
    if value.shape != like.shape:
        return f"of shape {list(value.shape)}, not {list(like.shape)}"
    return None if bool(value.isfinite().all()) else "not finite everywhere; copy the folder again"


def _made(modules: dict[str, Any], model: nn.Module, place: Path) -> Iterator[tuple[str, RoutedHeads]]:
    there = _attentions(model)
    for name, said in modules.items():
        if name not in there:
            raise CheckpointError(f"{place / CONFIG} is of an attention {name}, which the model does not have")
        try:
            config = from_dict(HeadRouting, said["heads"])
            layer = whole("layer", said["layer"], 0, MOST_LAYERS - 1)
        except (AnabranchError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{place / CONFIG} says of {name} what cannot be: {error}") from None
        if config.routing == "none":
            raise CheckpointError(
                f"{place / CONFIG} says of {name} that its routing is 'none'; it must be 'relu' or 'topk', as save_heads writes it"
            )
        yield name, RoutedHeads.of(there[name], config, layer=layer)


def _state(heads: RoutedHeads) -> dict[str, Tensor]:
    return {name: value for name, value in heads.state_dict().items() if name.startswith("gate.")}


def fingerprint(model: nn.Module) -> str:
    """Of names, shapes and some numbers of the weights that are not those of routed heads, wrapped or not."""
    places = list(routed_heads_of(model))
    hashed = hashlib.sha256()
    for name, value in sorted((_renamed(name, places, ()), value) for name, value in model.state_dict().items()):
        if any(name.startswith(f"{place}.gate.") for place in places):
            continue
        flat = value.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // _SAMPLED)][:_SAMPLED].float().cpu()
        hashed.update(f"{name} {list(value.shape)};".encode())
        hashed.update(some.numpy().tobytes())
    return hashed.hexdigest()[:16]


@recipe(
    "routed_heads",
    makes=lambda config: isinstance(config.attention, RoutedAttention.Config),
    takes=lambda config: not isinstance(config.attention, RoutedAttention.Config),
    needs="a model whose heads are all on",
)
def _with_heads(model: Decoder, config: Decoder.Config, material: Material) -> Decoder:
    assert isinstance(config.attention, RoutedAttention.Config)
    return with_heads(model, config.attention.heads, seed=material.seed)
