"""`load_peft`: an adapter of peft's onto a model of ours, in place, and back: taken off, merged, saved.

    model, tokenizer = load_model("SmolLM2-135M")
    load_peft("my-lora", model)             # the model now computes what peft's does
    merge(model)                            # its matrices hold the adapter, and it runs as quickly as before
    unmerge(model)
    save_peft("copy", model)
    unload(model)                           # the base again

The adapter stands beside matrices by the linear seam, so a model with one is a plain `Decoder` whose config names its `LowRank` layers.
"""

from pathlib import Path

import torch

from anabranch.adapters.attached import ATTACHED, attached_on, begin, check_bare, configs_of, our_pairs, put_on
from anabranch.adapters.fits import check_fits
from anabranch.adapters.graft import check_pools, strip, with_layers
from anabranch.adapters.merging import unmerge
from anabranch.adapters.names import names_of
from anabranch.adapters.peft_folder import Adapter, read_peft
from anabranch.adapters.whole import HEAD, exchange, parts_head, tensor_of
from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder

__all__ = ["load_peft", "unload"]


def load_peft(folder: str | Path, model: Decoder, *, family: str | None = None, trainable: bool = False) -> Decoder:
    """Put the LoRA adapter in a folder of peft's onto ``model``, in place, and return the model.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        model: whose layers a family of Hugging Face's has; it may be quantised.
        family: the ``model_type`` that the adapter was made with, where several could be the model's.
        trainable: whether the adapter learns. The base does not.

    Raises:
        CheckpointError: as `read_peft`, or the adapter is of another model: it has layers that this one lacks or widths that do not fit,
            or lacks layers that its config names.
        ConfigError: the model has an adapter, or other ``linears``, already; ``trainable`` for one that has dropout, brings whole tensors
            or adapts stacked experts, which do not learn here.
    """
    adapter = read_peft(folder)
    check_bare(model)
    unties = model.config.tie_embeddings and parts_head(adapter)
    config = model.config.replace(tie_embeddings=False) if unties else model.config
    names = names_of(config, adapter.pairs, family)
    check_fits(adapter, names, config, Path(folder))
    if trainable:
        _check_learns(adapter, folder)
    pairs = our_pairs(names, adapter, config)
    made = with_layers(config, configs_of(pairs), names.parts)
    check_pools(model, made)
    for name in adapter.saved:
        # A head that is the embedding still becomes one of its own.
        if name != HEAD or model.head is not None:
            tensor_of(model, names.tensors[name].tensor)
    attached = begin(model, {"default": adapter}, names, config)
    for name, tensor in adapter.saved.items():
        attached.before[name] = exchange(model, names, name, tensor)
    attached.trainable = trainable
    put_on(model, made, pairs, trainable=trainable)
    return model


@torch.no_grad()
def unload(model: Decoder) -> Decoder:
    """Take the adapter off, in place: the model computes what it did before `load_peft`.

    Raises ConfigError where there is none, or a matrix that must be given back is stored in few bits by now; the model is as it was then.
    """
    attached = attached_on(model)
    # Nothing is taken off where one of them cannot be given back.
    for name in attached.before:
        tensor_of(model, attached.names.tensors[name].tensor)
    if attached.merged is not None:
        unmerge(model)
    strip(model)
    for name, tensor in attached.before.items():
        exchange(model, attached.names, name, tensor)
    model.head, model.config = attached.head, attached.config
    for name in attached.learned:
        model.get_parameter(name).requires_grad_(True)
    object.__delattr__(model, ATTACHED)
    return model


def _check_learns(adapter: Adapter, folder: str | Path) -> None:
    """Raise ConfigError for what peft trains otherwise than we do: another training would be got than the config says."""
    if adapter.stacks:
        raise ConfigError(
            f"{folder} adapts experts that are stacked, whose gate and up share a matrix; such an adapter cannot learn here"
        )
    if adapter.table.get("lora_dropout"):
        raise ConfigError(
            f"{folder} says lora_dropout {adapter.table['lora_dropout']!r}, and adapters learn without dropout here; say 0 in its "
            "adapter_config.json to train it so"
        )
    if adapter.saved:
        raise ConfigError(
            f"{folder} brings {next(iter(adapter.saved))} whole, which does not learn here, as it does in peft; leave out trainable, or "
            "train an adapter of linear layers alone"
        )
