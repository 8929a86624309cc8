"""The compiled attention over a paged key-value cache, behind tensors."""

from torch import Tensor

__all__ = ["attend", "can"]


def can(key_PSGD: Tensor) -> bool:
    """Whether the kernel takes such a pool."""
    return False


def attend(*args, **options):
    raise NotImplementedError
