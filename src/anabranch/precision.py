"""In which precision numbers are worked out: casts that cost nothing where there is nothing to do, and autocast seen and switched off."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["autocast_dtype", "cast", "full_precision", "wide"]


def full_precision(device: str) -> AbstractContextManager[Any]:
    """Autocast off. Where it is off already, as in most decoding, the switch itself would cost as much as the work inside."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device, enabled=False)


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast computes in on this type of device; None where it is off, and on meta, which it does not know."""
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def wide(x: Tensor) -> Tensor:
    """Numbers that must not be rounded to half precision, such as scores and norms: in fp32, or in fp64 if they are fp64 already."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value.to(dtype)``, at no cost where there is nothing to do: asking torch takes longer than looking."""
    return value if value.dtype == dtype else value.to(dtype)
