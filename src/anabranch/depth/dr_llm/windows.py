"""Windowed pooling: a prompt of any length as a few means, which are what a router sees of it.

The first W' s of T tokens are cut into W' windows of s = floor(T / W') tokens each, W' = min(W, T); what is left over at the end is seen by
none. Padding is in no window.
"""
# Shapes: B sequences, L positions, D width, W windows

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.errors import ConfigError, DataError

__all__ = ["plain_windows", "pool_windows"]


def plain_windows(x_BLD: Tensor, windows: int) -> Tensor:
    """mean_BWD in float32 of sequences without padding: of the W' windows that are there alone. L must be at least 1."""
    used = min(windows, x_BLD.shape[1])
    size = x_BLD.shape[1] // used
    return x_BLD[:, : used * size].float().unflatten(1, (used, size)).mean(2)


def pool_windows(x_BLD: Tensor, mask_BL: Tensor | None, windows: int) -> tuple[Tensor, Tensor]:
    """(mean_BWD, weight_BW): the mean of each window in float32, and 1 / W' for windows that are there, 0 for others.

    Args:
        x_BLD: states of a prompt.
        mask_BL: False (0) at padding, on any side; None for none.
        windows: W.

    Raises ConfigError for a mask of another shape, DataError for a sequence without tokens.
    """
    batch, length, _ = x_BLD.shape
    if mask_BL is not None and mask_BL.shape != (batch, length):
        raise ConfigError(f"the mask has shape {tuple(mask_BL.shape)}, and the states are of {(batch, length)} tokens")
    if not length:
        raise DataError("sequence 0 has no tokens, so that a router sees nothing of it")
    if mask_BL is None or bool(mask_BL.all()):
        mean_BWD = plain_windows(x_BLD, windows)
        used = mean_BWD.shape[1]
        weight_W = torch.zeros(windows, device=x_BLD.device)
        weight_W[:used] = 1 / used
        return F.pad(mean_BWD, (0, 0, 0, windows - used)), weight_W.expand(batch, -1)
    real_BL = mask_BL.to(x_BLD.device).bool()
    count_B = real_BL.sum(1)
    if not bool((count_B > 0).all()):
        raise DataError(
            f"sequence {int((count_B == 0).nonzero()[0])} has no tokens, so that a router sees nothing of it"
        )
    used_B = count_B.clamp_max(windows)
    size_B = count_B // used_B
    # Which window each token is in, counted among the real ones; what is left over would be in window W, which there is not.
    rank_BL = real_BL.long().cumsum(1) - 1
    window_BL = rank_BL // size_B.unsqueeze(1)
    member_BWL = real_BL.unsqueeze(1) & (
        window_BL.unsqueeze(1) == torch.arange(windows, device=x_BLD.device)[None, :, None]
    )
    # Zero times what padding holds is NaN where that is infinite.
    value_BLD = x_BLD.float().masked_fill(~real_BL.unsqueeze(-1), 0.0)
    mean_BWD = member_BWL.float() @ value_BLD / size_B[:, None, None]
    there_BW = torch.arange(windows, device=x_BLD.device) < used_B.unsqueeze(1)
    return mean_BWD, there_BW.float() / used_B.unsqueeze(1)
