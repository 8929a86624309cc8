"""A base on which something else learns: its routers are not balanced, and nothing in it moves from step to step.

Gradients do not tell it. Biases, loads and schedules of candidates are buffers that step hooks move, in routers without parameters too,
and a training may freeze routers while the experts that they choose learn: those are balanced on.

Whoever puts something onto a model fixes it by a name of its own, and releases it by that name alone: what stays on holds the base still.
"""

from torch import nn

__all__ = ["fix", "is_fixed", "release"]

_FIXED = "fixed_by"


def fix(model: nn.Module, by: str) -> None:
    """From here on the modules of ``model`` stay as they are, but what stands on a fixed base already, or is put onto it later."""
    modules = list(model.modules())
    for module in [module for module in modules if is_fixed(module)] or modules:
        if by not in (others := getattr(module, _FIXED, ())):
            setattr(module, _FIXED, (*others, by))


def release(model: nn.Module, by: str) -> None:
    """Modules of ``model`` that nothing but ``by`` fixed may be balanced and have their step hooks again."""
    for module in model.modules():
        left = tuple(one for one in module.__dict__.pop(_FIXED, ()) if one != by)
        if left:
            setattr(module, _FIXED, left)


def is_fixed(module: object) -> bool:
    """Whether it is of a base that stays as it is."""
    return bool(getattr(module, _FIXED, ()))
