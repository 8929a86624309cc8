"""`Stages`: while a training is *hard*, labels choose experts, which learn each from its own task; while it is *soft*, routers choose."""
# Shapes: B rows

from collections.abc import Iterable
from typing import Any, Literal

from torch import Tensor

from anabranch.adapters.lora_mixer.layer import MixedLowRank, labelled_rows
from anabranch.config import Config, Field, configclass

__all__ = ["Order", "Stages"]


@configclass
class Order(Config):
    """When labels choose and when routers do, and what holds experts and leads routers.

    Attributes:
        stages: ``soft``: routers alone choose (plug and play, experts given); ``hard``: labels alone (experts trained);
            ``hard_soft``: hard for the first half; ``anneal``: hard for a third, then p = (1 - a) onehot + a softmax with a from 0
            to 1 over the second third, then soft.
        beta: of the preservation loss.
        alignment: c_T of the loss that draws a row's mean scores to its expert; None for 0 where stages are ``soft``, else 0.1.
    """

    stages: Literal["soft", "hard", "hard_soft", "anneal"] = "soft"
    beta: float = Field(default=0.01, ge=0)
    alignment: float | None = Field(default=None, ge=0)


@configclass
class Stages(Order):
    """As `Order`, and ``experts``: what they do where routers choose: stay ``frozen``, are ``preserved``, or are ``free``."""

    experts: Literal["frozen", "preserved", "free"] = "frozen"

    def soft_at(self, fraction: float) -> float:
        """a, after this share of the training: 0 hard, 1 soft."""
        if self.stages == "hard_soft":
            return float(fraction >= 0.5)
        if self.stages == "anneal":
            return min(1.0, max(0.0, 3 * fraction - 1))
        return float(self.stages == "soft")

    @property
    def c_t(self) -> float:
        """The weight of the alignment."""
        if self.alignment is not None:
            return self.alignment
        return 0.0 if self.stages == "soft" else 0.1

    @property
    def needs_labels(self) -> bool:
        """Whether a row without one could have no expert and no router at some time."""
        return self.stages in ("hard", "hard_soft")

    @property
    def needs_tasks(self) -> bool:
        """Whether the task of a row says something."""
        return self.stages != "soft" or self.c_t > 0

    @property
    def experts_learn(self) -> bool:
        """Whether they do at any time."""
        return self.stages != "soft" or self.experts != "frozen"

    @property
    def routers_learn(self) -> bool:
        """Whether they do at any time."""
        return self.stages != "hard" or self.c_t > 0

    def state(self, expert_B: Tensor, length: int, fraction: float, *, num_layers: int) -> dict[str, Any]:
        """What a pass of a training is told, see `labelled_rows`; ``num_layers`` are mixed."""
        soft = self.soft_at(fraction)
        # What layers emit is averaged over them, and their losses are to be added up.
        keep = self.beta * num_layers if self.experts == "preserved" and soft > 0 else 0.0
        return labelled_rows(expert_B, length, soft=soft, alignment=self.c_t, preservation=keep)

    def enter(self, layers: Iterable[MixedLowRank], step: int, fraction: float) -> None:
        """Before a step: freeze and free experts as its stage wants, and note what they are where they are preserved from now on."""
        soft = self.soft_at(fraction)
        learn = self.experts_learn and (soft == 0 or self.experts != "frozen")
        before = self.soft_at(fraction * (step - 1) / step) if step else 0.0
        for layer in layers:
            layer.pool.requires_grad_(learn)
            if soft > 0 and before == 0:
                layer.keep()
