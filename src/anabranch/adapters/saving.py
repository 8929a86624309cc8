"""`save_peft`: the adapter on a model, as it is now, in a folder that peft reads."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from anabranch.adapters.attached import ATTACHED, attached_on
from anabranch.adapters.front import Front
from anabranch.adapters.graft import layers_of
from anabranch.adapters.low_rank import LowRank
from anabranch.adapters.names import names_of
from anabranch.adapters.numbers import Holder
from anabranch.adapters.peft_described import described
from anabranch.adapters.peft_folder import Adapter, write_peft
from anabranch.adapters.whole import saved_now
from anabranch.errors import CheckpointError, ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.lm.tensors import some

__all__ = ["adapter_of", "adapter_on", "save_peft"]

# What a config says of an adapter that was not read from a folder.
_USUAL = {"task_type": "CAUSAL_LM", "base_model_name_or_path": None, "inference_mode": True}


def adapter_of(model: Decoder) -> Adapter:
    """The adapter on ``model``, with its numbers as they are now. Raises ConfigError where there is none."""
    attached = attached_on(model)
    only = attached.adapter
    if attached.merged is not None:
        return attached.merged
    if only.prompt_MW is not None:
        streams: Any = model.streams
        return Adapter(only.table, {}, prompt_MW=streams.weight.detach())
    found = {name: layer.numbers() for name, layer in layers_of(model).items()}
    places = attached.names.places
    layers = {module: places[module].theirs(found[places[module].part]) for module in only.layers}
    # What is stacked does not learn.
    return replace(only, layers=layers, saved=saved_now(model, attached.names, only), copies={})


def save_peft(folder: str | Path, model: Decoder, *, family: str | None = None) -> None:
    """Write the adapter on ``model`` into a folder that peft reads; what its config said besides, known to us or not, is kept.

    Args:
        folder: not there, empty, or with an adapter, as of `write_peft`.
        model: one that `load_peft` was given, or that was built or loaded with layers of one kind of adapter.
        family: the ``model_type`` whose names are written, where the model has its layers not from `load_peft`.

    Raises:
        ConfigError: the model has no adapter, or one config cannot say what it has.
        CheckpointError: no family of Hugging Face's has such a model.
        DataError, CapacityError: as `write_peft`.
    """
    write_peft(folder, adapter_on(model, family))


def adapter_on(model: Decoder, family: str | None = None) -> Adapter:
    """The adapter on ``model``, read from a folder or built with it. Raises ConfigError and CheckpointError as `save_peft`."""
    return adapter_of(model) if getattr(model, ATTACHED, None) is not None else _built(model, family)


def _built(model: Decoder, family: str | None) -> Adapter:
    """The adapter of a model that was built or loaded with it."""
    layers: dict[str, Any] = {part: layer for part, layer in layers_of(model).items() if isinstance(layer, Holder)}
    others = [kind for kind in model.config.linears.values() if not issubclass(kind.owner, Holder)]
    if not layers and not others and isinstance(model.streams, Front):
        table = {**_USUAL, **model.streams.described(model.config)}
        return Adapter(table, {}, prompt_MW=model.streams.weight.detach())
    if not layers and not others:
        raise ConfigError(
            "the model has no adapter to save; name the adapter that is meant, or put it onto the model with load_peft"
        )
    if others or model.streams is not None:
        other = others[0].owner.kind if others else getattr(model.streams, "kind", None)
        raise ConfigError(f"the model has {other!r}, which no adapter of peft's has beside")
    names = names_of(model.config.replace(linears={}), (), family)
    modules = {place.part: module for module, place in names.places.items()}
    homeless = [part for part in layers if part not in modules]
    if homeless:
        raise CheckpointError(f"Hugging Face's {names.family} has no linear layer for {some(homeless)}")
    numbers = {modules[part]: names.places[modules[part]].theirs(layer.numbers()) for part, layer in layers.items()}
    dropouts = {layer.config.dropout for layer in layers.values() if isinstance(layer, LowRank)}
    if len(dropouts) > 1:
        raise ConfigError(f"one adapter_config.json cannot say that layers have dropout {sorted(dropouts)}")
    usual = {**_USUAL, "bias": "none", "lora_dropout": dropouts.pop()} if dropouts else _USUAL
    try:
        return Adapter(described(usual, numbers), numbers)
    except ValueError as error:
        raise ConfigError(f"one adapter_config.json cannot say that {error}") from None
