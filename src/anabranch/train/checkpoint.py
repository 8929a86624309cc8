"""Checkpoints of a run: ``OUT/checkpoints/step-00000100/``, a model folder with the trainer's state beside the model.

    config.json, model.safetensors, tokenizer.json, ...   a model folder, see `anabranch.lm.checkpoint`
    optimizer.safetensors                                  AdamW's moments by parameter name
    trainer.json                                           step, place in the data, counts, and the run's config

A folder appears whole or not at all, and an old one is removed only after a newer one is whole. No random state is stored: what is
random in step n is a function of (seed, n).
"""

import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from anabranch.data.tokenizer import Tokenizer
from anabranch.errors import CheckpointError
from anabranch.files import atomic_folder, atomic_write_json
from anabranch.lm.checkpoint import write_model
from anabranch.lm.decoder import Decoder
from anabranch.lm.tensors import read_json

SCHEMA = 1
TRAINER_FILE = "trainer.json"
OPTIMIZER_FILE = "optimizer.safetensors"
_FOLDER = "checkpoints"


def checkpoint_path(out: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return out / _FOLDER / f"step-{step:08d}"


def checkpoints(out: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(file.parent for file in Path(out).glob(f"{_FOLDER}/step-*/{TRAINER_FILE}"))


def write_checkpoint(
    out: Path,
    state: dict[str, Any],
    model: Decoder,
    tokenizer: Tokenizer,
    model_tensors: dict[str, Tensor],
    optimizer_tensors: dict[str, Tensor],
    *,
    keep: int,
) -> Path:
    """Write a checkpoint whole, then remove all but the newest ``keep``. ``state["step"]`` names it.

    Raises CapacityError if the disk is full, DataError if the place cannot be written; older checkpoints are then untouched.
    """
    path = checkpoint_path(out, state["step"])
    with atomic_folder(path) as temporary:
        write_model(temporary, model, tokenizer, state=model_tensors)
        ready = {name: tensor.detach().cpu().contiguous() for name, tensor in optimizer_tensors.items()}
        save_file(ready, temporary / OPTIMIZER_FILE)
        atomic_write_json(temporary / TRAINER_FILE, {"schema": SCHEMA, **state})
    for old in checkpoints(out)[:-keep]:
        _remove(old)
    return path


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The trainer's state and the optimizer's tensors. Raises CheckpointError if they are damaged or of a newer version."""
    state = read_json(path / TRAINER_FILE)
    schema = state.pop("schema", None)
    if not isinstance(schema, int) or not 1 <= schema <= SCHEMA:
        raise CheckpointError(f"schema in {path / TRAINER_FILE} is {schema!r}; this version reads 1 to {SCHEMA}")
    try:
        return state, load_file(path / OPTIMIZER_FILE)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"cannot read {path / OPTIMIZER_FILE}: {error}; remove {path} to go on from the checkpoint before"
        ) from None


def remove_leftovers(out: Path) -> None:
    """Remove what a process killed while it wrote or removed a checkpoint left behind."""
    for folder in out.glob(f"{_FOLDER}/.step-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _remove(path: Path) -> None:
    hidden = path.with_name(f".{path.name}.old")  # one step, so that no half-removed checkpoint can be taken for one
    path.replace(hidden)
    shutil.rmtree(hidden, ignore_errors=True)
