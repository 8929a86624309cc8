"""What routers see on the label paths, computed once: the base is frozen and the path is given, so nothing of it changes in training.

The pooled means of all blocks, questions and windows lie in a file that is mapped, block after block, since they may be larger than the
model; routers of a few blocks at a time read their own.
"""
# Shapes: N questions, B of them, L positions or blocks, W windows, D width

import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.depth.dr_llm.labels import CHOICES, Labels
from anabranch.depth.dr_llm.runner import padded
from anabranch.depth.dr_llm.windows import pool_windows
from anabranch.depth.routed import routed_pass
from anabranch.depth.stack import BlockStack
from anabranch.errors import DataError, NotFiniteError
from anabranch.files import explained

__all__ = ["Features", "collect_features"]


@dataclass
class Features:
    """Pooled states before each block, on label paths.

    Attributes:
        mean_LNWD: float32, mapped from a file.
        weight_NW: 1 / W' of windows that are there.
        decision_LN: the labels.
    """

    mean_LNWD: np.ndarray
    weight_NW: Tensor
    decision_LN: Tensor

    @property
    def num_bytes(self) -> int:
        """Of the file."""
        return self.mean_LNWD.nbytes

    def of_blocks(self, blocks: slice) -> Tensor:
        """mean_LNWD of some blocks, in memory."""
        return torch.from_numpy(np.array(self.mean_LNWD[blocks]))


@torch.no_grad()
def collect_features(
    stack: BlockStack,
    labels: Labels,
    *,
    windows: int = 8,
    features: Literal["previous", "first"] = "previous",
    folder: str | Path | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Features:
    """Run each prompt on its label path and keep what routers see.

    Args:
        stack: of the model, in evaluation; it is not changed and gets no gradient.
        labels: prompts and paths.
        windows: W.
        features: states before each block; or those before the first one for all, as the baseline sees them.
        folder: where the file lies while it is used; None for the system's temporary files.
        batch_size: prompts at once.
        progress: is told how many prompts are done.

    Raises DataError for labels of another model, depth or tokens that the model has not, NotFiniteError where its states are NaN.
    """
    _check(stack, labels)
    count, num_blocks = len(labels), stack.num_blocks
    kept = num_blocks if features == "previous" else 1
    mean_LNWD = _mapped((kept, count, windows, stack.width), folder)
    weights = []
    for start in range(0, count, batch_size):
        progress(start, count)
        token_BL, mask_BL = padded(labels.prompts[start : start + batch_size], stack.device)
        guide = _Guide(
            labels.decision_NL[start : start + batch_size], windows, mean_LNWD[:, start : start + batch_size]
        )
        routed_pass(stack, guide, token_BL, attention_mask=mask_BL, last_only=True)
        assert guide.weight_BW is not None, "there is a block"
        weights.append(guide.weight_BW.cpu())
    progress(count, count)
    shown_LNWD = mean_LNWD if kept == num_blocks else np.broadcast_to(mean_LNWD, (num_blocks, *mean_LNWD.shape[1:]))
    return Features(shown_LNWD, torch.cat(weights), labels.decision_NL.T.contiguous())


class _Guide:
    """Decides what the labels say, and keeps what a router would have seen."""

    def __init__(self, decision_BL: Tensor, windows: int, mean_LBWD: np.ndarray) -> None:
        self._decision_BL, self._windows, self._mean_LBWD = decision_BL, windows, mean_LBWD
        self.weight_BW: Tensor | None = None

    def decide(self, layer: int, x_BLD: Tensor, mask_BL: Tensor, control: float) -> tuple[Tensor, Tensor]:
        """See `anabranch.depth.routed.Decider`."""
        if layer < len(self._mean_LBWD):
            mean_BWD, self.weight_BW = pool_windows(x_BLD, mask_BL, self._windows)
            if not bool(torch.isfinite(mean_BWD).all()):
                raise NotFiniteError(
                    f"what goes into block {layer} is NaN or infinite; check the model's weights and dtype"
                )
            self._mean_LBWD[layer] = mean_BWD.cpu().numpy()
        decision_B = self._decision_BL[:, layer]
        return decision_B, F.one_hot(decision_B, CHOICES).float()


def _mapped(shape: tuple[int, ...], folder: str | Path | None) -> np.ndarray:
    """An array of float32 in a file that is gone when nobody has it any more. Raises CapacityError where the disk has no room."""
    place = Path(folder or tempfile.gettempdir())
    with explained(place / "features"), tempfile.TemporaryFile(dir=place) as file:
        if hasattr(os, "posix_fallocate"):
            # Otherwise a full disk would end the process at some later moment, when a page is written.
            os.posix_fallocate(file.fileno(), 0, math.prod(shape) * 4)
        return np.memmap(file, np.float32, "w+", shape=shape)


def _check(stack: BlockStack, labels: Labels) -> None:
    if labels.num_blocks != stack.num_blocks:
        raise DataError(
            f"the paths are of a model with {labels.num_blocks} blocks, and this one has {stack.num_blocks}"
        )
    own = stack.fingerprint()
    if labels.model and labels.model != own:
        raise DataError(
            f"the paths are of another model: fingerprint {labels.model}, and this one has {own}; search paths of this model"
        )
    for name, prompt in zip(labels.ids, labels.prompts, strict=True):
        beyond = [token for token in prompt if token >= stack.vocabulary]
        if beyond:
            raise DataError(f"question {name!r} has token {beyond[0]}; the model has 0 to {stack.vocabulary - 1}")
