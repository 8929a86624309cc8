"""`TargetKL`: what PPO does where the policy has moved too far from the one that acted: learn no more from this rollout, or more slowly.

Mini-batches that are passed over are steps of the training all the same: so many samples are so many steps, and the learning rate falls by
samples, however often it was stopped.
"""

from __future__ import annotations

from typing import Any, Literal

from anabranch.errors import CheckpointError
from anabranch.rl.rollout import Rollouts

__all__ = ["TargetKL"]


class TargetKL:
    """See the module.

    Args:
        target: divergence in nats that is too far; None for never.
        then: ``stop`` or ``halve``.
        epochs: of a rollout.

    Attributes:
        stopped: number of the last rollout that was stopped; None for none.
        halved: of the last one after which the rate was halved; None for none.
        epochs_passed: epochs that were passed over so far, of all rollouts.
        halvings: of the rate, so far.
    """

    def __init__(self, target: float | None, then: Literal["stop", "halve"], epochs: int) -> None:
        self._target, self._then, self._epochs = target, then, epochs
        self.stopped: int | None = None
        self.halved: int | None = None
        self.epochs_passed, self.halvings = 0, 0

    def pace(self, rollouts: Rollouts) -> float:
        """What the learning rate is multiplied by before the next mini-batch. The same where it is asked again."""
        rollout, done = rollouts.rollout, rollouts.epochs_done
        if self._target is None:
            return 1.0
        if self._then == "halve":
            is_over = rollout is not None and done == self._epochs and rollout.number != self.halved
            if rollout is not None and is_over and rollouts.divergence() > self._target:
                self.halved, self.halvings = rollout.number, self.halvings + 1
            return 0.5**self.halvings
        if rollout is None or done in (0, self._epochs):
            return 1.0
        if done == int(done) and rollout.number != self.stopped and rollouts.divergence() > self._target:
            self.stopped, self.epochs_passed = rollout.number, self.epochs_passed + self._epochs - int(done)
        return float(rollout.number != self.stopped)

    def epochs_passed_so_far(self, rollouts: Rollouts) -> float:
        """`epochs_passed`, without what is still to be passed over of the rollout that is held."""
        is_within = rollouts.rollout is not None and rollouts.rollout.number == self.stopped
        return self.epochs_passed - (self._epochs - rollouts.epochs_done if is_within else 0.0)

    def told(self) -> dict[str, float]:
        """To be logged."""
        if self._target is None:
            return {}
        name = "epochs_passed" if self._then == "stop" else "halvings"
        return {name: float(getattr(self, name))}

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "stopped": self.stopped,
            "halved": self.halved,
            "epochs_passed": self.epochs_passed,
            "halvings": self.halvings,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what `state_dict` gave; {} is that of a run of before there was a target. Raises CheckpointError."""
        if not state:
            return
        try:
            self.stopped, self.halved = state["stopped"], state["halved"]
            self.epochs_passed, self.halvings = int(state["epochs_passed"]), int(state["halvings"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"what came of target_kl cannot be read ({error}); the checkpoint is damaged"
            ) from None
