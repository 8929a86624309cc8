"""`load_peft`: an adapter of peft's onto a model of ours, in place, and back: taken off, merged, saved.

    model, tokenizer = load_model("SmolLM2-135M")
    load_peft("my-lora", model)             # the model now computes what peft's does
    merge(model)                            # its matrices hold the adapter, and it runs as quickly as before
    unmerge(model)
    save_peft("copy", model)
    unload(model)                           # the base again

The adapter stands beside matrices by the linear seam, or in front of sequences as a stream, so a model with one is a plain `Decoder` whose
config names its layers.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from anabranch.adapters.around import take_around
from anabranch.adapters.attached import attached_on, begin, check_bare, configs_of, forget, our_layers, put_on
from anabranch.adapters.copies import settled
from anabranch.adapters.fits import check_fits
from anabranch.adapters.front import Front, front_of
from anabranch.adapters.graft import check_pools, strip, with_layers
from anabranch.adapters.merging import unmerge
from anabranch.adapters.names import Names, names_of
from anabranch.adapters.peft_folder import CONFIG, Adapter, read_peft
from anabranch.adapters.peft_kinds import ByPeftTable
from anabranch.adapters.peft_tables import table_in, table_of
from anabranch.adapters.skills import Skills
from anabranch.adapters.tuners.build import read_tuned
from anabranch.adapters.whole import HEAD, exchange, state_of, tensor_in, tensor_of, with_parted_head
from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.lm.tensors import build_empty

__all__ = ["attach", "load_peft", "unload"]


def load_peft(
    folder: str | Path,
    model: Decoder,
    *,
    family: str | None = None,
    trainable: bool = False,
    task: int | None = None,
) -> Decoder:
    """Put the adapter in a folder of peft's onto ``model``, in place, and return the model.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        model: whose layers a family of Hugging Face's has; it may be quantised.
        family: the ``model_type`` that the adapter was made with, where several could be the model's.
        trainable: whether the adapter learns, with the dropout that its config says. The base does not.
        task: of an adapter that has several tasks, that of rows which are told none; None where each must be told its own.

    Raises:
        CheckpointError: as `read_peft`, or the adapter is of another model: it has layers that this one lacks or widths that do not fit,
            or lacks layers that its config names. Copies of the base's tensors that are others than the model's are put on as peft does.
        ConfigError: the model has an adapter, or other ``linears``, already; a ``task`` that the adapter has not; ``trainable`` for one
            that peft would train otherwise: with biases, stacked experts, or a network that makes its virtual tokens.
    """
    check_bare(model)
    adapter = _with_task(_read(folder, model, family, trainable=trainable), task, folder)
    if adapter.prompt_MW is not None:
        return _put_in_front(adapter, model, Path(folder), family, trainable=trainable)
    config = with_parted_head(model.config, [adapter])
    names = names_of(config, adapter.layers, family)
    check_fits(adapter, names, config, Path(folder))
    adapter = settled(adapter, names, model, folder)
    if trainable:
        _check_learns(adapter, names, folder)
    return attach(adapter, model, names, trainable=trainable)


def attach(adapter: Adapter, model: Decoder, names: Names, *, trainable: bool = False) -> Decoder:
    """Put an adapter that fits onto ``model``, in place; ``names`` are of the model's layers. Raises as `load_peft`."""
    # Copies that are what the model has part nothing.
    config = with_parted_head(model.config, [adapter])
    layers = our_layers(names, adapter, config)
    made = with_layers(config, configs_of(adapter, layers, trainable=trainable), names.parts)
    check_pools(model, made)
    for name in adapter.saved:
        # A head that is the embedding still becomes one of its own.
        if name != HEAD or model.head is not None:
            tensor_of(model, names.tensors[name].tensor)
    attached = begin(model, {"default": adapter}, names, config)
    table = table_of(adapter.table, Path(CONFIG))
    for name, tensor in adapter.saved.items():
        attached.before[name] = exchange(model, names, name, tensor)
        # What is the base's, be it other than it was, does not learn.
        learns = trainable and table.is_saved(name.rpartition(".")[0])
        tensor_of(model, names.tensors[name].tensor).requires_grad_(learns)
    attached.trainable = trainable
    put_on(model, made, layers, trainable=trainable)
    return model


