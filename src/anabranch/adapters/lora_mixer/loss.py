"""How LoRA-Mixer routes: softly while it trains and to the best few afterwards; and its routing loss, with either sign of the entropy."""
# Shapes: N items, E experts, K choices per item

from typing import Literal, cast

from torch import Tensor

from anabranch.config import Config, Field, configclass
from anabranch.errors import ConfigError
from anabranch.routing import Balancer, RoutingContext, Select, TopK, count_destinations
from anabranch.routing.balance import Observation, masked_mean
from anabranch.routing.select import stable_top_k

__all__ = ["SoftThenTopK", "Specialisation", "SpecialisationLoss"]


class SoftThenTopK(Select, kind="soft_then_top_k"):
    """All experts by their scores in training, afterwards the ``top_k`` best, weighed as ``normalize`` says (default: to sum to 1)."""

    @configclass
    class Config(Select.Config):
        """Attributes: ``top_k``, how many afterwards (default 3; all where there are fewer), ``normalize``, of these."""

        normalize: Literal["none", "sum", "softmax"] = "sum"
        top_k: int = Field(default=3, ge=1)

        def most_choices(self, num_destinations: int) -> None:
            """All in training, few afterwards."""
            return

        def kept(self, num_destinations: int) -> int:
            """How many afterwards."""
            return min(self.top_k, num_destinations)

    config: Config

    def __init__(self, config: Config, num_destinations: int) -> None:
        super().__init__(config, num_destinations)
        self.soft = TopK.Config(top_k=num_destinations, scale=config.scale).build(num_destinations)
        best = TopK.Config(top_k=config.kept(num_destinations), normalize=config.normalize, scale=config.scale)
        self.best = best.build(num_destinations)

    def of_pass(self, training: bool) -> Select:
        """All in training, else the best."""
        return cast(Select, self.soft if training else self.best)

    def choose(self, value_NE: Tensor) -> Tensor:
        """The best."""
        return self.best.choose(value_NE)


@configclass
class Specialisation(Config):
    """What is even and what is decided.

    Attributes:
        entropy: ``minimise`` it, or ``maximise`` it as printed.
        scale_by_experts: whether the balance has the factor E, see `SpecialisationLoss`.
        top_k: experts that a token counts for (default 3, as many as it uses later; all where there are fewer).
    """

    entropy: Literal["minimise", "maximise"] = "minimise"
    scale_by_experts: bool = True
    top_k: int = Field(default=3, ge=1)


class SpecialisationLoss(Balancer, kind="specialisation"):
    """L = a E sum_i pbar_i fbar_i + lambda mean H(p): even over all tokens, decided for each (LoRA-Mixer's RSL, eq. 5).

    pbar is the mean score of expert i, fbar the share of tokens among whose ``top_k`` it is, made to sum to 1; H is in nats. The paper
    prints -lambda, by which routers are kept undecided, and says that they become decided: ``entropy="maximise"`` is what is printed. The
    factor E makes the first term a where loads are even, as with other losses; ``scale_by_experts=False`` is the printed one.
    """

    @configclass
    class Config(Specialisation, Balancer.Config):
        """As `Specialisation`, and the weights.

        Attributes:
            a: of the balance (default 1).
            lam: lambda, of the entropy (default 0.1).
            schedule: of lambda: ``constant``, or ``rising`` from 0 over the first third of the training.
        """

        a: float = Field(default=1.0, ge=0)
        lam: float = Field(default=0.1, ge=0)
        schedule: Literal["constant", "rising"] = "constant"

    config: Config

    def __init__(self, config: Config, num_destinations: int) -> None:
        super().__init__(config, num_destinations)
        self.lam = 0.0 if config.schedule == "rising" else config.lam

    def on_step(self, step: int, fraction: float) -> None:
        """Where lambda is by now; it follows from how far the training is."""
        if self.config.schedule == "rising":
            self.lam = self.config.lam * min(1.0, 3 * fraction)

    def forward(self, seen: Observation, context: RoutingContext) -> None:
        """Emit ``specialisation``, and the entropy as a metric."""
        config, mask_N = self.config, context.item_mask_N
        share_NE = seen.probability_NE()
        chosen_NK = stable_top_k(share_NE.detach(), min(config.top_k, self.num_destinations))
        # What is closed has no share, and is chosen only where nothing else is left.
        unused_NK = share_NE.gather(1, chosen_NK) <= 0
        if mask_N is not None:
            unused_NK = unused_NK | ~mask_N.unsqueeze(-1)
        load_E = count_destinations(chosen_NK.masked_fill(unused_NK, -1), self.num_destinations).to(share_NE.dtype)
        product = (load_E / load_E.sum().clamp_min(1) * masked_mean(share_NE, mask_N)).sum()
        factor = seen.num_open(mask_N) if config.scale_by_experts else 1
        entropy = masked_mean(_entropy(share_NE).unsqueeze(-1), mask_N).squeeze(0)
        sign = 1 if config.entropy == "minimise" else -1
        context.emit_loss("specialisation", config.a * factor * product + sign * self.lam * entropy)
        if context.is_measured:
            context.emit_metric("routing_entropy", entropy)


def _entropy(share_NE: Tensor) -> Tensor:
    """In nats."""
    log_NE = share_NE.clamp_min(1e-30).log()
    return -(share_NE * log_NE).sum(-1)


def check_top_k(top_k: int, num_experts: int) -> None:
    """Raise ConfigError for more than there are."""
    if top_k > num_experts:
        raise ConfigError(f"top_k is {top_k}, but there are {num_experts} experts; use 1 to {num_experts}")
