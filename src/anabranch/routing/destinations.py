"""What a router's destinations are: which of them are a layer's own, which are open, and who keeps their loads even together."""
# Shapes: N items, E destinations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from anabranch.config import Config as BaseConfig
from anabranch.config import Part, configclass
from anabranch.routing.balance import Balancer
from anabranch.routing.context import RoutingContext


class Candidates(Part, nn.Module, family="candidates"):
    """Interface of what closes destinations for a while (a schedule, a group limit that is learned, ...).

    ``stage`` says where the mask acts: ``pre_softmax`` sets closed logits to minus infinity, ``post_softmax`` sets closed scores to zero,
    so closed destinations stay in the softmax's denominator.
    """

    @configclass
    class Config(BaseConfig):
        """Base of candidate configs."""

    stage: Literal["pre_softmax", "post_softmax"]

    @property
    def only_in_training(self) -> bool:
        """Whether all destinations are open outside of training."""
        return False

    def open_NE(self, num_items: int, context: RoutingContext) -> Tensor | None:
        """bool ``[E]`` or ``[N, E]``, True where a destination may be chosen; None if all may."""
        raise NotImplementedError  # abstract


@dataclass(frozen=True)
class Destinations:
    """What a router is told of its destinations beside their number. By default they are its own, all open.

    Attributes:
        pool: name of the expert pool that they index, if several routers choose from one; None otherwise.
        own_start: first destination in the pool that belongs to the router's layer.
        candidates: what closes some of them.
        balance: balancers that the routers of several layers have together, beside those of ``Router.Config.balance``.
    """

    pool: str | None = None
    own_start: int = 0
    candidates: Candidates | None = None
    balance: tuple[Balancer, ...] = ()
