"""Step hooks: methods ``before_step`` and ``on_step`` of a task or any module, which the trainer calls around its steps.

``before_step(step, fraction)`` is called before each step, with torch's generators seeded by seed and step: what is drawn there is the
same in all processes, and when a step is done again. ``on_step(step, fraction)`` is called before the first step, after every step, when
a run is resumed, and when it goes on from the step of others that it learns with; what it changes is what the next step sees. ``step`` is
the number of finished steps, ``fraction`` that of all. Whatever a hook needs to go on must be in buffers, or follow from its arguments.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from anabranch.routing import sync_loads
from anabranch.routing.fixed import is_fixed

__all__ = ["StepHooks", "follow_steps"]

Hook = Callable[[int, float], None]


class StepHooks:
    """The hooks of ``model``'s modules, and of ``others`` after them.

    Args:
        model: all of its modules are asked but those of a base that stays as it is (`anabranch.routing.fixed`).
        steps: of the whole training.
        others: e.g. a task.
    """

    def __init__(self, model: nn.Module, steps: int, others: Iterable[Any] = ()) -> None:
        owners = [*(module for module in model.modules() if not is_fixed(module)), *others]
        self.steps = steps
        self.before: list[Hook] = _methods(owners, "before_step")
        self.after: list[Hook] = _methods(owners, "on_step")

    def run_before(self, step: int) -> None:
        """All ``before_step``, after ``step`` finished steps."""
        self._run(self.before, step)

    def run_after(self, step: int) -> None:
        """All ``on_step``, after ``step`` finished steps."""
        self._run(self.after, step)

    def _run(self, hooks: list[Hook], step: int) -> None:
        for hook in hooks:
            hook(step, step / max(self.steps, 1))


def _methods(owners: Iterable[Any], name: str) -> list[Hook]:
    return [getattr(owner, name) for owner in owners if callable(getattr(owner, name, None))]


def follow_steps(optimizer: torch.optim.Optimizer, model: nn.Module, num_steps: int, *, start: int = 0) -> Any:
    """Run the model's step hooks around every step of ``optimizer``, for a loop of one's own. `Trainer` does it by itself.

    Loads are counted over all processes first. ``before_step`` is called right behind ``on_step``.

    Args:
        optimizer: its steps are counted.
        model: whose modules have hooks.
        num_steps: of the whole training.
        start: steps that were finished before, when a training is resumed.

    Returns:
        A handle whose ``remove()`` ends it.
    """
    hooks, done = StepHooks(model, num_steps), start

    def run(*_: Any) -> None:
        nonlocal done
        done += 1
        sync_loads(model)
        hooks.run_after(done)
        hooks.run_before(done)

    hooks.run_after(start)
    hooks.run_before(start)
    return optimizer.register_step_post_hook(run)