def _read(folder: str | Path, model: Decoder, family: str | None, *, trainable: bool) -> Adapter:
    """The adapter in a folder; of a kind that peft alone computes as peft puts it around this model's matrices."""
    place = Path(folder)
    table = table_in(place)
    if isinstance(table, ByPeftTable):
        return read_tuned(place, model, table, family=family, trainable=trainable)
    return read_peft(place)


def _with_task(adapter: Adapter, task: int | None, folder: str | Path) -> Adapter:
    """The adapter with the task of rows that are told none."""
    if task is None:
        return adapter
    tasks = {len(one.logit_TX) for one in adapter.layers.values() if isinstance(one, Skills)}
    if not tasks:
        raise ConfigError(f"task is {task}, and {folder} is {adapter.what}, which has no tasks; leave it out")
    if not 0 <= task < min(tasks):
        raise ConfigError(f"task is {task}; {folder} has 0 to {min(tasks) - 1}")
    layers: dict[str, Any] = {module: replace(one, task=task) for module, one in adapter.layers.items()}  # type: ignore[type-var]
    return replace(adapter, layers=layers)


def _put_in_front(adapter: Adapter, model: Decoder, folder: Path, family: str | None, *, trainable: bool) -> Decoder:
    """Virtual tokens in front of every sequence."""
    config = front_of(adapter, model.config, folder, family)
    if trainable and table_of(adapter.table, folder / CONFIG).is_projected:
        raise ConfigError(
            f"{folder} has virtual tokens of a network that peft learns in their place, which is not in the file, so they cannot learn here"
        )
    streams = build_empty(config).streams
    assert isinstance(streams, Front)
    assert adapter.prompt_MW is not None
    attached = begin(model, {"default": adapter}, Names("", {}, {}, ()), model.config)
    attached.trainable = trainable
    streams.put(adapter.prompt_MW, model.embedding.weight.device, trainable=trainable)
    model.streams, model.config = streams.train(model.training), config
    return model


@torch.no_grad()
def unload(model: Decoder) -> Decoder:
    """Take the adapter off, in place, and what was put around the model since: it computes what it did before `load_peft`.

    Raises ConfigError where there is none, or a matrix that must be given back is stored in few bits by now; the model is as it was then.
    """
    attached = attached_on(model)
    # Nothing is taken off where one of them cannot be given back.
    state = state_of(model)
    for name in attached.before:
        tensor_in(state, attached.names.tensors[name].tensor)
    for name, _, _ in attached.base:
        tensor_in(state, name)
    take_around(model)
    if attached.merged is not None:
        unmerge(model)
    strip(model)
    for name, tensor in attached.before.items():
        exchange(model, attached.names, name, tensor)
    model.head, model.config, model.streams = attached.head, attached.config, None
    forget(model)
    return model


def _check_learns(adapter: Adapter, names: Names, folder: str | Path) -> None:
    """Raise ConfigError for what peft trains otherwise than we do: another training would be got than the config says."""
    if adapter.stacks:
        raise ConfigError(
            f"{folder} adapts experts that are stacked, whose gate and up share a matrix; such an adapter cannot learn here"
        )
    bias = adapter.table.get("bias", "none")
    if bias != "none":
        raise ConfigError(
            f"{folder} says bias {bias!r}, and biases of the base do not learn here; train it with 'none', or leave out trainable"
        )
    for name in adapter.saved:
        if names.tensors[name].piece.where:
            raise ConfigError(
                f"{folder} brings {name} whole, which is a part of a greater tensor here and does not learn alone; leave out trainable"
            )
