"""A base on which something else learns: its routers are not balanced, and nothing in it moves from step to step.

Gradients do not tell it. Biases, loads and schedules of candidates are buffers that step hooks move, in routers without parameters too,
and a training may freeze routers while the experts that they choose learn: those are balanced on.
"""

from torch import nn

__all__ = ["fix", "is_fixed", "release"]

_FIXED = "is_fixed_base"


def fix(model: nn.Module) -> None:
    """From here on all modules that ``model`` has by now stay as they are; what is put onto it later does not."""
    for module in model.modules():
        setattr(module, _FIXED, True)


def release(model: nn.Module) -> None:
    """All modules of ``model`` may be balanced and have their step hooks again."""
    for module in model.modules():
        module.__dict__.pop(_FIXED, None)


def is_fixed(module: object) -> bool:
    """Whether it is of a base that stays as it is."""
    return bool(getattr(module, _FIXED, False))
