"""`save_peft`: the adapter on a model, as it is now, in a folder that peft reads."""

from pathlib import Path

from torch import Tensor

from anabranch.adapters.attached import ATTACHED, Attached, attached_on
from anabranch.adapters.graft import layers_of
from anabranch.adapters.low_rank import LowRank
from anabranch.adapters.names import names_of
from anabranch.adapters.peft_folder import Adapter, described, write_peft
from anabranch.adapters.whole import tensor_of
from anabranch.errors import CheckpointError, ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.lm.tensors import some

__all__ = ["adapter_of", "save_peft"]


def adapter_of(model: Decoder) -> Adapter:
    """The adapter on ``model``, with its numbers as they are now. Raises ConfigError where there is none."""
    attached = attached_on(model)
    only = attached.adapter
    if attached.merged is not None:
        return attached.merged
    found = {name: layer.pair() for name, layer in layers_of(model).items()}
    places = attached.names.places
    pairs = {module: places[module].theirs(found[places[module].part]) for module in only.pairs}
    # What is stacked does not learn.
    return Adapter(only.table, pairs, _saved(model, attached), only.stacks)


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
    if getattr(model, ATTACHED, None) is not None:
        write_peft(folder, adapter_of(model))
        return
    layers = {part: layer for part, layer in layers_of(model).items() if isinstance(layer, LowRank)}
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
    pairs = {modules[part]: names.places[modules[part]].theirs(layer.pair()) for part, layer in layers.items()}
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


def _saved(model: Decoder, attached: Attached) -> dict[str, Tensor]:
    """The adapter's whole tensors as they are now."""
    found = {}
    for name in attached.adapter.saved:
        stored = attached.names.tensors[name]
        found[name] = stored.piece.write(tensor_of(model, stored.tensor)).detach()
    return found
