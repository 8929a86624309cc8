"""What a checkpoint of an adaptation holds: numbers of the adapter, the task's config, and by what the base is known again."""

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anabranch.config import Config, Field, configclass, from_dict, to_dict
from anabranch.errors import CheckpointError, ConfigError, DataError
from anabranch.files import atomic_write_json, read_json
from anabranch.lm.decoder import Decoder
from anabranch.lm.shards import write_file
from anabranch.nn import Linear
from anabranch.train.task import FORMAT

__all__ = ["NUMBERS", "check_begun", "digest_of_model", "layers_in", "write_checkpoint"]

NUMBERS, CONFIG = "adapter.safetensors", "config.json"
# Numbers of each tensor by which a base is known again.
_SAMPLED = 512


@configclass
class _Layers(Config):
    """What stands beside matrices, by pattern."""

    linears: dict[str, Linear.Config] = Field(default_factory=dict)


def write_checkpoint(
    folder: Path,
    config: Config,
    linears: Mapping[str, Linear.Config],
    tensors: Mapping[str, Tensor],
    names: Collection[str],
) -> None:
    """Write into ``folder`` the ``tensors`` of these names, the task's ``config``, and the layers beside matrices, by pattern."""
    write_file(folder / NUMBERS, {name: tensor.detach() for name, tensor in tensors.items() if name in names})
    told = {"schema": 1, "format": FORMAT, "task": to_dict(config), "linears": to_dict(linears)}
    atomic_write_json(folder / CONFIG, told)


def layers_in(checkpoint: Path | None) -> dict[str, Linear.Config] | None:
    """The layers beside matrices of a run, by pattern; None at its beginning, and where its checkpoint does not say.

    Raises CheckpointError where what it says is none.
    """
    if checkpoint is None:
        return None
    told = read_json(checkpoint / CONFIG).get("linears")
    try:
        return None if told is None else from_dict(_Layers, {"linears": told}).linears
    except ConfigError as error:
        raise CheckpointError(f"{checkpoint / CONFIG} does not describe layers: {error}") from None


def check_begun(state: Mapping[str, Any], model: str, base: str, began_from: Mapping[str, str]) -> None:
    """Raise DataError where a run began from another base than ``model`` is now, or from other adapters.

    Args:
        state: of the task, in the checkpoint.
        model: the base's name.
        base: its `digest_of_model`.
        began_from: digests of the adapters that are read again, by options of the method.
    """
    if state["base"] != base:
        raise DataError(
            f"{model} is another model than when the run began: the base's weights are others; bring those back, or start a new run"
        )
    # Earlier checkpoints do not say.
    for option, digest in began_from.items():
        if state.get("began_from", {}).get(option, digest) != digest:
            raise DataError(
                f"method.{option} names adapters with other numbers or settings than when "
                "the run began; bring those back, or start a new run"
            )


def digest_of_model(model: Decoder) -> str:
    """Of names, sizes and some numbers of each tensor: enough to tell another model, in no time."""
    hashed = hashlib.sha256()
    for name, value in model.state_dict().items():
        flat = value.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // _SAMPLED)][:_SAMPLED]
        hashed.update(f"{name} {list(value.shape)} {value.dtype};".encode())
        hashed.update(some.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()[:16]
