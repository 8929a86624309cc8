"""`fuse_adapter`: an adapter onto a model for good: into its matrices where they can take it in, beside or in front of them otherwise."""
# Shapes: B rows, L positions, V vocabulary

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anabranch.adapters.attach import load_peft
from anabranch.adapters.front import Front
from anabranch.adapters.graft import layers_of
from anabranch.adapters.ladder import Ladder
from anabranch.adapters.merging import merge
from anabranch.adapters.mhr.few_shot import merge_task
from anabranch.adapters.own_folder import is_own, read_own
from anabranch.adapters.put_on import take_off
from anabranch.adapters.taking_in import can_take_in, take_in
from anabranch.adapters.tasks import goes_by_task, task_names, task_rows
from anabranch.adapters.tuners import PeftTuner
from anabranch.errors import ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.lm.generate import evaluating

__all__ = ["Fused", "fuse_adapter"]


@dataclass(frozen=True)
class Fused:
    """What was done.

    Attributes:
        merged: whether matrices took the adapter in.
        difference: the greatest of logits, between the adapter as it was read and the model as it is now, over tokens drawn at random.
        greatest: of these logits.
    """

    merged: bool
    difference: float
    greatest: float


@torch.no_grad()
def fuse_adapter(model: Decoder, folder: str | Path, *, task: str | None = None, beside: bool = False) -> Fused:
    """Put the adapter in ``folder`` onto ``model``, in place and for good.

    Args:
        model: the base; afterwards a plain model, or one whose config names what is beside its matrices.
        folder: of peft's, or of our own.
        task: of an adapter that goes by task, the one that the model is for; None leaves all tasks beside.
        beside: leave it beside also where matrices could take it in.

    Raises ConfigError for a ``task`` of what does not go by task, and for matrices that would take it in and are stored in few bits, or
    whose type cannot hold the sum; InputError for a task that there is not; others as `load_peft` and `read_own`.
    """
    own = is_own(folder)
    (read_own if own else load_peft)(folder, model)
    token_BL = torch.randint(model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    token_BL = token_BL.to(model.embedding.weight.device)
    state = _told(model, task, token_BL, folder)
    with evaluating(model):
        wanted_BLV = model(token_BL, state=dict(state)).logits_BLV
        merged = _fused(model, own=own, task=task, beside=beside)
        # All tasks are still there where none was asked for.
        found_BLV = model(token_BL, state={} if task is not None else dict(state)).logits_BLV
    difference = (found_BLV - wanted_BLV).float().abs().max()
    return Fused(merged, float(difference), float(wanted_BLV.float().abs().max()))


def _told(model: Decoder, task: str | None, token_BL: Tensor, folder: str | Path) -> dict[str, Any]:
    if not goes_by_task(model):
        if task is not None:
            raise ConfigError(f"--task is {task!r}, and {folder} does not go by task; leave it out")
        return {}
    name = task_names(model)[0] if task is None else task
    return task_rows(model, [name] * len(token_BL), token_BL.shape[1])


def _fused(model: Decoder, *, own: bool, task: str | None, beside: bool) -> bool:
    """Whether matrices took it in."""
    if task is not None:
        if not own:
            raise ConfigError("a task of peft's Poly is left beside with all others; leave out --task")
        merge_task(model, task)
    layers = layers_of(model).values()
    is_around = isinstance(model.streams, Front) or isinstance(model.config.block, Ladder.Config)
    if beside or is_around or not all(map(can_take_in, layers)):
        tuner = next((layer for layer in layers if isinstance(layer, PeftTuner)), None)
        if tuner is not None:
            raise ConfigError(
                f"{tuner.config.method} is computed by peft, which no saved model holds beside its matrices"
                f"{'; leave out --beside' if can_take_in(tuner) else ', and no matrix can take it in; name it with --adapter instead'}"
            )
        return False
    if own:
        take_in(model)
        take_off(model)
    else:
        merge(model, keep=False)
    return True
